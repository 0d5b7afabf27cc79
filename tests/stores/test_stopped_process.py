"""A process is stopped (SIGSTOP) while it holds a lock of the disk stores: the others get an error in time."""

from __future__ import annotations

import asyncio
import contextlib
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import apsw
import pytest

from app.autocrud.errors import CrudError, OutcomeUnknown, ResourceNotFound, StoreUnavailable
from app.autocrud.query import Query
from app.autocrud.resource_manager.backends.sqlite import committer
from app.autocrud.resource_manager.backends.sqlite.committer import Stage
from app.autocrud.resource_manager.backends.sqlite.database import FileDatabase, FileLock
from app.autocrud.resource_manager.contract.store_errors import WriteTimedOut
from app.autocrud.resource_manager.engine.operations import Create, Update
from app.autocrud.resource_manager.resource_store.cache import DiskCache
from app.autocrud.resource_manager.storage_factory import DiskStorageFactory
from app.autocrud.testing.model import Item, manage

LIMIT_S = 0.6
HANGS_S = 60
"""Seconds after which a test fails because an expected event did not happen."""
FILES = {"meta": "item/meta/index.sqlite", "bodies": "item/data/bodies.sqlite"}

HOLD = """
import sys
from pathlib import Path
from app.autocrud.resource_manager.backends.sqlite.database import FileDatabase
with FileDatabase(Path(sys.argv[1]), lambda _: None).writing() as connection:
    connection.execute("BEGIN IMMEDIATE")
    print("held", flush=True)
    sys.stdin.read()
    connection.execute("ROLLBACK")
"""
CLOSE = """
import asyncio, sys
from app.autocrud.resource_manager.backends.sqlite import committer
from app.autocrud.resource_manager.storage_factory import DiskStorageFactory
from app.autocrud.testing.model import Item, manage
committer.WRITE_TIMEOUT_S = float(sys.argv[2])
async def main():
    manager = manage(DiskStorageFactory(sys.argv[1]))
    await manager.create(Item())
    print("created", flush=True)
    sys.stdin.readline()
    await manager.close()
asyncio.run(main())
"""


@pytest.fixture(autouse=True)
def soon(monkeypatch):
    monkeypatch.setattr(committer, "WRITE_TIMEOUT_S", LIMIT_S)


@pytest.fixture
async def manager(tmp_path):
    manager = manage(DiskStorageFactory(tmp_path))
    await manager.create(Item(text="1"), resource_id="a")
    await manager.create(Item(text="1"), resource_id="b")
    yield manager
    await manager.close()


@contextlib.contextmanager
def stopped(path: Path, script: str = HOLD) -> Iterator[None]:
    """A process is stopped while it writes to this file; at the end it goes on."""
    command = [sys.executable, "-c", script, str(path)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline() == "held\n"
        process.send_signal(signal.SIGSTOP)
        yield
        process.send_signal(signal.SIGCONT)
        process.communicate("", timeout=10)
        assert process.returncode == 0
    finally:
        process.kill()
        process.communicate()


async def told(write) -> CrudError:
    """Return the error of a write. It fails if the write waits for the process that is stopped."""
    with pytest.raises((StoreUnavailable, OutcomeUnknown)) as raised:
        await asyncio.wait_for(write, HANGS_S)
    return raised.value


def rows(root: Path) -> int:
    with contextlib.closing(apsw.Connection(str(root / FILES["bodies"]))) as connection:
        return connection.execute("SELECT count(*) FROM bodies").get


@pytest.mark.parametrize("where", FILES)
async def test_writes_are_given_up_in_time_and_were_not_done(manager, tmp_path, where):
    with stopped(tmp_path / FILES[where]):
        writes = [
            manager.update("a", Item(text="2")),
            manager.create(Item(text="2"), resource_id="c"),
            manager.batch([Update(resource_id="b", data=Item(text="2")), Create(Item(), "d")]),
        ]
        for error in await asyncio.gather(*map(told, writes)):
            assert "nothing was changed" in str(error)
        await told(manager.update("a", Item(text="3")))  # later writes wait no longer
        assert (await manager.get("a")).data.text == "1"  # reads do not wait
        assert (await manager.search(Query())).items
    for rid in ("a", "b"):
        assert (await manager.update(rid, Item(text="4"))).meta.version == 2
    for rid in ("c", "d"):
        with pytest.raises(ResourceNotFound):
            await manager.get(rid)
    assert (rows(tmp_path) == 4) == (where == "bodies")  # what was given up before it put bodies puts none
    for _ in range(4):
        await manager.maintain(10)
    assert rows(tmp_path) == 4  # the bodies that were put and not named are swept


async def test_a_purge_says_what_it_could_not_do(manager, tmp_path):
    with stopped(tmp_path / FILES["meta"]):
        assert isinstance(await told(manager.purge("a")), StoreUnavailable)
    await manager.get("a")
    with stopped(tmp_path / FILES["bodies"]), pytest.raises(OutcomeUnknown, match="it is purged, but"):
        await asyncio.wait_for(manager.purge("a"), HANGS_S)
    with pytest.raises(ResourceNotFound):
        await manager.get("a")
    for _ in range(3):
        await manager.maintain(10)
    assert rows(tmp_path) == 1


@pytest.mark.parametrize("where", FILES)
async def test_a_process_that_starts_gets_an_error_and_other_stores_are_read(manager, tmp_path, where):
    with stopped(tmp_path / FILES[where]):
        others = [manage(DiskStorageFactory(tmp_path)) for _ in range(6)]  # more than there are threads for reads
        asked = [asyncio.create_task(told(other.get("a"))) for other in others]
        await asyncio.sleep(LIMIT_S / 2)
        assert (await manager.get("a")).data.text == "1"
        await asyncio.gather(*asked)
    for other in others:
        assert (await other.get("a")).data.text == "1"
        await other.close()


@pytest.mark.parametrize("where", FILES)
async def test_closing_ends(manager, tmp_path, where, caplog):
    with stopped(tmp_path / FILES[where]):
        await asyncio.wait_for(manager.close(), HANGS_S)
        assert "stays open" in caplog.text
        assert (await manager.get("a")).data.text == "1"
    assert (await manager.update("a", Item(text="2"))).meta.version == 2
    await manager.close()
    assert not list(tmp_path.rglob("*-wal")), "the last one to close moves the log into the file"


@pytest.mark.parametrize("where", FILES)
def test_a_process_ends(tmp_path, where):
    command = [sys.executable, "-c", CLOSE, str(tmp_path), str(LIMIT_S)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline() == "created\n"
        with stopped(tmp_path / FILES[where]):
            process.communicate("\n", timeout=10)
        assert process.returncode == 0
    finally:
        process.kill()
        process.communicate()


async def test_a_completed_write_is_acknowledged_while_another_one_waits(tmp_path):
    """Both in one turn of the committer: the first one needs one lock, the other one two."""
    one, other = (FileDatabase(tmp_path / f"{name}.sqlite", lambda _: None) for name in ("one", "other"))
    for each in (one, other):
        await each.open()
    work = lambda _: "done"  # noqa: E731
    with stopped(other.path):
        with one._file_lock.held():
            first = asyncio.create_task(one.write(work))
            await asyncio.sleep(0.05)
            both = [Stage(other, work), Stage(one, work)]
            tasks = [asyncio.create_task(one.write(work)), asyncio.create_task(one.committer.write(both))]
            await asyncio.sleep(0.05)
        assert [await first, await asyncio.wait_for(tasks[0], HANGS_S)] == ["done", "done"]
        assert not tasks[1].done()
        with pytest.raises(WriteTimedOut):
            await tasks[1]
    for each in (one, other):
        await each.close()


async def test_given_up_is_never_done_and_acknowledged_is_never_lost(manager, tmp_path, monkeypatch):
    """Locks that come and go about when writes are given up."""
    monkeypatch.setattr(committer, "WRITE_TIMEOUT_S", 0.012)
    over = threading.Event()

    def hold(where: str) -> None:
        chance, lock = random.Random(where), FileLock(tmp_path / FILES[where])
        while not over.is_set():
            with lock.held():
                time.sleep(chance.random() * 0.02)
            time.sleep(chance.random() * 0.004)
        lock.close()

    holders = [threading.Thread(target=hold, args=(where,)) for where in FILES]
    for holder in holders:
        holder.start()
    done, given_up = set(), set()

    async def write(worker: int) -> None:
        for number in range(25):
            text = f"{worker}-{number}"
            try:
                await manager.create(Item(text=text), resource_id=text)
                done.add(text)
            except StoreUnavailable:
                given_up.add(text)

    try:
        await asyncio.gather(*map(write, range(8)))
    finally:
        over.set()
        for holder in holders:
            await asyncio.to_thread(holder.join)
    monkeypatch.setattr(committer, "WRITE_TIMEOUT_S", 10)
    assert len(done) > 10
    assert len(given_up) > 10
    for _ in range(4):
        await manager.maintain(10)
    for text in done:
        assert (await manager.get(text)).data.text == text
    for text in given_up:
        with pytest.raises(ResourceNotFound):
            await manager.get(text)
    assert rows(tmp_path) == 2 + len(done)


HOLD_CACHE = """
import fcntl, sys
lock = open(sys.argv[1], "w")
fcntl.flock(lock, fcntl.LOCK_EX)
print("held", flush=True)
sys.stdin.read()
"""


async def test_a_cache_whose_directory_is_locked_is_a_miss(tmp_path, monkeypatch):
    monkeypatch.setattr("app.autocrud.resource_manager.resource_store.cache_directory.TIMEOUT_S", 0.3)
    cache = DiskCache(tmp_path)
    with stopped(tmp_path / "lock", HOLD_CACHE):
        await asyncio.wait_for(cache.put("a", b"1", 60), HANGS_S)
        assert await asyncio.wait_for(cache.get("a"), HANGS_S) is None
        with pytest.raises(StoreUnavailable):
            await asyncio.wait_for(cache.delete(["a"]), HANGS_S)
    await cache.put("a", b"2", 60)
    assert await cache.get("a") == b"2"
    await cache.close()
