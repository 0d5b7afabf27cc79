"""Loads of S3SqliteMetaStore."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
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
from ..backends.sqlite.tables import ResourceTables
from ..contract.loading import BulkLoading, Loader

T = TypeVar("T")


class S3Loading(BulkLoading):
    """Loads a model by one swap of HEAD."""

    _replica: Replica
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
