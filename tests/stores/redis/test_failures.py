"""RedisMetaStore when replies are lost and servers fail."""

from __future__ import annotations

import asyncio

import pytest

from app.autocrud.errors import (
    OutcomeUnknown,
    StoreUnavailable,
    VersionConflict,
)
from app.autocrud.query import Query
from app.autocrud.resource_manager.backends.redis import client as redis_client
from app.autocrud.resource_manager.basic import Version
from app.autocrud.resource_manager.meta_store import redis_access
from app.autocrud.resource_manager.meta_store.redis import RedisMetaStore
from tests.stores.redis.helpers import (
    Note,
    Proxy,
    _create,
    _update,
    key,
    lose_a_request,
    lose_an_answer,
    meta_commit,
    meta_store,
    texts,
)
from tests.valkey import Valkey

# When everything goes wrong


async def test_a_lost_answer_is_found_again(instance, valkey, proxy, server):
    manager = instance(url=proxy.url_for(valkey))
    await manager.create(Note("0"))
    created = await lose_an_answer(proxy, meta_commit(manager, "r"))
    assert [meta.resource_id for meta in created] == ["r"]
    found = await lose_an_answer(proxy, manager.storage.meta_store.commit([_update(created[0])]))
    assert (await meta_store(manager).get("r")) == found[0]
    assert found[0].version == 2
    assert int(server.hget(key(manager, "meta"), "seq")) == 3


async def test_a_lost_refusal_is_found_again(instance, valkey, proxy):
    manager = instance(url=proxy.url_for(valkey))
    await meta_commit(manager, "r")
    with pytest.raises(VersionConflict):
        await lose_an_answer(proxy, meta_commit(manager, "r"))


async def test_a_request_that_was_lost_is_made_again_and_never_happens_late(instance, valkey, proxy, server):
    manager = instance(url=proxy.url_for(valkey))
    await meta_commit(manager, "other")
    (created,) = await lose_a_request(proxy, meta_commit(manager, "r"))
    await meta_store(manager).commit([_create("r", purge=True, expect=Version(created.version, created.nonce))])
    proxy.later.set()  # now that it would succeed
    assert await asyncio.to_thread(proxy.answered.wait, 60)
    assert b"refused" in proxy.late_answers[0]
    with pytest.raises(LookupError):
        await meta_store(manager).get("r")
    assert int(server.hget(key(manager, "meta"), "seq")) == 3


async def test_a_refusal_that_was_forgotten_still_holds(instance, valkey, proxy, monkeypatch, server):
    monkeypatch.setattr(redis_access, "NOTES", 3)
    manager = instance(url=proxy.url_for(valkey))
    await meta_commit(manager, "other")
    (created,) = await lose_a_request(proxy, meta_commit(manager, "r"))
    await meta_store(manager).commit([_create("r", purge=True, expect=Version(created.version, created.nonce))])
    for number in range(4):
        await meta_commit(manager, f"{number}")
    assert not [note for note in server.zrange(key(manager, "tx"), 0, -1) if note.startswith(b"-")]
    proxy.later.set()
    assert await asyncio.to_thread(proxy.answered.wait, 60)
    assert b"old" in proxy.late_answers[0]
    with pytest.raises(LookupError):
        await meta_store(manager).get("r")


async def test_late_commands_change_nothing_after_the_store_was_replaced(instance, valkey, proxy, server):
    manager = instance(url=proxy.url_for(valkey))
    await meta_commit(manager, "other")
    await lose_a_request(proxy, meta_commit(manager, "r"))
    server.flushall()
    for number in range(4):
        await meta_commit(manager, f"{number}")
    proxy.later.set()
    assert await asyncio.to_thread(proxy.answered.wait, 60)
    assert b"store" in proxy.late_answers[0]
    with pytest.raises(LookupError):
        await meta_store(manager).get("r")


async def test_a_program_without_requests_for_long_can_still_write(instance, monkeypatch):
    monkeypatch.setattr(redis_access, "NOTES", 3)
    silent, busy = instance(), instance()
    await silent.create(Note("0"))
    for number in range(10):
        await busy.create(Note(f"{number}"))
    await silent.create(Note("1"))
    assert await silent.count() == 12


async def test_the_outcome_is_unknown_if_the_store_is_another_one(instance, valkey, proxy, server):
    manager = instance(url=proxy.url_for(valkey))
    await meta_commit(manager, "other")
    with pytest.raises(OutcomeUnknown):
        await lose_an_answer(proxy, meta_commit(manager, "r"), server.flushall)
    await meta_commit(manager, "r")

    def begin_another_life():
        server.flushall()
        server.hset(key(manager, "meta"), mapping={"store": "another", "tx": 9})

    with pytest.raises(OutcomeUnknown):
        await lose_an_answer(proxy, meta_commit(manager, "s"), begin_another_life)


async def test_the_outcome_is_unknown_if_no_server_answers(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(redis_access, "COMMIT_TIMEOUT_S", 0.0)
    own = Valkey(tmp_path_factory.mktemp("own"))
    own.start()
    try:
        with Proxy(own.url) as proxy:
            store = RedisMetaStore(proxy.url_for(own.url))
            await store.commit([_create("other")])
            with pytest.raises(OutcomeUnknown) as caught:
                await lose_an_answer(proxy, store.commit([_create("r")]), own.stop)
            assert "secret" not in str(caught.value)
            await store.close()
    finally:
        own.stop()


async def test_a_server_that_is_down_and_comes_back(tmp_path_factory, caplog):
    own = Valkey(tmp_path_factory.mktemp("own"))
    own.start()
    store = RedisMetaStore(own.url, prefix="p:")
    try:
        await store.commit([_create("r")])
        own.stop()
        calls = (
            store.get("r"),
            store.health(),
            store.count(Query().resolve({})),
            store.commit([_create("x")]),
            store.generation(),
            store.done("k"),
        )
        for call in calls:
            with pytest.raises(StoreUnavailable) as caught:
                await call
            assert str(own.port) not in str(caught.value)
        own.start()  # empty
        assert await store.count(Query().resolve({})) == 0
        await store.commit([_create("r")])
        await store.health()
        assert "secret" not in caplog.text
    finally:
        await store.close()
        own.stop()


async def test_a_server_that_refuses_changes_nothing(instance, server):
    manager = instance()
    created = await manager.create(Note("1", "a"))
    rid = created.meta.resource_id
    refusals = [
        (lambda: server.config_set("maxmemory", 1), lambda: server.config_set("maxmemory", 0)),
        (lambda: server.replicaof("127.0.0.1", "1"), lambda: server.replicaof("NO", "ONE")),
    ]
    for refuse, take_again in refusals:
        refuse()
        try:
            for write in (manager.create(Note("2", "b")), manager.update(rid, Note("3", "c"), expect=created.version)):
                with pytest.raises(StoreUnavailable):
                    await write
            assert await texts(manager) == ["1"]
        finally:
            take_again()
    await manager.update(rid, Note("3", "b"), expect=created.version)
    await manager.create(Note("2", "a"))
    server.config_set("maxmemory", 1)
    await manager.purge(rid)  # that helps
    assert await texts(manager) == ["2"]


async def test_a_cancelled_caller_leaves_no_answer_to_the_next(instance, valkey, proxy):
    manager = instance(url=proxy.url_for(valkey))
    await meta_commit(manager, "a")
    proxy.hold()
    task = asyncio.ensure_future(meta_store(manager).get("a"))
    assert await asyncio.to_thread(proxy.held.wait, 60)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    proxy.release()
    with pytest.raises(LookupError):
        await meta_store(manager).get("b")
    assert (await meta_store(manager).get("a")).resource_id == "a"


async def test_a_server_that_does_not_answer(instance, valkey, proxy, monkeypatch):
    manager = instance(url=proxy.url_for(valkey))
    await meta_commit(manager, "a")
    monkeypatch.setattr(redis_client, "ANSWER_TIMEOUT_S", 0.0)
    with pytest.raises(StoreUnavailable):
        await meta_store(manager).get("a")
    monkeypatch.setattr(redis_client, "ANSWER_TIMEOUT_S", 10.0)
    assert (await meta_store(manager).get("a")).resource_id == "a"
