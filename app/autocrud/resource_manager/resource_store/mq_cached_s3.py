"""CachedS3ResourceStore for several instances, which tell each other through RabbitMQ what has changed.

MQCachedS3ResourceStore(
    [MemoryCache(100), DiskCache("cache/article")],
    amqp_url="amqps://user:password@broker.example.com:5671",
    queue_prefix="article_",
    bucket="bucket",
    prefix="article/",
)

It needs the extra `amqp`. The messages are in `amqp`, where it is argued why nothing is missed.
"""

from __future__ import annotations

from collections.abc import Coroutine, Sequence
from typing import Any

from ...secret import Secret
from ..backends.rabbitmq.bus import Bus
from ..backends.rabbitmq.connection import Address
from ..backends.rabbitmq.invalidation import REFRESH, Words
from ..backends.s3.object_store import ObjectStore
from ..basic import Encoding, RevisionInfo
from .body_cache import Cache
from .cached_s3 import CachedS3ResourceStore


class MQCachedS3ResourceStore(CachedS3ResourceStore):
    """
    caches, ttl_draft, ttl_stable   as CachedS3ResourceStore takes them
    amqp_url         amqp:// or amqps:// (TLS, `?cafile=...`), with user and password; or a function that makes it for each connection. All
                     stores of a process that name the same one share a connection
    queue_prefix     of the exchange `{queue_prefix}invalidations` and of each instance's queue: one for each model, the same for all instances
    max_staleness_s  how long a reader relies on writers alone (see below)
    and the arguments of S3ResourceStore

    After a commit below a MemoryMetaStore, and after bodies were deleted, the other instances are told, and the broker has confirmed it before the
    write is acknowledged. They look at the index again and forget the bodies, at once. What follows for a read that begins after an acknowledgement:

    - *The same instance sees the write.* Another one sees it at once or, if the message is under way, after 1 s at most, without asking S3 for
      what did not change.
    - *A reader that may have missed something knows it.* It was stopped (SIGSTOP, a frozen Lambda), is cut off, its broker is dead: within 1 s
      its lease is over, and each read looks at the index on S3: slower, never older. So nothing has to be drained after a freeze. `drain`
      does it all the same.
    - *A writer that cannot reach the broker is acknowledged all the same*, after 1 s the first time and at once from then on. Readers
      that can reach it do not know, and see its writes after `max_staleness_s` at most, when they look by themselves. What could not be said is
      said when the broker is back. `degradations` tells both.
    - *Purged bodies are unreachable before they are gone.* Bodies are asked for by uids that metadata name, and metadata are as new as
      said above, or newer: a MetaStore that is the truth itself (S3-SQLite, PostgreSQL) is asked at each read. They leave the caches of
      all instances when the message arrives, or with everything else when an instance is connected again: what was missed is not known.

    A copy stays until its time is over, as `purge_remnants` says, where nobody can tell a process to remove it: in the DiskCache of one that does not run,
    and in the caches of one that has just been started, if the body was purged before it was connected for the first time. (They are not cleared
    then, or nobody would need a DiskCache to survive restarts; they are if the first attempt to connect fails.) And where a writer ends before it
    could say what it had to.
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
        self._bus = Bus(amqp_url, queue_prefix, self._heed)

    def _staleness(self) -> float:
        return self.max_staleness_s if self._bus.fresh() else 0.0

    async def _heed(self, words: Words) -> None:
        """Do what another instance says. In the thread of the bus."""
        if words.refresh and self._index is not None:
            await self._index.refresh()
        if words.clear:
            await self.evict_all()
        elif words.forget:
            await self.evict(sorted(words.forget))

    async def put(self, uid: str, info: RevisionInfo, body: bytes) -> None:
        self._bus.join()
        await super().put(uid, info, body)

    def get(self, uid: str) -> Coroutine[Any, Any, bytes]:
        self._bus.join()
        return super().get(uid)

    def get_many(self, uids: Sequence[str]) -> Coroutine[Any, Any, list[bytes]]:
        self._bus.join()
        return super().get_many(uids)

    async def committed(self) -> None:
        await self._bus.say(REFRESH)

    async def _delete(self, uids: Sequence[str]) -> None:
        try:
            await super()._delete(uids)
        finally:
            await self._bus.say(Words(forget=frozenset(uids)))

    async def drain(self, timeout_s: float = 1.0) -> bool:
        """Do all that other instances said before this call; False if that took too long."""
        return await self._bus.drain(timeout_s)

    async def degradations(self) -> list[str]:
        found = await super().degradations()
        silent, unsaid = self._bus.silent_for(), self._bus.unsaid()
        if silent is not None:
            reads = "each read looks at S3" if self._index else "caches are not told what was purged"
            found.append(f"RabbitMQ cannot be reached since {silent:.0f} s: {reads}")
            if unsaid:
                late = f"may see writes of this one up to {self.max_staleness_s:g} s late" if unsaid.refresh else ""
                keep = "may keep copies of what was purged" if unsaid.forget or unsaid.clear else ""
                found.append(f"other instances {' and '.join(filter(None, [late, keep]))}, until RabbitMQ is back")
        return found

    async def close(self) -> None:
        try:
            await self._bus.leave()
        finally:
            await super().close()
            if self._index is not None:  # perhaps somebody's words opened it again
                await self._index.close()
