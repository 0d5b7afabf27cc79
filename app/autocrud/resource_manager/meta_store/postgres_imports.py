"""The part of PostgresMetaStore for imports: the entries of a journal."""

from __future__ import annotations

from collections.abc import Sequence

from typing_extensions import override

from ..contract.import_journal import ImportKeeping
from .postgres_access import PostgresAccess


class PostgresImports(PostgresAccess, ImportKeeping):
    """A MetaStore in PostgreSQL with the journal of an import."""

    @override
    async def import_entry(self, name: str) -> bytes | None:
        rows = await self._rows("SELECT value FROM <import> WHERE name = %s", (name,))
        return bytes(rows[0][0]) if rows else None

    @override
    async def put_import_entry(self, name: str, value: bytes, *, replaces: bytes | None) -> bool:
        if replaces is None:
            statement = "INSERT INTO <import> VALUES (%s, %s) ON CONFLICT (name) DO NOTHING"
            changed = await self._changed(statement, (name, value))
        else:
            statement = "UPDATE <import> SET value = %s WHERE name = %s AND value = %s"
            changed = await self._changed(statement, (value, name, replaces))
        # A statement whose reply was lost is sent again, and then changes nothing.
        return changed > 0 or await self.import_entry(name) == value

    @override
    async def import_entries(self, prefix: str, after: str, limit: int) -> list[str]:
        rows = await self._rows(
            "SELECT name FROM <import> WHERE name > %s AND name >= %s AND left(name, %s) = %s ORDER BY name LIMIT %s",
            (after, prefix, len(prefix), prefix, limit),
        )
        return [name for (name,) in rows]

    @override
    async def remove_import_entries(self, names: Sequence[str]) -> None:
        await self._changed("DELETE FROM <import> WHERE name = ANY(%s)", (list(names),))
