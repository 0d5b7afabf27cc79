"""Stores of every kind for tests of imports, filled through the API, and compared with each other."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from app.autocrud import AutoCRUD, Encoding, Query, field
from app.autocrud.resource_manager.backends.s3.memory_object_store import MemoryObjectStore
from app.autocrud.resource_manager.basic import IStorage
from app.autocrud.resource_manager.core import Caller, IdempotencyKey, ResourceManager
from app.autocrud.resource_manager.storage.snapshots import open_any_snapshot
from app.autocrud.resource_manager.storage_factory import (
    DiskStorageFactory,
    IStorageFactory,
    MemoryDiskStorageFactory,
    MemoryStorageFactory,
    PairStorageFactory,
    S3StorageFactory,
)
from examples.custom_stores import FilesStorageFactory
from tests.stores.old_stores import INDEXED, Note


class Place:
    """The location of the data of stores, empty at first."""

    def __init__(
        self, directory: Path, postgres: str = "", redis_url: str = "", s3: dict[str, Any] | None = None
    ) -> None:
        self.directory, self.postgres, self.redis_url = directory, postgres, redis_url
        self.name = f"i{uuid.uuid4().hex[:12]}"
        self.s3: dict[str, Any] = s3 or {"bucket": "b", "object_store": MemoryObjectStore()}

    @property
    def pair(self) -> dict[str, Any]:
        """The arguments of any pair of stores."""
        return {
            "prefix": f"{self.name}/",
            "data_dir": self.directory,
            "pg_dsn": self.postgres,
            "redis_url": self.redis_url,
            **self.s3,
        }


KINDS: dict[str, Callable[[Place], IStorageFactory]] = {
    "memory": lambda _: MemoryStorageFactory(),
    "disk": lambda place: DiskStorageFactory(place.directory),
    "memory-disk": lambda place: MemoryDiskStorageFactory(place.directory),
    "s3-sqlite": lambda place: S3StorageFactory(prefix=f"{place.name}/", **place.s3),
    "memory-s3": lambda place: PairStorageFactory("memory", "s3", **place.pair),
    "disk-s3": lambda place: PairStorageFactory("disk", "s3", **place.pair),
    "cached-s3": lambda place: PairStorageFactory("s3-sqlite", "cached-s3", cache_dir=place.directory, **place.pair),
    "postgres-s3": lambda place: PairStorageFactory("postgres", "s3", **place.pair),
    "postgres-disk": lambda place: PairStorageFactory("postgres", "disk", **place.pair),
    "redis-disk": lambda place: PairStorageFactory("redis", "disk", **place.pair),
    "redis-postgres": lambda place: PairStorageFactory("redis-postgres", "s3", **place.pair),
    "custom": lambda place: FilesStorageFactory(place.directory),
}
LOCAL = ("memory", "disk", "memory-disk", "s3-sqlite", "memory-s3", "disk-s3", "cached-s3", "custom")
ON_SERVERS = ("postgres-s3", "postgres-disk", "redis-disk", "redis-postgres")


def program(kind: str, place: Place, **options: Any) -> AutoCRUD:
    """Return a program with one model, whose stores are of this kind."""
    crud = AutoCRUD(storage_factory=KINDS[kind](place), encoding=options.pop("encoding", Encoding.json))
    crud.add_model(Note, **{"indexed_fields": INDEXED, **options})
    return crud


async def fill(manager: ResourceManager[Note], count: int = 12) -> None:
    """Leave resources with revisions, gaps, drafts, deletions and Idempotency-Keys."""
    for number in range(count):
        note = Note(text=f"text {number % 3} é\u2028", code=f"c{number}", number=number, tags=["a", f"t{number}"])
        await manager.create(note, resource_id=f"n{number:05d}", by=f"caller {number % 2}")
    for number in range(5):
        await manager.update("n00001", Note(text="changed", code="c1", number=100 + number), by="editor")
    await manager.create(Note(text="draft"), resource_id="draft", status="draft")
    await manager.modify("draft", Note(text="draft 2", code="d"))
    await manager.create(Note(text="published"), resource_id="ünïcode/../id", status="draft")
    await manager.publish("ünïcode/../id")
    await manager.delete("n00002")
    await manager.delete("n00003")
    await manager.restore("n00003")
    await manager.switch("n00001", 2)
    await manager.update("n00001", Note(text="branched", code="c1"), by="editor")
    await manager.purge("n00004")
    await manager.update("draft", Note(text="keyed", code="d"), by=Caller("alice", IdempotencyKey("key")))
    await manager.create(Note(text="keyed", code="k"), resource_id="keyed", by=Caller("bob", IdempotencyKey("k", "r")))
    await manager.delete("keyed", by=Caller("bob", IdempotencyKey("k2")))


async def content(storage: IStorage, *, states: bool = True, keys: bool = True) -> dict[str, Any]:
    """Return everything that is equal after an export and import (point 6), without internal ids.

    states  whether versions and nonces are included

    Times of keys are left out: S3-SQLite gives keys that are committed the time of the commit.
    """
    found: dict[str, Any] = {"resources": {}, "keys": {}}
    async for meta in storage.scan():
        records, before, more = [], None, True
        while more:
            page = await storage.revisions(meta.resource_id, before, 100)
            for record in page.items:
                (body,) = await storage.bodies([record.uid])
                assert meta.uid != record.uid or meta.revision == record.revision
                records.append((without_uid(record), body))
            before, more = page.next, page.next is not None
        shown = without_uid(meta)
        if not states:
            del shown["version"], shown["nonce"]
        found["resources"][meta.resource_id] = shown, records
    if keys:
        async with open_any_snapshot(storage) as snapshot:
            async for key in snapshot.keys():
                results = [None if meta is None else without_uid(meta) for meta in key.results]
                found["keys"][key.key] = key.request, results
    return found


def without_uid(value: Any) -> dict[str, Any]:
    fields = msgspec.to_builtins(value)
    fields.pop("uid")
    return fields


async def searches(manager: ResourceManager[Note]) -> dict[str, list[str]]:
    """Return the ids that some searches find."""
    wheres = {
        "all": None,
        "text": field("text").eq("changed"),
        "code": field("code").eq("c1"),
        "number": field("number").gte(3),
        "tags": field("tags").contains("t5"),
        "by": field("meta.created_by").eq("caller 1"),
    }
    found = {}
    for name, where in wheres.items():
        for deleted in (False, True):
            page = await manager.find(Query(where=where, include_deleted=deleted, limit=200))
            found[f"{name} {deleted}"] = sorted(hit.meta.resource_id for hit in page.items)
    return found
