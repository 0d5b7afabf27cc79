"""PostgresMetaStore on a real server."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import socket
from pathlib import Path
from unittest import mock
from urllib.parse import urlsplit

import psycopg
import pytest
from msgspec import Struct

from app.autocrud import AutoCRUD, Encoding, Query, field
from app.autocrud.errors import (
    ConfigError,
    InvalidData,
    MetadataTooLarge,
    StoreUnavailable,
    UniqueConflict,
    WriteContention,
)
from app.autocrud.resource_manager.backends.postgres import pool
from app.autocrud.resource_manager.backends.postgres.schema import name_of
from app.autocrud.resource_manager.basic import IndexedField, IStorage
from app.autocrud.resource_manager.core import Caller, IdempotencyKey, SimpleStorage, Update
from app.autocrud.resource_manager.engine import planning
from app.autocrud.resource_manager.meta_store import postgres as meta_store_postgres
from app.autocrud.resource_manager.meta_store.postgres import PostgresMetaStore
from app.autocrud.resource_manager.resource_store.simple import DiskResourceStore, MemoryResourceStore
from app.autocrud.resource_manager.runtime.moments import Moment
from app.autocrud.resource_manager.storage_factory import IStorageFactory, PostgresS3StorageFactory
from tests.conformance import SharedConformance
from tests.postgres import Postgres
from tests.services import BUCKET, given
from tests.stores.fast_slow_worker import change_of
from tests.tcp_proxy import TcpProxy


class WithDisk(IStorageFactory):
    def __init__(self, root: Path, encoding: Encoding | None = None) -> None:
        self.root, self.encoding = root, encoding

    def build(self, model_name: str) -> IStorage:
        meta_store = PostgresMetaStore(
            os.environ["TEST_POSTGRES"],
            encoding=self.encoding,
            table_name=f"{self.root.name}/meta_{model_name}",
            max_size=4,
        )
        return SimpleStorage(meta_store, DiskResourceStore(self.root / model_name, encoding=self.encoding))


@pytest.mark.usefixtures("postgres")
class TestPostgresWithDisk(SharedConformance):
    def make(self, root: Path) -> IStorageFactory:
        return WithDisk(root)


@pytest.mark.usefixtures("postgres")
class TestPostgresAsMessagePack(SharedConformance):
    def make(self, root: Path) -> IStorageFactory:
        return WithDisk(root, Encoding.msgpack)


@pytest.mark.usefixtures("postgres", "ministack_s3")
class TestPostgresWithS3(SharedConformance):
    def make(self, root: Path) -> IStorageFactory:
        s3 = given("TEST_MINISTACK")
        return _Named(root, os.environ["TEST_POSTGRES"], BUCKET, *s3, prefix=f"{root.name}/")


class _Named(PostgresS3StorageFactory):
    """With tables of each test's own."""

    def __init__(self, root: Path, *arguments, **options) -> None:
        super().__init__(*arguments, **options)
        self.root = root

    def build(self, model_name: str) -> IStorage:
        return super().build(f"{self.root.name}_{model_name}")


# What is this store's own


class Note(Struct):
    text: str
    views: int = 0
    tags: list[str] = []
    code: str | None = None


FIELDS = ("text", "views", "tags", IndexedField("code", unique=True))


def manager_of(dsn: str, name: str, fields=FIELDS, bodies=None, **options):
    class Factory(IStorageFactory):
        def build(self, model_name: str) -> IStorage:
            return SimpleStorage(
                PostgresMetaStore(dsn, table_name=name, **options),
                bodies if bodies is not None else MemoryResourceStore(),
            )

    return AutoCRUD(storage_factory=Factory()).add_model(Note, indexed_fields=list(fields))


@pytest.fixture
def name(request) -> str:
    """A table of each test's own."""
    return request.node.name


async def plan_of(dsn: str, meta_store: PostgresMetaStore, query: Query) -> str:
    statement, params = meta_store._search(query.resolve(meta_store._spec.fields))
    async with await psycopg.AsyncConnection.connect(dsn) as connection:
        rows = await connection.execute(f"EXPLAIN {statement}", params)
        return "\n".join(row[0] for row in await rows.fetchall())


async def test_every_search_uses_its_index_at_100_000_rows(postgres, name):
    manager = manager_of(postgres, name)
    await manager.create(Note("seed", tags=["x"]))
    meta_store = manager.storage.meta_store
    main = meta_store._schema.names["main"]
    async with await psycopg.AsyncConnection.connect(postgres, autocommit=True) as connection:
        await connection.execute(
            f"INSERT INTO {main} SELECT 'r' || n, 1, 'x', 1, 1, 1, 'stable', FALSE, now() + n * interval '1 second', now(), 'a', 'a',"
            " '0/u' || n, 'json', doc, shown, jsonb_build_object('text', 't' || n, 'views', n, 'tags', jsonb_build_array('g' || n % 1000)),"
            f" '{{}}', spec FROM {main}, generate_series(1, 100000) n"
        )
        await connection.execute(f"ANALYZE {main}")
    queries = {
        "text": Query(where=field("text").eq("t5")),
        "text one of": Query(where=field("text").in_(["t5", "t6"])),
        "text prefix": Query(where=field("text").starts_with("t9999")),
        "range": Query(where=field("views").gte(99_000) & field("views").lt(99_500), sort=("-views",), limit=20),
        "sort": Query(sort=("views",), limit=20),
        "sort text": Query(sort=("text",), limit=20),
        "list": Query(where=field("tags").contains("g7")),
        "created": Query(sort=("-meta.created_time",), limit=20),
        "id": Query(where=field("meta.resource_id").eq("r5")),
    }
    for what, query in queries.items():
        plan = await plan_of(postgres, meta_store, query)
        assert "Seq Scan" not in plan, f"{what}: {plan}"
        assert "Index" in plan
    assert len((await manager.find(Query(where=field("tags").contains("g7"), limit=200))).items) == 100
    await manager.close()


async def test_a_commit_is_one_round_trip(postgres, name, monkeypatch):
    """And so is a read: as many statements as the raw client would send."""
    manager = manager_of(postgres, name)
    created = await manager.create(Note("a"))
    sent = []
    execute = psycopg.AsyncConnection.execute

    async def counted(self, query, *given, **more):
        sent.append(query)
        return await execute(self, query, *given, **more)

    monkeypatch.setattr(psycopg.AsyncConnection, "execute", counted)
    meta_store = manager.storage.meta_store
    for call, expected in (
        (lambda: manager.create(Note("b")), 1),
        (lambda: meta_store.get(created.meta.resource_id), 1),
        (lambda: manager.update(created.meta.resource_id, Note("c")), 2),
        (manager.find, 1),
        (manager.count, 1),
    ):
        sent.clear()
        await call()
        assert len(sent) == expected, sent
    await manager.close()


async def test_an_index_entry_that_is_too_long_is_no_unavailable_store(postgres, name):
    """Only an id that an earlier program took can be so long."""
    manager = manager_of(postgres, name)
    with mock.patch.object(planning, "check_new_id", return_value=None):
        await manager.create(Note("a"), resource_id="".join(random.Random(1).choices("abcdefghijklmnop", k=2000)))
    (meta,) = [meta async for meta in manager.storage.scan()]
    long = "".join(map(chr, random.Random(2).choices(range(0x10000, 0x110000), k=256)))
    with pytest.raises(MetadataTooLarge, match=r"shorten the text; nothing was changed$"):
        await manager.update(meta.resource_id, Note(long))
    await manager.update(meta.resource_id, Note("b"))
    assert await manager.count(Query(where=field("text").eq("b"))) == 1
    await manager.close()


async def test_texts_of_any_length(postgres, name):
    """Entries of a B-tree end at 2.7 KB; texts do not."""
    manager = manager_of(postgres, name)
    long = "b" + "".join(random.Random(1).choices("äbcdef😀", k=20_000))
    for at, text in enumerate((f"{long}1", f"{long}2", f"{long}2x", "z")):
        await manager.create(Note(text, code=f"{text}{at}"), resource_id=f"{at}")
    for where, found in (
        (field("text").eq(f"{long}2"), ["1"]),
        (field("text").gt(f"{long}1"), ["1", "2", "3"]),
        (field("text").starts_with(f"{long}2"), ["1", "2"]),
        (field("text").in_([f"{long}1", "z"]), ["0", "3"]),
        (~field("text").lte(f"{long}2"), ["2", "3"]),
    ):
        page = await manager.find(Query(where=where, sort=("text",)))
        assert [hit.meta.resource_id for hit in page.items] == found
    with pytest.raises(UniqueConflict):
        await manager.create(Note("y", code=f"{long}10"))
    with pytest.raises(InvalidData):
        await manager.create(Note("y"), resource_id="x" * 3000)
    await manager.close()


@pytest.mark.parametrize("landed", [True, False])
async def test_a_lost_answer_is_resolved(postgres, name, landed):
    """The connection ends while the commit is under way: whether it happened is found out, and it happens once."""
    parts = urlsplit(postgres)
    with TcpProxy(f"http://{parts.hostname}:{parts.port}") as proxy:
        through = f"postgresql://{parts.username}@127.0.0.1:{urlsplit(proxy.url).port}/postgres"
        manager, direct = manager_of(through, name), manager_of(postgres, name)
        await manager.create(Note("first"))
        await direct.count()
        if landed:
            proxy.hold()
            writing = asyncio.create_task(manager.create(Note("x")))
            await asyncio.to_thread(proxy.held.wait, 20)  # the server has answered
            proxy.release()
            proxy.cut()
        else:
            async with await psycopg.AsyncConnection.connect(postgres) as blocker:
                lock = manager.storage.meta_store._schema.lock
                await blocker.execute("SELECT pg_advisory_xact_lock(%s)", (lock,))
                writing = asyncio.create_task(manager.create(Note("x")))
                while not await _waits(postgres):
                    await asyncio.sleep(0)
                proxy.cut()
            # The call that nobody waits for goes on now, or is refused: one of the two.
        created = await writing
        assert (await direct.meta(created.meta.resource_id)) == created.meta
        assert await direct.count() == 2
        await manager.close()
        await direct.close()


async def _waits(dsn: str) -> bool:
    async with await psycopg.AsyncConnection.connect(dsn) as connection:
        rows = await connection.execute("SELECT 1 FROM pg_locks WHERE locktype = 'advisory' AND NOT granted")
        return bool(await rows.fetchall())


async def test_connections_that_were_cut_cost_no_request(postgres, name):
    parts = urlsplit(postgres)
    with TcpProxy(f"http://{parts.hostname}:{parts.port}") as proxy:
        through = f"postgresql://{parts.username}@127.0.0.1:{urlsplit(proxy.url).port}/postgres"
        manager = manager_of(through, name, max_size=3)
        await manager.create(Note("0"), resource_id="r")
        all_there = asyncio.Barrier(3)
        for number in range(1, 8):
            await asyncio.gather(*(manager.storage.meta_store._do(lambda _: all_there.wait()) for _ in range(3)))
            assert proxy.cut() == 3
            if number % 2:
                await manager.update("r", Note(f"{number}"))
            else:
                assert (await manager.meta("r")).revision == number // 2 + 1
        await manager.close()


@pytest.fixture
async def behind(postgres, name):
    """A manager behind a network that can be held up, and this network."""
    parts = urlsplit(postgres)
    with TcpProxy(f"http://{parts.hostname}:{parts.port}") as proxy:
        manager = manager_of(f"postgresql://{parts.username}@127.0.0.1:{urlsplit(proxy.url).port}/postgres", name)
        yield manager, proxy
        proxy.release()
        await manager.close()


async def test_answers_that_never_come_hold_no_reader_up(behind, monkeypatch):
    """Connections whose bytes are acknowledged and swallowed; the next request has new ones."""
    manager, proxy = behind
    await manager.create(Note("0"), resource_id="r")
    all_there = asyncio.Barrier(5)
    await asyncio.gather(*(manager.storage.meta_store._do(lambda _: all_there.wait()) for _ in range(5)))
    monkeypatch.setattr(pool, "ANSWER_S", 0.2)
    proxy.hold()
    left = asyncio.create_task(manager.count())
    await asyncio.to_thread(proxy.held.wait, 20)
    left.cancel()  # who asked has gone; psycopg asks the server to stop, and waits for its answer
    async with asyncio.timeout(20):
        with pytest.raises(StoreUnavailable):
            await manager.meta("r")
        monkeypatch.undo()
        assert proxy.swallow() > 2
        proxy.release()
        await asyncio.wait([left])
        await asyncio.gather(*(manager.meta("r") for _ in range(5)))


@pytest.mark.parametrize("how", ["read", "write"])
async def test_connections_that_were_dropped_a_moment_after_their_use_cost_no_request(behind, monkeypatch, how):
    """They are not asked whether they are there: an answer is waited for, and then a new connection is used."""
    manager, proxy = behind
    await manager.create(Note("0"), resource_id="r")
    all_there = asyncio.Barrier(5)
    await asyncio.gather(*(manager.storage.meta_store._do(lambda _: all_there.wait()) for _ in range(5)))
    monkeypatch.setattr(pool, "ANSWER_S", 1.0)
    monkeypatch.setattr(meta_store_postgres, "STATEMENT_S", 0.8)
    assert proxy.swallow() >= 5
    await (manager.meta("r") if how == "read" else manager.create(Note("1")))
    assert await manager.count() == (1 if how == "read" else 2)


@pytest.mark.parametrize("how", ["read", "write"])
async def test_connections_that_were_dropped_while_unused_cost_no_request(behind, monkeypatch, how):
    """Dropped without a word, as by a NAT while a function was frozen: one connection is waited for, and shortly."""
    manager, proxy = behind
    await manager.create(Note("0"), resource_id="r")
    all_there = asyncio.Barrier(5)
    await asyncio.gather(*(manager.storage.meta_store._do(lambda _: all_there.wait()) for _ in range(5)))
    connections = [connection for _, connection in manager.storage.meta_store._pool()._idle]
    checked = []
    check = pool.Connection.check

    async def counted(connection):
        checked.append(connection)
        await check(connection)

    monkeypatch.setattr(pool.Connection, "check", counted)
    monkeypatch.setattr(pool, "CHECK_S", 0.3)
    await manager.meta("r")
    assert checked == []  # they were used a moment ago
    for connection in connections:
        connection.used = Moment(connection.used.running, connection.used.wall - pool.CHECK_AFTER_S - 1)
    await manager.meta("r")
    assert len(checked) == 1
    for connection in connections:
        connection.used = Moment(connection.used.running - pool.CHECK_AFTER_S - 1, connection.used.wall)
    assert proxy.swallow() >= 5
    async with asyncio.timeout(pool.ANSWER_S - 4):  # an answer would be waited for longer
        await (manager.meta("r") if how == "read" else manager.update("r", Note("1")))
    assert len(checked) == 2
    assert all(connection.closed for connection in connections)


async def test_an_answer_that_never_comes_to_a_writer_is_resolved(behind, postgres, name, monkeypatch):
    manager, proxy = behind
    await manager.create(Note("0"))
    monkeypatch.setattr(pool, "ANSWER_S", 0.2)
    proxy.hold()
    writing = asyncio.create_task(manager.create(Note("x")))
    await asyncio.to_thread(proxy.held.wait, 20)  # the server has answered
    direct = manager_of(postgres, name)
    assert await direct.count() == 2
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(asyncio.shield(writing), 1)
    monkeypatch.undo()
    proxy.release()
    assert (await direct.meta((await writing).meta.resource_id)).revision == 1
    assert await direct.count() == 2
    await direct.close()


async def test_whoever_waits_for_a_lock_is_let_go(postgres, name, monkeypatch):
    monkeypatch.setattr(pool, "STATEMENT_S", 0.2)
    monkeypatch.setattr(meta_store_postgres, "STATEMENT_S", 0.2)
    manager = manager_of(postgres, name)
    created = await manager.create(Note("a"), resource_id="r")
    async with await psycopg.AsyncConnection.connect(postgres) as other:
        await other.execute(f"SELECT 1 FROM {manager.storage.meta_store._schema.names['main']} FOR UPDATE")
        async with asyncio.timeout(20):
            with pytest.raises(StoreUnavailable, match=r"took longer than 0\.2 s; nothing was changed"):
                await manager.update("r", Note("b"))
            with pytest.raises(StoreUnavailable, match="took longer"):
                await manager.storage.meta_store._rows("SELECT pg_sleep(60)")
    assert await manager.meta("r") == created.meta
    await manager.update("r", Note("c"))
    await manager.close()


async def test_a_server_that_is_gone_and_comes_back(name, monkeypatch):
    monkeypatch.setattr(pool, "WAIT_S", 2.0)
    server = Postgres()
    try:
        manager = manager_of(server.dsn, name)
        await manager.create(Note("a"), resource_id="a")
        server.stop("immediate")
        for call in (manager.meta("a"), manager.count()):
            with pytest.raises(StoreUnavailable) as raised:
                await call
            assert "127.0.0.1" not in str(raised.value)
        server.start()
        assert (await manager.meta("a")).version == 1
        await manager.update("a", Note("b"))
        await manager.close()
    finally:
        server.remove()


async def test_whoever_is_stopped_in_a_transaction_keeps_no_lock(postgres, name, monkeypatch):
    monkeypatch.setattr(pool, "IDLE_IN_TRANSACTION_S", 0.2)
    manager = manager_of(postgres, name)
    created = await manager.create(Note("a"))
    meta_store = manager.storage.meta_store
    holding, go = asyncio.Event(), asyncio.Event()

    async def hold(connection):
        async with connection.transaction():
            await connection.execute("SELECT pg_advisory_xact_lock(%s)", (meta_store._schema.lock,))
            holding.set()
            await go.wait()

    holder = asyncio.ensure_future(meta_store._do(hold, again=False))
    await holding.wait()
    async with asyncio.timeout(60):
        await manager.update(created.meta.resource_id, Note("b"))
    go.set()
    with pytest.raises(StoreUnavailable):
        await holder
    await manager.close()


async def test_a_pool_that_is_exhausted_says_so(postgres, name, monkeypatch):
    monkeypatch.setattr(pool, "WAIT_S", 0.05)
    manager = manager_of(postgres, name, max_size=1, password=lambda: "of its own")
    await manager.create(Note("a"))
    end = asyncio.Event()
    holder = asyncio.create_task(manager.storage.meta_store._do(lambda _: end.wait()))
    await asyncio.sleep(0)
    with pytest.raises(StoreUnavailable, match="no connection to spare"):
        await manager.count()
    with pytest.raises(StoreUnavailable, match="no connection to spare"):  # nothing was sent, so nothing is unknown
        await manager.storage.meta_store.commit([change_of("b")])
    end.set()
    await holder
    assert await manager.count() == 1
    await manager.close()


async def test_batches_and_single_writes_never_wait_in_a_circle(postgres, name):
    manager = manager_of(postgres, name)
    ids = [f"{number}" for number in range(4)]
    for rid in ids:
        await manager.create(Note("", code=rid), resource_id=rid)
    draw = random.Random(1)

    async def write() -> None:
        for number in range(30):
            chosen = draw.sample(ids, draw.choice([1, 1, 4]))
            with contextlib.suppress(WriteContention):
                await manager.batch([Update(data=Note(f"{number}", code=rid), resource_id=rid) for rid in chosen])

    async def deadlocks() -> int:
        async with await psycopg.AsyncConnection.connect(postgres, autocommit=True) as connection:
            await connection.execute("SELECT pg_stat_force_next_flush()")
            rows = await connection.execute("SELECT sum(deadlocks) FROM pg_stat_database")
            return (await rows.fetchone())[0]

    before = await deadlocks()
    await asyncio.gather(*(write() for _ in range(8)))
    await manager.close()
    assert await deadlocks() == before


async def test_whoever_is_cancelled_takes_no_connection_with_him(postgres, name):
    manager = manager_of(postgres, name, max_size=3)
    await manager.create(Note("a"), resource_id="r")
    draw = random.Random(1)

    async def read(patience: float) -> None:
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(manager.meta("r"), patience)

    for _ in range(100):
        await asyncio.gather(*(read(draw.choice([0.0005, 0.001, 0.002, 0.004])) for _ in range(8)))
    all_there = asyncio.Barrier(3)
    async with asyncio.timeout(20):
        await asyncio.gather(*(manager.storage.meta_store._do(lambda _: all_there.wait()) for _ in range(3)))
    await manager.close()


async def test_a_server_that_is_not_there_is_named_to_whoever_starts_the_program(monkeypatch, name):
    monkeypatch.setattr(pool, "WAIT_S", 0.5)
    manager = manager_of("postgresql://crud:a-secret@127.0.0.1:1/postgres", name)
    with pytest.raises(StoreUnavailable, match="cannot be reached right now") as raised:
        await manager.open()
    assert "refused" in str(raised.value.__cause__)
    assert "a-secret" not in str(raised.value.__cause__)
    await manager.close()


async def test_readiness_says_that_it_cannot_be_reached_and_the_log_says_why_once(name, caplog):
    store = manager_of("postgresql://crud:a-secret@127.0.0.1:1/postgres", name).storage.meta_store
    for _ in range(2):
        began = asyncio.get_running_loop().time()
        with pytest.raises(StoreUnavailable, match="cannot be reached right now"):
            await store.health()
        assert asyncio.get_running_loop().time() - began < 2
    await store.close()
    (line,) = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert line.startswith("PostgreSQL cannot be reached: ")
    assert "refused" in line


async def test_readiness_says_that_there_is_no_answer(name):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        store = manager_of(f"postgresql://crud@127.0.0.1:{silent.getsockname()[1]}/postgres", name).storage.meta_store
        with pytest.raises(StoreUnavailable, match="no answer within"):
            await store.health()
        await store.close()


async def test_what_holds_does_not_depend_on_the_server_s_default_isolation(postgres, name):
    """P2 and P3 look at what others have committed meanwhile."""
    manager = manager_of(f"{postgres}?options=-c%20default_transaction_isolation%3Drepeatable%5C%20read", name)
    await manager.create(Note("a"))
    assert await manager.storage.meta_store._rows("SHOW transaction_isolation") == [("read committed",)]
    await manager.close()


async def test_versions_of_the_program_side_by_side(postgres, name):
    """Eight programs of two versions make the schema at once; each searches by its own fields, and what the other wrote."""
    bodies = MemoryResourceStore()
    old = [manager_of(postgres, name, ["text", IndexedField("code", unique=True)], bodies) for _ in range(4)]
    new = [manager_of(postgres, name, bodies=bodies) for _ in range(4)]
    await asyncio.gather(*(one.open() for one in (*old, *new)))
    await old[0].create(Note("a", views=7, code="c"), resource_id="a")
    await new[0].create(Note("b", views=8), resource_id="b")
    with pytest.raises(UniqueConflict):
        await new[1].create(Note("x", code="c"))
    later = manager_of(postgres, name, bodies=bodies)
    page = await later.find(Query(where=field("views").gte(7), sort=("views",)))
    assert [hit.meta.resource_id for hit in page.items] == ["a", "b"]
    ignorant = manager_of(postgres, name, ["text"], bodies)
    with pytest.raises(ConfigError, match="code is unique in the store"):
        await ignorant.open()
    for one in (*old, *new, later, ignorant):
        await one.close()


async def test_a_password_is_made_for_each_connection(name):
    server = Postgres()
    try:
        async with await psycopg.AsyncConnection.connect(server.dsn, autocommit=True) as connection:
            await connection.execute("CREATE ROLE app LOGIN PASSWORD 'secret-1'")
            await connection.execute("GRANT ALL ON SCHEMA public TO app")
        rules = server.data / "pg_hba.conf"
        rules.write_text("host all crud 127.0.0.1/32 trust\nhost all app 127.0.0.1/32 scram-sha-256\n")
        async with await psycopg.AsyncConnection.connect(server.dsn, autocommit=True) as connection:
            await connection.execute("SELECT pg_reload_conf()")
        asked = []

        def password() -> str:
            asked.append(True)
            return f"secret-{len(asked)}"

        manager = manager_of(server.dsn.replace("crud@", "app@"), name, password=password)
        await manager.create(Note("a"), resource_id="a")
        await manager.close()
        async with await psycopg.AsyncConnection.connect(server.dsn, autocommit=True) as connection:
            await connection.execute("ALTER ROLE app PASSWORD 'secret-2'")
        assert (await manager.meta("a")).version == 1
        await manager.close()
        with pytest.raises(StoreUnavailable) as raised:
            await manager.meta("a")
        assert "secret" not in str(raised.value)
        await manager.close()
    finally:
        server.remove()


def test_an_address_that_cannot_be_read():
    with pytest.raises(ConfigError) as raised:
        PostgresMetaStore("postgresql://user:secret@host:port:7/x y=z")
    assert "secret" not in str(raised.value)


async def test_purged_rows_leave_the_tables(postgres, name):
    manager = manager_of(postgres, name)
    await manager.create(Note("secret words"), resource_id="secret id", by=Caller("alice", key=IdempotencyKey("k")))
    await manager.purge("secret id")
    async with await psycopg.AsyncConnection.connect(postgres) as connection:
        for part in manager.storage.meta_store._schema.names.values():
            rows = await connection.execute(f"SELECT t::text FROM {part} t")
            assert "secret" not in str(await rows.fetchall())
    await manager.close()


def test_names_are_kept_apart_by_hash():
    long = "m" * 80
    assert len({name_of(f"{long}{at}", "revisions") for at in range(10)}) == 10
    assert len(name_of("ä" * 60).encode()) <= 63
