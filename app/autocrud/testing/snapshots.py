"""Snapshots, which exports read: one moment if the stores can show one, else each resource as at some moment."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from pathlib import Path

import msgspec
import pytest

from ..errors import StoreDamaged, WriteContention
from ..resource_manager.basic import ResourceMeta, RevisionInfo
from ..resource_manager.contract.snapshots import SnapshotReading, StorageSnapshot
from ..resource_manager.core import ResourceManager
from ..resource_manager.engine.operations import Retention, Update
from ..resource_manager.storage.snapshots import open_any_snapshot
from .base import Conformance, keyed
from .blobs import NamedBlobs, blob_rows_of, upload
from .model import Item, manage, storage_of

ACCOUNTS, TOTAL = 8, 800
Read = dict[str, tuple[ResourceMeta, list[tuple[RevisionInfo, bytes | None]]]]


async def read(snapshot: StorageSnapshot) -> Read:
    """Return everything in a snapshot, by resource id, and check that it is in order."""
    found: Read = {}
    records: list[tuple[RevisionInfo, bytes | None]] = []
    async for item in snapshot.items():
        await asyncio.sleep(0)  # writers get a turn, also if the store never waits
        if isinstance(item, ResourceMeta):
            assert not found or item.resource_id > next(reversed(found))
            records = []
            found[item.resource_id] = item, records
        else:
            assert item.resource_id == next(reversed(found))
            assert not records or item.revision > records[-1][0].revision
            (body,) = await snapshot.bodies([item.uid])
            records.append((item, body))
    for meta, of_resource in found.values():
        (current,) = [record for record, _ in of_resource if record.revision == meta.revision]
        assert (current.uid, current.data_hash) == (meta.uid, meta.data_hash)
    return found


def current_of(found: Read) -> dict[str, Item]:
    """Return the current data of all resources in a snapshot."""
    data = {}
    for rid, (meta, records) in found.items():
        (body,) = [body for record, body in records if record.revision == meta.revision]
        assert body is not None, f"the body of {rid} is missing"
        decode = msgspec.json.decode if meta.encoding == "json" else msgspec.msgpack.decode
        data[rid] = decode(body, type=Item)
    return data


class SnapshotConformance(Conformance):
    """Snapshots, which exports read."""

    @pytest.mark.parametrize("each_resource", [False, True])
    async def test_a_snapshot_has_all_that_is_stored(self, manager: ResourceManager[Item], each_resource: bool) -> None:
        for number in range(5):
            await manager.create(Item(number=number), resource_id=f"r{number}", by="alice")
        await manager.update("r1", Item(number=10), status="draft")
        await manager.modify("r1", Item(number=11), by="bob")
        await manager.update("r2", Item(number=20))
        await manager.switch("r2", 1)
        await manager.delete("r3")
        await manager.purge("r4")
        once = await manager.create(Item(number=5), resource_id="r5", by=keyed("k"))
        async with open_any_snapshot(manager.storage, each_resource=each_resource) as snapshot:
            found = await read(snapshot)
            keys = [key async for key in snapshot.keys()]  # noqa: SIM118 - no mapping
            assert await snapshot.count() == len(found) == 5
        assert [meta async for meta in manager.storage.scan()] == [meta for meta, _ in found.values()]
        for rid, (_, records) in found.items():
            page = await manager.storage.revisions(rid)
            assert [record for record, _ in records] == page.items[::-1]
            assert [body for _, body in records] == await manager.storage.bodies(
                [item.uid for item in page.items[::-1]]
            )
        if keys or isinstance(storage_of(manager).meta_store, SnapshotReading):
            assert [key.results for key in keys] == [(once.meta,)]

    @pytest.mark.parametrize("each_resource", [False, True])
    async def test_a_snapshot_shows_one_moment_while_writes_go_on(
        self, manager: ResourceManager[Item], each_resource: bool
    ) -> None:
        """Each batch moves an amount from one account to another, so the sum is always the same."""
        for number in range(ACCOUNTS):
            await manager.create(Item(number=TOTAL // ACCOUNTS), resource_id=f"account {number}")
        stop = asyncio.Event()

        async def move(seed: int) -> int:
            for step in itertools.count(1):
                first, second = f"account {(seed + step) % ACCOUNTS}", f"account {(seed + 3 * step + 1) % ACCOUNTS}"
                await asyncio.sleep(0)
                if stop.is_set():
                    return step
                if first == second:
                    continue
                states = [await manager.get(first), await manager.get(second)]
                changes = [
                    Update(resource_id=state.meta.resource_id, expect=state.version, data=Item(number=amount))
                    for state, amount in zip(
                        states, ((states[0].data.number or 0) - 1, (states[1].data.number or 0) + 1), strict=True
                    )
                ]
                with contextlib.suppress(Exception):
                    await manager.batch(changes)
            raise AssertionError

        writers = [asyncio.create_task(move(seed)) for seed in range(2)]
        try:
            for _ in range(3):
                async with open_any_snapshot(manager.storage, each_resource=each_resource) as snapshot:
                    data = current_of(await read(snapshot))
                    assert len(data) == ACCOUNTS
                    if snapshot.one_moment:
                        assert sum(item.number or 0 for item in data.values()) == TOTAL
        except WriteContention:
            assert each_resource
        finally:
            stop.set()
            steps = await asyncio.gather(*writers)
        assert min(steps) > 1

    @pytest.mark.parametrize("each_resource", [False, True])
    async def test_a_snapshot_has_the_rows_of_blobs_that_were_removed_since(
        self, manager: ResourceManager[Item], each_resource: bool
    ) -> None:
        await manager.open()
        stored, names = blob_rows_of(manager), NamedBlobs(manager.storage)
        rows = [upload(b"one"), upload(b"two"), upload(b"one")]
        for row in rows:
            await stored.add_blob(row)
        keys = [row.key for row in rows]
        names.by_resource["r"] = tuple(keys)
        await manager.create(Item(text="1"), resource_id="r", status="draft")
        async with open_any_snapshot(manager.storage, each_resource=each_resource) as snapshot:
            await read(snapshot)
            names.by_resource["r"] = ()
            await manager.modify("r", Item(text="2"))
            assert await stored.remove_blobs(keys) == keys
            assert await snapshot.blob_rows(keys[::-1]) == rows[::-1]
            assert await snapshot.blob_rows([]) == []
            with pytest.raises(StoreDamaged):
                await snapshot.blob_rows([upload().key])

    async def test_a_snapshot_does_not_change(self, manager: ResourceManager[Item]) -> None:
        for rid in ("a", "b", "purged"):
            await manager.create(Item(text="before"), resource_id=rid)
        async with open_any_snapshot(manager.storage) as snapshot:
            await manager.update("a", Item(text="after"))
            await manager.delete("b")
            await manager.create(Item(text="after"), resource_id="c")
            await manager.purge("purged")
            found = await read(snapshot)
        if snapshot.one_moment:
            assert list(found) == ["a", "b", "purged"]
            _, records = found.pop("purged")
            assert {data.text for data in current_of(found).values()} == {"before"}
            assert len(records) == 1
        assert (await manager.get("a")).data.text == "after"

    async def test_a_snapshot_keeps_bodies_that_are_superseded_meanwhile(self, root: Path) -> None:
        """P1: no edit of a draft, no retention and no sweep removes a body that a pinned snapshot needs."""
        manager = manage(self.make(root), retention=Retention(last=1))
        await manager.create(Item(text="draft"), resource_id="draft", status="draft")
        await manager.create(Item(text="stable"), resource_id="stable")
        async with open_any_snapshot(manager.storage) as snapshot:
            for number in range(3):
                await manager.modify("draft", Item(text=f"draft {number}"))
                await manager.update("stable", Item(text=f"stable {number}"))
                await manager.maintain(10)
            found = await read(snapshot)
            if snapshot.one_moment:
                assert {data.text for data in current_of(found).values()} == {"draft", "stable"}
            else:
                current_of(found)
        await manager.close()
