"""The rows of blobs in the log, HEAD and snapshots of S3-SQLite."""

from __future__ import annotations

import asyncio
import datetime as dt

import msgspec
import pytest

from app.autocrud.errors import BlobGone, BlobQuotaExceeded, StaleGeneration
from app.autocrud.resource_manager.backends.log_records import log_blob
from app.autocrud.resource_manager.backends.s3.memory_object_store import (
    DROPPED,
    FALSE_CONFLICT,
    LOST_ANSWER,
    InjectedFault,
    MemoryObjectStore,
)
from app.autocrud.resource_manager.backends.s3_sqlite.head import FORMAT, FORMAT_WITH_BLOBS, LogRecord, encode_ops
from app.autocrud.resource_manager.contract.blobs import BlobUsage, BlobUse
from app.autocrud.resource_manager.meta_store.sqlite3 import S3SqliteMetaStore
from app.autocrud.testing.blobs import NamedBlobs, upload
from app.s3_tools import s3_rescue
from tests import virtual_time
from tests.stores.s3_sqlite_helpers import KEY, Note, head_of, instance, meta_store, once


@pytest.fixture
def objects() -> MemoryObjectStore:
    return MemoryObjectStore()


async def test_a_row_is_one_request(objects):
    manager = instance(objects)
    await manager.create(Note("1"), resource_id="n")
    store, names = meta_store(manager), NamedBlobs(manager.storage)
    row, other = upload(), upload()

    async def cost(work) -> dict[str, int]:
        objects.requests.clear()
        await work
        return dict(objects.requests)

    assert await cost(store.add_blob(row)) == {"put_if": 1}
    assert await cost(store.add_blob(row)) == {"get_if": 1}
    names.by_resource["n"] = (row.key,)
    assert await cost(manager.update("n", Note("2"))) == {"put": 1, "put_if": 1}
    assert await cost(store.blobs([row.sha256])) == {"get_if": 1}
    assert await cost(store.remove_blobs([row.key])) == {"get_if": 1}
    assert await cost(store.remove_blobs([row.key, other.key])) == {"put_if": 1}
    assert await cost(store.remove_blobs([other.key])) == {"get_if": 1}
    uploads = [upload(epoch=1) for _ in range(20)]
    assert await cost(asyncio.gather(*(store.add_blob(one) for one in uploads))) == {"put_if": 1}
    assert await cost(store.remove_blobs([one.key for one in uploads])) == {"put_if": 1}
    assert await store.blob_usage() == BlobUsage(1, row.size)


async def test_only_a_row_raises_the_format(objects):
    manager = instance(objects)
    store = meta_store(manager)
    await manager.create(Note("1"))
    await store.remove_blobs([upload(epoch=4).key])
    assert (head_of(objects).fmt, head_of(objects).blob_epoch) == (FORMAT, 5)
    for quota in (0, 2):
        with pytest.raises(BlobQuotaExceeded):
            await store.add_blob(upload(epoch=5), quota=quota)
    with pytest.raises(StaleGeneration):
        await store.add_blob(upload(epoch=4))
    await manager.create(Note("2"))
    assert (head_of(objects).fmt, head_of(objects).blob_epoch) == (FORMAT, 5)
    row = upload(epoch=5)
    await store.add_blob(row)
    assert head_of(objects).fmt == FORMAT_WITH_BLOBS
    await store.remove_blobs([row.key])
    await manager.create(Note("3"))
    await manager.maintain(10)
    assert (head_of(objects).fmt, head_of(objects).blob_epoch) == (FORMAT_WITH_BLOBS, 5)


async def with_uses(objects) -> tuple[str, str]:
    """Store a blob that revision 1 of `n` names, one that no record names, and epoch 3. Return the keys."""
    manager = instance(objects)
    store, names = meta_store(manager), NamedBlobs(manager.storage)
    used, unused = upload(b"one"), upload(b"two")
    for row in (used, unused):
        await store.add_blob(row)
    names.by_resource["n"] = (used.key,)
    await manager.create(Note("1"), resource_id="n")
    names.by_resource["n"] = ()
    await manager.update("n", Note("2"))
    await store.remove_blobs([upload(epoch=2).key])
    await manager.close()
    return used.key, unused.key


async def assert_uses(objects, used: str, unused: str) -> None:
    manager = instance(objects)
    await manager.open()
    store = meta_store(manager)
    assert await store.blob_epoch() == 3
    assert await store.blob_usage() == BlobUsage(2, 6)
    assert await store.blob_uses(used) == [BlobUse("n", 1)]
    assert (await manager.storage.revision("n", 1)).blobs == (used,)
    assert await store.remove_blobs([used]) == []
    assert {row.key for row in await store.blobs([used[:64], unused[:64]])} == {used, unused}
    await manager.close()


async def test_a_copy_that_is_built_from_the_log_has_rows_and_uses(objects):
    used, unused = await with_uses(objects)
    assert head_of(objects).snap is None
    await assert_uses(objects, used, unused)


async def test_a_copy_that_is_built_from_a_snapshot_has_rows_and_uses(objects):
    used, unused = await with_uses(objects)
    manager = instance(objects)
    await manager.create(Note("purged"), resource_id="purged")
    await manager.purge("purged")
    await meta_store(manager).purge_remnants(dt.datetime.now(dt.UTC))
    await manager.close()
    head = head_of(objects)
    assert (head.snap.seq, head.tail, head.segs, head.fmt) == (head.seq, (), (), FORMAT_WITH_BLOBS)
    await assert_uses(objects, used, unused)
    manager = instance(objects)  # the log after the snapshot
    await manager.purge("n")
    await meta_store(manager).remove_blobs([used])
    await manager.close()
    manager = instance(objects)
    await manager.open()
    assert await meta_store(manager).blob_usage() == BlobUsage(1, 3)
    assert await meta_store(manager).remove_blobs([used, unused]) == [used, unused]
    await manager.close()


async def test_an_exported_database_keeps_rows_uses_and_epoch(objects):
    used, unused = await with_uses(objects)
    exporting = S3SqliteMetaStore("double", KEY, object_store=objects, export_key="plain")
    exporting.bind(meta_store(instance(objects))._tables.spec)
    await exporting.export()
    await exporting.close()
    elsewhere = MemoryObjectStore()
    elsewhere.objects[KEY] = objects.objects["plain"]
    elsewhere.objects |= {key: found for key, found in objects.objects.items() if not key.startswith(KEY)}
    await assert_uses(elsewhere, used, unused)
    assert (head_of(elsewhere).fmt, head_of(elsewhere).blob_epoch) == (FORMAT_WITH_BLOBS, 3)


LATE = InjectedFault("unknown", late=3.0)


@pytest.mark.parametrize("fault", [DROPPED, LOST_ANSWER, FALSE_CONFLICT, InjectedFault("conflict", applied=True), LATE])
def test_a_failed_swap_does_not_repeat_or_lose_a_row(objects, fault):
    async def main() -> None:
        manager, other = instance(objects), instance(objects)
        await manager.open()
        await other.open()
        store = meta_store(manager)
        for row in (upload(), upload()):
            objects.fault = once(fault)
            await store.add_blob(row)
            assert row in await meta_store(other).blobs([row.sha256])
        objects.fault = once(fault)
        unknown = upload(epoch=6)
        assert await store.remove_blobs([row.key, unknown.key]) == [row.key, unknown.key]
        assert await meta_store(other).blob_usage() == BlobUsage(1, row.size)
        assert await meta_store(other).blob_epoch() == 7
        await asyncio.sleep(10)  # a late request has taken effect, or failed
        assert await meta_store(other).blob_usage() == BlobUsage(1, row.size)
        assert await store.remove_blobs([row.key]) == [row.key]
        names = NamedBlobs(other.storage)
        names.by_resource["n"] = (row.key,)
        with pytest.raises(BlobGone):
            await other.create(Note("1"), resource_id="n")
        for one in (manager, other):
            await one.close()

    virtual_time.run(main())


async def test_a_lost_row_is_rescued_by_its_hash(objects):
    row = upload()
    record = LogRecord(7, b"t" * 16, 0, encode_ops([log_blob(row)]))
    (line,) = await s3_rescue._lines(instance(objects), record)
    assert msgspec.to_builtins(line) | {"time": ""} == {
        "model": "note",
        "transaction": (b"t" * 16).hex(),
        "sequence": 7,
        "time": "",
        "change": "blob",
        "sha256": row.sha256,
        "size": row.size,
        "data": None,
    }
