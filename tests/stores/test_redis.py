"""RedisMetaStore: the conformance suite on a real server, what its operations cost, and what it does when everything goes wrong."""

from __future__ import annotations

import asyncio
import contextlib
import datetime as dt
import os
import random
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar
from urllib.parse import urlsplit, urlunsplit

import pytest
import redis
from msgspec import Struct
from msgspec.structs import replace

from app.autocrud import AutoCRUD, Encoding
from app.autocrud.errors import (
    AnswerGone,
    ConfigError,
    OutcomeUnknown,
    StoreDamaged,
    StoreUnavailable,
    UniqueConflict,
    VersionConflict,
)
from app.autocrud.query import Query, field
from app.autocrud.resource_manager.backends.redis import client as redis_client
from app.autocrud.resource_manager.backends.redis import scripts, search_replica
from app.autocrud.resource_manager.basic import KEEP_KEYS_US, Change, IndexedField, IStorage, ResourceMeta, Version
from app.autocrud.resource_manager.core import Caller, IdempotencyKey, ResourceManager, SimpleStorage
from app.autocrud.resource_manager.engine.operations import Create, Delete, Purge, Retention, Switch, Update
from app.autocrud.resource_manager.meta_store import redis as meta_store_redis
from app.autocrud.resource_manager.meta_store.redis import RedisMetaStore
from app.autocrud.resource_manager.resource_store.simple import DiskResourceStore
from app.autocrud.resource_manager.runtime.moments import Moment
from app.autocrud.resource_manager.storage_factory import IStorageFactory
from tests.conformance import SharedConformance
from tests.conformance.model import Clock
from tests.tcp_proxy import TcpProxy
from tests.valkey import Valkey


class RedisAndDisk(IStorageFactory):
    def __init__(self, root: Path, encoding: Encoding | None = None, url: str | None = None, prefix: str = "") -> None:
        self.root, self.encoding = root, encoding
        self.url, self.prefix = url or os.environ["TEST_VALKEY"], prefix

    def build(self, model_name: str) -> IStorage:
        return SimpleStorage(
            RedisMetaStore(self.url, prefix=self.prefix or f"{self.root.name}:{model_name}:", encoding=self.encoding),
            DiskResourceStore(self.root / model_name, encoding=self.encoding),
        )


@pytest.mark.usefixtures("valkey")
class TestRedis(SharedConformance):
    durable: ClassVar[bool] = False

    def make(self, root: Path) -> IStorageFactory:
        return RedisAndDisk(root)


@pytest.mark.usefixtures("valkey")
class TestRedisAsMessagePack(SharedConformance):
    durable: ClassVar[bool] = False

    def make(self, root: Path) -> IStorageFactory:
        return RedisAndDisk(root, Encoding.msgpack)


class Note(Struct):
    text: str
    code: str | None = None


FIELDS = ("text", IndexedField("code", unique=True))


class Instances:
    """Resource managers as several processes have them: over one prefix and one directory of bodies."""

    def __init__(self, root: Path, url: str) -> None:
        self.root, self.url = root, url
        self.made: list[ResourceManager[Note]] = []

    def __call__(self, fields=FIELDS, url: str | None = None, clock: Clock | None = None, **options):
        factory = RedisAndDisk(self.root, url=url or self.url, prefix=f"{self.root.name}:")
        crud = AutoCRUD(storage_factory=factory, **({} if clock is None else {"clock": clock}))
        manager = crud.add_model(Note, indexed_fields=list(fields), **options)
        self.made.append(manager)
        return manager


@pytest.fixture
async def instance(valkey, tmp_path):
    instances = Instances(tmp_path, valkey)
    yield instances
    for manager in instances.made:
        await manager.close()


@pytest.fixture
def server(valkey) -> Iterator[redis.Redis]:
    """The server itself."""
    with redis.Redis.from_url(valkey) as direct:
        yield direct
        direct.config_set("maxmemory", 0)


def meta_store(manager) -> RedisMetaStore:
    return manager.storage.meta_store


def key(manager, name: str) -> str:
    return f"{meta_store(manager)._prefix}{name}"


async def texts(manager, query: Query = Query()) -> list[str]:  # noqa: B008
    return sorted([found.data.text for found in (await manager.search(query)).items])


def keyed(name: str) -> Caller:
    return Caller("alice", key=IdempotencyKey(name))


# What it costs


class Proxy(TcpProxy):
    """Counts requests, and keeps some for later: while `keep` is set, what a client sends waits, whoever cuts its connection."""

    def __init__(self, url: str) -> None:
        super().__init__(url)
        self.requests = 0
        self.keep = False
        self.kept = threading.Event()
        self.later = threading.Event()
        self.late_answers: list[bytes] = []
        self._late = None
        self.answered = threading.Event()

    def url_for(self, url: str) -> str:
        parts, port = urlsplit(url), urlsplit(self.url).port
        user, at, _ = parts.netloc.rpartition("@")
        return urlunsplit(parts._replace(netloc=f"{user}{at}127.0.0.1:{port}"))

    def _pump(self, source, sink, answers):
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                if not answers:
                    self.requests += 1
                    if self.keep:
                        self._keep(source, sink)
                elif source is self._late:
                    self.late_answers.append(data)
                    self.answered.set()
                    continue
                elif not self._flows.is_set():
                    self.held.set()
                    self._flows.wait()
                sink.sendall(data)

    def _keep(self, client, server):
        """The client loses its connection; the server gets what it had sent when a test says so."""
        self.keep, self._late = False, server
        with self._mutex:
            self._open.discard(client)
        client.shutdown(2)
        client.close()
        self.kept.set()
        self.later.wait(60)


@pytest.fixture
def proxy(valkey) -> Iterator[Proxy]:
    with Proxy(valkey) as running:
        yield running
        running.later.set()


async def test_what_operations_cost(instance, valkey, proxy):
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


async def test_connections_cut_while_idle_cost_nobody_a_request(instance, server):
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


# The copy that searches read


async def test_a_store_that_was_flushed_is_an_empty_one(instance, server):
    first, second = instance(), instance()
    await first.create(Note("1", "a"), resource_id="r")
    assert await second.count() == 1
    server.flushall()
    for manager in (first, second):
        assert await texts(manager) == []
        assert await manager.count() == 0
    await second.create(Note("2", "a"), resource_id="r")
    assert await texts(first) == ["2"]
    server.flushall()
    await first.create(Note("3", "a"), resource_id="r")
    await first.update("r", Note("4", "b"))
    assert await texts(second) == await texts(first) == ["4"]


async def test_whoever_slept_for_longer_than_the_log_reaches_reads_everything_anew(instance, monkeypatch):
    monkeypatch.setattr(meta_store_redis, "LOG_ENTRIES", 5)
    awake, asleep = instance(), instance()
    for number in range(4):
        await awake.create(Note(f"{number}", f"{number}"), resource_id=f"{number}")
    assert await texts(asleep) == ["0", "1", "2", "3"]
    await awake.update("0", Note("0 again", "0"))
    assert await texts(asleep) == ["0 again", "1", "2", "3"]
    for round_ in range(4):
        await awake.update("1", Note(f"1 {round_}", "x"))
        await awake.create(Note(f"new {round_}"))
    await awake.delete("2")
    await awake.purge("3")
    assert await texts(asleep) == await texts(awake) == ["0 again", "1 3", "new 0", "new 1", "new 2", "new 3"]
    assert [meta.resource_id async for meta in meta_store(asleep).scan()] == [
        meta.resource_id async for meta in meta_store(awake).scan()
    ]
    uids = [(await awake.get("1", revision=number)).info.uid for number in range(1, 6)]
    assert await meta_store(asleep).unreferenced([*uids, "0/nothing"]) == ["0/nothing"]


async def test_the_log_is_bounded_by_bytes_too(instance, server, monkeypatch):
    monkeypatch.setattr(meta_store_redis, "LOG_BYTES", 4000)
    manager, other = instance(), instance()
    for number in range(20):
        await manager.create(Note(f"{number:02}"))
        assert await other.count() == number + 1
    entries = server.lrange(key(manager, "log"), 0, -1)
    assert sum(map(len, entries)) == int(server.hget(key(manager, "meta"), "bytes")) <= 4000
    await manager.batch([Create(Note(f"{number}")) for number in range(100)])
    assert server.llen(key(manager, "log")) == 0
    assert await other.count() == 120


@pytest.fixture
def paged(server, monkeypatch) -> Iterator[None]:
    """Copies are built from pages of a few resources: the server gives smaller sets than it is told as one."""
    monkeypatch.setattr(search_replica, "PAGE_SIZE", 3)
    name = "set-max-listpack-entries"
    usual = server.config_get(name)
    if usual:  # before Redis 7.2 none is so small
        server.config_set(name, 0)
    yield
    if usual:
        server.config_set(name, usual[name])


def scripts_run(manager, after: scripts.Script | None = None, do=None) -> list[scripts.Script]:
    """Which scripts its copy runs from now on; after one of them something is done."""
    copy_of, ran = meta_store(manager)._replica, []
    run = copy_of._run

    async def counted(script, *arguments):
        ran.append(script)
        answer = await run(script, *arguments)
        if script is after:
            await do()
        return answer

    copy_of._run = counted
    return ran


def rows(db):
    """All that a copy tells."""
    tables = ("resources ORDER BY id", "revisions JOIN resources USING (rid) ORDER BY id, revisions.revision")
    columns = (
        "id, version, nonce, doc, shown, missing, `f:text`, `f:code`",
        "id, revisions.revision, revisions.uid, revisions.doc",
    )
    return [db.execute(f"SELECT {what} FROM {table}").fetchall() for what, table in zip(columns, tables, strict=True)]


async def as_one_that_is_built_now(instance, manager) -> bool:
    return await meta_store(manager)._replica.read(rows) == await meta_store(instance())._replica.read(rows)


@pytest.mark.usefixtures("paged")
@pytest.mark.parametrize("at_once", [1, 1000])
async def test_copies_are_right_whatever_happens_meanwhile(instance, monkeypatch, at_once):
    """Copies that follow, and copies that are built while others write, are the same as one that is built afterwards."""
    monkeypatch.setattr(meta_store_redis, "LOG_ENTRIES", 30)
    monkeypatch.setattr(search_replica, "AT_ONCE", at_once)
    managers = [instance(retention=Retention(last=3)) for _ in range(4)]
    for number in range(20):
        await managers[0].create(Note(f"{number}"), resource_id=f"{number}")
    rng = random.Random(1)

    async def write(manager, number) -> None:
        rid = f"{rng.randrange(20)}"
        operations = {
            "update": [Update(resource_id=rid, data=Note(f"{number}"))],
            "again": [Purge(resource_id=rid), Create(Note(f"again {number}"), rid)],
            "delete": [Delete(resource_id=rid), Purge(resource_id=rid), Create(Note(f"{number}"), rid)],
            "switch": [Update(resource_id=rid, data=Note(f"{number}")), Switch(resource_id=rid, revision=1)],
        }
        with contextlib.suppress(LookupError):
            await manager.batch(operations[rng.choice(sorted(operations))])

    async def read(manager) -> None:
        if rng.random() < 0.3:
            meta_store(manager)._replica.drop()
        assert await manager.count() == 20

    for number in range(40):
        await asyncio.gather(
            *(write(manager, number) for manager in managers), *(read(manager) for manager in managers)
        )

    expected = await meta_store(instance())._replica.read(rows)
    assert len(expected[0]) == 20
    for manager in managers:
        assert await meta_store(manager)._replica.read(rows) == expected
        for rid, revision, *_ in expected[1]:
            assert (await manager.get(rid, revision=revision)).info.revision == revision


async def test_copies_follow_over_purges(instance):
    """They need not read everything anew."""
    manager, other = instance(), instance()
    for number in range(5):
        await manager.create(Note(f"{number}", f"{number}"), resource_id=f"{number}")
    assert await other.count() == 5
    ran = scripts_run(other)
    await manager.purge("0")
    assert await texts(other) == ["1", "2", "3", "4"]
    # Its value goes to another one, its id to one of fewer revisions.
    await manager.update("1", Note("1", "0"))
    await manager.update("2", Note("2", "x"))
    await manager.update("2", Note("2", "y"))
    await manager.batch(
        [Update(resource_id="2", data=Note("gone")), Purge(resource_id="2"), Create(Note("2", "2"), "2")]
    )
    await manager.batch(
        [Create(Note("5", "1"), "5"), Purge(resource_id="5"), Purge(resource_id="3"), Create(Note("6", "3"), "6")]
    )
    assert await texts(other) == ["1", "2", "4", "6"]
    assert await texts(other, Query(where=field("code").in_(["0", "2", "3"]))) == ["1", "2", "6"]
    assert set(ran) == {scripts.FOLLOW}
    assert await as_one_that_is_built_now(instance, other)


@pytest.mark.usefixtures("paged")
async def test_a_copy_is_built_although_more_is_written_meanwhile_than_the_log_keeps(instance, monkeypatch):
    monkeypatch.setattr(meta_store_redis, "LOG_ENTRIES", 8)
    manager, other = instance(retention=Retention(last=2)), instance()
    await manager.batch([Create(Note(f"{number}"), f"{number}") for number in range(40)])
    rng = random.Random(2)

    async def write() -> None:
        for _ in range(2):
            rid = f"{rng.randrange(40)}"
            await manager.batch([Purge(resource_id=rid), Create(Note("again"), rid)])
            await manager.update(rid, Note("and again"))
            await manager.update(f"{rng.randrange(40)}", Note(os.urandom(4).hex()))

    ran = scripts_run(other, scripts.PAGE, write)
    assert await other.count() == 40
    assert 4 < ran.count(scripts.PAGE) < 24  # once
    assert await as_one_that_is_built_now(instance, other)


async def test_a_read_ends_however_much_is_written(instance, monkeypatch):
    monkeypatch.setattr(search_replica, "AT_ONCE", 2)
    manager, other = instance(), instance()
    await manager.create(Note("0"), resource_id="r")
    assert await other.count() == 1
    for number in range(10):
        await manager.create(Note(f"{number}"))

    async def write() -> None:
        for _ in range(3):
            await manager.update("r", Note(os.urandom(4).hex()))

    ran = scripts_run(other, scripts.FOLLOW, write)
    assert await other.count() == 11
    assert set(ran) == {scripts.FOLLOW}
    assert 2 < len(ran) < 8


async def test_no_answer_tells_much_more_than_was_asked_for(instance):
    """Whatever else waits for the server."""
    manager = instance()
    store = meta_store(manager)
    for _ in range(3):
        await manager.batch([Create(Note("1")) for _ in range(10)])
    for limit, batches in {1: 1, 21: 2, 1000: 3}.items():
        start = search_replica.Position((await store._look()).store, 0, b"")
        _, _, seq, _, txids, told = await store._run(scripts.FOLLOW, *start, limit)
        assert (seq, len(txids), len(told)) == (3, batches, 10 * batches)


@pytest.mark.usefixtures("paged")
@pytest.mark.parametrize("building", [True, False])
async def test_a_replica_takes_over_between_two_answers(instance, server, monkeypatch, building):
    """What was read ahead of the copy's position is of a history that is no more, although the position is of both."""
    monkeypatch.setattr(search_replica, "AT_ONCE", 1)
    manager, other = instance(), instance()
    for number in range(20):
        await manager.create(Note(f"{number}"), resource_id=f"{number}")
    if not building:
        assert await other.count() == 20
        await manager.update("0", Note("both"))
        await manager.update("1", Note("both"))
    earlier: dict[bytes, bytes] = {}

    async def lose() -> None:
        if not earlier:
            earlier.update((name, server.dump(name)) for name in server.keys(key(manager, "*")))
            for number in range(20):
                await manager.update(f"{number}", Note("lost"))

    async def take_over() -> None:
        if taken_over:
            return
        taken_over.append(True)
        server.delete(*server.keys(key(manager, "*")))
        for name, dump in earlier.items():
            server.restore(name, 0, dump)

    taken_over: list[bool] = []
    ran = meta_store(other)._replica._run

    async def run(script, *arguments):
        if script is (scripts.PAGE if building else scripts.FOLLOW):
            await lose()
            answer = await ran(script, *arguments)
            await take_over()
            return answer
        return await ran(script, *arguments)

    meta_store(other)._replica._run = run
    assert await other.count(Query(where=field("text").eq("lost"))) == 0
    assert taken_over
    assert await as_one_that_is_built_now(instance, other)


async def test_no_answer_is_applied_to_a_copy_of_another_history(instance):
    """The answer came from a replica that took over, and another event loop had brought the copy up before that."""
    manager = instance()
    await manager.create(Note("1"))
    copy = await meta_store(manager)._replica.current()
    here, heads = copy.position, {1: b"another txid 123", 2: b"the last one 123"}
    with pytest.raises(search_replica.RebuildNeeded):
        await copy.advance([], here._replace(seq=2, head=heads[2]), heads, {})
    assert copy.position == here


@pytest.mark.parametrize("writes", [0, 1, 2, 4], ids=["far behind", "behind", "as far", "ahead"])
async def test_a_replica_that_takes_over_behind_its_primary(instance, server, writes):
    """It goes on from an earlier state. Copies of what it never received must not be kept, whatever number it reaches."""
    manager, other = instance(), instance()
    await manager.create(Note("1", "a"), resource_id="r")
    names = server.keys(key(manager, "*"))
    earlier = {name: server.dump(name) for name in names}
    await manager.update("r", Note("lost", "b"))
    await manager.create(Note("lost too", "c"))
    assert await other.count() == 2
    server.delete(*server.keys(key(manager, "*")))
    for name, dump in earlier.items():
        server.restore(name, 0, dump)
    kept = ["1", *(f"kept {number}" for number in range(writes))]
    for text in kept[1:]:
        await manager.create(Note(text))
    assert await texts(other) == await texts(manager) == sorted(kept)
    await manager.create(Note("free again", "c"))


async def test_a_late_answer_takes_no_copy_back(instance):
    """Event loops ask for themselves, and the answer to an earlier question may arrive later."""
    manager = instance()
    await manager.create(Note("1", "a"), resource_id="r")
    follower = meta_store(instance())
    copy = await follower._replica.current()
    run, asked, go_on = follower._run, asyncio.Event(), asyncio.Event()

    async def slow(*arguments):
        answer = await run(*arguments)
        asked.set()
        await go_on.wait()
        return answer

    await manager.update("r", Note("2", "b"))
    follower._replica._run = slow
    late = asyncio.create_task(follower._replica._refreshed())
    await asked.wait()
    follower._replica._run = run
    await manager.update("r", Note("3", "c"))
    await manager.create(Note("4"))
    assert await follower._replica.current() is copy
    go_on.set()
    assert await late is copy
    assert copy.position.seq == 4
    query = Query(where=field("text").eq("3")).resolve(manager.codec.fields)
    assert [hit.meta.version for hit in (await follower.search(query)).items] == [3]


async def test_a_store_of_which_a_part_was_evicted_says_so(instance, server):
    manager = instance()
    await manager.create(Note("1", "a"), resource_id="r")
    server.delete(key(manager, "meta"))
    for call in (manager.create(Note("2")), manager.count(), instance().open()):
        with pytest.raises(StoreDamaged, match="noeviction"):
            await call


async def test_event_loops_share_a_copy(instance):
    manager = instance()
    await manager.create(Note("1"))
    counted = []

    async def count():
        counted.extend(await asyncio.gather(*(manager.count() for _ in range(20))))

    threads = [threading.Thread(target=lambda: asyncio.run(count())) for _ in range(3)]
    for thread in threads:
        thread.start()
    await count()
    for thread in threads:
        await asyncio.to_thread(thread.join)
    assert counted == [1] * 80


async def test_purge_leaves_no_trace(instance, server):
    manager, other = instance(), instance()
    for number in range(5):
        await manager.create(Note(f"kept {number}", f"{number}"))
    await manager.create(Note("secret text", "secret code"), resource_id="secret id", by=keyed("k"))
    await manager.batch(
        [
            Update(resource_id="secret id", data=Note("secret text again", "secret code")),
            Create(Note("kept 5")),
        ]
    )
    assert await other.count() == await manager.count() == 7
    await manager.purge("secret id")
    own = meta_store(manager)._replica._copy.db._connection.serialize("main")
    assert b"kept 5" in own
    assert b"secret" not in own
    for name in server.keys("*"):
        kind = server.type(name)
        read = {
            b"hash": server.hgetall,
            b"set": server.smembers,
            b"list": lambda name: server.lrange(name, 0, -1),
            b"zset": lambda name: server.zrange(name, 0, -1),
        }[kind]
        assert b"secret" not in name + repr(read(name)).encode(), name
    assert await other.count() == await manager.count() == 6
    with pytest.raises(AnswerGone):
        await manager.create(Note("secret text", "secret code"), resource_id="secret id", by=keyed("k"))
    await manager.create(Note("new", "secret code"), resource_id="secret id")


# Versions of the program


async def test_versions_with_other_fields_share_one_store(instance):
    old, new = instance(fields=("text",)), instance(fields=("text", "code"))
    await old.create(Note("from old", "a"))
    await new.open()
    await new.create(Note("from new", "b"))
    for manager in (old, new):
        assert await manager.count(Query(where=field("text").starts_with("from"))) == 2
    assert await new.count(Query(where=field("code").in_(["a", "b"]))) == 2
    later = await old.create(Note("later", "c"))
    await old.update(later.meta.resource_id, Note("later still", "d"))
    outdated = await meta_store(new).outdated(10)
    assert [meta.resource_id for meta in outdated] == [later.meta.resource_id]
    again = instance(fields=("text", "code"))
    assert await again.count(Query(where=field("code").eq("d"))) == 1
    assert await again.count(Query(where=field("code").eq("c"))) == 0
    assert await new.count(Query(where=field("code").eq("d"))) == 1  # indexed for all
    assert await meta_store(new).outdated(10) == []


async def test_a_unique_field_binds_earlier_versions_too(instance):
    old = instance(fields=("text", "code"))
    await old.create(Note("0", "a"), resource_id="0")
    new = instance()
    await new.create(Note("1", "b"))
    with pytest.raises(UniqueConflict):
        await new.create(Note("x", "a"))
    with pytest.raises(UniqueConflict):
        await old.create(Note("2", "b"))
    await old.update("0", Note("0", "c"))
    await new.create(Note("2", "a"))
    with pytest.raises(UniqueConflict):
        await new.create(Note("3", "c"))
    with pytest.raises(ConfigError, match="unique"):
        await instance(fields=("text",)).create(Note("3", "z"))


async def test_a_field_cannot_become_unique_over_duplicates(instance):
    old = instance(fields=("text", "code"))
    await old.create(Note("0", "a"))
    second = await old.create(Note("1", "a"))
    with pytest.raises(ConfigError, match=r"code .*share a value"):
        await instance().create(Note("2", "b"))
    await old.create(Note("3", "a"))  # nothing has become of it
    await old.purge(second.meta.resource_id)
    with pytest.raises(ConfigError, match="share a value"):
        await instance().create(Note("2", "b"))


async def test_a_field_becomes_unique_while_others_write(instance):
    old = instance(fields=("text", "code"))
    await old.create(Note("0", "a"))
    new = meta_store(instance())
    run, written = new._run, []

    async def slow(script, *arguments):
        if script is scripts.ADOPT and not written:
            written.append(await old.create(Note("1", "b")))
        return await run(script, *arguments)

    new._run = slow
    await new.commit([_create("r")])
    assert written
    for code in ("a", "b"):
        with pytest.raises(UniqueConflict):
            await old.create(Note("2", code))


# When everything goes wrong


async def lose_an_answer(proxy: Proxy, write, before_the_end=lambda: None):
    """Begin to write, let the server do it, and cut the connection before the answer arrives."""
    proxy.hold()
    task = asyncio.ensure_future(write)
    assert await asyncio.to_thread(proxy.held.wait, 60)
    before_the_end()
    proxy.cut()
    proxy.release()
    return await task


async def lose_a_request(proxy: Proxy, write):
    """Begin to write, and cut the connection before the server has the request; it gets it when `later` is set."""
    proxy.keep = True
    task = asyncio.ensure_future(write)
    assert await asyncio.to_thread(proxy.kept.wait, 60)
    return await task


async def test_a_lost_answer_is_found_again(instance, valkey, proxy, server):
    manager = instance(url=proxy.url_for(valkey))
    await manager.create(Note("0"))
    created = await lose_an_answer(proxy, meta_commit(manager, "r"))
    assert [meta.resource_id for meta in created] == ["r"]
    found = await lose_an_answer(proxy, manager.storage.meta_store.commit([_update(created[0])]))
    assert (await meta_store(manager).get("r")) == found[0]
    assert found[0].version == 2
    assert int(server.hget(key(manager, "meta"), "seq")) == 3


def meta_commit(manager, rid: str):
    """A commit of metadata alone."""
    return meta_store(manager).commit([_create(rid)])


def _create(rid: str, **changes) -> Change:
    now = dt.datetime(2026, 1, 1, tzinfo=dt.UTC)
    meta = ResourceMeta(
        resource_id=rid,
        version=1,
        nonce="n",
        revision=1,
        total_revision_count=1,
        schema_version=1,
        status="stable",
        is_deleted=False,
        uid="0/x",
        data_hash="",
        encoding=Encoding.json,
        created_time=now,
        updated_time=now,
        created_by="a",
        updated_by="a",
    )
    change = Change(meta=meta, record=None, index=None, expect="absent")
    return replace(change, **changes)


def _update(meta) -> Change:
    newer = replace(meta, version=meta.version + 1, nonce=os.urandom(4).hex())
    return Change(meta=newer, record=None, index=None, expect=Version(meta.version, meta.nonce))


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
    monkeypatch.setattr(meta_store_redis, "NOTES", 3)
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


async def test_what_was_sent_to_a_store_changes_nothing_in_its_next_life(instance, valkey, proxy, server):
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


async def test_whoever_was_silent_for_long_may_still_write(instance, monkeypatch):
    monkeypatch.setattr(meta_store_redis, "NOTES", 3)
    silent, busy = instance(), instance()
    await silent.create(Note("0"))
    for number in range(10):
        await busy.create(Note(f"{number}"))
    await silent.create(Note("1"))
    assert await silent.count() == 12


async def test_what_became_of_it_is_not_known_where_the_store_is_another_one(instance, valkey, proxy, server):
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


async def test_what_became_of_it_is_not_known_where_nobody_can_be_asked(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(meta_store_redis, "COMMIT_TIMEOUT_S", 0.0)
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


async def test_whoever_stops_waiting_leaves_no_answer_to_the_next(instance, valkey, proxy):
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


# What only this store must take care of


async def test_expecting_anything_is_one_more_than_what_is_there(instance):
    store = meta_store(instance())
    (first,) = await store.commit([_create("r", expect="any")])
    (second,) = await store.commit([_create("r", expect="any")])
    assert (first.version, second.version) == (1, 2)
    many = await asyncio.gather(*(store.commit([_create("r", expect="any")]) for _ in range(6)))
    assert sorted(metas[0].version for metas in many) == [3, 4, 5, 6, 7, 8]
    purge, create = _create("r", expect="any", purge=True), _create("r", expect="any")
    left = await store.commit([create, create, purge, create, create])
    assert [meta.version for meta in left] == [9, 10, 1, 1, 2]
    assert (await store.get("r")).version == 2
    await store.commit([_create("nothing", expect="any", purge=True)])


async def test_no_id_is_anybody_elses_key(valkey, tmp_path):
    """Prefixes that look like another store's keys, and ids that look like its prefix."""
    prefixes = [f"{tmp_path.name}:", f"{tmp_path.name}:res:", f"{tmp_path.name}:res:a", f"{tmp_path.name}:m", "", "me"]
    stores = [RedisMetaStore(valkey, prefix=prefix) for prefix in prefixes]
    ids = ["meta", "res:meta", "a", "ameta", "log", "x" * 100_000, "\n", "1:a", "k0:", "*", "😀", "ids"]
    for at, store in enumerate(stores):
        await store.commit([_create(rid) for rid in ids[at:]])
    for at, store in enumerate(stores):
        assert [meta.resource_id async for meta in store.scan()] == sorted(ids[at:])
        await store.commit([_create(rid, purge=True, expect="any") for rid in ids])
        assert await store.count(Query(include_deleted=True).resolve({})) == 0
        await store.close()


async def test_a_body_that_was_replaced_takes_no_record_along(instance):
    manager = instance()
    created = await manager.create(Note("1"), status="draft")
    rid, store = created.meta.resource_id, meta_store(manager)
    record = await store.revision(rid, 1)
    changed = replace(_update(created.meta), record=replace(record, uid="0/other"))
    (meta,) = await store.commit([changed])
    await store.commit([replace(_update(meta), drop=(record.uid,))])
    assert (await store.revision(rid, 1)).uid == "0/other"
    assert await store.unreferenced([record.uid, "0/other"]) == [record.uid]


async def test_histories_with_holes_have_pages(instance):
    manager = instance()
    created = await manager.create(Note("1"))
    rid = created.meta.resource_id
    await manager.batch([Update(resource_id=rid, data=Note(f"{number}")) for number in range(2, 41)])
    infos = (await manager.revisions(rid, limit=100)).items
    assert [info.revision for info in infos] == list(range(40, 0, -1))
    meta = (await manager.get(rid)).meta
    gone = tuple(info.uid for info in infos if info.revision not in (40, 39, 20, 3, 2))
    await meta_store(manager).commit([replace(_update(meta), drop=gone)])
    seen, before = [], None
    while True:
        page = await meta_store(manager).revisions(rid, before, 2)
        seen.append([info.revision for info in page.items])
        if (before := page.next) is None:
            break
    assert seen == [[40, 39], [20, 3], [2]]
    assert (await meta_store(manager).revisions(rid, -5)).items == []
    assert (await meta_store(manager).revisions(rid, 10**30)).items[0].revision == 40


async def test_keys_are_forgotten_after_a_day_and_leave_nothing(instance, server):
    clock = Clock()
    manager = instance(clock=clock)
    created = await manager.create(Note("1"), by=keyed("old"))
    await manager.update(created.meta.resource_id, Note("2"), by=keyed("old too"))
    assert server.zcard(key(manager, "keytimes")) == 2
    clock.now += dt.timedelta(microseconds=KEEP_KEYS_US + 1000)
    await manager.create(Note("3"), by=keyed("new"))
    assert server.zcard(key(manager, "keytimes")) == 1
    assert server.hlen(key(manager, "done")) == 2
    fields = [name for res in server.keys(key(manager, "res:*")) for name in server.hkeys(res)]
    assert len([name for name in fields if name.startswith(b"k")]) == 1
    await manager.create(Note("1"), by=keyed("old"))
    assert await manager.count() == 3


async def test_a_url_may_say_what_the_driver_understands(instance, valkey):
    manager = instance(url=f"{valkey}?decode_responses=true&protocol=3&max_connections=1&socket_timeout=5")
    await asyncio.gather(*(manager.create(Note(f"{number}")) for number in range(20)))
    assert await manager.count() == 20


def test_a_url_that_cannot_be_read_is_not_repeated():
    for url in (
        "redis://:pa/secret@host",
        "http://:secret@host",
        "redis://:secret@host:port",
        "redis://h?nothing=secret",
        "redis://h/secret",
        "rediss://h/1/2",
    ):
        with pytest.raises(ConfigError, match="redis_url") as caught:
            RedisMetaStore(url)
        assert "secret" not in str(caught.value)


async def test_a_password_is_made_for_each_connection_and_may_change(valkey, server, tmp_path):
    made = []

    def password() -> str:
        made.append(f"token-{len(made)}")
        server.acl_setuser("app", reset=True, enabled=True, passwords=[f"+{made[-1]}"], keys="*", categories=["+@all"])
        return made[-1]

    url = valkey.replace(valkey[valkey.index("://") + 3 : valkey.index("@")], "app:ignored")
    store = RedisMetaStore(url, prefix=f"{tmp_path.name}:", password=password)
    await store.health()
    await store.health()
    assert made == ["token-0"]  # an open connection outlives its token
    server.client_kill_filter(user="app")
    await store.health()
    assert len(made) == 2
    await store.close()
    server.acl_deluser("app")
