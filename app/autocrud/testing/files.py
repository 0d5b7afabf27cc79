"""A storage with blobs, and helper functions for tests of them."""

from __future__ import annotations

from typing import Any

import pytest

from ..resource_manager.basic import BlobRow, BlobStore
from ..resource_manager.contract.blobs import BlobRows, Blobs
from ..resource_manager.core import ResourceManager
from ..resource_manager.storage.simple_storage import SimpleStorage
from .blobs import NamedBlobs, blob_rows_of
from .model import Item, storage_of

LIMIT = 5 * 1024**2
"""Largest size of an upload of the tests, in bytes."""


class Files:
    """A manager whose storage has blobs, with what the tests need of it. Skips the test if it has none.

    names  the keys that records will name
    """

    def __init__(self, manager: ResourceManager[Item]) -> None:
        self.manager = manager
        self.storage: SimpleStorage = storage_of(manager)
        blobs, store = self.storage.blobs, self.storage.blob_store
        if blobs is None or store is None:
            pytest.skip("the storage has no blobs")
        self.blobs: Blobs = blobs
        self.store: BlobStore = store
        self.rows: BlobRows = blob_rows_of(manager)
        self.names = NamedBlobs(self.storage)

    async def upload(self, content: bytes, *, by: str = "alice", quota: int | None = None) -> BlobRow:
        """Upload content in one chunk."""
        async with self.blobs.receive(by, max_size=LIMIT, quota=quota) as upload:
            await upload.write(content)
            return await upload.finish()

    async def content(self, row: BlobRow) -> bytes:
        """Return the content of a blob."""
        return b"".join([chunk async for chunk in self.blobs.read(row.key)])

    async def exists(self, row: BlobRow) -> bool:
        """Return whether a blob has a row and content. It must have both or none."""
        has_row = row in await self.blobs.rows([row.sha256])
        assert await self.has_content(row.key) is has_row
        return has_row

    async def has_content(self, key: str) -> bool:
        """Return whether there is content under a key."""
        return key in await self.store.older_than(0)

    async def create(self, rid: str, *rows: BlobRow, status: Any = "stable") -> None:
        """Create a resource whose first revision names these blobs."""
        self.names.by_resource[rid] = tuple(row.key for row in rows)
        await self.manager.create(Item(), resource_id=rid, status=status)

    async def update(self, rid: str, number: int, *rows: BlobRow, modify: bool = False) -> None:
        """Give a resource a new revision, or change its draft, with these blobs."""
        self.names.by_resource[rid] = tuple(row.key for row in rows)
        await (self.manager.modify if modify else self.manager.update)(rid, Item(number=number))

    async def maintain(self, keep_s: float | None = 0.0) -> None:
        """Maintain the storage. `keep_s`: the time for which uploads are kept; None: that of the storage."""
        sweep = self.storage._blob_sweep
        assert sweep is not None
        before = sweep._keep_s
        sweep._keep_s = before if keep_s is None else keep_s
        try:
            await self.storage.maintain(20)
        finally:
            sweep._keep_s = before
