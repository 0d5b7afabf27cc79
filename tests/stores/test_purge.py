"""What is purged leaves no trace on the disk."""

from __future__ import annotations

import pytest
from msgspec import Struct

from app.autocrud import AutoCRUD
from app.autocrud.resource_manager.core import Caller, IdempotencyKey, Purge
from app.autocrud.resource_manager.storage_factory import DiskStorageFactory, MemoryDiskStorageFactory


class Note(Struct):
    text: str


@pytest.mark.parametrize("killed", [False, True])
@pytest.mark.parametrize("kind", [DiskStorageFactory, MemoryDiskStorageFactory])
async def test_purge_leaves_no_trace(tmp_path, kind, killed):
    """`killed`: after the commit; then housekeeping does the rest."""
    crud = AutoCRUD(storage_factory=kind(tmp_path))
    manager = crud.add_model(Note, indexed_fields=["text"])
    for number in range(20):
        await manager.create(Note(f"kept {number}"))
    by = Caller("alice", key=IdempotencyKey("k"))
    created = await manager.create(Note("secret text"), resource_id="secret id", by=by)
    await manager.update(created.meta.resource_id, Note("secret text again"))
    if killed:
        await manager._write([Purge(resource_id="secret id")], "bob")
        await manager.maintain(10)
    else:
        await manager.purge("secret id")
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert files
    for path in files:
        assert b"secret" not in path.read_bytes(), path
    assert await manager.count() == 20
    await manager.storage.close()
