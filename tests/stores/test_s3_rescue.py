"""Lost writes of a fork are written to a file, can be sent again, and service is resumed."""

from __future__ import annotations

import sqlite3
import stat
from contextlib import closing

import msgspec
import pytest

from app.autocrud.errors import ConfigError, HistoryForked
from app.autocrud.resource_manager.backends.s3.memory_object_store import MemoryObjectStore
from app.autocrud.resource_manager.backends.s3_sqlite.fork_report import fork_files
from app.s3_tools.s3_rescue import rescue
from tests.stores.s3_fork_helpers import HEAD, Note, api, forked, head_of, instance, later


@pytest.fixture
def objects() -> MemoryObjectStore:
    return MemoryObjectStore()


def lines_of(path) -> list[dict]:
    return [msgspec.json.decode(line) for line in path.read_bytes().splitlines()]


async def stopped(objects, directory, swaps: str = "1"):
    """Return the API of a process that stopped because of a fork, after changes of every kind were lost."""
    crud, winner = api(objects, directory), instance(objects)
    loser = crud.managers["note"]
    for name in ("purged", "deleted"):
        await loser.create(Note("before"), resource_id=name)
    await winner.count()
    before = objects.objects[HEAD]
    await loser.create(Note("lost"), resource_id="lost")
    await loser.update("lost", Note("lost again"))
    await loser.delete("deleted")
    await loser._write([await _purge("purged")], "bob")
    objects.objects[HEAD] = before
    await later(winner, swaps)
    with pytest.raises(HistoryForked):
        await loser.count()
    return crud, winner


async def _purge(resource_id: str):
    from app.autocrud.resource_manager.core import Purge

    return Purge(resource_id=resource_id)


@pytest.mark.parametrize("swaps", ["1", "40", "40 log"])
async def test_lost_changes_are_written_and_service_resumes(objects, tmp_path, swaps):
    crud, winner = await stopped(objects, tmp_path / "data", swaps)
    file = tmp_path / "lost.jsonl"
    done = await rescue(crud.managers, file)
    lines = lines_of(file)
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert [(line["change"], line["resource_id"], line["data"]) for line in lines] == [
        ("put", "lost", {"text": "lost"}),
        ("put", "lost", {"text": "lost again"}),
        ("put", "deleted", {"text": "before"}),
        ("purge", "purged", None),
    ]
    assert {line["model"] for line in lines} == {"note"}
    assert [line["metadata"]["is_deleted"] for line in lines[:3]] == [False, False, True]
    assert [line["metadata"]["revision"] for line in lines[:2]] == [1, 2]
    assert (done.changes, done.transactions, done.without_data, done.copies) == (4, 4, 0, [])
    with pytest.raises(HistoryForked):
        await crud.managers["note"].count()
    # Not without --resume, and never over another file.
    assert fork_files(next((tmp_path / "data").iterdir()))
    content = file.read_bytes()
    with pytest.raises(ConfigError, match="exists"):
        await rescue(crud.managers, file)
    (tmp_path / "other").write_text("something else\n")
    with pytest.raises(ConfigError, match="exists"):
        await rescue(crud.managers, tmp_path / "other", resume=True)
    assert (tmp_path / "other").read_text() == "something else\n"
    # Each change can be sent again.
    await rescue(crud.managers, file, resume=True)
    assert file.read_bytes() == content
    await crud.close()
    again = api(objects, tmp_path / "data")
    manager = again.managers["note"]
    assert await manager.count() == await winner.count()
    for line in lines[:2]:
        note = msgspec.convert(line["data"], Note)
        if line["metadata"]["revision"] == 1:
            await manager.create(note, resource_id=line["resource_id"])
        else:
            await manager.update(line["resource_id"], note)
    assert (await winner.get("lost")).data.text == "lost again"
    with pytest.raises(ConfigError, match="no fork is recorded"):
        await rescue(again.managers, tmp_path / "more.jsonl")
    await again.close()


async def test_resume_writes_the_file_if_there_is_none(objects, tmp_path):
    crud, _ = await stopped(objects, tmp_path / "data")
    await rescue(crud.managers, tmp_path / "lost.jsonl", resume=True)
    assert len(lines_of(tmp_path / "lost.jsonl")) == 4
    assert not fork_files(next((tmp_path / "data").iterdir()))
    await crud.close()


async def test_a_body_that_is_gone_is_named(objects, tmp_path):
    crud, _ = await stopped(objects, tmp_path / "data")
    (uid,) = [key for key, stored in objects.objects.items() if key.startswith("data/") and b'"lost"' in stored.body]
    del objects.objects[uid]
    done = await rescue(crud.managers, tmp_path / "lost.jsonl")
    first, second = lines_of(tmp_path / "lost.jsonl")[:2]
    assert (done.changes, done.without_data) == (4, 1)
    assert first["data"] is None
    assert "cannot be read" in first["error"]
    assert second["data"] == {"text": "lost again"}
    await crud.close()


async def test_transactions_whose_log_is_gone_leave_the_local_copy(objects, tmp_path):
    crud, winner = api(objects, tmp_path / "data"), instance(objects)
    loser = crud.managers["note"]
    await loser.create(Note("before"))
    await winner.count()
    before = objects.objects[HEAD]
    for number in range(200):
        await loser.create(Note(f"lost {number}"), resource_id=f"lost-{number}")
    for segment in head_of(objects).segs:
        del objects.objects[segment.key]
    objects.objects[HEAD] = before
    await later(winner, "201")
    with pytest.raises(HistoryForked):
        await loser.count()
    file = tmp_path / "lost.jsonl"
    done = await rescue(crud.managers, file, resume=True)
    lines = lines_of(file)
    assert done.transactions == len(lines) == 200
    known = {line["resource_id"] for line in lines if line["change"] == "put"}
    assert 0 < len(known) < 200
    assert all(line["error"] for line in lines if line["change"] == "unknown")
    (copy,) = done.copies
    with closing(sqlite3.connect(copy)) as database:
        held = {row[0] for row in database.execute("SELECT id FROM resources")}
    assert {f"lost-{number}" for number in range(200)} <= held
    await crud.close()
    assert await instance(objects, tmp_path / "data").count() == await winner.count()


async def test_writes_that_the_bucket_holds_again_are_not_lost(objects, tmp_path):
    """The storage overwrote the other history after this one was recorded as lost."""
    crud, winner = api(objects, tmp_path / "data"), instance(objects)
    loser = crud.managers["note"]
    await loser.create(Note("both"))
    await winner.count()
    before = objects.objects[HEAD]
    await loser.create(Note("lost"), resource_id="lost")
    mine = objects.objects[HEAD]
    objects.objects[HEAD] = before
    await winner.create(Note("kept"))
    with pytest.raises(HistoryForked):
        await loser.count()
    objects.objects[HEAD] = mine
    done = await rescue(crud.managers, tmp_path / "lost.jsonl", resume=True)
    assert (done.changes, done.transactions) == (0, 0)
    await crud.close()
    assert (await instance(objects, tmp_path / "data").get("lost")).data.text == "lost"


async def test_without_a_fork_there_is_nothing_to_rescue(objects, tmp_path):
    crud = api(objects, tmp_path)
    await crud.managers["note"].create(Note("0"))
    with pytest.raises(ConfigError, match="no fork is recorded"):
        await rescue(crud.managers, tmp_path / "lost.jsonl", resume=True)
    assert not (tmp_path / "lost.jsonl").exists()
    assert await instance(objects, tmp_path).count() == 1
    await crud.close()


async def test_forks_without_a_data_directory_are_not_recorded(objects, tmp_path):
    crud = api(objects)
    await forked(objects, crud.managers["note"], instance(objects))
    with pytest.raises(HistoryForked):
        await crud.managers["note"].count()
    with pytest.raises(ConfigError, match="no fork is recorded"):
        await rescue(crud.managers, tmp_path / "lost.jsonl")
