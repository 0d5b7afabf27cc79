"""MemoryCache: the contract, the order of removal, and use by many threads."""

from __future__ import annotations

import asyncio
import itertools
import threading
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from app.autocrud.errors import ConfigError, StoreDamaged
from app.autocrud.resource_manager.backends.s3.memory_object_store import MemoryObjectStore
from app.autocrud.resource_manager.resource_store.cache import Cache, Entry, MemoryCache
from app.autocrud.resource_manager.resource_store.cached_s3 import CachedS3ResourceStore
from app.autocrud.resource_manager.resource_store.s3 import S3ResourceStore
from app.autocrud.testing import CacheClock
from tests.stores.cache_helpers import ROOM, BoundedConformance, info


class TestMemoryCache(BoundedConformance):
    def make(self, root: Path, clock: CacheClock) -> Cache:
        return MemoryCache(clock=clock)

    def small(self, root: Path, clock: CacheClock) -> Cache:
        return MemoryCache(ROOM, clock=clock)

    @pytest.mark.parametrize("wrong", [0, -1])
    def test_a_size_below_1_is_refused(self, wrong):
        with pytest.raises(ConfigError, match="expected at least 1"):
            MemoryCache(wrong)


async def test_expired_entries_are_removed():
    clock = CacheClock()
    cache = MemoryCache(clock=clock)
    await cache.put_many({f"{number}": Entry(b"", 60 + number) for number in range(10)})
    clock.ahead += 65
    await cache.put("10", b"", 60)  # a put after EXPIRE_EVERY_S removes expired entries
    assert list(cache._entries) == ["6", "7", "8", "9", "10"]
    clock.ahead += 3.5
    await cache.get("8")
    await cache.maintain(1)
    assert list(cache._entries) == ["9", "10"]


class LeastRecentlyUsed(RuleBasedStateMachine):
    """A MemoryCache keeps exactly the entries that a dict in the order of use keeps, behind a store too."""

    SIZE = 4
    uids = st.sampled_from("abcdefg")

    @initialize()
    def start(self) -> None:
        self.cache, self.runner = MemoryCache(self.SIZE), asyncio.Runner()
        self.objects = MemoryObjectStore()
        self.store = CachedS3ResourceStore([self.cache], bucket="b", object_store=self.objects)
        for uid in "abcdefg":
            self.runner.run(S3ResourceStore("b", object_store=self.objects).put(uid, info(uid), uid.encode()))
        self.model: dict[str, None] = {}

    def used(self, uid: str) -> None:
        self.model.pop(uid, None)
        self.model[uid] = None
        while len(self.model) > self.SIZE:
            del self.model[next(iter(self.model))]

    @rule(uid=uids)
    def put(self, uid):
        self.runner.run(self.store.put(uid, info(uid), uid.encode()))
        self.used(uid)

    @rule(uid=uids)
    def read(self, uid):
        assert self.runner.run(self.store.get(uid)) == uid.encode()
        self.used(uid)

    @rule(uid=uids)
    def look(self, uid):
        if self.runner.run(self.cache.get(uid)) is not None:
            self.used(uid)

    @rule(asked=st.lists(uids, max_size=3, unique=True))
    def read_many(self, asked):
        there = list(itertools.takewhile(self.model.__contains__, asked))
        late = [uid for uid in asked[len(there) :] if uid in self.model]
        assert self.runner.run(self.store.get_many(asked)) == [uid.encode() for uid in asked]
        for uid in [*there, *late, *(uid for uid in asked if uid not in there + late)]:
            self.used(uid)

    @rule(uid=uids)
    def evict(self, uid):
        self.runner.run(self.store.evict([uid]))
        self.model.pop(uid, None)

    @rule(uid=uids)
    def replace(self, uid):
        self.runner.run(self.cache.put(uid, uid.encode(), 60))
        self.used(uid)

    @invariant()
    def the_same(self):
        assert set(self.cache._entries) == set(self.model)

    def teardown(self) -> None:
        self.runner.close()


TestLeastRecentlyUsed = LeastRecentlyUsed.TestCase
TestLeastRecentlyUsed.settings = settings(max_examples=200, stateful_step_count=40, deadline=None)


async def test_hits_of_many_threads():
    """Threads read while another one puts and deletes: every body that they find is whole, and every hit is counted."""
    cache = MemoryCache(50)
    store = CachedS3ResourceStore([cache], bucket="b", object_store=MemoryObjectStore())
    wrong, stop = [], threading.Event()

    async def read() -> int:
        found = 0
        while not stop.is_set():
            for number in range(100):
                try:
                    body = await store.get(f"{number}")
                except StoreDamaged:
                    continue
                found += 1
                if body != b"%d" % number * 100:
                    wrong.append(body)
        return found

    counts: list[int] = []
    threads = [threading.Thread(target=lambda: counts.append(asyncio.run(read()))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for round_ in range(20_000):
        key = f"{round_ * 7919 % 100}"
        await (cache.delete([key]) if round_ % 3 else cache.put(key, key.encode() * 100, 60))
    stop.set()
    for thread in threads:
        thread.join()
    assert (wrong, len(cache._entries) <= 50, cache.hits) == ([], True, sum(counts))
