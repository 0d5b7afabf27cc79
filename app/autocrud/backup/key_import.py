"""The import of the results of Idempotency-Keys."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections.abc import AsyncIterator

from msgspec.structs import replace

from ..resource_manager.basic import AlreadyCommitted, IdempotentCommit, IStorage, ResourceMeta, StoredKey
from .archive_reader import VerifiedArchive
from .import_owner import ImportOwner
from .pieces import BATCH


async def import_keys(storage: IStorage, archive: VerifiedArchive, model: str, owner: ImportOwner) -> int:
    """Store the keys of a model that it does not have, and return how many the archive has."""

    async def add(key: StoredKey) -> None:
        once = IdempotentCommit(key=key.key, request=key.request, time=key.time, results=key.results)
        with contextlib.suppress(AlreadyCommitted):
            await storage.commit([], once)

    count = 0
    async for keys in key_pages(archive, model):
        await owner.check()
        await asyncio.gather(*map(add, keys))
        count += len(keys)
    return count


async def key_pages(archive: VerifiedArchive, model: str) -> AsyncIterator[list[StoredKey]]:
    """Yield the keys of a model in pages, with the new uids of bodies."""
    notes, keys = archive.notes, archive.keys(model)

    def moved(meta: ResourceMeta | None) -> ResourceMeta | None:
        new = None if meta is None else notes.new_uid(model, meta.uid)
        return meta if meta is None or new is None else replace(meta, uid=new)

    def page() -> list[StoredKey]:
        return [replace(key, results=tuple(map(moved, key.results))) for key in itertools.islice(keys, BATCH)]

    while found := await asyncio.to_thread(page):
        yield found
