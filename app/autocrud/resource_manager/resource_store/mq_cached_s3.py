"""A CachedS3ResourceStore for several instances, which publish through RabbitMQ what has changed.

    MQCachedS3ResourceStore(
        [MemoryCache(100), DiskCache("cache/article")],
        amqp_url="amqps://user:password@broker.example.com:5671",
        queue_prefix="article_",
        bucket="bucket",
        prefix="article/",
    )

It needs the extra `amqp`. docs/design/cache-invalidation.md explains why no invalidation is missed.
"""

from __future__ import annotations

from collections.abc import Coroutine, Sequence
from typing import Any

from typing_extensions import override

from ...secret import Secret
from ..backends.rabbitmq.bus import Bus
from ..backends.rabbitmq.connection import Address
from ..backends.rabbitmq.invalidation import REFRESH, Invalidation
from ..backends.s3.object_store import ObjectStore
from ..basic import Encoding, RevisionInfo
from .body_cache import Cache
from .cached_s3 import CachedS3ResourceStore


class MQCachedS3ResourceStore(CachedS3ResourceStore):
    """A CachedS3ResourceStore whose instances invalidate each other's caches.

    amqp_url         amqp:// or amqps:// (TLS, `?cafile=...`), with user and password, or a function that returns the
                     URL for each connection. Stores of a process with the same URL share a connection.
    queue_prefix     begins the names of the exchange, `{queue_prefix}invalidations`, and of each instance's queue.
                     Each model needs its own, the same for all instances.
    max_staleness_s  for how many seconds a reader relies on writers alone, see below

    The other arguments are those of CachedS3ResourceStore.

    After a commit below a MemoryMetaStore, and after bodies were deleted, the instance publishes an invalidation. The
    write is acknowledged when the broker has confirmed it. The other instances then read the index again, and evict the
    bodies. A read that begins after an acknowledgement:

    - *On the same instance, it sees the write.* On another one it sees the write at once, or after 1 s at most if the
      message is still under way. Unchanged data is not read from S3 again.
    - *An instance that may have missed a message knows that.* If it was stopped (SIGSTOP, a frozen Lambda), is cut off,
      or the broker is down, its lease ends within 1 s. Then each read looks at the index on S3, which is slower but not
      staler. So no drain is needed after a freeze.
    - *A writer that cannot reach the broker is acknowledged all the same*, after 1 s the first time, at once from then
      on. Readers that reach the broker do not know that. They see the write after `max_staleness_s` at most, when they
      look at the index. The writer publishes the invalidation when the broker is back. `degradations` reports both.
    - *Purged bodies are unreachable.* Bodies are read by uids from metadata, and metadata is as new as described here.
      A durable MetaStore (S3-SQLite, PostgreSQL) is asked at each read. The bodies leave the caches of all instances
      when the message arrives, or with all other entries when an instance connects again.

    A cached body stays until its time is over, as `purge_remnants` reports, in three cases:

    - The instance does not run, and the body is in its DiskCache.
    - The instance was just started, and the body was purged before it connected for the first time. Its caches are not
      cleared then, because a DiskCache should survive a restart. If the first attempt to connect fails, they are.
    - The writer ended before it could publish the invalidation.
    """

    def __init__(
        self,
        caches: Sequence[Cache],
        amqp_url: str | Address = "amqp://guest:guest@localhost:5672",
        queue_prefix: str = "",
        ttl_draft: float = 1800,
        ttl_stable: float = 3600,
        *,
        bucket: str,
        prefix: str = "",
        endpoint_url: str | Secret | None = None,
        access_key_id: str | None = None,
        secret_access_key: str | Secret | None = None,
        region_name: str | None = None,
        encoding: Encoding | None = None,
        object_store: ObjectStore | None = None,
        max_staleness_s: float = 30.0,
    ) -> None:
        super().__init__(
            caches,
            ttl_draft,
            ttl_stable,
            bucket=bucket,
            prefix=prefix,
            endpoint_url=endpoint_url,
            access_key_id=access_key_id,
            secret_access_key=secret_access_key,
            region_name=region_name,
            encoding=encoding,
            object_store=object_store,
        )
        self.max_staleness_s = max_staleness_s
        self._bus = Bus(amqp_url, queue_prefix, self._handle)

    @override
    def _staleness(self) -> float:
        return self.max_staleness_s if self._bus.is_fresh() else 0.0

    async def _handle(self, invalidation: Invalidation) -> None:
        """Do what an invalidation of another instance demands. Runs in the AMQP thread."""
        if invalidation.refresh and self._index is not None:
            await self._index.refresh()
        if invalidation.clear:
            await self.evict_all()
        elif invalidation.forget:
            await self.evict(sorted(invalidation.forget))

    @override
    async def put(self, uid: str, info: RevisionInfo, body: bytes) -> None:
        self._bus.join()
        await super().put(uid, info, body)

    @override
    def get(self, uid: str) -> Coroutine[Any, Any, bytes]:
        self._bus.join()
        return super().get(uid)

    @override
    def get_many(self, uids: Sequence[str]) -> Coroutine[Any, Any, list[bytes]]:
        self._bus.join()
        return super().get_many(uids)

    @override
    async def committed(self) -> None:
        await self._bus.publish(REFRESH)

    @override
    async def _delete(self, uids: Sequence[str]) -> None:
        try:
            await super()._delete(uids)
        finally:
            await self._bus.publish(Invalidation(forget=frozenset(uids)))

    async def drain(self, timeout_s: float = 1.0) -> bool:
        """Wait until all invalidations that came before this call are handled. Return False after `timeout_s`."""
        return await self._bus.drain(timeout_s)

    @override
    async def degradations(self) -> list[str]:
        found = await super().degradations()
        unreachable, unpublished = self._bus.unreachable_for(), self._bus.unpublished()
        if unreachable is not None:
            reads = "each read looks at S3" if self._index else "caches are not told what was purged"
            found.append(f"RabbitMQ cannot be reached since {unreachable:.0f} s: {reads}")
            if unpublished:
                late = (
                    f"may see writes of this one up to {self.max_staleness_s:g} s late" if unpublished.refresh else ""
                )
                keep = "may keep copies of what was purged" if unpublished.forget or unpublished.clear else ""
                found.append(f"other instances {' and '.join(filter(None, [late, keep]))}, until RabbitMQ is back")
        return found

    @override
    async def close(self) -> None:
        try:
            await self._bus.close()
        finally:
            await super().close()
            if self._index is not None:  # an invalidation may have opened it again
                await self._index.close()
