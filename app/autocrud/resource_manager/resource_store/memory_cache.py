"""A cache of bodies in the memory of this process."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence

from typing_extensions import override

from ...errors import ConfigError
from .body_cache import Cache, Entry

EXPIRE_EVERY_S = 60.0
"""A `put_many` looks for expired entries if the last search was longer ago than this."""


class MemoryCache(Cache):
    """The `max_size` entries that were used last.

    max_size  how many entries are kept, at least 1
    clock     tells seconds. The default is the wall clock: a clock that stops while the machine sleeps would keep
              entries for too long.

    Every method holds one lock for microseconds and never waits for anything else.
    """

    def __init__(self, max_size: int = 100, *, clock: Callable[[], float] = time.time) -> None:
        if max_size < 1:
            raise ConfigError(f"MemoryCache: max_size is {max_size}, expected at least 1")
        self.max_size = max_size
        self._clock = clock
        self._lock = threading.Lock()  # guards the rest
        self._entries: OrderedDict[str, tuple[bytes, float]] = (
            OrderedDict()
        )  # body and expiry, least recently used first
        self._expired_at = clock()

    @override
    async def get_many(self, keys: Sequence[str]) -> dict[str, Entry]:
        found = {}
        with self._lock:
            now = self._clock()
            for key in keys:
                entry = self._entries.get(key)
                if entry is not None and entry[1] > now:
                    self._entries.move_to_end(key)
                    found[key] = Entry(entry[0], entry[1] - now)
                    self.hits += 1
                else:
                    self._entries.pop(key, None)
                    self.misses += 1
        return found

    @override
    async def put_many(self, entries: Mapping[str, Entry]) -> None:
        with self._lock:
            now = self._clock()
            for key, (body, ttl_s) in entries.items():
                self._entries.pop(key, None)
                if ttl_s > 0:
                    self._entries[key] = body, now + ttl_s
            if now - self._expired_at > EXPIRE_EVERY_S:
                self._remove_expired(now)
            while len(self._entries) > self.max_size:
                self._entries.popitem(last=False)

    @override
    async def delete(self, keys: Sequence[str]) -> None:
        with self._lock:
            for key in keys:
                self._entries.pop(key, None)

    @override
    async def clear(self) -> None:
        with self._lock:
            self._entries.clear()

    @override
    async def maintain(self, budget_s: float) -> None:
        with self._lock:
            self._remove_expired(self._clock())

    def _remove_expired(self, now: float) -> None:
        self._expired_at = now
        for key in [key for key, (_, expiry) in self._entries.items() if expiry <= now]:
            del self._entries[key]
