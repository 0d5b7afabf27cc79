"""The journal of an import in a database of this machine: of the MetaStores, and of the records beside bodies."""

from __future__ import annotations

from collections.abc import Sequence

from typing_extensions import override

from ...contract.import_journal import ImportKeeping
from . import import_table
from .database import FileDatabase, MemoryDatabase


class DatabaseImportKeeping(ImportKeeping):
    """The entries in a database of this machine."""

    _db: MemoryDatabase | FileDatabase

    @override
    async def import_entry(self, name: str) -> bytes | None:
        return await self._db.read(lambda db: import_table.read(db, name))

    @override
    async def put_import_entry(self, name: str, value: bytes, *, replaces: bytes | None) -> bool:
        return await self._db.write(lambda db: import_table.put(db, name, value, replaces))

    @override
    async def import_entries(self, prefix: str, after: str, limit: int) -> list[str]:
        return await self._db.read(lambda db: import_table.names(db, prefix, after, limit))

    @override
    async def remove_import_entries(self, names: Sequence[str]) -> None:
        await self._db.write(lambda db: import_table.remove(db, names))
