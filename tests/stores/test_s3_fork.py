"""A fork of the history in the bucket is noticed, and nothing else is mistaken for one."""

from __future__ import annotations

import asyncio
import logging

import httpx
import msgspec
import pytest
from fastapi import FastAPI

from app.autocrud.errors import HeadLost, HistoryForked
from app.autocrud.resource_manager.backends.s3.memory_object_store import MemoryObjectStore
from app.autocrud.resource_manager.backends.s3.object_store import Object
from app.autocrud.resource_manager.backends.s3_sqlite import fork, local_copy
from app.autocrud.resource_manager.backends.s3_sqlite.fork_report import find_lost
from app.autocrud.resource_manager.backends.s3_sqlite.head import MAX_PAST, decode_head
from tests.stores.s3_fork_helpers import (
    HEAD,
    SWAPS,
    Note,
    OldProgram,
    api,
    forked,
    head_of,
    instance,
    later,
)


@pytest.fixture
def objects() -> MemoryObjectStore:
    return MemoryObjectStore()


@pytest.mark.parametrize("swaps", SWAPS)
async def test_a_process_stops_if_its_acknowledged_write_was_overwritten(objects, caplog, swaps):
    loser, winner = instance(objects), instance(objects)
    await forked(objects, loser, winner)
    await later(winner, swaps)
    (txid,) = [record.txid for record in (await loser.storage.meta_store._replica.head()).tail[-1:]]
    with pytest.raises(HistoryForked, match="lost acknowledged writes"):
        await loser.get("both")
    objects.requests.clear()
    for call in (loser.get("lost"), loser.count(), loser.create(Note("more")), loser.storage.health()):
        with pytest.raises(HistoryForked):
            await call
    assert not objects.requests.keys() - {"put", "delete"}  # only requests for the body of the rejected write
    named = [record.message for record in caplog.records if "lost transaction" in record.message]
    assert len(named) == 1
    assert txid.hex() in named[0]
    assert "['lost']" in named[0]
    assert (await winner.get("kept")).data.text == "kept"
    fresh = instance(objects)
    assert await fresh.count() == await winner.count()


@pytest.mark.parametrize("swaps", SWAPS)
async def test_a_process_that_was_idle_sees_no_fork(objects, swaps):
    sleeper, other = instance(objects), instance(objects)
    await sleeper.create(Note("both"), resource_id="both")
    await other.count()
    await later(other, swaps)
    assert await sleeper.count() == await other.count()
    await sleeper.create(Note("awake"))


async def test_a_higher_version_with_fewer_records_is_a_fork(objects):
    loser, winner = instance(objects), instance(objects)
    await loser.create(Note("both"))
    await winner.count()
    before = objects.objects[HEAD]
    await loser.create(Note("lost"))
    await loser.create(Note("lost too"))
    objects.objects[HEAD] = before
    await later(winner, "50 edits")
    with pytest.raises(HistoryForked):
        await loser.count()


async def test_a_head_that_arrives_late_is_a_fork_and_not_an_old_head(objects):
    """The loser swapped twice before the other HEAD of its first version arrived."""
    loser, winner = instance(objects), instance(objects)
    await loser.create(Note("both"))
    await winner.count()
    before = objects.objects[HEAD]
    await loser.create(Note("lost"))
    await loser.create(Note("lost too"))
    after = objects.objects[HEAD]
    objects.objects[HEAD] = before
    await winner.create(Note("kept"))
    assert head_of(objects).ver < decode_head(after.body).ver
    with pytest.raises(HistoryForked):
        await loser.count()


@pytest.mark.parametrize("writes", [1, 100])
async def test_an_old_head_that_was_put_back_is_not_a_fork(objects, writes):
    manager = instance(objects)
    await manager.create(Note("0"))
    old = objects.objects[HEAD]
    for number in range(writes):
        await manager.create(Note(f"later {number}"))
    newest = objects.objects[HEAD]
    objects.objects[HEAD] = old
    with pytest.raises(HeadLost, match="old one"):
        await manager.count()
    objects.objects[HEAD] = newest
    assert await manager.count() == 1 + writes


@pytest.mark.parametrize("swaps", ["1", "40"])
async def test_writes_after_an_old_head_was_put_back_are_a_fork(objects, swaps):
    """Other writes reach the version of the known HEAD again."""
    stale, other = instance(objects), instance(objects)
    await stale.create(Note("0"))
    await other.count()
    old = objects.objects[HEAD]
    await stale.create(Note("1"))
    objects.objects[HEAD] = old
    await later(other, swaps)
    with pytest.raises(HistoryForked):
        await stale.count()


# Histories without a fork


async def test_equal_bytes_with_another_etag_are_not_a_fork(objects, tmp_path):
    """A bucket that was copied or encrypted again has other ETags."""
    manager = instance(objects, tmp_path)
    await manager.create(Note("0"))
    objects.objects[HEAD] = Object(objects.objects[HEAD].body, '"copied"')
    assert await manager.count() == 1
    objects.requests.clear()
    assert await manager.count() == 1
    assert objects.requests == {"get_if": 1}
    objects.objects[HEAD] = Object(objects.objects[HEAD].body, '"again"')
    await manager.create(Note("1"))
    assert await manager.count() == 2
    await manager.storage.close()
    objects.objects[HEAD] = Object(objects.objects[HEAD].body, '"and again"')
    restarted = instance(objects, tmp_path)
    assert await restarted.count() == 2
    await restarted.create(Note("2"))
    await restarted.storage.close()


async def test_an_outdated_answer_is_not_a_fork(objects):
    """Answers may arrive in another order than their requests were sent."""
    manager, other = instance(objects), instance(objects)
    await manager.create(Note("0"))
    old = objects.objects[HEAD]
    await later(other, "40")
    assert await manager.count() == 41
    assert await manager.storage.meta_store._replica.advance_to(old)
    assert await manager.count() == 41


@pytest.mark.parametrize("swaps", SWAPS)
async def test_a_store_may_be_shared_with_programs_that_do_not_write_past(objects, swaps):
    """An older program creates the store, and then both programs use it at the same time."""
    old = OldProgram(objects)
    before, new = instance(old), instance(objects)
    await before.create(Note("0"))
    assert "past" not in msgspec.msgpack.decode(objects.objects[HEAD].body)
    assert await new.count() == 1
    await new.create(Note("1"))
    assert await before.count() == 2
    await later(before, swaps)
    assert await new.count() == await before.count()
    await later(new, "2")
    await later(before, "1")
    assert await before.count() == await new.count() == await instance(objects).count()


@pytest.mark.parametrize("swaps", SWAPS)
async def test_a_fork_by_a_program_that_does_not_write_past_is_noticed(objects, swaps):
    loser, winner = instance(objects), instance(OldProgram(objects))
    await forked(objects, loser, winner)
    await later(winner, swaps)
    with pytest.raises(HistoryForked):
        await loser.count()


async def test_forgotten_transaction_ids_are_not_compared(objects, caplog, monkeypatch):
    monkeypatch.setattr(local_copy, "REMEMBERED_TXIDS", 20)
    loser, winner = instance(objects), instance(objects)
    await forked(objects, loser, winner)
    await later(winner, "60 log")
    assert await loser.count() == await winner.count()
    assert "a fork could not be noticed" in caplog.text


# Lost records


async def test_a_transaction_that_is_tried_again_elsewhere_is_not_lost(objects):
    manager = instance(objects)
    await manager.create(Note("0"))
    head = head_of(objects)
    moved = [record._replace(seq=record.seq + 5) for record in head.tail]
    lost = await find_lost(objects, HEAD, [msgspec.structs.replace(head, tail=tuple(moved))], [], head)
    assert lost.records == []


async def test_lost_records_whose_log_is_gone_are_named_by_their_ids(objects, caplog):
    caplog.set_level(logging.ERROR)
    loser, winner = instance(objects), instance(objects)
    await loser.create(Note("both"))
    await winner.count()
    before = objects.objects[HEAD]
    for number in range(200):  # these reach into segments
        await loser.create(Note(f"lost {number}"))
    mine = head_of(objects)
    objects.objects[HEAD] = before
    await later(winner, "201")
    for segment in mine.segs:
        objects.objects.pop(segment.key, None)
    with pytest.raises(HistoryForked):
        await loser.count()
    assert "200 transactions, perhaps more" in caplog.text
    assert "resources not known" in caplog.text


# HTTP


async def test_requests_and_readyz_say_that_history_has_forked(objects):
    crud = api(objects)
    app = FastAPI()
    crud.apply(app)
    await forked(objects, crud.managers["note"], instance(objects))
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
        for path in ("/note/both", "/note/lost/data", "/note", "/note/count"):
            answer = await client.get(path)
            assert (answer.status_code, answer.json()["type"]) == (503, "urn:crudstack:history-forked")
        assert "retry-after" not in answer.headers
        written = await client.post("/note", json={"text": "more"})
        assert (written.status_code, written.json()["type"]) == (503, "urn:crudstack:history-forked")
        ready = await client.get("/readyz")
        assert ready.status_code == 503
        assert "lost acknowledged writes" in ready.json()["models"]["note"]["status"]
        assert (await client.get("/healthz")).status_code == 200


def test_same_history_is_symmetric_and_decides_by_common_versions():
    from app.autocrud.resource_manager.backends.s3_sqlite.head import Head

    heads = [Head(store="s", nonce=b"1")]
    for _ in range(100):
        heads.append(heads[-1].next())
    assert all(len(head.past) <= MAX_PAST for head in heads)
    for older in (0, 20, 68, 99):
        for newer in range(older, 101):
            expected = True if newer - older <= MAX_PAST else None
            assert fork.same_history(heads[older], heads[newer]) is expected
            assert fork.same_history(heads[newer], heads[older]) is expected
    other = [heads[50].next()]
    for _ in range(40):
        other.append(other[-1].next())
    assert fork.same_history(other[0], heads[51]) is False
    assert fork.same_history(other[20], heads[80]) is False
    assert fork.same_history(heads[50], other[20]) is True
    assert fork.same_history(other[0], heads[99]) is None


def test_a_head_that_is_continued_is_not_kept():
    from app.autocrud.resource_manager.backends.s3_sqlite.head import Head

    known = fork.KnownHeads()
    one = Head(store="s", nonce=b"1")
    two = one.next()
    other = one.next()
    for head in (one, two, one):
        known.add(head)
    assert [known.head for known in known.of("s")] == [two]
    known.add(other)
    assert [known.head for known in known.of("s")] == [two, other]
    assert known.of("another") == ()


async def test_concurrent_reads_of_a_fork_all_fail(objects):
    loser, winner = instance(objects), instance(objects)
    await forked(objects, loser, winner)
    outcomes = await asyncio.gather(*(loser.count() for _ in range(20)), return_exceptions=True)
    assert {type(outcome) for outcome in outcomes} == {HistoryForked}
