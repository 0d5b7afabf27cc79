"""Unique fields of a storage whose commit is a record on disk.

One process owns such a store, so this process can decide which resource gets a value. A value is reserved before the
record is written, and released after the MetaStore has applied the record. So a concurrent write of the same value
finds either the reservation or the owner in the MetaStore. While a whole model is loaded, no values are reserved: they
would be checked before the load, and written after it.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator, Callable, Sequence

from ...values import Key
from ..basic import Change
from ..contract.protocols import RecordReplay
from ..contract.store_errors import taken

HELD_OFF_S = 0.002
"""Seconds between two looks whether reservations are possible again. Event loops cannot wake each other."""


class UniqueValues:
    """Reservations of values, shared by all event loops of the process.

    unique  names of the unique fields
    """

    def __init__(self, replay: RecordReplay, unique: Sequence[str]) -> None:
        self._replay, self._unique = replay, unique
        self._mutex = threading.Lock()  # guards the following
        self._writes, self._held_off = 0, False
        self._reserved: dict[tuple[str, Key], list[str]] = {}  # ids of the resources that take a value, one per write

    @contextlib.asynccontextmanager
    async def reserved(self, changes: Sequence[Change]) -> AsyncIterator[None]:
        """Reserve the unique values that the resources have after the changes, until the block ends.

        Waits while reservations are held off. Raises UniqueConflict if another resource has one of them, or has
        reserved it.
        """
        await _wait_until(self._begun)
        try:
            async with self._reserved_values(changes):
                yield
        finally:
            with self._mutex:
                self._writes -= 1

    @contextlib.asynccontextmanager
    async def held_off(self) -> AsyncIterator[None]:
        """Let new reservations wait until the block ends. Waits for the end of those that there are."""
        await _wait_until(self._taken)
        try:
            await _wait_until(lambda: not self._writes)
            yield
        finally:
            self._held_off = False

    def _begun(self) -> bool:
        with self._mutex:
            if not self._held_off:
                self._writes += 1
                return True
            return False

    def _taken(self) -> bool:
        with self._mutex:
            taken, self._held_off = not self._held_off, True
            return taken

    @contextlib.asynccontextmanager
    async def _reserved_values(self, changes: Sequence[Change]) -> AsyncIterator[None]:
        final = {change.meta.resource_id: change for change in changes if change.purge or change.index is not None}
        wanted = [
            (name, key, resource_id)
            for resource_id, change in final.items()
            if not change.purge and change.index is not None
            for name in self._unique
            if (key := change.index.keys.get(name)) is not None and not isinstance(key, list)
        ]
        held: list[tuple[tuple[str, Key], str]] = []
        try:
            with self._mutex:
                for name, key, resource_id in wanted:
                    takers = self._reserved.setdefault((name, key), [])
                    if any(taker != resource_id for taker in takers):
                        raise taken(name, resource_id, *takers)
                    takers.append(resource_id)
                    held.append(((name, key), resource_id))
            for name, key, resource_id in wanted:
                owner = await self._replay.owner_of(name, key)
                # An owner that the same batch changes gives the value up in it, or appears in `wanted` too.
                if owner is not None and owner != resource_id and owner not in final:
                    raise taken(name, resource_id, owner)
            yield
        finally:
            with self._mutex:
                for value, resource_id in held:
                    self._reserved[value].remove(resource_id)
                    if not self._reserved[value]:
                        del self._reserved[value]


async def _wait_until(condition: Callable[[], bool]) -> None:
    while not condition():  # noqa: ASYNC110 - an asyncio.Event belongs to one event loop
        await asyncio.sleep(HELD_OFF_S)
