"""A DiskMetaStore and a DiskResourceStore together: what each could do alone, for half the trips to threads and half the syncs.

The contracts of the two stores stay as they are; SimpleStorage takes these shortcuts where both are on this machine's disk.
"""

from __future__ import annotations

from collections.abc import Sequence

from ...query import Query
from ..basic import MAX_READ, Hit, IdempotentCommit, Page, ResourceMeta, Write
from ..meta_store.simple import DiskMetaStore
from ..resource_store.simple import DiskResourceStore
from ..runtime.threads import in_thread


class DiskPair:
    def __init__(self, meta_store: DiskMetaStore, resource_store: DiskResourceStore) -> None:
        self._meta, self._resource = meta_store, resource_store

    async def get_with_body(self, resource_id: str) -> tuple[ResourceMeta, bytes]:
        def read() -> tuple[ResourceMeta, bytes]:
            meta = self._meta.get_now(resource_id)
            (body,) = self._resource.get_many_now([meta.uid])
            return meta, body

        await self._opened()
        return await in_thread(read)

    async def search_with_bodies(self, query: Query) -> tuple[Page[Hit], list[bytes]]:
        def read() -> tuple[Page[Hit], list[bytes]]:
            page = self._meta.search_now(query)
            return page, self._resource.get_first_now([hit.uid for hit in page.items], MAX_READ)

        await self._opened()
        return await in_thread(read)

    async def _opened(self) -> None:
        await self._meta.opened()
        await self._resource.opened()

    async def commit(self, writes: Sequence[Write], once: IdempotentCommit | None = None) -> list[ResourceMeta]:
        """Put the bodies, and commit the changes once they are durable (M1), both by one committer."""
        changes = [write.change for write in writes]
        bodies = [
            (change.record.uid, body) for change, body in writes if change.record is not None and body is not None
        ]
        commit = self._meta.commit_stage(changes, once)
        stages = [self._resource.put_stage(bodies), commit] if bodies else [commit]
        results = await commit.database.committer.write(stages)
        committed: list[ResourceMeta] = results[-1]
        return committed
