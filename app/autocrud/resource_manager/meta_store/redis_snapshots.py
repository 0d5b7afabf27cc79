"""The part of RedisMetaStore for exports: pins, and snapshots in which each resource is as at some moment.

A snapshot does not use the search replica, which takes memory for all resources. It first reads all ids, in the order
of Redis, into a temporary file that sorts them. Then it reads the resources by ascending id, some in one step each.
Invariants, in addition to those of `each_resource`:

- Each resource that existed when the snapshot began, and was not purged, is found: SSCAN returns each element that
  stays in the set from the first page to the last.
- One step reads the document, the records and the rows of the blobs of a resource, so they are of one moment. A
  resource with very many revisions would block the server, so it is read in pages (E1).
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from typing_extensions import override

from ...errors import ResourceNotFound
from ..backends.redis import blob_scripts, read_scripts
from ..backends.redis.script_arguments import decode_record, digest, done_of, row_of, time_of
from ..backends.sqlite.spool import Spool
from ..basic import ResourceMeta, RevisionInfo, StoredKey
from ..contract import snapshots
from ..contract.metadata_codec import meta_of
from ..contract.snapshots import MetaSnapshot, Pinning, SnapshotReading
from .each_resource import EachResource
from .redis_access import RedisAccess

PAGE = 500
"""How many ids and keys are read at a time."""
AT_ONCE = 100
"""How many resources are read at a time, if they are small."""
RESULTS_AT_ONCE = 20
"""For how many keys the results are read at a time. A batch may have many."""
MOST_PARTS = 2000
"""How many parts of resources one step reads, about two for each revision. That takes a few milliseconds of the server.
A resource with more than twice as many is read in pages."""


class RedisSnapshot(EachResource):
    """The resources of a RedisMetaStore, each one as at some moment."""

    def __init__(self, access: RedisAccess, spool: Spool) -> None:
        super().__init__(access, spool)
        self._access = access

    @override
    async def count(self) -> int:
        return int(await self._access._call("SCARD", f"{self._access._prefix}ids"))

    @override
    async def items(self) -> AsyncIterator[ResourceMeta | RevisionInfo]:
        cursor, after = b"", ""
        while cursor != b"0":
            cursor, documents = await self._access._run(read_scripts.IDS_PAGE, cursor or b"0", PAGE)
            await self._spool.add_names("id", [meta_of(document).resource_id for document in documents])
        while ids := await self._spool.names("id", after, AT_ONCE):
            found = await self._access._run(read_scripts.RESOURCES, MOST_PARTS, len(ids), *map(digest, ids))
            for resource_id, parts in zip(ids, found, strict=False):
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
        try:
            meta = await self._store.get(resource_id)
        except ResourceNotFound:
            return
        async for item in self.items_of(meta):
            yield item

    @override
    async def keys(self) -> AsyncIterator[StoredKey]:
        cursor, after = b"", ""
        while cursor != b"0":
            cursor, flat = await self._access._run(read_scripts.KEYS_PAGE, cursor or b"0", PAGE)
            await self._spool.add_names("key", [key.decode() for key in flat[::2]])
        while keys := await self._spool.names("key", after, RESULTS_AT_ONCE):
            for key, told in zip(keys, await self._access._run(read_scripts.RESULTS_OF, len(keys), *keys), strict=True):
                if told is not None:
                    done = done_of(told)
                    yield StoredKey(key=key, request=done.request, time=time_of(told), results=tuple(done.results))
            after = keys[-1]


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
