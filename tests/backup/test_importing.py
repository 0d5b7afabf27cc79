"""Imports: equality afterwards between kinds, conflicts, and what is refused before anything is changed."""

from __future__ import annotations

import asyncio
import contextlib
import io
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from app.autocrud import AutoCRUD, Encoding, IndexedField
from app.autocrud.backup import batched_import, pieces, survey
from app.autocrud.backup.errors import BadArchive, ImportConflict, ImportUnfinished, NoSuchImport
from app.autocrud.backup.exporting import export_all
from app.autocrud.backup.importing import import_all
from app.autocrud.errors import ConfigError, InvalidData, VersionConflict
from app.autocrud.resource_manager.core import Caller, IdempotencyKey

from .archives import Content, resource, write
from .imports import INDEXED, LOCAL, Note, Place, content, fill, program, searches

JOURNALLED = [kind for kind in LOCAL if kind != "custom"]


@pytest.fixture
async def programs(tmp_path):
    """Make programs, each with a store of its own, and close them at the end."""
    made: list[AutoCRUD] = []

    def make(kind: str, place: Place | None = None, **options: Any) -> AutoCRUD:
        crud = program(kind, place or Place(tmp_path / f"{kind}-{len(made)}"), **options)
        made.append(crud)
        return crud

    yield make
    for crud in made:
        await crud.close()


@pytest.fixture
async def archive(tmp_path, programs) -> Path:
    """An archive of a filled store in memory."""
    crud = programs("memory")
    await fill(crud.resource_manager(Note))
    await export_all(crud.managers, tmp_path / "a.tar.gz")
    return tmp_path / "a.tar.gz"


@pytest.mark.slow
@pytest.mark.parametrize("target", LOCAL)
@pytest.mark.parametrize("source", LOCAL)
async def test_everything_is_equal_after_an_import_into_another_kind(programs, tmp_path, source, target):
    crud = programs(source)
    await fill(crud.resource_manager(Note))
    await export_all(crud.managers, tmp_path / "a.tar.gz")
    expected = await content(crud.resource_manager(Note).storage)
    other = programs(target)
    result = await import_all(other.managers, tmp_path / "a.tar.gz")
    manager = other.resource_manager(Note)
    keys = target != "custom"
    assert await content(manager.storage, keys=keys) == (expected if keys else {**expected, "keys": {}})
    assert await searches(manager) == await searches(crud.resource_manager(Note))
    (model,) = result.models.values()
    assert (model.created, model.not_fitting, model.skipped, model.replaced) == (len(expected["resources"]), 0, 0, 0)
    await manager.update("n00000", Note(text="later", code="new"))
    await manager.switch("n00001", 1)


@pytest.mark.parametrize("kind", JOURNALLED)
async def test_a_request_is_repeated_after_an_import(programs, archive, kind):
    """The result of an Idempotency-Key names the body that the import has stored."""
    crud = programs(kind)
    await import_all(crud.managers, archive)
    manager = crud.resource_manager(Note)
    key = IdempotencyKey("k", "r")
    again = await manager.create(Note(text="keyed", code="k"), resource_id="keyed", by=Caller("bob", key))
    assert key.replayed
    assert again.data == Note(text="keyed", code="k")
    key = IdempotencyKey("key")
    await manager.update("draft", Note(text="keyed", code="d"), by=Caller("alice", key))
    assert key.replayed


@pytest.mark.parametrize("kind", JOURNALLED)
async def test_the_default_refuses_ids_that_exist_and_changes_nothing(programs, archive, kind):
    crud = programs(kind)
    manager = crud.resource_manager(Note)
    await manager.create(Note(text="mine"), resource_id="n00005")
    before = await content(manager.storage)
    with pytest.raises(ImportConflict) as caught:
        await import_all(crud.managers, archive)
    assert caught.value.ids == ("n00005",)
    assert await content(manager.storage) == before
    assert await manager.storage.import_journal.state() is None


@pytest.mark.parametrize("kind", JOURNALLED)
async def test_unique_values_of_others_are_a_conflict_of_their_own(programs, archive, kind):
    crud = programs(kind)
    manager = crud.resource_manager(Note)
    await manager.create(Note(text="mine", code="c5"), resource_id="other")
    before = await content(manager.storage)
    with pytest.raises(ImportConflict) as caught:
        await import_all(crud.managers, archive)
    assert caught.value.fields == {"code": 1}
    assert caught.value.ids == ("n00005",)
    assert await content(manager.storage) == before
    for on_conflict in ("skip", "replace"):
        result = await import_all(crud.managers, archive, on_conflict=on_conflict)
        (model,) = result.models.values()
        assert model.unique_conflicts == {"code": 1}
        assert model.ids == ["n00005"]
        found = await content(manager.storage)
        assert "n00005" not in found["resources"]
        assert found["resources"]["other"] == before["resources"]["other"]


@pytest.mark.parametrize("kind", JOURNALLED)
async def test_skip_keeps_what_the_model_has(programs, archive, kind):
    crud = programs(kind)
    manager = crud.resource_manager(Note)
    await manager.create(Note(text="mine"), resource_id="n00005")
    before = (await content(manager.storage))["resources"]["n00005"]
    (model,) = (await import_all(crud.managers, archive, on_conflict="skip")).models.values()
    found = (await content(manager.storage))["resources"]
    assert model.skipped == 1
    assert model.created == len(found) - 1
    assert found["n00005"] == before
    assert await manager.storage.import_journal.state() is None


@pytest.mark.parametrize("kind", JOURNALLED)
async def test_replace_never_moves_a_version_backwards(programs, archive, kind):
    source = programs("memory")
    await import_all(source.managers, archive)
    crud = programs(kind)
    manager = crud.resource_manager(Note)
    await manager.create(Note(text="1"), resource_id="n00005")
    for number in range(20):
        await manager.update("n00005", Note(text=f"mine {number}"))
    await manager.create(Note(text="mine"), resource_id="n00001")
    before = {rid: await manager.meta(rid) for rid in ("n00001", "n00005")}
    (model,) = (await import_all(crud.managers, archive, on_conflict="replace")).models.values()
    assert (model.replaced, model.skipped) == (2, 0)
    expected = await content(source.resource_manager(Note).storage, states=False, keys=False)
    assert await content(manager.storage, states=False, keys=False) == expected
    for rid, old in before.items():
        new, archived = await manager.meta(rid), await source.resource_manager(Note).meta(rid)
        assert new.version == max(old.version, archived.version) + 1
        assert new.nonce not in (old.nonce, archived.nonce)
        with pytest.raises(VersionConflict):
            await manager.update(rid, Note(text="late"), expect=(old.version, old.nonce))


async def test_two_resources_may_swap_their_unique_values(programs, tmp_path):
    crud = programs("disk")
    manager = crud.resource_manager(Note)
    for rid, code in (("a", "x"), ("b", "y")):
        await manager.create(Note(text=rid, code=code), resource_id=rid)
    await export_all(crud.managers, tmp_path / "a.tar.gz")
    for rid, code in (("a", None), ("b", "x"), ("a", "y")):
        await manager.update(rid, Note(text=rid, code=code))
    (model,) = (await import_all(crud.managers, tmp_path / "a.tar.gz", on_conflict="replace")).models.values()
    assert (model.replaced, model.unique_conflicts) == (2, {})
    assert [(await manager.get(rid)).data.code for rid in "ab"] == ["x", "y"]


@pytest.mark.parametrize("empty", [True, False])
@pytest.mark.parametrize("kind", ["memory", "disk"])
async def test_resources_of_the_archive_that_share_a_unique_value(programs, tmp_path, kind, empty):
    """The archive may be of a program in which the field was not unique."""
    datas = [{"text": "x", "code": code} for code in ("same", "same", "other")]
    resources = [resource(rid, [data]) for rid, data in zip("abc", datas, strict=True)]
    await write(tmp_path / "a.tar.gz", {"note": Content(resources=resources)})
    crud = programs(kind)
    manager = crud.resource_manager(Note)
    if not empty:
        await manager.create(Note(text="mine"), resource_id="mine")
    before = await content(manager.storage)
    with pytest.raises(ImportConflict) as caught:
        await import_all(crud.managers, tmp_path / "a.tar.gz")
    assert caught.value.fields == {"code": 1}
    assert await content(manager.storage) == before
    (model,) = (await import_all(crud.managers, tmp_path / "a.tar.gz", on_conflict="skip")).models.values()
    assert model.unique_conflicts == {"code": 1}
    assert {"a", "c"} <= set((await content(manager.storage))["resources"]) <= {"a", "c", "mine"}


@pytest.mark.parametrize("encoding", Encoding)
async def test_bodies_keep_their_encoding(programs, tmp_path, encoding):
    crud, other = programs("memory", encoding=encoding), programs("disk", encoding=Encoding.json)
    await fill(crud.resource_manager(Note))
    await export_all(crud.managers, tmp_path / "a.tar.gz")
    await import_all(other.managers, tmp_path / "a.tar.gz")
    expected = await content(crud.resource_manager(Note).storage)
    assert await content(other.resource_manager(Note).storage) == expected
    metas = [meta async for meta in other.resource_manager(Note).storage.scan()]
    assert {meta.encoding for meta in metas} == {encoding}


async def test_a_damaged_archive_changes_nothing(programs, archive):
    crud = programs("disk")
    text = bytearray(archive.read_bytes())
    text[len(text) // 2] ^= 1
    archive.write_bytes(text)
    with pytest.raises(BadArchive):
        await import_all(crud.managers, archive)
    assert await content(crud.resource_manager(Note).storage) == {"resources": {}, "keys": {}}


async def chunks_of(text: bytes):
    for start in range(0, len(text), 1000):
        yield text[start : start + 1000]


async def test_streams_are_copied_to_disk_first(programs, archive, tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr("tempfile.tempdir", None)
    text, expected = archive.read_bytes(), None
    for source in (archive, str(archive), io.BytesIO(text), chunks_of(text)):
        crud = programs("memory")
        await import_all(crud.managers, source)
        found = await content(crud.resource_manager(Note).storage)
        expected = expected or found
        assert found == expected
        assert found["resources"]
        assert list((tmp_path / "temporary").iterdir()) == []


async def test_models_and_options_that_cannot_be(programs, archive, tmp_path):
    crud = programs("disk")
    with pytest.raises(InvalidData, match="there is no model 'other'"):
        await import_all(crud.managers, archive, models=["other"])
    with pytest.raises(InvalidData, match="fail, skip or replace"):
        await import_all(crud.managers, archive, on_conflict="other")
    with pytest.raises(InvalidData, match="both"):
        await import_all(crud.managers, archive, resume=True, abort=True)
    with pytest.raises(NoSuchImport):
        await import_all(crud.managers, archive, resume=True)
    with pytest.raises(NoSuchImport):
        await import_all(crud.managers, archive, abort=True)
    with pytest.raises(BadArchive, match="another one"):
        await import_all(crud.managers, archive, sha256="0" * 64)
    await write(
        tmp_path / "b.tar.gz", {"unknown": Content(), "note": Content(resources=[resource("a", [{"text": ""}])])}
    )
    with pytest.raises(InvalidData, match="'unknown', which this program does not have"):
        await import_all(crud.managers, tmp_path / "b.tar.gz")
    assert await content(crud.resource_manager(Note).storage) == {"resources": {}, "keys": {}}
    await import_all(crud.managers, tmp_path / "b.tar.gz", models=["note"])


async def test_a_store_without_a_journal_is_asked_for(programs, archive):
    crud = programs("custom")
    manager = crud.resource_manager(Note)
    await manager.create(Note(text="mine"), resource_id="mine")
    with pytest.raises(ConfigError, match="keeps no journal"):
        await import_all(crud.managers, archive)
    (model,) = (await import_all(crud.managers, archive, without_journal=True)).models.values()
    assert model.created == len((await content(manager.storage, keys=False))["resources"]) - 1


@pytest.mark.parametrize("kind", ["memory", "disk", "s3-sqlite", "memory-disk"])
async def test_large_resources_are_imported_in_pieces(programs, tmp_path, monkeypatch, kind):
    for module in (survey, pieces):
        monkeypatch.setattr(module, "LARGE_REVISIONS", 3)
    datas = [{"text": f"revision {number}", "code": "c"} for number in range(20)]
    large = [resource("large", datas, current=current) for current in (0, 7, 19)]
    for number, one in enumerate(large):
        crud = programs(kind)
        manager = crud.resource_manager(Note)
        others = [resource(rid, [{"text": rid}]) for rid in ("a", "z")]
        await write(tmp_path / f"{number}.tar.gz", {"note": Content(resources=[others[0], one, others[1]])})
        if number == 1:
            await manager.create(Note(text="mine"), resource_id="mine")
        await import_all(crud.managers, tmp_path / f"{number}.tar.gz")
        records = (await content(manager.storage))["resources"]["large"][1]
        assert [record["revision"] for record, _ in records] == list(range(20, 0, -1))
        assert [body for _, body in reversed(records)] == [body for _, body in one[1]]
        assert (await manager.get("large")).data.text == datas[one[0].revision - 1]["text"]


@pytest.mark.parametrize("kind", JOURNALLED)
async def test_a_second_import_is_refused_by_name(programs, archive, kind):
    crud = programs(kind)
    manager = crud.resource_manager(Note)
    await manager.create(Note(text="mine"), resource_id="mine")
    journal, began = manager.storage.import_journal, asyncio.Event()
    release = asyncio.Event()
    commit = manager.storage.commit

    async def slow_commit(*arguments: Any) -> Any:
        began.set()
        await release.wait()
        return await commit(*arguments)

    manager.storage.commit = slow_commit
    first = asyncio.create_task(import_all(crud.managers, archive))
    await began.wait()
    with pytest.raises(ImportUnfinished, match="'note'"):
        await import_all(crud.managers, archive, on_conflict="skip")
    assert await journal.state() is not None
    release.set()
    await first
    assert await journal.state() is None


class Killed(Exception):
    """Stands for the end of the process."""


def stop_after(monkeypatch: pytest.MonkeyPatch, storage: Any, commits: int) -> None:
    """Let the storage fail at a commit as if the process was killed: either before the commit or after it."""
    commit, left = storage.commit, [commits]

    async def counted(writes: Any, once: Any = None) -> Any:
        left[0] -= 1
        if left[0] == -1:
            raise Killed
        done = await commit(writes, once)
        if left[0] == 0 and commits % 2:
            raise Killed
        return done

    monkeypatch.setattr(storage, "commit", counted)


@pytest.mark.parametrize("commits", range(8))
@pytest.mark.parametrize("end", ["resume", "abort", "abort twice"])
@pytest.mark.parametrize("kind", ["memory", "disk", "memory-disk", "s3-sqlite"])
async def test_an_interrupted_import_is_resumed_or_taken_back(programs, archive, monkeypatch, kind, commits, end):
    monkeypatch.setattr(pieces, "BATCH", 3)
    monkeypatch.setattr(batched_import, "NOTE_EVERY", 2)
    source = programs("memory")
    await import_all(source.managers, archive)
    expected = await content(source.resource_manager(Note).storage, states=False, keys=False)
    crud = programs(kind)
    manager = crud.resource_manager(Note)
    await manager.create(Note(text="mine", code="mine"), resource_id="n00001")
    await manager.update("n00001", Note(text="mine 2", code="mine"))
    await manager.create(Note(text="other"), resource_id="other")
    before = await content(manager.storage, states=False, keys=False)
    version = (await manager.meta("n00001")).version
    with monkeypatch.context() as patch:
        stop_after(patch, manager.storage, commits)
        with pytest.raises(Killed):
            await import_all(crud.managers, archive, on_conflict="replace")
    if commits == 0:
        assert (await manager.storage.import_journal.state()) is not None
    await manager.maintain(10)
    await manager.maintain(10)
    with pytest.raises(ImportUnfinished):
        await import_all(crud.managers, archive, on_conflict="skip")
    state = await manager.storage.import_journal.state()
    if end == "resume":
        await import_all(crud.managers, archive, resume=True)
        found = await content(manager.storage, states=False, keys=False)
        assert found["resources"].pop("other") == before["resources"]["other"]
        assert found == expected
    else:
        if end == "abort twice":
            with monkeypatch.context() as patch:
                stop_after(patch, manager.storage, 1)
                with contextlib.suppress(Killed):
                    await import_all(crud.managers, archive, abort=True)
                    await manager.storage.import_journal.begin(state)  # there was nothing to take back
        (model,) = (await import_all(crud.managers, archive, abort=True)).models.values()
        assert model.not_taken_back == 0
        assert await content(manager.storage, states=False, keys=False) == before
        assert (await manager.meta("n00001")).version >= version
    assert await manager.storage.import_journal.state() is None
    await manager.maintain(10)
    await manager.update("n00001", Note(text="later", code="later"))


@pytest.mark.parametrize("kind", ["memory", "disk", "memory-disk", "s3-sqlite"])
async def test_an_abort_says_what_it_cannot_take_back(programs, archive, monkeypatch, kind):
    crud = programs(kind)
    manager = crud.resource_manager(Note)
    await manager.create(Note(text="mine"), resource_id="n00001")
    await manager.create(Note(text="mine"), resource_id="n00002")
    with monkeypatch.context() as patch:
        stop_after(patch, manager.storage, 1)
        with pytest.raises(Killed):
            await import_all(crud.managers, archive, on_conflict="replace")
    await manager.update("n00000", Note(text="changed since", code="new"))
    await manager.update("n00001", Note(text="changed since"))
    (model,) = (await import_all(crud.managers, archive, abort=True)).models.values()
    assert model.not_taken_back == 2
    assert model.ids == ["n00000", "n00001"]
    assert (await manager.get("n00000")).data.text == "changed since"
    assert (await manager.get("n00002", include_deleted=True)).data.text == "mine"
    assert sorted((await content(manager.storage))["resources"]) == ["n00000", "n00001", "n00002"]


@pytest.mark.parametrize("kind", ["memory", "disk", "memory-disk", "s3-sqlite"])
async def test_a_purge_removes_what_the_journal_keeps(programs, archive, monkeypatch, kind):
    crud = programs(kind)
    manager = crud.resource_manager(Note)
    old = await manager.create(Note(text="secret"), resource_id="n00001")
    with monkeypatch.context() as patch:
        stop_after(patch, manager.storage, 1)
        with pytest.raises(Killed):
            await import_all(crud.managers, archive, on_conflict="replace")
    storage = manager.storage
    assert await storage.bodies([old.meta.uid])
    assert await storage.import_journal.kept_records("n00001")
    await manager.purge("n00001")
    assert await storage.import_journal.kept_records("n00001") == []
    with pytest.raises(Exception, match="missing"):
        await storage.bodies([old.meta.uid])
    (model,) = (await import_all(crud.managers, archive, abort=True)).models.values()
    assert model.not_taken_back == 0
    assert (await content(manager.storage))["resources"] == {}


async def test_the_bodies_of_replaced_resources_go_when_the_import_ends(programs, archive):
    crud = programs("disk")
    manager = crud.resource_manager(Note)
    old = await manager.create(Note(text="old"), resource_id="n00001")
    await import_all(crud.managers, archive, on_conflict="replace")
    for _ in range(4):
        await manager.maintain(10)
    with pytest.raises(Exception, match="missing"):
        await manager.storage.bodies([old.meta.uid])


async def test_a_conflict_that_appears_later_stops_the_import(programs, archive, monkeypatch):
    """With `fail`, a resource that another writer creates meanwhile is not overwritten."""
    monkeypatch.setattr(pieces, "BATCH", 3)
    crud = programs("disk")
    manager = crud.resource_manager(Note)
    await manager.create(Note(text="mine"), resource_id="mine")
    commit, first = manager.storage.commit, True

    async def racing(writes: Any, once: Any = None) -> Any:
        nonlocal first
        if first:
            first = False
            await manager.create(Note(text="faster"), resource_id="n00007")
        return await commit(writes, once)

    with monkeypatch.context() as patch:
        patch.setattr(manager.storage, "commit", racing)
        with pytest.raises(ImportConflict):
            await import_all(crud.managers, archive)
    assert (await manager.get("n00007")).data.text == "faster"
    (model,) = (await import_all(crud.managers, archive, abort=True)).models.values()
    assert model.not_taken_back in (0, 1)
    assert sorted((await content(manager.storage))["resources"]) == ["mine", "n00007"]


async def test_progress_is_told(programs, archive):
    told: list[tuple[int, int | None, str]] = []
    crud = programs("disk")
    await import_all(crud.managers, archive, progress=lambda *one: told.append(one))
    size = archive.stat().st_size
    assert (size, size, "verify") in told
    resources = len((await content(crud.resource_manager(Note).storage))["resources"])
    assert told[-1] == (resources, resources, "note")


def test_indexed_fields_of_the_tests_are_those_of_the_model():
    assert isinstance(INDEXED[1], IndexedField)
    assert replace(Note(text="x"), number=1).number == 1
