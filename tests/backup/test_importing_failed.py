"""Imports into empty models that fail before anything is visible: they leave nothing that takes space."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from app.autocrud.backup import importing, pieces
from app.autocrud.backup.importing import import_all
from app.autocrud.errors import ModelNotEmpty, OutcomeUnknown, StoreDamaged, StoreUnavailable
from app.autocrud.resource_manager.runtime.disk_space import DiskFull
from tests.small_disk import small_disk

from .archives import Content, blob, resource, write
from .imports import Note, Place, program
from .test_importing import programs

__all__ = ["programs"]

KINDS = ("memory", "disk", "memory-disk", "s3-sqlite", "memory-s3")


@pytest.fixture
async def archive(tmp_path: Path) -> Path:
    """An archive of 30 resources, each with a body and a file of 100 KB."""
    blobs = [blob(os.urandom(100_000)) for _ in range(30)]
    resources = [
        resource(f"n{at:02}", [{"text": os.urandom(50_000).hex()}], blobs=[[row.key]])
        for at, (row, _) in enumerate(blobs)
    ]
    blobs.sort(key=lambda one: one[0].key)
    await write(tmp_path / "a.tar.gz", {"note": Content(resources=resources, blobs=blobs)})
    return tmp_path / "a.tar.gz"


def files_of(storage: Any, place: Place) -> int:
    """Return how many files of resources are stored."""
    on_disk = sum(re.fullmatch("[0-9a-f]{64}", path.parent.name) is not None for path in place.directory.rglob("*"))
    objects = sum("/blobs/" in key and len(key) > 100 for key in place.s3["object_store"].objects)
    return on_disk + objects + len(getattr(storage.blob_store, "_blobs", ()))


async def bodies_of(storage: Any, uids: list[str]) -> int:
    """Return how many of these bodies are stored."""
    found = 0
    for uid in uids:
        with contextlib.suppress(StoreDamaged):
            await storage.resource_store.get_many([uid])
            found += 1
    return found


async def fail(*_: object, **__: object) -> None:
    raise StoreUnavailable("the store is down")


@pytest.mark.parametrize("when", ["a file", "bodies", "publish", "cancelled"])
@pytest.mark.parametrize("kind", KINDS)
async def test_a_failed_load_leaves_no_bodies_and_files(programs, tmp_path, monkeypatch, archive, kind, when):
    monkeypatch.setattr(pieces, "BATCH", 3)
    place = Place(tmp_path / "data")
    crud = programs(kind, place)
    manager = crud.resource_manager(Note)
    await manager.open()
    storage: Any = manager.storage
    uids: list[str] = []
    calls, put, store = 0, storage.put_bodies, storage.blob_store.receive

    async def put_bodies(bodies: Any) -> None:
        nonlocal calls
        calls += 1
        uids.extend(record.uid for record, _ in bodies)
        if calls == 7 and when == "bodies":
            await fail()
        if calls == 7 and when == "cancelled":
            task.cancel()
        if calls == 7 and when == "publish":
            await manager.create(Note(text="faster"), resource_id="mine")
        await put(bodies)

    def receive() -> Any:
        nonlocal calls
        calls += when == "a file"
        if calls >= 17 and when == "a file":
            raise StoreUnavailable("the store is down")
        return store()

    with monkeypatch.context() as patch:
        patch.setattr(storage, "put_bodies", put_bodies)
        patch.setattr(storage.blob_store, "receive", receive)
        task = asyncio.create_task(import_all(crud.managers, archive))
        expected = {"publish": ModelNotEmpty, "cancelled": asyncio.CancelledError}.get(when, StoreUnavailable)
        with pytest.raises(expected):
            await task
    assert calls >= 7
    assert (files_of(storage, place), await bodies_of(storage, uids)) == (0, 0)
    assert [meta.resource_id async for meta in storage.scan()] == (["mine"] if when == "publish" else [])
    if when == "publish":
        await manager.purge("mine")
    (model,) = (await import_all(crud.managers, archive)).models.values()
    assert (model.created, model.blobs) == (30, 30)
    assert files_of(storage, place) == 30


async def test_a_clean_up_that_fails_hides_no_error(programs, monkeypatch, archive, caplog):
    crud = programs("disk")
    storage: Any = crud.resource_manager(Note).storage
    await crud.resource_manager(Note).open()
    monkeypatch.setattr(storage.resource_store, "delete", fail)

    async def put_bodies(_: Any) -> None:
        raise StoreUnavailable("the first error")

    monkeypatch.setattr(storage, "put_bodies", put_bodies)
    with pytest.raises(StoreUnavailable, match="the first error"):
        await import_all(crud.managers, archive)
    assert "bodies and files of the failed import stay until the next sweep: the store is down" in caplog.text


@pytest.mark.parametrize("kind", ["memory", "disk"])
async def test_nothing_is_removed_if_the_load_may_be_visible(programs, tmp_path, monkeypatch, archive, kind):
    place = Place(tmp_path / "data")
    crud = programs(kind, place)
    manager = crud.resource_manager(Note)
    await manager.open()
    loading = manager.storage.loading
    load = loading.load

    @contextlib.asynccontextmanager
    async def loader(*arguments: Any, **options: Any) -> AsyncIterator[Any]:
        async with load(*arguments, **options) as found:
            publish = found.publish

            async def unknown() -> None:
                await publish()
                raise OutcomeUnknown("no answer")

            found.publish = unknown
            yield found

    monkeypatch.setattr(type(manager.storage), "loading", SimpleNamespace(load=loader))
    with pytest.raises(OutcomeUnknown):
        await import_all(crud.managers, archive)
    assert len((await manager.get("n29")).data.text) == 100_000
    assert files_of(manager.storage, place) == 30


async def test_a_full_disk_is_empty_after_the_failure(tmp_path, archive, monkeypatch):
    """Another program takes the space after it was looked at."""
    monkeypatch.setattr(importing, "check_space", lambda *_: None)
    with small_disk(tmp_path / "disk", 5) as directory:
        crud = program("disk", Place(directory / "data"))
        await crud.resource_manager(Note).open()
        before = os.statvfs(directory).f_bavail
        with pytest.raises(DiskFull):
            await import_all(crud.managers, archive)
        left = os.statvfs(directory)
        assert (before - left.f_bavail) * left.f_frsize < 500_000
        await crud.close()


async def test_a_pack_that_a_sweep_removed_says_nothing_about_the_server(programs, tmp_path, monkeypatch):
    """The process was suspended for longer than PIN_LIFE_S before it read the pack."""
    place = Place(tmp_path / "data")
    crud, objects = programs("s3-sqlite", place), place.s3["object_store"]
    await write(tmp_path / "a.tar.gz", {"note": Content(resources=[resource("a", [{"text": "1"}])])})

    async def get_range(key: str, _start: int, _end: int) -> bytes | None:
        await objects.delete([key])
        return None

    monkeypatch.setattr(objects, "get_range", get_range)
    with pytest.raises(StoreUnavailable, match="a sweep removed bodies of this import"):
        await import_all(crud.managers, tmp_path / "a.tar.gz")
