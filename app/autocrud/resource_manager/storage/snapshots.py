"""One moment of a storage: a pin, then the metadata, then the bodies.

The order matters (P1). A body that the metadata of the moment name is stored before the metadata, so it is among the
bodies that are read later. The pin keeps it until then, unless its resource is purged.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager

from typing_extensions import override

from ...errors import StoreDamaged
from ..basic import (
    READ_AT_ONCE,
    BlobRow,
    BlobStore,
    IStorage,
    MetaStore,
    ResourceMeta,
    ResourceStore,
    RevisionInfo,
    StoredKey,
)
from ..contract.blobs import BlobRows
from ..contract.snapshots import (
    PAGE_BYTES,
    BodySnapshot,
    BodySnapshots,
    MetaSnapshot,
    Pinning,
    RecordSnapshots,
    SnapshotReading,
    SnapshotStorage,
    StorageSnapshot,
)
from .each_resource import EachResource
from .held_pin import HeldPin
from .kept_rows import KeptRows


@asynccontextmanager
async def open_snapshot(
    storage: IStorage,
    meta_store: MetaStore,
    resource_store: ResourceStore,
    blob_store: BlobStore | None,
    *,
    records: bool,
    each_resource: bool,
) -> AsyncIterator[StorageSnapshot]:
    """Hold a pin, and give the moment at which the context begins. Raises PinLost if the pin was dropped.

    If the MetaStore cannot be read as at one moment, each resource is as at some moment.

    storage        the storage of these stores
    blob_store     None if the model has no blobs
    records        whether the records of the ResourceStore are the commit
    each_resource  whether each resource is to be as at some moment
    """
    pinning = meta_store if isinstance(meta_store, Pinning) else None
    async with AsyncExitStack() as context:
        pin = await context.enter_async_context(HeldPin(pinning))
        meta: MetaSnapshot
        bodies: BodySnapshot
        if records and isinstance(resource_store, RecordSnapshots) and not each_resource:
            recorded = await context.enter_async_context(resource_store.record_snapshot())
            meta, bodies = recorded, recorded
        elif isinstance(meta_store, SnapshotReading) and not each_resource:
            meta = await context.enter_async_context(meta_store.snapshot())
            bodies = await _bodies(resource_store, context, later=not meta.one_moment)
        else:
            decides = resource_store if records else meta_store
            blob_rows = KeptRows(decides) if isinstance(decides, BlobRows) else None
            if blob_rows is not None:
                context.push_async_callback(blob_rows.close)
            stored = await _bodies(resource_store, context, later=True)
            keys_of: Callable[[], AbstractAsyncContextManager[MetaSnapshot]] | None = None
            if records and isinstance(resource_store, RecordSnapshots):
                keys_of = resource_store.record_snapshot
            elif isinstance(meta_store, SnapshotReading):
                keys_of = meta_store.snapshot
            resources = EachResource(storage, stored, blob_rows, keys_of, pinned=pinning is not None)
            meta, bodies = resources, resources
        yield _Moment(meta, bodies, blob_store, pin)


@asynccontextmanager
async def open_any_snapshot(storage: IStorage, *, each_resource: bool = False) -> AsyncIterator[StorageSnapshot]:
    """Give a moment of any storage. Each resource of a custom storage is as at some moment."""
    if isinstance(storage, SnapshotStorage):
        async with storage.snapshot(each_resource=each_resource) as snapshot:
            yield snapshot
    else:
        resources = EachResource(storage, StoredBodies(storage.bodies), None, None, pinned=False)
        yield _Moment(resources, resources, None, HeldPin(None))


async def _bodies(resource_store: ResourceStore, context: AsyncExitStack, *, later: bool) -> BodySnapshot:
    """Return the bodies of a store. `later`: whether those that are stored later are needed too."""
    if isinstance(resource_store, BodySnapshots) and (resource_store.shows_later_bodies or not later):
        return await context.enter_async_context(resource_store.snapshot())
    return StoredBodies(resource_store.get_many)


class StoredBodies(BodySnapshot):
    """Bodies that are read from a store as it is. A pin keeps them, unless their resource is purged.

    get_many  returns bodies in the order of the uids, and raises StoreDamaged if one is missing
    """

    def __init__(self, get_many: Callable[[Sequence[str]], Awaitable[list[bytes]]]) -> None:
        self._get_many = get_many

    @override
    async def bodies(self, uids: Sequence[str]) -> list[bytes | None]:
        found: list[bytes | None] = []
        while len(found) < len(uids) and sum(len(body) for body in found if body is not None) <= PAGE_BYTES:
            found += await self._page(uids[len(found) : len(found) + READ_AT_ONCE])
        return found

    async def _page(self, uids: Sequence[str]) -> list[bytes | None]:
        try:
            return list(await self._get_many(uids))
        except StoreDamaged:  # it does not say which ones are missing
            return await asyncio.gather(*map(self._body, uids))

    async def _body(self, uid: str) -> bytes | None:
        try:
            (body,) = await self._get_many([uid])
        except StoreDamaged:
            return None
        return body


class _Moment(StorageSnapshot):
    """One moment of the stores of a SimpleStorage."""

    def __init__(self, meta: MetaSnapshot, bodies: BodySnapshot, blob_store: BlobStore | None, pin: HeldPin) -> None:
        self._meta, self._bodies, self._blob_store, self._pin = meta, bodies, blob_store, pin
        self.one_moment = meta.one_moment

    @override
    async def count(self) -> int:
        return await self._meta.count()

    @override
    def items(self, after: str = "") -> AsyncIterator[ResourceMeta | RevisionInfo]:
        return self._meta.items(after)

    @override
    def keys(self) -> AsyncIterator[StoredKey]:
        return self._meta.keys()

    @override
    async def bodies(self, uids: Sequence[str]) -> list[bytes | None]:
        self._pin.check()
        return await self._bodies.bodies(uids)

    @override
    async def blob_rows(self, keys: Sequence[str]) -> list[BlobRow]:
        return await self._meta.blob_rows(keys)

    @override
    async def read_blob(self, key: str) -> AsyncIterator[bytes]:
        if self._blob_store is None:
            raise StoreDamaged(f"the file {key} cannot be read: the storage of this model keeps no files")
        async for chunk in self._blob_store.read(key):
            self._pin.check()
            yield chunk

    @override
    async def renew(self) -> None:
        await self._pin.renew()
