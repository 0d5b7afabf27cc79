"""What the protocol of S3-SQLite costs, and what it does when everything goes wrong, one thing at a time."""

from __future__ import annotations

import asyncio
import contextlib
import os
import sqlite3
from pathlib import Path

import apsw
import pytest
from msgspec import Struct

from app.autocrud import AutoCRUD
from app.autocrud.errors import (
    ConditionalWritesUnsupported,
    ConfigError,
    CrudError,
    HeadLost,
    OutcomeUnknown,
    StoreDamaged,
    StoreUnavailable,
    UniqueConflict,
    VersionConflict,
)
from app.autocrud.query import Query, field
from app.autocrud.resource_manager.backends.s3.memory_object_store import (
    DROPPED,
    FALSE_CONFLICT,
    LOST_ANSWER,
    Call,
    InjectedFault,
    MemoryObjectStore,
)
from app.autocrud.resource_manager.backends.s3.object_store import Stored, Unknown
from app.autocrud.resource_manager.backends.s3_sqlite import local_copy
from app.autocrud.resource_manager.backends.s3_sqlite.head import decode_head
from app.autocrud.resource_manager.basic import Change, IndexedField
from app.autocrud.resource_manager.core import Caller, IdempotencyKey, Purge, ResourceManager
from app.autocrud.resource_manager.meta_store.sqlite3 import S3SqliteMetaStore
from app.autocrud.resource_manager.storage_factory import S3StorageFactory
from tests import virtual_time

KEY = "meta/note.sqlite"
HEAD = f"{KEY}/HEAD"


class Note(Struct):
    text: str
    code: str | None = None


FIELDS = ("text", IndexedField("code", unique=True))


def instance(objects: MemoryObjectStore, local_dir: Path | None = None, fields=FIELDS) -> ResourceManager[Note]:
    """The resource manager of one instance."""
    factory = S3StorageFactory("double", object_store=objects, local_dir=local_dir, sync_interval=None)
    crud = AutoCRUD(storage_factory=factory)
    return crud.add_model(Note, indexed_fields=list(fields))


def meta_store(manager: ResourceManager) -> S3SqliteMetaStore:
    return manager.storage.meta_store


def head_of(objects: MemoryObjectStore):
    return decode_head(objects.objects[HEAD].body)


@pytest.fixture
def objects() -> MemoryObjectStore:
    return MemoryObjectStore()


def once(fault: InjectedFault, op: str = "put_if", key: str = HEAD):
    """A fault for the next such request alone."""
    left = [fault]
    return lambda call: left.pop() if left and call.op == op and call.key.startswith(key) else None


# What it costs


async def test_requests_are_as_few_as_promised(objects):
    manager = instance(objects)
    created = await manager.create(Note("first"))
    rid = created.meta.resource_id

    async def cost(work) -> dict[str, int]:
        objects.requests.clear()
        with contextlib.suppress(CrudError):
            await work
        return dict(objects.requests)

    assert await cost(manager.create(Note("one"))) == {"put": 1, "put_if": 1}
    assert await cost(manager.update(rid, Note("two"))) == {"put": 1, "put_if": 1}
    assert await cost(manager.delete(rid)) == {"put_if": 1}
    assert await cost(manager.restore(rid)) == {"put_if": 1, "get": 1}  # it answers with the data
    assert await cost(manager.get(rid)) == {"get_if": 1, "get": 1}
    assert await cost(manager.meta(rid)) == {"get_if": 1}
    assert await cost(manager.count()) == {"get_if": 1}
    assert await cost(manager.find()) == {"get_if": 1}
    assert await cost(manager.search()) == {"get_if": 1, "get": 2}
    assert await cost(manager.get("nobody")) == {"get_if": 1}
    assert await cost(manager.update("nobody", Note("x"))) == {"get_if": 1}
    assert await cost(manager.update(rid, Note("two"))) == {"get_if": 1}  # the same data
    other = instance(objects)
    await other.create(Note("elsewhere"))
    assert await cost(manager.count()) == {"get_if": 1}  # its answer brings what is new


async def test_bytes_of_a_write_do_not_grow(objects):
    manager = instance(objects)
    per_write = []
    for _ in range(3):
        objects.bytes_put = 0
        for number in range(300):
            await manager.create(Note(f"note {number}"))
        per_write.append(objects.bytes_put / 300)
        await manager.maintain(60)
    assert max(per_write[1:]) < 1.2 * 32768
    assert len(objects.objects[HEAD].body) < 40_000


async def test_writers_share_swaps(objects):
    objects.latency = lambda _: 0.01
    manager = instance(objects)
    await manager.create(Note("first"))
    objects.requests.clear()
    await asyncio.gather(*(manager.create(Note(str(number))) for number in range(64)))
    assert objects.requests["put_if"] <= 4
    assert await manager.count() == 65


# Faults


@pytest.mark.parametrize(
    "fault",
    [
        DROPPED,
        LOST_ANSWER,
        FALSE_CONFLICT,
        InjectedFault("conflict", applied=True),
        InjectedFault(late=3.0),
        InjectedFault("conflict", late=3.0),
    ],
    ids=["500 or 503", "lost answer", "409 or 412", "412 for our own success", "late", "late after 409"],
)
def test_whatever_the_swap_answers_a_write_happens_once(objects, fault):
    async def main():
        objects.latency = lambda _: 0.02
        manager = instance(objects)
        created = await manager.create(Note("0"))
        rid = created.meta.resource_id
        objects.fault = once(fault)
        await manager.update(rid, Note("1"), expect=created.version)
        await asyncio.sleep(10)
        for reader in (manager, instance(objects)):
            found = await reader.get(rid)
            assert (found.data.text, found.meta.revision) == ("1", 2)
            assert [one.revision for one in (await reader.revisions(rid)).items] == [2, 1]

    virtual_time.run(main())


def test_a_rejection_waits_until_an_own_put_cannot_land_any_more(objects):
    """A PUT of our own is under way and forgotten; what would be rejected by the HEAD that it named must not be, before it is dead."""

    async def main():
        objects.latency = lambda _: 0.02
        manager = instance(objects)
        created = await manager.create(Note("0"))
        rid, version = created.meta.resource_id, created.version
        objects.fault = lambda call: InjectedFault(late=40.0) if call.op == "put_if" and call.key == HEAD else None
        with pytest.raises(OutcomeUnknown):
            await manager.update(rid, Note("1"), expect=version)
        objects.fault = lambda _: None
        with pytest.raises(VersionConflict):
            wrong = Change(meta=created.meta, record=None, index=None, expect=version._replace(version=9))
            await meta_store(manager).commit([wrong])
        now = (await instance(objects).get(rid)).data.text
        await asyncio.sleep(100)
        assert (await manager.get(rid)).data.text == (await instance(objects).get(rid)).data.text == now

    virtual_time.run(main())


@pytest.mark.parametrize("key", [None, "k"])
async def test_what_landed_late_is_not_refused_because_of_itself(objects, monkeypatch, key):
    """A swap without an answer lands after the history was looked at, and a read brings the copy up before the next attempt."""
    manager = instance(objects)
    before = await manager.create(Note("one"), resource_id="a")
    committer = meta_store(manager)._room().committer
    late, put_if, find, looked = [], objects.put_if, committer._find_in_history, []

    async def lost(name, body, etag):
        if name == HEAD and not late:
            late.append((name, body, etag))
            return Unknown("time-out")
        return await put_if(name, body, etag)

    async def found_nothing(waiting):
        await find(waiting)
        looked.append(True)
        if len(looked) == 2:
            objects._swap(*late[0])
            await manager.count()

    monkeypatch.setattr(objects, "put_if", lost)
    monkeypatch.setattr(committer, "_find_in_history", found_nothing)
    by = Caller("alice", key=None if key is None else IdempotencyKey(key))
    updated = await manager.update("a", Note("two"), expect=before.version, by=by)
    assert len(looked) >= 2
    assert (updated.meta.revision, updated.data.text) == (2, "two")
    assert by.key is None or not by.key.replayed
    assert (await manager.get("a")).data.text == "two"
    await manager.close()


def test_no_answer_at_all_is_an_unknown_outcome_and_never_a_failure(objects):
    async def main():
        manager = instance(objects)
        created = await manager.create(Note("0"))
        objects.fault = lambda call: LOST_ANSWER if call.key == HEAD else None
        with pytest.raises(OutcomeUnknown):
            await manager.update(created.meta.resource_id, Note("1"))
        objects.fault = lambda _: None
        assert (await manager.get(created.meta.resource_id)).data.text == "1"

    virtual_time.run(main())


def test_a_body_that_cannot_be_put_is_a_write_that_did_not_happen(objects):
    async def main():
        manager = instance(objects)
        await manager.create(Note("0"))
        objects.fault = lambda call: DROPPED if call.op == "put" else None
        with pytest.raises(StoreUnavailable):
            await manager.create(Note("1"))
        objects.fault = lambda _: None
        assert await manager.count() == 1

    virtual_time.run(main())


@pytest.mark.parametrize("fault", [InjectedFault(late=0.5), DROPPED], ids=["after the swap", "before the swap"])
def test_an_instance_that_dies_around_the_swap_leaves_all_or_nothing(objects, fault):
    async def main():
        objects.latency = lambda _: 0.02
        dying, other = instance(objects), instance(objects)
        created = await dying.create(Note("0"))
        rid = created.meta.resource_id
        objects.fault = lambda call: fault if call.op == "put_if" and call.key == HEAD else None
        doomed = asyncio.create_task(dying.update(rid, Note("1")))
        await asyncio.sleep(0.05)
        room = meta_store(dying)._room()
        room.committer._running.cancel()
        with contextlib.suppress(CrudError, asyncio.CancelledError):
            await doomed
        objects.fault = lambda _: None
        await asyncio.sleep(1)
        found = await other.get(rid)
        assert found.data.text == ("1" if fault.late else "0")
        assert found.meta.revision == len((await other.revisions(rid)).items)
        await other.update(rid, Note("2"))

    virtual_time.run(main())


async def test_a_zombie_that_slept_through_collection_loses(objects):
    """It holds an old HEAD and an old copy; meanwhile everything was written over, compacted and removed."""
    zombie, other = instance(objects), instance(objects)
    created = await zombie.create(Note("0"))
    rid = created.meta.resource_id
    swap = asyncio.Event()
    asleep = asyncio.Event()
    put_if = objects.put_if

    async def slow(key, body, etag):
        if key == HEAD and not swap.is_set():
            asleep.set()
            await swap.wait()
        return await put_if(key, body, etag)

    objects.put_if = slow
    write = asyncio.create_task(zombie.update(rid, Note("zombie"), expect=created.version))
    await asleep.wait()
    objects.put_if = put_if
    for number in range(50):
        await other.update(rid, Note(str(number)))
    await meta_store(other)._room().housekeeping.snapshot(forget=True)
    await other.maintain(30)
    await other.maintain(30)
    swap.set()
    with pytest.raises(VersionConflict):
        await write
    assert (await zombie.get(rid)).data.text == "49"
    assert not [key for key in objects.objects if "/seg/" in key]


def test_more_was_written_than_copies_remember(objects, monkeypatch):
    """Whether an unanswered write happened cannot be told any more; it must not be guessed."""
    monkeypatch.setattr(local_copy, "REMEMBERED_TXIDS", 20)
    monkeypatch.setattr("app.autocrud.resource_manager.backends.s3_sqlite.committer.REMEMBERED_TXIDS", 20)

    async def main():
        manager, other = instance(objects), instance(objects)
        created = await manager.create(Note("0"))
        await other.count()
        landed = []

        def fault(call: Call) -> InjectedFault | None:
            if call.key != HEAD:
                return None
            if call.op == "put_if" and not landed:
                landed.append(True)
                return LOST_ANSWER
            return None

        get = objects.get_if_changed

        async def late(key, etag):
            if landed and key == HEAD:
                landed.clear()
                objects.get_if_changed, objects.fault = get, (lambda _: None)
                for number in range(30):
                    await other.create(Note(f"{number}"))
            return await get(key, etag)

        objects.fault, objects.get_if_changed = fault, late
        with pytest.raises(OutcomeUnknown):
            await manager.update(created.meta.resource_id, Note("1"))

    virtual_time.run(main())


# The local copy


def copies(directory: Path) -> list[Path]:
    return sorted(directory.glob("*/copy-*.sqlite"))


@pytest.mark.parametrize("damage", ["truncated", "zeros", "text", "missing"])
async def test_a_torn_copy_is_made_again(objects, tmp_path, damage):
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


async def test_a_copy_torn_under_a_running_instance_is_made_again(objects, tmp_path):
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


async def test_processes_whose_lock_is_held_use_copies_of_their_own(objects, tmp_path, monkeypatch):
    monkeypatch.setattr(local_copy, "LOCK_TIMEOUT_S", 0.05)
    first = instance(objects, tmp_path)
    await first.create(Note("0"))
    (path,) = copies(tmp_path)
    with contextlib.closing(os.fdopen(os.open(path.parent / "lock", os.O_RDWR))) as lock:
        import fcntl

        fcntl.flock(lock, fcntl.LOCK_EX)  # as a process does that was stopped in the middle
        second = instance(objects, tmp_path)
        await second.create(Note("1"))
        await first.create(Note("2"))
        assert await first.count() == await second.count() == 3
    await first.storage.close()
    await second.storage.close()


async def test_what_killed_processes_left_is_removed_after_a_day(objects, tmp_path):
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
    await manager.update(rid, Note("1"))  # it is in S3
    with pytest.raises(StoreUnavailable):
        await manager.get(rid)  # and nothing older may be read
    full = False
    assert (await manager.get(rid)).data.text == "1"
    assert (await instance(objects).get(rid)).data.text == "1"
    await manager.storage.close()


# Operators


async def test_a_removed_head_is_never_made_again(objects, tmp_path):
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


async def test_another_store_in_its_place_is_refused(objects):
    manager = instance(objects)
    await manager.create(Note("0"))
    for key in list(objects.objects):
        del objects.objects[key]
    await instance(objects).create(Note("new"))
    with pytest.raises(HeadLost, match="another store"):
        await manager.count()


async def test_a_missing_segment_is_damage_and_no_empty_answer(objects):
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


async def test_many_births_at_once_are_one(objects):
    managers = [instance(objects) for _ in range(8)]
    await asyncio.gather(*(manager.create(Note(str(at))) for at, manager in enumerate(managers)))
    assert [await manager.count() for manager in managers] == [8] * 8


# Housekeeping


async def test_snapshots_merges_and_collection_lose_nothing(objects, monkeypatch):
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


async def test_a_snapshot_that_is_not_what_was_uploaded_is_refused(objects):
    manager = instance(objects)
    await manager.create(Note("0"))
    await meta_store(manager)._room().housekeeping.snapshot(forget=True)
    key = head_of(objects).snap.key
    body = objects.objects[key].body
    objects._store(key, body[:-100] + bytes(100))
    with pytest.raises(StoreDamaged, match="not what was uploaded"):
        await instance(objects).count()


async def test_a_snapshot_of_somebody_who_died_is_abandoned_and_collected(objects, monkeypatch):
    monkeypatch.setattr("app.autocrud.resource_manager.backends.s3_sqlite.housekeeping.ABANDONED", 10_000)
    dying, other = instance(objects), instance(objects)
    await dying.create(Note("0"))
    upload, reached = objects.upload, asyncio.Event()

    async def never(key, path):
        await upload(key, path)
        reached.set()
        await asyncio.Event().wait()

    objects.upload = never
    task = asyncio.create_task(meta_store(dying)._room().housekeeping.snapshot())
    await reached.wait()
    task.cancel()
    objects.upload = upload
    assert len(head_of(objects).pend) == 1
    for number in range(100):
        await other.create(Note(f"note {number}"))
    await meta_store(other)._room().housekeeping.snapshot()
    await other.maintain(30)
    head = head_of(objects)
    assert not head.pend
    assert {key for key in objects.objects if "/snap/" in key} == {head.snap.key}


async def test_a_snapshot_that_was_abandoned_is_not_installed(objects, monkeypatch):
    """Whoever made it slept so long that others gave it up and removed it."""
    monkeypatch.setattr("app.autocrud.resource_manager.backends.s3_sqlite.housekeeping.ABANDONED", 10_000)
    sleeper, other = instance(objects), instance(objects)
    await sleeper.create(Note("0"))
    upload, uploaded, awake = objects.upload, asyncio.Event(), asyncio.Event()

    async def slow(key, path):
        await upload(key, path)
        uploaded.set()
        await awake.wait()

    objects.upload = slow
    task = asyncio.create_task(meta_store(sleeper)._room().housekeeping.snapshot(forget=True))
    await uploaded.wait()
    objects.upload = upload
    for number in range(100):
        await other.create(Note(f"note {number}"))
    await meta_store(other)._room().housekeeping._announce(lambda head: f"{KEY}/snap/{head.ver + 1:012d}-other")
    await other.maintain(30)
    awake.set()
    assert not await task
    head = head_of(objects)
    assert head.snap is None or head.snap.key in objects.objects
    assert await instance(objects).count() == 101


@pytest.mark.parametrize("killed", [False, True])
async def test_purge_leaves_no_trace(objects, tmp_path, killed):
    """`killed`: after the commit; then the housekeeping of another instance does the rest, once."""
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
    await elsewhere.put(KEY, b"somebody still writes here")
    with pytest.raises(ConfigError, match="earlier deployment"):
        await instance(elsewhere).count()


async def test_what_is_no_export_is_not_imported(objects):
    await objects.put(KEY, b"something else")
    with pytest.raises(ConfigError, match="not a database that crudstack exported"):
        await instance(objects).count()
    assert set(objects.objects) == {KEY}


# Versions of the program


async def test_versions_with_other_fields_share_one_log(objects):
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


async def test_a_unique_field_binds_earlier_versions_too(objects):
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


async def test_keys_of_later_versions_are_kept(objects):
    manager = instance(objects)
    await manager.create(Note("0"))
    import msgspec

    raw = msgspec.msgpack.decode(objects.objects[HEAD].body)
    objects._store(HEAD, msgspec.msgpack.encode(raw | {"later": {"a": [1]}, "ver": raw["ver"] + 1}))
    await manager.create(Note("1"))
    assert msgspec.msgpack.decode(objects.objects[HEAD].body)["later"] == {"a": [1]}
    objects._store(HEAD, msgspec.msgpack.encode(raw | {"fmt": 2, "ver": raw["ver"] + 9}))
    with pytest.raises(ConfigError, match="format 2"):
        await manager.count()


async def test_large_records_go_past_the_tail(objects):
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


def test_bounded_reads_check_no_more_often_than_they_must(objects):
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


async def test_the_sweep_never_believes_an_old_copy(objects):
    crud = AutoCRUD(storage_factory=S3StorageFactory("double", object_store=objects, consistency="local"))
    behind = crud.add_model(Note, indexed_fields=["text"])
    await behind.create(Note("0"))
    created = await instance(objects, fields=("text",)).create(Note("1"))
    assert await meta_store(behind).unreferenced([created.meta.uid, "0/none"]) == ["0/none"]


async def test_no_two_heads_have_equal_bytes(objects):
    """ETags are content hashes: of two writers that send the same bytes both would believe that theirs were stored."""
    manager = instance(objects)
    await manager.create(Note("0"))
    head = head_of(objects)
    assert head.next(sweep=1).encode() != head.next(sweep=1).encode()


async def test_a_rejection_is_decided_at_the_newest_state(objects):
    behind, other = instance(objects), instance(objects)
    holder = await behind.create(Note("0", "taken"))
    await other.update(holder.meta.resource_id, Note("0", "free now"))
    created = await behind.create(Note("1", "taken"))
    assert (await other.get(created.meta.resource_id)).data.code == "taken"
