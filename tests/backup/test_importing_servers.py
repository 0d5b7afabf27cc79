"""Imports between kinds on real servers: S3, PostgreSQL and Redis."""

from __future__ import annotations

from typing import Any

import pytest

from app.autocrud import AutoCRUD
from app.autocrud.backup.exporting import export_all
from app.autocrud.backup.importing import import_all
from app.autocrud.query import Query
from app.autocrud.resource_manager.meta_store import redis_loading
from tests.services import BUCKET

from .archives import write
from .imports import KINDS, ON_SERVERS, Note, Place, content, fill, program, searches
from .test_importing import Killed, pieces, stop_after
from .test_importing_blobs import content as blob_content
from .test_importing_blobs import expected_of, files_of

ALL = ("disk", "memory-disk", "s3-sqlite", *ON_SERVERS)


@pytest.fixture
async def programs(tmp_path, postgres, valkey, ministack_s3):
    """Make programs on the servers, each with a store of its own, and close them at the end."""
    made: list[AutoCRUD] = []
    s3: dict[str, Any] = {
        "bucket": BUCKET,
        "endpoint_url": ministack_s3.url,
        "access_key_id": ministack_s3.access_key_id,
        "secret_access_key": ministack_s3.secret_access_key,
        "region_name": "us-east-1",
    }

    def make(kind: str) -> AutoCRUD:
        crud = program(kind, Place(tmp_path / f"{kind}-{len(made)}", postgres, valkey, s3))
        made.append(crud)
        return crud

    yield make
    for crud in made:
        await crud.close()


@pytest.mark.slow
@pytest.mark.parametrize("source", [*ALL, "memory"])
async def test_everything_is_equal_after_an_import_into_every_kind(programs, tmp_path, source):
    crud = programs(source)
    manager = crud.resource_manager(Note)
    await fill(manager)
    await export_all(crud.managers, tmp_path / "a.tar.gz")
    expected, found = await content(manager.storage), await searches(manager)
    for target in [*ALL, "memory"]:
        other = programs(target)
        (model,) = (await import_all(other.managers, tmp_path / "a.tar.gz")).models.values()
        assert model.created == len(expected["resources"]), target
        assert await content(other.resource_manager(Note).storage) == expected, target
        assert await searches(other.resource_manager(Note)) == found, target
        await other.resource_manager(Note).update("n00000", Note(text="later", code="new"))


@pytest.mark.slow
@pytest.mark.parametrize("commits", [0, 1, 2, 3])
@pytest.mark.parametrize("kind", ["s3-sqlite", *ON_SERVERS])
async def test_an_interrupted_import_is_taken_back_or_resumed(programs, tmp_path, monkeypatch, kind, commits):
    monkeypatch.setattr(pieces, "BATCH", 3)
    source = programs("memory")
    await fill(source.resource_manager(Note))
    await export_all(source.managers, tmp_path / "a.tar.gz")
    expected = await content(source.resource_manager(Note).storage, states=False, keys=False)
    crud = programs(kind)
    manager = crud.resource_manager(Note)
    old = await manager.create(Note(text="mine", code="mine"), resource_id="draft")
    await manager.create(Note(text="gone"), resource_id="n00000")
    before = await content(manager.storage, states=False, keys=False)

    async def interrupted() -> None:
        with monkeypatch.context() as patch:
            stop_after(patch, manager.storage, commits)
            with pytest.raises(Killed):
                await import_all(crud.managers, tmp_path / "a.tar.gz", on_conflict="replace")
        for _ in range(3):
            await manager.maintain(10)

    await interrupted()
    (model,) = (await import_all(crud.managers, tmp_path / "a.tar.gz", abort=True)).models.values()
    assert model.not_taken_back == 0
    assert await content(manager.storage, states=False, keys=False) == before
    assert await manager.storage.import_journal.state() is None
    await interrupted()
    await import_all(crud.managers, tmp_path / "a.tar.gz", resume=True)
    assert await content(manager.storage, states=False, keys=False) == expected
    assert (await manager.meta("draft")).version > old.meta.version
    assert await manager.storage.import_journal.state() is None


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["s3-sqlite", *ON_SERVERS])
async def test_a_purge_removes_what_the_journal_keeps(programs, tmp_path, monkeypatch, kind):
    source = programs("memory")
    await fill(source.resource_manager(Note))
    await export_all(source.managers, tmp_path / "a.tar.gz")
    crud = programs(kind)
    manager = crud.resource_manager(Note)
    old = await manager.create(Note(text="secret"), resource_id="n00001")
    with monkeypatch.context() as patch:
        stop_after(patch, manager.storage, 1)
        with pytest.raises(Killed):
            await import_all(crud.managers, tmp_path / "a.tar.gz", on_conflict="replace")
    assert await manager.storage.bodies([old.meta.uid])
    assert await manager.storage.import_journal.kept_records("n00001")
    await manager.purge("n00001")
    assert await manager.storage.import_journal.kept_records("n00001") == []
    with pytest.raises(Exception, match="missing"):
        await manager.storage.bodies([old.meta.uid])


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["s3-sqlite", *ON_SERVERS])
async def test_files_are_equal_after_an_import(programs, tmp_path, kind):
    expected = blob_content()
    await write(tmp_path / "a.tar.gz", {"note": expected})
    crud = programs(kind)
    await import_all(crud.managers, tmp_path / "a.tar.gz")
    assert await files_of(crud.resource_manager(Note).storage) == expected_of(expected)


@pytest.mark.parametrize(("limit", "in_one_step"), [(13, False), (14, True)])
async def test_more_than_redis_can_load_in_one_step_is_imported_in_batches(
    programs, tmp_path, monkeypatch, limit, in_one_step
):
    monkeypatch.setattr(redis_loading, "MAX_KEYS", limit)
    monkeypatch.setattr(pieces, "BATCH", 3)
    source, crud = programs("memory"), programs("redis-disk")
    await fill(source.resource_manager(Note))
    await export_all(source.managers, tmp_path / "a.tar.gz")
    expected = await content(source.resource_manager(Note).storage)
    assert len(expected["resources"]) == 14
    storage, seen = crud.resource_manager(Note).storage, set[int]()

    async def put_bodies(bodies: Any, put: Any = storage.put_bodies) -> None:
        seen.add(await storage.count(Query()))
        await put(bodies)

    monkeypatch.setattr(storage, "put_bodies", put_bodies)
    (model,) = (await import_all(crud.managers, tmp_path / "a.tar.gz")).models.values()
    assert model.in_one_step == in_one_step
    assert (seen == {0}) == in_one_step
    assert await content(storage) == expected
    assert await storage.import_journal.state() is None


def test_the_kinds_on_servers_are_kinds():
    assert set(ALL) < set(KINDS)
