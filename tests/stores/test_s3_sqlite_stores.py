"""Stores of S3-SQLite: removed or replaced objects, housekeeping, and programs of other versions."""

from __future__ import annotations

import asyncio
import contextlib
import sqlite3

import pytest

from app.autocrud.errors import (
    ConditionalWritesUnsupported,
    ConfigError,
    HeadLost,
    OutcomeUnknown,
    StoreDamaged,
    UniqueConflict,
)
from app.autocrud.query import Query, field
from app.autocrud.resource_manager.backends.s3.memory_object_store import (
    MemoryObjectStore,
)
from app.autocrud.resource_manager.backends.s3.object_store import Stored
from app.autocrud.resource_manager.core import Purge
from app.autocrud.resource_manager.meta_store.sqlite3 import S3SqliteMetaStore
from tests.stores.s3_sqlite_helpers import HEAD, KEY, Note, head_of, instance, meta_store


@pytest.fixture
def objects() -> MemoryObjectStore:
    return MemoryObjectStore()


# Removed or replaced objects


async def test_a_removed_head_is_never_created_again(objects, tmp_path):
    manager = instance(objects, tmp_path)
    await manager.create(Note("0"))
    kept = objects.objects.pop(HEAD)
    for one in (manager, instance(objects)):
        with pytest.raises(HeadLost, match="missing"):
            await one.get("x")
        with pytest.raises((HeadLost, OutcomeUnknown)):
            await one.create(Note("1"))
    objects.objects[HEAD] = kept
    assert await manager.count() == 1
    await manager.storage.close()


async def test_an_old_head_that_was_put_back_is_refused(objects):
    manager = instance(objects)
    await manager.create(Note("0"))
    old = objects.objects[HEAD]
    await manager.create(Note("1"))
    objects.objects[HEAD] = old
    with pytest.raises(HeadLost, match="old one"):
        await manager.count()


async def test_another_store_at_the_same_key_is_refused(objects):
    manager = instance(objects)
    await manager.create(Note("0"))
    for key in list(objects.objects):
        del objects.objects[key]
    await instance(objects).create(Note("new"))
    with pytest.raises(HeadLost, match="another store"):
        await manager.count()


async def test_a_missing_segment_is_reported_as_damage(objects):
    manager = instance(objects)
    for number in range(200):
        await manager.create(Note(f"note {number}"))
    segment = next(key for key in objects.objects if "/seg/" in key)
    del objects.objects[segment]
    with pytest.raises(StoreDamaged, match="missing"):
        await instance(objects).count()


@pytest.mark.parametrize("condition", ["If-Match", "If-None-Match"])
async def test_a_storage_that_ignores_conditions_is_refused(objects, condition):
    put_if = objects.put_if

    async def ignores(key, body, etag):
        if (condition == "If-None-Match") == (etag is None):
            return Stored(objects._store(key, body))
        return await put_if(key, body, etag)

    objects.put_if = ignores
    with pytest.raises(ConditionalWritesUnsupported, match=condition):
        await instance(objects).create(Note("0"))


async def test_concurrent_creations_create_one_store(objects):
    managers = [instance(objects) for _ in range(8)]
    await asyncio.gather(*(manager.create(Note(str(at))) for at, manager in enumerate(managers)))
    assert [await manager.count() for manager in managers] == [8] * 8


# Housekeeping


async def test_housekeeping_loses_no_data(objects, monkeypatch):
    monkeypatch.setattr("app.autocrud.resource_manager.backends.s3_sqlite.housekeeping.LEAST_LOG", 20_000)
    manager = instance(objects)
    for number in range(400):
        await manager.create(Note(f"note {number}"))
        if number % 100 == 99:
            await manager.maintain(60)
    head = head_of(objects)
    assert head.snap is not None
    stored = {key for key in objects.objects if "/seg/" in key or "/snap/" in key}
    assert stored == head.keys
    fresh = instance(objects)
    assert await fresh.count() == 400
    assert len({item.meta.resource_id for item in (await fresh.find(Query(limit=200))).items}) == 200


async def test_segments_are_merged(objects, monkeypatch):
    monkeypatch.setattr("app.autocrud.resource_manager.backends.s3_sqlite.housekeeping.LEAST_LOG", 2**40)
    manager = instance(objects)
    for number in range(700):
        await manager.create(Note(f"note {number}"))
    before = len(head_of(objects).segs)
    await manager.maintain(60)
    assert len(head_of(objects).segs) < before / 2
    assert await instance(objects).count() == 700


async def test_a_damaged_snapshot_is_refused(objects):
    manager = instance(objects)
    await manager.create(Note("0"))
    await meta_store(manager)._loop_state().housekeeping.snapshot(forget=True)
    key = head_of(objects).snap.key
    body = objects.objects[key].body
    objects._store(key, body[:-100] + bytes(100))
    with pytest.raises(StoreDamaged, match="not what was uploaded"):
        await instance(objects).count()


async def test_a_snapshot_of_a_killed_process_is_collected(objects, monkeypatch):
    monkeypatch.setattr("app.autocrud.resource_manager.backends.s3_sqlite.housekeeping.ABANDONED", 10_000)
    dying, other = instance(objects), instance(objects)
    await dying.create(Note("0"))
    upload, reached = objects.upload, asyncio.Event()

    async def never(key, path):
        await upload(key, path)
        reached.set()
        await asyncio.Event().wait()

    objects.upload = never
    task = asyncio.create_task(meta_store(dying)._loop_state().housekeeping.snapshot())
    await reached.wait()
    task.cancel()
    objects.upload = upload
    assert len(head_of(objects).pend) == 1
    for number in range(100):
        await other.create(Note(f"note {number}"))
    await meta_store(other)._loop_state().housekeeping.snapshot()
    await other.maintain(30)
    head = head_of(objects)
    assert not head.pend
    assert {key for key in objects.objects if "/snap/" in key} == {head.snap.key}


async def test_a_snapshot_that_was_abandoned_is_not_installed(objects, monkeypatch):
    """The process that made it was frozen so long that others abandoned the snapshot and removed it."""
    monkeypatch.setattr("app.autocrud.resource_manager.backends.s3_sqlite.housekeeping.ABANDONED", 10_000)
    sleeper, other = instance(objects), instance(objects)
    await sleeper.create(Note("0"))
    upload, uploaded, awake = objects.upload, asyncio.Event(), asyncio.Event()

    async def slow(key, path):
        await upload(key, path)
        uploaded.set()
        await awake.wait()

    objects.upload = slow
    task = asyncio.create_task(meta_store(sleeper)._loop_state().housekeeping.snapshot(forget=True))
    await uploaded.wait()
    objects.upload = upload
    for number in range(100):
        await other.create(Note(f"note {number}"))
    await meta_store(other)._loop_state().housekeeping.announce(lambda head: f"{KEY}/snap/{head.ver + 1:012d}-other")
    await other.maintain(30)
    awake.set()
    assert not await task
    head = head_of(objects)
    assert head.snap is None or head.snap.key in objects.objects
    assert await instance(objects).count() == 101


@pytest.mark.parametrize("killed", [False, True])
async def test_purge_leaves_no_trace(objects, tmp_path, killed):
    """With `killed`, the process is killed after the commit. Another instance then erases the data, once."""
    manager = instance(objects, tmp_path)
    kept = await manager.create(Note("kept"))
    created = await manager.create(Note("secret-text", "secret-code"))
    await manager.update(created.meta.resource_id, Note("secret-text again", "secret-code"))
    if killed:
        await manager._write([Purge(resource_id=created.meta.resource_id)], "bob")
        other = instance(objects)
        await other.maintain(10)
        await other.create(Note("another"))
        done = set(objects.objects)
        await other.maintain(10)
        assert set(objects.objects) == done
        await manager.maintain(10)
    else:
        await manager.purge(created.meta.resource_id)
    for key, stored in objects.objects.items():
        assert b"secret" not in stored.body, key
    for path in tmp_path.rglob("*"):
        assert not path.is_file() or b"secret" not in path.read_bytes(), path
    assert (await instance(objects).get(kept.meta.resource_id)).data.text == "kept"
    await manager.storage.close()


async def test_an_export_is_a_plain_database_and_can_be_imported(objects, tmp_path):
    manager = instance(objects)
    for number in range(50):
        await manager.create(Note(f"note {number}", f"code {number}"))
    await meta_store(manager).export(tmp_path / "exported.sqlite")
    with contextlib.closing(sqlite3.connect(tmp_path / "exported.sqlite")) as database:
        assert database.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        assert database.execute("SELECT count(*) FROM resources").fetchone() == (50,)
        assert database.execute('SELECT id FROM resources WHERE "f:text" = ?', ("note 7",)).fetchone() is not None
    elsewhere = MemoryObjectStore()
    for key, stored in objects.objects.items():
        if key.startswith("data/"):
            elsewhere.objects[key] = stored
    await elsewhere.put(KEY, (tmp_path / "exported.sqlite").read_bytes())
    imported = instance(elsewhere)
    assert await imported.count() == 50
    found = await imported.search(Query(where=field("code").eq("code 3")))
    assert found.items[0].data.text == "note 3"
    with pytest.raises(UniqueConflict):
        await imported.create(Note("x", "code 3"))
    await elsewhere.put(KEY, b"another program still writes here")
    with pytest.raises(ConfigError, match="earlier deployment"):
        await instance(elsewhere).count()


async def test_a_file_that_is_not_an_export_is_not_imported(objects):
    await objects.put(KEY, b"something else")
    with pytest.raises(ConfigError, match="not a database that crudstack exported"):
        await instance(objects).count()
    assert set(objects.objects) == {KEY}


# Programs of other versions


async def test_programs_with_other_fields_share_one_log(objects):
    old, new = instance(objects, fields=("text",)), instance(objects, fields=("text", "code"))
    await old.create(Note("from old", "a"))
    await new.open()
    await new.create(Note("from new", "b"))
    for manager in (old, new):
        assert await manager.count(Query(where=field("text").starts_with("from"))) == 2
    assert await new.count(Query(where=field("code").in_(["a", "b"]))) == 2
    later = await old.create(Note("later", "c"))
    await old.update(later.meta.resource_id, Note("later still", "d"))
    again = instance(objects, fields=("text", "code"))
    assert await again.count(Query(where=field("code").eq("d"))) == 1
    assert await again.count(Query(where=field("code").eq("c"))) == 0


async def test_earlier_programs_enforce_a_new_unique_field(objects):
    old = instance(objects, fields=("text", "code"))
    await old.create(Note("0", "a"))
    new = instance(objects)
    await new.create(Note("1", "b"))
    with pytest.raises(UniqueConflict):
        await old.create(Note("2", "b"))
    with pytest.raises(ConfigError, match="unique"):
        await instance(objects, fields=("text",)).create(Note("3", "b"))


async def test_a_field_cannot_become_unique_over_duplicates(objects):
    old = instance(objects, fields=("text", "code"))
    await old.create(Note("0", "a"))
    await old.create(Note("1", "a"))
    with pytest.raises(ConfigError, match="share a value"):
        await instance(objects).create(Note("2", "b"))


async def test_keys_that_later_programs_wrote_are_kept(objects):
    manager = instance(objects)
    await manager.create(Note("0"))
    import msgspec

    raw = msgspec.msgpack.decode(objects.objects[HEAD].body)
    objects._store(HEAD, msgspec.msgpack.encode(raw | {"later": {"a": [1]}, "ver": raw["ver"] + 1}))
    await manager.create(Note("1"))
    assert msgspec.msgpack.decode(objects.objects[HEAD].body)["later"] == {"a": [1]}
    objects._store(HEAD, msgspec.msgpack.encode(raw | {"fmt": 4, "ver": raw["ver"] + 9}))
    with pytest.raises(ConfigError, match="format 4"):
        await manager.count()


async def test_large_records_are_put_into_segments(objects):
    manager = instance(objects)
    await manager.create(Note("x" * 100_000))
    assert head_of(objects).tail == ()
    await manager.create(Note("small"))
    assert await instance(objects).count() == 2


@pytest.mark.parametrize(
    "arguments",
    [{"enable_locking": False}, {"auto_sync": False}, {"consistency": "loose"}, {"export_key": KEY}, {"tail_bytes": 0}],
)
def test_arguments_that_would_lose_data_are_refused(objects, arguments):
    with pytest.raises(ValueError, match=next(iter(arguments))):
        S3SqliteMetaStore("double", KEY, object_store=objects, **arguments)
