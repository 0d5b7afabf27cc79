"""Helpers of the tests of forks: instances that share a store in memory, and a fork of its history."""

from __future__ import annotations

from pathlib import Path

import msgspec
from msgspec import Struct

from app.autocrud import AutoCRUD
from app.autocrud.resource_manager.backends.s3.memory_object_store import MemoryObjectStore
from app.autocrud.resource_manager.backends.s3_sqlite.head import MAX_PAST, decode_head
from app.autocrud.resource_manager.core import ResourceManager
from app.autocrud.resource_manager.storage_factory import S3StorageFactory

KEY = "meta/note.sqlite"
HEAD = f"{KEY}/HEAD"


class Note(Struct):
    text: str


def api(objects: MemoryObjectStore, local_dir: Path | None = None) -> AutoCRUD:
    factory = S3StorageFactory("double", object_store=objects, local_dir=local_dir, sync_interval=None)
    crud = AutoCRUD(storage_factory=factory)
    crud.add_model(Note, indexed_fields=["text"])
    return crud


def instance(objects: MemoryObjectStore, local_dir: Path | None = None) -> ResourceManager[Note]:
    return api(objects, local_dir).managers["note"]


def head_of(objects: MemoryObjectStore):
    return decode_head(objects.objects[HEAD].body)


class OldProgram(MemoryObjectStore):
    """The objects as an older program writes them, which does not know `past` of HEAD.

    It keeps the value of the HEAD that it replaces, and writes none into a new store.
    """

    def __init__(self, objects: MemoryObjectStore) -> None:
        super().__init__()
        self.objects = objects.objects

    def _store(self, key: str, body: bytes) -> str:
        if key == HEAD:
            raw = msgspec.msgpack.decode(body)
            del raw["past"]
            replaced = msgspec.msgpack.decode(self.objects[HEAD].body) if HEAD in self.objects else {}
            body = msgspec.msgpack.encode(raw | {name: replaced[name] for name in ("past",) if name in replaced})
        return super()._store(key, body)


async def forked(objects: MemoryObjectStore, loser: ResourceManager[Note], winner: ResourceManager[Note]) -> None:
    """Let `winner` overwrite an acknowledged create of `loser`, as if the storage compared first and wrote later."""
    await loser.create(Note("both"), resource_id="both")
    await winner.count()
    before = objects.objects[HEAD]
    await loser.create(Note("lost"), resource_id="lost")
    objects.objects[HEAD] = before
    await winner.create(Note("kept"), resource_id="kept")


async def later(manager: ResourceManager[Note], swaps: str) -> None:
    """Swap HEAD, `count` times. With `edits`, without records. With `log`, then replace the log by a snapshot."""
    count, _, how = swaps.partition(" ")
    for number in range(int(count)):
        if how == "edits":
            await manager.storage.meta_store.advance_generation()
        else:
            await manager.create(Note(f"later {number}"))
    if how == "log":
        await manager.storage.meta_store._loop_state().housekeeping.snapshot(forget=True)
        await manager.storage.meta_store._loop_state().housekeeping.collect()


SWAPS = ["0", "1", f"{MAX_PAST - 1}", f"{MAX_PAST}", f"{MAX_PAST + 1}", "200", "50 edits", "50 log"]
"""Swaps after the fork, for `later`."""
