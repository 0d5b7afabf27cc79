"""Loading of a whole model into an empty one: L1 to L3 of `contract.loading`."""

from __future__ import annotations

import asyncio
import contextlib
import datetime as dt
import multiprocessing
import os
import random
import signal
from collections.abc import AsyncIterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NamedTuple
from uuid import uuid4

import pytest

from .. import Encoding, Query, field
from ..errors import BlobGone, CrudError, ModelNotEmpty, PinLost, UniqueConflict, VersionConflict
from ..resource_manager.basic import BlobRow, ResourceMeta, RevisionInfo, StoredKey
from ..resource_manager.contract.blobs import BlobUsage
from ..resource_manager.contract.loading import BulkLoading, LoadedResource, Loader
from ..resource_manager.contract.snapshots import Pinning
from ..resource_manager.core import ResourceManager, SimpleStorage
from ..resource_manager.model.codec import CodecIndex
from ..resource_manager.storage.snapshots import open_any_snapshot
from ..resource_manager.storage_factory import MemoryStorageFactory
from .base import Conformance, keyed
from .blobs import NamedBlobs, blob_rows_of, upload
from .model import Item, manage, storage_of

Items = list[LoadedResource | RevisionInfo]
KILLS = 2


class Contents(NamedTuple):
    """The contents of a model, as they are loaded."""

    items: Items
    bodies: list[tuple[RevisionInfo, bytes]]
    keys: list[StoredKey]
    rows: list[BlobRow]

    @property
    def metas(self) -> list[ResourceMeta]:
        """The metadata of all resources."""
        return [item.meta for item in self.items if isinstance(item, LoadedResource)]

    @property
    def records(self) -> list[RevisionInfo]:
        """The records of all revisions."""
        return [item for item in self.items if isinstance(item, RevisionInfo)]


async def example(*, blobs: bool = False) -> Contents:
    """Return contents with everything that a model can have."""
    manager = manage(MemoryStorageFactory())
    await manager.open()
    rows: list[BlobRow] = []
    if blobs:
        names, rows = NamedBlobs(manager.storage), [upload(b"one"), upload(b"one"), upload(b"two")]
        for row in rows:
            await blob_rows_of(manager).add_blob(row)
        names.by_resource["r1"] = (rows[0].key, rows[2].key)
        names.by_resource["r3"] = (rows[2].key,)
    for number in range(5):
        tags = [f"t{number}", "all"]
        await manager.create(
            Item(text=f"ä{number}", number=number, tags=tags, code=f"c{number}"), resource_id=f"r{number}", by="alice"
        )
    await manager.update("r1", Item(number=10), status="draft")
    await manager.modify("r1", Item(number=11, code="c1"), by="bob")
    await manager.update("r2", Item(number=20))
    await manager.switch("r2", 1)
    await manager.delete("r3")
    await manager.create(Item(text="ö"), resource_id="ü", by=keyed("k"))
    async with open_any_snapshot(manager.storage) as snapshot:
        items: Items = []
        bodies: list[tuple[RevisionInfo, bytes]] = []
        index = CodecIndex(manager.codec)
        async for item in snapshot.items():
            (body,) = await snapshot.bodies([item.uid])
            assert body is not None
            if isinstance(item, ResourceMeta):
                items.append(LoadedResource(item, index(body, item.encoding)))
            else:
                items.append(item)
                bodies.append((item, body))
        keys = [key async for key in snapshot.keys()]  # noqa: SIM118 - no mapping
    await manager.close()
    return Contents(items, bodies, keys, rows)


def many(number: int) -> Items:
    """Return resources whose bodies are not needed."""
    codec, now = manage(MemoryStorageFactory()).codec, dt.datetime(2026, 1, 1, tzinfo=dt.UTC)
    items: Items = []
    for at in range(number):
        meta = ResourceMeta(
            resource_id=f"many {at:06d}",
            version=1,
            nonce=f"{at:016x}",
            revision=1,
            total_revision_count=1,
            schema_version=1,
            status="stable",
            is_deleted=False,
            uid=f"0/{uuid4()}",
            data_hash="0" * 64,
            encoding=Encoding.json,
            created_time=now,
            updated_time=now,
            created_by="alice",
            updated_by="alice",
        )
        entry = codec.index(Item(text="many", number=at, code=f"many {at}"))
        items += [LoadedResource(meta, entry), RevisionInfo.of_change(meta, None)]
    return items


@contextlib.asynccontextmanager
async def loading(manager: ResourceManager[Item]) -> AsyncIterator[tuple[Loader, str]]:
    """Give a loader, and the pin that it holds. Skips the test if the stores cannot load."""
    await manager.open()
    storage = storage_of(manager)
    load = ability_of(storage)
    pinning = storage.meta_store
    assert isinstance(pinning, Pinning)
    pin = uuid4().hex
    await pinning.add_pin(pin)
    try:
        async with load.load(pin) as loader:
            yield loader, pin
    finally:
        await pinning.remove_pin(pin)


def ability_of(storage: SimpleStorage) -> BulkLoading:
    """Return what loads a model. Skips the test if the stores cannot do it."""
    if storage.loading is None:
        pytest.skip("these stores cannot load a model")
    return storage.loading


async def fill(manager: ResourceManager[Item], loader: Loader, contents: Contents) -> None:
    """Load everything, in parts, and store the bodies."""
    for record, body in contents.bodies:
        await storage_of(manager).resource_store.put(record.uid, record, body)
    await loader.add_blobs(contents.rows)
    for start in range(0, len(contents.items), 3):
        await loader.add(contents.items[start : start + 3])
    await loader.add_keys(contents.keys)


async def _fill_and_publish(manager: ResourceManager[Item], loader: Loader, contents: Contents) -> None:
    await fill(manager, loader, contents)
    await loader.publish()


async def drop_pin(manager: ResourceManager[Item], pin: str) -> None:
    """Drop a pin as if it had not been renewed."""
    pinning = storage_of(manager).meta_store
    assert isinstance(pinning, Pinning)
    assert await pinning.remove_pin(pin)


class LoadingConformance(Conformance):
    """Loading of a whole model."""

    @pytest.mark.parametrize("blobs", [False, True])
    async def test_a_loaded_model_is_equal(self, manager: ResourceManager[Item], blobs: bool) -> None:
        contents = await example(blobs=blobs)
        async with loading(manager) as (loader, _):
            await fill(manager, loader, contents)
            assert await manager.count(Query(include_deleted=True)) == 0  # L1
            assert [meta async for meta in manager.storage.scan()] == []
            await loader.publish()
        async with open_any_snapshot(manager.storage) as snapshot:
            found = [item async for item in snapshot.items()]
            assert found == [item.meta if isinstance(item, LoadedResource) else item for item in contents.items]
            uids = [record.uid for record in contents.records]
            assert await snapshot.bodies(uids) == [body for _, body in contents.bodies]
            if snapshot.one_moment:
                assert [key async for key in snapshot.keys()] == contents.keys  # noqa: SIM118
        await self._check_use(manager, contents)
        if blobs:
            rows = blob_rows_of(manager)
            assert await rows.blob_usage() == BlobUsage(3, sum(row.size for row in contents.rows))
            assert [use.resource_id for use in await rows.blob_uses(contents.rows[2].key)] == ["r1", "r3"]
            keys = [row.key for row in contents.rows]
            assert await rows.remove_blobs(keys) == [keys[1]]
            await manager.purge("r1")
            assert await rows.remove_blobs(keys) == [keys[0], keys[1]]

    async def _check_use(self, manager: ResourceManager[Item], contents: Contents) -> None:
        assert await manager.count() == 5
        assert await manager.count(Query(include_deleted=True)) == len(contents.metas)
        assert await manager.count(Query(where=field("tags").contains("all"))) == 3
        page = await manager.find(Query(where=field("text").starts_with("ä"), sort=("-number",)))
        assert [hit.meta.resource_id for hit in page.items] == ["r4", "r2", "r0"]
        assert page.items[0].meta in contents.metas
        assert (await manager.get("r1", revision=2)).data.number == 11
        again = await manager.create(Item(text="ö"), resource_id="ü", by=keyed("k"))
        assert again.meta == contents.metas[-1]
        with pytest.raises(UniqueConflict):
            await manager.create(Item(code="c4"))
        await manager.create(Item(code="c5"), resource_id="new")
        await manager.update("r4", Item(code="c6"), status="draft")
        await manager.publish("r1")
        assert await manager.count() == 6

    async def test_nothing_is_published_into_a_model_that_has_data(self, manager: ResourceManager[Item]) -> None:
        contents = await example()
        async with loading(manager) as (loader, _):
            await fill(manager, loader, contents)
            await manager.create(Item(text="other"), resource_id="other")
            with pytest.raises(ModelNotEmpty):
                await loader.publish()
        assert [meta.resource_id async for meta in manager.storage.scan()] == ["other"]
        with pytest.raises(ModelNotEmpty):
            async with loading(manager):
                pass

    async def test_the_results_of_keys_count_as_data(self, manager: ResourceManager[Item]) -> None:
        async with loading(manager) as (loader, _):
            await fill(manager, loader, await example())
            await manager.create(Item(), resource_id="purged", by=keyed("k"))
            await manager.purge("purged")
            with pytest.raises(ModelNotEmpty):
                await loader.publish()
        assert await manager.count(Query(include_deleted=True)) == 0

    async def test_rows_of_blobs_count_as_data(self, manager: ResourceManager[Item]) -> None:
        async with loading(manager) as (loader, _):
            await fill(manager, loader, await example())
            await blob_rows_of(manager).add_blob(upload())
            with pytest.raises(ModelNotEmpty):
                await loader.publish()
        assert await manager.count(Query(include_deleted=True)) == 0

    async def test_a_purged_model_is_empty(self, manager: ResourceManager[Item]) -> None:
        await manager.open()
        ability_of(storage_of(manager))
        for number in range(3):
            await manager.create(Item(code=f"c{number}"), resource_id=f"r{number}")
            await manager.purge(f"r{number}")
        contents = await example()
        async with loading(manager) as (loader, _):
            await fill(manager, loader, contents)
            await loader.publish()
        await self._check_use(manager, contents)

    async def test_a_lost_pin_is_noticed(self, manager: ResourceManager[Item]) -> None:
        async with loading(manager) as (loader, pin):
            await fill(manager, loader, await example())
            await drop_pin(manager, pin)
            with pytest.raises(PinLost):
                await loader.publish()
        assert await manager.count(Query(include_deleted=True)) == 0

    async def test_equal_unique_values_are_refused(self, manager: ResourceManager[Item]) -> None:
        contents = await example()
        first, last = contents.items[0], contents.items[-2]
        assert isinstance(first, LoadedResource)
        assert isinstance(last, LoadedResource)
        contents.items[-2] = LoadedResource(last.meta, first.entry)
        async with loading(manager) as (loader, _):
            await fill(manager, loader, contents)
            with pytest.raises(UniqueConflict) as conflict:
                await loader.publish()
        assert conflict.value.field == "code"
        assert await manager.count(Query(include_deleted=True)) == 0

    async def test_keys_without_rows_are_refused(self, manager: ResourceManager[Item]) -> None:
        contents = await example(blobs=True)
        await manager.open()
        blob_rows_of(manager)
        for rows in (contents.rows[1:], []):
            async with loading(manager) as (loader, _):
                with pytest.raises(BlobGone):  # at the latest
                    await _fill_and_publish(manager, loader, contents._replace(rows=rows))
        assert await manager.count(Query(include_deleted=True)) == 0

    async def test_a_load_that_is_not_published_is_discarded(self, manager: ResourceManager[Item]) -> None:
        contents = await example()
        with contextlib.suppress(ZeroDivisionError):
            async with loading(manager) as (loader, _):
                await fill(manager, loader, contents)
                raise ZeroDivisionError
        assert await manager.count(Query(include_deleted=True)) == 0
        async with loading(manager) as (loader, _):
            await fill(manager, loader, contents)
            await loader.publish()
        await self._check_use(manager, contents)

    async def test_an_empty_load_changes_nothing(self, manager: ResourceManager[Item]) -> None:
        async with loading(manager) as (loader, _):
            await loader.publish()
        assert await manager.count(Query(include_deleted=True)) == 0
        await manager.create(Item(code="c"), resource_id="a")

    async def test_a_load_races_with_commits(self, manager: ResourceManager[Item]) -> None:
        """Either the commit finds what was loaded, or the load finds what was committed."""
        contents = await example()
        for seed in range(12):
            for meta in [meta async for meta in manager.storage.scan()]:
                await manager.purge(meta.resource_id)
            again = contents._replace(keys=[])
            async with loading(manager) as (loader, _):
                await fill(manager, loader, again)
                outcomes = await asyncio.gather(
                    _after(seed % 4, loader.publish()),
                    _after(seed // 4, manager.create(Item(code="c0"), resource_id=("r0", f"late {seed}")[seed % 2])),
                    return_exceptions=True,
                )
            ids = [meta.resource_id async for meta in manager.storage.scan()]
            match outcomes:
                case [None, UniqueConflict() | VersionConflict()]:
                    assert ids == [meta.resource_id for meta in contents.metas]
                case [ModelNotEmpty(), created] if not isinstance(created, BaseException):
                    assert ids == [("r0", f"late {seed}")[seed % 2]]
                case _:
                    raise AssertionError(outcomes)

    async def test_one_of_two_loads_wins(self, manager: ResourceManager[Item]) -> None:
        contents = [await example(), await example()]
        contents[1] = Contents(many(20), [], [], [])
        async with loading(manager) as (one, _), loading(manager) as (other, _):
            await fill(manager, one, contents[0])
            await fill(manager, other, contents[1])
            outcomes = await asyncio.gather(one.publish(), other.publish(), return_exceptions=True)
        winners = [at for at, outcome in enumerate(outcomes) if outcome is None]
        assert [type(outcome) for outcome in outcomes if outcome is not None] == [ModelNotEmpty]
        found = [meta async for meta in manager.storage.scan()]
        assert found == contents[winners[0]].metas


async def _after(turns: int, work: object) -> object:
    for _ in range(turns):
        await asyncio.sleep(0)
    return await work  # type: ignore[misc]


class DurableLoadingConformance(Conformance):
    """Loading of a whole model into a store that outlives the process."""

    async def test_a_loaded_model_is_there_after_a_restart(self, root: Path) -> None:
        contents = await example(blobs=True)
        manager = manage(self.make(root))
        async with loading(manager) as (loader, _):
            await fill(manager, loader, contents)
            await loader.publish()
        await manager.close()
        again = manage(self.make(root))
        await again.open()
        async with open_any_snapshot(again.storage) as snapshot:
            found = [item async for item in snapshot.items()]
        assert found == [item.meta if isinstance(item, LoadedResource) else item for item in contents.items]
        assert await again.count(Query(where=field("tags").contains("all"))) == 3
        with pytest.raises(UniqueConflict):
            await again.create(Item(code="c4"))
        assert await blob_rows_of(again).remove_blobs([row.key for row in contents.rows]) == [contents.rows[1].key]
        await again.close()

    def test_a_killed_load_leaves_an_empty_model(self, root: Path) -> None:
        """The process is killed at random moments. Then the model is empty, or has everything."""
        context = multiprocessing.get_context("spawn")
        asyncio.run(self._skip_unless_it_loads(root))
        for seed in range(KILLS):
            model = root / f"{root.name}-{seed}"  # some kinds make their tables by the last name alone
            model.mkdir()
            ours, theirs = context.Pipe()
            process = context.Process(target=_load_in_process, args=(type(self), model, theirs))
            process.start()
            theirs.close()
            assert ours.recv() == "begun"
            process.join(random.Random(seed).uniform(0, 0.4))
            assert process.pid is not None
            with contextlib.suppress(ProcessLookupError):
                os.kill(process.pid, signal.SIGKILL)
            process.join()
            asyncio.run(self._check_after_a_kill(model))
        assert not list(root.rglob("crudstack-process-*"))

    async def _skip_unless_it_loads(self, root: Path) -> None:
        manager = manage(self.make(root))
        try:
            async with loading(manager):
                pass
        finally:
            await manager.close()

    async def _check_after_a_kill(self, root: Path) -> None:
        manager = manage(self.make(root))
        await manager.open()
        number = await manager.count(Query(include_deleted=True))
        assert number in (0, MANY)
        await manager.maintain(10)
        if not number:
            async with loading(manager) as (loader, _):
                await loader.add(many(3))
                await loader.publish()
        await manager.close()


MANY = 300


def _load_in_process(conformance: type[DurableLoadingConformance], root: Path, told: Connection) -> None:
    asyncio.run(_load_many(conformance, root, told))


async def _load_many(conformance: type[DurableLoadingConformance], root: Path, told: Connection) -> None:
    manager = manage(conformance().make(root))
    items = many(MANY)
    async with loading(manager) as (loader, _):
        told.send("begun")
        for start in range(0, len(items), 50):
            await loader.add(items[start : start + 50])
        with contextlib.suppress(CrudError):
            await loader.publish()
    await manager.close()
