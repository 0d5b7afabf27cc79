"""The pins and snapshots of S3SqliteMetaStore."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from typing_extensions import override

from ..backends.s3_sqlite.pins import HeadPins
from ..backends.s3_sqlite.replica import Replica
from ..contract.snapshots import MetaSnapshot, Pinning, SnapshotReading


class S3Pinning(Pinning, SnapshotReading):
    """Pins in HEAD, and snapshots of the local copy at one sequence number."""

    _replica: Replica
    _pins: HeadPins

    @override
    async def add_pin(self, pin: str) -> None:
        await self._pins.add(pin)

    @override
    async def renew_pin(self, pin: str) -> bool:
        return await self._pins.renew(pin)

    @override
    async def remove_pin(self, pin: str) -> bool:
        return await self._pins.remove(pin)

    @override
    async def has_pins(self) -> bool:
        return await self._pins.exist()

    @override
    @asynccontextmanager
    async def snapshot(self) -> AsyncIterator[MetaSnapshot]:
        """Give the state of the newest HEAD: a read transaction on the local copy, which later commits do not change.

        A copy that is replaced meanwhile is deleted, but open connections can still read it.
        """
        await self._replica.open()
        await self._replica.check()
        snapshot = await self._replica.blocking(lambda copy: copy.snapshot())
        try:
            yield snapshot
        finally:
            await asyncio.get_running_loop().run_in_executor(None, snapshot.close)
