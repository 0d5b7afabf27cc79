"""`crudstack snapshot`: a copy of the data directory that is made while programs write to it."""

from __future__ import annotations

import asyncio
import hashlib
import multiprocessing
import os
import shutil
import stat
import subprocess
import sys
import time
from pathlib import Path

import apsw
import pytest
from msgspec.structs import replace

from app.autocrud import AutoCRUD
from app.autocrud.backup import directory_snapshot
from app.autocrud.backup.directory_snapshot import CopiedModel, snapshot_directory
from app.autocrud.errors import ConfigError, InvalidData, StoreUnavailable
from app.autocrud.resource_manager.basic import BlobRow, Change, Version
from app.autocrud.resource_manager.contract.blobs import BlobRows
from app.autocrud.resource_manager.records import owner_of
from app.autocrud.resource_manager.storage_factory import DiskStorageFactory, MemoryDiskStorageFactory

from .exports import Account, transfers

ACCOUNTS, AMOUNT = 12, 100
KINDS = {"disk": DiskStorageFactory, "memory-disk": MemoryDiskStorageFactory}


def crud_of(kind: str, directory: Path) -> AutoCRUD:
    crud = AutoCRUD(storage_factory=KINDS[kind](directory))
    crud.add_model(Account, indexed_fields=["amount"])
    return crud


async def filled(kind: str, directory: Path) -> AutoCRUD:
    crud = crud_of(kind, directory)
    for number in range(ACCOUNTS):
        await crud.resource_manager(Account).create(Account(AMOUNT), resource_id=f"a{number}")
    return crud


def copy(source: Path, target: Path) -> list[CopiedModel]:
    return snapshot_directory(source, target, lambda *_: None)


async def amounts(kind: str, directory: Path) -> dict[str, int]:
    crud = crud_of(kind, directory)
    page = await crud.resource_manager(Account).search()
    await crud.close()
    return {resource.meta.resource_id: resource.data.amount for resource in page.items}


@pytest.mark.parametrize("kind", KINDS)
async def test_a_copy_shows_one_moment_while_another_process_writes(kind: str, tmp_path: Path):
    source = tmp_path / "data"
    await (await filled(kind, source)).close()
    ready, stop = multiprocessing.get_context("spawn").Event(), multiprocessing.get_context("spawn").Event()
    writer = multiprocessing.get_context("spawn").Process(target=write_until, args=(kind, source, ready, stop))
    writer.start()
    try:
        assert await asyncio.to_thread(ready.wait, 30)
        for number in range(4):
            await asyncio.sleep(0.1)
            (model,) = await asyncio.to_thread(copy, source, tmp_path / f"copy {number}")
            assert model == CopiedModel("account", ACCOUNTS, 0, (), ())
            found = await amounts(kind, tmp_path / f"copy {number}")
            assert len(found) == ACCOUNTS
            assert sum(found.values()) == ACCOUNTS * AMOUNT
            assert number == 0 or set(found.values()) != {AMOUNT}
    finally:
        stop.set()
        await asyncio.to_thread(writer.join, 30)
    assert writer.exitcode == 0


def write_until(kind: str, directory: Path, ready, stop) -> None:
    """Move amounts, and edit a draft, whose former body is removed each time."""

    async def run() -> None:
        crud = crud_of(kind, directory)
        ended = asyncio.Event()
        moving = asyncio.create_task(transfers(crud, ACCOUNTS, ended))
        await asyncio.sleep(0.2)
        ready.set()
        while not stop.is_set():
            await asyncio.sleep(0.01)
        ended.set()
        await moving
        await crud.close()

    asyncio.run(run())


@pytest.mark.parametrize("kind", KINDS)
async def test_all_bodies_of_a_copy_are_there_while_drafts_are_edited(kind: str, tmp_path: Path, monkeypatch):
    """Several edits would fit between the beginnings of the two transactions, if they could."""
    begin = directory_snapshot.begin_reading
    monkeypatch.setattr(directory_snapshot, "begin_reading", lambda connection: (begin(connection), time.sleep(0.02)))
    crud = await filled(kind, tmp_path / "data")
    manager = crud.resource_manager(Account)
    await manager.create(Account(0), resource_id="draft", status="draft")
    stop = asyncio.Event()

    async def edit() -> int:
        for number in range(1, 10**9):
            if stop.is_set():
                return number
            await manager.modify("draft", Account(number))
        raise AssertionError

    editing = asyncio.create_task(edit())
    for number in range(8):
        await asyncio.to_thread(copy, tmp_path / "data", tmp_path / f"copy {number}")
    stop.set()
    assert await editing > 8
    await crud.close()
    for number in range(8):
        assert (await amounts(kind, tmp_path / f"copy {number}")).keys() >= {"draft", "a0"}


@pytest.mark.parametrize("kind", KINDS)
async def test_a_copy_with_the_server_stopped_works(kind: str, tmp_path: Path):
    """The backup that the document names: `cp -r` of the data directory."""
    await (await filled(kind, tmp_path / "data")).close()
    subprocess.run(["cp", "-r", tmp_path / "data", tmp_path / "copy"], check=True)
    assert await amounts(kind, tmp_path / "copy") == {f"a{number}": AMOUNT for number in range(ACCOUNTS)}
    crud = crud_of(kind, tmp_path / "copy")
    await crud.resource_manager(Account).update("a0", Account(7))
    await crud.close()
    assert (await amounts(kind, tmp_path / "data"))["a0"] == AMOUNT


async def test_a_copy_has_no_pins_and_no_access_for_others(tmp_path: Path):
    crud = await filled("disk", tmp_path / "data")
    await crud.resource_manager(Account).storage.meta_store.add_pin("a")
    copy(tmp_path / "data", tmp_path / "copy")
    again = crud_of("disk", tmp_path / "copy")
    assert not await again.resource_manager(Account).storage.meta_store.has_pins()
    assert await crud.resource_manager(Account).storage.meta_store.has_pins()
    await again.close()
    await crud.close()
    for path in (tmp_path / "copy").rglob("*.sqlite"):
        assert stat.S_IMODE(path.stat().st_mode) & 0o077 == 0
        assert stat.S_IMODE(path.parent.stat().st_mode) & 0o077 == 0
    assert stat.S_IMODE((tmp_path / "copy").stat().st_mode) == 0o700


async def test_only_a_new_or_empty_directory_is_written(tmp_path: Path):
    await (await filled("disk", tmp_path / "data")).close()
    (tmp_path / "empty").mkdir()
    copy(tmp_path / "data", tmp_path / "empty")
    assert await amounts("disk", tmp_path / "empty")
    with pytest.raises(InvalidData, match="exists"):
        copy(tmp_path / "data", tmp_path / "empty")
    (tmp_path / "file").touch()
    with pytest.raises(InvalidData, match="exists"):
        copy(tmp_path / "data", tmp_path / "file")
    with pytest.raises(ConfigError, match="has no store"):
        copy(tmp_path / "nothing", tmp_path / "new")
    with pytest.raises(StoreUnavailable, match="cannot be copied"):
        copy(tmp_path / "data", tmp_path / "missing/new")
    assert not (tmp_path / "new").exists()


# Files


def key_of(content: bytes, number: int) -> str:
    return f"{hashlib.sha256(content).hexdigest()}/0-{number:032x}"


def file_of(directory: Path, key: str) -> Path:
    sha256, _, uid = key.partition("/")
    return directory / "account/blobs" / sha256[:2] / sha256 / uid


async def attach(crud: AutoCRUD, directory: Path, resource_id: str, content: bytes, number: int) -> str:
    """Store a file, and let the current revision of a resource name it."""
    manager = crud.resource_manager(Account)
    await manager.open()
    storage = manager.storage
    rows = storage.meta_store if storage.meta_store.durable else storage.resource_store
    assert isinstance(rows, BlobRows)
    key = key_of(content, number)
    path = file_of(directory, key)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    await rows.add_blob(BlobRow(key=key, size=len(content), owner=owner_of("alice")))
    meta = await storage.get(resource_id)
    record = await storage.revision(resource_id, meta.revision)
    changed = replace(meta, version=meta.version + 1, nonce="0" * 16)
    change = Change(
        meta=changed, record=replace(record, blobs=(key,)), index=None, expect=Version(meta.version, meta.nonce)
    )
    from app.autocrud.resource_manager.basic import Write

    await storage.commit([Write(change, None)])
    return key


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("linked", [False, True])
async def test_files_are_linked_or_copied(kind: str, linked: bool, tmp_path: Path, monkeypatch):
    crud = await filled(kind, source := tmp_path / "data")
    key = await attach(crud, source, "a0", b"content", 1)
    if not linked:

        def refuse(*_, **__):
            raise OSError(18, "Invalid cross-device link")

        monkeypatch.setattr(os, "link", refuse)
    (model,) = copy(source, tmp_path / "copy")
    await crud.close()
    assert (model.files, model.damaged, model.purged) == (1, (), ())
    copied = file_of(tmp_path / "copy", key)
    assert copied.read_bytes() == b"content"
    assert copied.samefile(file_of(source, key)) is linked
    shutil.rmtree(source)
    assert copied.read_bytes() == b"content"
    assert len(await amounts(kind, tmp_path / "copy")) == ACCOUNTS


@pytest.mark.parametrize("kind", KINDS)
async def test_files_that_come_and_go_meanwhile(kind: str, tmp_path: Path, monkeypatch):
    """Between the first links and the metadata a file is added, one is purged, and an upload is swept."""
    crud = await filled(kind, source := tmp_path / "data")
    manager = crud.resource_manager(Account)
    before = await attach(crud, source, "a0", b"before", 1)
    purged = await attach(crud, source, "a1", b"purged", 2)
    swept = await attach(crud, source, "a2", b"swept", 3)
    await manager.purge("a2")  # leaves the file, without a use: as an upload that nothing refers to
    added = []
    begin = directory_snapshot._ModelCopy._begin
    loop = asyncio.get_running_loop()

    def late(self, opened):
        connections = []

        async def meanwhile() -> None:
            added.append(await attach(crud, source, "a3", b"added", 4))
            connections.extend(await asyncio.to_thread(begin, self, opened))
            await manager.purge("a1")

        asyncio.run_coroutine_threadsafe(meanwhile(), loop).result()
        for key in (purged, swept):
            file_of(source, key).unlink(missing_ok=True)  # the purge may have removed it
            file_of(self._target.parent, key).unlink(missing_ok=True)  # as if it had come after the first links
        return connections

    monkeypatch.setattr(directory_snapshot._ModelCopy, "_begin", late)
    (model,) = await asyncio.to_thread(copy, source, tmp_path / "copy")
    await crud.close()
    assert (model.files, model.purged, model.damaged) == (2, ("a1",), ())
    assert {key for key in (before, purged, swept, *added) if file_of(tmp_path / "copy", key).exists()} == {
        before,
        *added,
    }
    found = await amounts(kind, tmp_path / "copy")
    assert "a1" not in found
    assert "a3" in found


async def test_files_that_are_lost_are_reported(tmp_path: Path):
    crud = await filled("disk", source := tmp_path / "data")
    key = await attach(crud, source, "a0", b"lost", 1)
    file_of(source, key).unlink()
    (model,) = copy(source, tmp_path / "copy")
    await crud.close()
    assert model.damaged == ("a0",)
    assert "a0" in await amounts("disk", tmp_path / "copy")


# Interruptions


def test_a_copy_that_is_killed_has_no_name(tmp_path: Path):
    asyncio.run(prepared(tmp_path / "data"))
    program = (
        "import sys; from pathlib import Path; from app.autocrud.backup.directory_snapshot import *\n"
        "print('begun', flush=True); snapshot_directory(Path(sys.argv[1]), Path(sys.argv[2]), lambda *_: None)"
    )
    for at in range(8):
        target = tmp_path / f"copy {at}"
        process = subprocess.Popen(
            [sys.executable, "-c", program, tmp_path / "data", target], stdout=subprocess.PIPE, text=True
        )
        assert process.stdout.readline() == "begun\n"
        time.sleep(at * 0.01)
        process.kill()
        process.wait()
        process.stdout.close()
        if target.exists():
            assert asyncio.run(amounts("disk", target))
    assert asyncio.run(amounts("disk", tmp_path / "data"))


async def prepared(directory: Path) -> None:
    crud = await filled("disk", directory)
    for number in range(300):
        await crud.resource_manager(Account).create(Account(1, "x" * 20_000), resource_id=f"b{number}")
    await crud.close()


def test_a_stopped_writer_is_reported(tmp_path: Path, monkeypatch):
    """A process that was stopped while it held the lock."""
    asyncio.run(prepared(tmp_path / "data"))
    monkeypatch.setattr(directory_snapshot, "LOCK_TIMEOUT_S", 0.2)
    import fcntl

    with (tmp_path / "data/account/meta/index.sqlite-lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(StoreUnavailable, match="another process has locked"):
            copy(tmp_path / "data", tmp_path / "copy")
    assert not (tmp_path / "copy").exists()
    assert not [path for path in tmp_path.iterdir() if path.name.endswith(".partial")]


def test_a_damaged_database_is_reported(tmp_path: Path):
    asyncio.run(prepared(tmp_path / "data"))
    path = tmp_path / "data/account/data/bodies.sqlite"
    path.write_bytes(b"no database" * 1000)
    with pytest.raises(Exception, match="damaged"):
        copy(tmp_path / "data", tmp_path / "copy")
    assert apsw.Connection(str(tmp_path / "data/account/meta/index.sqlite")).execute("SELECT 1").get == 1
