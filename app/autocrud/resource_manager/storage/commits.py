"""The ways to commit: to a MetaStore that is authoritative, or to records beside the bodies.

The third way, a pair of stores on one disk, is in `disk_pair`.

- M1 *A commit never names a body that is not stored.* The bodies are stored first. The commit begins when all are.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Protocol

from typing_extensions import override

from ...errors import OutcomeUnknown
from ..basic import (
    AlreadyCommitted,
    Change,
    CommitResult,
    IdempotentCommit,
    MetaStore,
    ResourceMeta,
    ResourceStore,
    RevisionInfo,
    Write,
)
from ..contract.protocols import Freshness, IndexKeeping, RecordKeeping, RecordReplay
from ..runtime.threads import shielded
from .unique_values import UniqueValues


class Commits(Protocol):
    """One way to commit."""

    async def commit(self, writes: Sequence[Write], once: IdempotentCommit | None = None) -> list[ResourceMeta]:
        """Store the bodies and commit the changes in one atomic step. Raises what `MetaStore.commit` raises."""

    async def done(self, key: str, *, peek: bool) -> CommitResult | None:
        """Return the commit that carried this Idempotency-Key, or None. With `peek`, may miss recent commits."""

    async def confirm(self, resource_ids: Sequence[str]) -> None:
        """Make the state that this process read of these resources visible to every reader."""


class MetaStoreCommits:
    """Commits to an authoritative MetaStore."""

    def __init__(self, meta_store: MetaStore, resource_store: ResourceStore) -> None:
        self._meta_store, self._resource_store = meta_store, resource_store
        self._freshness = meta_store if isinstance(meta_store, Freshness) else None

    async def commit(self, writes: Sequence[Write], once: IdempotentCommit | None = None) -> list[ResourceMeta]:
        """Put the bodies, then commit to the MetaStore."""
        puts = [self._resource_store.put(record.uid, record, body) for record, body in new_bodies(writes)]
        if len(puts) == 1:
            await puts[0]
        elif puts:
            await asyncio.gather(*puts)
        return await self._commit_changes([write.change for write in writes], once)

    async def _commit_changes(self, changes: Sequence[Change], once: IdempotentCommit | None) -> list[ResourceMeta]:
        return await self._meta_store.commit(changes, once)

    async def done(self, key: str, *, peek: bool) -> CommitResult | None:
        """Ask the MetaStore for the commit that carried this key."""
        return await self._meta_store.done(key, peek=peek)

    async def confirm(self, resource_ids: Sequence[str]) -> None:
        """Let the MetaStore confirm these resources."""
        if self._freshness is not None:
            await self._freshness.confirm(resource_ids)


class AnnouncedCommits(MetaStoreCommits):
    """Commits to the index beside the bodies, and reports each commit to the ResourceStore, which keeps the index.

    A commit is reported before it is acknowledged, so that the ResourceStore can announce it to other instances. An
    earlier commit that is found is reported too, because its process may have ended before it could report it. A commit
    of unknown outcome is also reported.
    """

    def __init__(self, meta_store: MetaStore, resource_store: ResourceStore, keeper: IndexKeeping) -> None:
        super().__init__(meta_store, resource_store)
        self._keeper = keeper

    @override
    async def _commit_changes(self, changes: Sequence[Change], once: IdempotentCommit | None) -> list[ResourceMeta]:
        # Runs to completion even if the caller is cancelled, so that no commit stays unannounced.
        return await shielded(asyncio.ensure_future(self._commit_and_announce(changes, once)))

    async def _commit_and_announce(
        self, changes: Sequence[Change], once: IdempotentCommit | None
    ) -> list[ResourceMeta]:
        try:
            committed = await self._meta_store.commit(changes, once)
        except (AlreadyCommitted, OutcomeUnknown):
            await self._keeper.committed()
            raise
        await self._keeper.committed()
        return committed

    @override
    async def done(self, key: str, *, peek: bool) -> CommitResult | None:
        found = await self._meta_store.done(key, peek=peek)
        if found is not None:
            await self._keeper.committed()
        return found

    @override
    async def confirm(self, resource_ids: Sequence[str]) -> None:
        await self._keeper.committed()


class RecordCommits:
    """Commits to records beside the bodies. The MetaStore applies the records in the order of their commits."""

    def __init__(self, replay: RecordReplay, records: RecordKeeping, unique_values: UniqueValues) -> None:
        self._replay, self._records, self.unique_values = replay, records, unique_values

    async def commit(self, writes: Sequence[Write], once: IdempotentCommit | None = None) -> list[ResourceMeta]:
        """Write bodies and records in one step.

        Runs to completion even if the caller is cancelled, because the reservations of unique values must last as long
        as the write.
        """
        return await asyncio.shield(asyncio.create_task(self._commit(writes, once)))

    async def _commit(self, writes: Sequence[Write], once: IdempotentCommit | None) -> list[ResourceMeta]:
        changes = [write.change for write in writes]
        async with self.unique_values.reserved(changes):
            await self._records.put_records(writes, self._replay.apply_committed, once)
        return [change.meta for change in changes]

    async def done(self, key: str, *, peek: bool) -> CommitResult | None:
        """Ask the records for the commit that carried this key. Records are never stale."""
        return await self._records.done(key)

    async def confirm(self, resource_ids: Sequence[str]) -> None:
        """Do nothing. One process owns the records, so all readers are in this process and see the same state."""


def new_bodies(writes: Sequence[Write]) -> list[tuple[RevisionInfo, bytes]]:
    """Return the bodies that these writes store, each with the record that names it."""
    return [(change.record, body) for change, body in writes if change.record is not None and body is not None]
