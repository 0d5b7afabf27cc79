"""A Cache in memory that is bounded by bytes."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence

from typing_extensions import override

from app.autocrud.errors import ConfigError
from app.autocrud.resource_manager.resource_store.cache import Cache, Entry


class BytesCache(Cache):
    """A cache of the bodies that were used last: at most `max_bytes` of keys and bodies."""

    def __init__(self, max_bytes: int = 64 * 1024**2, *, clock: Callable[[], float] = time.time) -> None:
        if max_bytes < 1:
            raise ConfigError(f"BytesCache: max_bytes is {max_bytes}, expected at least 1")
        self._max_bytes, self._clock = max_bytes, clock
        self._lock = threading.Lock()  # several event loops, each in a thread of its own, may be here at once
        self._entries: OrderedDict[str, tuple[bytes, float]] = OrderedDict()  # with the time when each expires
        self._bytes = 0

    @override
    async def get_many(self, keys: Sequence[str]) -> dict[str, Entry]:
        found = {}
        with self._lock:
            now = self._clock()
            for key in keys:
                body, expires = self._entries.get(key, (b"", 0.0))
                if expires > now:
                    self._entries.move_to_end(key)
                    found[key] = Entry(body, expires - now)  # what is left: a copy in another cache gets no new life
            self.hits += len(found)
            self.misses += len(keys) - len(found)
        return found

    @override
    async def put_many(self, entries: Mapping[str, Entry]) -> None:
        with self._lock:
            for key, (body, ttl_s) in entries.items():
                self._remove(key)
                if ttl_s > 0 and len(key) + len(body) <= self._max_bytes:
                    self._entries[key] = (body, self._clock() + ttl_s)
                    self._bytes += len(key) + len(body)
                while self._bytes > self._max_bytes:
                    self._remove(next(iter(self._entries)))

    @override
    async def delete(self, keys: Sequence[str]) -> None:
        with self._lock:
            for key in keys:
                self._remove(key)

    @override
    async def clear(self) -> None:
        with self._lock:
            self._entries.clear()
            self._bytes = 0

    @override
    async def maintain(self, budget_s: float) -> None:
        with self._lock:
            now = self._clock()
            for key in [key for key, (_, expires) in self._entries.items() if expires <= now]:
                self._remove(key)

    def _remove(self, key: str) -> None:
        if key in self._entries:
            body, _ = self._entries.pop(key)
            self._bytes -= len(key) + len(body)
