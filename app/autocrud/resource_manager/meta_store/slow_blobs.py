"""The part of FastSlowMetaStore for blobs, pins and snapshots: of the slow store alone.

The fast store has no records, so it knows nothing of them.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from contextlib import AbstractAsyncContextManager
from typing import Protocol

from typing_extensions import override

from ..basic import BlobRow
from ..contract.blobs import BlobRows, BlobUsage, BlobUse
from ..contract.snapshots import MetaSnapshot, Pinning, SnapshotReading


class BlobsAndSnapshots(BlobRows, Pinning, SnapshotReading, Protocol):
    """The abilities that the slow store needs for this part."""


class SlowBlobs(BlobRows, Pinning, SnapshotReading):
    """The blobs, pins and snapshots of the slow store."""

    @property
    @abstractmethod
    def _slow_blobs(self) -> BlobsAndSnapshots:
        """Return the slow store."""

    @override
    async def blob_epoch(self) -> int:
        return await self._slow_blobs.blob_epoch()

    @override
    async def add_blob(self, row: BlobRow, *, quota: int | None = None) -> None:
        await self._slow_blobs.add_blob(row, quota=quota)

    @override
    async def blobs(self, sha256s: Sequence[str]) -> list[BlobRow]:
        return await self._slow_blobs.blobs(sha256s)

    @override
    async def blob_uses(self, key: str, limit: int = 100) -> list[BlobUse]:
        return await self._slow_blobs.blob_uses(key, limit)

    @override
    async def blob_usage(self) -> BlobUsage:
        return await self._slow_blobs.blob_usage()

    @override
    async def remove_blobs(self, keys: Sequence[str]) -> list[str]:
        return await self._slow_blobs.remove_blobs(keys)

    @override
    async def add_pin(self, pin: str) -> None:
        await self._slow_blobs.add_pin(pin)

    @override
    async def renew_pin(self, pin: str) -> bool:
        return await self._slow_blobs.renew_pin(pin)

    @override
    async def remove_pin(self, pin: str) -> bool:
        return await self._slow_blobs.remove_pin(pin)

    @override
    async def has_pins(self) -> bool:
        return await self._slow_blobs.has_pins()

    @override
    def snapshot(self) -> AbstractAsyncContextManager[MetaSnapshot]:
        return self._slow_blobs.snapshot()
