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
from app.autocrud.resource_manager.meta_store import postgres as meta_store_postgres
from app.autocrud.resource_manager.runtime.moments import Moment
from tests.postgres import Postgres
from tests.stores.fast_slow_worker import change_of
from tests.stores.postgres_helpers import Note, manager_of
from tests.tcp_proxy import TcpProxy


@pytest.fixture
def name(request) -> str:
    """A table of each test's own."""
    return request.node.name


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
