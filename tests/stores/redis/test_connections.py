"""RedisMetaStore: the requests that operations cost, and connections that are cut."""

from __future__ import annotations

import asyncio
import os
from urllib.parse import urlsplit

import pytest

from app.autocrud import AutoCRUD
from app.autocrud.query import Query, field
from app.autocrud.resource_manager.backends.redis import client as redis_client
from app.autocrud.resource_manager.engine.operations import Create
from app.autocrud.resource_manager.runtime.moments import Moment
from tests.stores.redis.helpers import Note, RedisAndDisk, keyed, meta_store
from tests.tcp_proxy import TcpProxy


async def test_the_number_of_operations_of_a_text(instance, valkey, proxy):
    manager = instance(url=proxy.url_for(valkey))
    created = await manager.create(Note("0", "a"))
    await manager.count()
    store, rid = meta_store(manager), created.meta.resource_id

    async def cost(operation) -> int:
        before = proxy.requests
        await operation
        return proxy.requests - before

    assert await cost(store.get(rid)) == 1
    assert await cost(store.revision(rid, 1)) == 1
    await store.done("nothing")  # the script is new to this server
    assert await cost(store.done("nothing")) == 1
    await store.revisions(rid)
    assert await cost(store.revisions(rid)) == 1
    assert await cost(manager.create(Note("1", "b"))) == 1
    assert await cost(manager.update(rid, Note("2", "c"))) == 2
    assert await cost(manager.create(Note("3"), by=keyed("k"))) == 2
    assert await cost(manager.batch([Create(Note(f"{number}")) for number in range(4, 10)])) == 1
    for _ in range(2):  # with the log of what was written, and without
        assert await cost(manager.find(Query(where=field("text").gte("2")))) == 1
    assert await cost(manager.count(Query(where=field("text").eq("1")))) == 1
    assert await cost(manager.count()) == 1
    # One question is under way, and all others share the next.
    assert await cost(asyncio.gather(*(manager.count() for _ in range(50)))) == 2


async def test_models_share_their_connections(instance, tmp_path, server):
    before = server.info("clients")["connected_clients"]
    managers = [instance(), instance(fields=("text",))]
    other = AutoCRUD(storage_factory=RedisAndDisk(tmp_path, prefix=f"{tmp_path.name}:other:")).add_model(
        Note, indexed_fields=["text"]
    )
    for manager in (managers[0], other, managers[0]):
        await manager.create(Note("1"))
    assert server.info("clients")["connected_clients"] == before + 1
    await managers[0].close()
    await managers[1].close()
    assert await other.count() == 1
    assert server.info("clients")["connected_clients"] == before + 1
    await other.close()
    assert server.info("clients")["connected_clients"] == before
    assert await other.count() == 1  # it may be used again
    await other.close()


async def test_connections_cut_while_idle_fail_no_request(instance, server):
    manager = instance()
    created = await asyncio.gather(*(manager.create(Note(f"{number}")) for number in range(10)))
    for _ in range(2):
        server.client_kill_filter(_type="normal", skipme=True)
        assert await manager.count() == 10
        server.client_kill_filter(_type="normal", skipme=True)
        await manager.update(created[0].meta.resource_id, Note(os.urandom(4).hex()))
        server.client_kill_filter(_type="normal", skipme=True)
        await manager.get(created[0].meta.resource_id)
    assert (await manager.get(created[0].meta.resource_id)).meta.version == 3


@pytest.mark.parametrize("how", ["read", "write"])
async def test_connections_that_were_dropped_while_unused_cost_no_request(instance, valkey, monkeypatch, how):
    """Dropped without a word, as by a NAT while a function was frozen: one connection is waited for, and shortly."""
    parts = urlsplit(valkey)
    with TcpProxy(f"http://{parts.hostname}:{parts.port}") as network:
        manager = instance(url=valkey.replace(f":{parts.port}", f":{urlsplit(network.url).port}"))
        created = await asyncio.gather(*(manager.create(Note(f"{number}")) for number in range(10)))
        loop_state = meta_store(manager)._client._loop_state(meta_store(manager))
        assert len(loop_state._idle) > 3
        monkeypatch.setattr(redis_client, "CHECK_S", 0.3)
        checked = []
        alive = type(loop_state)._exchange_on

        async def counted(self, connection, command):
            checked.extend(command[:1] if command == ("PING",) else ())
            return await alive(self, connection, command)

        monkeypatch.setattr(type(loop_state), "_exchange_on", counted)
        await manager.count()
        assert checked == []  # they were used a moment ago
        age = redis_client.CHECK_AFTER_S + 1
        loop_state._idle = [(one, Moment(used.running - age, used.wall)) for one, used in loop_state._idle]
        assert network.swallow() > 3
        async with asyncio.timeout(redis_client.ANSWER_TIMEOUT_S - 3):  # an answer would be waited for longer
            rid = created[0].meta.resource_id
            await (manager.meta(rid) if how == "read" else manager.update(rid, Note("new")))
        assert checked == ["PING"]
        await manager.storage.close()
