"""Snapshots of Redis: each resource is as at some moment, in bounded memory."""

from __future__ import annotations

import asyncio
import itertools
import tracemalloc
from collections.abc import AsyncIterator

import pytest

from app.autocrud.errors import StoreDamaged, WriteContention
from app.autocrud.resource_manager.basic import ModelSpec, StoredKey
from app.autocrud.resource_manager.meta_store import redis_snapshots
from app.autocrud.resource_manager.meta_store.redis import RedisMetaStore
from app.autocrud.testing.blobs import upload
from tests.stores.changes import meta_of, naming, once, read


@pytest.fixture
async def store(valkey, tmp_path) -> AsyncIterator[RedisMetaStore]:
    store = RedisMetaStore(valkey, prefix=f"{tmp_path.name}:")
    store.bind(ModelSpec("item"))
    yield store
    await store.close()


@pytest.fixture(params=["in one step", "in pages"])
def how(request, monkeypatch) -> str:
    """How resources are read: small ones in one step, and large ones in pages."""
    if request.param == "in pages":
        monkeypatch.setattr(redis_snapshots, "MOST_PARTS", 1)
        monkeypatch.setattr(redis_snapshots, "PAGE", 2)
    return request.param


@pytest.mark.usefixtures("how")
async def test_resources_come_by_ascending_id_with_all_records(store: RedisMetaStore):
    ids = ["b", "a", "ä", "😀", "\uffff", "a\x01", "x" * 1000, *(f"{number}" for number in range(250))]
    await store.commit([naming(rid) for rid in ids])
    for version in range(2, 9):
        await store.commit([naming(rid, version=version) for rid in ids[:7]])
    await store.commit([naming("a", version=9, record=None, drop=("0/a-3", "0/a-4", "0/a-8"))])
    async with store.snapshot() as snapshot:
        assert not snapshot.one_moment
        assert await snapshot.count() == len(ids)
        found = await read(snapshot)
        assert list(found) == sorted(ids)
        for rid, (meta, records) in found.items():
            assert meta == await store.get(rid)
            assert records == (await store.revisions(rid)).items[::-1]
        assert len(found["a"][1]) == 5


@pytest.mark.usefixtures("how")
async def test_each_resource_is_of_one_moment_while_writes_go_on(store: RedisMetaStore):
    ids = [f"r{number}" for number in range(20)]
    await store.commit([naming(rid) for rid in ids])
    ended = asyncio.Event()

    async def write() -> int:
        """Each version drops the revision before the last one, so two records are left."""
        for version in itertools.count(2):
            if ended.is_set():
                return version
            drops = (f"-{version - 2}",) if version > 2 else ()
            await store.commit(
                [naming(rid, version=version, drop=tuple(f"0/{rid}{drop}" for drop in drops)) for rid in ids]
            )
            await asyncio.sleep(0.01)
        raise AssertionError

    writing = asyncio.create_task(write())
    versions: set[int] = set()
    while len(versions) < 10:
        async with store.snapshot() as snapshot:
            found = await read(snapshot)
            assert list(found) == sorted(ids)
            for meta, records in found.values():
                assert [record.revision for record in records] == [meta.version - 1, meta.version][-meta.version :]
                versions.add(meta.version)
    ended.set()
    await writing


async def test_a_resource_that_is_purged_while_it_is_read_is_left_out(store: RedisMetaStore, how):
    await store.commit([naming(rid) for rid in ("a", "b", "c")])
    async with store.snapshot() as snapshot:
        items = snapshot.items()
        assert (await anext(items)).resource_id == "a"
        await store.commit([naming("b", version=2, purge=True, record=None), naming("d")])
        rest = [item.resource_id async for item in items]
    # The resources of one step were read already.
    assert rest == (["a", "b", "b", "c", "c"] if how == "in one step" else ["a", "c", "c"])


async def test_a_large_resource_that_changes_each_time_ends_the_snapshot(store: RedisMetaStore, monkeypatch):
    monkeypatch.setattr(redis_snapshots, "MOST_PARTS", 1)
    await store.commit([naming("a")])
    revisions, version = store.revisions, 1

    async def changed(*arguments):
        nonlocal version
        version += 1
        await store.commit([naming("a", version=version)])
        return await revisions(*arguments)

    monkeypatch.setattr(store, "revisions", changed)
    with pytest.raises(WriteContention, match="resource 'a' changed each time"):
        async with store.snapshot() as snapshot:
            await read(snapshot)
    assert version == redis_snapshots.ATTEMPTS + 1


@pytest.mark.usefixtures("how")
async def test_rows_of_blobs_stay_known_after_a_sweep_removed_them(store: RedisMetaStore):
    rows = [upload(content) for content in (b"one", b"two", b"")]
    for row in rows:
        await store.add_blob(row)
    keys = [row.key for row in rows]
    await store.commit([naming("r", *keys[:2])])
    async with store.snapshot() as snapshot:
        await read(snapshot)
        await store.commit([naming("r", version=2, drop=("0/r-1",))])
        assert await store.remove_blobs(keys[:2]) == keys[:2]
        assert await snapshot.blob_rows(keys[::-1]) == rows[::-1]
        assert await snapshot.blob_rows([]) == []
        with pytest.raises(StoreDamaged):
            await snapshot.blob_rows([upload().key])
    async with store.snapshot() as snapshot:
        with pytest.raises(StoreDamaged, match=keys[0]):
            await snapshot.blob_rows(keys[:1])


async def test_keys_come_in_order_with_their_results(store: RedisMetaStore):
    keys = [f"{number:02}" for number in range(50)]
    for at, key in enumerate(reversed(keys)):
        await store.commit([naming(key)], once(key, 1000 + at, 0, None))
    await store.commit([naming("07", version=2, purge=True, record=None)])
    async with store.snapshot() as snapshot:
        found = [key async for key in snapshot.keys()]  # noqa: SIM118 - no mapping
    assert found == [
        StoredKey(key=key, request="request", time=1049 - at, results=(None if key == "07" else meta_of(key), None))
        for at, key in enumerate(keys)
    ]


@pytest.mark.slow
async def test_memory_does_not_grow_with_the_number_of_resources_or_revisions(store: RedisMetaStore):
    for start in range(0, 4000, 1000):
        await store.commit([naming(f"r{number}") for number in range(start, start + 1000)])
    for start in range(1, 2501, 500):
        await store.commit([naming("large", version=version) for version in range(start, start + 500)])
    counts = {"ResourceMeta": 0, "RevisionInfo": 0}
    async with store.snapshot() as snapshot:
        tracemalloc.start()
        try:
            async for item in snapshot.items():
                counts[type(item).__name__] += 1
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
    assert counts == {"ResourceMeta": 4001, "RevisionInfo": 6500}
    assert peak < 3 * 1024 * 1024
