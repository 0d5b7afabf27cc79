"""Rows of blobs in Redis: the format, full servers, and requests that are lost."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import msgspec
import pytest

from app.autocrud.errors import BlobGone, ConfigError, StoreDamaged, StoreUnavailable
from app.autocrud.resource_manager.basic import ModelSpec
from app.autocrud.resource_manager.contract.blobs import BLOBS_MARKER, BlobUsage, BlobUse
from app.autocrud.resource_manager.meta_store.redis import RedisMetaStore
from app.autocrud.testing.blobs import upload
from app.autocrud.values import kind_of
from tests.stores.changes import naming
from tests.stores.redis.helpers import lose_a_request, lose_an_answer


@pytest.fixture
async def store(valkey, tmp_path) -> AsyncIterator[RedisMetaStore]:
    store = RedisMetaStore(valkey, prefix=f"{tmp_path.name}:")
    store.bind(ModelSpec("item"))
    yield store
    await store.close()


async def keys_of(store: RedisMetaStore, server) -> set[str]:
    return {key.decode().removeprefix(store._prefix) for key in server.keys(f"{store._prefix}*")}


async def test_a_store_becomes_format_2_with_its_first_row_only(store, server, valkey):
    async def state() -> tuple[int, list[str]]:
        format_, unique = server.hmget(store._meta_key, "format", "unique")
        return int(format_ or 1), msgspec.json.decode(unique or b"[]")

    await store.commit([naming("r")])
    with pytest.raises(BlobGone):
        await store.commit([naming("r", upload().key, version=2)])
    await store.remove_blobs([upload().key])
    assert await state() == (1, [])
    await asyncio.gather(*(store.add_blob(upload(epoch=1)) for _ in range(4)))
    assert await state() == (2, [BLOBS_MARKER])
    await store.commit([naming("r", version=2, purge=True, record=None)])  # a resource that lacks the field
    spec = ModelSpec("item", fields={"code": kind_of(str)}, unique=("code",))
    again = RedisMetaStore(valkey, prefix=store._prefix)
    again.bind(spec)
    await again.commit([naming("s")])
    assert await state() == (2, sorted([BLOBS_MARKER, "code"]))
    with pytest.raises(ConfigError, match="code is unique in the store"):
        await store.commit([naming("t")])
    await again.close()


async def test_a_newer_format_is_refused_by_name(store, server, valkey):
    row = upload()
    await store.add_blob(row)
    await store.commit([naming("r", row.key)])
    server.hset(store._meta_key, "format", 3)
    again = RedisMetaStore(valkey, prefix=store._prefix)
    again.bind(ModelSpec("item", fields={"code": kind_of(str)}, unique=("code",)))
    for call in (
        store.commit([naming("s")]),
        store.add_blob(upload()),
        store.remove_blobs([row.key]),
        again.generation(),
        again.activate_unique_fields(),
    ):
        with pytest.raises(ConfigError, match=r"model 'item': the store has format 3, and this program knows .* to 2"):
            await call
    assert (await store.get("r")).version == 1
    assert await store.blobs([row.sha256]) == [row]
    await again.close()


async def test_nothing_of_blobs_is_left_after_a_purge_and_a_removal(store, server):
    rows = [upload(content) for content in (b"", b"one", b"two")]
    for row in rows:
        await store.add_blob(row)
    before = await keys_of(store, server)
    keys = [row.key for row in rows]
    await store.commit([naming("r", *keys), naming("s", keys[0])])
    await store.commit([naming("r", keys[1], version=2)])
    assert {f"uses:{key}" for key in keys} <= await keys_of(store, server)
    await store.commit([naming("r", version=3, purge=True, record=None), naming("s", version=2, drop=("0/s-1",))])
    left = await keys_of(store, server) - before
    assert not [key for key in left if key.startswith("uses:") or key == "res:r"]
    assert b"r\0" not in b"".join(server.dump(key) or b"" for key in server.keys(f"{store._prefix}uses:*"))
    assert await store.remove_blobs(keys) == keys
    assert "blobs" not in await keys_of(store, server)
    assert await store.blob_usage() == BlobUsage(0, 0)


async def test_a_full_server_accepts_what_frees_memory(store, server):
    used, unused = upload(b"one"), upload(b"two")
    for row in (used, unused):
        await store.add_blob(row)
    await store.commit([naming("r", used.key)])
    server.config_set("maxmemory", 1)
    for write in (store.add_blob(upload()), store.commit([naming("r", used.key, version=2)])):
        with pytest.raises(StoreUnavailable):
            await write
    assert await store.blob_usage() == BlobUsage(2, 6)
    assert await store.blob_uses(used.key) == [BlobUse("r", 1)]
    assert await store.remove_blobs([unused.key, used.key]) == [unused.key]
    await store.commit([naming("r", version=2, purge=True, record=None)])
    assert await store.remove_blobs([used.key]) == [used.key]
    assert await store.blob_usage() == BlobUsage(0, 0)


@pytest.mark.parametrize("name", ["blobs", "uses:{}"])
async def test_a_key_of_another_type_changes_nothing(store, server, name):
    row = upload()
    await store.add_blob(row)
    await store.commit([naming("other")])
    wrong = f"{store._prefix}{name.format(row.key)}"
    server.set(wrong, "not a sorted set")
    try:
        before = {key: server.dump(key) for key in server.keys(f"{store._prefix}*")}
        for write in (
            lambda: store.commit([naming("other", version=2), naming("r", row.key)]),
            lambda: store.remove_blobs([row.key]),
            *([lambda: store.add_blob(upload())] if name == "blobs" else []),
        ):
            with pytest.raises(StoreDamaged):
                await write()
        assert {key: server.dump(key) for key in server.keys(f"{store._prefix}*")} == before
    finally:
        server.delete(wrong)  # other tests read all keys of the server


async def test_a_row_whose_answer_is_lost_is_stored_once(store, valkey, proxy):
    through = RedisMetaStore(proxy.url_for(valkey), prefix=store._prefix)
    through.bind(ModelSpec("item"))
    await store.add_blob(upload())
    row, other = upload(b"two"), upload(b"two", epoch=1)
    await through.generation()
    await lose_an_answer(proxy, through.add_blob(row, quota=9))
    assert await store.blob_usage() == BlobUsage(2, 6)
    for _ in range(2):  # a removal may run twice, which raises the epoch
        assert await store.remove_blobs([row.key]) == [row.key]
    assert await store.blob_usage() == BlobUsage(1, 3)
    # An upload that was lost on its way is stored again, and what arrives late is refused: its content may be gone.
    await lose_a_request(proxy, through.add_blob(other))
    assert await store.remove_blobs([other.key]) == [other.key]
    proxy.later.set()
    assert await asyncio.to_thread(proxy.answered.wait, 60)
    assert await store.blobs([other.sha256]) == []
    await through.close()


async def test_uses_are_in_the_order_of_code_points(store):
    row = upload()
    await store.add_blob(row)
    ids = ["", "\x01", "a", "a\x01", "a b", "ab", "ä", "😀", "\uffff", "z" * 1000]
    await store.commit([naming(rid, row.key) for rid in ids])
    await store.commit([naming(rid, row.key, version=2) for rid in ids[::2]])
    expected = [BlobUse(rid, 2 if rid in ids[::2] else 1) for rid in sorted(ids)]
    assert await store.blob_uses(row.key, 100) == expected
    for limit in range(1, len(ids)):
        assert await store.blob_uses(row.key, limit) == expected[:limit]
