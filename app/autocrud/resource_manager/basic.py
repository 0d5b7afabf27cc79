"""The contract between the engine and its stores. The values that it passes are in `records`, and are re-exported here.

    ResourceManager -> IStorage (SimpleStorage) -> MetaStore + ResourceStore + BlobStore

- A **MetaStore** holds the metadata, the records of revisions and the index. Its atomic `commit` decides whether a
  write succeeds.
- A **ResourceStore** holds immutable bodies by uid. A body is stored before the commit that names it. A body that no
  commit names is an orphan: no reader sees it, and `maintain` removes it.
- A **BlobStore** holds files by key. A file is stored before the commit of its row; see `contract.blobs`.

The abstract methods are the contract that every store fulfils. Abilities that only some stores have are protocols in
`contract.protocols`. The engine asks a store for them with `isinstance`, once, when the storage is composed.

All methods are `async` unless stated otherwise, and may be called from several event loops at once. A store whose data
survive a crash sets `durable = True`. `app.autocrud.testing` has the tests that every store must pass.
"""

from __future__ import annotations

import asyncio
import datetime as dt
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Hashable, Sequence
from contextlib import AbstractAsyncContextManager
from typing import TYPE_CHECKING, ClassVar, Protocol

from ..query import Cursor, Query
from .records import (
    BLOB_KEY,
    KEEP_KEYS_US,
    AlreadyCommitted,
    BlobRow,
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
    StoredKey,
    Version,
    Write,
    blob_epoch_of,
    owner_of,
)

MAX_READ = 16 * 1024 * 1024
"""Once a list has read this many bytes of bodies, it reads no more. A page of a response is smaller."""
READ_AT_ONCE = 32
"""How many bodies a list reads at once: as many as are requested from S3 concurrently."""


class Store(ABC):  # noqa: B024 - the abstract methods differ between the two below
    """The methods that MetaStores and ResourceStores share. All of them have a default."""

    durable: ClassVar[bool] = False
    """Whether acknowledged data survive the end of the process."""

    remote: ClassVar[bool] = False
    """Whether the data lie outside this machine. Otherwise, data that are not durable lie in this process."""

    def bind(self, spec: ModelSpec) -> None:
        """Set the model. Called before all other methods. Does no I/O. A store in memory is empty afterwards."""
        return None

    @property
    def location_key(self) -> Hashable:
        """Return the location of the data of a bound store, or None if no other store can use the same location.

        Two models with the same key are refused, because one would remove the data of the other.
        """
        return None

    async def health(self) -> None:
        """Raise StoreUnavailable if the store cannot answer now."""
        return None

    async def degradations(self) -> list[str]:
        """Return a sentence for each problem that degrades the store although requests are answered.

        The sentences contain no addresses and no secrets.
        """
        return []

    async def maintain(self, budget_s: float) -> None:
        """Do the store's own maintenance, for at most about `budget_s` seconds."""
        return None

    async def purge_remnants(self, now: dt.datetime) -> dt.datetime:
        """Remove the remnants of deleted data. Return the time at which the last remnant will be gone."""
        return now

    async def close(self) -> None:
        """Release connections, files and tasks. The store may be used again afterwards."""
        return None


class MetaStore(Store):
    """The metadata, the records of revisions, and the index.

    If the store is authoritative, its `commit` decides whether a write succeeds.

    Optional abilities, in `contract.protocols`: Freshness, IndexMigration, FindingsKeeping, MetaSweeping, RecordReplay.
    """

    authoritative: ClassVar[bool] = True
    """False if the ResourceStore decides whether a write succeeds. It does so only if it has records or an index."""

    @abstractmethod
    async def get(self, resource_id: str) -> ResourceMeta:
        """Return the metadata, of a deleted resource too.

        Raises ResourceNotFound if the resource was never created, or was purged.
        """

    @abstractmethod
    async def commit(self, changes: Sequence[Change], once: IdempotentCommit | None = None) -> list[ResourceMeta]:
        """Apply all changes in order, or none, in one atomic step. Return the metadata of each change.

        The same step checks the expectations and stores `once`. If `once` is given, `changes` may be empty. Raises:

        AlreadyCommitted  an earlier commit carried the key of `once`; this is checked first
        VersionConflict   a change does not find the state that it expects
        ConfigError       a change expects "any"
        StaleGeneration   the uid of a new record is older than generation - 1
        UniqueConflict    after all changes, two resources would share a unique value; a batch may swap values

        Raises StoreUnavailable only if nothing was committed and nothing will be. Raises OutcomeUnknown if the store
        does not know whether it committed.
        """

    @abstractmethod
    async def done(self, key: str, *, peek: bool = False) -> CommitResult | None:
        """Return the commit that carried this Idempotency-Key, or None. Keys are kept for at least a day.

        With `peek=True`, may miss recent commits.
        """

    @abstractmethod
    async def revision(self, resource_id: str, revision: int) -> RevisionInfo:
        """Return the record of one revision. Raises RevisionNotFound if there is none."""

    @abstractmethod
    async def revisions(self, resource_id: str, before: int | None = None, limit: int = 50) -> Page[RevisionInfo]:
        """Return records, newest first, with numbers below `before`. `next` is the `before` of the next page."""

    @abstractmethod
    async def search(self, query: Query) -> Page[Hit]:
        """Return a page of the resources that a resolved query finds. `next` is the `after` of the next page."""

    @abstractmethod
    async def count(self, query: Query) -> int:
        """Return how many resources a resolved query finds. Its sort, limit and cursor are ignored."""

    @abstractmethod
    def scan(self) -> AsyncIterator[ResourceMeta]:
        """Yield the metadata of all resources, deleted ones too, by ascending id."""


class ResourceStore(Store):
    """Immutable bodies by uid. A uid is `{generation}/{uuid7}`.

    Optional abilities, in `contract.protocols`: BodySweeping, RecordKeeping, IndexKeeping.
    """

    encoding: Encoding | None = None
    """The encoding of new bodies that was given to the store itself; None: that of the model."""

    verified: ClassVar[bool] = True
    """Whether readers compare bodies with their hash. False for a store in the memory of this process."""

    @abstractmethod
    async def put(self, uid: str, info: RevisionInfo, body: bytes) -> None:
        """Store a body, durably if the store is durable. Idempotent: a uid is always put with the same body."""

    async def put_many(self, bodies: Sequence[tuple[RevisionInfo, bytes]]) -> None:
        """Store several bodies under the uids of their records, like `put`."""
        for start in range(0, len(bodies), READ_AT_ONCE):
            some = bodies[start : start + READ_AT_ONCE]
            await asyncio.gather(*(self.put(info.uid, info, body) for info, body in some))

    @abstractmethod
    async def get_many(self, uids: Sequence[str]) -> list[bytes]:
        """Return bodies in the order of the uids. Raises StoreDamaged if one is missing."""

    async def get(self, uid: str) -> bytes:
        """Return one body. Raises StoreDamaged if it is missing."""
        (body,) = await self.get_many([uid])
        return body

    @abstractmethod
    async def delete(self, uids: Sequence[str]) -> None:
        """Remove bodies. A uid without a body is no error."""

    async def drop_copies(self, uids: Sequence[str]) -> None:
        """Remove cached copies of bodies, because they are damaged. The next read bypasses the caches."""
        return None


class BlobWriter(ABC):
    """Receives one upload. `BlobStore.receive` returns it."""

    size: int
    """The number of bytes that were written so far."""

    @property
    @abstractmethod
    def sha256(self) -> str:
        """Return the SHA-256 of the bytes that were written so far, in hex."""

    @abstractmethod
    async def write(self, chunk: bytes) -> None:
        """Append bytes. Raises StoreUnavailable, for example if the disk is full."""

    @abstractmethod
    async def store(self, uid: str) -> str:
        """Store the bytes as the blob `{sha256}/{uid}`, durably if the store is durable, and return this key.

        May be called again with another uid. Then there are two blobs. Raises StoreUnavailable.
        """


class BlobStore(Store):
    """Files by key. A key is `{sha256}/{uid}`, and is never used for other content: see BlobRow.

    Memory use does not depend on the sizes of files, except in a store in memory.
    """

    @abstractmethod
    def receive(self) -> AbstractAsyncContextManager[BlobWriter]:
        """Return the writer of one upload. At the end of the context, what was not stored is discarded."""

    @abstractmethod
    def read(self, key: str, start: int = 0, end: int | None = None) -> AsyncIterator[bytes]:
        """Yield the bytes from `start` up to but not including `end`, in chunks of at most 1 MB.

        With `end=None`, yields the bytes up to the end of the blob. Raises StoreDamaged if there is no such blob, or if
        the blob ends before `end`. Raises StoreUnavailable.
        """

    @abstractmethod
    async def delete(self, keys: Sequence[str]) -> None:
        """Remove blobs. A key without a blob is no error."""

    @abstractmethod
    async def older_than(self, seconds: float, after: str = "", limit: int = 1000) -> list[str]:
        """Return up to `limit` keys, ascending, that follow `after`, of blobs stored at least `seconds` ago.

        The dates and the present time are those of the store (of S3, for example), never the clock of this process.
        """


class IndexOf(Protocol):
    """Makes index entries of stored bodies."""

    def __call__(self, body: bytes, encoding: Encoding) -> IndexEntry:
        """Return the entry of a body. Raises if the body cannot be read, or does not fit the model."""

    def kept(self, body: bytes | None, encoding: Encoding, shown: bytes) -> IndexEntry:
        """Return the entry of a resource whose body does not fit, or is lost (None). Raises nothing.

        Each field is taken from the body if it can be read there. Otherwise it is taken from `shown`, the indexed
        fields of the entry that the resource has, as JSON.
        """


class IStorage(ABC):
    """One model's storage as the ResourceManager sees it: bodies and metadata together."""

    @property
    @abstractmethod
    def durable(self) -> bool:
        """Return whether acknowledged writes survive a crash of the process."""

    @property
    def remote(self) -> bool:
        """Return whether acknowledged writes survive the loss of this machine."""
        return False

    @property
    def in_process(self) -> bool:
        """Return whether the data are in the memory of this process: no other can read them, and they end with it."""
        return not self.durable

    @property
    def exclusive(self) -> bool:
        """Return whether only this process can read the data while it runs."""
        return self.in_process

    @property
    def location_keys(self) -> list[Hashable]:
        """Return the `Store.location_key` of each store of this storage that has one."""
        return []

    @property
    @abstractmethod
    def encoding(self) -> Encoding:
        """Return the encoding of new bodies."""

    @property
    def verified(self) -> bool:
        """Return whether readers compare bodies with their hash."""
        return True

    @property
    def may_be_stale(self) -> bool:
        """Return whether `peek` may return an earlier state.

        If True, an operation that fails on such a state is planned again on the latest state.
        """
        return False

    @abstractmethod
    def bind(self, spec: ModelSpec) -> None:
        """Set the model. Called before all other methods. Does no I/O."""

    @abstractmethod
    async def open(self, index: IndexOf) -> None:
        """Prepare the storage. Rebuild a MetaStore that is not durable, and complete the index for the bound fields.

        `index` makes the index entry of a body. Concurrent calls wait for the first one.
        """

    @abstractmethod
    async def close(self) -> None:
        """Release connections, files and tasks. The storage may be used again afterwards."""

    @abstractmethod
    async def health(self) -> None:
        """Raise StoreUnavailable if one of the stores cannot answer now."""

    async def degradations(self) -> list[str]:
        """Return the degradations of all stores: see `Store.degradations`."""
        return []

    @abstractmethod
    async def maintain(self, budget_s: float) -> None:
        """Complete the index, maintain the stores and remove orphaned bodies, for about `budget_s` seconds."""

    @abstractmethod
    async def purge_remnants(self, now: dt.datetime) -> dt.datetime:
        """Remove the remnants of purged data. Return the time at which the last remnant will be gone."""

    # Reading

    @abstractmethod
    async def get(self, resource_id: str) -> ResourceMeta:
        """Return the metadata, of a deleted resource too. Raises ResourceNotFound."""

    async def peek(self, resource_id: str) -> ResourceMeta:
        """Return the metadata like `get`, but perhaps of an earlier state.

        The engine only plans changes with it, because the commit checks the state. It never returns it to a client.
        """
        return await self.get(resource_id)

    async def catch_up(self) -> None:
        """Refresh, so that later reads see every acknowledged commit. Called before a request is rejected."""
        return None

    @abstractmethod
    async def bodies(self, uids: Sequence[str]) -> list[bytes]:
        """Return bodies in the order of the uids. Raises StoreDamaged if one is missing."""

    async def body(self, uid: str) -> bytes:
        """Return one body. Raises StoreDamaged if it is missing."""
        (body,) = await self.bodies([uid])
        return body

    async def get_with_body(self, resource_id: str) -> tuple[ResourceMeta, bytes]:
        """Return the metadata and the current body.

        Raises ResourceNotFound. Raises StoreDamaged if the body is missing, for example because a write removed it
        between the two reads.
        """
        meta = await self.get(resource_id)
        return meta, await self.body(meta.uid)

    async def search_with_bodies(self, query: Query) -> tuple[Page[Hit], list[bytes]]:
        """Return a page of hits, and the bodies of the first ones.

        Stops reading once the bodies take more than MAX_READ bytes. If there are hits, returns at least the first body.
        Raises StoreDamaged if a body is missing, for example because a write removed it meanwhile.
        """
        page = await self.search(query)
        uids = [hit.uid for hit in page.items]
        bodies = await self.bodies(uids[:READ_AT_ONCE])
        size = sum(map(len, bodies))
        for start in range(READ_AT_ONCE, len(uids), READ_AT_ONCE):
            if size > MAX_READ:
                break
            more = await self.bodies(uids[start : start + READ_AT_ONCE])
            bodies += more
            size += sum(map(len, more))
        return page, bodies

    async def drop_copies(self, uids: Sequence[str]) -> None:
        """Remove cached copies of bodies, because they are damaged. The next read bypasses the caches."""
        return None

    @abstractmethod
    async def revision(self, resource_id: str, revision: int) -> RevisionInfo:
        """Return the record of one revision. Raises RevisionNotFound if there is none."""

    @abstractmethod
    async def revisions(self, resource_id: str, before: int | None = None, limit: int = 50) -> Page[RevisionInfo]:
        """Return records, newest first, with numbers below `before`. `next` is the `before` of the next page."""

    @abstractmethod
    async def search(self, query: Query) -> Page[Hit]:
        """Return a page of the resources that a resolved query finds. `next` is the `after` of the next page."""

    @abstractmethod
    async def count(self, query: Query) -> int:
        """Return how many resources a resolved query finds. Its sort, limit and cursor are ignored."""

    @abstractmethod
    def scan(self) -> AsyncIterator[ResourceMeta]:
        """Yield the metadata of all resources, deleted ones too, by ascending id."""

    # Writing

    @abstractmethod
    def new_uid(self) -> str:
        """Return the uid of a new body. Does not block."""

    @abstractmethod
    async def commit(self, writes: Sequence[Write], once: IdempotentCommit | None = None) -> list[ResourceMeta]:
        """Store the bodies, then commit all changes or none. Return the metadata of each change.

        Afterwards removes bodies that no longer belong to a record. Raises the errors of `MetaStore.commit` except
        StaleGeneration.
        """

    @abstractmethod
    async def done(self, key: str, *, peek: bool = False) -> CommitResult | None:
        """Return the commit that carried this Idempotency-Key, or None. With `peek=True`, may miss recent commits."""

    async def confirm(self, resource_ids: Sequence[str]) -> None:
        """Make the state that this process read of these resources visible to every reader.

        Called before a write that changes nothing is acknowledged.
        """
        return None


__all__ = [
    "BLOB_KEY",
    "KEEP_KEYS_US",
    "AlreadyCommitted",
    "BlobRow",
    "BlobStore",
    "BlobWriter",
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
    "StoredKey",
    "Version",
    "Write",
    "blob_epoch_of",
    "owner_of",
]

_RENAMED = {"Once": "IdempotentCommit", "Done": "CommitResult", "DoneBefore": "AlreadyCommitted"}


if not TYPE_CHECKING:  # type checkers would believe that the module has every name

    def __getattr__(name: str) -> object:
        """Raise ImportError with the new name of a renamed class, and AttributeError for any other name."""
        if name in _RENAMED:
            raise ImportError(
                f"`{name}` is called `{_RENAMED[name]}` now: rename it where you import it from {__name__}"
            )
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
