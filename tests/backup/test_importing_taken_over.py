"""Imports that another command resumes or aborts while they run, and the ends of imports."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from app.autocrud import AutoCRUD
from app.autocrud.backup import model_load, pieces
from app.autocrud.backup.errors import ImportConflict, ImportTakenOver, ImportUnfinished, NoSuchImport
from app.autocrud.backup.exporting import export_all
from app.autocrud.backup.importing import import_all
from app.autocrud.resource_manager.contract.import_journal import STATE, ImportState, entries_of

from .archives import Content, resource, write
from .imports import Note, Place, content, program

KINDS = ("memory", "disk", "memory-disk", "s3-sqlite")
SHARED = ("disk", "s3-sqlite")
"""Kinds that several programs may use at once."""
COUNT = 20


class Killed(BaseException):
    """Stands for the end of the process."""


OTHERS: dict[AutoCRUD, AutoCRUD] = {}
"""By program, another one with the same stores; the same one if only one program may use them."""


async def made(kind: str, place: Place) -> AutoCRUD:
    crud = program(kind, place)
    OTHERS[crud] = program(kind, place) if kind in SHARED else crud
    await OTHERS[crud].open()
    return crud


def other(crud: AutoCRUD) -> Any:
    return OTHERS[crud].managers


@pytest.fixture(params=KINDS)
async def target(request, tmp_path, monkeypatch) -> AutoCRUD:
    """A program whose model has four resources of the archive, and one of its own."""
    monkeypatch.setattr(pieces, "BATCH", 3)
    crud = await made(request.param, Place(tmp_path / "target"))
    manager = crud.resource_manager(Note)
    for rid in ("n00001", "n00005", "n00010", "n00019", "own"):
        await manager.create(Note(text="mine", code=rid), resource_id=rid)
        await manager.update(rid, Note(text="mine 2", code=rid))
    yield crud
    await OTHERS.pop(crud).close()
    await crud.close()


@pytest.fixture(params=KINDS)
async def empty(request, tmp_path, monkeypatch) -> AutoCRUD:
    monkeypatch.setattr(pieces, "BATCH", 3)
    crud = await made(request.param, Place(tmp_path / "empty"))
    yield crud
    await OTHERS.pop(crud).close()
    await crud.close()


async def archive_of(path: Path, text: str = "new") -> tuple[Path, dict[str, Any]]:
    """Write an archive, and return what it holds."""
    source = program("memory", Place(path.parent))
    manager = source.resource_manager(Note)
    for number in range(COUNT):
        await manager.create(Note(text=f"{text} {number}", code=f"c{number}"), resource_id=f"n{number:05d}")
    await export_all(source.managers, path)
    return path, (await content(manager.storage, states=False, keys=False))["resources"]


@pytest.fixture
async def archive(tmp_path) -> tuple[Path, dict[str, Any]]:
    return await archive_of(tmp_path / "a.tar.gz")


async def resources(crud: AutoCRUD) -> dict[str, Any]:
    return (await content(crud.resource_manager(Note).storage, states=False, keys=False))["resources"]


async def entries(crud: AutoCRUD) -> list[str]:
    """Return the names of the entries of the journal, without those that stay."""
    store = crud.resource_manager(Note).storage.import_journal._store
    names = await store.import_entries("", "", 1000)
    return [name for name in names if name != STATE and not name.startswith("aborted/")]


def at_commit(patch: pytest.MonkeyPatch, crud: AutoCRUD, number: int, when: str, work: Callable[[], Awaitable[Any]]):
    """Do some work once, immediately before or after a commit. The commits of this work do not count."""
    storage = crud.resource_manager(Note).storage
    commit, count = storage.commit, 0

    async def watched(writes: Any, once: Any = None) -> Any:
        nonlocal count
        count += 1
        if count != number:
            return await commit(writes, once)
        count = 1000
        if when == "before":
            await work()
            return await commit(writes, once)
        done = await commit(writes, once)
        await work()
        return done

    patch.setattr(storage, "commit", watched)


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("number", [1, 2, 4])
async def test_an_abort_stops_an_import_in_batches_that_runs(target, archive, monkeypatch, number, when):
    """The commit that is made after the abort is taken back by the import itself, with what it has replaced."""
    before = await resources(target)
    (path, _) = archive
    results = []

    async def abort() -> None:
        results.append(await import_all(other(target), path, abort=True))
        for _ in range(3):
            await OTHERS[target].maintain(10)  # does not remove the bodies that are replaced now

    with monkeypatch.context() as patch:
        at_commit(patch, target, number, when, abort)
        with pytest.raises(ImportTakenOver, match="taken this import back"):
            await import_all(target.managers, path, on_conflict="replace")
    assert results[0].models["note"].not_taken_back == 0
    assert await resources(target) == before
    assert await target.resource_manager(Note).storage.import_journal.state() is None
    await import_all(target.managers, path, on_conflict="replace")
    for _ in range(3):
        await target.maintain(10)
    assert await entries(target) == []


async def test_an_import_that_was_aborted_commits_no_further_batch(target, archive, monkeypatch):
    (path, _) = archive
    before = await resources(target)
    storage = target.resource_manager(Note).storage
    keep, commit, commits = storage.import_journal.keep_created, storage.commit, []

    async def abort_first(state: ImportState, digests: bytes) -> None:
        await import_all(other(target), path, abort=True)
        commits.clear()
        await keep(state, digests)

    async def counted(writes: Any, once: Any = None) -> Any:
        commits.append(writes)
        return await commit(writes, once)

    with monkeypatch.context() as patch:
        patch.setattr(storage.import_journal, "keep_created", abort_first)
        patch.setattr(storage, "commit", counted)
        with pytest.raises(ImportTakenOver):
            await import_all(target.managers, path, on_conflict="replace")
    assert commits == []
    assert await resources(target) == before


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("number", [1, 2, 4])
async def test_a_resume_by_another_command_stops_an_import_that_runs(target, archive, monkeypatch, number, when):
    (path, expected) = archive
    own = (await resources(target))["own"]

    async def resume() -> None:
        await import_all(other(target), path, resume=True)

    with monkeypatch.context() as patch:
        at_commit(patch, target, number, when, resume)
        with pytest.raises(ImportTakenOver, match="another command has continued this import"):
            await import_all(target.managers, path, on_conflict="replace")
    assert await resources(target) == {**expected, "own": own}
    with pytest.raises(NoSuchImport):
        await import_all(target.managers, path, abort=True)


@pytest.mark.parametrize("how", ["abort", "resume"])
async def test_a_load_in_one_step_that_is_taken_over_does_not_appear(empty, archive, monkeypatch, how):
    (path, expected) = archive
    fill = model_load.ModelLoad.fill
    calls = 0

    async def slow_fill(self: Any, *arguments: Any) -> None:
        nonlocal calls
        await fill(self, *arguments)
        calls += 1
        if calls == 1:
            (model,) = (await import_all(other(empty), path, **{how: True})).models.values()
            assert (model.created, model.taken_back) == ((COUNT, 0) if how == "resume" else (0, 0))

    with monkeypatch.context() as patch:
        patch.setattr(model_load.ModelLoad, "fill", slow_fill)
        with pytest.raises(ImportTakenOver, match="--abort" if how == "abort" else "--resume"):
            await import_all(empty.managers, path)
    assert await resources(empty) == (expected if how == "resume" else {})
    assert await empty.resource_manager(Note).storage.import_journal.state() is None
    assert not await empty.resource_manager(Note).storage._pins.has_pins()


async def test_an_abort_after_the_one_step_takes_everything_back(empty, archive, monkeypatch):
    (path, _) = archive
    manager = empty.resource_manager(Note)
    journal = manager.storage.import_journal
    note = journal.note

    async def slow_note(before: ImportState, state: ImportState) -> bool:
        if state.finished:
            monkeypatch.undo()
            (model,) = (await import_all(other(empty), path, abort=True)).models.values()
            assert model.taken_back == COUNT
        return await note(before, state)

    monkeypatch.setattr(journal, "note", slow_note)
    with pytest.raises(ImportTakenOver):
        await import_all(empty.managers, path)
    assert await resources(empty) == {}


async def test_a_second_import_is_told_that_the_first_may_run(target, archive, monkeypatch):
    (path, _) = archive
    told = []

    async def second() -> None:
        with pytest.raises(ImportUnfinished) as caught:
            await import_all(other(target), path, on_conflict="skip")
        told.append(str(caught.value))

    with monkeypatch.context() as patch:
        at_commit(patch, target, 1, "after", second)
        await import_all(target.managers, path, on_conflict="replace")
    assert "may still be running: wait for its end" in told[0]
    assert "--resume" in told[0]
    assert "--abort" in told[0]


async def killed_at(patch: pytest.MonkeyPatch, crud: AutoCRUD, path: Path, number: int, **options: Any) -> None:
    async def kill() -> None:
        raise Killed

    with patch.context() as inner:
        at_commit(inner, crud, number, "after", kill)
        with pytest.raises(Killed):
            await import_all(crud.managers, path, **options)


async def test_entries_that_an_aborted_import_leaves_do_not_matter_to_the_next_one(
    target, archive, tmp_path, monkeypatch
):
    (path, _) = archive
    manager = target.resource_manager(Note)
    journal = manager.storage.import_journal
    await killed_at(monkeypatch, target, path, 1, on_conflict="replace")
    late = await journal.state()
    kept = await journal.replaced(late, "n00001")
    await import_all(target.managers, path, abort=True)
    await journal.keep_replaced(late, kept)  # as the import would that had not noticed the abort yet
    await journal.keep_created(late, b"0" * 16)
    assert len(await entries(target)) == 2
    await manager.update("n00001", Note(text="important", code="n00001"))
    (second, _) = await archive_of(tmp_path / "b.tar.gz", "other")
    await killed_at(monkeypatch, target, second, 1, on_conflict="replace")
    assert all(late.id not in name for name in await entries(target))
    (model,) = (await import_all(target.managers, second, abort=True)).models.values()
    assert (model.taken_back, model.not_taken_back) == (3, 0)
    assert (await manager.get("n00001")).data.text == "important"


async def test_a_change_between_two_attempts_to_replace_a_resource_is_put_back(target, archive, monkeypatch):
    (path, _) = archive
    manager = target.resource_manager(Note)

    async def edit() -> None:
        await manager.update("n00001", Note(text="edited meanwhile", code="n00001"))

    with monkeypatch.context() as patch:
        at_commit(patch, target, 1, "before", edit)
        await killed_at(monkeypatch, target, path, 3, on_conflict="replace")
    assert (await manager.get("n00001")).data.text == "new 1"
    await import_all(target.managers, path, abort=True)
    assert (await manager.get("n00001")).data.text == "edited meanwhile"


@pytest.mark.parametrize("how", ["abort", "resume"])
async def test_an_import_that_an_earlier_version_began_is_finished(target, archive, monkeypatch, how):
    """It wrote a state without the later fields, and entries without an id in their names."""
    (path, expected) = archive
    before = await resources(target)
    journal = target.resource_manager(Note).storage.import_journal
    await killed_at(monkeypatch, target, path, 1, on_conflict="replace")
    state = await journal.state()
    store = journal._store
    for name in await entries(target):
        value, parts = await store.import_entry(name), name.split("/")
        former = f"created/{parts[2]}" if parts[0] == "created" else f"replaced/{parts[1]}/{parts[4]}"
        await store.put_import_entry(former, value, replaces=None)
        await store.remove_import_entries([name])
    fields = ("id", "sha256", "on_conflict", "empty", "after", "finished")
    former_state = msgspec.msgpack.encode({name: getattr(state, name) for name in fields})
    assert await store.put_import_entry(STATE, former_state, replaces=await store.import_entry(STATE))
    assert await store.import_entries(entries_of("n00001"), "", 10)
    if how == "resume":
        await killed_at(monkeypatch, target, path, 1, resume=True)
        await import_all(target.managers, path, resume=True)
        assert await resources(target) == {**expected, "own": before["own"]}
    else:
        (model,) = (await import_all(target.managers, path, abort=True)).models.values()
        assert (model.taken_back, model.not_taken_back) == (3, 0)
        assert await resources(target) == before
    assert await entries(target) == []
    assert await journal.state() is None


@pytest.mark.parametrize("removed", [0, 1])
async def test_an_end_that_was_interrupted_is_completed_by_both_commands(target, archive, monkeypatch, removed):
    """An abort does not take back what was complete: the journal does not keep the former resources any more."""
    (path, expected) = archive
    own = (await resources(target))["own"]
    store = target.resource_manager(Note).storage.import_journal._store
    for how in ("abort", "resume"):
        with monkeypatch.context() as patch:

            async def kill(names: Any) -> None:
                if removed:
                    await type(store).remove_import_entries(store, names)
                raise Killed

            patch.setattr(store, "remove_import_entries", kill)
            with pytest.raises(Killed):
                await import_all(target.managers, path, on_conflict="replace")
        if how == "abort":
            with pytest.raises(NoSuchImport, match="was complete, so nothing was taken back"):
                await import_all(target.managers, path, abort=True)
        else:
            await import_all(target.managers, path, resume=True)
        assert await resources(target) == {**expected, "own": own}
        assert await entries(target) == []
        assert await target.resource_manager(Note).storage.import_journal.state() is None


async def test_an_import_that_is_being_taken_back_is_not_resumed(target, archive, monkeypatch):
    (path, _) = archive
    before = await resources(target)
    await killed_at(monkeypatch, target, path, 3, on_conflict="replace")
    await killed_at(monkeypatch, target, path, 2, abort=True)
    with pytest.raises(ImportUnfinished, match="is being taken back, so it cannot be resumed"):
        await import_all(target.managers, path, resume=True)
    await import_all(target.managers, path, abort=True)
    assert await resources(target) == before


@pytest.mark.parametrize("on_conflict", ["skip", "replace"])
async def test_an_import_is_resumed_with_another_answer_to_conflicts(empty, archive, monkeypatch, on_conflict):
    """With `fail`, a resource that was imported and then edited stops each resume."""
    (path, expected) = archive
    manager = empty.resource_manager(Note)
    await manager.create(Note(text="own"), resource_id="own")
    await killed_at(monkeypatch, empty, path, 2)
    await manager.update("n00001", Note(text="edited", code="c1"))
    with pytest.raises(
        ImportConflict,
        match=r"'n00001'; imported in part: 'note'; .* --resume and --on-conflict skip or replace, or .*--abort",
    ):
        await import_all(empty.managers, path, resume=True)
    (model,) = (await import_all(empty.managers, path, resume=True, on_conflict=on_conflict)).models.values()
    assert (model.skipped, model.replaced) == ((1, 0) if on_conflict == "skip" else (0, 1))
    found = await resources(empty)
    assert set(found) == {*expected, "own"}
    assert (await manager.get("n00001")).data.text == ("edited" if on_conflict == "skip" else "new 1")


async def test_a_failed_import_is_taken_back_if_it_is_asked_for(target, tmp_path, monkeypatch):
    path = tmp_path / "a.tar.gz"
    await write(path, {"note": Content(resources=[resource(f"m{number}", [{"text": "x"}]) for number in range(9)])})
    before = await resources(target)
    manager = target.resource_manager(Note)

    async def faster() -> None:
        await manager.create(Note(text="faster"), resource_id="m8")
        await manager.update("m1", Note(text="edited"))

    with monkeypatch.context() as patch:
        at_commit(patch, target, 1, "after", faster)
        with pytest.raises(ImportConflict, match="what was imported until then is taken back, except 1 resources"):
            await import_all(target.managers, path, undo=True)
    found = await resources(target)
    assert set(found) == {*before, "m1", "m8"}
    assert await manager.storage.import_journal.state() is None


async def test_an_import_that_is_not_finished_is_reported(target, archive, monkeypatch, caplog):
    (path, _) = archive
    manager = target.resource_manager(Note)
    assert await manager.degradations() == []
    await killed_at(monkeypatch, target, path, 1, on_conflict="replace")
    state = await manager.storage.import_journal.state()
    for _ in range(2):
        await manager.maintain(10)
        (told,) = await manager.degradations()
    assert told.startswith("an import is not finished")
    assert state.sha256 in told
    assert [record.getMessage() for record in caplog.records if "an import" in record.getMessage()] == [f"note: {told}"]
    await import_all(target.managers, path, abort=True)
    assert await manager.degradations() == []
