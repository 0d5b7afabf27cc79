"""Stores that earlier commits wrote open with the same content, of every kind; see old_stores."""

from __future__ import annotations

from pathlib import Path
from unittest import mock

import pytest

from app.autocrud import Query, field
from app.autocrud.errors import MetadataTooLarge, UniqueConflict
from app.autocrud.resource_manager.engine import planning
from tests.stores.old_stores import (
    KINDS,
    LONG_ID,
    LONG_NAME,
    MANY,
    Note,
    Servers,
    content,
    large_searches,
    long_of,
    program,
    unpack,
)
from tests.valkey import Valkey

OLD = Path(__file__).with_name("old")
OLD_LARGE = Path(__file__).with_name("old_large")
FILES = sorted(path.relative_to(OLD).as_posix() for path in OLD.glob("*/*.tar.gz"))
LARGE_FILES = sorted(path.relative_to(OLD_LARGE).as_posix() for path in OLD_LARGE.glob("*/*.tar.gz"))


@pytest.mark.parametrize("files", [FILES, LARGE_FILES])
def test_there_is_one_of_every_kind(files: list[str]):
    commits = {name.partition("/")[0] for name in files}
    assert commits
    assert set(files) == {f"{commit}/{kind}.tar.gz" for commit in commits for kind in KINDS}


@pytest.fixture
def servers(tmp_path: Path, database: str):
    directory = tmp_path / "valkey"
    directory.mkdir()
    valkey = Valkey(directory)
    valkey.start()
    disk = tmp_path / "disk"
    disk.mkdir()
    try:
        yield Servers(disk, database, valkey.url)
    finally:
        valkey.stop()


@pytest.mark.parametrize("name", FILES)
async def test_a_store_of_an_earlier_commit(servers: Servers, name: str):
    kind = Path(name).name.removesuffix(".tar.gz")
    held = unpack(OLD / name, servers)
    assert len(held["resources"]) == 8
    for _ in range(2):  # the first start may complete what an earlier program did not have
        manager = program(kind, servers)
        assert await content(manager) == held
        assert await manager.storage.impairments() == []
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
        assert await manager.storage.impairments() == []
        await manager.storage.maintain(10)
        assert await content(manager, searches) == held
        await manager.storage.close()
    manager = program(kind, servers)
    # Elsewhere, and no worse.
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
