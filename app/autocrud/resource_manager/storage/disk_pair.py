"""Metadata and bodies on one disk, read in one call to a thread and written by one committer.

Two stores on the same disk could be read and written separately. Together they need half the calls to threads and half
the syncs. SimpleStorage uses this module if both stores have the abilities in `contract.staged_stores`.
"""

from __future__ import annotations

from collections.abc import Sequence

from typing_extensions import override

from ...query import Query
from ..basic import MAX_READ, Hit, IdempotentCommit, Page, ResourceMeta, Write
from ..contract.staged_stores import StagedMetaStore, StagedResourceStore
from ..runtime.threads import in_thread
from .commits import MetaStoreCommits, new_bodies


class DiskPair(MetaStoreCommits):
    """Commits to a MetaStore and a ResourceStore whose writes share a committer, and reads both at once."""

    def __init__(self, meta_store: StagedMetaStore, resource_store: StagedResourceStore) -> None:
        super().__init__(meta_store, resource_store)
        self._meta, self._bodies = meta_store, resource_store

    @override
    async def commit(self, writes: Sequence[Write], once: IdempotentCommit | None = None) -> list[ResourceMeta]:
        bodies = [(record.uid, body) for record, body in new_bodies(writes)]
        stages = [self._bodies.put_stage(bodies)] if bodies else []
        return await self._meta.commit_after(stages, [write.change for write in writes], once)

    async def get_with_body(self, resource_id: str) -> tuple[ResourceMeta, bytes]:
        """Return the metadata and the current body."""

        def read() -> tuple[ResourceMeta, bytes]:
            meta = self._meta.get_now(resource_id)
            (body,) = self._bodies.get_many_now([meta.uid])
            return meta, body

        await self._opened()
        return await in_thread(read)

    async def search_with_bodies(self, query: Query) -> tuple[Page[Hit], list[bytes]]:
        """Return a page of hits, and bodies of the first ones until they take more than MAX_READ bytes."""

        def read() -> tuple[Page[Hit], list[bytes]]:
            page = self._meta.search_now(query)
            return page, self._bodies.get_first_now([hit.uid for hit in page.items], MAX_READ)

        await self._opened()
        return await in_thread(read)

    async def _opened(self) -> None:
        await self._meta.opened()
        await self._bodies.opened()
