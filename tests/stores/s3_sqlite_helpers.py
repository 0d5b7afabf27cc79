"""Helpers of the tests of S3-SQLite: a model, and instances that share a store in memory."""

from __future__ import annotations

from pathlib import Path

from msgspec import Struct

from app.autocrud import AutoCRUD
from app.autocrud.resource_manager.backends.s3.memory_object_store import (
    InjectedFault,
    MemoryObjectStore,
)
from app.autocrud.resource_manager.backends.s3_sqlite.head import decode_head
from app.autocrud.resource_manager.basic import IndexedField
from app.autocrud.resource_manager.core import ResourceManager
from app.autocrud.resource_manager.meta_store.sqlite3 import S3SqliteMetaStore
from app.autocrud.resource_manager.storage_factory import S3StorageFactory

KEY = "meta/note.sqlite"
HEAD = f"{KEY}/HEAD"


class Note(Struct):
    text: str
    code: str | None = None


FIELDS = ("text", IndexedField("code", unique=True))


def instance(objects: MemoryObjectStore, local_dir: Path | None = None, fields=FIELDS) -> ResourceManager[Note]:
    """Return the resource manager of one instance."""
    factory = S3StorageFactory("double", object_store=objects, local_dir=local_dir, sync_interval=None)
    crud = AutoCRUD(storage_factory=factory)
    return crud.add_model(Note, indexed_fields=list(fields))


def meta_store(manager: ResourceManager) -> S3SqliteMetaStore:
    return manager.storage.meta_store


def head_of(objects: MemoryObjectStore):
    return decode_head(objects.objects[HEAD].body)


def once(fault: InjectedFault, op: str = "put_if", key: str = HEAD):
    """Return a function that gives this fault to the next such request only."""
    left = [fault]
    return lambda call: left.pop() if left and call.op == op and call.key.startswith(key) else None
