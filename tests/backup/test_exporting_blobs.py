"""Exports of files: purged and lost ones, and pins while a large one is copied."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from app.autocrud.backup.importing import import_all
from app.autocrud.errors import StoreDamaged
from app.autocrud.resource_manager.contract import snapshots

from .archives import Content, blob, resource, write
from .exports import read
from .imports import Note
from .test_importing import programs

__all__ = ["programs"]

KINDS = ("memory", "disk", "memory-disk", "s3-sqlite")


async def filled(programs: Any, kind: str, tmp_path: Path) -> Any:
    """Return a program whose resources a and b refer to a file each, of 3 MB and of 3 bytes."""
    large, small = blob(b"large" * 600_000, "alice"), blob(b"abc", "alice")
    resources = [
        resource("a", [{"text": "1"}], blobs=[[large[0].key]]),
        resource("b", [{"text": "2"}], blobs=[[small[0].key]]),
    ]
    blobs = sorted((large, small), key=lambda one: one[0].key)
    await write(tmp_path / "setup.tar.gz", {"note": Content(resources=resources, blobs=blobs)})
    crud = programs(kind)
    await import_all(crud.managers, tmp_path / "setup.tar.gz")
    return crud


def before_first_chunk(storage: Any, action: Any) -> None:
    """Let `action` run before the content of the first file is read."""
    original, done = storage.blob_store.read, []

    async def read_later(key: str, *span: Any) -> Any:
        if not done:
            done.append(key)
            await action()
        async for chunk in original(key, *span):
            yield chunk

    storage.blob_store.read = read_later


@pytest.mark.parametrize("kind", KINDS)
async def test_a_resource_whose_files_are_purged_meanwhile_is_absent(programs, tmp_path, kind):
    crud = await filled(programs, kind, tmp_path)
    manager = crud.resource_manager(Note)
    before_first_chunk(manager.storage, lambda: manager.purge("a"))
    result = await crud.export_all(tmp_path / "x.tar.gz")
    found = read(tmp_path / "x.tar.gz", "note")
    assert found.entry.absent == result.models[0].absent == ("a",)
    assert {"b"} == found.resources.keys() - set(found.entry.absent)
    assert b"abc" in found.blobs.values()


@pytest.mark.parametrize("kind", KINDS)
async def test_a_file_that_is_lost_fails_the_export(programs, tmp_path, kind):
    crud = await filled(programs, kind, tmp_path)
    storage = crud.resource_manager(Note).storage
    record = await storage.revision("b", 1)
    await storage.blob_store.delete(record.blobs)
    with pytest.raises(StoreDamaged, match="a blob of resource 'b' is missing"):
        await crud.export_all(tmp_path / "x.tar.gz")
    assert not (tmp_path / "x.tar.gz").exists()
    assert not await storage.meta_store.has_pins()


@pytest.mark.parametrize("kind", KINDS)
async def test_files_that_are_released_meanwhile_are_kept_for_the_export(programs, tmp_path, kind):
    """The sweep looks for files without a reference while the export runs, and takes them afterwards."""
    crud = await filled(programs, kind, tmp_path)
    manager = crud.resource_manager(Note)
    storage = manager.storage

    async def meanwhile() -> None:
        (key,) = (await storage.revision("b", 1)).blobs
        removed = await (storage.meta_store if storage._records is None else storage.resource_store).remove_blobs([key])
        assert removed == []  # a record names it
        await manager.maintain(10)

    before_first_chunk(storage, meanwhile)
    await crud.export_all(tmp_path / "x.tar.gz")
    assert sorted(map(len, read(tmp_path / "x.tar.gz", "note").blobs.values())) == [3, 3_000_000]


@pytest.mark.parametrize("kind", KINDS)
async def test_a_pin_is_renewed_while_one_file_is_copied_slowly(programs, tmp_path, kind, monkeypatch):
    crud = await filled(programs, kind, tmp_path)
    storage = crud.resource_manager(Note).storage
    monkeypatch.setattr(snapshots, "PIN_LIFE_S", 1.0)
    monkeypatch.setattr(snapshots, "RENEW_PIN_S", 0.2)

    async def slowly() -> None:
        for _ in range(8):
            await asyncio.sleep(0.2)
            assert await storage.meta_store.has_pins()

    before_first_chunk(storage, slowly)
    await crud.export_all(tmp_path / "x.tar.gz")
    assert not await storage.meta_store.has_pins()
