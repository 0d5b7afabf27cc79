"""CachedS3ResourceStore: which reads reach S3, which cached bodies a deletion removes, and the conformance suite."""

from __future__ import annotations

import asyncio
import contextlib
import datetime as dt
import tempfile
import threading
from pathlib import Path

import apsw
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from app.autocrud.errors import ConfigError, StoreDamaged, StoreUnavailable
from app.autocrud.resource_manager.backends.s3.memory_object_store import DROPPED, LOST_ANSWER, MemoryObjectStore
from app.autocrud.resource_manager.basic import IStorage
from app.autocrud.resource_manager.core import SimpleStorage
from app.autocrud.resource_manager.meta_store.sqlite3 import S3SqliteMetaStore
from app.autocrud.resource_manager.resource_store.cache import DiskCache, MemoryCache
from app.autocrud.resource_manager.resource_store.cached_s3 import CachedS3ResourceStore
from app.autocrud.resource_manager.storage_factory import IStorageFactory
from app.autocrud.testing import CacheClock, DurableConformance
from tests.stores.cache_helpers import KB, Instance, files, info


@pytest.fixture
def clock() -> CacheClock:
    return CacheClock()


@pytest.fixture
async def instance(tmp_path, clock):
    instance = Instance(tmp_path / "one", clock)
    yield instance
    await instance.store.close()


@pytest.fixture
async def other(tmp_path, clock, instance):
    other = Instance(tmp_path / "two", clock, instance.objects)
    yield other
    await other.store.close()


class TestOnS3:
    async def test_a_body_that_was_written_here_is_not_read_from_s3(self, instance):
        await instance.put("0/a", b"1")
        assert await instance.get("0/a") == b"1"
        assert instance.objects.requests == {"put": 1}

    async def test_a_second_read_makes_no_request(self, instance, other):
        await other.put("0/a", b"1")
        instance.objects.requests.clear()
        assert [await instance.get("0/a") for _ in range(3)] == [b"1"] * 3
        assert instance.objects.requests == {"get": 1}
        assert instance.store.statistics() == {"1 MemoryCache": (2, 1), "2 DiskCache": (0, 1)}

    async def test_a_restart_makes_no_request(self, instance, tmp_path, clock):
        await instance.put("0/a", b"1")
        await instance.store.close()
        again = Instance(tmp_path / "one", clock, instance.objects)
        assert await again.get("0/a") == b"1"
        assert instance.objects.requests == {"put": 1}
        await again.store.close()

    async def test_a_hit_fills_the_caches_before_it(self, instance):
        await instance.put("0/a", b"1")
        await instance.memory.clear()
        assert await instance.get("0/a") == b"1"
        assert await instance.held("0/a") == [True, True]
        await instance.disk.clear()
        assert await instance.get("0/a") == b"1"
        assert await instance.held("0/a") == [True, False]
        assert instance.objects.requests == {"put": 1}

    async def test_reading_many_asks_each_cache_once_and_s3_for_the_rest(self, instance, other):
        for number in range(9):
            await other.put(f"0/{number}", b"%d" % number)
        await instance.store.get_many(["0/0", "0/1", "0/2", "0/3"])
        await instance.memory.delete(["0/2", "0/3"])
        instance.objects.requests.clear()
        asked = []
        for cache in (instance.memory, instance.disk):
            cache.get_many = lambda keys, cache=cache: asked.append(list(keys)) or type(cache).get_many(cache, keys)
        uids = [f"0/{number}" for number in (8, 3, 0, 5, 1, 2, 8, 0)]
        assert await instance.store.get_many(uids) == [uid[2:].encode() for uid in uids]
        assert asked == [[f"0/{n}" for n in (8, 3, 0, 5, 1, 2)], [f"0/{n}" for n in (8, 3, 5, 2)]]
        assert instance.objects.requests == {"get": 2}
        assert await instance.store.get_many(uids) == [uid[2:].encode() for uid in uids]
        assert instance.objects.requests == {"get": 2}

    async def test_bodies_that_no_cache_has_are_read_concurrently(self, instance, other, monkeypatch):
        for number in range(32):
            await other.put(f"0/{number}", b"%d" % number)
        get, all_asked = instance.objects.get, asyncio.Barrier(32)

        async def waiting(key: str):
            await all_asked.wait()
            return await get(key)

        monkeypatch.setattr(instance.objects, "get", waiting)
        async with asyncio.timeout(60):
            assert len(await instance.store.get_many([f"0/{number}" for number in range(32)])) == 32

    @pytest.mark.parametrize("fault", [DROPPED, LOST_ANSWER])
    async def test_a_put_that_fails_leaves_nothing(self, instance, fault):
        instance.objects.fault = lambda _: fault
        with pytest.raises(StoreUnavailable):
            await instance.put("0/a", b"1")
        assert await instance.held("0/a") == [False, False]

    async def test_a_missing_body_raises_store_damaged(self, instance):
        await instance.put("0/a", b"1")
        with pytest.raises(StoreDamaged, match="0/b"):
            await instance.store.get_many(["0/a", "0/b"])

    async def test_delete_removes_a_body_from_every_cache(self, instance):
        for uid in ("0/a", "0/b"):
            await instance.put(uid, b"1" * 50_000)
        await instance.store.delete(["0/a", "0/nothing"])
        assert (await instance.held("0/a"), await instance.held("0/b")) == ([False, False], [True, True])
        with pytest.raises(StoreDamaged):
            await instance.get("0/a")
        assert list(instance.objects.objects) == ["p/0/b"]
        instance.objects.requests.clear()
        await instance.store.delete([])
        assert instance.objects.requests == {}

    async def test_delete_removes_a_body_from_the_caches_even_if_s3_fails(self, instance):
        await instance.put("0/a", b"1")
        instance.objects.fault = lambda call: DROPPED if call.op == "delete" else None
        with pytest.raises(StoreUnavailable):
            await instance.store.delete(["0/a"])
        assert await instance.held("0/a") == [False, False]

    async def test_delete_completes_even_if_the_caller_is_cancelled(self, instance):
        await instance.put("0/a", b"1")
        instance.objects.latency = lambda _: 0.02
        task = asyncio.create_task(instance.store.delete(["0/a"]))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await asyncio.gather(*instance.store._deletions)
        assert await instance.held("0/a") == [False, False]
        assert instance.objects.objects == {}

    @pytest.mark.parametrize("when", [0.0, 0.01, 0.02, 0.03])
    async def test_a_body_that_is_read_while_it_is_deleted_is_not_cached(self, instance, other, when):
        await other.put("0/a", b"1")
        instance.objects.latency = lambda call: 0.04 if call.op == "get" else 0.005
        read = asyncio.create_task(instance.get("0/a"))
        await asyncio.sleep(when)
        await instance.store.delete(["0/a"])
        await asyncio.gather(read, return_exceptions=True)
        assert await instance.held("0/a") == [False, False]
        with pytest.raises(StoreDamaged):
            await instance.get("0/a")
        assert instance.store._fills == []
        assert not instance.store._evicting

    async def test_a_deletion_waits_until_a_cache_has_been_filled(self, instance):
        begun, go_on = asyncio.Event(), asyncio.Event()
        put_many = instance.memory.put_many

        async def slow(entries):
            begun.set()
            await go_on.wait()
            await put_many(entries)

        instance.memory.put_many = slow
        put = asyncio.create_task(instance.put("0/a", b"1"))
        await begun.wait()
        delete = asyncio.create_task(instance.store.delete(["0/a"]))
        await asyncio.sleep(0.02)
        assert not delete.done()
        go_on.set()
        await asyncio.gather(put, delete)
        assert await instance.held("0/a") == [False, False]

    async def test_a_cached_body_is_not_copied_to_another_cache_while_it_is_deleted(self, instance):
        await instance.put("0/a", b"1")
        await instance.memory.clear()
        begun, go_on, delete_it = asyncio.Event(), asyncio.Event(), instance.disk.delete

        async def slow(keys):
            begun.set()
            await go_on.wait()
            await delete_it(keys)

        instance.disk.delete = slow
        delete = asyncio.create_task(instance.store.delete(["0/a"]))
        await begun.wait()
        assert await instance.get("0/a") == b"1"  # it is not deleted yet
        go_on.set()
        await delete
        assert await instance.held("0/a") == [False, False]

    async def test_a_body_that_another_instance_deleted_is_cached_until_it_expires(self, instance, other, clock):
        await other.put("0/a", b"1")
        assert await instance.get("0/a") == b"1"
        await other.store.delete(["0/a"])
        clock.ahead += 3500
        await instance.memory.clear()
        assert await instance.get("0/a") == b"1"  # from the disk, and into memory again
        clock.ahead += 200
        with pytest.raises(StoreDamaged):  # a copied entry keeps its remaining time
            await instance.get("0/a")

    async def test_evict_removes_a_body_from_the_caches_only(self, instance):
        await instance.put("0/a", b"1")
        await instance.store.evict(["0/a"])
        assert await instance.held("0/a") == [False, False]
        assert await instance.get("0/a") == b"1"

    async def test_a_draft_has_its_own_time_to_live(self, instance, other, clock):
        await instance.put("0/draft", b"1", "draft")
        await instance.put("0/stable", b"1", "stable")
        await other.store.get_many(["0/draft", "0/stable"])
        clock.ahead += 3601
        assert (await instance.held("0/draft"), await instance.held("0/stable")) == ([False] * 2, [True] * 2)
        assert (await other.held("0/draft"), await other.held("0/stable")) == ([False] * 2, [False] * 2)
        clock.ahead += 86400 - 3600
        assert await instance.held("0/stable") == [False] * 2

    async def test_a_time_to_live_of_0_disables_caching(self, tmp_path, clock):
        instance = Instance(tmp_path, clock, ttl_draft=0)
        await instance.put("0/a", b"1", "draft")
        assert await instance.held("0/a") == [False, False]
        await instance.store.close()
        with pytest.raises(ConfigError, match="expected seconds from 0"):
            Instance(tmp_path, clock, ttl_stable=-1)

    async def test_without_caches_it_behaves_like_s3_resource_store(self):
        objects = MemoryObjectStore()
        store = CachedS3ResourceStore([], bucket="b", object_store=objects)
        await store.put("0/a", info("0/a"), b"1")
        assert await store.get_many(["0/a"]) == [b"1"]
        await store.maintain(1)
        await store.delete(["0/a"])
        await store.close()
        assert objects.requests == {"put": 1, "get": 1, "delete": 1}
        assert store.statistics() == {}

    async def test_purge_remnants_returns_when_the_last_cached_copy_is_gone(self, instance, tmp_path):
        await instance.put("0/a", b"secret")
        await instance.store.delete(["0/a"])
        now = dt.datetime.now(dt.UTC)
        assert await instance.store.purge_remnants(now) == now + dt.timedelta(days=1)
        assert all(b"secret" not in path.read_bytes() for path in files(tmp_path))

    async def test_maintain_removes_expired_entries(self, instance, tmp_path, clock):
        await instance.put("0/a", bytes(50_000))
        clock.ahead += 86401
        await instance.store.maintain(5)
        assert sum(path.stat().st_size for path in files(tmp_path)) < 40 * KB

    async def test_a_cache_that_cannot_work_leaves_the_others_empty(self, tmp_path):
        (tmp_path / "file").write_text("")
        instance = Instance(tmp_path / "file", CacheClock())
        with pytest.raises(ConfigError):
            await instance.put("0/a", b"1")
        assert await instance.memory.get("0/a") is None
        await instance.store.close()

    def test_many_event_loops(self, tmp_path, clock):
        instance, wrong = Instance(tmp_path, clock), []

        async def use(thread):
            for round_ in range(30):
                uid, shared = f"{thread}/{round_}", f"shared/{round_}"
                await instance.put(uid, uid.encode())
                await instance.put(shared, shared.encode())
                assert await instance.store.get_many([uid, shared]) == [uid.encode(), shared.encode()]
                await instance.store.delete([uid])
                with pytest.raises(StoreDamaged):
                    await instance.get(uid)

        def run(thread):
            try:
                asyncio.run(use(thread))
            except BaseException as error:
                wrong.append(error)
                raise

        threads = [threading.Thread(target=run, args=(thread,)) for thread in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert wrong == []
        asyncio.run(instance.store.close())


class AgainstADict(RuleBasedStateMachine):
    """The caches lose entries and S3 fails: every body that is read is right, and deleted bodies are not found."""

    uids = st.integers(0, 9).map("{}".format)

    @initialize()
    def start(self) -> None:
        self.directory = tempfile.TemporaryDirectory()
        self.root = Path(self.directory.name)
        self.clock, self.objects, self.runner = CacheClock(), MemoryObjectStore(), asyncio.Runner()
        self.model: dict[str, bytes] = {}
        self.doubtful: set[str] = set()  # uids whose put or delete has failed
        self.open()

    def open(self) -> None:
        self.instance = Instance(self.root, self.clock, self.objects, ttl_draft=60, ttl_stable=600)

    @rule(uid=uids, size=st.sampled_from([0, 1, 100, 40_000]), status=st.sampled_from(["draft", "stable"]))
    def put(self, uid, size, status):
        body = self.model.get(uid, uid.encode() * size)  # the same uid, the same body
        if uid in self.doubtful:
            return
        self.runner.run(self.instance.put(uid, body, status))
        self.model[uid] = body

    @rule(uid=uids, fault=st.sampled_from([DROPPED, LOST_ANSWER]))
    def put_that_fails(self, uid, fault):
        if uid in self.model or uid in self.doubtful:
            return
        self.objects.fault = lambda _: fault
        with pytest.raises(StoreUnavailable):
            self.runner.run(self.instance.put(uid, b"doubtful"))
        self.objects.fault = lambda _: None
        assert self.runner.run(self.instance.held(uid)) == [False, False]
        self.doubtful.add(uid)

    @rule(uids=st.lists(uids, max_size=4))
    def delete(self, uids):
        self.runner.run(self.instance.store.delete(uids))
        for uid in uids:
            self.model.pop(uid, None)
            self.doubtful.discard(uid)

    @rule(uid=uids)
    def delete_that_fails(self, uid):
        self.objects.fault = lambda call: DROPPED if call.op == "delete" else None
        with pytest.raises(StoreUnavailable):
            self.runner.run(self.instance.store.delete([uid]))
        self.objects.fault = lambda _: None
        assert self.runner.run(self.instance.held(uid)) == [False, False]

    @rule(asked=st.lists(uids, max_size=6))
    def read(self, asked):
        asked = [uid for uid in asked if uid not in self.doubtful]
        if all(uid in self.model for uid in asked):
            for uid in asked:
                assert self.runner.run(self.instance.get(uid)) == self.model[uid]
            for _ in range(2):
                assert self.runner.run(self.instance.store.get_many(asked)) == [self.model[uid] for uid in asked]
                asked.reverse()
        else:
            with pytest.raises(StoreDamaged):
                self.runner.run(self.instance.store.get_many(asked))

    @precondition(lambda self: self.model)
    @rule(data=st.data())
    def read_twice_and_ask_once(self, data):
        uid = data.draw(st.sampled_from(sorted(self.model)))
        self.runner.run(self.instance.get(uid))
        self.objects.requests.clear()
        assert self.runner.run(self.instance.get(uid)) == self.model[uid]
        assert self.objects.requests == {}

    @rule(memory=st.booleans(), uids=st.sets(uids))
    def lose(self, memory, uids):
        cache = self.instance.memory if memory else self.instance.disk
        self.runner.run(cache.delete(uids) if uids else cache.clear())

    @rule(at=st.integers(0, 40_000), cut=st.booleans())
    def damage(self, at, cut):
        for path in files(self.root, "entries-*.sqlite"):
            with (
                contextlib.closing(apsw.Connection(str(path))) as connection,
                contextlib.suppress(apsw.Error),  # the file is new and has no table, or is damaged already
            ):
                rows = connection.execute("SELECT key, body FROM entries WHERE length(body) > ?", (at,)).fetchall()
                for key, body in rows:
                    damaged = body[:at] if cut else body[:at] + bytes([body[at] ^ 0xFF]) + body[at + 1 :]
                    connection.execute("UPDATE entries SET body = ? WHERE key = ?", (damaged, key))

    @rule(at=st.integers(0, 200_000), garbage=st.binary(min_size=1, max_size=5000))
    def damage_the_file(self, at, garbage):
        self.runner.run(self.instance.store.close())
        for path in files(self.root, "entries-*.sqlite"):
            content = path.read_bytes()
            at %= len(content) + 1
            path.write_bytes(content[:at] + garbage + content[at + len(garbage) :])
        self.open()

    @rule(seconds=st.sampled_from([1, 61, 601]))
    def wait(self, seconds):
        self.clock.ahead += seconds

    @rule()
    def maintain(self):
        self.runner.run(self.instance.store.maintain(5))

    @rule()
    def restart(self):
        self.runner.run(self.instance.store.close())
        self.open()

    @invariant()
    def no_fill_is_left(self):
        assert self.instance.store._fills == []
        assert not self.instance.store._evicting

    def teardown(self) -> None:
        self.runner.run(self.instance.store.close())
        self.runner.close()
        self.directory.cleanup()


TestAgainstADict = AgainstADict.TestCase
TestAgainstADict.settings = settings(max_examples=100, stateful_step_count=30, deadline=None, derandomize=True)


_doubles: dict[Path, MemoryObjectStore] = {}


class Composition(IStorageFactory):
    """S3 for metadata and bodies, and caches before the bodies."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def build(self, model_name: str) -> IStorage:
        objects = _doubles.setdefault(self.root, MemoryObjectStore())
        return SimpleStorage(
            S3SqliteMetaStore("double", f"meta/{model_name}.sqlite", object_store=objects),
            CachedS3ResourceStore(
                [MemoryCache(100), DiskCache(self.root / "cache" / model_name)],
                bucket="double",
                prefix=f"data/{model_name}/",
                object_store=objects,
            ),
        )


class TestConformance(DurableConformance):
    def make(self, root: Path) -> IStorageFactory:
        return Composition(root)
