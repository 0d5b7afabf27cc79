"""Stores that earlier commits wrote open with the same content, of every kind; see old_stores."""

from __future__ import annotations

from pathlib import Path

import pytest

from app.autocrud import Query, field
from app.autocrud.errors import UniqueConflict
from tests.stores.old_stores import KINDS, Note, Servers, content, program, unpack
from tests.valkey import Valkey

OLD = Path(__file__).with_name("old")
FILES = sorted(path.relative_to(OLD).as_posix() for path in OLD.glob("*/*.tar.gz"))


def test_there_is_one_of_every_kind():
    commits = {name.partition("/")[0] for name in FILES}
    assert commits
    assert set(FILES) == {f"{commit}/{kind}.tar.gz" for commit in commits for kind in KINDS}


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
