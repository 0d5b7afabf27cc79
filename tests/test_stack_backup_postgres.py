"""The function for backups with a real PostgreSQL and S3: calls that end before the work is done, and what follows."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from msgspec import Struct

from app import backup_function, models, stack_backup
from app.autocrud import AutoCRUD, Blob
from app.autocrud.backup import batched_import, pieces
from app.autocrud.resource_manager.engine.operations import Create
from app.autocrud.secret import Secret
from app.main import create_app
from tests.backup.exports import read
from tests.backup.imports import content
from tests.stack_double import Lambda, Stacks

pytestmark = pytest.mark.slow

COUNT = 60


class Album(Struct):
    title: str
    photos: list[Blob] = []


class Note(Struct):
    text: str


def register(crud: AutoCRUD) -> None:
    crud.add_model(Album, indexed_fields=["title"])
    crud.add_model(Note)


@pytest.fixture
def stacks(ministack_s3, monkeypatch):
    monkeypatch.setattr(models, "register", register)
    made = Stacks(ministack_s3, monkeypatch)
    yield made
    made.close()


class Stack:
    """A stack with its data in PostgreSQL, whose servers the tests reach too."""

    def __init__(self, stacks: Stacks, database: str, prefix: str) -> None:
        self.given, self.function = stacks.make(prefix, "postgres-s3", pg_dsn=Secret(database))
        self.crud: AutoCRUD = create_app(self.function.settings).state.crud
        self.albums, self.notes = self.crud.resource_manager(Album), self.crud.resource_manager(Note)

    async def fill(self) -> None:
        shared = await self.albums.upload(b"shared" * 1000)
        for start in range(0, COUNT, 20):
            made = []
            for number in range(start, start + 20):
                photos = [shared] if number % 3 else [shared, await self.albums.upload(f"photo {number}".encode())]
                made.append(Create(Album(f"album {number}", photos), f"a{number:03}"))
            await self.albums.batch(made)
        await self.notes.create(Note("one"), resource_id="n1")

    async def contents(self) -> dict[str, Any]:
        return {name: await content(manager.storage) for name, manager in self.crud.managers.items()}


@pytest.fixture
async def stack(stacks, database):
    made = Stack(stacks, database, "source")
    await made.fill()
    yield made
    await made.crud.close()


class Ticking:
    """A clock on which ten seconds pass each time when it is read."""

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        self.now += 10.0
        return self.now


@pytest.fixture
def slow(monkeypatch) -> None:
    """Let all work of the function take long, by its clock."""
    monkeypatch.setattr(backup_function, "time", Ticking())


def exports(function: Lambda) -> list[str]:
    return [event["after"] for event in function.events if event["crudstack"] == "export"]


def without_keys_of_files(found: dict[str, Any]) -> dict[str, Any]:
    """Leave out the keys of files, which are new after an import."""
    for meta, records in found["album"]["resources"].values():
        assert meta
        for record, _ in records:
            record["blobs"] = [key.partition("/")[0] for key in record.get("blobs", ())]
    return found


async def test_a_stack_is_exported_and_imported(stacks, stack, database, tmp_path):
    result = await stack_backup.export_stack(stack.given, tmp_path / "x.tar.gz")
    assert [(one.name, one.one_moment, one.resources, one.blobs) for one in result.models] == [
        ("album", True, COUNT, 1 + COUNT // 3),
        ("note", True, 1, 0),
    ]
    assert exports(stack.function) == ["", ""]
    other = Stack(stacks, database, "target")
    told: list[Any] = []
    imported = await stack_backup.import_stack(other.given, tmp_path / "x.tar.gz", surveyed=told.append)
    assert (imported.models["album"].created, imported.models["album"].blobs) == (COUNT, 1 + COUNT // 3)
    assert (told[0]["album"].resources, told[0]["album"].not_fitting) == (COUNT, 0)
    assert without_keys_of_files(await other.contents()) == without_keys_of_files(await stack.contents())
    (ref,) = (await other.albums.get("a001")).data.photos
    photo = await other.albums.blob("a001", ref.sha256)
    assert b"".join([chunk async for chunk in photo.read()]) == b"shared" * 1000
    await other.crud.close()
    assert stacks.keys() == []


@pytest.mark.usefixtures("slow")
async def test_a_model_that_takes_longer_than_a_call_fails_with_its_estimate(stacks, stack, tmp_path, monkeypatch):
    monkeypatch.setattr("app.autocrud.backup.exporting.READ_AT_ONCE", 1)
    stack.function.seconds = 300
    with pytest.raises(stack_backup.OutOfTime) as failed:
        await stack_backup.export_stack(stack.given, tmp_path / "x.tar.gz", models=["album"])
    told = str(failed.value)
    assert told.startswith("the export of 'album' takes about "), told
    assert told.endswith(
        " minutes, and the function may run for 5 minutes: use --per-resource, or export from a machine that reaches"
        " the database"
    ), told
    assert [path.name for path in tmp_path.iterdir()] == []
    assert stacks.keys() == []


@pytest.mark.usefixtures("slow")
async def test_a_long_model_is_continued_by_further_calls(stacks, stack, tmp_path):
    stack.function.seconds = 600
    call, calls = stack.function.call, []

    def written_between(event: dict[str, Any]) -> bytes:
        """Change resources before the second call: those that are exported, and those that are not yet."""
        if event["crudstack"] == "export" and len(calls) == 1:

            async def change() -> None:
                other = create_app(stack.function.settings).state.crud
                albums = other.resource_manager(Album)
                await albums.purge("a000")
                await albums.purge(f"a{COUNT - 1:03}")
                await albums.update("a001", Album("changed"))
                await albums.update(f"a{COUNT - 2:03}", Album("changed"))
                await other.close()

            asyncio.run(change())
        if event["crudstack"] == "export":
            calls.append(event["after"])
        return call(event)

    stack.function.call = written_between
    path = tmp_path / "x.tar.gz"
    result = await stack_backup.export_stack(stack.given, path, models=["album"], each_resource=True)
    assert len(calls) > 2
    assert calls == sorted(set(calls)), "each call goes on where the one before ended"
    found = read(path, "album")
    assert list(found.resources) == [f"a{number:03}" for number in range(COUNT - 1)]
    titles = {name: records[-1][1] for name, (_, records) in found.resources.items()}
    assert b"album 1" in titles["a001"]
    assert b"changed" in titles[f"a{COUNT - 2:03}"]
    model = found.entry
    assert (model.one_moment, model.absent, model.resources, model.blobs) == (False, (), COUNT - 1, 1 + COUNT // 3)
    assert result.models[0].one_moment is False
    assert (result.models[0].resources, result.models[0].blobs) == (COUNT - 1, 1 + COUNT // 3)
    assert stacks.keys() == []


class Cuts:
    """Ends the time of the function in the commits of an import with these numbers."""

    def __init__(self, function: Lambda, monkeypatch: pytest.MonkeyPatch, *numbers: int) -> None:
        self._limit: asyncio.Timeout | None = None
        self._commits, self._numbers = 0, numbers
        timeout, handler = asyncio.timeout, function.handler
        storage = handler._crud.managers["album"].storage
        commit = storage.commit

        def noted(seconds: float | None) -> asyncio.Timeout:
            limit = timeout(seconds)
            if seconds is not None and seconds > 800:
                self._limit = limit
            return limit

        async def counted(*arguments: Any) -> Any:
            self._commits += 1
            if self._commits in self._numbers:
                assert self._limit is not None
                self._limit.reschedule(asyncio.get_running_loop().time())
                await asyncio.sleep(3600)
            return await commit(*arguments)

        monkeypatch.setattr(backup_function.asyncio, "timeout", noted)
        monkeypatch.setattr(storage, "commit", counted)


@pytest.fixture
async def target(stacks, database, monkeypatch):
    """Return a stack with data, so that an import into it is made in batches."""
    monkeypatch.setattr(pieces, "BATCH", 10)
    monkeypatch.setattr(batched_import, "NOTE_EVERY", 1)
    made = Stack(stacks, database, "target")
    await made.albums.create(Album("mine"), resource_id="mine")
    yield made
    await made.crud.close()


async def test_an_import_that_takes_longer_than_a_call_is_continued(stack, target, tmp_path, monkeypatch):
    await stack_backup.export_stack(stack.given, tmp_path / "x.tar.gz")
    Cuts(target.function, monkeypatch, 3, 5)
    result = await stack_backup.import_stack(target.given, tmp_path / "x.tar.gz")
    assert [event.get("resume") for event in target.function.events] == [None, False, True, True]
    assert result.models["note"].created == 1
    found = await target.contents()
    assert len(found["album"]["resources"]) == COUNT + 1
    assert (await target.albums.get("a059")).data.title == "album 59"
    with pytest.raises(stack_backup.BackupFailed, match="have ids that the model has already"):
        await stack_backup.import_stack(target.given, tmp_path / "x.tar.gz")


async def test_an_import_that_gets_no_further_fails_and_can_be_taken_back(stack, target, tmp_path, monkeypatch):
    await stack_backup.export_stack(stack.given, tmp_path / "x.tar.gz")
    before = await target.contents()
    Cuts(target.function, monkeypatch, 3, 4)
    late = r"takes longer than the 15 minutes that .*: continue by --resume, or import from a machine"
    with pytest.raises(stack_backup.OutOfTime, match=late):
        await stack_backup.import_stack(target.given, tmp_path / "x.tar.gz")
    assert len((await target.contents())["album"]["resources"]) > 1
    await stack_backup.import_stack(target.given, tmp_path / "x.tar.gz", abort=True)
    assert await target.contents() == before
