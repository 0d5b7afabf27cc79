"""Exports of running stores: one moment, nothing missing, and no half archive."""

from __future__ import annotations

import asyncio
import hashlib
import io
import stat
from pathlib import Path

import pytest

from app.autocrud import AutoCRUD
from app.autocrud.backup.exporting import export_all
from app.autocrud.errors import ConfigError, HeadLost, PinLost, StoreDamaged, StoreUnavailable
from app.autocrud.resource_manager.contract import snapshots
from app.autocrud.resource_manager.core import Caller, IdempotencyKey, Retention
from app.autocrud.resource_manager.storage_factory import DiskStorageFactory

from .exports import KINDS, PINNED, Account, World, before_bodies, read, transfers

ACCOUNTS, AMOUNT = 12, 100


@pytest.fixture(params=KINDS)
async def world(request, tmp_path: Path):
    world = World(request.param, tmp_path / "data")
    yield world
    await world.close()


async def fill(crud: AutoCRUD, count: int = ACCOUNTS) -> None:
    manager = crud.resource_manager(Account)
    for number in range(count):
        await manager.create(Account(AMOUNT), resource_id=f"a{number}", by="alice")


async def test_an_archive_has_all_that_is_stored(world: World, tmp_path: Path):
    crud = world.crud()
    manager = crud.resource_manager(Account)
    await fill(crud, 3)
    await manager.update("a0", Account(1), status="draft", by="bob")
    await manager.modify("a0", Account(2))
    await manager.delete("a1")
    await manager.purge("a2")
    once = await manager.create(Account(5), resource_id="b", by=Caller("eve", key=IdempotencyKey("k")))
    done = []
    result = await crud.export_all(tmp_path / "x.tar.gz", progress=lambda *step: done.append(step))
    found = read(tmp_path / "x.tar.gz")
    assert list(found.resources) == ["a0", "a1", "b"]
    for rid, (meta, records) in found.resources.items():
        assert meta == await manager.meta(rid, include_deleted=True)
        page = (await manager.storage.revisions(rid)).items[::-1]
        assert [record for record, _ in records] == page
        assert [body for _, body in records] == await manager.storage.bodies([record.uid for record in page])
    if world.kind != "custom":
        assert [key.results for key in found.keys] == [(once.meta,)]
    assert found.entry.one_moment is (world.kind != "custom")
    (model,) = result.models
    assert (model.name, model.resources, model.revisions, model.absent) == ("account", 3, 4, ())
    assert done[-1] == (3, 3, "account")


async def test_the_result_tells_hash_and_size_of_the_file(tmp_path: Path):
    world = World("memory", tmp_path)
    await fill(crud := world.crud())
    path = tmp_path / "x.tar.gz"
    result = await crud.export_all(path)
    content = path.read_bytes()
    assert (result.sha256, result.size) == (hashlib.sha256(content).hexdigest(), len(content))
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


@pytest.mark.parametrize("each_resource", [False, True])
async def test_an_archive_shows_one_moment_while_writes_go_on(world: World, tmp_path: Path, each_resource: bool):
    """Each transaction moves an amount, so the sum of all amounts is the same at each moment."""
    await fill(crud := world.crud())
    stop = asyncio.Event()
    writers = [asyncio.create_task(transfers(crud, ACCOUNTS, stop))]
    if world.kind in ("disk", "s3-sqlite", "disk-s3"):
        writers.append(asyncio.create_task(transfers(world.crud(), ACCOUNTS, stop)))
    try:
        for number in range(3):
            await asyncio.sleep(0.05)
            result = await crud.export_all(path := tmp_path / f"{number}.tar.gz", each_resource=each_resource)
            found = read(path)
            amounts = [account.amount for account in found.current().values()]
            assert len(amounts) == ACCOUNTS
            assert (
                found.entry.one_moment is result.models[0].one_moment is not (each_resource or world.kind == "custom")
            )
            if found.entry.one_moment:
                assert sum(amounts) == ACCOUNTS * AMOUNT
    finally:
        stop.set()
        moved = await asyncio.gather(*writers)
    assert moved[0] > 3


@pytest.mark.parametrize("kind", PINNED)
async def test_edits_retention_and_sweeps_remove_nothing_that_an_export_needs(tmp_path: Path, kind: str):
    world = World(kind, tmp_path / "data")
    crud = world.crud(Retention(last=1))
    manager = crud.resource_manager(Account)
    await manager.create(Account(1), resource_id="draft", status="draft")
    await manager.create(Account(2), resource_id="stable")

    async def meanwhile() -> None:
        for number in range(3):
            await manager.modify("draft", Account(10 + number))
            await manager.update("stable", Account(20 + number))
            await manager.maintain(10)

    before_bodies(manager, meanwhile)
    await crud.export_all(tmp_path / "x.tar.gz")
    assert {rid: account.amount for rid, account in read(tmp_path / "x.tar.gz").current().items()} == {
        "draft": 1,
        "stable": 2,
    }
    await manager.maintain(10)
    assert not await manager.storage.meta_store.has_pins()
    await world.close()


@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize("kind", PINNED)
async def test_a_resource_that_is_purged_meanwhile_is_absent_and_listed(tmp_path: Path, kind: str, again: bool):
    """`again`: another resource gets the id."""
    world = World(kind, tmp_path / "data")
    await fill(crud := world.crud(), 3)
    manager = crud.resource_manager(Account)
    await manager.update("a1", Account(7))

    async def meanwhile() -> None:
        await manager.purge("a1")
        if again:
            await manager.create(Account(8), resource_id="a1")

    before_bodies(manager, meanwhile)
    result = await crud.export_all(tmp_path / "x.tar.gz")
    found = read(tmp_path / "x.tar.gz")
    if kind in ("s3-sqlite", "disk-s3"):  # their bodies are gone
        assert found.entry.absent == result.models[0].absent == ("a1",)
        assert list(found.current()) == ["a0", "a2"]
    else:  # the moment still has them
        assert found.entry.absent == ()
        assert found.current()["a1"].amount == 7
    await world.close()


@pytest.mark.parametrize("kind", ["s3-sqlite", "disk-s3"])
async def test_a_body_that_is_missing_without_a_purge_fails_the_export(tmp_path: Path, kind: str):
    world = World(kind, tmp_path / "data")
    await fill(crud := world.crud(), 3)
    meta = await crud.resource_manager(Account).meta("a1")
    (key,) = [key for key in world.objects.objects if key.endswith(meta.uid)]
    del world.objects.objects[key]
    (tmp_path / "out").mkdir()
    with pytest.raises(StoreDamaged, match="'a1' is missing"):
        await crud.export_all(tmp_path / "out/x.tar.gz")
    assert not list((tmp_path / "out").iterdir())
    assert not await crud.resource_manager(Account).storage.meta_store.has_pins()
    await world.close()


async def test_a_body_that_an_older_program_removed_fails_the_export(tmp_path: Path):
    """Programs before pins remove superseded bodies at once."""
    world = World("s3-sqlite", tmp_path / "data")
    crud = world.crud()
    manager = crud.resource_manager(Account)
    await manager.create(Account(1), resource_id="draft", status="draft")

    async def meanwhile() -> None:
        before = await manager.meta("draft")
        await manager.modify("draft", Account(2))
        await manager.storage.resource_store.delete([before.uid])

    before_bodies(manager, meanwhile)
    with pytest.raises(StoreUnavailable, match="by an older program"):
        await crud.export_all(tmp_path / "x.tar.gz")
    assert not (tmp_path / "x.tar.gz").exists()
    await world.close()


@pytest.mark.parametrize("kind", PINNED)
async def test_an_export_whose_pin_was_dropped_fails(tmp_path: Path, kind: str, monkeypatch):
    """The program was suspended for longer than PIN_LIFE_S: its task could not renew the pin."""
    world = World(kind, tmp_path / "data")
    await fill(crud := world.crud(), 3)
    manager = crud.resource_manager(Account)

    async def suspended() -> None:
        monkeypatch.setattr(snapshots, "PIN_LIFE_S", 0.05)
        await asyncio.sleep(0.1)
        await manager.maintain(10)
        await manager.storage.meta_store.has_pins()  # as each sweep does

    before_bodies(manager, suspended)
    with pytest.raises(PinLost):
        await crud.export_all(tmp_path / "x.tar.gz")
    assert not (tmp_path / "x.tar.gz").exists()
    await world.close()


@pytest.mark.parametrize("kind", PINNED)
async def test_a_pin_is_renewed_while_a_single_step_takes_long(tmp_path: Path, kind: str, monkeypatch):
    monkeypatch.setattr(snapshots, "PIN_LIFE_S", 1.0)
    monkeypatch.setattr(snapshots, "RENEW_PIN_S", 0.2)
    world = World(kind, tmp_path / "data")
    await fill(crud := world.crud(), 3)
    manager = crud.resource_manager(Account)

    async def slow() -> None:
        for _ in range(10):
            await asyncio.sleep(0.2)
            assert await manager.storage.meta_store.has_pins()

    before_bodies(manager, slow)
    await crud.export_all(tmp_path / "x.tar.gz")
    assert not await manager.storage.meta_store.has_pins()
    await world.close()


async def test_a_cancelled_export_leaves_no_pin_and_no_file(world: World, tmp_path: Path):
    await fill(crud := world.crud(), 3)
    manager = crud.resource_manager(Account)
    reached = asyncio.Event()

    async def forever() -> None:
        reached.set()
        await asyncio.Event().wait()

    (tmp_path / "out").mkdir()
    if hasattr(manager.storage, "snapshot"):
        before_bodies(manager, forever)
    task = asyncio.create_task(crud.export_all(tmp_path / "out/x.tar.gz"))
    await reached.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert not list((tmp_path / "out").iterdir())
    if world.kind != "custom":
        assert not await manager.storage.meta_store.has_pins()


class FullDisk(io.RawIOBase):
    """A file on a disk that is full after some bytes."""

    def __init__(self) -> None:
        self._left = 100

    def write(self, data) -> int:
        self._left -= len(data)
        if self._left < 0:
            import errno

            raise OSError(errno.ENOSPC, "No space left on device")
        return len(data)


async def test_an_export_to_a_full_disk_fails_and_removes_its_pin(tmp_path: Path):
    await fill(crud := World("disk", tmp_path / "data").crud(), 3)
    with pytest.raises(StoreUnavailable, match=r"disk|space"):
        await export_all(crud.managers, FullDisk())
    assert not await crud.resource_manager(Account).storage.meta_store.has_pins()
    await crud.close()


async def test_models_are_chosen_by_name(tmp_path: Path):
    crud = AutoCRUD(storage_factory=DiskStorageFactory(tmp_path / "data"))
    crud.add_model(Account, name="one")
    crud.add_model(Account, name="two")
    result = await crud.export_all(tmp_path / "x.tar.gz", models=["two"])
    assert [model.name for model in result.models] == ["two"]
    with pytest.raises(ConfigError, match="no model 'three'; there are one, two"):
        await crud.export_all(tmp_path / "y.tar.gz", models=["three"])
    with pytest.raises(ConfigError, match=r"\.tar\.gz or \.tar\.zst"):
        await crud.export_all(tmp_path / "backup.zip")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "x.tar.gz"]
    await crud.close()


async def test_an_existing_archive_is_replaced_only_by_a_complete_one(tmp_path: Path):
    world = World("s3-sqlite", tmp_path / "data")
    await fill(crud := world.crud(), 3)
    path = tmp_path / "x.tar.gz"
    await crud.export_all(path)
    before = path.read_bytes()
    world.objects.objects.clear()
    with pytest.raises((StoreUnavailable, StoreDamaged, HeadLost)):
        await crud.export_all(path)
    assert path.read_bytes() == before
    await world.close()
