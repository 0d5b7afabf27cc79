"""Loads of S3SqliteMetaStore, whose records may name bodies in packs."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import TypeVar

import apsw
from typing_extensions import override

from ..backends.s3_sqlite.committer import S3Committer
from ..backends.s3_sqlite.housekeeping import Housekeeping
from ..backends.s3_sqlite.loading import HeadLoad
from ..backends.s3_sqlite.replica import Replica
from ..backends.sqlite.loading import StagedModel, staged_loader
from ..backends.sqlite.packs import packs_with_orphans
from ..backends.sqlite.tables import ResourceTables
from ..contract.loading import BulkLoading, Loader
from ..contract.packs import PackReferences, StoredPack

T = TypeVar("T")


class S3Loading(BulkLoading, PackReferences):
    """Loads a model by one swap of HEAD. It raises the format of the store if a record names a body in a pack."""

    _replica: Replica
    _tables: ResourceTables
    _directory: Path | None

    @abstractmethod
    def _new_tables(self, *, lazy: bool = False) -> ResourceTables:
        """Return new tables of the model."""

    @abstractmethod
    def _workers(self) -> tuple[S3Committer, Housekeeping]:
        """Return the committer and the housekeeping of the running event loop."""

    @abstractmethod
    async def refresh(self) -> None:
        """Update the local copy to all writes that are acknowledged now."""

    @override
    def load(self, pin: str, *, size: int = 0) -> AbstractAsyncContextManager[Loader]:
        async def read(work: Callable[[apsw.Connection], T]) -> T:
            await self.refresh()
            return await self._replica.read(work)

        async def publish(staged: StagedModel) -> None:
            await self.refresh()
            committer, housekeeping = self._workers()
            await HeadLoad(self._replica, committer, housekeeping, staged, self._new_tables(), pin).publish()

        return staged_loader(self._directory, read, self._new_tables(lazy=True), publish)

    @override
    async def packs_with_orphans(self, packs: Sequence[StoredPack]) -> Mapping[str, Sequence[str]]:
        await self.refresh()  # with every `consistency`, because the other bodies of these packs are removed
        return await self._replica.read(lambda db: packs_with_orphans(self._tables, db, packs))
