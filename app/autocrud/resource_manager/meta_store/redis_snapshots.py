"""The part of RedisMetaStore for exports: pins, and snapshots in which each resource is as at some moment.

A snapshot does not use the search replica, which takes memory for all resources. It first reads all ids, in the order
of Redis, into a temporary file that sorts them. Then it reads the resources by ascending id. Invariants:

- E1 *Each resource that existed when the snapshot began, and was not purged, comes once.* SSCAN returns each element
  that stays in the set from the first page to the last, and the file keeps each id once.
- E2 *Metadata, records and rows of blobs of a resource are of one moment.* One step reads them. A resource with very
  many revisions would block the server, so its records are read in pages, between two reads of the metadata that return
  the same version and nonce. Each change makes a new version with a new nonce, so nothing was changed in between.
- E3 *The rows stay known.* They are kept in the temporary file, because the records may change before the rows are
  asked for, and a sweep then removes the rows. The content stays because of the pin.
- E4 *Memory does not depend on the number of resources or revisions.* What is sorted, and the records of a resource
  that has very many, are in the temporary file.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

from typing_extensions import override

from ...errors import ResourceNotFound, StoreDamaged, WriteContention
from ..backends.redis import blob_scripts, read_scripts
from ..backends.redis.script_arguments import decode_record, digest, done_of, row_of, time_of
from ..backends.sqlite.spool import Spool
from ..basic import BlobRow, ResourceMeta, RevisionInfo, StoredKey
from ..contract import snapshots
from ..contract.metadata_codec import meta_of
from ..contract.snapshots import MetaSnapshot, Pinning, SnapshotReading
from .redis_access import RedisAccess

PAGE = 500
"""How many ids, keys and records of a large resource are read at a time."""
AT_ONCE = 100
"""How many resources are read at a time, if they are small."""
RESULTS_AT_ONCE = 20
"""For how many keys the results are read at a time. A batch may have many."""
MOST_PARTS = 2000
"""How many parts of resources one step reads, about two for each revision. That takes a few milliseconds of the server.
A resource with more than twice as many is read in pages."""
ATTEMPTS = 16
"""How often a large resource is read that changes each time."""


class RedisSnapshot(MetaSnapshot):
    """The resources of a RedisMetaStore, each one as at some moment."""

    one_moment = False

    def __init__(self, store: RedisAccess, spool: Spool) -> None:
        self._store, self._spool = store, spool

    @override
    async def count(self) -> int:
        return int(await self._store._call("SCARD", f"{self._store._prefix}ids"))

    @override
    async def items(self, after: str = "") -> AsyncIterator[ResourceMeta | RevisionInfo]:
        cursor = b""
        while cursor != b"0":
            cursor, documents = await self._store._run(read_scripts.IDS_PAGE, cursor or b"0", PAGE)
            await self._spool.add_names("id", [meta_of(document).resource_id for document in documents])
        while ids := await self._spool.names("id", after, AT_ONCE):
            found = await self._store._run(read_scripts.RESOURCES, MOST_PARTS, len(ids), *map(digest, ids))
            for resource_id, parts in zip(ids, found, strict=False):  # those that one step did not reach come next
                after = resource_id
                if parts == 0:
                    async for item in self._large(resource_id):
                        yield item
                    continue
                document, rows, *records = parts
                if document:
                    await self._spool.add_blob_rows([row_of(row) for row in rows])
                    yield meta_of(document, resource_id)
                    for record in records:
                        yield decode_record(record)

    async def _large(self, resource_id: str) -> AsyncIterator[ResourceMeta | RevisionInfo]:
        """Yield a resource with very many revisions."""
        try:
            meta = await self._store.get(resource_id)
            for _ in range(ATTEMPTS):
                await self._spool_records(resource_id)
                after = await self._store.get(resource_id)
                if (after.version, after.nonce) == (meta.version, meta.nonce):
                    break
                meta = after
            else:
                raise WriteContention(
                    f"resource {resource_id!r} changed each time when its revisions were read; try again when it is"
                    " written to less"
                )
        except ResourceNotFound:
            return
        yield meta
        number = 0
        while page := await self._spool.records(number, PAGE):
            for record in page:
                yield record
            number = page[-1].revision

    async def _spool_records(self, resource_id: str) -> None:
        await self._spool.forget_records()
        before = None
        while True:
            page = await self._store.revisions(resource_id, before, PAGE)
            await self._spool.add_records(page.items)
            keys = list({key for record in page.items for key in record.blobs})
            await self._spool.add_blob_rows(await self._stored_rows(keys))
            before = page.next
            if before is None:
                return

    @override
    async def keys(self) -> AsyncIterator[StoredKey]:
        cursor, after = b"", ""
        while cursor != b"0":
            cursor, flat = await self._store._run(read_scripts.KEYS_PAGE, cursor or b"0", PAGE)
            await self._spool.add_names("key", [key.decode() for key in flat[::2]])
        while keys := await self._spool.names("key", after, RESULTS_AT_ONCE):
            results = await self._store._run(read_scripts.RESULTS_OF, len(keys), *keys)
            for key, told in zip(keys, results, strict=True):
                if told is not None:
                    done = done_of(told)
                    yield StoredKey(key=key, request=done.request, time=time_of(told), results=tuple(done.results))
            after = keys[-1]

    @override
    async def blob_rows(self, keys: Sequence[str]) -> list[BlobRow]:
        found = await self._spool.blob_rows(keys)
        found |= {row.key: row for row in await self._stored_rows([key for key in keys if key not in found])}
        if lost := [key for key in keys if key not in found]:
            raise StoreDamaged(f"the row of the blob {lost[0]} is missing from Redis, although a revision names it")
        return [found[key] for key in keys]

    async def _stored_rows(self, keys: Sequence[str]) -> list[BlobRow]:
        """Return the rows that Redis has of these keys."""
        rows = await self._store._run(blob_scripts.ROWS_OF_KEYS, len(keys), *keys) if keys else []
        return [row_of(row) for row in rows if row is not None]


class RedisSnapshots(RedisAccess, Pinning, SnapshotReading):
    """A MetaStore in Redis with pins and snapshots."""

    @override
    async def add_pin(self, pin: str) -> None:
        await self._pin("add", pin)

    @override
    async def renew_pin(self, pin: str) -> bool:
        return await self._pin("renew", pin)

    @override
    async def remove_pin(self, pin: str) -> bool:
        return await self._pin("remove", pin)

    @override
    async def has_pins(self) -> bool:
        return await self._pin("has", "")

    async def _pin(self, work: str, pin: str) -> bool:
        return bool(await self._run(blob_scripts.PIN, work, snapshots.PIN_LIFE_S, pin))

    @override
    @asynccontextmanager
    async def snapshot(self) -> AsyncIterator[MetaSnapshot]:
        await self._look()
        spool = Spool()
        try:
            yield RedisSnapshot(self, spool)
        finally:
            await spool.close()
