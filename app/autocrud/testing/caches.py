"""The promises of a Cache, as tests. The package docstring explains how to run them on your own cache."""

from __future__ import annotations

import asyncio
import os
import threading
import time
from abc import abstractmethod
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from ..resource_manager.resource_store.cache import Cache, Entry

MB = 1024**2


class CacheClock:
    """A clock in seconds since 1970. Tests set `ahead` to move it."""

    def __init__(self) -> None:
        self.ahead = 0.0

    def __call__(self) -> float:
        """Return the time."""
        return time.time() + self.ahead


class CacheConformance:
    """The promises of a Cache. A subclass returns the cache under test from `make`."""

    @abstractmethod
    def make(self, root: Path, clock: CacheClock) -> Cache:
        """Return the cache under test, with room for 10 MB in 100 entries, and with this clock."""

    @pytest.fixture
    def clock(self) -> CacheClock:
        """Return the clock of the cache."""
        return CacheClock()

    @pytest.fixture
    async def cache(self, tmp_path: Path, clock: CacheClock) -> AsyncIterator[Cache]:
        """Give an empty cache, and close it afterwards."""
        cache = self.make(tmp_path / "cache", clock)
        yield cache
        await cache.close()

    async def test_put_and_get(self, cache: Cache) -> None:
        await cache.put("a", b"1", 60)
        assert await cache.get("a") == b"1"
        assert await cache.get("b") is None
        assert (cache.hits, cache.misses) == (1, 1)

    @pytest.mark.parametrize("body", [b"", b"\0", bytes(range(256)) * 3, b"\x80" * 40_000, os.urandom(5 * MB)], ids=len)
    async def test_any_body(self, cache: Cache, body: bytes) -> None:
        await cache.put("a", body, 60)
        assert await cache.get("a") == body

    @pytest.mark.parametrize(
        "key",
        [
            *("", ".", "..", "../../x", "/etc/passwd", "a/b", "0/0198", "a\0b", "\n", "con", "%2e", "$HOME", "~"),
            *("x" * 100_000, "😀", "\ud800", "a" * 28 + ".val", "cache.db", "'; DROP TABLE Cache; --"),
        ],
    )
    async def test_any_key(self, cache: Cache, key: str, tmp_path: Path) -> None:
        await cache.put(key, b"here", 60)
        await cache.put("x" + key, b"there", 60)
        assert await cache.get(key) == b"here"
        await cache.delete([key])
        assert (await cache.get(key), await cache.get("x" + key)) == (None, b"there")
        assert {path.name for path in tmp_path.iterdir()} <= {"cache"}  # keys are no paths

    async def test_keys_that_look_alike_differ(self, cache: Cache) -> None:
        keys = ["a", "A", "ä", "a\u0308", "a ", "a\0"]
        await cache.put_many({key: Entry(key.encode(), 60) for key in keys})
        assert {key: entry.body for key, entry in (await cache.get_many(keys)).items()} == {
            key: key.encode() for key in keys
        }

    async def test_a_later_body_takes_the_place_of_an_earlier_one(self, cache: Cache) -> None:
        for body in (b"1", b"2" * 50_000, b"3" * 60_000, b"4"):
            await cache.put("a", body, 60)
            assert await cache.get("a") == body

    async def test_get_many_returns_the_present_entries(self, cache: Cache) -> None:
        await cache.put_many({"a": Entry(b"1", 60), "b": Entry(b"2", 60)})
        found = await cache.get_many(["b", "c", "a"])
        assert {key: entry.body for key, entry in found.items()} == {"a": b"1", "b": b"2"}
        assert (cache.hits, cache.misses) == (2, 1)
        assert await cache.get_many([]) == {}
        await cache.put_many({})
        await cache.delete([])
        assert (cache.hits, cache.misses) == (2, 1)

    async def test_an_entry_expires_after_its_time_to_live(self, cache: Cache, clock: CacheClock) -> None:
        await cache.put_many({"short": Entry(b"1", 60), "long": Entry(b"2", 600)})
        clock.ahead += 59
        found = await cache.get_many(["short", "long"])
        assert (found["short"].ttl_s, found["long"].ttl_s) == pytest.approx((1, 541), abs=0.9)
        clock.ahead += 2
        assert (await cache.get("short"), await cache.get("long")) == (None, b"2")
        await cache.put("short", b"again", 60)
        assert await cache.get("short") == b"again"

    async def test_putting_again_renews_the_time(self, cache: Cache, clock: CacheClock) -> None:
        await cache.put("a", b"1", 60)
        clock.ahead += 50
        await cache.put("a", b"1", 60)
        clock.ahead += 50
        assert await cache.get("a") == b"1"

    @pytest.mark.parametrize("ttl_s", [0, -1])
    async def test_an_entry_without_time_to_live_is_not_kept(self, cache: Cache, ttl_s: float) -> None:
        await cache.put("a", b"1", 60)
        await cache.put("a", b"2", ttl_s)
        assert await cache.get("a") is None

    async def test_delete_and_clear(self, cache: Cache) -> None:
        await cache.put_many({key: Entry(key.encode() * 40_000, 60) for key in "abcd"})
        await cache.delete(["a", "b", "nothing"])
        assert set(await cache.get_many(list("abcd"))) == {"c", "d"}
        await cache.clear()
        assert await cache.get_many(list("abcd")) == {}
        await cache.put("a", b"1", 60)
        assert await cache.get("a") == b"1"

    async def test_a_closed_cache_can_be_used_again(self, cache: Cache) -> None:
        await cache.put("a", b"1", 60)
        await cache.close()
        await cache.close()
        assert await cache.get("a") in (b"1", None)
        await cache.put("a", b"2", 60)
        assert await cache.get("a") == b"2"

    async def test_many_tasks(self, cache: Cache) -> None:
        async def use(number: int) -> bytes | None:
            await cache.put(f"{number % 10}", b"%d" % (number % 10), 60)
            return await cache.get(f"{number % 10}")

        assert await asyncio.gather(*map(use, range(200))) == [b"%d" % (number % 10) for number in range(200)]
        assert (cache.hits, cache.misses) == (200, 0)

    async def test_many_event_loops(self, cache: Cache) -> None:
        """Short-lived event loops that also close the cache never read a body that was not put."""
        wrong: list[bytes | BaseException | None] = []
        barrier = threading.Barrier(4)

        async def use(thread: int) -> None:
            for round_ in range(40):
                key = f"{round_ % 7}"
                await cache.put(key, key.encode() * 1000, 60)
                if (body := await cache.get(key)) not in (None, key.encode() * 1000):
                    wrong.append(body)
                if round_ % 10 == thread:
                    await cache.delete([key])
                if round_ % 20 == thread:
                    await cache.close()

        def run(thread: int) -> None:
            barrier.wait()
            try:
                for _ in range(2):
                    asyncio.run(use(thread))
            except BaseException as error:
                wrong.append(error)
                raise

        threads = [threading.Thread(target=run, args=(thread,)) for thread in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            await asyncio.to_thread(thread.join)
        assert wrong == []
        assert cache.hits + cache.misses == 4 * 2 * 40
