"""FastSlowMetaStore on real servers: single failures, and what is not supported."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Iterator
from urllib.parse import urlsplit

import psycopg
import pytest

from app.autocrud.errors import (
    ConfigError,
    ResourceNotFound,
)
from app.autocrud.resource_manager.backends.redis import lease
from app.autocrud.resource_manager.backends.redis.script_parts import Script
from app.autocrud.resource_manager.basic import ResourceMeta
from app.autocrud.resource_manager.meta_store.fast_slow import FastSlowMetaStore
from app.autocrud.resource_manager.meta_store.postgres import PostgresMetaStore
from app.autocrud.resource_manager.meta_store.redis import RedisMetaStore
from app.autocrud.resource_manager.meta_store.simple import MemoryMetaStore
from tests.stores import fast_slow_worker as worker
from tests.stores.fast_slow_mutants import LUA_MUTANTS, DoesNotWait, TrustsNewEpochs
from tests.stores.fast_slow_processes import RedisProxy
from tests.tcp_proxy import TcpProxy
from tests.valkey import Valkey


@pytest.fixture
def servers(tmp_path) -> Iterator[list[Valkey]]:
    started = []
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
        started.append(Valkey(tmp_path / name))
        started[-1].start()
    yield started
    for server in started:
        server.stop()


@pytest.fixture
async def stores(postgres, tmp_path):
    """Return a function that makes stores with the same data, each like the store of another process."""
    made = []

    def make(server: Valkey | RedisProxy, lease_s: float, kind: type[FastSlowMetaStore] = FastSlowMetaStore):
        url = server.url if isinstance(server, Valkey) else server.redis_url()
        made.append(worker.store_of(url, postgres, tmp_path.name, lease_s, kind))
        return made[-1]

    yield make
    for store in made:
        await store.close()


@pytest.fixture(params=[True, False], ids=["with epochs", "without epochs"])
def epochs(request, monkeypatch) -> bool:
    """Return whether entries of another server epoch are recognized."""
    if not request.param:
        for name in ("READ", "FILL", "BEGIN_WRITE", "END_WRITE"):
            text = getattr(lease, name).text.replace(*LUA_MUTANTS["entries of other epochs are valid"])
            script = Script(text, hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest())
            monkeypatch.setattr(lease, name, script)
    return request.param


async def write(store, before: ResourceMeta | None = None) -> ResourceMeta:
    (meta,) = await store.commit([worker.change_of("r", before)])
    return meta


async def test_a_restored_dump_from_before_a_write_causes_no_stale_read(servers, stores, epochs):
    server = servers[0]
    store = stores(server, 30.0)
    old = await write(store)
    assert await store.get("r") == old  # fills the cache
    dump = server.dump()
    new = await write(store, old)
    server.restore(dump)
    assert await store.get("r") == (new if epochs else old)


async def test_failover_to_a_lagging_replica_causes_no_stale_read(servers, stores, epochs):
    primary, replica = servers
    with RedisProxy(primary) as proxy, TcpProxy(primary.url) as replication:
        replica.follow(primary, urlsplit(replication.url).port)
        store = stores(proxy, 30.0)
        old = await write(store)
        await store.get("r")
        with primary.client() as client:
            assert client.execute_command("WAIT", 1, 10_000) == 1
        replication.hold()
        new = await write(store, old)
        primary.stop()
        replica.promote()
        proxy.route_to(replica)
        assert await store.get("r") == (new if epochs else old)


@pytest.mark.parametrize("kind", [FastSlowMetaStore, TrustsNewEpochs])
async def test_a_process_that_keeps_using_an_old_primary_reads_nothing_stale(servers, stores, kind):
    primary, promoted = servers
    promoted.follow(primary, primary.port)
    lease_s = 2.0 if kind is FastSlowMetaStore else 20.0
    first, second = stores(primary, lease_s), stores(promoted, lease_s, kind)
    old = await write(first)
    promoted.promote()
    assert await first.get("r") == await second.get("r") == old  # the second store adopts the epoch of its server
    new = await write(second, old)
    assert await first.get("r") == (new if kind is FastSlowMetaStore else old)
    assert await second.degradations() == []
    assert "another Redis" in (await first.degradations())[0]


@pytest.mark.parametrize("kind", [FastSlowMetaStore, DoesNotWait])
async def test_a_process_that_is_cut_off_from_redis_delays_its_writes_but_not_its_reads(servers, stores, kind):
    with RedisProxy(servers[0]) as proxy:
        lease_s = 2.0 if kind is FastSlowMetaStore else 20.0
        reader, writer = stores(servers[0], lease_s), stores(proxy, lease_s, kind)
        old = await write(reader)
        proxy.route_to(None)
        assert await reader.get("r") == await writer.get("r") == old
        new = await write(writer, old)
        assert await writer.get("r") == new
        assert await reader.get("r") == (new if kind is FastSlowMetaStore else old)
        (impaired,) = await writer.degradations()
        assert "cannot be reached" in impaired
        assert servers[0].key not in impaired
        proxy.route_to(servers[0])
        assert await writer.degradations() == []
        await writer.health()


async def test_a_paused_server_delays_reads_and_writes_only_briefly(servers, stores):
    first, second = stores(servers[0], 1.0), stores(servers[0], 1.0)
    old = await write(first)
    assert await second.get("r") == old
    servers[0].pause()
    new = await write(first, old)
    assert await second.get("r") == new
    servers[0].resume()
    assert await second.get("r") == await first.get("r") == new


async def test_end_write_follows_the_commit_even_if_the_caller_is_cancelled(servers, stores):
    first, second = stores(servers[0], 30.0), stores(servers[0], 30.0)
    old = await write(first)
    assert await second.get("r") == old
    committing, may_return = asyncio.Event(), asyncio.Event()
    commit = first._slow.commit

    async def slowly(changes, once=None):
        committed = await commit(changes, once)
        committing.set()
        await may_return.wait()
        return committed

    first._slow.commit = slowly
    writing = asyncio.create_task(write(first, old))
    await committing.wait()
    writing.cancel()
    with pytest.raises(asyncio.CancelledError):
        await writing
    ended = asyncio.Event()
    end_write = first._leases.end_write

    async def end_write_and_tell(*arguments):
        server_epoch = await end_write(*arguments)
        ended.set()
        return server_epoch

    first._leases.end_write = end_write_and_tell
    may_return.set()
    await ended.wait()
    assert (await second.get("r")).version == 2


async def test_a_cache_hit_does_not_ask_the_slow_store_and_a_miss_fills_the_cache(servers, stores, monkeypatch):
    first, second = stores(servers[0], 30.0), stores(servers[0], 30.0)
    meta = await write(first)  # adopts the epoch, so writers fill the cache from now on
    meta = await write(first, meta)

    async def never(*_):
        raise AssertionError("the slow store was asked")

    monkeypatch.setattr(PostgresMetaStore, "get_fenced", never)
    monkeypatch.setattr(PostgresMetaStore, "get", never)
    assert await second.get("r") == meta
    monkeypatch.undo()
    with servers[0].client() as client:
        client.flushall()
    assert await second.get("r") == meta
    monkeypatch.setattr(PostgresMetaStore, "get", never)
    monkeypatch.setattr(PostgresMetaStore, "get_fenced", never)
    assert await first.get("r") == meta


async def test_two_slow_stores_with_one_prefix_read_no_entries_of_each_other(servers, postgres, tmp_path):
    """Two applications may use one Redis and one prefix by mistake."""
    ours, theirs = (
        worker.store_of(servers[0].url, postgres, name, 30.0, prefix="shared:")
        for name in (tmp_path.name, f"{tmp_path.name}2")
    )
    meta = await write(ours, await write(ours))
    assert await ours.get("r") == meta
    with pytest.raises(ResourceNotFound):
        await theirs.get("r")
    other = await write(theirs)
    assert (await ours.get("r"), await theirs.get("r")) == (meta, other)
    for store in (ours, theirs):
        await store.close()


async def test_an_entry_that_cannot_be_decoded_is_a_cache_miss(servers, stores):
    store = stores(servers[0], 30.0)
    meta = await write(store)
    await store.get("r")
    with servers[0].client() as client:
        (key,) = client.keys("*fast:v:*")
        value = client.get(key)
        client.set(key, value[:93] + b"\x81\xa1x\x01")
    assert await store.get("r") == meta


async def test_a_server_that_hides_its_run_id_is_not_used(servers, stores):
    server = servers[0]
    with server.client() as client:
        client.acl_setuser(
            "default", enabled=True, passwords=[f"+{server.key}"], categories=["+@all"], commands=["-info"], keys=["*"]
        )
    store = stores(server, 0.3)
    old = await write(store)
    new = await write(store, old)
    assert await store.get("r") == new
    assert "run_id" in (await store.degradations())[0]
    with server.client() as client:
        assert client.keys("*fast:*") == []


async def test_a_cluster_with_one_address_works(tmp_path, stores, monkeypatch):
    """ElastiCache Serverless is such a cluster. All keys of a store hash to one slot."""
    directory = tmp_path / "cluster"
    directory.mkdir()
    server = Valkey(directory, cluster_enabled="yes")
    server.start()
    try:
        with server.client() as client:
            client.execute_command("CLUSTER", "ADDSLOTSRANGE", 0, 16383)
            async with asyncio.timeout(30):
                while "cluster_state:ok" not in str(client.execute_command("CLUSTER", "INFO")):
                    await asyncio.sleep(0.01)
        store = stores(server, 30.0)
        meta = await write(store, await write(store))
        assert await store.degradations() == []
        monkeypatch.delattr(PostgresMetaStore, "get")  # a hit asks no other server
        monkeypatch.setattr(PostgresMetaStore, "get_fenced", None)
        assert await store.get("r") == meta
        await store.close()
    finally:
        server.stop()


async def test_a_full_server_makes_writes_slower_but_not_wrong(servers, stores):
    with servers[0].client() as client:
        client.config_set("maxmemory", "1")
    store = stores(servers[0], 0.3)
    old = await write(store)
    new = await write(store, old)
    assert await store.get("r") == new


async def test_columns_that_an_older_program_did_not_have_are_added(postgres, servers, tmp_path, stores):
    old = PostgresMetaStore(postgres, table_name=tmp_path.name)
    await old.health()
    async with await psycopg.AsyncConnection.connect(postgres, autocommit=True) as connection:
        state = old._schema.names["state"]
        await connection.execute(f"ALTER TABLE {state} DROP fast_life, DROP fast_since, DROP fast_lease")
    meta = await write(old)
    store = stores(servers[0], 1.0)
    assert await store.get("r") == meta
    assert (await store._fences.fence()).server_epoch is not None
    await old.close()


@pytest.mark.parametrize("lease_s", [0, -1.0, 61.0])
def test_an_unsuitable_lease_time_or_store_is_rejected(valkey, postgres, lease_s):
    fast, slow = RedisMetaStore(valkey), PostgresMetaStore(postgres)
    with pytest.raises(ConfigError, match="lease_s"):
        FastSlowMetaStore(fast, slow, lease_s=lease_s)
    with pytest.raises(ConfigError, match="cannot be a fast_store"):
        FastSlowMetaStore(MemoryMetaStore(), slow)
    with pytest.raises(ConfigError, match="cannot be a slow_store"):
        FastSlowMetaStore(fast, MemoryMetaStore())
