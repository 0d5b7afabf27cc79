"""The pins of MetaStores on this machine: base classes of MemoryMetaStore and DiskMetaStore."""

from __future__ import annotations

import threading
import time

from typing_extensions import override

from ..backends.sqlite.database import FileDatabase
from ..backends.sqlite.pins import add_pin, count_pins, drop_lapsed, remove_pin, renew_pin
from ..contract import snapshots
from ..contract.snapshots import Pinning


class MemoryPinning(Pinning):
    """Pins in the memory of this process. Their times are those of a clock that is never set."""

    def __init__(self) -> None:
        self._pins: dict[str, float] = {}
        self._pins_lock = threading.Lock()  # several event loops may use the store

    @override
    async def add_pin(self, pin: str) -> None:
        with self._pins_lock:
            self._pins[pin] = time.monotonic()

    @override
    async def renew_pin(self, pin: str) -> bool:
        with self._pins_lock:
            self._drop_lapsed()
            if pin not in self._pins:
                return False
            self._pins[pin] = time.monotonic()
            return True

    @override
    async def remove_pin(self, pin: str) -> bool:
        with self._pins_lock:
            self._drop_lapsed()
            return self._pins.pop(pin, None) is not None

    @override
    async def has_pins(self) -> bool:
        if not self._pins:
            return False
        with self._pins_lock:
            self._drop_lapsed()
            return bool(self._pins)

    def holds_pin(self, pin: str) -> bool:
        """Return whether a pin was not dropped. A pin that lapsed keeps what it protects until it is dropped."""
        with self._pins_lock:
            return pin in self._pins

    def _drop_lapsed(self) -> None:
        end = time.monotonic() - snapshots.PIN_LIFE_S
        for pin in [pin for pin, renewed in self._pins.items() if renewed <= end]:
            del self._pins[pin]


class FilePinning(Pinning):
    """Pins in the table `pins` of a SQLite file."""

    _db: FileDatabase

    @override
    async def add_pin(self, pin: str) -> None:
        await self._db.write(lambda db: add_pin(db, pin))

    @override
    async def renew_pin(self, pin: str) -> bool:
        return await self._db.write(lambda db: renew_pin(db, pin))

    @override
    async def remove_pin(self, pin: str) -> bool:
        return await self._db.write(lambda db: remove_pin(db, pin))

    @override
    async def has_pins(self) -> bool:
        pins, lapsed = await self._db.read(count_pins)
        if lapsed:  # P2: they are only gone once their rows are removed, in a transaction that looks again
            await self._db.write(drop_lapsed)
            pins, _ = await self._db.read(count_pins)
        return pins > 0
