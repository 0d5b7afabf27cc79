"""The contract of a cache of bodies.

A cache may lose an entry at any time, and never returns a body that was not put under that key. An operation that
fails counts as a miss and writes a line to the log. There are two exceptions, because callers rely on them:

- `delete` and `clear` raise StoreUnavailable if the removed entries might be read again.
- A cache that cannot work at all raises ConfigError at its first use.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import NamedTuple


class Entry(NamedTuple):
    """A body, and for how many more seconds it may be kept.

    An entry that is read from one cache and put into another keeps its remaining time.
    """

    body: bytes
    ttl_s: float


class Cache(ABC):
    """Bodies by key. Any text is a key. Several event loops may use one cache at the same time.

    `hits` and `misses` count the keys that were asked for since the cache was made.
    """

    hits: int = 0
    misses: int = 0

    async def get(self, key: str) -> bytes | None:
        """Return the body of a key, or None if the cache does not have it."""
        found = (await self.get_many([key])).get(key)
        return None if found is None else found.body

    async def put(self, key: str, body: bytes, ttl_s: float) -> None:
        """Keep a body for `ttl_s` seconds, in place of the one that the key had."""
        await self.put_many({key: Entry(body, ttl_s)})

    @abstractmethod
    async def get_many(self, keys: Sequence[str]) -> dict[str, Entry]:
        """Return the entries that the cache has of these keys. Each key counts as a hit or a miss."""

    @abstractmethod
    async def put_many(self, entries: Mapping[str, Entry]) -> None:
        """Keep these entries in place of those that their keys had.

        An entry whose `ttl_s` is 0 or less is not kept; the earlier entry of its key is removed all the same.
        """

    @abstractmethod
    async def delete(self, keys: Sequence[str]) -> None:
        """Remove the entries of these keys. Keys that the cache does not have are no error.

        Raises StoreUnavailable if an entry might be read again.
        """

    @abstractmethod
    async def clear(self) -> None:
        """Remove all entries. Raises StoreUnavailable if an entry might be read again."""

    async def maintain(self, budget_s: float) -> None:
        """Remove expired entries, for about `budget_s` seconds at most.

        A cache that is never maintained removes expired entries little by little.
        """
        return None

    async def purge_remnants(self) -> None:
        """Overwrite or remove what deleted entries left behind."""
        return None

    async def close(self) -> None:
        """Release open files and threads. The cache may be used again afterwards."""
        return None
