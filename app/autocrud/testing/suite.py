"""The suites for storages, one for each set of promises."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import ClassVar

import pytest
from msgspec.structs import replace

from .. import Encoding, Query, field
from ..errors import (
    ConfigError,
    UniqueConflict,
    VersionConflict,
)
from .base import keyed
from .batches import BatchConformance
from .blob_contents import BlobContentConformance, DurableBlobContentConformance
from .blob_machine import BlobMachineConformance
from .blobs import BlobConformance, DurableBlobConformance
from .hostile import HostileInputConformance
from .idempotency import IdempotencyConformance
from .limits import DurableLimitsConformance, LimitsConformance
from .loading import DurableLoadingConformance, LoadingConformance
from .model import Clock, Item, manage
from .new_fields import NewFieldConformance
from .queries import QueryConformance
from .races import RaceConformance
from .reindexing import ReindexingConformance
from .revisions import RevisionConformance
from .snapshots import SnapshotConformance
from .sweeping import SweepConformance


class StorageConformance(
    RevisionConformance,
    QueryConformance,
    BatchConformance,
    IdempotencyConformance,
    RaceConformance,
    HostileInputConformance,
    SweepConformance,
    SnapshotConformance,
    LoadingConformance,
    LimitsConformance,
    BlobConformance,
    BlobMachineConformance,
    BlobContentConformance,
):
    """Tests for storages that may lose everything when the process ends."""


class DurableConformance(
    ReindexingConformance,
    NewFieldConformance,
    DurableLimitsConformance,
    DurableBlobConformance,
    DurableBlobContentConformance,
    DurableLoadingConformance,
    StorageConformance,
):
    """Tests for storages that keep acknowledged data after the process ends."""

    durable: ClassVar[bool] = True

    async def test_bodies_of_both_encodings_live_side_by_side(self, root: Path) -> None:
        rich = Item(text="ä", real=1.5, tags=["x"], number=-1)
        ids = {}
        for encoding in Encoding:
            manager = manage(self.make(root), encoding=encoding)
            ids[encoding] = (await manager.create(replace(rich, code=encoding.value))).meta
            await manager.close()
        manager = manage(self.make(root))
        for encoding, meta in ids.items():
            assert (await manager.get(meta.resource_id)).data == replace(rich, code=encoding.value)
        page = await manager.search()
        assert {item.data.code for item in page.items} == {"json", "msgpack"}
        await manager.close()

    async def test_everything_is_there_after_a_restart(self, root: Path, clock: Clock) -> None:
        manager = manage(self.make(root), clock=clock)
        kept = await manager.create(Item(text="kept", tags=["x"], code="c"), resource_id="kept", by="alice")
        kept = await manager.update("kept", Item(text="kept 2", tags=["y"], code="c"), status="draft")
        await manager.create(Item(text="deleted"), resource_id="deleted")
        await manager.delete("deleted")
        await manager.create(Item(text="purged"), resource_id="purged")
        await manager.purge("purged")
        once = await manager.create(Item(text="once"), resource_id="once", by=keyed("k"))
        history = await manager.revisions("kept")
        await manager.close()
        again = manage(self.make(root), clock=clock)
        assert (await again.get("kept")).meta == kept.meta
        assert (await again.get("kept", revision=1)).data.text == "kept"
        assert (await again.revisions("kept")).items == history.items
        assert (await again.get("deleted", include_deleted=True)).meta.is_deleted
        assert (await again.create(Item(text="once"), resource_id="once", by=keyed("k"))).meta == once.meta
        assert await again.count(Query(include_deleted=True)) == 3
        found = await again.find(Query(where=field("tags").contains("y")))
        assert [hit.meta.resource_id for hit in found.items] == ["kept"]
        with pytest.raises(UniqueConflict):
            await again.create(Item(code="c"))
        with pytest.raises(VersionConflict):
            await again.create(Item(), resource_id="deleted")
        await again.modify("kept", Item(text="kept 3"), expect=kept.version)
        await again.close()


class OwnedConformance(DurableConformance):
    """Tests for durable storages that only one process at a time may use."""

    keeps_index: ClassVar[bool] = False

    async def test_a_former_owner_sees_the_writes_of_another_one(self, root: Path) -> None:
        first, second = manage(self.make(root)), manage(self.make(root))
        for rid in ("kept", "purged"):
            await first.create(Item(text=rid), resource_id=rid)
        await first.close()
        await second.purge("purged")
        await second.update("kept", Item(text="changed"))
        await second.close()
        assert [found.data.text for found in (await first.search()).items] == ["changed"]
        await first.close()

    def test_a_second_process_is_refused(self, root: Path) -> None:
        manager = manage(self.make(root))
        asyncio.run(manager.open())
        with pytest.raises(ConfigError, match="another process"):
            asyncio.run(manage(self.make(root)).open())
        asyncio.run(manager.close())
        again = manage(self.make(root))
        asyncio.run(again.open())
        asyncio.run(again.close())
