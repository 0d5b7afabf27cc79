"""Snapshots of PostgreSQL: one moment for as long as it takes, direct and behind a pooler in transaction mode."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import random
import tracemalloc
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack

import psycopg
import pytest

from app.autocrud.errors import StoreUnavailable
from app.autocrud.resource_manager.backends.postgres import pool
from app.autocrud.resource_manager.basic import ModelSpec, StoredKey
from app.autocrud.resource_manager.meta_store.postgres import PostgresMetaStore
from app.autocrud.testing.blobs import upload
from app.autocrud.values import kind_of
from tests.stores.changes import meta_of, naming, once, read
from tests.stores.postgres_helpers import dsn_of, new_store


@pytest.fixture(params=["direct", "pooled"])
async def store(request) -> AsyncIterator[PostgresMetaStore]:
    store = new_store(dsn_of(request), "snapshots_")
    yield store
    await store.close()


@pytest.mark.slow
async def test_each_snapshot_shows_one_moment(store: PostgresMetaStore):
    """Each commit changes several resources at once, so all of them have the same version at each moment."""
    ids = [f"r{number}" for number in range(30)]
    await store.commit([naming(rid) for rid in ids])
    ended = asyncio.Event()

    async def write() -> None:
        for version in itertools.count(2):
            if ended.is_set():
                return
            changes = [naming(rid, version=version) for rid in ids]
            random.Random(version).shuffle(changes)
            await store.commit(changes)

    writing = asyncio.create_task(write())
    seen = []
    for _ in range(15):
        async with store.snapshot() as snapshot:
            assert snapshot.one_moment
            await asyncio.sleep(random.random() / 50)
            found = await read(snapshot)
            assert await snapshot.count() == len(found) == len(ids)
            (version,) = {meta.version for meta, _ in found.values()}
            for _, records in found.values():
                assert [record.revision for record in records] == list(range(1, version + 1))
            assert await read(snapshot) == found
            seen.append(version)
    ended.set()
    await writing
    assert seen == sorted(seen)
    assert len(set(seen)) > 3


async def test_a_snapshot_has_keys_and_rows_of_its_moment(store: PostgresMetaStore):
    rows = [upload(content) for content in (b"one", b"two")]
    for row in rows:
        await store.add_blob(row)
    keys = [row.key for row in rows]
    await store.commit([naming("r", *keys)], once("a", 5, 0, None))
    async with store.snapshot() as snapshot:
        await store.commit([naming("r", version=2, drop=("0/r-1",))], once("b", 6, 0))
        assert await store.remove_blobs(keys) == keys
        assert await snapshot.blob_rows(keys[::-1]) == rows[::-1]
        expected = StoredKey(key="a", request="request", time=5, results=(meta_of("r"), None))
        assert [key async for key in snapshot.keys()] == [expected]  # noqa: SIM118 - no mapping


@pytest.mark.slow
async def test_a_snapshot_outlasts_the_limits_of_other_transactions(store: PostgresMetaStore, monkeypatch):
    monkeypatch.setattr(pool, "STATEMENT_S", 0.3)
    monkeypatch.setattr(pool, "IDLE_IN_TRANSACTION_S", 0.3)
    monkeypatch.setattr(pool, "ANSWER_S", 0.5)
    await store.commit([naming("a"), naming("b")])

    async with store.snapshot() as snapshot:
        await asyncio.sleep(1)
        await snapshot._rows("SELECT pg_sleep(1)")
        assert list(await read(snapshot)) == ["a", "b"]
        with pytest.raises(StoreUnavailable):  # other connections, also of the same pooler, keep their limits
            await store._rows("SELECT pg_sleep(1)")
        ((level, limit),) = await store._rows(
            "SELECT current_setting('transaction_isolation'), current_setting('transaction_read_only')"
        )
        assert (level, limit) == ("read committed", "off")


async def test_other_versions_start_and_mark_the_store_beside_a_snapshot(store: PostgresMetaStore):
    """They alter tables. A snapshot that had read these would make them wait, and commits wait for them."""
    await store.commit([naming("a")])
    async with store.snapshot() as snapshot, asyncio.timeout(20):
        assert list(await read(snapshot)) == ["a"]
        other = PostgresMetaStore(store._dsn, table_name=store._table)
        other.bind(ModelSpec("item", fields={"code": kind_of(str)}, unique=("code",)))
        assert await other.activate_unique_fields(force=True)
        await other.add_blob(upload())
        await other.advance_generation()
        await other.maintain(1)
        await other.commit([naming("b")])
        assert list(await read(snapshot)) == ["a"]
        await other.close()


@pytest.mark.parametrize("how", ["ends", "fails", "is cancelled"])
async def test_the_connection_of_a_snapshot_is_closed(store: PostgresMetaStore, how):
    await store.commit([naming("a")])

    async def transactions() -> int:
        (found,) = await store._rows(
            "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database()"
            " AND state = 'idle in transaction' AND query LIKE %s",
            ("%export%",),
        )
        return found[0]

    began = asyncio.Event()

    async def snapshot() -> None:
        async with store.snapshot() as snapshot:
            await anext(snapshot.items())
            began.set()
            if how == "fails":
                raise ZeroDivisionError
            if how == "is cancelled":
                await asyncio.sleep(60)

    task = asyncio.create_task(snapshot())
    await began.wait()
    if how == "is cancelled":
        assert await transactions() == 1
        task.cancel()
    with contextlib.suppress(ZeroDivisionError, asyncio.CancelledError):
        await task
    async with asyncio.timeout(10):
        while await transactions():
            await asyncio.sleep(0.05)


async def test_a_snapshot_whose_connection_is_lost_fails(store: PostgresMetaStore):
    await store.commit([naming("a")])
    with pytest.raises(StoreUnavailable):
        async with store.snapshot() as snapshot:
            ((pid,),) = await snapshot._rows("SELECT pg_backend_pid()")
            await store._rows("SELECT pg_terminate_backend(%s)", (pid,))
            await read(snapshot)
    assert (await store.get("a")).version == 1


async def test_snapshots_are_not_counted_among_the_connections_of_the_pool(postgres):
    """A process may have all its connections in use by requests, and several exports beside them."""
    store = new_store(postgres, "snapshots_", max_size=1, password=lambda: "")
    await store.commit([naming("a")])
    async with AsyncExitStack() as stack:
        snapshots = [await stack.enter_async_context(store.snapshot()) for _ in range(3)]
        await store.commit([naming("b")])
        for snapshot in snapshots:
            assert list(await read(snapshot)) == ["a"]
    await store.close()


@pytest.mark.slow
async def test_memory_does_not_grow_with_the_number_of_resources_or_revisions(postgres):
    store = new_store(postgres, "snapshots_")
    await store.commit([naming("r")], once("k", 1, 0))

    async def many(connection: psycopg.AsyncConnection) -> None:
        resources = (
            "INSERT INTO <main> SELECT 'r' || n, version, nonce, revision, total_revision_count, schema_version,"
            " status, is_deleted, created_time, updated_time, created_by, updated_by, uid || n, encoding, doc, shown,"
            " keys, absent, spec FROM <main>, generate_series(1, 30000) n"
        )
        records = "INSERT INTO <revisions> SELECT 'r1', n, n || '', doc FROM <revisions>, generate_series(1, 30000) n"
        results = (
            "INSERT INTO <done> SELECT key || n, operation, request, time, id, doc"
            " FROM <done>, generate_series(1, 10000) n"
        )
        for statement in (resources, records, results):
            await connection.execute(store._filled(statement))

    await store._do(many, limited=False)
    async with store.snapshot() as snapshot:
        counts = {"ResourceMeta": 0, "RevisionInfo": 0, "StoredKey": 0}
        tracemalloc.start()
        try:
            for stream in (snapshot.items(), snapshot.keys()):
                async for item in stream:
                    counts[type(item).__name__] += 1
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
    assert counts == {"ResourceMeta": 30_001, "RevisionInfo": 30_001, "StoredKey": 10_001}
    assert peak < 4 * 1024 * 1024
    await store.close()


async def test_a_change_of_a_snapshot_is_impossible(store: PostgresMetaStore):
    await store.commit([naming("a")])
    async with store.snapshot() as snapshot:
        with pytest.raises(StoreUnavailable):
            await snapshot._rows("DELETE FROM <main> RETURNING id")
    await store.commit([naming("a", version=2)])
