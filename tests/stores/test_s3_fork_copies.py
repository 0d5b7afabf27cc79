"""Forks and local copies: own swaps that the copy lacks, shared copies, and restarts."""

from __future__ import annotations

import apsw
import pytest

from app.autocrud.errors import HeadLost, HistoryForked, OutcomeUnknown, StoreUnavailable
from app.autocrud.resource_manager.backends.s3.memory_object_store import DROPPED, MemoryObjectStore
from app.autocrud.resource_manager.backends.s3_sqlite import local_copy
from app.autocrud.resource_manager.backends.s3_sqlite.fork_report import fork_files, read_fork
from app.autocrud.resource_manager.backends.s3_sqlite.head import decode_head, decode_ops
from tests.stores.s3_fork_helpers import (
    HEAD,
    KEY,
    SWAPS,
    Note,
    forked,
    head_of,
    instance,
    later,
)


@pytest.fixture
def objects() -> MemoryObjectStore:
    return MemoryObjectStore()


# A swap that the copy lacks


@pytest.fixture
def full(monkeypatch) -> list[bool]:
    """Return a list. While it is not empty, no copy can be advanced."""
    held: list[bool] = []
    advance = local_copy.LocalCopy.advance

    def fails(self, *args):
        if held:
            raise apsw.FullError("database or disk is full")
        return advance(self, *args)

    monkeypatch.setattr(local_copy.LocalCopy, "advance", fails)
    return held


@pytest.mark.parametrize("swaps", SWAPS)
async def test_a_process_knows_an_own_swap_that_its_copy_lacks(objects, full, swaps):
    loser, winner = instance(objects), instance(objects)
    await loser.create(Note("both"))
    await winner.count()
    before = objects.objects[HEAD]
    full.append(True)
    await loser.create(Note("lost"))
    full.clear()
    objects.objects[HEAD] = before
    with pytest.raises(HeadLost, match="old one"):  # the copy is still at that HEAD
        await loser.count()
    await winner.create(Note("kept"))
    await later(winner, swaps)
    with pytest.raises(HistoryForked):
        await loser.count()


async def test_a_swap_is_not_acknowledged_if_the_shared_copy_has_another_head_of_its_version(objects, tmp_path):
    """Two processes share a copy. It advances to the HEAD of the other one before this process gets its answer."""
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
async def test_a_process_knows_an_own_swap_that_the_shared_copy_lacks(objects, full, tmp_path, swaps):
    """Another process advances the shared copy along the other history. HEAD has not changed since."""
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


async def test_an_own_swap_is_compared_with_the_shared_copy_even_if_the_answer_is_outdated(objects, full, tmp_path):
    """The answer is older than both histories."""
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


async def test_an_own_swap_that_another_process_applied_is_not_a_fork(objects, full, tmp_path):
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


async def test_the_copy_applies_an_own_swap_whose_segment_cannot_be_read(objects, tmp_path):
    manager = instance(objects, tmp_path)
    await manager.create(Note("0"))
    objects.fault = lambda call: DROPPED if call.op == "get" and "/seg/" in call.key else None
    await manager.create(Note("x" * 100_000))
    assert (head_of(objects).seq, head_of(objects).tail) == (2, ())
    assert not manager.storage.meta_store._replica.unapplied_version
    assert (await manager.storage.meta_store._replica.blocking(lambda copy: copy.state())).seq == 2
    await manager.storage.close()


async def test_a_copy_that_moved_to_another_history_is_not_advanced(objects, tmp_path, monkeypatch):
    """Another process advances the shared copy along the other history after HEAD was compared with it."""
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
    """The process was killed before it noticed the fork. Its copy still has the HEAD of its own history."""
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


async def test_a_fork_is_recorded_even_if_the_bucket_cannot_be_read(objects, tmp_path, caplog):
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
