"""Abilities that only some stores have. A store has one if its class has all attributes of the protocol.

The engine asks with `isinstance` when a storage is composed, never per request. `overrides` refuses a store that has
only some methods of a protocol, because the others would never be called.

| of a MetaStore    | needed if                                                                       |
| ----------------- | ------------------------------------------------------------------------------- |
| `Freshness`       | a read may miss acknowledged commits, or other readers may miss what a read saw |
| `IndexMigration`  | data exist before the process starts: indexed and unique fields may be added    |
| `FindingsKeeping` | index entries may have been lost by earlier programs                            |
| `MetaSweeping`    | the ResourceStore can have orphaned bodies, which should be removed             |
| `RecordReplay`    | the store is not authoritative, and the ResourceStore keeps records             |
| `BlobRows`        | models have Blob fields: see `blobs`                                            |

| of a ResourceStore | needed if                                                                       |
| ------------------ | ------------------------------------------------------------------------------- |
| `BodySweeping`     | orphaned bodies should be removed                                               |
| `RecordKeeping`    | the store keeps records that make a MetaStore in memory durable                 |
| `BlobRows`         | the same, and models have Blob fields: a record and its keys are one commit     |
| `IndexKeeping`     | the store replaces a MetaStore in memory by a durable one beside the bodies     |
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import AsyncIterator, Callable, Sequence
from typing import ClassVar, Protocol, runtime_checkable

from ...values import Key
from ..basic import (
    Change,
    CommitResult,
    Findings,
    IdempotentCommit,
    MetaStore,
    Reindex,
    ResourceMeta,
    Write,
)


@runtime_checkable
class Freshness(Protocol):
    """A MetaStore whose reads may differ between readers, or may miss recent commits."""

    may_be_stale: ClassVar[bool]
    """Whether `peek` may return an earlier state than `get`, and is cheaper."""

    @abstractmethod
    async def peek(self, resource_id: str) -> ResourceMeta:
        """Return the metadata like `get`, but perhaps of an earlier state.

        The engine only plans changes with it, because `commit` checks the state. It never returns it to a client.
        """

    @abstractmethod
    async def catch_up(self) -> None:
        """Refresh, so that later reads see every acknowledged commit. Called before a request is rejected."""

    @abstractmethod
    async def confirm(self, resource_ids: Sequence[str]) -> None:
        """Make the state that this process read of these resources visible to every reader.

        Called before a write that changes nothing is acknowledged. The process that committed this state may have ended
        before it could make the commit visible to all readers.
        """


@runtime_checkable
class IndexMigration(Protocol):
    """A MetaStore that keeps its index while the indexed and unique fields of the model change."""

    @abstractmethod
    async def outdated(self, limit: int) -> list[ResourceMeta]:
        """Return resources whose index entry was made for other indexed fields than the bound ones."""

    @abstractmethod
    async def reindex(self, entries: Sequence[Reindex], *, share: bool = False) -> None:
        """Replace the entries of those resources that are still in the expected state. Versions do not change.

        Raises UniqueConflict if another resource has a value of a unique field. With `share=True` both resources keep
        the value. As long as both have it, every write of this value is refused, also by these two.
        """

    @abstractmethod
    async def activate_unique_fields(self, *, force: bool = False) -> bool:
        """Make every program keep the unique fields of the bound spec unique, also programs that do not declare them.

        This is one atomic step. Returns False, and changes nothing, if a resource is outdated again. Raises
        ConfigError, and changes nothing, if resources share a value, because an earlier program that wrote them must
        still be able to write.

        With `force=True`, outdated resources are allowed. Programs that do not index these fields can no longer write,
        so the number of outdated resources stops growing. The caller indexes the rest, or calls
        `deactivate_unique_field`. Returns False if another process was faster.
        """

    @abstractmethod
    async def deactivate_unique_field(self, name: str) -> None:
        """Undo a forced activation, because two resources would share a value of this field.

        Does so only if some resources are not indexed by the field yet, so that it never was unique. Afterwards, the
        programs that could write before the activation can write again.
        """


@runtime_checkable
class FindingsKeeping(Protocol):
    """A MetaStore that stores Findings about its index. Without this ability, no index entries are healed."""

    @abstractmethod
    async def findings(self) -> Findings:
        """Return the findings that were stored last; `Findings()` if none were, so that the engine heals the index."""

    @abstractmethod
    async def keep_findings(self, findings: Findings) -> None:
        """Store the findings in place of the earlier ones."""


@runtime_checkable
class MetaSweeping(Protocol):
    """A MetaStore that tells which bodies are orphans. Its `commit` refuses uids that a sweep may have removed."""

    @abstractmethod
    async def generation(self) -> int:
        """Return the present generation, with which the uids of new bodies start."""

    @abstractmethod
    async def advance_generation(self) -> int:
        """Start a new generation g and return g. Bodies of generations below g - 1 can no longer be committed."""

    @abstractmethod
    async def unreferenced(self, uids: Sequence[str]) -> list[str]:
        """Return the uids that no record names."""


@runtime_checkable
class RecordReplay(Protocol):
    """A MetaStore that is filled from the records of a ResourceStore. Never used if the MetaStore is authoritative."""

    @abstractmethod
    def apply_committed(self, changes: Sequence[Change]) -> None:
        """Apply committed changes without a check of `expect`. Called in the order of commits. Blocks."""

    @abstractmethod
    async def owner_of(self, name: str, key: Key) -> str | None:
        """Return the id of the resource that has this value of a unique field, or None."""


@runtime_checkable
class BodySweeping(Protocol):
    """A ResourceStore that lists its bodies, so that orphans can be removed."""

    @abstractmethod
    async def older_than(self, generation: int, after: str = "", limit: int = 1000) -> list[str]:
        """Return up to `limit` uids of generations below `generation`, ascending, that follow the uid `after`.

        Generations are compared as numbers.
        """


@runtime_checkable
class RecordKeeping(Protocol):
    """A ResourceStore whose records are the commit, if the MetaStore is not authoritative."""

    @abstractmethod
    def lock_exclusively(self) -> None:
        """Lock the store for this process until `close`. Raises ConfigError if another process holds the lock."""

    @abstractmethod
    async def put_records(
        self, writes: Sequence[Write], then: Callable[[Sequence[Change]], None], once: IdempotentCommit | None = None
    ) -> None:
        """Store the bodies and commit in one atomic step, like `MetaStore.commit`. Does not check unique fields.

        Calls `then` with the changes before it returns. Calls for several commits are in the order of the commits.
        """

    @abstractmethod
    async def done(self, key: str) -> CommitResult | None:
        """Return the commit by `put_records` that carried this Idempotency-Key, or None."""

    @abstractmethod
    def records(self) -> AsyncIterator[Change]:
        """Yield all that was committed and not purged, as changes without index entries.

        The metadata of a resource follow its records.
        """


@runtime_checkable
class IndexKeeping(Protocol):
    """A ResourceStore with a MetaStore beside its bodies, which replaces a MetaStore that is not authoritative."""

    @abstractmethod
    def index(self) -> MetaStore:
        """Return a new MetaStore beside the bodies. Called once, before `bind`."""

    @abstractmethod
    async def committed(self) -> None:
        """Tell other processes that the index has a new commit. Called before the commit is acknowledged."""
