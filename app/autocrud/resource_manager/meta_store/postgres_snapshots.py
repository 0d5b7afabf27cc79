"""The part of PostgresMetaStore for exports: pins, and one moment of the tables."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from typing_extensions import override

from ..backends.postgres.snapshot import PostgresSnapshot
from ..contract import snapshots
from ..contract.snapshots import MetaSnapshot, Pinning, SnapshotReading
from .postgres_access import PostgresAccess

_LAPSED = "abs(extract(epoch FROM now() - time)) >= %s"
"""The condition for pins that were not renewed in time. A time in the future is of a clock that was set back."""


class PostgresSnapshots(PostgresAccess, Pinning, SnapshotReading):
    """A MetaStore in PostgreSQL with pins and snapshots."""

    @override
    async def add_pin(self, pin: str) -> None:
        await self._changed(
            "INSERT INTO <pins> VALUES (%s) ON CONFLICT (pin) DO UPDATE SET time = excluded.time", (pin,)
        )

    @override
    async def renew_pin(self, pin: str) -> bool:
        statement = f"UPDATE <pins> SET time = now() WHERE pin = %s AND NOT {_LAPSED}"
        return await self._changed(statement, (pin, snapshots.PIN_LIFE_S)) > 0

    @override
    async def remove_pin(self, pin: str) -> bool:
        statement = f"DELETE FROM <pins> WHERE pin = %s AND NOT {_LAPSED}"
        return await self._changed(statement, (pin, snapshots.PIN_LIFE_S)) > 0

    @override
    async def has_pins(self) -> bool:
        if not await self._rows("SELECT 1 FROM <pins> LIMIT 1"):
            return False
        # P2: a pin has lapsed only once its row is removed. A statement that is renewing it holds the row, and is
        # waited for, so only a later statement tells which pins are left.
        await self._changed(f"DELETE FROM <pins> WHERE {_LAPSED}", (snapshots.PIN_LIFE_S,))
        return bool(await self._rows("SELECT 1 FROM <pins> LIMIT 1"))

    @override
    @asynccontextmanager
    async def snapshot(self) -> AsyncIterator[MetaSnapshot]:
        await self._opened()
        async with self._pool().own_connection() as connection, connection.snapshot_transaction():
            yield PostgresSnapshot(connection, self._schema)
