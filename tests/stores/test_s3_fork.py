"""A fork of the history in the bucket is noticed, and nothing else is taken for one."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path

import apsw
import httpx
import msgspec
import pytest
from fastapi import FastAPI
from msgspec import Struct

from app.autocrud import AutoCRUD
from app.autocrud.errors import HeadLost, HistoryForked, OutcomeUnknown, StoreUnavailable
from app.autocrud.resource_manager.backends.s3.memory_object_store import DROPPED, MemoryObjectStore
from app.autocrud.resource_manager.backends.s3.object_store import Object
from app.autocrud.resource_manager.backends.s3_sqlite import fork, local_copy
from app.autocrud.resource_manager.backends.s3_sqlite.fork_report import find_lost, fork_files, read_fork
from app.autocrud.resource_manager.backends.s3_sqlite.head import MAX_PAST, decode_head, decode_ops
from app.autocrud.resource_manager.core import ResourceManager
from app.autocrud.resource_manager.storage_factory import S3StorageFactory

KEY = "meta/note.sqlite"
HEAD = f"{KEY}/HEAD"


class Note(Struct):
    text: str


def api(objects: MemoryObjectStore, local_dir: Path | None = None) -> AutoCRUD:
    factory = S3StorageFactory("double", object_store=objects, local_dir=local_dir, sync_interval=None)
    crud = AutoCRUD(storage_factory=factory)
    crud.add_model(Note, indexed_fields=["text"])
    return crud


def instance(objects: MemoryObjectStore, local_dir: Path | None = None) -> ResourceManager[Note]:
    return api(objects, local_dir).managers["note"]


def head_of(objects: MemoryObjectStore):
    return decode_head(objects.objects[HEAD].body)


class OldProgram(MemoryObjectStore):
    """What a program does that does not know `past`: it keeps the value of the HEAD that it replaces, or writes none into a new store."""

    def __init__(self, objects: MemoryObjectStore) -> None:
        super().__init__()
        self.objects = objects.objects

    def _store(self, key: str, body: bytes) -> str:
        if key == HEAD:
            raw = msgspec.msgpack.decode(body)
            del raw["past"]
            replaced = msgspec.msgpack.decode(self.objects[HEAD].body) if HEAD in self.objects else {}
            body = msgspec.msgpack.encode(raw | {name: replaced[name] for name in ("past",) if name in replaced})
        return super()._store(key, body)


@pytest.fixture
def objects() -> MemoryObjectStore:
    return MemoryObjectStore()


async def forked(objects: MemoryObjectStore, loser: ResourceManager[Note], winner: ResourceManager[Note]) -> None:
    """Let `winner` overwrite an acknowledged create of `loser`, as a storage does that compares first and writes afterwards."""
    await loser.create(Note("both"), resource_id="both")
    await winner.count()
    before = objects.objects[HEAD]
    await loser.create(Note("lost"), resource_id="lost")
    objects.objects[HEAD] = before
    await winner.create(Note("kept"), resource_id="kept")


async def later(manager: ResourceManager[Note], swaps: str) -> None:
    """Swap after the fork. `log`: and remove the log of before."""
    count, _, how = swaps.partition(" ")
    for number in range(int(count)):
        if how == "edits":
            await manager.storage.meta_store.advance_generation()
        else:
            await manager.create(Note(f"later {number}"))
    if how == "log":
        await manager.storage.meta_store._room().housekeeping.snapshot(forget=True)
        await manager.storage.meta_store._room().housekeeping.collect()


SWAPS = ["0", "1", f"{MAX_PAST - 1}", f"{MAX_PAST}", f"{MAX_PAST + 1}", "200", "50 edits", "50 log"]


@pytest.mark.parametrize("swaps", SWAPS)
async def test_a_process_stops_whose_acknowledged_write_was_overwritten(objects, caplog, swaps):
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
    assert not objects.requests.keys() - {"put", "delete"}  # of the body of a write that is refused
    named = [record.message for record in caplog.records if "lost transaction" in record.message]
    assert len(named) == 1
    assert txid.hex() in named[0]
    assert "['lost']" in named[0]
    assert (await winner.get("kept")).data.text == "kept"
    fresh = instance(objects)
    assert await fresh.count() == await winner.count()


@pytest.mark.parametrize("swaps", SWAPS)
async def test_a_process_that_slept_is_no_fork(objects, swaps):
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


async def test_a_head_that_lands_late_is_a_fork_and_no_old_head(objects):
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
async def test_an_old_head_that_was_put_back_is_no_fork(objects, writes):
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
async def test_writing_on_after_an_old_head_was_put_back_is_a_fork(objects, swaps):
    """The version of the known HEAD is reached again, by other writes."""
    stale, other = instance(objects), instance(objects)
    await stale.create(Note("0"))
    await other.count()
    old = objects.objects[HEAD]
    await stale.create(Note("1"))
    objects.objects[HEAD] = old
    await later(other, swaps)
    with pytest.raises(HistoryForked):
        await stale.count()


# A swap that the copy lacks


@pytest.fixture
def full(monkeypatch) -> list[bool]:
    """While it holds anything, no copy can be brought up."""
    held: list[bool] = []
    advance = local_copy.LocalCopy.advance

    def fails(self, *args):
        if held:
            raise apsw.FullError("database or disk is full")
        return advance(self, *args)

    monkeypatch.setattr(local_copy.LocalCopy, "advance", fails)
    return held


@pytest.mark.parametrize("swaps", SWAPS)
async def test_a_swap_that_the_copy_lacks_is_known(objects, full, swaps):
    loser, winner = instance(objects), instance(objects)
    await loser.create(Note("both"))
    await winner.count()
    before = objects.objects[HEAD]
    full.append(True)
    await loser.create(Note("lost"))
    full.clear()
    objects.objects[HEAD] = before
    with pytest.raises(HeadLost, match="old one"):  # its copy is at that HEAD still
        await loser.count()
    await winner.create(Note("kept"))
    await later(winner, swaps)
    with pytest.raises(HistoryForked):
        await loser.count()


async def test_a_swap_that_another_process_of_the_directory_knows_differently_is_not_acknowledged(objects, tmp_path):
    """Both share a copy. It has the other HEAD of the version before this process hears of its own."""
    one, other = instance(objects, tmp_path), instance(objects, tmp_path)
    await one.create(Note("both"), resource_id="both")
    await other.count()
    put_if = objects.put_if

    async def overtaken(key, body, etag):
        if key != HEAD:
            return await put_if(key, body, etag)
        objects.put_if = put_if
        before = objects.objects[HEAD]
        await other.create(Note("other"), resource_id="other")
        objects.objects[HEAD] = before
        return await put_if(key, body, etag)

    objects.put_if = overtaken
    with pytest.raises(OutcomeUnknown):
        await one.create(Note("one"), resource_id="one")
    with pytest.raises(HistoryForked):
        await one.count()
    assert await other.storage.meta_store._replica.blocking(lambda copy: copy.txids())
    with pytest.raises(HistoryForked):
        await other.count()
    recorded = [read_fork(path) for path in fork_files(next(tmp_path.iterdir()))]
    assert {op.resource_id for one in recorded for record in one.lost for op in decode_ops(record.ops)} == {"other"}
    for manager in (one, other):
        await manager.storage.close()


@pytest.mark.parametrize("swaps", SWAPS)
async def test_a_swap_that_the_shared_copy_lacks_is_known(objects, full, tmp_path, swaps):
    """Another process of the directory brings the copy up to the other history. HEAD has not changed since."""
    one, other = instance(objects, tmp_path), instance(objects, tmp_path)
    await one.create(Note("both"))
    await other.count()
    before = objects.objects[HEAD]
    full.append(True)
    await one.create(Note("lost"))
    full.clear()
    objects.objects[HEAD] = before
    await other.create(Note("kept"))
    await later(other, swaps)
    with pytest.raises(HistoryForked):
        await one.count()
    await other.count()
    for manager in (one, other):
        await manager.storage.close()


async def test_a_swap_that_the_shared_copy_lacks_is_compared_with_it_whatever_is_read(objects, full, tmp_path):
    """An answer arrives that is older than both histories."""
    one, other = instance(objects, tmp_path), instance(objects, tmp_path)
    await one.create(Note("both"))
    await other.count()
    before = objects.objects[HEAD]
    full.append(True)
    await one.create(Note("lost"))
    full.clear()
    objects.objects[HEAD] = before
    await later(other, "2")
    with pytest.raises(HistoryForked):
        await one.storage.meta_store._replica.advance_to(before)
    for manager in (one, other):
        await manager.storage.close()


async def test_a_swap_that_another_process_brought_into_the_shared_copy_is_no_fork(objects, full, tmp_path):
    one, other = instance(objects, tmp_path), instance(objects, tmp_path)
    await one.create(Note("both"))
    await other.count()
    full.append(True)
    await one.create(Note("mine"))
    full.clear()
    await later(other, "50")
    assert one.storage.meta_store._replica.unapplied_version
    assert await one.count() == await other.count() == 52
    assert not one.storage.meta_store._replica.unapplied_version
    for manager in (one, other):
        await manager.storage.close()


async def test_the_copy_has_an_own_swap_though_its_segment_cannot_be_read(objects, tmp_path):
    manager = instance(objects, tmp_path)
    await manager.create(Note("0"))
    objects.fault = lambda call: DROPPED if call.op == "get" and "/seg/" in call.key else None
    await manager.create(Note("x" * 100_000))
    assert (head_of(objects).seq, head_of(objects).tail) == (2, ())
    assert not manager.storage.meta_store._replica.unapplied_version
    assert (await manager.storage.meta_store._replica.blocking(lambda copy: copy.state())).seq == 2
    await manager.storage.close()


async def test_a_copy_that_moved_to_another_history_is_not_advanced(objects, tmp_path, monkeypatch):
    """Another process of the directory brings the copy to the other history, after HEAD was compared with it."""
    one, winner, loser = instance(objects, tmp_path), instance(objects), instance(objects)
    await one.create(Note("both"))
    await winner.count()
    await loser.count()
    before = objects.objects[HEAD]
    await loser.create(Note("lost"))
    theirs = objects.objects[HEAD]
    objects.objects[HEAD] = before
    await winner.create(Note("kept"))
    await winner.create(Note("kept too"))
    advance, moved = local_copy.LocalCopy.advance, []

    def moves(self, at, *args):
        if not moved:
            moved.append(True)
            head = decode_head(theirs.body)
            assert advance(self, at, head.tail, head, theirs.etag, theirs.body)
        return advance(self, at, *args)

    monkeypatch.setattr(local_copy.LocalCopy, "advance", moves)
    with pytest.raises(HistoryForked):
        await one.count()
    assert moved
    await one.storage.close()


# Data directories


async def test_a_fork_survives_a_restart_in_the_data_directory(objects, tmp_path):
    loser, winner = instance(objects, tmp_path), instance(objects)
    await forked(objects, loser, winner)
    with pytest.raises(HistoryForked, match="s3-rescue FILE"):
        await loser.count()
    await loser.storage.close()
    (path,) = fork_files(next(tmp_path.iterdir()))
    recorded = read_fork(path)
    assert recorded.key == KEY
    assert [op.resource_id for record in recorded.lost for op in decode_ops(record.ops)] == ["lost"]
    objects.requests.clear()
    for _ in range(2):
        again = instance(objects, tmp_path)
        with pytest.raises(HistoryForked, match="s3-rescue FILE"):
            await again.count()
        await again.storage.close()
    assert not objects.requests
    assert await instance(objects).count() == 2


@pytest.mark.parametrize("swaps", SWAPS)
async def test_a_fork_is_noticed_at_a_restart(objects, tmp_path, swaps):
    """The process was killed before it noticed. Its copy knows."""
    loser, winner = instance(objects, tmp_path), instance(objects)
    await forked(objects, loser, winner)
    await loser.storage.close()
    await later(winner, swaps)
    again = instance(objects, tmp_path)
    with pytest.raises(HistoryForked):
        await again.count()
    await again.storage.close()


async def test_without_a_data_directory_the_error_names_the_log(objects):
    loser, winner = instance(objects), instance(objects)
    await forked(objects, loser, winner)
    with pytest.raises(HistoryForked, match="its log names the lost transactions"):
        await loser.count()


async def test_a_fork_that_cannot_be_recorded_still_stops(objects, tmp_path, monkeypatch, caplog):
    loser, winner = instance(objects, tmp_path), instance(objects)
    await forked(objects, loser, winner)

    def refuses(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("app.autocrud.resource_manager.backends.s3_sqlite.fork_detector.record_fork", refuses)
    with pytest.raises(HistoryForked):
        await loser.count()
    with pytest.raises(HistoryForked, match="its log names"):
        await loser.count()
    assert "No space left" in caplog.text
    await loser.storage.close()


async def test_a_fork_is_recorded_though_the_bucket_cannot_be_read(objects, tmp_path, caplog):
    loser, winner = instance(objects, tmp_path), instance(objects)
    await forked(objects, loser, winner)
    got = objects.objects[HEAD]

    async def down(_):
        raise StoreUnavailable("down")

    await loser.storage.meta_store.head()
    objects.get = down
    with pytest.raises(HistoryForked):
        await loser.storage.meta_store._replica.advance_to(got)
    await loser.storage.close()
    assert fork_files(next(tmp_path.iterdir()))
    assert "history-forked" in caplog.text


# What is no fork


async def test_equal_bytes_under_another_etag_are_no_fork(objects, tmp_path):
    """A bucket that was copied, or encrypted anew, has other ETags."""
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


async def test_an_old_answer_is_no_fork(objects):
    """Answers to requests may arrive in another order."""
    manager, other = instance(objects), instance(objects)
    await manager.create(Note("0"))
    old = objects.objects[HEAD]
    await later(other, "40")
    assert await manager.count() == 41
    assert await manager.storage.meta_store._replica.advance_to(old)
    assert await manager.count() == 41


@pytest.mark.parametrize("swaps", SWAPS)
async def test_programs_without_past_are_read_on(objects, swaps):
    """A store of the program before, then both programs side by side."""
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
async def test_a_fork_by_a_program_without_past_is_noticed(objects, swaps):
    loser, winner = instance(objects), instance(OldProgram(objects))
    await forked(objects, loser, winner)
    await later(winner, swaps)
    with pytest.raises(HistoryForked):
        await loser.count()


async def test_what_copies_do_not_remember_is_not_compared(objects, caplog, monkeypatch):
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


# Over HTTP


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
