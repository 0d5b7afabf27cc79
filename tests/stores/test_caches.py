"""Caches of bodies: what each kind does, what a damaged disk does to one, and the store on S3 that asks them first."""

from __future__ import annotations

import asyncio
import contextlib
import datetime as dt
import errno
import fcntl
import itertools
import logging
import os
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
from abc import abstractmethod
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from app.autocrud import Encoding
from app.autocrud.errors import ConfigError, StoreDamaged, StoreUnavailable
from app.autocrud.resource_manager.backends.s3.memory_object_store import DROPPED, LOST_ANSWER, MemoryObjectStore
from app.autocrud.resource_manager.basic import IStorage, RevisionInfo
from app.autocrud.resource_manager.core import SimpleStorage
from app.autocrud.resource_manager.meta_store.sqlite3 import S3SqliteMetaStore
from app.autocrud.resource_manager.resource_store.cache import Cache, DiskCache, Entry, MemoryCache
from app.autocrud.resource_manager.resource_store.cached_s3 import CachedS3ResourceStore
from app.autocrud.resource_manager.resource_store.s3 import S3ResourceStore
from app.autocrud.resource_manager.storage_factory import IStorageFactory
from tests.conformance import CacheClock, CacheConformance, DurableConformance

KB = 1024
MB = 1024 * KB
SIZE = 100 * KB  # of the bodies that compete for room
ROOM = 8  # how many of them the small caches hold


@pytest.fixture
def clock() -> CacheClock:
    return CacheClock()


@pytest.fixture
async def disk(tmp_path, clock):
    cache = DiskCache(tmp_path / "cache", clock=clock)
    yield cache
    await cache.close()


def files(root: Path, pattern: str = "*") -> list[Path]:
    return sorted(path for path in root.rglob(pattern) if path.is_file())


def index_of(root: Path) -> Path:
    (path,) = files(root, "cache.db")
    return path


class BoundedConformance(CacheConformance):
    """What ours promise beyond the contract: what was used last stays, also when they are closed in between."""

    @abstractmethod
    def small(self, root: Path, clock: CacheClock) -> Cache:
        """A cache for ROOM bodies of SIZE."""

    async def test_the_least_recently_used_goes_first(self, tmp_path, clock):
        cache = self.small(tmp_path, clock)
        for number in range(3 * ROOM):
            await cache.put(f"{number}", b"%d" % number * (SIZE // 2), 60)
            assert await cache.get("0") is not None
        there = [number for number in range(3 * ROOM) if await cache.get(f"{number}")]
        assert there == [0, *range(3 * ROOM - len(there) + 1, 3 * ROOM)]
        assert ROOM / 2 < len(there) <= ROOM
        await cache.close()

    async def test_what_has_expired_makes_room_by_itself(self, tmp_path, clock):
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


class TestMemoryCache(BoundedConformance):
    def make(self, root: Path, clock: CacheClock) -> Cache:
        return MemoryCache(clock=clock)

    def small(self, root: Path, clock: CacheClock) -> Cache:
        return MemoryCache(ROOM, clock=clock)

    @pytest.mark.parametrize("wrong", [0, -1])
    def test_no_room_is_a_mistake(self, wrong):
        with pytest.raises(ConfigError, match="expected at least 1"):
            MemoryCache(wrong)


async def test_memory_forgets_what_has_expired(clock):
    cache = MemoryCache(clock=clock)
    await cache.put_many({f"{number}": Entry(b"", 60 + number) for number in range(10)})
    clock.ahead += 65
    await cache.put("10", b"", 60)  # whoever writes after a while looks for what has expired
    assert list(cache.kept) == ["6", "7", "8", "9", "10"]
    clock.ahead += 3.5
    await cache.get("8")
    await cache.maintain(1)
    assert list(cache.kept) == ["9", "10"]


class LeastRecentlyUsed(RuleBasedStateMachine):
    """A MemoryCache, also behind a store that looks into it by itself, keeps exactly what a dict in the order of use keeps."""

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
    def forget(self, uid):
        self.runner.run(self.store.forget([uid]))
        self.model.pop(uid, None)

    @rule(uid=uids)
    def replace(self, uid):
        self.runner.run(self.cache.put(uid, uid.encode(), 60))
        self.used(uid)

    @invariant()
    def the_same(self):
        assert set(self.cache.kept) == set(self.model)

    def teardown(self) -> None:
        self.runner.close()


TestLeastRecentlyUsed = LeastRecentlyUsed.TestCase
TestLeastRecentlyUsed.settings = settings(max_examples=200, stateful_step_count=40, deadline=None)


async def test_hits_of_many_threads():
    """They look without a lock while another thread puts and deletes: what they find is whole, and each is counted."""
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
    assert (wrong, len(cache.kept) <= 50, cache.hits) == ([], True, sum(counts))


def test_drivers_are_imported_by_the_cache_that_needs_them():
    program = """if True:
        import sys
        from app.autocrud.resource_manager.resource_store import cached_s3
        from app.autocrud.resource_manager.resource_store.cache import DiskCache, MemoryCache
        drivers = {"diskcache", "sqlite3"}
        MemoryCache()
        assert not drivers & set(sys.modules)
        DiskCache("nowhere")
        assert drivers <= set(sys.modules)
    """
    subprocess.run([sys.executable, "-c", program], check=True)
    assert not Path("nowhere").exists()


BODIES = {f"{number}": os.urandom(length) for number, length in enumerate([0, 10, 1000, 30_000, 40_000, 200_000])}


async def fill(cache: Cache) -> None:
    await cache.put_many({key: Entry(body, 600) for key, body in BODIES.items()})


async def right_or_missing(cache: Cache) -> int:
    """How many are there, of which none may be wrong."""
    found = await cache.get_many(list(BODIES))
    for key, entry in found.items():
        assert entry.body == BODIES[key]
    return len(found)


class TestDiskCache(BoundedConformance):
    def make(self, root: Path, clock: CacheClock) -> Cache:
        return DiskCache(root, clock=clock)

    def small(self, root: Path, clock: CacheClock) -> Cache:
        return DiskCache(root / "small", ROOM * SIZE + SIZE // 2, clock=clock)

    @pytest.mark.parametrize("wrong", [0, -1])
    def test_no_room_is_a_mistake(self, tmp_path, wrong):
        with pytest.raises(ConfigError, match="expected at least 1"):
            DiskCache(tmp_path, wrong)

    async def test_a_restart_loses_nothing(self, disk, tmp_path, clock):
        await fill(disk)
        await disk.close()
        again = DiskCache(tmp_path / "cache", clock=clock)
        assert await right_or_missing(again) == len(BODIES)
        clock.ahead += 601
        assert await right_or_missing(again) == 0
        await again.close()

    async def test_two_processes_share_it(self, disk, tmp_path):
        """They put, read and delete the same keys, and neither sees what nobody has put."""
        program = """if True:
            import asyncio, sys
            from app.autocrud.resource_manager.resource_store.cache import DiskCache
            async def main():
                cache = DiskCache(sys.argv[1])
                for round_ in range(150):
                    key = f"{round_ % 5}"
                    await cache.put(key, key.encode() * 50_000, 600)
                    assert await cache.get(key) in (None, key.encode() * 50_000)
                    if round_ % 7 == 0:
                        await cache.delete([key])
                await cache.put("theirs", b"theirs", 600)
                assert await cache.get("ours") == b"ours"
                await cache.delete(["deleted by them"])
                await cache.close()
            asyncio.run(main())
        """
        await disk.put_many({"ours": Entry(b"ours", 600), "deleted by them": Entry(b"1", 600)})
        process = await asyncio.create_subprocess_exec(sys.executable, "-c", program, str(tmp_path / "cache"))
        for round_ in range(150):
            key = f"{round_ % 5}"
            await disk.put(key, key.encode() * 50_000, 600)
            assert await disk.get(key) in (None, key.encode() * 50_000)
        assert await process.wait() == 0
        assert await disk.get("theirs") == b"theirs"
        assert await disk.get("deleted by them") is None

    @pytest.mark.parametrize("left", [0, 7, 39, 40, 41, 20_000, 199_999])
    async def test_a_torn_file_is_a_miss(self, disk, tmp_path, left, caplog):
        await fill(disk)
        for path in files(tmp_path, "*.val"):
            os.truncate(path, min(left, path.stat().st_size - 1))
        assert await right_or_missing(disk) == 4
        assert [record.levelname for record in caplog.records] == ["WARNING", "WARNING"]
        assert files(tmp_path, "*.val") == []
        await fill(disk)
        assert await right_or_missing(disk) == len(BODIES)

    @pytest.mark.parametrize("at", [0, 5, 8, 20, 40, 3000, -1])
    async def test_a_flipped_byte_is_a_miss(self, disk, tmp_path, at):
        await fill(disk)
        for path in files(tmp_path, "*.val"):
            body = bytearray(path.read_bytes())
            body[at] ^= 1
            path.write_bytes(body)
        assert await right_or_missing(disk) == 4

    async def test_files_that_changed_places_are_misses(self, disk, tmp_path):
        bodies = {"a": b"a" * 50_000, "b": b"b" * 50_000}
        await disk.put_many({key: Entry(body, 600) for key, body in bodies.items()})
        first, second = files(tmp_path, "*.val")
        first.rename(tmp_path / "aside")
        second.rename(first)
        (tmp_path / "aside").rename(second)
        assert await disk.get_many(["a", "b"]) == {}

    async def test_a_file_that_is_gone_is_a_miss(self, disk, tmp_path):
        await fill(disk)
        for path in files(tmp_path, "*.val"):
            path.unlink()
        assert await right_or_missing(disk) == 4

    @pytest.mark.parametrize("damage", ["garbage", "zeros", "empty", "half", "one page", "tail"])
    @pytest.mark.parametrize("while_open", [False, True])
    @pytest.mark.parametrize("name", ["cache.db", "cache.db-journal"])
    async def test_a_damaged_index_starts_empty(self, disk, tmp_path, damage, while_open, name):
        await fill(disk)
        if not while_open:
            await disk.close()
        path = index_of(tmp_path).with_name(name)
        length = path.stat().st_size if path.exists() else 8192
        content = bytearray(path.read_bytes() if path.exists() else b"")
        if damage == "garbage":
            content = bytearray(os.urandom(length))
        elif damage == "zeros":
            content = bytearray(length)
        elif damage == "one page":
            content[4096:8192] = os.urandom(4096)
        elif damage == "tail":
            content += os.urandom(5000)
        else:
            del content[0 if damage == "empty" else length // 2 :]
        path.write_bytes(content)
        await right_or_missing(disk)
        for _ in range(2):  # what is found out at a put is lost with it
            await disk.put("new", b"new", 600)
        assert await disk.get("new") == b"new"
        await right_or_missing(disk)
        await disk.close()
        again = DiskCache(tmp_path / "cache")
        assert await again.get("new") == b"new"
        await right_or_missing(again)
        await again.close()

    async def test_any_flipped_byte_of_the_index(self, tmp_path):
        """Nothing is ever wrong, and nothing ever fails."""
        original = DiskCache(tmp_path / "original")
        await fill(original)
        await original.close()
        index = index_of(tmp_path)
        content = index.read_bytes()
        for at in [*range(100), *range(100, len(content), 997)]:
            directory = tmp_path / f"{at}" / "life-1"
            directory.mkdir(parents=True)
            (directory / "cache.db").write_bytes(content[:at] + bytes([content[at] ^ 0xFF]) + content[at + 1 :])
            cache = DiskCache(tmp_path / f"{at}")
            await right_or_missing(cache)
            await fill(cache)
            await fill(cache)
            assert await right_or_missing(cache) == len(BODIES), at
            await cache.delete(list(BODIES))
            assert await right_or_missing(cache) == 0
            await cache.close()

    async def test_rows_that_make_no_sense_are_misses_and_are_not_unpickled(self, disk, tmp_path):
        await fill(disk)
        bomb = b"cbuiltins\nexec\n(Vraise SystemExit\ntR."
        with contextlib.closing(sqlite3.connect(index_of(tmp_path))) as connection:
            connection.execute("UPDATE Cache SET mode = 4, value = ? WHERE filename IS NULL", (bomb,))
            connection.execute("UPDATE Cache SET filename = '../../secret', size = 'x' WHERE filename IS NOT NULL")
            connection.commit()
        (tmp_path / "secret").write_bytes(b"secret")
        assert await right_or_missing(disk) == 0
        await fill(disk)
        assert await right_or_missing(disk) == len(BODIES)

    async def test_settings_that_are_gone(self, disk, tmp_path):
        await fill(disk)
        with contextlib.closing(sqlite3.connect(index_of(tmp_path))) as connection:
            connection.execute("DELETE FROM Settings")
            connection.commit()
        await fill(disk)
        await fill(disk)
        assert await right_or_missing(disk) == len(BODIES)

    async def test_a_directory_that_is_removed_meanwhile(self, disk, tmp_path):
        import shutil

        await fill(disk)
        shutil.rmtree(tmp_path / "cache")
        assert await right_or_missing(disk) == 0
        await fill(disk)
        assert await right_or_missing(disk) == len(BODIES)

    async def test_who_shares_the_directory_sees_that_another_one_started_empty(self, disk, tmp_path, caplog):
        other = DiskCache(tmp_path / "cache")
        await fill(disk)
        assert await right_or_missing(other) == len(BODIES)
        await disk._surely(lambda _: 1 // 0)
        assert await right_or_missing(disk) == await right_or_missing(other) == 0
        await fill(other)
        assert await right_or_missing(disk) == len(BODIES)
        await other._surely(lambda _: 1 // 0)
        await disk._surely(lambda _: 1 // 0)
        await fill(other)
        caplog.clear()
        assert await right_or_missing(disk) == len(BODIES)
        await disk._surely(lambda _: 1 // 0)
        await fill(disk)
        await other.delete(["1"])
        assert await right_or_missing(disk) == len(BODIES) - 1
        assert len(caplog.records) == 1
        await other.close()
        await disk.close()
        assert await right_or_missing(disk) == len(BODIES) - 1
        assert len(list((tmp_path / "cache").glob("life-*"))) == 1

    async def test_who_finds_the_same_damage_later_does_not_start_again(self, disk, tmp_path):
        other = DiskCache(tmp_path / "cache")
        await fill(disk)
        await right_or_missing(other)
        await disk._surely(lambda _: 1 // 0)
        await fill(disk)
        await asyncio.wrap_future(other._ask(other._leave_behind))
        assert await right_or_missing(disk) == await right_or_missing(other) == len(BODIES)
        await other.close()

    async def test_what_is_left_of_former_lives_goes(self, disk, tmp_path):
        for life in (1, 2, 10):
            (tmp_path / "cache" / f"life-{life}" / "ab").mkdir(parents=True)
        await fill(disk)
        assert [path.name for path in (tmp_path / "cache").glob("life-*")] == ["life-10"]

    async def test_processes_take_turns_to_open_it(self, disk, tmp_path):
        (tmp_path / "cache").mkdir()
        with (tmp_path / "cache" / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            put = asyncio.create_task(fill(disk))
            await asyncio.sleep(0.05)
            assert list((tmp_path / "cache").iterdir()) == [tmp_path / "cache" / "lock"]
        await put
        assert await right_or_missing(disk) == len(BODIES)

    async def test_what_has_expired_leaves_the_disk(self, disk, tmp_path, clock):
        for key in ("short", "long"):
            await disk.put(key, f"{key} text".encode() * 10_000, 600 if key == "long" else 60)
            await disk.put(f"{key} 2", f"{key} text".encode(), 600 if key == "long" else 60)
        clock.ahead += 61
        await disk.maintain(10)
        content = b"".join(path.read_bytes() for path in files(tmp_path))
        assert b"long text" in content
        assert b"short text" not in content
        assert len(files(tmp_path, "*.val")) == 1
        assert await disk.get("long 2") == b"long text"

    async def test_an_expired_entry_leaves_the_disk_when_it_is_asked_for(self, disk, tmp_path, clock):
        await disk.put("a", bytes(50_000), 60)
        clock.ahead += 61
        assert await disk.get("a") is None
        assert files(tmp_path, "*.val") == []

    async def test_what_is_deleted_leaves_no_trace(self, disk, tmp_path):
        await fill(disk)
        secrets = {f"secret {number}": b"secret text" * (1 + 3000 * number) for number in range(4)}
        await disk.put_many({key: Entry(body, 600) for key, body in secrets.items()})
        assert any(b"secret text" in path.read_bytes() for path in files(tmp_path))
        await disk.delete(list(secrets))
        await disk.purge_remnants()
        for path in files(tmp_path):
            assert b"secret" not in path.read_bytes(), path
        assert await right_or_missing(disk) == len(BODIES)

    async def test_what_is_deleted_when_it_has_expired_leaves_no_trace(self, tmp_path):
        disk = DiskCache(tmp_path / "cache")
        await disk.put("a", b"secret text", 0.01)
        await asyncio.sleep(0.02)
        await disk.delete(["a"])
        await disk.purge_remnants()
        assert all(b"secret" not in path.read_bytes() for path in files(tmp_path))
        await disk.close()

    async def test_files_that_a_killed_process_left_go_with_their_time(self, disk, tmp_path, clock):
        await disk.put("a", bytes(50_000), 60)
        (path,) = files(tmp_path, "*.val")
        stray = path.parent.parent / "00" / f"{'0' * 28}.val"
        torn = path.parent.parent / "00" / f"{'1' * 28}.val"
        stray.parent.mkdir(exist_ok=True)
        stray.write_bytes(path.read_bytes())
        torn.write_bytes(b"torn")
        await disk.maintain(10)
        assert set(files(tmp_path, "*.val")) == {path, stray, torn}
        os.utime(torn, (time.time() - 7200,) * 2)
        clock.ahead += 61
        await disk.maintain(10)
        assert files(tmp_path, "*.val") == []

    @pytest.mark.parametrize("size", [500, 30_000, 120_000])
    async def test_the_directory_does_not_grow_beyond_its_bound(self, tmp_path, size):
        bound = 2 * MB
        cache = DiskCache(tmp_path / "cache", bound)
        count = 3 * bound // size
        for at in range(0, count, 20):
            await cache.put_many({f"{number}": Entry(os.urandom(size), 600) for number in range(at, at + 20)})
            assert sum(path.stat().st_size for path in files(tmp_path)) < bound + 200 * KB
        assert sum(path.stat().st_size for path in files(tmp_path)) > bound * 0.8
        assert await cache.get(f"{at + 19}") is not None
        await cache.close()

    async def test_a_body_that_would_drive_out_the_rest_is_not_kept(self, tmp_path):
        cache = DiskCache(tmp_path / "cache", MB)
        await cache.put("large", b"1", 600)
        await cache.put_many({f"{number}": Entry(bytes(100_000), 600) for number in range(5)})
        await cache.put("large", bytes(MB // 4), 600)
        assert len(await cache.get_many(["large", *(f"{number}" for number in range(5))])) == 5
        await cache.close()

    # A directory that cannot be used

    @pytest.mark.parametrize("where", ["file", "file/below", "link", "x" * 300])
    async def test_an_unusable_directory_is_a_mistake_that_the_first_use_tells(self, tmp_path, where):
        (tmp_path / "file").write_text("mine")
        (tmp_path / "link").symlink_to(tmp_path / "missing" / "missing")
        (tmp_path / "missing").write_text("mine")
        cache = DiskCache(tmp_path / where)
        for call in (cache.get("a"), cache.put("a", b"1", 60), cache.delete(["a"]), cache.clear()):
            with pytest.raises(ConfigError, match="cache_dir must be a directory that can be written to"):
                await call
        await cache.close()
        assert (tmp_path / "file").read_text() == "mine"

    def test_a_directory_of_somebody_else(self):
        program = """if True:
            import asyncio, os, sys
            from app.autocrud.errors import ConfigError
            from app.autocrud.resource_manager.resource_store.cache import DiskCache
            caches = [DiskCache(sys.argv[1]), DiskCache(os.path.join(sys.argv[1], "below"))]
            if os.getuid() == 0:
                os.setuid(65534)
            async def main():
                for cache in caches:
                    try:
                        await cache.get("a")
                    except ConfigError as error:
                        assert "Permission denied" in str(error) and sys.argv[1] not in str(error), error
                    else:
                        raise AssertionError("it was used")
                    await cache.close()
            asyncio.run(main())
        """
        with tempfile.TemporaryDirectory() as directory:
            Path(directory).chmod(0o555)
            subprocess.run([sys.executable, "-c", program, directory], check=True)

    async def test_what_is_not_ours_stays(self, disk, tmp_path):
        (tmp_path / "cache").mkdir()
        names = ("life-", "life-x", "life--1", "life-0x1", "mine.txt", "00")
        for name in names:
            (tmp_path / "cache" / name).write_text("mine")
        await fill(disk)
        await disk._surely(lambda _: 1 // 0)
        await disk.clear()
        await fill(disk)
        assert await right_or_missing(disk) == len(BODIES)
        for name in names:
            assert (tmp_path / "cache" / name).read_text() == "mine"

    # A disk that is full

    async def test_a_full_disk_is_a_miss_and_a_line_in_the_log(self, disk, tmp_path, monkeypatch, caplog):
        await fill(disk)
        before = files(tmp_path, "*.val")
        await disk._try(lambda index: monkeypatch.setattr(index.disk, "_write", full(index.disk._write)), None)
        caplog.clear()
        await disk.put("large", bytes(50_000), 600)
        assert [record.levelno for record in caplog.records] == [logging.WARNING]
        assert "No space left" in caplog.text
        assert files(tmp_path, "*.val") == before, "half a file stays"
        assert await disk.get("large") is None
        assert await right_or_missing(disk) == len(BODIES)

    async def test_an_index_that_cannot_grow_is_a_miss(self, disk, tmp_path, caplog):
        await disk.put("old", b"old", 600)
        pages = await disk._try(lambda index: index._sql("PRAGMA page_count").fetchone()[0], 0)
        await disk._try(lambda index: index._sql(f"PRAGMA max_page_count = {pages + 1}").fetchall(), None)
        caplog.clear()
        await disk.put("new", os.urandom(30_000), 600)
        assert len(caplog.records) == 1
        assert "full" in caplog.text
        assert await disk.get("new") is None
        assert await disk.get("old") == b"old"

    async def test_what_cannot_be_deleted_alone_goes_with_everything(self, disk, monkeypatch):
        await fill(disk)

        def refuse(_):
            raise sqlite3.OperationalError("database or disk is full")

        await disk._try(lambda index: monkeypatch.setattr(index, "delete", refuse), None)
        await disk.delete(["1"])
        assert await right_or_missing(disk) == 0
        await fill(disk)
        assert await right_or_missing(disk) == len(BODIES)

    async def test_what_cannot_be_deleted_at_all_is_said(self, disk, monkeypatch):
        await fill(disk)
        with monkeypatch.context() as patch:
            patch.setattr(disk, "_lock_of_directory", full(None))
            with pytest.raises(StoreUnavailable, match="may still be there"):
                await disk._surely(lambda _: 1 // 0)
        await disk.clear()
        assert await right_or_missing(disk) == 0

    async def test_an_index_that_another_process_keeps_for_itself_is_a_miss(self, disk, tmp_path):
        await fill(disk)
        with contextlib.closing(sqlite3.connect(index_of(tmp_path), isolation_level=None)) as connection:
            connection.execute("BEGIN IMMEDIATE")
            began = time.monotonic()
            assert [await disk.get("1") for _ in range(2)] == [None, None]
            assert 1.8 < time.monotonic() - began < 5
            connection.execute("ROLLBACK")
        assert await right_or_missing(disk) == len(BODIES)

    async def test_what_was_asked_for_is_done_in_order(self, disk):
        """Also where the one who asked is gone."""
        await fill(disk)
        blocked = threading.Event()
        waiting = asyncio.create_task(disk._try(lambda _: blocked.wait(), None))
        put = asyncio.create_task(disk.put("new", b"new", 600))
        delete = asyncio.create_task(disk.delete(["new", "1"]))
        await asyncio.sleep(0)
        delete.cancel()
        blocked.set()
        await asyncio.gather(waiting, put, delete, return_exceptions=True)
        assert set(await disk.get_many(["new", "1", "2"])) == {"2"}

    async def test_what_is_asked_for_after_close_waits_for_its_end(self, disk):
        await fill(disk)
        blocked = threading.Event()
        waiting = asyncio.create_task(disk._try(lambda _: blocked.wait(), None))
        await asyncio.sleep(0)
        close, read = asyncio.create_task(disk.close()), asyncio.create_task(disk.get("1"))
        await asyncio.sleep(0.05)
        too_early = read.done()
        blocked.set()
        assert not too_early
        assert await asyncio.gather(waiting, close, read) == [True, None, BODIES["1"]]


def full(write):
    """A write that stops half way, for there is no more room."""

    def half(path=None, iterator=(), *rest):
        if write is not None:
            write(path, [next(iter(iterator))[:1000]], *rest)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    return half


# On S3


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
    """A store behind two caches, on a bucket that others may share."""

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
        """Which of the caches has it."""
        return [await cache.get(uid) is not None for cache in (self.memory, self.disk)]


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
    async def test_what_was_written_here_is_not_asked_for(self, instance):
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

    async def test_many_at_once_ask_each_layer_once_and_s3_for_the_rest(self, instance, other):
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

    async def test_what_none_has_is_read_concurrently(self, instance, other):
        for number in range(32):
            await other.put(f"0/{number}", b"%d" % number)
        instance.objects.latency = lambda _: 0.05
        began = time.monotonic()
        assert len(await instance.store.get_many([f"0/{number}" for number in range(32)])) == 32
        assert time.monotonic() - began < 0.5

    @pytest.mark.parametrize("fault", [DROPPED, LOST_ANSWER])
    async def test_a_put_that_fails_leaves_nothing(self, instance, fault):
        instance.objects.fault = lambda _: fault
        with pytest.raises(StoreUnavailable):
            await instance.put("0/a", b"1")
        assert await instance.held("0/a") == [False, False]

    async def test_a_missing_body_is_damage(self, instance):
        await instance.put("0/a", b"1")
        with pytest.raises(StoreDamaged, match="0/b"):
            await instance.store.get_many(["0/a", "0/b"])

    async def test_delete_takes_it_out_of_every_layer(self, instance):
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

    async def test_delete_takes_it_out_of_the_caches_though_s3_fails(self, instance):
        await instance.put("0/a", b"1")
        instance.objects.fault = lambda call: DROPPED if call.op == "delete" else None
        with pytest.raises(StoreUnavailable):
            await instance.store.delete(["0/a"])
        assert await instance.held("0/a") == [False, False]

    async def test_delete_goes_on_where_the_one_who_asked_does_not(self, instance):
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
    async def test_what_is_being_read_while_it_is_deleted_does_not_come_back(self, instance, other, when):
        await other.put("0/a", b"1")
        instance.objects.latency = lambda call: 0.04 if call.op == "get" else 0.005
        read = asyncio.create_task(instance.get("0/a"))
        await asyncio.sleep(when)
        await instance.store.delete(["0/a"])
        await asyncio.gather(read, return_exceptions=True)
        assert await instance.held("0/a") == [False, False]
        with pytest.raises(StoreDamaged):
            await instance.get("0/a")
        assert instance.store._arrivals == []
        assert not instance.store._leaving

    async def test_a_deletion_waits_for_a_cache_that_is_being_filled(self, instance):
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

    async def test_what_one_cache_still_has_is_not_copied_while_it_is_deleted(self, instance):
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

    async def test_what_another_instance_deleted_is_kept_for_its_time_and_no_longer(self, instance, other, clock):
        await other.put("0/a", b"1")
        assert await instance.get("0/a") == b"1"
        await other.store.delete(["0/a"])
        clock.ahead += 3500
        await instance.memory.clear()
        assert await instance.get("0/a") == b"1"  # from the disk, and into memory again
        clock.ahead += 200
        with pytest.raises(StoreDamaged):  # a copy is as old as what it was copied from
            await instance.get("0/a")

    async def test_forget_takes_it_out_of_the_caches_alone(self, instance):
        await instance.put("0/a", b"1")
        await instance.store.forget(["0/a"])
        assert await instance.held("0/a") == [False, False]
        assert await instance.get("0/a") == b"1"

    async def test_a_draft_is_kept_for_its_own_time(self, instance, other, clock):
        await instance.put("0/draft", b"1", "draft")
        await instance.put("0/stable", b"1", "stable")
        await other.store.get_many(["0/draft", "0/stable"])
        clock.ahead += 3601
        assert (await instance.held("0/draft"), await instance.held("0/stable")) == ([False] * 2, [True] * 2)
        assert (await other.held("0/draft"), await other.held("0/stable")) == ([False] * 2, [False] * 2)
        clock.ahead += 86400 - 3600
        assert await instance.held("0/stable") == [False] * 2

    async def test_no_time_means_no_cache(self, tmp_path, clock):
        instance = Instance(tmp_path, clock, ttl_draft=0)
        await instance.put("0/a", b"1", "draft")
        assert await instance.held("0/a") == [False, False]
        await instance.store.close()
        with pytest.raises(ConfigError, match="expected seconds from 0"):
            Instance(tmp_path, clock, ttl_stable=-1)

    async def test_without_caches_it_is_the_store_on_s3(self):
        objects = MemoryObjectStore()
        store = CachedS3ResourceStore([], bucket="b", object_store=objects)
        await store.put("0/a", info("0/a"), b"1")
        assert await store.get_many(["0/a"]) == [b"1"]
        await store.maintain(1)
        await store.delete(["0/a"])
        await store.close()
        assert objects.requests == {"put": 1, "get": 1, "delete": 1}
        assert store.statistics() == {}

    async def test_erase_says_when_the_last_copy_is_gone(self, instance, tmp_path):
        await instance.put("0/a", b"secret")
        await instance.store.delete(["0/a"])
        now = dt.datetime.now(dt.UTC)
        assert await instance.store.purge_remnants(now) == now + dt.timedelta(days=1)
        assert all(b"secret" not in path.read_bytes() for path in files(tmp_path))

    async def test_maintain_removes_what_has_expired(self, instance, tmp_path, clock):
        await instance.put("0/a", bytes(50_000))
        clock.ahead += 86401
        await instance.store.maintain(5)
        assert files(tmp_path, "*.val") == []

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
    """Whatever the caches lose and whatever S3 refuses: what is there is right, and what is deleted is gone."""

    uids = st.integers(0, 9).map("{}".format)

    @initialize()
    def start(self) -> None:
        self.directory = tempfile.TemporaryDirectory()
        self.root = Path(self.directory.name)
        self.clock, self.objects, self.runner = CacheClock(), MemoryObjectStore(), asyncio.Runner()
        self.model: dict[str, bytes] = {}
        self.doubtful: set[str] = set()  # whose put or delete has failed
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
    def put_in_vain(self, uid, fault):
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
    def delete_in_vain(self, uid):
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
        for path in files(self.root, "*.val"):
            if at < path.stat().st_size:
                if cut:
                    os.truncate(path, at)
                else:
                    body = path.read_bytes()
                    path.write_bytes(body[:at] + bytes([body[at] ^ 0xFF]) + body[at + 1 :])

    @rule(at=st.integers(0, 200_000), garbage=st.binary(min_size=1, max_size=5000))
    def damage_the_index(self, at, garbage):
        self.runner.run(self.instance.store.close())
        for path in files(self.root, "cache.db"):
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
    def nothing_is_on_its_way(self):
        assert self.instance.store._arrivals == []
        assert not self.instance.store._leaving

    def teardown(self) -> None:
        self.runner.run(self.instance.store.close())
        self.runner.close()
        self.directory.cleanup()


TestAgainstADict = AgainstADict.TestCase
TestAgainstADict.settings = settings(max_examples=100, stateful_step_count=30, deadline=None, derandomize=True)


_doubles: dict[Path, MemoryObjectStore] = {}


class Composition(IStorageFactory):
    """S3 for everything, and caches before the bodies."""

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
