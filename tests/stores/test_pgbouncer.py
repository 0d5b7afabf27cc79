"""PostgresMetaStore behind a pooler in transaction mode: each transaction may run on another connection."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import uuid
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import psycopg
import pytest

from app import create_db_user as bootstrap
from app.autocrud.errors import CrudError, OutcomeUnknown, StoreUnavailable
from app.autocrud.resource_manager.backends.postgres import pool, session
from app.autocrud.resource_manager.backends.postgres.session import Guard
from app.autocrud.resource_manager.basic import IStorage
from app.autocrud.resource_manager.blob_store.simple import DiskBlobStore
from app.autocrud.resource_manager.core import SimpleStorage
from app.autocrud.resource_manager.meta_store.postgres import PostgresMetaStore
from app.autocrud.resource_manager.resource_store.simple import DiskResourceStore
from app.autocrud.resource_manager.storage_factory import IStorageFactory
from app.autocrud.testing import SharedConformance
from tests import pgbouncer as pooler
from tests.pgbouncer import PgBouncer
from tests.stores.postgres_helpers import Note, manager_of
from tests.tcp_proxy import TcpProxy


def made_by_bootstrap(server: str) -> str:
    """Return the name of a new database that the user `crud_app` was made in, as on AWS."""
    name, parts = f"boot_{uuid.uuid4().hex[:12]}", urlsplit(server)
    with psycopg.connect(server, autocommit=True) as connection:
        connection.execute("DO $$ BEGIN CREATE ROLE rds_iam; EXCEPTION WHEN duplicate_object THEN NULL; END $$")
        connection.execute(f"CREATE DATABASE {name}".encode())
    given = {"host": parts.hostname, "port": parts.port, "database": name, "user": "crud_app"}
    bootstrap.inside({**given, "username": parts.username, "password": "none"}, None)
    return name


# The conformance suite


class WithDisk(IStorageFactory):
    def __init__(self, root: Path, address: str) -> None:
        self.root, self.address = root, address

    def build(self, model_name: str) -> IStorage:
        table = f"{self.root.name}/meta_{model_name}"
        meta_store = PostgresMetaStore(os.environ[self.address], table_name=table, max_size=4)
        directory = self.root / model_name
        return SimpleStorage(meta_store, DiskResourceStore(directory), DiskBlobStore(directory / "blobs"))


@pytest.mark.usefixtures("pgbouncer")
class TestPgBouncer(SharedConformance):
    def make(self, root: Path) -> IStorageFactory:
        return WithDisk(root, "TEST_PGBOUNCER")


@pytest.fixture(scope="module")
def bootstrapped(pgbouncer: PgBouncer) -> None:
    os.environ["TEST_PGBOUNCER_APP"] = pgbouncer.dsn("crud_app", made_by_bootstrap(pgbouncer.server))


@pytest.mark.usefixtures("bootstrapped")
class TestPgBouncerWithBootstrap(SharedConformance):
    def make(self, root: Path) -> IStorageFactory:
        return WithDisk(root, "TEST_PGBOUNCER_APP")


# What is this store's own


@pytest.fixture
def name(request) -> str:
    """A table of each test's own."""
    return request.node.name


@pytest.fixture
def brief_statements(monkeypatch) -> None:
    """A limit that a test can wait for. The bootstrap gives its user the same."""
    monkeypatch.setattr(pool, "STATEMENT_S", 0.5)


@pytest.fixture
def brief_transactions(monkeypatch) -> None:
    """As above, for transactions that are idle."""
    monkeypatch.setattr(pool, "IDLE_IN_TRANSACTION_S", 0.2)


@pytest.fixture(params=["direct", "direct, bootstrap", "pooled", "pooled, bootstrap"])
def address(request, pgbouncer: PgBouncer) -> str:
    """Each way to the server."""
    pooled, bootstrap_ran = request.param.startswith("pooled"), request.param.endswith("bootstrap")
    user, database = ("crud_app", made_by_bootstrap(pgbouncer.server)) if bootstrap_ran else ("crud", "postgres")
    parts = urlsplit(pgbouncer.server)
    return pgbouncer.dsn(user, database) if pooled else f"postgresql://{user}@{parts.hostname}:{parts.port}/{database}"


@pytest.fixture(params=["no bootstrap", "bootstrap"])
def pooled(request, pgbouncer: PgBouncer) -> str:
    if request.param == "bootstrap":
        return pgbouncer.dsn("crud_app", made_by_bootstrap(pgbouncer.server))
    return pgbouncer.dsn("crud", "postgres")


async def guard_of(manager) -> Guard:
    async def ask(connection) -> Guard:
        return connection.guard

    return await manager.storage.meta_store._do(ask)


@pytest.mark.parametrize(("prepare", "expected"), [(None, (5, None)), (True, (5, 5)), (False, (None, None))])
async def test_statements_with_names(pgbouncer, name, prepare, expected):
    """Only in a session of this client's own, unless asked for. The password gives each store a pool of its own."""

    async def threshold(dsn: str) -> int | None:
        async def ask(connection) -> int | None:
            return connection.prepare_threshold

        manager = manager_of(dsn, name, prepare=prepare, password=lambda: f"{prepare}")
        await manager.open()
        found = await manager.storage.meta_store._do(ask)
        await manager.close()
        return found

    assert (await threshold(pgbouncer.server), await threshold(pgbouncer.dsn("crud", "postgres"))) == expected


async def test_500_clients_share_four_connections(pgbouncer, pooled, name):
    """Each client has a connection of its own to the pooler, writes, and reads what it wrote."""
    manager = manager_of(pooled, name, max_size=500)
    await manager.open()
    all_connected = asyncio.Barrier(500)

    async def client(number: int) -> None:
        await manager.storage.meta_store._do(lambda _: all_connected.wait())
        made = await manager.create(Note("0", views=number, code=f"{number}"))
        for version in (1, 2):
            await manager.update(made.meta.resource_id, Note(f"{version}", views=number, code=f"{number}"))
        found = await manager.get(made.meta.resource_id)
        assert (found.meta.version, found.data.text) == (3, "2")

    try:
        clients = asyncio.gather(*(client(number) for number in range(500)))
        await clients
        assert await manager.count() == 500
        where = urlsplit(pooled).path.removeprefix("/"), urlsplit(pooled).username
        ours = [
            row for row in await asyncio.to_thread(pgbouncer.show, "CLIENTS") if (row["database"], row["user"]) == where
        ]
        assert len(ours) >= 500
        servers = await asyncio.to_thread(pgbouncer.show, "SERVERS")
        assert 0 < sum((row["database"], row["user"]) == where for row in servers) <= pooler.SERVER_CONNECTIONS
    finally:
        await manager.close()


@pytest.mark.usefixtures("brief_statements")
async def test_statements_end_in_time(address, pgbouncer, name):
    """A commit that ran out of time is resolved: it did not happen, and never will."""
    manager = manager_of(address, name)
    created = await manager.create(Note("a"), resource_id="r")
    blocker = f"{pgbouncer.server.rpartition('/')[0]}{urlsplit(address).path}"  # a user without the limits
    with psycopg.connect(blocker) as other:
        other.execute(f"SELECT 1 FROM {manager.storage.meta_store._schema.names['main']} FOR UPDATE".encode())
        async with asyncio.timeout(20):
            with pytest.raises(StoreUnavailable, match=r"took longer than 0\.5 s; nothing was changed"):
                await manager.update("r", Note("b"))
            with pytest.raises(StoreUnavailable, match="took longer"):
                await manager.storage.meta_store._rows("SELECT pg_sleep(60)")
    assert await manager.meta("r") == created.meta
    await manager.update("r", Note("c"))
    await manager.close()


@pytest.mark.usefixtures("brief_transactions")
async def test_a_client_that_is_stopped_in_a_transaction_keeps_no_lock(address, name):
    manager = manager_of(address, name)
    created = await manager.create(Note("a"))
    meta_store = manager.storage.meta_store
    holding, go = asyncio.Event(), asyncio.Event()

    async def hold(connection) -> None:
        async with connection.exclusive_transaction(meta_store._schema.lock, 200):
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


@pytest.mark.usefixtures("brief_statements", "brief_transactions")
async def test_the_sources_of_the_settings(address, name, request):
    """From the role if the bootstrap ran: then nothing is in front of a statement."""
    manager = manager_of(address, name)
    await manager.create(Note("a"))
    rows = await manager.storage.meta_store._rows(
        "SELECT name, source FROM pg_settings WHERE name = ANY(%s) AND source <> 'default' ORDER BY name",
        (["statement_timeout", "idle_in_transaction_session_timeout"],),
    )
    idle, statement = ("idle_in_transaction_session_timeout", "statement_timeout")
    expected = {
        "direct": ([(idle, "session"), (statement, "session")], Guard()),
        "direct, bootstrap": ([(idle, "user"), (statement, "user")], Guard()),
        "pooled": ([(statement, "session")], Guard(statement_ms=500)),  # by SET LOCAL
        "pooled, bootstrap": ([(idle, "user"), (statement, "user")], Guard()),
    }
    assert (rows, await guard_of(manager)) == expected[request.node.callspec.params["address"]]
    await manager.close()


async def test_nothing_is_left_in_the_server_s_sessions(pooled, name):
    """Prepared statements, settings, locks and temporary tables, on each of the server's connections."""
    manager = manager_of(pooled, name, max_size=8)

    async def work(number: int) -> None:
        rid = f"r{number}"
        for at in range(12):  # psycopg prepares a statement the sixth time
            await (manager.update(rid, Note(f"{at}")) if at else manager.create(Note("0"), resource_id=rid))
            await manager.meta(rid)

    await asyncio.gather(*(work(number) for number in range(8)))
    seen: set[int] = set()
    async with contextlib.AsyncExitStack() as stack:
        for _ in range(pooler.SERVER_CONNECTIONS):  # each transaction keeps one, so that the next has another
            connection = await stack.enter_async_context(await psycopg.AsyncConnection.connect(pooled))
            cursor = await connection.execute(
                "SELECT pg_backend_pid(), (SELECT count(*) FROM pg_prepared_statements),"
                " (SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND pid = pg_backend_pid()),"
                " (SELECT array_agg(name) FROM pg_settings WHERE source = 'session'"
                "  AND name = ANY(%s))",
                (list(pool.server_settings()),),
            )
            pid, *left = await cursor.fetchone()
            assert left == [0, 0, None]
            seen.add(pid)
    assert len(seen) == pooler.SERVER_CONNECTIONS
    await manager.close()


@pytest.mark.parametrize("pins", [False, True], ids=["pgbouncer", "as RDS Proxy"])
async def test_another_isolation_appears_in_the_pooler(pgbouncer, name, monkeypatch, pins):
    """Another client leaves SETs in the server's connections after this one has looked: the commit is refused."""
    if pins:
        monkeypatch.setattr(session, "RDS_PROXY", session.re.compile(r"127\.0\.0\.1"))
    through = pgbouncer.dsn("crud_app", made_by_bootstrap(pgbouncer.server))
    manager = manager_of(through, name)
    await manager.create(Note("0"), resource_id="r")
    assert await guard_of(manager) == Guard()
    async with contextlib.AsyncExitStack() as stack:
        for _ in range(pooler.SERVER_CONNECTIONS):
            other = await stack.enter_async_context(await psycopg.AsyncConnection.connect(through))
            await other.execute("SET default_transaction_isolation = 'serializable'")
    await manager.update("r", Note("1"))
    assert (await guard_of(manager)).isolation
    await asyncio.gather(*(manager.create(Note("x", code=f"{number}")) for number in range(20)))
    assert await manager.count() == 21
    await manager.close()


async def test_another_default_isolation(pgbouncer, name):
    database = f"iso_{uuid.uuid4().hex[:12]}"
    with psycopg.connect(pgbouncer.server, autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {database}".encode())
        connection.execute(f"ALTER DATABASE {database} SET default_transaction_isolation = 'repeatable read'".encode())
    manager = manager_of(pgbouncer.dsn("crud", database), name)
    await manager.create(Note("a"))
    assert await guard_of(manager) == Guard(isolation=True, statement_ms=10_000)
    assert await manager.storage.meta_store._rows("SHOW transaction_isolation") == [("read committed",)]
    await manager.close()


# RDS Proxy


@pytest.fixture
def as_rds_proxy(monkeypatch) -> Iterator[list[tuple[str, object]]]:
    """Take PgBouncer for RDS Proxy. Yields the statements that are sent, with their connections."""
    monkeypatch.setattr(session, "RDS_PROXY", session.re.compile(r"127\.0\.0\.1"))
    sent: list[tuple[str, object]] = []
    execute = psycopg.AsyncCursor.execute

    async def recorded(self, query, *given, **more):
        sent.append((query.decode() if isinstance(query, bytes) else query, self.connection))
        return await execute(self, query, *given, **more)

    monkeypatch.setattr(psycopg.AsyncCursor, "execute", recorded)
    return sent


def test_endpoints_of_rds_proxy():
    for host in (
        "crudstack.proxy-abc123.eu-west-1.rds.amazonaws.com",
        "ro.endpoint.proxy-abc123.cn-north-1.rds.amazonaws.com.cn",
    ):
        assert session.RDS_PROXY.search(host)
    for host in ("db.abc123.eu-west-1.rds.amazonaws.com", "proxy-x.example.org", "127.0.0.1"):
        assert not session.RDS_PROXY.search(host)


async def test_nothing_pins_a_session_of_rds_proxy(pgbouncer, as_rds_proxy, name, caplog):
    manager = manager_of(pgbouncer.dsn("crud_app", made_by_bootstrap(pgbouncer.server)), name)
    await manager.create(Note("a", code="c"), resource_id="r")
    await manager.update("r", Note("b", code="d"))
    await manager.find()
    made_schema = [
        connection for text, connection in as_rds_proxy if "SET " in text.upper().replace("UPDATE ", "")[:60]
    ]
    assert made_schema  # SET LOCAL, while the tables are made: these connections are closed
    assert all(connection.closed for connection in made_schema)
    as_rds_proxy.clear()
    await manager.update("r", Note("c", code="e"))
    await manager.meta("r")
    await manager.find()
    assert as_rds_proxy
    for text, _ in as_rds_proxy:
        assert not any(
            word in text.upper() for word in ("SET ", "SET_CONFIG", "PREPARE", "DISCARD", "LISTEN", "DECLARE")
        )
        assert len(text) < 16_000
    assert "ALTER ROLE" not in caplog.text
    await manager.close()


async def test_rds_proxy_without_the_settings(pgbouncer, as_rds_proxy, name, caplog, monkeypatch):
    """No SET is sent all the same. The client stops waiting, and the log says what to run."""
    manager = manager_of(pgbouncer.dsn("crud", "postgres"), name)
    with caplog.at_level(logging.WARNING):
        await manager.create(Note("a"), resource_id="r")
    assert "ALTER ROLE CURRENT_USER SET statement_timeout = '10000';" in caplog.text
    as_rds_proxy.clear()
    monkeypatch.setattr(pool, "ANSWER_S", 0.2)
    with pytest.raises(CrudError):
        await manager.storage.meta_store._rows("SELECT pg_sleep(5)")
    assert all("SET" not in text for text, _ in as_rds_proxy)
    monkeypatch.undo()
    await manager.update("r", Note("b"))
    await manager.close()


# Failures


@pytest.mark.parametrize("landed", [True, False])
async def test_a_lost_answer_is_resolved(pooled, name, landed):
    """The connection to the pooler ends while a commit is under way."""
    parts = urlsplit(pooled)
    with TcpProxy(f"http://{parts.hostname}:{parts.port}") as proxy:
        manager = manager_of(pooled.replace(f":{parts.port}", f":{urlsplit(proxy.url).port}"), name)
        direct = manager_of(pooled, name)
        await manager.create(Note("first"))
        await direct.count()
        if landed:
            proxy.hold()
            writing = asyncio.create_task(manager.create(Note("x")))
            assert await asyncio.to_thread(proxy.held.wait, 20)  # the server has answered
            proxy.release()
            proxy.cut()
        else:
            async with await psycopg.AsyncConnection.connect(pooled) as blocker:
                await blocker.execute("SELECT pg_advisory_xact_lock(%s)", (manager.storage.meta_store._schema.lock,))
                writing = asyncio.create_task(manager.create(Note("x")))
                while not (await (await blocker.execute("SELECT 1 FROM pg_locks WHERE NOT granted")).fetchall()):
                    await asyncio.sleep(0.01)
                proxy.cut()
        created = await writing
        assert await direct.meta(created.meta.resource_id) == created.meta
        assert await direct.count() == 2
        await manager.close()
        await direct.close()


@pytest.mark.parametrize("bootstrap_ran", [False, True], ids=["no bootstrap", "bootstrap"])
async def test_a_pooler_that_is_killed_loses_no_commit(pgbouncer, name, bootstrap_ran):
    """And none happens twice: 20 writers count, each in a resource of its own."""
    user, database = ("crud_app", made_by_bootstrap(pgbouncer.server)) if bootstrap_ran else ("crud", "postgres")
    with pooler.running(pgbouncer.server, user) as own:
        manager = manager_of(own.dsn(user, database), name, max_size=20)
        await manager.open()
        acknowledged, unknown, end = dict.fromkeys(range(20), 0), dict.fromkeys(range(20), 0), False

        async def write(number: int) -> None:
            while not end:
                rid = f"{number}-{acknowledged[number] + unknown[number]}"
                try:
                    await manager.create(Note("x", views=number), resource_id=rid)
                except StoreUnavailable:
                    continue  # nothing was changed, so the same id can be created
                except OutcomeUnknown:
                    unknown[number] += 1
                    continue
                acknowledged[number] += 1

        writers = asyncio.gather(*(write(number) for number in range(20)))
        for _ in range(8):
            before = sum(acknowledged.values())
            while sum(acknowledged.values()) < before + 60:
                await asyncio.sleep(0.01)
            own.kill()
            await asyncio.to_thread(own.start)
        end = True
        await writers
        found = {meta.resource_id async for meta in manager.storage.meta_store.scan()}
        sure = sum(acknowledged.values())
        assert sure <= len(found) <= sure + sum(unknown.values())
        await manager.close()


async def test_connections_that_were_unused_for_long_are_not_used(pgbouncer, name):
    """As after a Lambda was frozen: the server may have closed them."""
    manager = manager_of(pgbouncer.dsn("crud", "postgres"), name)
    await manager.create(Note("a"), resource_id="r")
    meta_store = manager.storage.meta_store
    own = meta_store._pool()
    ((_, old),) = own._idle
    own._idle[0] = (own._clock() - pool.MAX_IDLE_S - 1, old)
    await manager.meta("r")
    assert old.closed
    assert [connection for _, connection in own._idle] != [old]
    await manager.close()
