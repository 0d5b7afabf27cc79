"""Storages and exports for tests: every kind that runs in this process, and archives that are read back."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
from msgspec import Struct

from app.autocrud import AutoCRUD
from app.autocrud.backup.archive_format import ModelEntry
from app.autocrud.backup.archive_reader import verify
from app.autocrud.errors import VersionConflict
from app.autocrud.resource_manager.backends.s3.memory_object_store import MemoryObjectStore
from app.autocrud.resource_manager.basic import IStorage, ResourceMeta, RevisionInfo, StoredKey
from app.autocrud.resource_manager.core import ResourceManager, Retention, SimpleStorage
from app.autocrud.resource_manager.engine.operations import Update
from app.autocrud.resource_manager.meta_store.simple import DiskMetaStore
from app.autocrud.resource_manager.resource_store.s3 import S3ResourceStore
from app.autocrud.resource_manager.storage_factory import (
    DiskStorageFactory,
    IStorageFactory,
    MemoryDiskStorageFactory,
    MemoryStorageFactory,
    S3StorageFactory,
)
from examples.custom_stores import FilesStorageFactory


class Account(Struct):
    amount: int
    note: str = ""


class DiskAndS3(IStorageFactory):
    """Metadata on disk above bodies on S3, so that a snapshot needs a pin for the bodies."""

    def __init__(self, root: Path, objects: MemoryObjectStore) -> None:
        self.root, self.objects = root, objects

    def build(self, model_name: str) -> IStorage:
        bodies = S3ResourceStore("b", f"{model_name}/", object_store=self.objects)
        return SimpleStorage(DiskMetaStore(self.root / model_name), bodies)


class World:
    """One store of a kind, and the bucket if it has one."""

    def __init__(self, kind: str, root: Path) -> None:
        self.kind, self.root, self.objects = kind, root, MemoryObjectStore()
        self.cruds: list[AutoCRUD] = []
        self._factories: dict[str, Callable[[], IStorageFactory]] = {
            "memory": MemoryStorageFactory,
            "disk": lambda: DiskStorageFactory(root),
            "memory-disk": lambda: MemoryDiskStorageFactory(root),
            "s3-sqlite": lambda: S3StorageFactory("b", object_store=self.objects),
            "disk-s3": lambda: DiskAndS3(root, self.objects),
            "custom": lambda: FilesStorageFactory(root),
        }

    def crud(self, retention: Retention | None = None) -> AutoCRUD:
        """Return one more program with the store."""
        crud = AutoCRUD(storage_factory=self._factories[self.kind]())
        crud.add_model(Account, indexed_fields=["amount"], retention=retention)
        self.cruds.append(crud)
        return crud

    async def close(self) -> None:
        for crud in self.cruds:
            await crud.close()


KINDS = ("memory", "disk", "memory-disk", "s3-sqlite", "disk-s3", "custom")
PINNED = ("memory", "disk", "memory-disk", "s3-sqlite", "disk-s3")


class Exported(NamedTuple):
    """The content of an archive for one model."""

    entry: ModelEntry
    resources: dict[str, tuple[ResourceMeta, list[tuple[RevisionInfo, bytes | None]]]]
    keys: list[StoredKey]
    blobs: dict[str, bytes]

    def current(self) -> dict[str, Account]:
        """Return the current data of the resources that are not absent."""
        found = {}
        for rid, (meta, records) in self.resources.items():
            if rid not in self.entry.absent:
                (body,) = [body for record, body in records if record.revision == meta.revision]
                found[rid] = msgspec.json.decode(body, type=Account)
        return found


def read(path: Path, model: str = "account") -> Exported:
    """Verify an archive, and return what it holds of a model."""
    with verify(path) as archive:
        resources: dict[str, tuple[ResourceMeta, list[Any]]] = {}
        for item in archive.resources(model):
            if isinstance(item, ResourceMeta):
                resources[item.resource_id] = item, []
            else:
                resources[item[0].resource_id][1].append(item)
        blobs = {row.key: b"".join(chunks) for row, chunks in archive.blobs(model)}
        return Exported(archive.model(model), resources, list(archive.keys(model)), blobs)


def before_bodies(manager: ResourceManager[Any], action: Callable[[], Any]) -> None:
    """Let `action` run in the next export once, after its metadata were chosen, and before it reads bodies."""
    storage, open_snapshot = manager.storage, manager.storage.snapshot
    done = False

    class Late:
        def __init__(self, snapshot: Any) -> None:
            self._snapshot = snapshot

        def __getattr__(self, name: str) -> Any:
            return getattr(self._snapshot, name)

        async def bodies(self, uids: Any) -> Any:
            nonlocal done
            if not done:
                done = True
                await action()
            return await self._snapshot.bodies(uids)

    def snapshot(**options: Any) -> Any:
        @contextlib.asynccontextmanager
        async def opened() -> AsyncIterator[Any]:
            async with open_snapshot(**options) as found:
                yield Late(found)

        return opened()

    storage.snapshot = snapshot


async def transfers(crud: AutoCRUD, accounts: int, stop: asyncio.Event) -> int:
    """Move amounts between accounts until `stop` is set, so that their sum is always the same. Return how often."""
    manager = crud.resource_manager(Account)
    moved = step = 0
    while not stop.is_set():
        await asyncio.sleep(0)
        step += 1
        first, second = f"a{step % accounts}", f"a{(3 * step + 1) % accounts}"
        if first == second:
            continue
        states = [await manager.get(first), await manager.get(second)]
        amounts = states[0].data.amount - 1, states[1].data.amount + 1
        changes = [
            Update(resource_id=state.meta.resource_id, expect=state.version, data=Account(amount))
            for state, amount in zip(states, amounts, strict=True)
        ]
        with contextlib.suppress(VersionConflict):  # another program was faster
            await manager.batch(changes)
            moved += 1
    return moved
