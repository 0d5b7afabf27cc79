"""Local copies of S3-SQLite: damaged, locked or outdated ones, and reads that use them."""

from __future__ import annotations

import asyncio
import contextlib
import os
from pathlib import Path

import apsw
import pytest

from app.autocrud import AutoCRUD
from app.autocrud.errors import (
    StoreUnavailable,
)
from app.autocrud.query import Query, field
from app.autocrud.resource_manager.backends.s3.memory_object_store import (
    MemoryObjectStore,
)
from app.autocrud.resource_manager.backends.s3_sqlite import local_copy
from app.autocrud.resource_manager.storage_factory import S3StorageFactory
from tests import virtual_time
from tests.stores.s3_sqlite_helpers import Note, instance, meta_store


@pytest.fixture
def objects() -> MemoryObjectStore:
    return MemoryObjectStore()


def copies(directory: Path) -> list[Path]:
    return sorted(directory.glob("*/copy-*.sqlite"))


@pytest.mark.parametrize("damage", ["truncated", "zeros", "text", "missing"])
async def test_a_damaged_copy_is_rebuilt(objects, tmp_path, damage):
    manager = instance(objects, tmp_path)
    for number in range(200):
        await manager.create(Note(f"note {number}"))
    await manager.storage.close()
    (path,) = copies(tmp_path)
    content = path.read_bytes()
    match damage:
        case "truncated":
            path.write_bytes(content[: len(content) // 2])
        case "zeros":
            path.write_bytes(content[:4096] + bytes(len(content) - 4096))
        case "text":
            path.write_text("not a database")
        case "missing":
            path.unlink()
    again = instance(objects, tmp_path)
    assert await again.count(Query(where=field("text").starts_with("note"))) == 200
    assert len((await again.search(Query(limit=200))).items) == 200
    await again.create(Note("more"))
    assert await again.count() == 201
    await again.storage.close()


async def test_a_copy_that_is_damaged_while_in_use_is_rebuilt(objects, tmp_path):
    manager = instance(objects, tmp_path)
    for number in range(100):
        await manager.create(Note(f"note {number}"))
    (path,) = copies(tmp_path)
    for connection in meta_store(manager)._replica.copy._idle:
        connection.close()
    meta_store(manager)._replica.copy._idle.clear()
    for suffix in ("-wal", "-shm"):
        Path(f"{path}{suffix}").unlink(missing_ok=True)
    path.write_bytes(b"garbage" * 1000)
    assert await manager.count(Query(where=field("text").eq("note 7"))) == 1
    await manager.create(Note("more"))
    assert await manager.count() == 101
    await manager.storage.close()


async def test_a_process_that_gets_no_lock_uses_a_private_copy(objects, tmp_path, monkeypatch):
    monkeypatch.setattr(local_copy, "LOCK_TIMEOUT_S", 0.05)
    first = instance(objects, tmp_path)
    await first.create(Note("0"))
    (path,) = copies(tmp_path)
    with contextlib.closing(os.fdopen(os.open(path.parent / "lock", os.O_RDWR))) as lock:
        import fcntl

        fcntl.flock(lock, fcntl.LOCK_EX)  # like a process that was stopped while it held the lock
        second = instance(objects, tmp_path)
        await second.create(Note("1"))
        await first.create(Note("2"))
        assert await first.count() == await second.count() == 3
    await first.storage.close()
    await second.storage.close()


async def test_files_of_killed_processes_are_removed_after_a_day(objects, tmp_path):
    manager = instance(objects, tmp_path)
    await manager.create(Note("0"))
    (current,) = copies(tmp_path)
    old, young = current.with_name("copy-old.sqlite-wal"), current.with_name("copy-young.sqlite")
    for path in (old, young):
        path.write_text("left")
    for path in (old, current):
        os.utime(path, (0, 0))
    await instance(objects, tmp_path).count()
    assert not old.exists()
    assert young.exists()
    assert current.exists()
    await manager.storage.close()


async def test_a_full_disk_loses_no_acknowledged_write(objects, tmp_path, monkeypatch):
    manager = instance(objects, tmp_path)
    created = await manager.create(Note("0"))
    rid = created.meta.resource_id
    full = True
    advance = local_copy.LocalCopy.advance

    def fails(self, *args):
        if full:
            raise apsw.FullError("database or disk is full")
        return advance(self, *args)

    monkeypatch.setattr(local_copy.LocalCopy, "advance", fails)
    await manager.update(rid, Note("1"))  # the write is in S3
    with pytest.raises(StoreUnavailable):
        await manager.get(rid)  # and no older state may be read
    full = False
    assert (await manager.get(rid)).data.text == "1"
    assert (await instance(objects).get(rid)).data.text == "1"
    await manager.storage.close()


def test_bounded_reads_check_after_max_staleness_only(objects):
    async def main():
        factory = S3StorageFactory("double", object_store=objects, consistency="bounded", sync_interval=5.0)
        crud = AutoCRUD(storage_factory=factory)
        bounded = crud.add_model(Note, indexed_fields=["text"])
        writer = instance(objects, fields=("text",))
        await writer.create(Note("0"))
        assert await bounded.count() == 1
        await writer.create(Note("1"))
        objects.requests.clear()
        assert await bounded.count() == 1
        assert not objects.requests
        await asyncio.sleep(5.1)
        assert await bounded.count() == 2

    virtual_time.run(main())


async def test_local_reads_wait_for_an_own_write_that_the_copy_lacks(objects, monkeypatch):
    crud = AutoCRUD(storage_factory=S3StorageFactory("double", object_store=objects, consistency="local"))
    manager = crud.add_model(Note, indexed_fields=["text"])
    created = await manager.create(Note("0"))
    advance = local_copy.LocalCopy.advance

    def fails(*_):
        raise apsw.FullError("database or disk is full")

    monkeypatch.setattr(local_copy.LocalCopy, "advance", fails)
    await manager.update(created.meta.resource_id, Note("1"))
    with pytest.raises(StoreUnavailable):
        await manager.get(created.meta.resource_id)
    monkeypatch.setattr(local_copy.LocalCopy, "advance", advance)
    assert (await manager.get(created.meta.resource_id)).data.text == "1"


async def test_the_sweep_never_uses_an_outdated_copy(objects):
    crud = AutoCRUD(storage_factory=S3StorageFactory("double", object_store=objects, consistency="local"))
    behind = crud.add_model(Note, indexed_fields=["text"])
    await behind.create(Note("0"))
    created = await instance(objects, fields=("text",)).create(Note("1"))
    assert await meta_store(behind).unreferenced([created.meta.uid, "0/none"]) == ["0/none"]
