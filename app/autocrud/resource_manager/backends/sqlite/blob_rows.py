"""BlobRows in a database of this machine: of the MetaStores in memory and on disk, and of the records beside bodies."""

from __future__ import annotations

from collections.abc import Sequence

from typing_extensions import override

from ...basic import BlobRow
from ...contract.blobs import BlobRows, BlobUsage, BlobUse
from . import blob_tables
from .database import FileDatabase, MemoryDatabase


class DatabaseBlobRows(BlobRows):
    """The rows of blobs in `blob_tables` of a database. `ResourceTables` in the same database keep the uses."""

    _db: MemoryDatabase | FileDatabase

    @override
    async def blob_epoch(self) -> int:
        return await self._db.read(blob_tables.epoch, quick=True)

    @override
    async def add_blob(self, row: BlobRow, *, quota: int | None = None) -> None:
        await self._db.write(lambda db: blob_tables.add(db, row, quota))

    @override
    async def blobs(self, sha256s: Sequence[str]) -> list[BlobRow]:
        return await self._db.read(lambda db: blob_tables.rows(db, sha256s), quick=len(sha256s) == 1)

    @override
    async def blob_uses(self, key: str, limit: int = 100) -> list[BlobUse]:
        return await self._db.read(lambda db: blob_tables.uses(db, key, limit))

    @override
    async def blob_usage(self) -> BlobUsage:
        return await self._db.read(blob_tables.usage, quick=True)

    @override
    async def remove_blobs(self, keys: Sequence[str]) -> list[str]:
        unused, _ = await self._db.write(lambda db: blob_tables.remove(db, keys))
        return unused
