"""Snapshots in which each resource is as at some moment, for stores that have no common moment of all.

    async with each_resource(store) as snapshot:
        async for item in snapshot.items(): ...

Works with every MetaStore, also with a custom one: `scan`, `get` and `revisions` are enough. Invariants:

- E1 *Metadata and records of a resource are of one moment.* The records are read between two reads of the metadata that
  return the same version and nonce. A version with its nonce is used once, and each change of the records makes a new
  one, so nothing was changed in between.
- E2 *Resources come by ascending id, each at most once.* A resource that is purged before it was read is left out. One
  that is created meanwhile may be left out.
- E3 *The rows of the blobs of a resource are of its moment.* They are read in the same interval and kept in a temporary
  file, because their records may change before the rows are asked for, and a sweep then removes the rows. The content
  stays because of the pin.
- E4 *Memory does not depend on the number of resources or revisions.* Many records of one resource are kept in a
  temporary file until the second read of the metadata.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

from typing_extensions import override

from ...errors import ResourceNotFound, StoreDamaged, StoreUnavailable
from ...query import Query
from ..backends.sqlite.spool import Spool
from ..basic import BlobRow, MetaStore, ResourceMeta, RevisionInfo, StoredKey
from ..contract.blobs import BlobRows
from ..contract.snapshots import KeyListing, MetaSnapshot

PAGE = 500
"""How many records are read at a time. So many are kept in memory."""
ATTEMPTS = 16
"""How often a resource is read again because it was changed meanwhile."""


class EachResource(MetaSnapshot):
    """The resources of a MetaStore, each one as at some moment. `each_resource` returns it."""

    one_moment = False

    def __init__(self, store: MetaStore, spool: Spool) -> None:
        self._store, self._spool = store, spool
        self._rows = store if isinstance(store, BlobRows) else None

    @override
    async def count(self) -> int:
        return await self._store.count(Query(include_deleted=True).resolve({}))

    @override
    async def items(self) -> AsyncIterator[ResourceMeta | RevisionInfo]:
        async for meta in self._store.scan():
            async for item in self.items_of(meta):
                yield item

    @override
    async def keys(self) -> AsyncIterator[StoredKey]:
        """Yield the results that are kept for Idempotency-Keys; none if the store cannot list them (KeyListing)."""
        if isinstance(self._store, KeyListing):
            after = ""
            while page := await self._store.stored_keys(after):
                for key in page:
                    yield key
                after = page[-1].key

    @override
    async def blob_rows(self, keys: Sequence[str]) -> list[BlobRow]:
        found = await self._spool.blob_rows(keys)
        if len(found) < len(set(keys)):
            found |= await self.stored_rows([key for key in keys if key not in found])
        if lost := [key for key in keys if key not in found]:
            raise StoreDamaged(f"the row of the blob {lost[0]} is missing, although a revision names it")
        return [found[key] for key in keys]

    async def stored_rows(self, keys: Sequence[str]) -> dict[str, BlobRow]:
        """Return the rows that the store has of these keys."""
        wanted = set(keys)
        if self._rows is None or not wanted:
            return {}
        rows = await self._rows.blobs([key.partition("/")[0] for key in wanted])
        return {row.key: row for row in rows if row.key in wanted}

    async def items_of(self, meta: ResourceMeta) -> AsyncIterator[ResourceMeta | RevisionInfo]:
        """Yield the metadata and the records of one resource, as they are now (E1). Yields nothing if it is purged.

        meta  its metadata as they were a moment ago
        """
        resource_id = meta.resource_id
        for _ in range(ATTEMPTS):
            records, spooled = await self._read(resource_id)
            try:
                after = await self._store.get(resource_id)
            except ResourceNotFound:
                return
            if (after.version, after.nonce) == (meta.version, meta.nonce):
                break
            meta = after
        else:
            raise StoreUnavailable(
                f"resource {resource_id!r} is changed faster than its revisions can be read; try again later"
            )
        yield meta
        for record in records:
            yield record
        number = 0
        while spooled and (page := await self._spool.records(number, PAGE)):
            for record in page:
                yield record
            number = page[-1].revision

    async def _read(self, resource_id: str) -> tuple[list[RevisionInfo], bool]:
        """Read the records of a resource. Return them by ascending number, or none and True if they are spooled."""
        page = await self._store.revisions(resource_id, None, PAGE)
        await self._keep_rows(page.items)
        if page.next is None:
            return page.items[::-1], False
        await self._spool.forget_records()
        await self._spool.add_records(page.items)
        while page.next is not None:
            page = await self._store.revisions(resource_id, page.next, PAGE)
            await self._keep_rows(page.items)
            await self._spool.add_records(page.items)
        return [], True

    async def _keep_rows(self, records: Sequence[RevisionInfo]) -> None:
        """Keep the rows of the blobs that these records name (E3)."""
        if keys := list(dict.fromkeys(key for record in records for key in record.blobs)):
            known = await self._spool.blob_rows(keys)
            rows = await self.stored_rows([key for key in keys if key not in known])
            await self._spool.add_blob_rows(list(rows.values()))


@asynccontextmanager
async def each_resource(store: MetaStore) -> AsyncIterator[EachResource]:
    """Give a snapshot in which each resource is as at some moment."""
    spool = Spool()
    try:
        yield EachResource(store, spool)
    finally:
        await spool.close()
