"""Loads into Redis: D1 to D4 of `load_scripts`, and failures. The conformance suite tests the contract."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any
from uuid import uuid4

import pytest

from app.autocrud import Query
from app.autocrud.errors import LoadTooLarge, OutcomeUnknown, StoreUnavailable, UniqueConflict
from app.autocrud.resource_manager.backends.redis import load_scripts
from app.autocrud.resource_manager.backends.redis.read_scripts import PAGE
from app.autocrud.resource_manager.basic import ResourceMeta
from app.autocrud.resource_manager.contract.blobs import BLOBS_MARKER
from app.autocrud.resource_manager.contract.loading import LoadedResource, Loader
from app.autocrud.resource_manager.meta_store import redis_access, redis_loading
from app.autocrud.resource_manager.model.codec import CodecIndex
from app.autocrud.testing.base import keyed
from app.autocrud.testing.blobs import NamedBlobs, upload
from app.autocrud.testing.loading import Contents, example, fill, many
from app.autocrud.testing.model import Item, manage
from tests.stores.redis.helpers import RedisAndDisk, lose_a_request, lose_an_answer, meta_store
from tests.stores.redis.test_search_replica import scripts_run

COUNT = 4


@pytest.fixture
async def program(valkey, tmp_path) -> AsyncIterator[Any]:
    """Make programs with one model, as several processes have them. `part` names a store of its own."""
    made = []

    def make(url: str = valkey, part: str = "", **options: Any) -> Any:
        made.append(manage(RedisAndDisk(tmp_path, url=url, prefix=f"{tmp_path.name}{part}:"), **options))
        return made[-1]

    yield make
    for manager in made:
        await manager.close()


@contextlib.asynccontextmanager
async def loader_of(manager, *, size: int = 0) -> AsyncIterator[Loader]:
    pin = uuid4().hex
    await manager.open()
    await meta_store(manager).add_pin(pin)
    async with meta_store(manager).load(pin, size=size) as loader:
        yield loader
    await meta_store(manager).remove_pin(pin)


async def load(manager, contents: Contents) -> None:
    async with loader_of(manager) as loader:
        await fill(manager, loader, contents)
        await loader.publish()


def staged(server, manager) -> list[bytes]:
    """The keys of loads."""
    return server.keys(f"{meta_store(manager)._prefix}load*")


def stored(server, manager) -> dict[str, Any]:
    """All data of a store as Redis has it, without the history."""
    found: dict[str, Any] = {}
    prefix = meta_store(manager)._prefix
    for key in server.keys(f"{prefix}*"):
        name = key.decode().removeprefix(prefix)
        assert server.ttl(key) == -1, name
        match server.type(key):
            case b"hash":
                found[name] = server.hgetall(key)
            case b"set":
                found[name] = server.smembers(key)
            case b"zset":
                found[name] = server.zrange(key, 0, -1, withscores=True)
    for name in (b"store", b"seq", b"head", b"tx", b"bytes"):
        del found["meta"][name]
    del found["tx"]
    return found


@pytest.mark.parametrize("at_once", [1, 500])
async def test_a_loaded_model_is_stored_as_commits_store_it(program, server, monkeypatch, at_once):
    monkeypatch.setattr(redis_loading, "CALL_ITEMS", at_once)
    source, target = program(part="a"), program(part="b")
    await source.open()
    rows, blob_names = [upload(b"one"), upload(b"two")], NamedBlobs(source.storage)
    for row in rows:
        await meta_store(source).add_blob(row)
    blob_names.by_resource |= {"r0": (rows[0].key, rows[1].key), "r1": (rows[0].key,)}
    for number in range(3):
        await source.create(Item(text="ä", number=number, code=f"c{number}"), resource_id=f"r{number}")
    for number in range(12):
        await source.update("r1", Item(text="é", number=number, code="c1"), by=keyed(f"k{number}"))
    await source.delete("r2", by=keyed("d"))
    await source.purge("r2")
    index = CodecIndex(source.codec)
    async with meta_store(source).snapshot() as snapshot, loader_of(target) as loader:
        await loader.add_blobs(rows)
        async for item in snapshot.items():
            if isinstance(item, ResourceMeta):
                (body,) = await source.storage.bodies([item.uid])
                await loader.add([LoadedResource(item, index(body, item.encoding))])
            else:
                await loader.add([item])
        await loader.add_keys([key async for key in snapshot.keys()])  # noqa: SIM118 - no mapping
        await loader.publish()
    expected = stored(server, source)
    assert stored(server, target) == expected
    kinds = {"meta", "ids", "res", "specs", "unique", "done", "keytimes", "blobs", "uses"}
    assert {name.partition(":")[0] for name in expected} == kinds
    assert expected["meta"][b"format"] == b"2"
    assert BLOBS_MARKER.encode() in expected["meta"][b"unique"]


async def test_replicas_read_everything_after_a_load(program, server):
    """D4: whatever the position of a replica is."""
    new, opened, marked, committed, building = (program() for _ in range(5))
    await opened.open()
    assert await opened.count() == 0
    row = upload()
    await meta_store(new).add_blob(row)  # the store exists, and no transaction is in the log
    assert await marked.count() == 0
    await meta_store(new).remove_blobs([row.key])
    contents = await example()
    async with loader_of(new) as loader:
        await fill(new, loader, contents)
        steps = [loader.publish]

        async def publish() -> None:
            while steps:
                await steps.pop()()

        scripts_run(building, PAGE, publish)  # published while this replica is built
        for number in range(COUNT):
            await new.create(Item(code=f"{number}"), resource_id=f"{number}")
            await new.purge(f"{number}")
        assert await committed.count() == 0
        await building.count()
        assert not steps
    for manager in (new, opened, marked, committed, building):
        found = [meta async for meta in manager.storage.scan()]
        assert found == contents.metas
    ran = scripts_run(opened)
    await new.create(Item(code="later"))
    assert await opened.count(Query(include_deleted=True)) == len(contents.metas) + 1
    assert PAGE not in ran  # later transactions are read from the log
    assert not staged(server, new)


async def test_a_replica_at_the_start_of_a_store_notices_a_load(program):
    old, other = program(), program()
    await meta_store(old).add_blob(upload())
    assert await other.count() == 0
    assert meta_store(other)._replica._copy.position.seq == 0
    await meta_store(old).remove_blobs([row.key for row in await meta_store(old).blobs([upload().sha256])])
    contents = await example()
    await load(old, contents)
    assert [meta async for meta in other.storage.scan()] == contents.metas


async def test_a_load_that_ends_leaves_no_keys_and_a_killed_one_leaves_keys_that_expire(program, server, monkeypatch):
    monkeypatch.setattr(redis_loading, "DISCARDED_AT_ONCE", 2)
    manager, contents = program(), await example(blobs=True)
    async with loader_of(manager) as loader:
        await fill(manager, loader, contents)
        kinds = {
            key.decode().removeprefix(meta_store(manager)._prefix).split(":")[0] for key in staged(server, manager)
        }
        assert kinds == {
            *("loading", "loadres", "loadids", "loadunique", "loaddone", "loadtimes", "loadblobs", "loaduses"),
            "loadnamed",
        }
        marker = f"{meta_store(manager)._prefix}loading:{loader._load}".encode()
        for key in staged(server, manager):
            expected = load_scripts.LIFE_S + (0 if key == marker else load_scripts.MARGIN_S)
            assert expected - 600 < server.ttl(key) <= expected, key
    assert not staged(server, manager)
    await load(manager, contents)
    assert not staged(server, manager)


async def test_nothing_is_published_of_a_load_that_lost_a_part(program, server):
    """D1."""
    manager, contents = program(), await example(blobs=True)
    async with loader_of(manager) as loader:
        await fill(manager, loader, contents)
        parts = staged(server, manager)
    for part in range(len(parts)):
        async with loader_of(manager) as loader:
            await fill(manager, loader, contents)
            own = [key for key in staged(server, manager) if key.endswith(loader._load.encode())]
            server.delete(sorted(own)[part])
            with pytest.raises(StoreUnavailable, match="gone from Redis"):
                await loader.publish()
        assert await manager.count(Query(include_deleted=True)) == 0
    async with loader_of(manager) as loader:
        await loader.add(contents.items[:1])
        server.delete(*[key for key in staged(server, manager) if b":loadres:" in key])
        with pytest.raises(StoreUnavailable, match="gone from Redis"):
            await loader.add(contents.items[1:2])


async def test_late_commands_of_a_load_that_ended_change_nothing(program, server):
    """D3."""
    manager, contents = program(), await example(blobs=True)
    async with loader_of(manager) as ended:
        pass
    for late in (
        ended.add(contents.items[:2]),
        ended.add_blobs(contents.rows),
        ended.add_keys(contents.keys),
        ended.publish(),
    ):
        with pytest.raises(StoreUnavailable, match="gone from Redis"):
            await late
    assert not staged(server, manager)


async def test_a_lost_answer_of_the_last_step_is_found_again(program, valkey, proxy, server):
    manager, contents = program(url=proxy.url_for(valkey)), await example(blobs=True)
    async with loader_of(manager) as loader:
        await fill(manager, loader, contents)
        await lose_an_answer(proxy, loader.publish())
    assert [meta async for meta in manager.storage.scan()] == contents.metas
    assert not staged(server, manager)


async def test_a_last_step_that_was_lost_is_made_again_and_never_happens_late(program, valkey, proxy):
    manager, contents = program(url=proxy.url_for(valkey)), await example()
    async with loader_of(manager) as loader:
        await fill(manager, loader, contents)
        await lose_a_request(proxy, loader.publish())
    for meta in contents.metas:
        await manager.purge(meta.resource_id)
    proxy.later.set()
    assert await asyncio.to_thread(proxy.answered.wait, 60)
    assert await manager.count(Query(include_deleted=True)) == 0


async def test_a_last_step_whose_outcome_is_unknown_does_not_happen_after_the_load(program, valkey, proxy, monkeypatch):
    manager, contents = program(url=proxy.url_for(valkey)), await example()
    with pytest.raises(OutcomeUnknown):
        async with loader_of(manager) as loader:
            await fill(manager, loader, contents)
            monkeypatch.setattr(redis_access, "COMMIT_TIMEOUT_S", 0.0)
            happened = meta_store(manager)._happened

            async def unknown(*_: Any) -> bool:
                raise OutcomeUnknown("it is not known")

            monkeypatch.setattr(meta_store(manager), "_happened", unknown)
            await lose_a_request(proxy, loader.publish())
    monkeypatch.setattr(meta_store(manager), "_happened", happened)
    proxy.later.set()
    assert await asyncio.to_thread(proxy.answered.wait, 60)
    assert b"lost" in proxy.late_answers[0]
    assert await manager.count(Query(include_deleted=True)) == 0


async def test_a_full_server_refuses_a_load(program, server):
    manager, contents = program(), await example(blobs=True)
    async with loader_of(manager) as loader:
        server.config_set("maxmemory", 1)
        with pytest.raises(StoreUnavailable):
            await loader.add(many(1))
        server.config_set("maxmemory", 0)
    assert not staged(server, manager)
    async with loader_of(manager) as loader:
        await fill(manager, loader, contents)
        server.config_set("maxmemory", 1)
        with pytest.raises(StoreUnavailable):
            await loader.publish()
        server.config_set("maxmemory", 0)
        assert await manager.count(Query(include_deleted=True)) == 0
        await loader.publish()
    assert [meta async for meta in manager.storage.scan()] == contents.metas


async def test_too_large_a_load_is_refused_before_anything_is_staged(program, server, monkeypatch):
    monkeypatch.setattr(redis_loading, "MAX_KEYS", COUNT)
    manager = program()
    with pytest.raises(LoadTooLarge, match="5 resources and files cannot be loaded in one step, at most 4 can"):
        async with loader_of(manager, size=COUNT + 1):
            raise AssertionError
    async with loader_of(manager, size=COUNT) as loader:
        await loader.add_blobs([upload()])
        await loader.add(many(COUNT - 1))
        with pytest.raises(LoadTooLarge):
            await loader.add(many(COUNT)[-2:])
    async with loader_of(manager) as loader:
        with pytest.raises(LoadTooLarge):
            await loader.add_blobs([upload() for _ in range(COUNT + 1)])
    assert not staged(server, manager)


async def test_a_field_that_becomes_unique_meanwhile_is_not_missed(program):
    manager = program(indexed=["text", "number"])
    async with loader_of(manager) as loader:
        await loader.add(many(COUNT))
        other = program()
        await other.open()
        with pytest.raises(Exception, match="code is unique in the store"):
            await loader.publish()
    assert await other.count() == 0
    async with loader_of(other) as loader:
        await loader.add(many(COUNT))
        await loader.publish()
    with pytest.raises(UniqueConflict):
        await other.create(Item(code="many 1"))
