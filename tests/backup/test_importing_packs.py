"""Imports that store packs: K1 to K3 of `resource_store.packs`, as callers see them."""

from __future__ import annotations

import asyncio
import contextlib
import sqlite3
from pathlib import Path
from typing import Any

import pytest
from uuid_utils import uuid7

from app.autocrud import AutoCRUD, Query
from app.autocrud.backup.exporting import export_all
from app.autocrud.backup.importing import import_all
from app.autocrud.errors import ConfigError
from app.autocrud.resource_manager.backends.s3.memory_object_store import (
    DROPPED,
    Call,
    InjectedFault,
    MemoryObjectStore,
)
from app.autocrud.resource_manager.backends.s3_sqlite import head
from app.autocrud.resource_manager.backends.s3_sqlite.head import decode_head
from app.autocrud.resource_manager.core import ResourceManager
from app.autocrud.resource_manager.resource_store.packs import (
    PADDING,
    place_of,
    places_by_pack,
)
from app.autocrud.resource_manager.resource_store.s3 import S3ResourceStore
from app.autocrud.resource_manager.storage_factory import CachedS3StorageFactory
from tests.stores.old_stores import INDEXED

from .imports import Note, fill, program
from .imports import Place as Location

KINDS = ("s3-sqlite", "memory-s3", "cached-s3")


async def archive_of(path: Path, count: int = 12) -> Path:
    source = program("memory", Location(path / "source"))
    await fill(source.resource_manager(Note), count)
    await export_all(source.managers, path / "a.tar.gz")
    return path / "a.tar.gz"


async def imported(kind: str, tmp_path: Path, count: int = 12) -> tuple[ResourceManager[Note], MemoryObjectStore]:
    """Return a model into which resources were imported, and its bucket."""
    place = Location(tmp_path / "data")
    crud = program(kind, place)
    await import_all(crud.managers, await archive_of(tmp_path, count))
    return crud.resource_manager(Note), place.s3["object_store"]


def packs_of(objects: MemoryObjectStore) -> dict[str, bytes]:
    return {key: stored.body for key, stored in objects.objects.items() if key.endswith(".pack")}


def prefix_of(objects: MemoryObjectStore) -> str:
    """Return the beginning of the keys of the bodies."""
    (key,) = packs_of(objects)
    return key.partition("packs/")[0]


async def uids_of(manager: ResourceManager[Note]) -> set[str]:
    """Return the uids of all revisions."""
    storage, found = manager.storage, set()
    async for meta in storage.scan():
        found |= {info.uid for info in (await storage.revisions(meta.resource_id, limit=200)).items}
    return found


async def advance(manager: ResourceManager[Note]) -> None:
    for _ in range(3):
        await manager.maintain(10)


async def check_packs(manager: ResourceManager[Note], objects: MemoryObjectStore) -> None:
    """Check that the packs have the bodies that records name, and nothing else."""
    places = places_by_pack(await uids_of(manager))
    found = packs_of(objects)
    assert {key.partition("packs/")[2].removesuffix(".pack") for key in found} == set(places)
    for key, body in found.items():
        of_pack = places[key.partition("packs/")[2].removesuffix(".pack")]
        rest = bytearray(body)
        for place in of_pack:
            assert rest[place.start]
            rest[place.start : place.end] = bytes(place.end - place.start)
        assert not any(rest)
        assert len(body) % PADDING == len(of_pack)


@pytest.mark.parametrize("answer", [lambda body: body, lambda body: body[:512], lambda _: None])
async def test_a_server_without_ranges_gets_no_import(monkeypatch, tmp_path, answer):
    place = Location(tmp_path / "data")
    crud, objects = program("s3-sqlite", place), place.s3["object_store"]

    async def get_range(key: str, _start: int, _end: int) -> bytes | None:
        found = await objects.get(key)
        return None if found is None else answer(found.body)

    monkeypatch.setattr(objects, "get_range", get_range)
    with pytest.raises(ConfigError, match="does not answer a GET of a range with that range"):
        await import_all(crud.managers, await archive_of(tmp_path))
    assert not packs_of(objects)
    assert await crud.resource_manager(Note).count() == 0


@pytest.mark.parametrize("kind", KINDS)
async def test_an_import_stores_packs(tmp_path, kind):
    manager, objects = await imported(kind, tmp_path)
    uids = await uids_of(manager)
    assert len(uids) > 20
    assert all(place_of(uid) for uid in uids)
    assert len(packs_of(objects)) == 1
    await check_packs(manager, objects)
    await advance(manager)
    await check_packs(manager, objects)
    assert len(await uids_of(manager)) == len(uids)
    for uid in uids:
        assert await manager.storage.body(uid)


@pytest.mark.parametrize("kind", ["postgres-s3", "redis-postgres", "disk-s3"])
def test_only_stores_that_older_programs_refuse_have_packs(tmp_path, kind):
    """K3. `disk-s3` keeps its metadata in a file."""
    place = Location(tmp_path, "postgresql://u:p@127.0.0.1:1/d", "redis://127.0.0.1:1")
    storage: Any = program(kind, place).resource_manager(Note).storage
    assert place_of(storage.allotment().uid_for(b"{}")) is None


@pytest.mark.parametrize("kind", KINDS)
async def test_a_purge_leaves_no_byte_in_a_pack(tmp_path, kind):
    manager, objects = await imported(kind, tmp_path)
    bodies = await manager.storage.bodies(
        [info.uid for info in (await manager.storage.revisions("n00003", limit=200)).items]
    )
    assert any(body in packed for body in bodies for packed in packs_of(objects).values())
    await manager.purge("n00003")
    assert not any(body in packed for body in bodies for packed in packs_of(objects).values())
    await check_packs(manager, objects)


async def test_the_sweep_removes_what_a_killed_purge_has_left(tmp_path):
    manager, objects = await imported("s3-sqlite", tmp_path)
    objects.fault = lambda call: DROPPED if call.op == "put_if" and call.key.endswith(".pack") else None
    await manager.purge("n00003")
    objects.fault = lambda _: None
    with pytest.raises(AssertionError):
        await check_packs(manager, objects)
    await advance(manager)
    await check_packs(manager, objects)


async def test_the_sweep_removes_what_a_late_put_brought_back(tmp_path):
    manager, objects = await imported("s3-sqlite", tmp_path)
    before = packs_of(objects)
    await manager.purge("n00003")
    for key, body in before.items():
        await objects.put(key, body)
    await advance(manager)
    await check_packs(manager, objects)


async def test_a_sweep_reads_only_packs_with_orphans(tmp_path):
    manager, objects = await imported("s3-sqlite", tmp_path)
    read: list[str] = []

    def fault(call: Call) -> None:
        if call.key.endswith(".pack"):
            read.append(call.op)

    objects.fault = fault
    await advance(manager)
    assert not read


async def test_a_sweep_removes_nothing_while_there_is_a_pin(tmp_path):
    manager, objects = await imported("s3-sqlite", tmp_path)
    (body,), prefix = packs_of(objects).values(), prefix_of(objects)
    orphans = {f"{prefix}0/{uuid7()}", f"{prefix}packs/0/{uuid7()}.pack"}
    for key in orphans:
        await objects.put(key, body)
    meta_store, pin = manager.storage.meta_store, "ab" * 16
    await meta_store.add_pin(pin)
    await advance(manager)
    assert orphans <= objects.objects.keys()
    assert await meta_store.remove_pin(pin)
    await advance(manager)
    assert not orphans & objects.objects.keys()
    await check_packs(manager, objects)


async def test_a_sweep_deletes_a_pack_whose_length_names_no_bodies(tmp_path):
    """It was cut short, so its length tells nothing."""
    manager, objects = await imported("s3-sqlite", tmp_path)
    (body,), prefix = packs_of(objects).values(), prefix_of(objects)
    await objects.put(f"{prefix}packs/0/{uuid7()}.pack", body[:PADDING])
    await advance(manager)
    await check_packs(manager, objects)


async def test_a_sweep_deletes_packs_that_no_record_names_unread(tmp_path):
    manager, objects = await imported("s3-sqlite", tmp_path)
    (body,), prefix = packs_of(objects).values(), prefix_of(objects)
    for _ in range(30):
        await objects.put(f"{prefix}packs/0/{uuid7()}.pack", body)
    assert len(packs_of(objects)) == 31
    operations: list[str] = []

    def fault(call: Call) -> None:
        if call.key.endswith(".pack"):
            operations.append(call.op)

    objects.fault = fault
    await advance(manager)
    assert operations == ["delete"] * 30
    await check_packs(manager, objects)


@pytest.mark.parametrize("kind", KINDS)
async def test_a_load_that_was_killed_leaves_packs_until_the_next_sweep(tmp_path, kind, monkeypatch):
    place = Location(tmp_path / "data")
    crud = program(kind, place)
    manager, objects = crud.resource_manager(Note), place.s3["object_store"]
    await manager.open()
    path = await archive_of(tmp_path)

    def fault(call: Call) -> InjectedFault | None:
        return DROPPED if packs_of(objects) and "/HEAD" in call.key else None

    objects.fault = fault  # it cannot publish, and cannot remove what it has stored
    monkeypatch.setattr(S3ResourceStore, "delete", lambda *_: asyncio.sleep(0))
    with pytest.raises(Exception, match="object storage"):
        await import_all(crud.managers, path)
    monkeypatch.undo()
    objects.fault = lambda _: None
    (model,) = (await import_all(program(kind, place).managers, path, resume=True)).models.values()
    assert model.in_one_step
    assert len(packs_of(objects)) == 2
    await advance(manager)
    await check_packs(manager, objects)


async def test_pages_of_a_list_read_each_pack_once(tmp_path):
    manager, objects = await imported("s3-sqlite", tmp_path)
    await manager.count()
    objects.requests.clear()
    page = await manager.search(Query(limit=10))
    assert len(page.items) == 10
    assert objects.requests["get"] == 1


async def test_older_programs_refuse_a_store_with_packs(tmp_path, monkeypatch):
    """K3. Stores without packs keep their format."""
    plain = Location(tmp_path / "plain")
    await fill(program("s3-sqlite", plain).resource_manager(Note))
    _, objects = await imported("s3-sqlite", tmp_path)
    monkeypatch.setattr(head, "FORMATS", (1, 2))  # as the programs before
    (body,) = (stored.body for key, stored in objects.objects.items() if key.endswith("/HEAD"))
    with pytest.raises(ConfigError, match="format 3, this program knows 1, 2: deploy a newer one"):
        decode_head(body)
    (body,) = (stored.body for key, stored in plain.s3["object_store"].objects.items() if key.endswith("/HEAD"))
    assert decode_head(body).fmt == 1


async def test_the_format_stays_after_later_writes(tmp_path):
    manager, objects = await imported("s3-sqlite", tmp_path)
    await manager.create(Note(text="new"), resource_id="new")
    await manager.storage.meta_store._loop_state().housekeeping.snapshot()
    await manager.purge("new")
    await advance(manager)
    (body,) = (stored.body for key, stored in objects.objects.items() if key.endswith("/HEAD"))
    assert decode_head(body).fmt == 3


async def test_an_exported_database_keeps_the_format(tmp_path):
    manager, objects = await imported("s3-sqlite", tmp_path)
    await manager.storage.meta_store.export(tmp_path / "plain.sqlite")
    (key,) = (key.removesuffix("/HEAD") for key in objects.objects if key.endswith("/HEAD"))
    for stored_key in [one for one in objects.objects if one.startswith(f"{key}/")]:
        del objects.objects[stored_key]
    objects.objects.clear()
    await objects.put(key, (tmp_path / "plain.sqlite").read_bytes())
    place = Location(tmp_path / "other", s3={"bucket": "b", "object_store": objects})
    place.name = key.partition("/")[0]
    other = program("s3-sqlite", place).resource_manager(Note)
    assert await other.count() > 5
    (body,) = (stored.body for name, stored in objects.objects.items() if name.endswith("/HEAD"))
    assert decode_head(body).fmt == 3
    with (
        contextlib.closing(sqlite3.connect(tmp_path / "plain.sqlite")) as plain,
        pytest.raises(sqlite3.OperationalError, match="no such table: copy"),
    ):
        plain.execute("SELECT seq FROM copy JOIN state")  # as older programs begin


@pytest.mark.parametrize("size", [0, 10, 1000, 1024, 1030, 2000, 3000])
async def test_a_pack_that_was_cut_short_loses_nothing_more(tmp_path, size):
    manager, objects = await imported("s3-sqlite", tmp_path, 30)
    (key,) = packs_of(objects)
    cut = packs_of(objects)[key][:size]
    await objects.put(key, cut)
    (purged,) = places_by_pack([(await manager.storage.get("n00010")).uid]).values()
    (behind,) = places_by_pack([(await manager.storage.get("n00029")).uid]).values()
    await manager.purge("n00010")
    await manager.purge("n00029")
    await advance(manager)
    expected = bytearray(cut)
    for place in (*purged, *behind):
        expected[place.start : place.end] = bytes(len(expected[place.start : place.end]))
    left = packs_of(objects).get(key)
    assert left is None if not any(expected) else left == expected


async def test_a_former_store_whose_bodies_are_all_in_packs_is_refused(tmp_path):
    objects, archive = MemoryObjectStore(), await archive_of(tmp_path)

    def former(**options: Any) -> AutoCRUD:
        factory = CachedS3StorageFactory("b", None, tmp_path / "cache", object_store=objects, **options)
        crud = AutoCRUD(storage_factory=factory)
        crud.add_model(Note, indexed_fields=INDEXED)
        return crud

    crud = former(former_layout="open")
    await import_all(crud.managers, archive)
    assert packs_of(objects)
    await crud.close()
    with pytest.raises(ConfigError, match="former_layout='open'"):
        await former().resource_manager(Note).count()
