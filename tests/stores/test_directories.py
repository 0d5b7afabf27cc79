"""What a power cut leaves of new directories: the names that were synced."""

from __future__ import annotations

import os
from pathlib import Path

from app.autocrud.resource_manager.storage_factory import DiskStorageFactory, MemoryDiskStorageFactory
from app.autocrud.testing.model import Item, manage


async def test_every_new_directory_is_synced_into_the_one_above_it(tmp_path, monkeypatch):
    synced, fsync = set(), os.fsync

    def seen(handle):
        synced.add(Path(f"/proc/self/fd/{handle}").readlink())
        fsync(handle)

    monkeypatch.setattr(os, "fsync", seen)
    for at, factory in enumerate((DiskStorageFactory, MemoryDiskStorageFactory)):
        root = tmp_path / f"{at}" / "deep"
        manager = manage(factory(root))
        await manager.create(Item(text="1"))
        await manager.close()
        new = [path for path in (root, *root.rglob("*")) if path.is_dir()] + [root.parent]
        assert {path.parent for path in new} <= synced
