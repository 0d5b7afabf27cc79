"""The contracts between the engine and its stores; what they carry is in `records`, and can be imported from here too.

    ResourceManager -> IStorage (SimpleStorage) -> MetaStore + ResourceStore

- A **MetaStore** is the truth. One atomic `commit` carries a resource's metadata, the record of a revision and its index.
- A **ResourceStore** holds immutable bodies by uid. A body is put first and committed second; a body without a commit is an
  invisible orphan that `maintain` sweeps.

Everything is `async` and may be called from several event loops at once. A store that keeps what it is given through a
crash says `durable = True`. Only the abstract methods must be written by whoever makes a store; `tests/conformance` tells
whether they keep their word.
"""

from __future__ import annotations

import datetime as dt
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Callable, Hashable, Sequence
from typing import ClassVar, Protocol

from ..query import Cursor, Query
from ..values import Key
from .records import (
    KEEP_KEYS_US,
    AlreadyCommitted,
    Change,
    CommitResult,
    Encoding,
    Expect,
    Findings,
    Hit,
    IdempotentCommit,
    IndexedField,
    IndexEntry,
    ModelSpec,
    Page,
    Reindex,
    ResourceMeta,
    RevisionInfo,
    Status,
    Version,
    Write,
)

MAX_READ = 16 * 1024 * 1024
"""Bytes of bodies after which a list reads no more. A page of an answer takes less."""
READ_AT_ONCE = 32
"""Bodies that a list reads at once: as many as are asked of S3 at the same time."""


class Store(ABC):  # noqa: B024 - what is abstract differs between the two below
    """What MetaStores and ResourceStores share."""

    durable: ClassVar[bool] = False

    remote: ClassVar[bool] = False
    """Whether it is kept outside of this machine, and so outlives it."""

    def bind(self, spec: ModelSpec) -> None:
        """Learn the model; called before anything else. No I/O here. A store in memory starts empty."""
        return None

    @property
    def location_key(self) -> Hashable:
        """Where a bound store keeps its data: two models must not have the same, or one would sweep away the other's. None: nowhere
        that another one could be."""
        return None

    async def health(self) -> None:
        """Raise StoreUnavailable unless the store can answer now."""
        return None

    async def degradations(self) -> list[str]:
        """What does not work as it should although requests are answered: a sentence each, without addresses or secrets."""
        return []

    async def purge_remnants(self, now: dt.datetime) -> dt.datetime:
        """Remove the traces of what was deleted, and say when the last one will be gone."""
        return now

    async def close(self) -> None:
        """Give back what is open; the store may be used again afterwards."""
        return None


class MetaStore(Store):
    """The truth: metadata, records of revisions, and the index."""

    authoritative: ClassVar[bool] = True
    """False: the commit is the ResourceStore's, where it has records or an index; this store keeps nothing by itself."""

    may_be_stale: ClassVar[bool] = False
    """Whether `peek` may be out of date, and cheaper than `get` for it."""

    async def peek(self, resource_id: str) -> ResourceMeta:
        """As `get`, but perhaps an earlier state: to build a change upon, whose expectation `commit` checks. Never to answer from."""
        return await self.get(resource_id)

    async def catch_up(self) -> None:
        """Where reads may lag: have those that follow see what is acknowledged now. Nobody is refused upon less."""
        return None

    async def maintain(self, budget_s: float) -> None:
        """The store's own housekeeping, for at most about `budget_s` seconds."""
        return None

    async def generation(self) -> int:
        """The number that the uids of new bodies start with. Only a store that sweeps orphans needs more than one."""
        return 0

    async def advance_generation(self) -> int:
        """Start a new generation and return its number: from now on bodies older than number - 1 cannot be committed."""
        return 0

    @abstractmethod
    async def get(self, resource_id: str) -> ResourceMeta:
        """The metadata, of a deleted resource too; ResourceNotFound."""

    @abstractmethod
    async def commit(self, changes: Sequence[Change], once: IdempotentCommit | None = None) -> list[ResourceMeta]:
        """Apply all changes or none, in order, in one atomic step that also decides their expectations, and remember `once` in it (with
        it there may be no changes).

        Raises DoneBefore (its key was part of an earlier commit; looked at before anything else), VersionConflict, UniqueConflict (looked at once all changes are applied, so a batch may swap values),
        StaleGeneration (a record's uid is older than generation - 1), StoreUnavailable (surely not done) or OutcomeUnknown.
        """

    @abstractmethod
    async def done(self, key: str, *, peek: bool = False) -> CommitResult | None:
        """The commit that a key was part of, for at least a day. `peek`: perhaps not yet one of a moment ago."""

    async def confirm(self, resource_ids: Sequence[str]) -> None:
        """Where a `get` may not yet see what another one has seen: have all see what this process last read of these resources. A write that
        changes nothing is acknowledged upon it, and whoever made that state may have ended before he could tell."""
        return None

    @abstractmethod
    async def revision(self, resource_id: str, revision: int) -> RevisionInfo:
        """One record; RevisionNotFound."""

    @abstractmethod
    async def revisions(self, resource_id: str, before: int | None = None, limit: int = 50) -> Page[RevisionInfo]:
        """Records, newest first, with numbers below `before`; `next` is the number to go on from."""

    @abstractmethod
    async def search(self, query: Query) -> Page[Hit]:
        """What a resolved query finds."""

    @abstractmethod
    async def count(self, query: Query) -> int:
        """How many a resolved query finds; its sort, limit and cursor do not matter."""

    @abstractmethod
    def scan(self) -> AsyncIterator[ResourceMeta]:
        """Everything, deleted resources too, by ascending id."""

    async def unreferenced(self, uids: Sequence[str]) -> list[str]:
        """Those uids that no record refers to."""
        return []

    async def outdated(self, limit: int) -> list[ResourceMeta]:
        """Resources whose index was made for other indexed fields than the bound ones."""
        return []

    async def reindex(self, entries: Sequence[Reindex], *, share: bool = False) -> None:
        """Replace index entries where the resource is still in the expected state; versions stay. Raises UniqueConflict.

        `share`: a resource may have a value of a unique field that another one has. As long as both have it, whoever
        writes it is refused, these two as well.
        """
        raise AssertionError("a store that reports outdated entries takes new ones")

    async def activate_unique_fields(self, *, force: bool = False) -> bool:
        """All that was outdated is indexed: from here on every writer keeps the unique fields of the bound spec unique, those of programs
        that do not declare them too. One step, which changes nothing where something is outdated again (False), or where resources share
        a value (ConfigError): what cannot be unique must not lock out the program that wrote it.

        `force`: also where something is outdated. Programs that do not index these fields are kept out, so that it becomes no more; the
        rest must then be indexed, or the field given up. False: somebody was faster.
        """
        return True

    async def deactivate_unique_field(self, name: str) -> None:
        """Two resources would share a value of a unique field. If some are not indexed by it yet, it was forced and never held: let
        everybody write again who did before."""
        return None

    async def findings(self) -> Findings:
        """Return what was kept last, and `Findings()` if nothing was: then the store is healed once.

        By default nothing is kept, and nothing healed: right for a store that begins empty with each start, or that no
        earlier program wrote.
        """
        return Findings(healed=True)

    async def keep_findings(self, findings: Findings) -> None:
        """Keep the findings in place of those before."""
        return None

    def apply_committed(self, changes: Sequence[Change]) -> None:
        """Only where not authoritative: apply what records have decided. Called in the order of their commits."""
        raise AssertionError("only a store that is not authoritative follows")

    async def owner_of(self, name: str, key: Key) -> str | None:
        """Only where not authoritative: the id of the resource that holds this value of a unique field."""
        raise AssertionError("only a store that is not authoritative follows")


class ResourceStore(Store):
    """Immutable bodies by uid. A uid is `{generation}/{uuid7}`."""

    encoding: Encoding | None = None
    """The encoding that was given to the store itself, if any."""

    verified: ClassVar[bool] = True
    """Whether bodies are compared with their hash when they are read. False for a store in this process's memory."""

    keeps_records: ClassVar[bool] = False
    """Whether the records methods below work: then a MetaStore that is not authoritative is rebuilt from them."""

    def index(self) -> MetaStore | None:
        """A MetaStore that lies beside the bodies, to be the truth where the given one is not authoritative; None: there is none."""
        return None

    async def committed(self) -> None:
        """Called when `index` has committed, before that is acknowledged."""
        return None

    @abstractmethod
    async def put(self, uid: str, info: RevisionInfo, body: bytes) -> None:
        """Store a body. Putting the same uid again stores the same."""

    @abstractmethod
    async def get_many(self, uids: Sequence[str]) -> list[bytes]:
        """Bodies in the order asked; StoreDamaged if one is missing."""

    async def get(self, uid: str) -> bytes:
        """The body; StoreDamaged if it is missing."""
        (body,) = await self.get_many([uid])
        return body

    @abstractmethod
    async def delete(self, uids: Sequence[str]) -> None:
        """Remove bodies; those that are not there are no error."""

    async def drop_copies(self, uids: Sequence[str]) -> None:
        """Remove cached copies of bodies, which turned out to be damaged. The next read comes from where they are kept."""
        return None

    async def maintain(self, budget_s: float) -> None:
        """The store's own housekeeping, for at most about `budget_s` seconds."""
        return None

    async def older_than(self, generation: int, after: str = "", limit: int = 1000) -> list[str]:
        """Uids of earlier generations, ascending, after the given one: candidates for the sweep."""
        return []

    def lock_exclusively(self) -> None:
        """Claim to be the only process that writes here, until `close`; ConfigError if another one does."""
        raise AssertionError("only where keeps_records")

    async def put_records(
        self, writes: Sequence[Write], then: Callable[[Sequence[Change]], None], once: IdempotentCommit | None = None
    ) -> None:
        """Put the bodies and commit as MetaStore.commit does, unique fields aside, all or nothing; call `then` before anyone is told,
        in commit order."""
        raise AssertionError("only where keeps_records")

    async def done(self, key: str) -> CommitResult | None:
        """As MetaStore.done, for the commits of put_records."""
        raise AssertionError("only where keeps_records")

    def records(self) -> AsyncIterator[Change]:
        """Everything that was committed and not purged: for each resource its records, then its metadata, as changes
        without an index."""
        raise AssertionError("only where keeps_records")


class IndexOf(Protocol):
    """Makes index entries of stored bodies."""

    def __call__(self, body: bytes, encoding: Encoding) -> IndexEntry:
        """Return the entry of a body. Raises if the body cannot be read, or does not fit the model."""

    def kept(self, body: bytes | None, encoding: Encoding, shown: bytes) -> IndexEntry:
        """Return the entry of a resource whose body does not fit, or is lost (None). Raises nothing.

        Each field is taken from the body if it can be read there, or else from `shown`, the indexed fields of the
        entry that the resource has, as JSON.
        """


class IStorage(ABC):
    """One model's storage as the ResourceManager sees it: bodies and metadata together."""

    @property
    @abstractmethod
    def durable(self) -> bool:
        """Whether what was acknowledged survives a crash."""

    @property
    def remote(self) -> bool:
        """Whether it survives the loss of this machine too."""
        return False

    @property
    def location_keys(self) -> list[Hashable]:
        """Store.place, of all that it is made of."""
        return []

    @property
    @abstractmethod
    def encoding(self) -> Encoding:
        """How new bodies are to be encoded."""

    @abstractmethod
    def bind(self, spec: ModelSpec) -> None: ...

    @abstractmethod
    async def open(self, index: IndexOf) -> None:
        """Make the storage ready: rebuild what is not durable, bring the index up to the bound fields.

        `index` makes an entry of a body; see IndexOf. Called again it does nothing that was done.
        """

    @property
    def verified(self) -> bool:
        """As ResourceStore.verified."""
        return True

    async def drop_copies(self, uids: Sequence[str]) -> None:
        """As ResourceStore.drop_copies."""
        return None

    @abstractmethod
    def new_uid(self) -> str: ...

    @abstractmethod
    async def get(self, resource_id: str) -> ResourceMeta: ...

    @property
    def may_be_stale(self) -> bool:
        """Whether `peek` may be out of date: then what is refused because of it is looked at again."""
        return False

    async def peek(self, resource_id: str) -> ResourceMeta:
        """As MetaStore.peek."""
        return await self.get(resource_id)

    async def catch_up(self) -> None:
        """As MetaStore.catch_up."""
        return None

    @abstractmethod
    async def bodies(self, uids: Sequence[str]) -> list[bytes]: ...

    async def body(self, uid: str) -> bytes:
        (body,) = await self.bodies([uid])
        return body

    async def get_with_body(self, resource_id: str) -> tuple[ResourceMeta, bytes]:
        """The metadata and the current body. StoreDamaged too where somebody replaced the body between the two reads."""
        meta = await self.get(resource_id)
        return meta, await self.body(meta.uid)

    async def search_with_bodies(self, query: Query) -> tuple[Page[Hit], list[bytes]]:
        """What a query finds and the bodies of it, as `get_with_body`.

        There may be fewer bodies than hits: reading ends once they take more than MAX_READ bytes. The first one is there.
        """
        page = await self.search(query)
        uids = [hit.uid for hit in page.items]
        bodies = await self.bodies(uids[:READ_AT_ONCE])
        size = sum(map(len, bodies))
        for at in range(READ_AT_ONCE, len(uids), READ_AT_ONCE):
            if size > MAX_READ:
                break
            more = await self.bodies(uids[at : at + READ_AT_ONCE])
            bodies += more
            size += sum(map(len, more))
        return page, bodies

    @abstractmethod
    async def commit(self, writes: Sequence[Write], once: IdempotentCommit | None = None) -> list[ResourceMeta]:
        """Put the bodies, then commit the changes; bodies that no longer belong to a record go afterwards."""

    @abstractmethod
    async def done(self, key: str, *, peek: bool = False) -> CommitResult | None:
        """As MetaStore.done."""

    async def confirm(self, resource_ids: Sequence[str]) -> None:
        """As MetaStore.confirm."""
        return None

    @abstractmethod
    async def revision(self, resource_id: str, revision: int) -> RevisionInfo: ...

    @abstractmethod
    async def revisions(self, resource_id: str, before: int | None = None, limit: int = 50) -> Page[RevisionInfo]: ...

    @abstractmethod
    async def search(self, query: Query) -> Page[Hit]: ...

    @abstractmethod
    async def count(self, query: Query) -> int: ...

    @abstractmethod
    def scan(self) -> AsyncIterator[ResourceMeta]: ...

    @abstractmethod
    async def health(self) -> None: ...

    async def degradations(self) -> list[str]:
        """As Store.impairments, of all that it is made of."""
        return []

    @abstractmethod
    async def maintain(self, budget_s: float) -> None:
        """Housekeeping for at most about `budget_s` seconds."""

    @abstractmethod
    async def purge_remnants(self, now: dt.datetime) -> dt.datetime:
        """Remove the traces of what was purged, and say when the last one will be gone."""

    @abstractmethod
    async def close(self) -> None: ...


__all__ = [
    "KEEP_KEYS_US",
    "AlreadyCommitted",
    "Change",
    "CommitResult",
    "Cursor",
    "Encoding",
    "Expect",
    "Findings",
    "Hit",
    "IStorage",
    "IdempotentCommit",
    "IndexEntry",
    "IndexedField",
    "MetaStore",
    "ModelSpec",
    "Page",
    "Reindex",
    "ResourceMeta",
    "ResourceStore",
    "RevisionInfo",
    "Status",
    "Store",
    "Version",
    "Write",
]
