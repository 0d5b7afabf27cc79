"""Imports that fail: before anything is visible they leave nothing, and later they say how much is imported."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from app.autocrud import AutoCRUD
from app.autocrud.backup import batched_import, importing, pieces
from app.autocrud.backup.errors import ImportConflict, ImportIncomplete
from app.autocrud.backup.importing import import_all
from app.autocrud.backup.option_names import PARAMETERS, options_named
from app.autocrud.errors import ConfigError, InvalidData, ModelNotEmpty, OutcomeUnknown, StoreDamaged, StoreUnavailable
from app.autocrud.resource_manager.runtime.disk_space import DiskFull
from tests.small_disk import small_disk

from .archives import Content, blob, resource, write
from .imports import KINDS as MADE
from .imports import Note, Place, program
from .test_importing import programs

__all__ = ["programs"]

KINDS = ("memory", "disk", "memory-disk", "s3-sqlite", "memory-s3")


@pytest.fixture
async def archive(tmp_path: Path) -> Path:
    """An archive of 30 resources, each with a body and a file of 100 KB."""
    blobs = [blob(os.urandom(100_000)) for _ in range(30)]
    resources = [
        resource(f"n{at:02}", [{"text": os.urandom(50_000).hex()}], blobs=[[row.key]])
        for at, (row, _) in enumerate(blobs)
    ]
    blobs.sort(key=lambda one: one[0].key)
    await write(tmp_path / "a.tar.gz", {"note": Content(resources=resources, blobs=blobs)})
    return tmp_path / "a.tar.gz"


def files_of(storage: Any, place: Place) -> int:
    """Return how many files of resources are stored."""
    on_disk = sum(re.fullmatch("[0-9a-f]{64}", path.parent.name) is not None for path in place.directory.rglob("*"))
    objects = sum("/blobs/" in key and len(key) > 100 for key in place.s3["object_store"].objects)
    return on_disk + objects + len(getattr(storage.blob_store, "_blobs", ()))


async def bodies_of(storage: Any, uids: list[str]) -> int:
    """Return how many of these bodies are stored."""
    found = 0
    for uid in uids:
        with contextlib.suppress(StoreDamaged):
            await storage.resource_store.get_many([uid])
            found += 1
    return found


async def fail(*_: object, **__: object) -> None:
    raise StoreUnavailable("the store is down")


@pytest.mark.parametrize("when", ["a file", "bodies", "publish", "cancelled"])
@pytest.mark.parametrize("kind", KINDS)
async def test_a_failed_load_leaves_no_bodies_and_files(programs, tmp_path, monkeypatch, archive, kind, when):
    monkeypatch.setattr(pieces, "BATCH", 3)
    place = Place(tmp_path / "data")
    crud = programs(kind, place)
    manager = crud.resource_manager(Note)
    await manager.open()
    storage: Any = manager.storage
    uids: list[str] = []
    calls, put, store = 0, storage.put_bodies, storage.blob_store.receive

    async def put_bodies(bodies: Any) -> None:
        nonlocal calls
        calls += 1
        uids.extend(record.uid for record, _ in bodies)
        if calls == 7 and when == "bodies":
            await fail()
        if calls == 7 and when == "cancelled":
            task.cancel()
        if calls == 7 and when == "publish":
            await manager.create(Note(text="faster"), resource_id="mine")
        await put(bodies)

    def receive() -> Any:
        nonlocal calls
        calls += when == "a file"
        if calls >= 17 and when == "a file":
            raise StoreUnavailable("the store is down")
        return store()

    with monkeypatch.context() as patch:
        patch.setattr(storage, "put_bodies", put_bodies)
        patch.setattr(storage.blob_store, "receive", receive)
        task = asyncio.create_task(import_all(crud.managers, archive))
        expected = {"publish": ModelNotEmpty, "cancelled": asyncio.CancelledError}.get(when, StoreUnavailable)
        with pytest.raises(expected):
            await task
    assert calls >= 7
    assert (files_of(storage, place), await bodies_of(storage, uids)) == (0, 0)
    assert [meta.resource_id async for meta in storage.scan()] == (["mine"] if when == "publish" else [])
    if when == "publish":
        await manager.purge("mine")
    (model,) = (await import_all(crud.managers, archive)).models.values()
    assert (model.created, model.blobs) == (30, 30)
    assert files_of(storage, place) == 30


async def test_a_clean_up_that_fails_hides_no_error(programs, monkeypatch, archive, caplog):
    crud = programs("disk")
    storage: Any = crud.resource_manager(Note).storage
    await crud.resource_manager(Note).open()
    monkeypatch.setattr(storage.resource_store, "delete", fail)

    async def put_bodies(_: Any) -> None:
        raise StoreUnavailable("the first error")

    monkeypatch.setattr(storage, "put_bodies", put_bodies)
    with pytest.raises(StoreUnavailable, match="the first error"):
        await import_all(crud.managers, archive)
    assert "bodies and files of the failed import stay until the next sweep: the store is down" in caplog.text


@pytest.mark.parametrize("kind", ["memory", "disk"])
async def test_nothing_is_removed_if_the_load_may_be_visible(programs, tmp_path, monkeypatch, archive, kind):
    place = Place(tmp_path / "data")
    crud = programs(kind, place)
    manager = crud.resource_manager(Note)
    await manager.open()
    loading = manager.storage.loading
    load = loading.load

    @contextlib.asynccontextmanager
    async def loader(*arguments: Any, **options: Any) -> AsyncIterator[Any]:
        async with load(*arguments, **options) as found:
            publish = found.publish

            async def unknown() -> None:
                await publish()
                raise OutcomeUnknown("no answer")

            found.publish = unknown
            yield found

    monkeypatch.setattr(type(manager.storage), "loading", SimpleNamespace(load=loader))
    with pytest.raises(OutcomeUnknown):
        await import_all(crud.managers, archive)
    assert len((await manager.get("n29")).data.text) == 100_000
    assert files_of(manager.storage, place) == 30


async def test_a_full_disk_is_empty_after_the_failure(tmp_path, archive, monkeypatch):
    """Another program takes the space after it was looked at."""
    monkeypatch.setattr(importing, "check_space", lambda *_: None)
    with small_disk(tmp_path / "disk", 5) as directory:
        crud = program("disk", Place(directory / "data"))
        await crud.resource_manager(Note).open()
        before = os.statvfs(directory).f_bavail
        with pytest.raises(DiskFull):
            await import_all(crud.managers, archive)
        left = os.statvfs(directory)
        assert (before - left.f_bavail) * left.f_frsize < 500_000
        await crud.close()


async def test_a_pack_that_a_sweep_removed_says_nothing_about_the_server(programs, tmp_path, monkeypatch):
    """The process was suspended for longer than PIN_LIFE_S before it read the pack."""
    place = Place(tmp_path / "data")
    crud, objects = programs("s3-sqlite", place), place.s3["object_store"]
    await write(tmp_path / "a.tar.gz", {"note": Content(resources=[resource("a", [{"text": "1"}])])})

    async def get_range(key: str, _start: int, _end: int) -> bytes | None:
        await objects.delete([key])
        return None

    monkeypatch.setattr(objects, "get_range", get_range)
    with pytest.raises(StoreUnavailable, match="a sweep removed bodies of this import"):
        await import_all(crud.managers, tmp_path / "a.tar.gz")


NAMES = ("first", "second", "third")


@pytest.fixture
async def models(tmp_path: Path, request: pytest.FixtureRequest) -> AutoCRUD:
    """A program with three models, of which the second one has data."""
    crud = AutoCRUD(storage_factory=MADE[getattr(request, "param", "disk")](Place(tmp_path / "models")))
    for name in NAMES:
        crud.add_model(Note, name=name, indexed_fields=["text"])
    await crud.managers["second"].create(Note(text="mine"), resource_id="mine")
    yield crud
    await crud.close()


@pytest.fixture
async def archive_of_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An archive of these models. Its resources are imported in batches of three, unless a model is empty."""
    monkeypatch.setattr(pieces, "BATCH", 3)
    monkeypatch.setattr(batched_import, "ATTEMPTS", 1)
    resources = [resource(f"n{number}", [{"text": "t"}]) for number in range(9)]
    await write(tmp_path / "m.tar.gz", {name: Content(resources=resources) for name in NAMES})
    return tmp_path / "m.tar.gz"


def refused_at(patch: pytest.MonkeyPatch, crud: AutoCRUD, number: int, error: Exception) -> None:
    """Let a commit of the second model fail."""
    storage, count = crud.managers["second"].storage, 0
    commit = storage.commit

    async def refused(writes: Any, once: Any = None) -> Any:
        nonlocal count
        count += 1
        if count == number:
            raise error
        return await commit(writes, once)

    patch.setattr(storage, "commit", refused)


DONE = {
    1: "imported: 'first'; not imported: 'second', 'third'",
    2: "imported: 'first'; imported in part: 'second'; not imported: 'third'",
}
ADVICE = "import that archive with --resume to continue, or with --abort to take it back"
FAILURES = {
    "unavailable": (StoreUnavailable("the store is down; nothing was changed, try again"), "the store is down"),
    "invalid": (InvalidData("the store cannot hold this"), "the store cannot hold this"),
    "settings": (ConfigError("the store is of a newer program"), "the store is of a newer program"),
}


@pytest.mark.parametrize("number", DONE)
@pytest.mark.parametrize("failure", FAILURES)
async def test_a_failure_says_how_much_is_imported(models, archive_of_models, monkeypatch, failure, number):
    error, cause = FAILURES[failure]
    with monkeypatch.context() as patch:
        refused_at(patch, models, number, type(error)(error.detail))
        expected = StoreUnavailable if failure == "unavailable" else ImportIncomplete
        with pytest.raises(expected) as caught:
            await import_all(models.managers, archive_of_models)
    assert not isinstance(caught.value, (InvalidData, ConfigError)), "these say that nothing was changed"
    assert caught.value.detail == f"{cause}; {DONE[number]}; {ADVICE}"
    with monkeypatch.context() as patch:
        refused_at(patch, models, 1, type(error)(error.detail))
        with pytest.raises(expected) as caught:
            await import_all(models.managers, archive_of_models, resume=True)
    assert caught.value.detail == f"{cause}; {DONE[2]}; {ADVICE}"
    with monkeypatch.context() as patch:
        refused_at(patch, models, 1, type(error)(error.detail))
        if number == 2 and failure == "unavailable":
            with pytest.raises(
                StoreUnavailable, match="is not taken back completely: import that archive with --abort again"
            ):
                await import_all(models.managers, archive_of_models, abort=True)
    await import_all(models.managers, archive_of_models, abort=True)
    assert [[meta.resource_id async for meta in models.managers[name].storage.scan()] for name in NAMES] == [
        [],
        ["mine"],
        [],
    ]


@pytest.mark.parametrize("failure", FAILURES)
async def test_a_failure_that_cannot_be_taken_back_says_so(models, archive_of_models, monkeypatch, failure):
    error, cause = FAILURES[failure]
    refused_at(monkeypatch, models, 2, type(error)(error.detail))
    monkeypatch.setattr(importing._Import, "_take_back", fail)
    with pytest.raises(StoreUnavailable if failure == "unavailable" else ImportIncomplete) as caught:
        await import_all(models.managers, archive_of_models, undo=True)
    left = "a part is imported, and could not be taken back (the store is down)"
    assert caught.value.detail == f"{cause}; {left}: {ADVICE}"


async def test_a_failure_names_the_parameters_of_a_request(models, archive_of_models, monkeypatch):
    refused_at(monkeypatch, models, 2, StoreUnavailable("the store is down"))
    with (
        options_named(PARAMETERS),
        pytest.raises(StoreUnavailable, match="with resume=true to continue, or with abort="),
    ):
        await import_all(models.managers, archive_of_models)


async def test_a_conflict_that_appears_later_says_how_much_is_imported(models, archive_of_models, monkeypatch):
    storage, states = models.managers["second"].storage, importing.check_conflicts

    async def check_conflicts(checked: Any, *arguments: Any) -> None:
        await states(checked, *arguments)
        if checked is storage:
            await models.managers["second"].create(Note(text="faster"), resource_id="n4")

    monkeypatch.setattr(importing, "check_conflicts", check_conflicts)
    with pytest.raises(ImportConflict) as caught:
        await import_all(models.managers, archive_of_models)
    assert caught.value.detail == (
        f"1 resources of the archive have ids that the model has already, among them 'n4'; {DONE[2]}; continue with"
        " --resume and --on-conflict skip or replace, or take it back with --abort"
    )


@pytest.mark.parametrize("models", ["custom"], indirect=True)
async def test_a_failure_in_a_store_without_a_journal_says_that_all_stays(models, archive_of_models, monkeypatch):
    refused_at(monkeypatch, models, 2, StoreUnavailable("the store is down"))
    with pytest.raises(StoreUnavailable) as caught:
        await import_all(models.managers, archive_of_models, without_journal=True)
    assert caught.value.detail == (
        f"the store is down; {DONE[2]}; the stores of 'first', 'second', 'third' keep no journal, so what is imported"
        " there stays: import that archive with --on-conflict skip to continue"
    )


async def test_an_import_that_is_stopped_says_how_much_is_imported(models, archive_of_models, caplog):
    def stop(done: int, _: int | None, what: str) -> None:
        if (done, what) == (3, "second"):
            raise asyncio.CancelledError

    with pytest.raises(asyncio.CancelledError):
        await import_all(models.managers, archive_of_models, progress=stop)
    assert f"the import has stopped; {DONE[2]}; {ADVICE}" in caplog.text


async def test_a_write_into_an_empty_model_meanwhile_is_told_truly(programs, archive, monkeypatch):
    crud = programs("disk")
    manager = crud.resource_manager(Note)
    await manager.open()
    storage: Any = manager.storage
    put = storage.put_bodies

    async def put_bodies(bodies: Any) -> None:
        if not [one async for one in storage.scan()]:
            await manager.create(Note(text="faster"), resource_id="mine")
        await put(bodies)

    with monkeypatch.context() as patch:
        patch.setattr(storage, "put_bodies", put_bodies)
        with pytest.raises(ModelNotEmpty, match="run the import again, which is done in batches then, or purge what"):
            await import_all(crud.managers, archive)
    (model,) = (await import_all(crud.managers, archive)).models.values()
    assert (model.created, model.in_one_step) == (30, False)
