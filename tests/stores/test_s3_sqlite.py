"""The requests that S3-SQLite sends, and writes whose requests fail."""

from __future__ import annotations

import asyncio
import contextlib

import pytest

from app.autocrud.errors import (
    CrudError,
    OutcomeUnknown,
    StoreUnavailable,
    VersionConflict,
)
from app.autocrud.resource_manager.backends.s3.memory_object_store import (
    DROPPED,
    FALSE_CONFLICT,
    LOST_ANSWER,
    Call,
    InjectedFault,
    MemoryObjectStore,
)
from app.autocrud.resource_manager.backends.s3.object_store import Unknown
from app.autocrud.resource_manager.backends.s3_sqlite import local_copy
from app.autocrud.resource_manager.basic import Change
from app.autocrud.resource_manager.core import Caller, IdempotencyKey
from tests import virtual_time
from tests.stores.s3_sqlite_helpers import HEAD, Note, head_of, instance, meta_store, once


@pytest.fixture
def objects() -> MemoryObjectStore:
    return MemoryObjectStore()


# Requests


async def test_each_operation_sends_the_documented_requests(objects):
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
    assert await cost(manager.restore(rid)) == {"put_if": 1, "get": 1}  # its answer contains the data
    assert await cost(manager.get(rid)) == {"get_if": 1, "get": 1}
    assert await cost(manager.meta(rid)) == {"get_if": 1}
    assert await cost(manager.count()) == {"get_if": 1}
    assert await cost(manager.find()) == {"get_if": 1}
    assert await cost(manager.search()) == {"get_if": 1, "get": 2}
    assert await cost(manager.get("missing")) == {"get_if": 1}
    assert await cost(manager.update("missing", Note("x"))) == {"get_if": 1}
    assert await cost(manager.update(rid, Note("two"))) == {"get_if": 1}  # the same data
    other = instance(objects)
    await other.create(Note("elsewhere"))
    assert await cost(manager.count()) == {"get_if": 1}  # its answer contains the new records


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
def test_a_write_happens_once_after_every_answer_to_its_swap(objects, fault):
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


def test_a_rejection_waits_until_an_own_put_can_no_longer_take_effect(objects):
    """An own PUT without an answer may still replace HEAD. Until it cannot, that HEAD rejects no write."""

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
async def test_a_write_that_took_effect_late_does_not_conflict_with_itself(objects, monkeypatch, key):
    """A swap takes effect after the history was searched, and a read advances the copy before the next attempt."""
    manager = instance(objects)
    before = await manager.create(Note("one"), resource_id="a")
    committer = meta_store(manager)._loop_state().committer
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


def test_a_write_without_any_answer_has_an_unknown_outcome(objects):
    async def main():
        manager = instance(objects)
        created = await manager.create(Note("0"))
        objects.fault = lambda call: LOST_ANSWER if call.key == HEAD else None
        with pytest.raises(OutcomeUnknown):
            await manager.update(created.meta.resource_id, Note("1"))
        objects.fault = lambda _: None
        assert (await manager.get(created.meta.resource_id)).data.text == "1"

    virtual_time.run(main())


def test_a_write_whose_body_cannot_be_put_does_not_happen(objects):
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
        loop_state = meta_store(dying)._loop_state()
        loop_state.committer._running.cancel()
        with contextlib.suppress(CrudError, asyncio.CancelledError):
            await doomed
        objects.fault = lambda _: None
        await asyncio.sleep(1)
        found = await other.get(rid)
        assert found.data.text == ("1" if fault.late else "0")
        assert found.meta.revision == len((await other.revisions(rid)).items)
        await other.update(rid, Note("2"))

    virtual_time.run(main())


async def test_a_process_that_was_frozen_during_collection_is_rejected(objects):
    """The process has an old HEAD and an old copy. Meanwhile all was overwritten, compacted and collected."""
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
    await meta_store(other)._loop_state().housekeeping.snapshot(forget=True)
    await other.maintain(30)
    await other.maintain(30)
    swap.set()
    with pytest.raises(VersionConflict):
        await write
    assert (await zombie.get(rid)).data.text == "49"
    assert not [key for key in objects.objects if "/seg/" in key]


def test_the_outcome_is_unknown_after_more_writes_than_copies_remember(objects, monkeypatch):
    """It is unknown whether the write without an answer was stored, and must not be guessed."""
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


async def test_no_two_heads_have_equal_bytes(objects):
    """ETags are content hashes. If two writers sent the same bytes, both would believe that their PUT succeeded."""
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
