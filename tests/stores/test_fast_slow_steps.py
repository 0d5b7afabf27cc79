"""FastSlowMetaStore on real servers, one step at a time."""

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
from app.autocrud.resource_manager.backends.redis.scripts import Script
from app.autocrud.resource_manager.basic import (
    ResourceMeta,
)
from app.autocrud.resource_manager.meta_store.fast_slow import FastSlowMetaStore
from app.autocrud.resource_manager.meta_store.postgres import PostgresMetaStore
from app.autocrud.resource_manager.meta_store.redis import RedisMetaStore
from app.autocrud.resource_manager.meta_store.simple import MemoryMetaStore
from tests.stores import fast_slow_worker as worker
from tests.stores.fast_slow_mutants import LUA_MUTANTS, DoesNotWait, TrustsNewLives
from tests.stores.fast_slow_processes import Way
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
    """Makes stores that are one, as several processes have them."""
    made = []

    def make(server: Valkey | Way, lease_s: float, kind: type[FastSlowMetaStore] = FastSlowMetaStore):
        url = server.url if isinstance(server, Valkey) else server.redis_url()
        made.append(worker.store_of(url, postgres, tmp_path.name, lease_s, kind))
        return made[-1]

    yield make
    for store in made:
        await store.close()


@pytest.fixture(params=[True, False], ids=["lives count", "lives do not count"])
def lives(request, monkeypatch) -> bool:
    """Return whether entries of another server epoch are recognized."""
    if not request.param:
        for name in ("READ", "FILL", "BEGIN_WRITE", "END_WRITE"):
            text = getattr(lease, name).text.replace(*LUA_MUTANTS["another life counts"])
            script = Script(text, hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest())
            monkeypatch.setattr(lease, name, script)
    return request.param


async def _write(store, before: ResourceMeta | None = None) -> ResourceMeta:
    (meta,) = await store.commit([worker.change_of("r", before)])
    return meta


async def test_a_dump_from_before_a_write_brings_nothing_back(servers, stores, lives):
    server = servers[0]
    store = stores(server, 30.0)
    old = await _write(store)
    assert await store.get("r") == old  # is filled in
    dump = server.dump()
    new = await _write(store, old)
    server.restore(dump)
    assert await store.get("r") == (new if lives else old)


async def test_a_replica_that_lags_brings_nothing_back(servers, stores, lives):
    primary, replica = servers
    with Way(primary) as way, TcpProxy(primary.url) as replication:
        replica.follow(primary, urlsplit(replication.url).port)
        store = stores(way, 30.0)
        old = await _write(store)
        await store.get("r")
        with primary.client() as client:
            assert client.execute_command("WAIT", 1, 10_000) == 1
        replication.hold()
        new = await _write(store, old)
        primary.stop()
        replica.promote()
        way.lead_to_server(replica)
        assert await store.get("r") == (new if lives else old)


@pytest.mark.parametrize("kind", [FastSlowMetaStore, TrustsNewLives])
async def test_who_stays_with_an_old_primary_reads_nothing_old(servers, stores, kind):
    primary, promoted = servers
    promoted.follow(primary, primary.port)
    lease_s = 2.0 if kind is FastSlowMetaStore else 20.0
    first, second = stores(primary, lease_s), stores(promoted, lease_s, kind)
    old = await _write(first)
    promoted.promote()
    assert await first.get("r") == await second.get("r") == old  # the second one has the life of its server adopted
    new = await _write(second, old)
    assert await first.get("r") == (new if kind is FastSlowMetaStore else old)
    assert await second.degradations() == []
    assert "another Redis" in (await first.degradations())[0]


@pytest.mark.parametrize("kind", [FastSlowMetaStore, DoesNotWait])
async def test_a_writer_that_is_cut_off_waits_and_a_reader_that_is_does_not(servers, stores, kind):
    with Way(servers[0]) as way:
        lease_s = 2.0 if kind is FastSlowMetaStore else 20.0
        reader, writer = stores(servers[0], lease_s), stores(way, lease_s, kind)
        old = await _write(reader)
        way.lead_to_server(None)
        assert await reader.get("r") == await writer.get("r") == old
        new = await _write(writer, old)
        assert await writer.get("r") == new
        assert await reader.get("r") == (new if kind is FastSlowMetaStore else old)
        (impaired,) = await writer.degradations()
        assert "cannot be reached" in impaired
        assert servers[0].key not in impaired
        way.lead_to_server(servers[0])
        assert await writer.degradations() == []
        await writer.health()


async def test_a_paused_server_holds_nobody_up_for_long(servers, stores):
    first, second = stores(servers[0], 1.0), stores(servers[0], 1.0)
    old = await _write(first)
    assert await second.get("r") == old
    servers[0].pause()
    new = await _write(first, old)
    assert await second.get("r") == new
    servers[0].resume()
    assert await second.get("r") == await first.get("r") == new


async def test_a_writer_who_gives_up_waiting_has_settled_all_the_same(servers, stores):
    first, second = stores(servers[0], 30.0), stores(servers[0], 30.0)
    old = await _write(first)
    assert await second.get("r") == old
    committing, goes_on = asyncio.Event(), asyncio.Event()
    commit = first._slow.commit

    async def slowly(changes, once=None):
        committed = await commit(changes, once)
        committing.set()
        await goes_on.wait()
        return committed

    first._slow.commit = slowly
    writing = asyncio.create_task(_write(first, old))
    await committing.wait()
    writing.cancel()
    with pytest.raises(asyncio.CancelledError):
        await writing
    settled = asyncio.Event()
    settle = first._leases.end_write

    async def told(*arguments):
        server_epoch = await settle(*arguments)
        settled.set()
        return server_epoch

    first._leases.end_write = told
    goes_on.set()
    await settled.wait()
    assert (await second.get("r")).version == 2


async def test_a_hit_asks_nobody_else_and_a_miss_fills_in(servers, stores, monkeypatch):
    first, second = stores(servers[0], 30.0), stores(servers[0], 30.0)
    meta = await _write(first)  # had the life adopted; from now on writers store too
    meta = await _write(first, meta)

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


async def test_two_slow_stores_behind_one_prefix_read_nothing_of_each_other(servers, postgres, tmp_path):
    """Two applications on one Redis, as by mistake."""
    ours, theirs = (
        worker.store_of(servers[0].url, postgres, name, 30.0, prefix="shared:")
        for name in (tmp_path.name, f"{tmp_path.name}2")
    )
    meta = await _write(ours, await _write(ours))
    assert await ours.get("r") == meta
    with pytest.raises(ResourceNotFound):
        await theirs.get("r")
    other = await _write(theirs)
    assert (await ours.get("r"), await theirs.get("r")) == (meta, other)
    for store in (ours, theirs):
        await store.close()


async def test_what_cannot_be_decoded_is_a_miss(servers, stores):
    store = stores(servers[0], 30.0)
    meta = await _write(store)
    await store.get("r")
    with servers[0].client() as client:
        (key,) = client.keys("*fast:v:*")
        value = client.get(key)
        client.set(key, value[:93] + b"\x81\xa1x\x01")
    assert await store.get("r") == meta


async def test_a_server_that_does_not_say_who_it_is_is_not_believed(servers, stores):
    server = servers[0]
    with server.client() as client:
        client.acl_setuser(
            "default", enabled=True, passwords=[f"+{server.key}"], categories=["+@all"], commands=["-info"], keys=["*"]
        )
    store = stores(server, 0.3)
    old = await _write(store)
    new = await _write(store, old)
    assert await store.get("r") == new
    assert "run_id" in (await store.degradations())[0]
    with server.client() as client:
        assert client.keys("*fast:*") == []


async def test_a_cluster_will_do_where_it_shows_one_address(tmp_path, stores, monkeypatch):
    """As ElastiCache Serverless does. All keys of a store hash to one slot."""
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
        meta = await _write(store, await _write(store))
        assert await store.degradations() == []
        monkeypatch.delattr(PostgresMetaStore, "get")  # a hit asks no other server
        monkeypatch.setattr(PostgresMetaStore, "get_fenced", None)
        assert await store.get("r") == meta
        await store.close()
    finally:
        server.stop()


async def test_a_full_server_is_only_slower(servers, stores):
    with servers[0].client() as client:
        client.config_set("maxmemory", "1")
    store = stores(servers[0], 0.3)
    old = await _write(store)
    new = await _write(store, old)
    assert await store.get("r") == new


async def test_tables_of_an_older_program_are_completed(postgres, servers, tmp_path, stores):
    old = PostgresMetaStore(postgres, table_name=tmp_path.name)
    await old.health()
    async with await psycopg.AsyncConnection.connect(postgres, autocommit=True) as connection:
        state = old._schema.names["state"]
        await connection.execute(f"ALTER TABLE {state} DROP fast_life, DROP fast_since, DROP fast_lease")
    meta = await _write(old)
    store = stores(servers[0], 1.0)
    assert await store.get("r") == meta
    assert (await store._fences.fence()).server_epoch is not None
    await old.close()


@pytest.mark.parametrize("lease_s", [0, -1.0, 61.0])
def test_what_cannot_be_put_together_is_refused(valkey, postgres, lease_s):
    fast, slow = RedisMetaStore(valkey), PostgresMetaStore(postgres)
    with pytest.raises(ConfigError, match="lease_s"):
        FastSlowMetaStore(fast, slow, lease_s=lease_s)
    with pytest.raises(ConfigError, match="cannot be a fast_store"):
        FastSlowMetaStore(MemoryMetaStore(), slow)
    with pytest.raises(ConfigError, match="cannot be a slow_store"):
        FastSlowMetaStore(fast, MemoryMetaStore())
