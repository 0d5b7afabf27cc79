"""What the tests of caches share: promises of our caches beyond the contract, and stores behind caches."""

from __future__ import annotations

import datetime as dt
import os
from abc import abstractmethod
from pathlib import Path

from app.autocrud import Encoding
from app.autocrud.resource_manager.backends.s3.memory_object_store import MemoryObjectStore
from app.autocrud.resource_manager.basic import RevisionInfo
from app.autocrud.resource_manager.resource_store.cache import Cache, DiskCache, Entry, MemoryCache
from app.autocrud.resource_manager.resource_store.cached_s3 import CachedS3ResourceStore
from app.autocrud.testing import CacheClock, CacheConformance

KB = 1024
MB = 1024 * KB
SIZE = 100 * KB  # of the bodies that compete for room
ROOM = 8  # how many of them the small caches hold


def files(root: Path, pattern: str = "*") -> list[Path]:
    return sorted(path for path in root.rglob(pattern) if path.is_file())


BODIES = {f"{number}": os.urandom(length) for number, length in enumerate([0, 10, 1000, 30_000, 40_000, 200_000])}


async def fill(cache: Cache) -> None:
    await cache.put_many({key: Entry(body, 600) for key, body in BODIES.items()})


async def valid_entries(cache: Cache) -> int:
    """Return how many of BODIES the cache has. The test fails if one of them is wrong."""
    found = await cache.get_many(list(BODIES))
    for key, entry in found.items():
        assert entry.body == BODIES[key]
    return len(found)


class BoundedConformance(CacheConformance):
    """Promises of our caches beyond the contract: they keep the entries that were used last, also while closed."""

    @abstractmethod
    def small(self, root: Path, clock: CacheClock) -> Cache:
        """A cache for ROOM bodies of SIZE."""

    async def test_the_least_recently_used_entry_is_removed_first(self, tmp_path, clock):
        cache = self.small(tmp_path, clock)
        for number in range(3 * ROOM):
            await cache.put(f"{number}", b"%d" % number * (SIZE // 2), 60)
            assert await cache.get("0") is not None
        there = [number for number in range(3 * ROOM) if await cache.get(f"{number}")]
        assert there == [0, *range(3 * ROOM - len(there) + 1, 3 * ROOM)]
        assert ROOM / 2 < len(there) <= ROOM
        await cache.close()

    async def test_expired_entries_make_room(self, tmp_path, clock):
        cache = self.small(tmp_path, clock)
        await cache.put_many({f"{number}": Entry(bytes(SIZE), 60) for number in range(ROOM)})
        clock.ahead += 61
        await cache.maintain(10)
        await cache.put("kept", bytes(SIZE), 60)
        await cache.put_many({f"{number}": Entry(bytes(SIZE), 60) for number in range(ROOM - 2)})
        assert await cache.get("kept") is not None
        await cache.close()

    async def test_closing_loses_nothing(self, cache):
        await cache.put("a", b"1", 60)
        await cache.close()
        assert await cache.get("a") == b"1"


def info(uid: str, status="stable") -> RevisionInfo:
    now = dt.datetime.now(dt.UTC)
    return RevisionInfo(
        uid=uid,
        resource_id="r",
        revision=1,
        parent=None,
        schema_version=1,
        status=status,
        data_hash="",
        encoding=Encoding.json,
        created_time=now,
        updated_time=now,
        created_by="alice",
        updated_by="alice",
    )


class Instance:
    """A store behind two caches, on a bucket that other instances may share."""

    def __init__(self, root: Path, clock: CacheClock, objects: MemoryObjectStore | None = None, **more) -> None:
        self.objects = objects or MemoryObjectStore()
        self.memory, self.disk = MemoryCache(clock=clock), DiskCache(root, clock=clock)
        self.store = CachedS3ResourceStore(
            [self.memory, self.disk], bucket="b", prefix="p/", object_store=self.objects, **more
        )

    async def put(self, uid: str, body: bytes, status="stable") -> None:
        await self.store.put(uid, info(uid, status), body)

    async def get(self, uid: str) -> bytes:
        return await self.store.get(uid)

    async def held(self, uid: str) -> list[bool]:
        """Return for each cache whether it has a body."""
        return [await cache.get(uid) is not None for cache in (self.memory, self.disk)]
