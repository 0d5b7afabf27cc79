"""PostgresMetaStore when connections are cut, exhausted or blocked."""

from __future__ import annotations

import asyncio
import contextlib
import random
import socket
from urllib.parse import urlsplit

import psycopg
import pytest

from app.autocrud.errors import (
    StoreUnavailable,
    WriteContention,
)
from app.autocrud.resource_manager.backends.postgres import pool
from app.autocrud.resource_manager.core import Update
from app.autocrud.resource_manager.runtime.moments import Moment
from tests.postgres import Postgres
from tests.stores.fast_slow_worker import change_of
from tests.stores.postgres_helpers import Note, manager_of
from tests.tcp_proxy import TcpProxy


@pytest.fixture
def name(request) -> str:
    """Return a table name that no other test uses."""
    return request.node.name


async def test_no_request_fails_after_connections_were_cut(postgres, name):
    parts = urlsplit(postgres)
    with TcpProxy(f"http://{parts.hostname}:{parts.port}") as proxy:
        through = f"postgresql://{parts.username}@127.0.0.1:{urlsplit(proxy.url).port}/postgres"
        manager = manager_of(through, name, max_size=3)
        await manager.create(Note("0"), resource_id="r")
        all_busy = asyncio.Barrier(3)
        for number in range(1, 8):
            await asyncio.gather(*(manager.storage.meta_store._do(lambda _: all_busy.wait()) for _ in range(3)))
            assert proxy.cut() == 3
            if number % 2:
                await manager.update("r", Note(f"{number}"))
            else:
                assert (await manager.meta("r")).revision == number // 2 + 1
        await manager.close()


@pytest.fixture
async def proxied(postgres, name):
    """Yield a resource manager that reaches the server through a proxy, and this proxy."""
    parts = urlsplit(postgres)
    with TcpProxy(f"http://{parts.hostname}:{parts.port}") as proxy:
        manager = manager_of(f"postgresql://{parts.username}@127.0.0.1:{urlsplit(proxy.url).port}/postgres", name)
        yield manager, proxy
        proxy.release()
        await manager.close()


async def test_a_read_without_a_reply_fails_soon_and_the_next_one_uses_a_new_connection(proxied, monkeypatch):
    """The network acknowledges the bytes of the old connections and drops them."""
    manager, proxy = proxied
    await manager.create(Note("0"), resource_id="r")
    all_busy = asyncio.Barrier(5)
    await asyncio.gather(*(manager.storage.meta_store._do(lambda _: all_busy.wait()) for _ in range(5)))
    monkeypatch.setattr(pool, "ANSWER_S", 0.2)
    proxy.hold()
    left = asyncio.create_task(manager.count())
    await asyncio.to_thread(proxy.held.wait, 20)
    left.cancel()  # psycopg then asks the server to cancel the query, and waits for its reply
    async with asyncio.timeout(20):
        with pytest.raises(StoreUnavailable):
            await manager.meta("r")
        monkeypatch.undo()
        assert proxy.swallow() > 2
        proxy.release()
        await asyncio.wait([left])
        await asyncio.gather(*(manager.meta("r") for _ in range(5)))


@pytest.mark.parametrize("how", ["read", "write"])
async def test_no_request_fails_after_recently_used_connections_were_dropped(proxied, monkeypatch, how):
    """Recently used connections are not checked. The request waits for a reply, then uses a new connection."""
    manager, proxy = proxied
    await manager.create(Note("0"), resource_id="r")
    all_busy = asyncio.Barrier(5)
    await asyncio.gather(*(manager.storage.meta_store._do(lambda _: all_busy.wait()) for _ in range(5)))
    monkeypatch.setattr(pool, "ANSWER_S", 1.0)
    monkeypatch.setattr(pool, "STATEMENT_S", 0.8)
    assert proxy.swallow() >= 5
    await (manager.meta("r") if how == "read" else manager.create(Note("1")))
    assert await manager.count() == (1 if how == "read" else 2)


@pytest.mark.parametrize("how", ["read", "write"])
async def test_no_request_fails_after_idle_connections_were_dropped(proxied, monkeypatch, how):
    """A NAT may drop connections silently, for example while a Lambda function is frozen.

    The request checks one idle connection for a short time, and discards all of them.
    """
    manager, proxy = proxied
    await manager.create(Note("0"), resource_id="r")
    all_busy = asyncio.Barrier(5)
    await asyncio.gather(*(manager.storage.meta_store._do(lambda _: all_busy.wait()) for _ in range(5)))
    connections = [connection for _, connection in manager.storage.meta_store._pool()._idle]
    checked = []
    check = pool.Connection.check

    async def counted(connection):
        checked.append(connection)
        await check(connection)

    monkeypatch.setattr(pool.Connection, "check", counted)
    monkeypatch.setattr(pool, "CHECK_S", 0.3)
    await manager.meta("r")
    assert checked == []  # the connections were used a moment ago
    for connection in connections:
        connection.used = Moment(connection.used.running, connection.used.wall - pool.CHECK_AFTER_S - 1)
    await manager.meta("r")
    assert len(checked) == 1
    for connection in connections:
        connection.used = Moment(connection.used.running - pool.CHECK_AFTER_S - 1, connection.used.wall)
    assert proxy.swallow() >= 5
    async with asyncio.timeout(pool.ANSWER_S - 4):  # waiting for a reply without a check takes longer
        await (manager.meta("r") if how == "read" else manager.update("r", Note("1")))
    assert len(checked) == 2
    assert all(connection.closed for connection in connections)


async def test_a_commit_without_a_reply_is_resolved(proxied, postgres, name, monkeypatch):
    manager, proxy = proxied
    await manager.create(Note("0"))
    monkeypatch.setattr(pool, "ANSWER_S", 0.2)
    proxy.hold()
    writing = asyncio.create_task(manager.create(Note("x")))
    await asyncio.to_thread(proxy.held.wait, 20)  # the server has replied
    direct = manager_of(postgres, name)
    assert await direct.count() == 2
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(asyncio.shield(writing), 1)
    monkeypatch.undo()
    proxy.release()
    assert (await direct.meta((await writing).meta.resource_id)).revision == 1
    assert await direct.count() == 2
    await direct.close()


async def test_a_statement_that_waits_too_long_for_a_lock_is_cancelled(postgres, name, monkeypatch):
    monkeypatch.setattr(pool, "STATEMENT_S", 0.2)
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


async def test_requests_work_again_after_the_server_restarts(name, monkeypatch):
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


async def test_the_server_ends_an_idle_transaction_and_releases_its_locks(postgres, name, monkeypatch):
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


async def test_an_exhausted_pool_raises_store_unavailable(postgres, name, monkeypatch):
    monkeypatch.setattr(pool, "WAIT_S", 0.05)
    manager = manager_of(postgres, name, max_size=1, password=lambda: "of its own")
    await manager.create(Note("a"))
    end = asyncio.Event()
    holder = asyncio.create_task(manager.storage.meta_store._do(lambda _: end.wait()))
    await asyncio.sleep(0)
    with pytest.raises(StoreUnavailable, match="no connection to spare"):
        await manager.count()
    with pytest.raises(StoreUnavailable, match="no connection to spare"):  # nothing was sent, so the outcome is known
        await manager.storage.meta_store.commit([change_of("b")])
    end.set()
    await holder
    assert await manager.count() == 1
    await manager.close()


async def test_batches_and_single_writes_never_deadlock(postgres, name):
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


async def test_cancelled_requests_return_their_connections_to_the_pool(postgres, name):
    manager = manager_of(postgres, name, max_size=3)
    await manager.create(Note("a"), resource_id="r")
    draw = random.Random(1)

    async def read(patience: float) -> None:
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(manager.meta("r"), patience)

    for _ in range(100):
        await asyncio.gather(*(read(draw.choice([0.0005, 0.001, 0.002, 0.004])) for _ in range(8)))
    all_busy = asyncio.Barrier(3)
    async with asyncio.timeout(20):
        await asyncio.gather(*(manager.storage.meta_store._do(lambda _: all_busy.wait()) for _ in range(3)))
    await manager.close()


async def test_open_fails_with_the_cause_if_the_server_is_unreachable(monkeypatch, name):
    monkeypatch.setattr(pool, "WAIT_S", 0.5)
    manager = manager_of("postgresql://crud:a-secret@127.0.0.1:1/postgres", name)
    with pytest.raises(StoreUnavailable, match="cannot be reached right now") as raised:
        await manager.open()
    assert "refused" in str(raised.value.__cause__)
    assert "a-secret" not in str(raised.value.__cause__)
    await manager.close()


async def test_health_reports_an_unreachable_server_and_the_cause_is_logged_once(name, caplog):
    store = manager_of("postgresql://crud:a-secret@127.0.0.1:1/postgres", name).storage.meta_store
    for _ in range(2):
        with pytest.raises(StoreUnavailable, match="cannot be reached right now"):
            await store.health()
    await store.close()
    (line,) = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert line.startswith("PostgreSQL cannot be reached: ")
    assert "refused" in line


async def test_health_reports_a_server_that_does_not_reply(name):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        store = manager_of(f"postgresql://crud@127.0.0.1:{silent.getsockname()[1]}/postgres", name).storage.meta_store
        with pytest.raises(StoreUnavailable, match="no answer within"):
            await store.health()
        await store.close()
