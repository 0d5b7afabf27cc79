"""DiskCache: a damaged file, a directory that cannot be used, a full disk, and the order of operations."""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import apsw
import pytest

from app.autocrud.errors import ConfigError, StoreUnavailable
from app.autocrud.resource_manager.resource_store.cache import DiskCache, Entry
from app.autocrud.resource_manager.resource_store.cache_file import TIMEOUT_S
from app.autocrud.testing import CacheClock
from tests.stores.cache_helpers import BODIES, files, fill, valid_entries


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


async def execute(disk: DiskCache, root: Path, statement: str, *values: object) -> None:
    """Change the file while the cache does not have it open."""
    await disk.close()
    connection = apsw.Connection(str(file_of(root)))
    connection.execute(statement, values)
    connection.close()


@pytest.mark.parametrize("left", [0, 7, 39, 40, 41, 20_000, 29_999])
@pytest.mark.parametrize("size", ["size", "length"])
async def test_a_cut_body_is_a_miss(disk, tmp_path, left, size, caplog):
    await fill(disk)
    size = "size" if size == "size" else str(left)
    await execute(
        disk, tmp_path, f"UPDATE entries SET body = substr(body, 1, {left}), size = {size} WHERE size >= 30000"
    )
    assert await valid_entries(disk) == 3
    assert [record.levelname for record in caplog.records] == ["WARNING"] * 3
    caplog.clear()
    assert await valid_entries(disk) == 3
    assert caplog.records == [], "damaged entries stay"
    await fill(disk)
    assert await valid_entries(disk) == len(BODIES)


@pytest.mark.parametrize("at", [0, 5, 8, 20, 40, 3000, -1])
async def test_a_flipped_byte_is_a_miss(disk, tmp_path, at):
    await fill(disk)
    await disk.close()
    content = bytearray(file_of(tmp_path).read_bytes())
    for number in ("4", "5"):
        body = BODIES[number]
        begin = at % len(body)
        window = body[begin : begin + 16] if at >= 0 else body[-16:]
        assert content.count(window) == 1
        content[content.index(window) if at >= 0 else content.index(window) + 15] ^= 1
    file_of(tmp_path).write_bytes(content)
    assert await valid_entries(disk) == 4


async def test_bodies_that_changed_places_are_misses(disk, tmp_path):
    bodies = {"a": b"a" * 50_000, "b": b"b" * 50_000}
    await disk.put_many({key: Entry(body, 600) for key, body in bodies.items()})
    await execute(
        disk,
        tmp_path,
        """CREATE TEMP TABLE other AS SELECT * FROM entries;
           UPDATE entries SET (expiry, size, sha256, body) =
           (SELECT expiry, size, sha256, body FROM other WHERE other.key != entries.key)""",
    )
    assert await disk.get_many(["a", "b"]) == {}


async def test_a_changed_expiry_is_a_miss(disk, tmp_path):
    await fill(disk)
    await execute(disk, tmp_path, "UPDATE entries SET expiry = expiry + 1000 WHERE size > 1000")
    assert await valid_entries(disk) == 3


@pytest.mark.parametrize("damage", ["garbage", "zeros", "empty", "half", "one page", "tail"])
@pytest.mark.parametrize("while_open", [False, True])
@pytest.mark.parametrize("name", ["entries-1.sqlite", "entries-1.sqlite-journal"])
async def test_a_damaged_file_starts_empty(disk, tmp_path, damage, while_open, name):
    await fill(disk)
    if not while_open:
        await disk.close()
    path = file_of(tmp_path).with_name(name)
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
    await valid_entries(disk)
    for _ in range(2):  # a put that finds the damage is lost
        await disk.put("new", b"new", 600)
    assert await disk.get("new") == b"new"
    await valid_entries(disk)
    await disk.close()
    again = DiskCache(tmp_path / "cache")
    assert await again.get("new") == b"new"
    await valid_entries(again)
    await again.close()


async def test_any_flipped_byte_of_the_file(tmp_path):
    """No body is wrong, and no operation fails."""
    original = DiskCache(tmp_path / "original")
    await fill(original)
    await original.close()
    index = file_of(tmp_path)
    content = index.read_bytes()
    for at in [*range(100), *range(100, len(content), 2003)]:
        directory = tmp_path / f"{at}"
        directory.mkdir(parents=True)
        (directory / "entries-1.sqlite").write_bytes(content[:at] + bytes([content[at] ^ 0xFF]) + content[at + 1 :])
        cache = DiskCache(tmp_path / f"{at}")
        await valid_entries(cache)
        await fill(cache)
        await fill(cache)
        assert await valid_entries(cache) == len(BODIES), at
        await cache.delete(list(BODIES))
        assert await valid_entries(cache) == 0
        await cache.close()


async def test_rows_of_wrong_types_are_misses(disk, tmp_path):
    await fill(disk)
    await execute(
        disk,
        tmp_path,
        """CREATE TABLE wrong (key, expiry, last_use, size, sha256, body);
           INSERT INTO wrong SELECT key, expiry, last_use, size, sha256, hex(body) FROM entries WHERE size < 1000;
           INSERT INTO wrong SELECT key, 'later', last_use, 'large', 1, body FROM entries WHERE size >= 1000;
           DROP TABLE entries;
           ALTER TABLE wrong RENAME TO entries;""",
    )
    assert await valid_entries(disk) == 0
    await fill(disk)
    assert await valid_entries(disk) == len(BODIES)


@pytest.mark.parametrize("last_use", [f"{2**63 - 1}", "'x'", "1e300"])
async def test_a_last_use_that_is_no_number_of_ours_costs_entries_at_most(disk, tmp_path, last_use):
    await fill(disk)
    await execute(
        disk,
        tmp_path,
        f"""CREATE TABLE wrong (key, expiry, last_use, size, sha256, body);
            INSERT INTO wrong SELECT key, expiry, {last_use}, size, sha256, body FROM entries;
            DROP TABLE entries;
            ALTER TABLE wrong RENAME TO entries;""",
    )
    await valid_entries(disk)
    await fill(disk)
    await fill(disk)
    assert await valid_entries(disk) == len(BODIES)


async def test_a_table_that_is_gone(disk, tmp_path):
    await fill(disk)
    await execute(disk, tmp_path, "DROP TABLE entries")
    await fill(disk)
    await fill(disk)
    assert await valid_entries(disk) == len(BODIES)


# A directory that cannot be used


@pytest.mark.parametrize("where", ["file", "file/below", "link", "x" * 300])
async def test_the_first_use_of_an_unusable_directory_raises_config_error(tmp_path, where):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "missing" / "missing")
    (tmp_path / "missing").write_text("mine")
    cache = DiskCache(tmp_path / where)
    for call in (cache.get("a"), cache.put("a", b"1", 60), cache.delete(["a"]), cache.clear()):
        with pytest.raises(ConfigError, match="cache_dir must be a directory that can be written to"):
            await call
    await cache.close()
    assert (tmp_path / "file").read_text() == "mine"


def test_a_directory_of_another_user_raises_config_error():
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


async def test_other_files_in_the_directory_stay(disk, tmp_path):
    (tmp_path / "cache").mkdir()
    names = (
        "life-",
        "life-x",
        "life--1",
        "life-2",
        "entries-",
        "entries-01.sqlite",
        "entries-x.sqlite",
        "mine.txt",
        "00",
    )
    for name in names:
        (tmp_path / "cache" / name).write_text("mine")
    await fill(disk)
    await disk._run_or_start_empty(lambda _: 1 // 0)
    await disk.clear()
    await fill(disk)
    assert await valid_entries(disk) == len(BODIES)
    for name in names:
        assert (tmp_path / "cache" / name).read_text() == "mine"


# A disk that is full


@pytest.mark.parametrize("size", [30_000, 300_000])
async def test_a_full_disk_is_a_miss_and_a_warning(disk, caplog, size):
    await fill(disk)
    connection = disk._file._connection
    pages = await disk._run_or_miss(lambda _: connection.execute("PRAGMA page_count").get, 0)
    await disk._run_or_miss(lambda _: connection.execute(f"PRAGMA max_page_count = {pages + 1}").fetchall(), None)
    caplog.clear()
    await disk.put("new", os.urandom(size), 600)
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert "full" in caplog.text
    assert await disk.get("new") is None
    assert await valid_entries(disk) == len(BODIES)


async def test_if_an_entry_cannot_be_deleted_all_are(disk, monkeypatch):
    await fill(disk)

    def refuse(_):
        raise apsw.FullError("database or disk is full")

    monkeypatch.setattr(disk._file, "delete", refuse)
    await disk.delete(["1"])
    assert await valid_entries(disk) == 0
    await fill(disk)
    assert await valid_entries(disk) == len(BODIES)


async def test_a_deletion_that_is_impossible_raises_store_unavailable(disk, monkeypatch):
    await fill(disk)

    def refuse():
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(disk._directory, "locked", refuse)
        with pytest.raises(StoreUnavailable, match="may still be there"):
            await disk._run_or_start_empty(lambda _: 1 // 0)
    await disk.clear()
    assert await valid_entries(disk) == 0


async def test_a_file_that_another_process_keeps_locked_is_a_miss(disk, tmp_path):
    await fill(disk)
    connection = apsw.Connection(str(file_of(tmp_path)))
    connection.execute("BEGIN IMMEDIATE")
    began = time.monotonic()
    assert [await disk.get("1") for _ in range(2)] == [None, None]
    assert time.monotonic() - began > 1.8 * TIMEOUT_S
    connection.execute("ROLLBACK")
    connection.close()
    assert await valid_entries(disk) == len(BODIES)


async def test_operations_run_in_the_order_of_their_calls(disk):
    """Also if a caller is cancelled."""
    await fill(disk)
    blocked = threading.Event()
    waiting = asyncio.create_task(disk._run_or_miss(lambda _: blocked.wait(), None))
    put = asyncio.create_task(disk.put("new", b"new", 600))
    delete = asyncio.create_task(disk.delete(["new", "1"]))
    await asyncio.sleep(0)
    delete.cancel()
    blocked.set()
    await asyncio.gather(waiting, put, delete, return_exceptions=True)
    assert set(await disk.get_many(["new", "1", "2"])) == {"2"}


async def test_an_operation_after_close_waits_until_the_cache_is_closed(disk):
    await fill(disk)
    blocked = threading.Event()
    waiting = asyncio.create_task(disk._run_or_miss(lambda _: blocked.wait(), None))
    await asyncio.sleep(0)
    close, read = asyncio.create_task(disk.close()), asyncio.create_task(disk.get("1"))
    await asyncio.sleep(0.05)
    too_early = read.done()
    blocked.set()
    assert not too_early
    assert await asyncio.gather(waiting, close, read) == [True, None, BODIES["1"]]
