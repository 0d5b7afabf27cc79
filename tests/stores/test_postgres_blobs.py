"""Rows of blobs in PostgreSQL: the order of transactions that overlap, and the move to format 2."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any
from uuid import uuid4

import psycopg
import pytest

from app.autocrud.errors import BlobGone, BlobQuotaExceeded, ConfigError, StaleGeneration
from app.autocrud.resource_manager.backends.postgres.commit_arguments import CommitArguments
from app.autocrud.resource_manager.backends.postgres.pool import translating
from app.autocrud.resource_manager.basic import Change, ModelSpec
from app.autocrud.resource_manager.contract.blobs import BLOBS_MARKER, BlobUsage, BlobUse
from app.autocrud.resource_manager.meta_store.postgres import PostgresMetaStore
from app.autocrud.testing.blobs import upload
from app.autocrud.values import kind_of
from tests.stores.changes import naming
from tests.stores.postgres_helpers import dsn_of, new_store


@pytest.fixture(params=["direct", "pooled"])
async def store(request) -> AsyncIterator[PostgresMetaStore]:
    store = new_store(dsn_of(request), "blobs_")
    yield store
    await store.close()


class Open:
    """A call of a stored function in a transaction that stays open."""

    def __init__(self, store: PostgresMetaStore, connection: psycopg.AsyncConnection[Any]) -> None:
        self.store, self.connection = store, connection

    async def call(self, statement: str, *parameters: Any) -> list[Any]:
        with translating():
            cursor = await self.connection.execute(
                self.store._blobs.filled(statement), (uuid4(), *parameters), prepare=False
            )
        return [row[0] for row in await cursor.fetchall()]

    async def commit(self, *changes: Change) -> None:
        call = CommitArguments(changes, None, 0, self.store._encode)
        await self.call("SELECT <function>(%s::uuid, %s::jsonb, %b::bytea[], %s::jsonb)", *call.parameters)

    async def remove(self, *keys: str) -> list[Any]:
        return await self.call("SELECT <remove>(%s::uuid, %s::text[], %s::bigint[])", list(keys), [0] * len(keys))

    async def add(self, row) -> None:
        await self.call("SELECT <add>(%s::uuid, %s::text, 0, %s::bigint, %s::text, NULL)", row.key, row.size, row.owner)


@contextlib.asynccontextmanager
async def opened(store: PostgresMetaStore) -> AsyncIterator[Open]:
    async with await psycopg.AsyncConnection.connect(store._dsn.reveal()) as connection:
        await connection.set_isolation_level(psycopg.IsolationLevel.READ_COMMITTED)
        yield Open(store, connection)


async def waiting(task: asyncio.Task[Any]) -> None:
    """Wait until a task waits for a lock, for which the transaction of the test is the only reason."""
    await asyncio.sleep(0.3)
    assert not task.done()


@pytest.mark.parametrize("ends", ["commit", "rollback"])
async def test_a_removal_waits_for_a_commit_that_names_the_blob(store: PostgresMetaStore, ends):
    """A statement that waited for a lock sees the uses of before, so another one must look for them."""
    row = upload()
    await store.add_blob(row)
    async with opened(store) as transaction:
        await transaction.commit(naming("r", row.key))
        removal = asyncio.create_task(store.remove_blobs([row.key]))
        await waiting(removal)
        await getattr(transaction.connection, ends)()
        assert await removal == ([] if ends == "commit" else [row.key])
    assert await store.blobs([row.sha256]) == ([row] if ends == "commit" else [])
    assert await store.blob_uses(row.key) == ([BlobUse("r", 1)] if ends == "commit" else [])


@pytest.mark.parametrize("ends", ["commit", "rollback"])
async def test_a_commit_waits_for_a_removal_of_a_blob_that_it_names(store: PostgresMetaStore, ends):
    row = upload()
    await store.add_blob(row)
    async with opened(store) as transaction:
        assert await transaction.remove(row.key) == [row.key]
        commit = asyncio.create_task(store.commit([naming("r", row.key)]))
        await waiting(commit)
        await getattr(transaction.connection, ends)()
        with pytest.raises(BlobGone) if ends == "commit" else contextlib.nullcontext():
            await commit
    assert await store.blob_uses(row.key) == ([] if ends == "commit" else [BlobUse("r", 1)])


async def test_a_record_that_is_being_replaced_keeps_its_blob(store: PostgresMetaStore):
    """Until the commit ends, a removal sees the uses of the replaced record; it must not see neither."""
    row = upload()
    await store.add_blob(row)
    await store.commit([naming("r", row.key)])
    async with opened(store) as transaction:
        await transaction.commit(naming("r", version=2, drop=("0/r-1",)))
        removal = asyncio.create_task(store.remove_blobs([row.key]))
        assert await removal == []
        await transaction.connection.commit()
    assert await store.remove_blobs([row.key]) == [row.key]


@pytest.mark.parametrize("ends", ["commit", "rollback"])
async def test_an_upload_waits_for_a_removal_of_its_key(store: PostgresMetaStore, ends):
    await store.add_blob(upload())
    row = upload()
    async with opened(store) as transaction:
        assert await transaction.remove(row.key) == [row.key]
        adding = asyncio.create_task(store.add_blob(row))
        await waiting(adding)
        await getattr(transaction.connection, ends)()
        with pytest.raises(StaleGeneration) if ends == "commit" else contextlib.nullcontext():
            await adding
    assert await store.blob_epoch() == (1 if ends == "commit" else 0)


async def test_a_removal_waits_for_an_upload_of_its_key(store: PostgresMetaStore):
    await store.add_blob(upload(b"two"))
    row = upload()
    async with opened(store) as transaction:
        await transaction.add(row)
        removal = asyncio.create_task(store.remove_blobs([row.key]))
        await waiting(removal)
        await transaction.connection.commit()
        assert await removal == [row.key]
    assert await store.blobs([row.sha256]) == []
    assert (await store.blob_epoch(), await store.blob_usage()) == (0, BlobUsage(1, 3))


@pytest.mark.parametrize("first", ["commit", "removal"])
async def test_commits_and_removals_lock_rows_in_one_order(store: PostgresMetaStore, caplog, first):
    """Otherwise each would hold rows that the other one needs, and PostgreSQL would end one of them, and log it."""
    rows = sorted((upload() for _ in range(6)), key=lambda row: row.key)
    for row in rows:
        await store.add_blob(row)
    keys = [row.key for row in rows]
    caplog.set_level("INFO", "crudstack.postgres")
    work = [
        lambda: store.commit([naming("a", *keys), naming("b", keys[0])]),
        lambda: store.remove_blobs(keys[::-1]),
    ]
    async with opened(store) as transaction:
        await transaction.connection.execute(
            store._filled("SELECT 1 FROM <blobs> WHERE key = %s FOR UPDATE"), (keys[3],)
        )
        tasks = []
        for call in work if first == "commit" else work[::-1]:
            tasks.append(asyncio.create_task(call()))
            await waiting(tasks[-1])
        await transaction.connection.commit()
        results = await asyncio.gather(*tasks, return_exceptions=True)
    committed, removed = results if first == "commit" else results[::-1]
    if isinstance(committed, BlobGone):
        assert removed == keys[::-1]
    else:
        assert removed == []
        assert [meta.resource_id for meta in committed] == ["a", "b"]
    assert not [message for message in caplog.messages if "ended the transaction" in message]


async def test_a_store_becomes_format_2_with_its_first_row_only(store: PostgresMetaStore):
    async def state() -> tuple[int, list[str], bool]:
        ((format_, uniques),) = await store._rows("SELECT format, uniques FROM <state>")
        ((table,),) = await store._rows("SELECT to_regclass(%s)::text", (store._schema.names["blobs"],))
        return format_, uniques, table is not None

    await store.commit([naming("r")])
    assert await store.blobs([upload().sha256]) == []
    assert await store.blob_uses(upload().key) == []
    with pytest.raises(BlobGone):
        await store.commit([naming("r", upload().key, version=2)])
    assert await state() == (1, [], False)
    with pytest.raises(BlobQuotaExceeded):
        await store.add_blob(upload(), quota=1)
    assert await state() == (1, [], False)
    await store.remove_blobs([upload().key])
    assert await state() == (1, [], True)
    with pytest.raises(StaleGeneration):
        await store.add_blob(upload())
    assert await state() == (1, [], True)
    await asyncio.gather(*(store.add_blob(upload(epoch=1)) for _ in range(4)))
    assert await state() == (2, [BLOBS_MARKER], True)
    assert await store.blob_usage() == BlobUsage(4, 12)


async def test_a_newer_format_is_refused_by_name(store: PostgresMetaStore):
    row = upload()
    await store.add_blob(row)
    await store.commit([naming("r", row.key)])
    await store._changed("UPDATE <state> SET format = 3")
    for write in (
        store.commit([naming("s")]),
        store.add_blob(upload()),
        store.remove_blobs([row.key]),
    ):
        with pytest.raises(ConfigError, match=r"model 'item': the store has format 3, and this program knows .* to 2"):
            await write
    assert (await store.get("r")).version == 1
    await store.close()
    with pytest.raises(ConfigError, match="format 3"):
        await store.get("r")


async def test_a_unique_field_is_activated_beside_blobs(store: PostgresMetaStore):
    await store.add_blob(upload())
    spec = ModelSpec("item", fields={"code": kind_of(str)}, unique=("code",))
    again = PostgresMetaStore(store._dsn, table_name=store._table)
    again.bind(spec)
    assert await again.activate_unique_fields()
    assert await again._rows("SELECT uniques FROM <state>") == [([BLOBS_MARKER, "code"],)]
    await store.close()
    with pytest.raises(ConfigError, match="code is unique in the store"):
        await store.get("r")
    await again.close()


async def test_a_table_may_be_called_like_a_variable_of_the_function(postgres):
    """The names of PL/pgSQL's variables and of tables share one space in statements."""
    for name in ("m", "c", "changes"):
        store = PostgresMetaStore(postgres, table_name=name)
        store.bind(ModelSpec("item"))
        row = upload(epoch=await store.blob_epoch())
        await store.add_blob(row)
        await store.commit([naming("r", row.key)])
        await store.commit([naming("r", version=2)])
        await store.commit([naming("r", version=3, purge=True, record=None)])
        await store.close()
