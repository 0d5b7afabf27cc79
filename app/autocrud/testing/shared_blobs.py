"""Several instances and processes use the rows of blobs of one storage at once."""

from __future__ import annotations

import asyncio
import multiprocessing
from multiprocessing.queues import Queue
from multiprocessing.synchronize import Barrier
from pathlib import Path

import pytest

from ..errors import BlobGone, StaleGeneration
from ..resource_manager.contract.blobs import BlobUsage, BlobUse
from .base import ROUNDS, Conformance
from .blobs import NamedBlobs, blob_rows_of, upload
from .model import Item, manage


class SharedBlobConformance(Conformance):
    """Several instances and processes use the rows of blobs of one storage at once."""

    async def test_instances_share_rows_uses_and_epoch(self, root: Path) -> None:
        here, there = manage(self.make(root)), manage(self.make(root))
        rows_here, rows_there = blob_rows_of(here), blob_rows_of(there)
        for manager in (here, there):
            await manager.open()
        names_here, names_there = NamedBlobs(here.storage), NamedBlobs(there.storage)
        await here.create(Item(text="before any blob"), resource_id="a")
        used, unused = upload(), upload()
        for row in (used, unused):
            await rows_here.add_blob(row)
        names_there.by_resource["a"] = (used.key,)
        await there.update("a", Item(text="with a blob"))
        assert await rows_here.blob_uses(used.key) == [BlobUse("a", 2)]
        assert await rows_here.remove_blobs([used.key, unused.key]) == [unused.key]
        names_there.by_resource["a"] = (unused.key,)
        with pytest.raises(BlobGone):
            await there.update("a", Item(text="with a blob that is gone"))
        assert await rows_there.remove_blobs([unused.key]) == [unused.key]
        with pytest.raises(StaleGeneration):
            await rows_here.add_blob(upload())
        again = upload(epoch=await rows_here.blob_epoch())
        await rows_here.add_blob(again)
        assert await rows_there.blob_usage() == BlobUsage(2, used.size + again.size)
        names_here.by_resource["a"] = ()
        await here.purge("a")
        assert await rows_there.remove_blobs([used.key]) == [used.key]
        for manager in (here, there):
            await manager.close()

    def test_a_blob_is_removed_or_named_in_several_processes(self, root: Path) -> None:
        """Two processes name a blob while two others remove its row, in many rounds."""
        keys = asyncio.run(self._prepare_blobs(root))
        context = multiprocessing.get_context("spawn")
        barrier, outcomes = context.Barrier(4), context.Queue()
        started = [
            context.Process(target=_race_in_process, args=(type(self), root, at, keys, barrier, outcomes))
            for at in range(4)
        ]
        for process in started:
            process.start()
        results = dict(outcomes.get(timeout=120) for _ in started)
        for process in started:
            process.join()

        async def check() -> None:
            manager = manage(self.make(root))
            await manager.open()
            rows = blob_rows_of(manager)
            stored = {row.key for row in await rows.blobs([upload().sha256])}
            for round_, key in enumerate(keys):
                named = [f"{round_}-{at}" for at in (0, 2) if results[at][round_]]
                removed = any(results[at][round_] for at in (1, 3))
                assert (key in stored) is not removed
                assert len(named) == (0 if removed else 2)
                assert [use.resource_id for use in await rows.blob_uses(key)] == named
            await manager.close()

        asyncio.run(check())

    async def _prepare_blobs(self, root: Path) -> list[str]:
        manager = manage(self.make(root))
        rows = blob_rows_of(manager)
        await manager.open()
        stored = [upload() for _ in range(ROUNDS)]
        for row in stored:
            await rows.add_blob(row)
        await manager.close()
        return [row.key for row in stored]


def _race_in_process(
    conformance: type[SharedBlobConformance],
    root: Path,
    at: int,
    keys: list[str],
    barrier: Barrier,
    outcomes: Queue[tuple[int, list[bool]]],
) -> None:
    asyncio.run(_race_rounds(conformance, root, at, keys, barrier, outcomes))


async def _race_rounds(
    conformance: type[SharedBlobConformance],
    root: Path,
    at: int,
    keys: list[str],
    barrier: Barrier,
    outcomes: Queue[tuple[int, list[bool]]],
) -> None:
    manager = manage(conformance().make(root))
    await manager.open()
    rows, names = blob_rows_of(manager), NamedBlobs(manager.storage)
    results = []
    for round_, key in enumerate(keys):
        rid = f"{round_}-{at}"
        names.by_resource = {rid: (key,)}
        barrier.wait(60)
        if at % 2:
            results.append(await rows.remove_blobs([key]) == [key])
        else:
            try:
                await manager.create(Item(), resource_id=rid)
                results.append(True)
            except BlobGone:
                results.append(False)
    await manager.close()
    outcomes.put((at, results))
