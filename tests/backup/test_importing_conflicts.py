"""Imports into models with data: what is left out or skipped does not depend on batches, and is counted once."""

from __future__ import annotations

import os
import random
from typing import Any

import pytest

from app.autocrud.backup import batched_import, pieces, survey
from app.autocrud.backup.errors import BadArchive
from app.autocrud.backup.exporting import export_all
from app.autocrud.backup.import_states import version_of
from app.autocrud.backup.importing import import_all
from app.autocrud.errors import StoreUnavailable, UniqueConflict, VersionConflict
from app.autocrud.resource_manager.contract.limits import MAX_VERSION
from app.autocrud.resource_manager.core import ResourceManager, Retention

from .archives import Content, blob, resource, write
from .imports import Note
from .test_importing import JOURNALLED, Killed, programs, stop_after

__all__ = ["programs"]


async def codes(manager: ResourceManager[Note]) -> dict[str, str | None]:
    """Return the value of the unique field of each resource."""
    found = {}
    async for meta in manager.storage.scan():
        found[meta.resource_id] = (await manager.get(meta.resource_id)).data.code
    return found


async def change(manager: ResourceManager[Note], values: dict[str, str]) -> None:
    """Give resources these values of the unique field, which may belong to others of them."""
    for resource_id in values:
        await manager.update(resource_id, Note(text="changed"))
    for resource_id, code in values.items():
        await manager.update(resource_id, Note(text="changed", code=code))


MOVES = {
    "to an earlier one": {"n0": "c7", "n7": "new"},
    "to a later one": {"n0": "new", "n7": "c0"},
    "along a chain": {"n0": "c3", "n3": "c6", "n6": "new"},
    "along a chain to later ones": {"n0": "new", "n3": "c0", "n6": "c3", "n7": "c6"},
    "between two": {"n0": "c7", "n7": "c0"},
    "in a circle": {"n1": "c4", "n4": "c7", "n7": "c1"},
    "in two circles": {"n0": "c5", "n5": "c0", "n1": "c6", "n6": "c1"},
}


@pytest.mark.parametrize("batch", [1, 3, 200])
@pytest.mark.parametrize("moves", MOVES)
@pytest.mark.parametrize("kind", ["memory", "disk", "s3-sqlite"])
async def test_unique_values_move_between_resources_of_any_batch(programs, tmp_path, monkeypatch, kind, moves, batch):
    crud = programs(kind)
    manager = crud.resource_manager(Note)
    for number in range(9):
        await manager.create(Note(text="archived", code=f"c{number}"), resource_id=f"n{number}")
    expected = await codes(manager)
    await export_all(crud.managers, tmp_path / "a.tar.gz")
    await change(manager, MOVES[moves])
    monkeypatch.setattr(pieces, "BATCH", batch)
    checked = (await import_all(crud.managers, tmp_path / "a.tar.gz", on_conflict="replace", check=True)).models["note"]
    assert (checked.unique_conflicts, checked.ids) == ({}, [])
    (model,) = (await import_all(crud.managers, tmp_path / "a.tar.gz", on_conflict="replace")).models.values()
    circle = batch == 1 and moves in ("between two", "in a circle", "in two circles")
    left_out = len(MOVES[moves]) if circle else 0
    assert (model.replaced, model.unique_conflicts) == (9 - left_out, {"code": left_out} if left_out else {})
    assert model.ids == (sorted(MOVES[moves]) if circle else [])
    assert await codes(manager) == (expected | MOVES[moves] if circle else expected)
    assert await manager.storage.import_journal.state() is None


@pytest.mark.parametrize("named", [True, False])
@pytest.mark.parametrize("batch", [1, 4, 200])
@pytest.mark.parametrize("on_conflict", ["skip", "replace"])
async def test_the_same_resources_are_left_out_with_any_batch(
    programs, tmp_path, monkeypatch, on_conflict, batch, named
):
    """Two values belong to resources that the archive does not have. A store may not find out who has a value."""
    source, crud = programs("memory"), programs("disk")
    for number in range(9):
        await source.resource_manager(Note).create(Note(text="", code=f"c{number}"), resource_id=f"n{number}")
    await export_all(source.managers, tmp_path / "a.tar.gz")
    manager = crud.resource_manager(Note)
    for resource_id, code in (("own1", "c1"), ("own5", "c5"), ("n0", "mine"), ("n8", "c7")):
        await manager.create(Note(text="", code=code), resource_id=resource_id)
    monkeypatch.setattr(pieces, "BATCH", batch)
    if not named:

        async def unknown(_self: Any, planned: Any, _: UniqueConflict) -> list[Any]:
            return [planned[0].piece] if len(planned) == 1 else []

        monkeypatch.setattr(batched_import.BatchedImport, "_refused", unknown)
    path = tmp_path / "a.tar.gz"
    checked = (await import_all(crud.managers, path, on_conflict=on_conflict, check=True)).models["note"]
    (model,) = (await import_all(crud.managers, tmp_path / "a.tar.gz", on_conflict=on_conflict)).models.values()
    counts = model.created, model.replaced, model.skipped, model.unique_conflicts["code"]
    if on_conflict == "skip":
        assert (counts, model.ids) == ((4, 0, 2, 3), ["n1", "n5", "n7"])
    else:
        assert (counts, model.ids) == ((5, 2, 0, 2), ["n1", "n5"])
    assert (checked.unique_conflicts, checked.ids) == (model.unique_conflicts, model.ids)


@pytest.mark.parametrize("seed", range(30))
@pytest.mark.parametrize("on_conflict", ["skip", "replace"])
async def test_a_check_tells_which_resources_an_import_leaves_out(programs, tmp_path, on_conflict, seed):
    """Values are spread at random. Some resources of the archive share one, and some belong to the model alone."""
    chosen, path = random.Random(seed), tmp_path / "a.tar.gz"
    ids, values = [f"n{number}" for number in range(8)], [f"c{number}" for number in range(8)]
    archived = sorted(chosen.sample(ids, 6))
    shared = chosen.choices(values, k=6) if seed % 3 == 0 else chosen.sample(values, 6)
    datas = [{"text": "x", "code": code} for code in shared]
    resources = [resource(rid, [data]) for rid, data in zip(archived, datas, strict=True)]
    await write(path, {"note": Content(resources=resources)})
    crud = programs("disk")
    manager = crud.resource_manager(Note)
    for rid, code in zip(chosen.sample(ids, 5), chosen.sample(values, 5), strict=True):
        await manager.create(Note(text="mine", code=code), resource_id=rid)
    before = await codes(manager)
    checked = (await import_all(crud.managers, path, on_conflict=on_conflict, check=True)).models["note"]
    assert await codes(manager) == before
    (model,) = (await import_all(crud.managers, path, on_conflict=on_conflict)).models.values()
    assert (checked.unique_conflicts, checked.ids) == (model.unique_conflicts, model.ids)


@pytest.mark.parametrize("kind", JOURNALLED)
async def test_an_import_that_is_killed_and_resumed_tries_again_what_was_left_out(
    programs, tmp_path, monkeypatch, kind
):
    monkeypatch.setattr(pieces, "BATCH", 2)
    monkeypatch.setattr(batched_import, "NOTE_EVERY", 1)
    crud = programs(kind)
    manager = crud.resource_manager(Note)
    for number in range(9):
        await manager.create(Note(text="archived", code=f"c{number}"), resource_id=f"n{number}")
    expected = await codes(manager)
    await export_all(crud.managers, tmp_path / "a.tar.gz")
    await change(manager, {"n2": "c8", "n8": "new"})
    with monkeypatch.context() as patch:
        stop_after(patch, manager.storage, 5)
        with pytest.raises(Killed):
            await import_all(crud.managers, tmp_path / "a.tar.gz", on_conflict="replace")
    assert (await codes(manager))["n2"] == "c2" or (await codes(manager))["n8"] == "new"
    (model,) = (await import_all(crud.managers, tmp_path / "a.tar.gz", resume=True)).models.values()
    assert model.unique_conflicts == {}
    assert await codes(manager) == expected


async def test_large_resources_are_left_out_and_taken_up_as_a_whole(programs, tmp_path, monkeypatch):
    for module in (survey, pieces):
        monkeypatch.setattr(module, "LARGE_REVISIONS", 3)
    monkeypatch.setattr(pieces, "BATCH", 1)
    datas = [{"text": f"revision {number}", "code": "c"} for number in range(10)]
    resources = [
        resource("a", datas),
        resource("b", [data | {"code": "b"} for data in datas]),
        resource("z", [{"text": "z", "code": "z"}]),
    ]
    await write(tmp_path / "a.tar.gz", {"note": Content(resources=resources)})
    crud = programs("disk")
    manager = crud.resource_manager(Note)
    for resource_id, code in (("z", "c"), ("own", "b")):
        await manager.create(Note(text="", code=code), resource_id=resource_id)
    (model,) = (await import_all(crud.managers, tmp_path / "a.tar.gz", on_conflict="replace")).models.values()
    assert (model.created, model.replaced, model.unique_conflicts, model.ids) == (1, 1, {"code": 1}, ["b"])
    assert await codes(manager) == {"a": "c", "own": "b", "z": "z"}
    assert len((await manager.storage.revisions("a", None, 100)).items) == 10


@pytest.mark.parametrize("kind", JOURNALLED)
async def test_resources_are_counted_once_however_often_a_batch_is_tried(programs, tmp_path, monkeypatch, kind):
    datas = {"a": "own", "b": "b", "c": "c", "d": "d"}
    resources = [resource(rid, [{"text": "", "code": code}]) for rid, code in datas.items()]
    await write(tmp_path / "a.tar.gz", {"note": Content(resources=resources)})
    crud = programs(kind)
    manager = crud.resource_manager(Note)
    await manager.create(Note(text="", code="own"), resource_id="own")
    await manager.create(Note(text=""), resource_id="c")
    monkeypatch.setattr(batched_import, "FIRST_PAUSE_S", 0)
    commit, failures = manager.storage.commit, 3

    async def busy(writes: Any, once: Any = None) -> Any:
        nonlocal failures
        failures -= 1
        if failures > 0:
            raise StoreUnavailable("busy")
        return await commit(writes, once)

    monkeypatch.setattr(manager.storage, "commit", busy)
    (model,) = (await import_all(crud.managers, tmp_path / "a.tar.gz", on_conflict="skip")).models.values()
    assert (model.created, model.skipped, model.unique_conflicts, model.ids) == (2, 1, {"code": 1}, ["a"])


@pytest.mark.parametrize("kind", ["memory", "disk", "s3-sqlite"])
async def test_files_of_skipped_resources_are_not_stored_again(programs, tmp_path, kind):
    """A file to which another resource refers too is stored."""
    (one, first), (both, second), (new, third) = (blob(os.urandom(1000)) for _ in range(3))
    resources = [
        resource("a", [{"text": "1"}], blobs=[[one.key, both.key]]),
        resource("b", [{"text": "2"}], blobs=[[both.key, new.key]]),
        resource("twice", [{"text": "3", "code": "c"}]),
        resource("twice too", [{"text": "3", "code": "c"}], blobs=[[one.key]]),
    ]
    files = sorted([(one, first), (both, second), (new, third)], key=lambda one: one[0].key)
    await write(tmp_path / "a.tar.gz", {"note": Content(resources=resources, blobs=files)})
    crud = programs(kind)
    manager = crud.resource_manager(Note)
    await manager.create(Note(text="mine"), resource_id="a")
    await manager.create(Note(text="mine"), resource_id="twice too")
    for expected in ((2, 2, 2), (0, 4, 0)):
        (model,) = (await import_all(crud.managers, tmp_path / "a.tar.gz", on_conflict="skip")).models.values()
        skipped = expected[1] - 1  # `twice too` is left out
        assert (model.created, model.skipped, model.blobs) == (expected[0], skipped, expected[2])
        assert model.unique_conflicts == {"code": 1}
        stored = [len(await manager.storage.blobs.rows([row.sha256])) for row in (one, both, new)]
        assert stored == [0, 1, 1]


@pytest.mark.parametrize("commits", [0, 1, 2])
async def test_a_resumed_import_skips_what_the_model_had(programs, tmp_path, monkeypatch, commits):
    monkeypatch.setattr(pieces, "BATCH", 2)
    monkeypatch.setattr(batched_import, "NOTE_EVERY", 1)
    blobs = [blob(os.urandom(1000)) for _ in range(8)]
    files = sorted(blobs, key=lambda one: one[0].key)
    resources = [resource(f"n{at}", [{"text": ""}], blobs=[[row.key]]) for at, (row, _) in enumerate(blobs)]
    await write(tmp_path / "a.tar.gz", {"note": Content(resources=resources, blobs=files)})
    crud = programs("disk")
    manager = crud.resource_manager(Note)
    for number in (0, 5):
        await manager.create(Note(text="mine"), resource_id=f"n{number}")
    with monkeypatch.context() as patch:
        stop_after(patch, manager.storage, commits)
        with pytest.raises(Killed):
            await import_all(crud.managers, tmp_path / "a.tar.gz", on_conflict="skip")
    await import_all(crud.managers, tmp_path / "a.tar.gz", resume=True)
    for at, (row, _) in enumerate(blobs):
        assert (await manager.get(f"n{at}")).data.text == ("mine" if at in (0, 5) else "")
        assert len(await manager.storage.blobs.rows([row.sha256])) == (at not in (0, 5))


@pytest.mark.parametrize("kind", JOURNALLED)
async def test_a_resource_of_the_largest_version_is_changed_exported_and_imported(programs, tmp_path, kind):
    largest = resource("a", [{"text": "1"}], version=MAX_VERSION)
    await write(tmp_path / "a.tar.gz", {"note": Content(resources=[largest])})
    crud, other = programs(kind), programs(kind)
    manager = crud.resource_manager(Note)
    await import_all(crud.managers, tmp_path / "a.tar.gz")
    before = await manager.meta("a")
    after = (await manager.update("a", Note(text="2"), expect=version_of(before))).meta
    assert (after.version, after.nonce == before.nonce) == (MAX_VERSION, False)
    with pytest.raises(VersionConflict):
        await manager.update("a", Note(text="3"), expect=version_of(before))
    await export_all(crud.managers, tmp_path / "b.tar.gz")
    await import_all(other.managers, tmp_path / "b.tar.gz")
    assert (await other.resource_manager(Note).get("a")).data.text == "2"
    await import_all(other.managers, tmp_path / "a.tar.gz", on_conflict="replace")
    replaced = await other.resource_manager(Note).get("a")
    assert (replaced.data.text, replaced.meta.version) == ("1", MAX_VERSION)
    assert replaced.meta.nonce not in (before.nonce, after.nonce)
    await other.resource_manager(Note).purge("a")
    await write(tmp_path / "c.tar.gz", {"note": Content(resources=[resource("a", [{}], version=MAX_VERSION + 1)])})
    with pytest.raises(BadArchive):
        await import_all(other.managers, tmp_path / "c.tar.gz")


@pytest.mark.parametrize("change", ["purge", "update"])
async def test_a_resource_changes_right_after_its_bodies_got_other_uids(programs, tmp_path, monkeypatch, change):
    """A sweep was faster than the commit of a batch, so the storage has stored the bodies again."""
    crud = programs("s3-sqlite", retention=Retention(last=1))
    manager = crud.resource_manager(Note)
    await manager.create(Note(text="own"), resource_id="own")
    await write(tmp_path / "a.tar.gz", {"note": Content(resources=[resource("a", [{"text": "1"}, {"text": "2"}])])})
    storage, commit = manager.storage, manager.storage.commit

    async def commit_late(writes: Any, once: Any = None) -> Any:
        monkeypatch.setattr(storage, "commit", commit)
        for _ in range(3):
            await storage.meta_store.advance_generation()
        committed = await commit(writes, once)
        assert committed[0].uid != writes[0].change.meta.uid
        if change == "purge":
            await manager.purge("a")
        else:
            await manager.update("a", Note(text="changed"))
        return committed

    monkeypatch.setattr(storage, "commit", commit_late)
    (model,) = (await import_all(crud.managers, tmp_path / "a.tar.gz")).models.values()
    assert model.created == 1
