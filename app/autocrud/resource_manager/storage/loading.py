"""Loading of a whole model into the stores of a SimpleStorage. Exactly one step is the commit: see M3 there."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from typing_extensions import override

from ...errors import OutcomeUnknown
from ..basic import MetaStore, ResourceStore
from ..contract.loading import BulkLoading, IndexLoading, Loader, LoaderAround, RecordLoading
from ..contract.protocols import IndexKeeping
from .commits import AnnouncedCommits, Commits, RecordCommits


def loading_of(meta_store: MetaStore, resource_store: ResourceStore, commits: Commits) -> BulkLoading | None:
    """Return what loads a model into these stores; None if they cannot do it.

    commits  of the same stores
    """
    if isinstance(commits, RecordCommits):
        if isinstance(resource_store, RecordLoading) and isinstance(meta_store, IndexLoading):
            return _RecordLoading(resource_store, meta_store, commits)
        return None
    if not isinstance(meta_store, BulkLoading):
        return None
    if isinstance(commits, AnnouncedCommits) and isinstance(resource_store, IndexKeeping):
        return _AnnouncedLoading(meta_store, resource_store)
    return meta_store


class _RecordLoading(BulkLoading):
    """Loads records beside the bodies, which the index in memory follows.

    Unique values are checked against this index before a record is written. So no commit is under way while the model
    is published: a commit would find its value free before, and write its record afterwards.
    """

    def __init__(self, records: RecordLoading, index: IndexLoading, commits: RecordCommits) -> None:
        self._records, self._index, self._commits = records, index, commits

    @override
    @asynccontextmanager
    async def load(self, pin: str, *, size: int = 0) -> AsyncIterator[Loader]:
        async with self._records.load_records(self._index, pin) as loader:
            yield LoaderAround(loader, self._commits.unique_values.held_off)


class _AnnouncedLoading(BulkLoading):
    """Loads the index beside the bodies, and announces the commit to the ResourceStore, which keeps the index."""

    def __init__(self, meta_store: BulkLoading, keeper: IndexKeeping) -> None:
        self._meta_store, self._keeper = meta_store, keeper

    @override
    @asynccontextmanager
    async def load(self, pin: str, *, size: int = 0) -> AsyncIterator[Loader]:
        async with self._meta_store.load(pin, size=size) as loader:
            yield LoaderAround(loader, self._announced)

    @asynccontextmanager
    async def _announced(self) -> AsyncIterator[None]:
        try:
            yield
        except OutcomeUnknown:
            await self._keeper.committed()
            raise
        await self._keeper.committed()
