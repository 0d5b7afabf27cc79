"""Stores of every kind that earlier commits wrote open with the same content. `old_stores` made them."""

from __future__ import annotations

import contextlib
import tarfile
from pathlib import Path
from unittest import mock

import pytest
from msgspec import Struct

from app import settings
from app.autocrud import AutoCRUD, Encoding, Query, field
from app.autocrud.backup.exporting import export_all
from app.autocrud.errors import ConfigError, MetadataTooLarge, UniqueConflict
from app.autocrud.resource_manager.engine import planning
from tests.stores.old_stores import (
    IMPORTED,
    INDEXED,
    KINDS,
    LONG_ID,
    LONG_NAME,
    MANY,
    OF_FACTORIES,
    OF_KINDS,
    Note,
    Servers,
    content,
    former,
    large_searches,
    long_of,
    program,
    unpack,
)
from tests.valkey import Valkey

OLD = Path(__file__).with_name("old")
OLD_LARGE = Path(__file__).with_name("old_large")
OLD_IMPORTED = Path(__file__).with_name("old_imported")
FILES = sorted(path.relative_to(OLD).as_posix() for path in OLD.glob("*/*.tar.gz"))
IMPORTED_FILES = sorted(path.relative_to(OLD_IMPORTED).as_posix() for path in OLD_IMPORTED.glob("*/*.tar.gz"))
LARGE_FILES = sorted(path.relative_to(OLD_LARGE).as_posix() for path in OLD_LARGE.glob("*/*.tar.gz"))


WITHOUT_NAMED_KINDS = {"151ec8a", "b93afa7", "b9f5409"}
"""Commits whose stores were kept before those of named kinds and factories were."""


@pytest.mark.parametrize("files", [FILES, LARGE_FILES])
def test_there_is_one_of_every_kind(files: list[str]):
    commits = {name.partition("/")[0] for name in files}
    assert commits
    assert set(files) == {
        f"{commit}/{kind}.tar.gz"
        for commit in commits
        for kind in (KINDS if commit in WITHOUT_NAMED_KINDS else KINDS | OF_KINDS | OF_FACTORIES)
    }


def test_there_is_an_imported_one_of_each_kind_with_packs():
    commits = {name.partition("/")[0] for name in IMPORTED_FILES}
    assert set(IMPORTED_FILES) == {f"{commit}/{kind}.tar.gz" for commit in commits for kind in IMPORTED}
    assert commits


def test_every_kind_of_the_settings_was_written():
    named = {name.removeprefix("kind-") for name in OF_KINDS}
    assert set(settings.KINDS) - set(KINDS) - named == {"memory"}


@pytest.fixture
def servers(tmp_path: Path, database: str, request: pytest.FixtureRequest):
    directory = tmp_path / "valkey"
    directory.mkdir()
    valkey = Valkey(directory)
    valkey.start()
    disk = tmp_path / "disk"
    disk.mkdir()
    try:
        made = Servers(disk, database, valkey.url)
        name = request.node.callspec.params["name"]
        if "mq" in name or "full" in name:
            made.amqp_url = request.getfixturevalue("rabbitmq")
        yield made
    finally:
        valkey.stop()


@pytest.mark.parametrize("name", IMPORTED_FILES)
async def test_a_store_into_which_an_earlier_commit_imported(servers: Servers, name: str):
    with tarfile.open(OLD_IMPORTED / name) as tar:
        assert any(path.endswith(".pack") for path in tar.getnames())
    await check_old_store(servers, OLD_IMPORTED / name)


@pytest.mark.parametrize("name", FILES)
async def test_a_store_of_an_earlier_commit(servers: Servers, name: str):
    await check_old_store(servers, OLD / name)


class LaterNote(Struct):
    """A later version of Note, with other fields in another order."""

    number: float = 0
    more: list[str] = []
    text: str = ""


@pytest.mark.parametrize("model", [Note, LaterNote])
@pytest.mark.parametrize("name", [name for name in FILES if "msgpack" in name])
async def test_a_backup_of_an_earlier_store_in_messagepack_is_accepted(
    servers: Servers, tmp_path: Path, name: str, model: type
):
    """Its bodies have the hashes of their JSON, also if the model has changed since."""
    unpack(OLD / name, servers)
    manager = program(name.partition("/")[2].removesuffix(".tar.gz"), servers)
    await export_all({"note": manager}, tmp_path / "a.tar.gz")
    await manager.storage.close()
    crud = AutoCRUD(encoding=Encoding.msgpack)
    crud.add_model(model, name="note")
    assert (await crud.import_all(tmp_path / "a.tar.gz")).models["note"].created == 8
    await crud.close()


async def check_old_store(servers: Servers, path: Path) -> None:
    """Check that a store has the content that it had, and can be written to."""
    kind = path.name.removesuffix(".tar.gz")
    held = unpack(path, servers)
    assert len(held["resources"]) == 8
    for _ in range(2):  # the first start may add what an earlier program did not store
        manager = program(kind, servers)
        assert await content(manager) == held
        assert await manager.storage.degradations() == []
        await manager.storage.maintain(10)
        assert await content(manager) == held
        with pytest.raises(UniqueConflict):
            await manager.create(Note(text="", code="c5"))
        await manager.storage.close()
    manager = program(kind, servers)
    await manager.update("n5", Note(text="new", code="c4"))
    await manager.create(Note(text="new", code="c5"))
    assert await manager.count(Query(where=field("text").eq("new"))) == 2
    await manager.storage.close()
    manager = program(kind, servers)
    assert await manager.count(Query(where=field("text").eq("new"))) == 2
    await manager.storage.close()


@pytest.mark.parametrize("name", LARGE_FILES)
async def test_a_store_of_an_earlier_commit_with_larger_values_than_the_limits(servers: Servers, name: str):
    kind = Path(name).name.removesuffix(".tar.gz")
    held = unpack(OLD_LARGE / name, servers)
    assert len(held["resources"]) == 9
    searches, long = large_searches(kind), long_of(kind)
    for _ in range(2):
        manager = program(kind, servers)
        assert await content(manager, searches) == held
        assert await manager.storage.degradations() == []
        await manager.storage.maintain(10)
        assert await content(manager, searches) == held
        await manager.storage.close()
    manager = program(kind, servers)
    # Values that are too large may stay as they are while other fields change, and may become smaller.
    for resource_id in ("text", "code", "many", LONG_ID, "name", "nul"):
        await manager.patch(resource_id, lambda tree: tree | {"number": 1})
    await manager.patch("text", lambda tree: tree | {"text": long[1:]})
    await manager.patch("many", lambda tree: tree | {"tags": MANY[1:]})
    await manager.modify("draft", Note(text=long, number=1))
    await manager.publish("draft")
    await manager.restore("deleted")
    await manager.switch("former", 1)
    assert await manager.count(Query(where=field("number").eq(1))) == 7
    assert await manager.count(Query(where=field("text").eq(long))) == 3
    assert (await manager.get("name")).meta.created_by == LONG_NAME
    with mock.patch.object(planning, "may_exceed", return_value=False), pytest.raises(UniqueConflict):
        await manager.create(Note(text="", code=long))
    for resource_id, worse in (("text", {"text": long}), ("code", {"text": "y" * 2000}), ("many", {"tags": MANY})):
        with pytest.raises(MetadataTooLarge):
            await manager.patch(resource_id, lambda tree, worse=worse: tree | worse)
    with pytest.raises(MetadataTooLarge):
        await manager.create(Note(text=long))
    await manager.purge("text")
    await manager.storage.close()
    manager = program(kind, servers)
    assert await manager.count(Query(where=field("number").eq(1))) == 6
    await manager.storage.close()


IN_FORMER_LAYOUT = [name for name in FILES if "/factory-" in name]


@pytest.mark.parametrize("name", IN_FORMER_LAYOUT)
async def test_a_store_in_the_former_layout_is_refused_by_name(servers: Servers, name: str):
    """The refused opening changes nothing, and the store opens with the argument that the error names."""
    kind = Path(name).name.removesuffix(".tar.gz")
    held = unpack(OLD / name, servers)
    objects = {key: found.body for key, found in servers.objects.objects.items()}
    crud = AutoCRUD(storage_factory=former(kind, servers, "refuse"))
    manager = crud.add_model(Note, indexed_fields=INDEXED)
    for use in (manager.open, manager.count, lambda: manager.create(Note(text="new")), lambda: crud.maintain(10)):
        with contextlib.suppress(ConfigError):
            await use()
    with pytest.raises(ConfigError) as refused:
        await manager.open()
    before, now = "the tables meta_note", "the tables meta_team/note"
    if "cached" in kind:
        before, now = "team/note/index.sqlite", "team/meta/note.sqlite"
    assert str(refused.value) == (
        f"{type(former(kind, servers, 'refuse')).__name__}: the store of the model 'note' was written by an earlier"
        f" release, with its metadata in {before}; now they are expected in {now}, where nothing is. Give the factory"
        " former_layout='open' to go on with that store"
    )
    await crud.close()
    assert {key: found.body for key, found in servers.objects.objects.items()} == objects
    manager = program(kind, servers)
    assert await content(manager) == held
    await manager.storage.close()


@pytest.mark.parametrize("name", IN_FORMER_LAYOUT)
async def test_a_new_store_opens_beside_the_store_of_another_deployment(servers: Servers, tmp_path: Path, name: str):
    """The former tables name no prefix. Without bodies below this prefix they belong to another deployment."""
    kind = Path(name).name.removesuffix(".tar.gz")
    held = unpack(OLD / name, servers)
    empty = tmp_path / "empty"
    empty.mkdir()
    mine = Servers(empty, servers.postgres, servers.redis_url, servers.amqp_url)  # with an empty bucket too
    crud = AutoCRUD(storage_factory=former(kind, mine, "refuse"))
    manager = crud.add_model(Note, indexed_fields=INDEXED)
    for _ in range(2):  # the second time there is a store in the present layout
        await manager.create(Note(text="new"))
        await crud.close()
    assert await manager.count() == 2
    await crud.close()
    theirs = program(kind, servers)
    assert await content(theirs) == held
    await theirs.storage.close()
