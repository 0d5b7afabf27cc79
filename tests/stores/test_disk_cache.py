"""DiskCache: the contract, restarts, sharing by processes, its bound, and traces of deleted entries."""

from __future__ import annotations

import asyncio
import fcntl
import os
import shutil
import signal
import sys
from pathlib import Path

import pytest

from app.autocrud.errors import ConfigError
from app.autocrud.resource_manager.resource_store.cache import Cache, DiskCache, Entry
from app.autocrud.testing import CacheClock
from tests.stores.cache_helpers import BODIES, KB, MB, ROOM, SIZE, BoundedConformance, files, fill, valid_entries


@pytest.fixture
def clock() -> CacheClock:
    return CacheClock()


@pytest.fixture
async def disk(tmp_path, clock):
    cache = DiskCache(tmp_path / "cache", clock=clock)
    yield cache
    await cache.close()


def file_of(root: Path) -> Path:
    (path,) = files(root, "entries-*.sqlite")
    return path


class TestDiskCache(BoundedConformance):
    def make(self, root: Path, clock: CacheClock) -> Cache:
        return DiskCache(root, clock=clock)

    def small(self, root: Path, clock: CacheClock) -> Cache:
        return DiskCache(root / "small", ROOM * SIZE + SIZE // 2, clock=clock)

    @pytest.mark.parametrize("wrong", [0, -1])
    def test_a_size_below_1_is_refused(self, tmp_path, wrong):
        with pytest.raises(ConfigError, match="expected at least 1"):
            DiskCache(tmp_path, wrong)


def test_nothing_is_created_before_the_first_use(tmp_path):
    DiskCache(tmp_path / "cache")
    assert list(tmp_path.iterdir()) == []


async def test_a_restart_loses_nothing(disk, tmp_path, clock):
    await fill(disk)
    await disk.close()
    again = DiskCache(tmp_path / "cache", clock=clock)
    assert await valid_entries(again) == len(BODIES)
    clock.ahead += 601
    assert await valid_entries(again) == 0
    await again.close()


async def test_two_processes_share_a_directory(disk, tmp_path):
    """They put, read and delete the same keys. Neither reads a body that was not put."""
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


async def test_a_directory_that_is_removed_while_it_is_used(disk, tmp_path):
    await fill(disk)
    shutil.rmtree(tmp_path / "cache")
    assert await valid_entries(disk) == 0
    await fill(disk)
    assert await valid_entries(disk) == len(BODIES)


async def test_a_process_sees_that_another_one_started_empty(disk, tmp_path, caplog):
    other = DiskCache(tmp_path / "cache")
    await fill(disk)
    assert await valid_entries(other) == len(BODIES)
    await disk._run_or_start_empty(lambda _: 1 // 0)
    assert await valid_entries(disk) == await valid_entries(other) == 0
    await fill(other)
    assert await valid_entries(disk) == len(BODIES)
    await other._run_or_start_empty(lambda _: 1 // 0)
    await disk._run_or_start_empty(lambda _: 1 // 0)
    await fill(other)
    caplog.clear()
    assert await valid_entries(disk) == len(BODIES)
    await disk._run_or_start_empty(lambda _: 1 // 0)
    await fill(disk)
    await other.delete(["1"])
    assert await valid_entries(disk) == len(BODIES) - 1
    assert len(caplog.records) == 1
    await other.close()
    await disk.close()
    assert await valid_entries(disk) == len(BODIES) - 1
    assert len(list((tmp_path / "cache").glob("entries-*.sqlite"))) == 1


async def test_the_second_process_that_finds_the_damage_does_not_start_empty_again(disk, tmp_path):
    other = DiskCache(tmp_path / "cache")
    await fill(disk)
    await valid_entries(other)
    await disk._run_or_start_empty(lambda _: 1 // 0)
    await fill(disk)
    await asyncio.wrap_future(other._submit(other._start_empty))
    assert await valid_entries(disk) == await valid_entries(other) == len(BODIES)
    await other.close()


async def test_files_of_former_generations_are_removed(disk, tmp_path):
    (tmp_path / "cache").mkdir()
    for generation in (1, 2, 10):
        (tmp_path / "cache" / f"entries-{generation}.sqlite").touch()
        (tmp_path / "cache" / f"entries-{generation}.sqlite-journal").touch()
    await fill(disk)
    assert [path.name for path in files(tmp_path, "*.sqlite")] == ["entries-10.sqlite"]
    assert [path.name for path in files(tmp_path, "*-journal")] == ["entries-10.sqlite-journal"]


async def test_the_format_of_earlier_releases_is_removed(disk, tmp_path):
    lives = [tmp_path / "cache" / f"life-{number}" for number in (1, 3)]
    for life in lives:
        (life / "ab" / "cd").mkdir(parents=True)
        for name in ("cache.db", "cache.db-journal", f"ab/cd/{'0' * 28}.val"):
            (life / name).write_bytes(b"secret")
    (lives[1] / "mine.txt").write_text("mine")
    await fill(disk)
    assert await valid_entries(disk) == len(BODIES)
    assert files(tmp_path / "cache", "life-*/**/*") == [lives[1] / "mine.txt"]
    assert not lives[0].exists()
    (lives[0] / "ab").mkdir(parents=True)  # a process of an earlier release starts empty meanwhile
    (lives[0] / "cache.db").touch()
    await disk.maintain(10)
    assert not lives[0].exists()
    assert await valid_entries(disk) == len(BODIES)


async def test_processes_open_the_cache_one_after_the_other(disk, tmp_path):
    (tmp_path / "cache").mkdir()
    with (tmp_path / "cache" / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        put = asyncio.create_task(fill(disk))
        await asyncio.sleep(0.05)
        assert list((tmp_path / "cache").iterdir()) == [tmp_path / "cache" / "lock"]
    await put
    assert await valid_entries(disk) == len(BODIES)


async def test_expired_entries_are_overwritten_by_maintain(disk, tmp_path, clock):
    for key in ("short", "long"):
        await disk.put(key, f"{key} text".encode() * 10_000, 600 if key == "long" else 60)
        await disk.put(f"{key} 2", f"{key} text".encode(), 600 if key == "long" else 60)
    clock.ahead += 61
    await disk.maintain(10)
    content = b"".join(path.read_bytes() for path in files(tmp_path))
    assert b"long text" in content
    assert b"short text" not in content
    assert await disk.get("long 2") == b"long text"


async def test_maintain_gives_room_back_to_the_disk(disk, tmp_path, clock):
    await disk.put_many({f"{number}": Entry(bytes(SIZE), 60) for number in range(20)})
    assert file_of(tmp_path).stat().st_size > 20 * SIZE
    clock.ahead += 61
    await disk.maintain(10)
    assert file_of(tmp_path).stat().st_size < SIZE


async def test_expired_entries_become_fewer_without_maintenance(disk, tmp_path, clock):
    await disk.put_many({f"{number}": Entry(bytes(SIZE), 60) for number in range(20)})
    clock.ahead += 61
    size = file_of(tmp_path).stat().st_size
    await disk.put_many({f"new {number}": Entry(bytes(SIZE), 60) for number in range(20)})
    assert file_of(tmp_path).stat().st_size < size + 2 * SIZE


async def test_an_expired_entry_is_overwritten_when_it_is_asked_for(disk, tmp_path, clock):
    await disk.put("a", b"secret text" * 5000, 60)
    clock.ahead += 61
    assert await disk.get("a") is None
    assert all(b"secret" not in path.read_bytes() for path in files(tmp_path))


async def test_deleted_entries_are_overwritten(disk, tmp_path):
    await fill(disk)
    secrets = {f"secret {number}": b"secret text" * (1 + 3000 * number) for number in range(4)}
    await disk.put_many({key: Entry(body, 600) for key, body in secrets.items()})
    assert any(b"secret text" in path.read_bytes() for path in files(tmp_path))
    await disk.delete(list(secrets))
    await disk.purge_remnants()
    for path in files(tmp_path):
        assert b"secret" not in path.read_bytes(), path
    assert await valid_entries(disk) == len(BODIES)


async def test_an_entry_that_is_deleted_after_it_expired_is_overwritten(tmp_path):
    disk = DiskCache(tmp_path / "cache")
    await disk.put("a", b"secret text", 0.01)
    await asyncio.sleep(0.02)
    await disk.delete(["a"])
    await disk.purge_remnants()
    assert all(b"secret" not in path.read_bytes() for path in files(tmp_path))
    await disk.close()


async def test_a_killed_process_costs_no_more_than_its_last_put(disk, tmp_path):
    program = """if True:
        import asyncio, os, sys
        from app.autocrud.resource_manager.resource_store.cache import DiskCache
        async def main():
            cache = DiskCache(sys.argv[1], 2_000_000)
            for number in range(10**9):
                await cache.put(f"{number % 50}", b"%d " % (number % 50) * 20_000, 600)
                print("put", flush=True)
        asyncio.run(main())
    """
    for round_ in range(5):
        command = [sys.executable, "-c", program, str(tmp_path / "cache")]
        process = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE)
        for _ in range(60 + 7 * round_):
            await process.stdout.readline()
        process.send_signal(signal.SIGKILL)
        await process.wait()
        found = await disk.get_many([f"{number}" for number in range(50)])
        assert len(found) > 10
        assert all(entry.body == f"{key} ".encode() * 20_000 for key, entry in found.items())
        await disk.close()
        assert sum(path.stat().st_size for path in files(tmp_path)) < 2_000_000 + 200 * KB


@pytest.mark.parametrize("size", [500, 30_000, 120_000])
async def test_the_directory_does_not_grow_beyond_its_bound(tmp_path, size):
    bound = 2 * MB
    cache = DiskCache(tmp_path / "cache", bound)
    count = 3 * bound // size
    for at in range(0, count, 20):
        await cache.put_many({f"{number}": Entry(os.urandom(size), 600) for number in range(at, at + 20)})
        assert sum(path.stat().st_size for path in files(tmp_path)) < bound + 200 * KB
    assert sum(path.stat().st_size for path in files(tmp_path)) > bound * 0.8
    assert await cache.get(f"{at + 19}") is not None
    await cache.close()


async def test_a_body_of_more_than_a_quarter_of_the_bound_is_not_kept(tmp_path):
    cache = DiskCache(tmp_path / "cache", MB)
    await cache.put("large", b"1", 600)
    await cache.put_many({f"{number}": Entry(bytes(100_000), 600) for number in range(5)})
    await cache.put("large", bytes(MB // 4), 600)
    assert len(await cache.get_many(["large", *(f"{number}" for number in range(5))])) == 5
    await cache.close()
