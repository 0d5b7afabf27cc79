"""Simulate several instances that add, name and remove the rows of blobs on one bucket, with all kinds of failures.

The simulation is that of `test_s3_simulation`; see there for the failures. It has these rules too:

- Each key in a record has a row (F1).
- A key that `remove_blobs` returned has no row, and no record names it, then or later (F1, F2).
- A row that was acknowledged is there, unless `remove_blobs` was called for its key. A row that was refused is not.

`SIMULATIONS=1000 pytest tests/stores/test_s3_blob_simulation.py` runs more seeds.
"""

from __future__ import annotations

import asyncio

import pytest

from app.autocrud.errors import BlobGone, BlobQuotaExceeded, ResourceNotFound, StaleGeneration
from app.autocrud.resource_manager.backends.s3_sqlite import housekeeping
from app.autocrud.resource_manager.contract.blobs import BlobUsage
from app.autocrud.testing.blobs import NamedBlobs, upload
from tests import virtual_time

from .s3_sqlite_helpers import meta_store
from .test_s3_simulation import INSTANCES, RESOURCES, SEEDS, Note, World

QUOTA = 60


class BlobWorld(World):
    def __init__(self, seed, root) -> None:
        super().__init__(seed, root)
        self.keys: list[str] = []  # of all uploads
        self.present: set[str] = set()  # rows that were acknowledged
        self.refused_rows: set[str] = set()
        self.asked: set[str] = set()  # keys whose removal was requested
        self.removed: set[str] = set()  # keys that a removal returned

    def manager(self):
        manager = super().manager()
        manager.names = NamedBlobs(manager.storage)
        return manager

    async def step(self, manager, token: str) -> None:
        kind = self.random.choice(["add", "add", "name", "name", "name", "remove", "purge", "plain"])
        store = meta_store(manager)
        match kind:
            case "add":
                row = upload(epoch=max(0, await store.blob_epoch() - (self.random.random() < 0.1)))
                self.keys.append(row.key)
                try:
                    await store.add_blob(row, quota=self.random.choice([None, QUOTA]))
                except (StaleGeneration, BlobQuotaExceeded):
                    self.refused_rows.add(row.key)
                    raise
                self.present.add(row.key)
            case "name" if self.keys:
                await self.name(manager, token)
            case "remove" if self.keys:
                keys = self.random.sample(self.keys[-8:], min(2, len(self.keys)))
                keys += [upload(epoch=await store.blob_epoch()).key] * (self.random.random() < 0.1)
                self.asked |= set(keys)
                self.removed |= set(await store.remove_blobs(keys))
            case "purge" if self.random.random() < 0.3:
                await manager.purge(self.random.choice(RESOURCES))
            case "plain":
                await manager.count()

    async def name(self, manager, token: str) -> None:
        rid, likely = self.random.choice(RESOURCES), sorted(self.present - self.removed)
        keys = tuple(self.random.sample(likely, min(2, len(likely)))) if likely else (self.random.choice(self.keys),)
        if self.random.random() < 0.1:
            keys += (self.random.choice(self.keys),)
        names = manager.names.by_resource
        while rid in names:  # another writer of this instance is under way
            rid += "'"
        names[rid] = keys
        present, gone_before = set(keys) <= self.present, self.removed & set(keys)
        try:
            try:
                await manager.update(rid, Note(token))
            except ResourceNotFound:
                await manager.create(Note(token), resource_id=rid)
        except BlobGone:
            assert not present or self.asked & set(keys), "a blob is gone without a removal"
            raise
        finally:
            del names[rid]
        assert not gone_before, "a record names a blob that was removed"

    async def check(self) -> None:
        self.objects.fault = lambda _: None
        await asyncio.sleep(100)
        reader = self.manager()
        await reader.open()
        store = meta_store(reader)
        rows = {row.key: row for row in await store.blobs([upload().sha256])}
        assert await store.blob_usage() == BlobUsage(len(rows), sum(row.size for row in rows.values()))
        in_use: dict[str, set[str]] = {}
        async for meta in reader.storage.scan():
            for info in (await reader.storage.revisions(meta.resource_id, limit=200)).items:
                for key in info.blobs:
                    in_use.setdefault(key, set()).add(meta.resource_id)
        assert in_use.keys() <= rows.keys(), "a record names a blob without a row"
        for key in self.keys:
            assert {use.resource_id for use in await store.blob_uses(key)} == in_use.get(key, set())
        assert not self.removed & rows.keys(), "a removed row is back"
        assert self.present - self.asked <= rows.keys(), "a row is lost"
        assert not self.refused_rows & rows.keys(), "a refused row is stored"
        unused = [key for key in self.keys if key not in in_use]
        assert await store.remove_blobs(unused) == unused
        await reader.maintain(60)
        assert await meta_store(self.manager()).blob_usage() == BlobUsage(
            len(in_use), sum(rows[k].size for k in in_use)
        )


@pytest.mark.parametrize("seed", SEEDS)
def test_every_history_keeps_rows_and_uses(seed, tmp_path, monkeypatch):
    monkeypatch.setattr(housekeeping, "LEAST_LOG", 20_000)
    monkeypatch.setattr(housekeeping, "ABANDONED", 8_000)
    monkeypatch.setattr(housekeeping, "FANOUT", 3)

    async def main() -> None:
        world = BlobWorld(seed, tmp_path)
        await asyncio.gather(*(world.instance(number) for number in range(INSTANCES)))
        await world.check()
        assert world.present

    virtual_time.run(main())
