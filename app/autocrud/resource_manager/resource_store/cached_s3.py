"""Bodies on S3 behind caches: a body that was written or read here lately is not read from S3 again.

CachedS3ResourceStore([MemoryCache(100), DiskCache("cache/article")], bucket="bucket", prefix="article/")
"""

from __future__ import annotations

import asyncio
import contextlib
import datetime as dt
import threading
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future

from typing_extensions import override

from ...errors import ConfigError
from ...secret import Secret
from ..backends.s3.object_store import CACHED, ObjectStore
from ..basic import Encoding, ModelSpec, RevisionInfo
from ..contract.overrides import check_cache
from ..runtime.threads import shielded
from .body_cache import Cache, Entry
from .s3 import S3ResourceStore

counter_of_caller = CACHED.get
FILL_TIMEOUT_S = 10.0
"""How long an eviction waits for a call that is filling a cache with an evicted body. Only a stopped event loop takes
so long."""
ALL = "*"
"""Stands for all uids. No uid is equal to it."""


class _Fill:
    """A call that may put bodies into the caches. `uids` names the bodies that it may still put there."""

    __slots__ = ("finished", "uids")

    def __init__(self, uids: Sequence[str]) -> None:
        self.uids = set(uids)
        self.finished: Future[None] | None = None  # while a cache is being filled

    def includes_any(self, uids: Sequence[str]) -> bool:
        return ALL in uids or not self.uids.isdisjoint(uids)

    def exclude(self, uids: Sequence[str]) -> None:
        if ALL in uids:
            self.uids.clear()
        else:
            self.uids.difference_update(uids)


class CachedS3ResourceStore(S3ResourceStore):
    """An S3ResourceStore behind `caches`, which are asked in this order.

    caches       a body that one cache has is copied into those before it; a body that none has is read from S3 and
                 copied into all
    ttl_draft    for how many seconds the body of a draft is cached, counted from its PUT
    ttl_stable   the same for the body of a stable revision

    The other arguments are those of S3ResourceStore.

    A body that is read from S3 gets the shorter of the two times, because its status is not known then. A body that is
    copied from one cache to another keeps its remaining time.

    A uid names one body, in all stores. So several stores may share a cache, and the directory of a DiskCache may be
    one that another store used before.

    A cached body is never out of date, because bodies do not change. But it may have been deleted or purged:

    - *This object does not return it again.* `delete` removes it from S3 and from all caches of this object, from the
      caches even if S3 fails. A body that is read from S3 at the same time is not cached afterwards.
    - *Other instances may return it* to callers whose metadata is as old as the body, and may keep it until its time is
      over, which is max(ttl_draft, ttl_stable) at most. `purge_remnants` returns that moment.
    """

    def __init__(
        self,
        caches: Sequence[Cache],
        ttl_draft: float = 3600,
        ttl_stable: float = 86400,
        *,
        bucket: str,
        prefix: str = "",
        endpoint_url: str | Secret | None = None,
        access_key_id: str | None = None,
        secret_access_key: str | Secret | None = None,
        region_name: str | None = None,
        encoding: Encoding | None = None,
        object_store: ObjectStore | None = None,
    ) -> None:
        super().__init__(
            bucket,
            prefix,
            endpoint_url,
            access_key_id,
            secret_access_key,
            region_name,
            encoding,
            object_store=object_store,
        )
        if ttl_draft < 0 or ttl_stable < 0:
            raise ConfigError(f"ttl_draft is {ttl_draft}, ttl_stable is {ttl_stable}, expected seconds from 0")
        self.caches = tuple(caches)
        self.ttl_draft, self.ttl_stable = ttl_draft, ttl_stable
        self._state = threading.Lock()  # guards the two below
        self._fills: list[_Fill] = []
        self._evicting: Counter[str] = Counter()
        self._deletions: set[asyncio.Task[None]] = set()  # the event loop itself keeps no reference to a task

    @override
    def bind(self, spec: ModelSpec) -> None:
        for cache in self.caches:
            check_cache(cache)
        super().bind(spec)

    @override
    async def put(self, uid: str, info: RevisionInfo, body: bytes) -> None:
        with self._may_fill([uid]) as fill:
            await super().put(uid, info, body)
            ttl_s = self.ttl_draft if info.status == "draft" else self.ttl_stable
            await self._fill(fill, self.caches, {uid: Entry(body, ttl_s)})

    @override
    async def get(self, uid: str) -> bytes:
        (body,) = await self.get_many([uid])
        return body

    @override
    async def get_many(self, uids: Sequence[str]) -> list[bytes]:
        # A hit in the first cache fills no other, so it needs no _Fill.
        found = await self.caches[0].get_many(list(dict.fromkeys(uids))) if self.caches and uids else {}
        if found and (counter := counter_of_caller()) is not None:
            counter["hits"] += len(found)
        missing = [uid for uid in uids if uid not in found] if len(found) < len(uids) else []
        if missing:
            found |= await self._look_further(list(dict.fromkeys(missing)))
        return [found[uid].body for uid in uids]

    async def _look_further(self, uids: Sequence[str]) -> dict[str, Entry]:
        """Return bodies that the first cache does not have, from the other caches or from S3."""
        found: dict[str, Entry] = {}
        missing = list(uids)
        with self._may_fill(uids) as fill:
            for depth, cache in enumerate(self.caches[1:], 1):
                if missing:
                    hits = await cache.get_many(missing)
                    await self._fill(fill, self.caches[:depth], hits)
                    found |= hits
                    missing = [uid for uid in missing if uid not in hits]
            if (counter := counter_of_caller()) is not None:
                counter.update(hits=len(found), misses=len(missing))
            if missing:
                bodies = await super().get_many(missing)
                ttl_s = min(self.ttl_draft, self.ttl_stable)
                read = {uid: Entry(body, ttl_s) for uid, body in zip(missing, bodies, strict=True)}
                await self._fill(fill, self.caches, read)
                found |= read
        return found

    @override
    async def delete(self, uids: Sequence[str]) -> None:
        if uids:
            task = asyncio.create_task(self._delete(uids))
            self._deletions.add(task)
            task.add_done_callback(self._deletions.discard)
            await shielded(
                task
            )  # the deletion completes even if the caller is cancelled, because no sweep cleans caches

    async def _delete(self, uids: Sequence[str]) -> None:
        try:
            await super().delete(uids)
        finally:
            await self.evict(uids)

    async def evict(self, uids: Sequence[str]) -> None:
        """Remove bodies from all caches. They stay on S3.

        Raises StoreUnavailable if a cache might return one of them again.
        """
        await self._evict(uids, lambda cache: cache.delete(uids))

    @override
    async def drop_copies(self, uids: Sequence[str]) -> None:
        await self.evict(uids)

    async def evict_all(self) -> None:
        """Remove all bodies from all caches. They stay on S3.

        Raises StoreUnavailable if a cache might return one of them again.
        """
        await self._evict([ALL], lambda cache: cache.clear())

    async def _evict(self, uids: Sequence[str], remove: Callable[[Cache], Awaitable[None]]) -> None:
        with self._state:
            self._evicting.update(uids)
            filling = [one.finished for one in self._fills if one.finished is not None and one.includes_any(uids)]
        try:
            if filling:
                await asyncio.wait([asyncio.wrap_future(one) for one in filling], timeout=FILL_TIMEOUT_S)
            failures = await asyncio.gather(*map(remove, self.caches), return_exceptions=True)
        finally:
            with self._state:
                for fill in self._fills:
                    fill.exclude(uids)
                self._evicting.subtract(uids)
                self._evicting = +self._evicting
        for failure in failures:
            if failure is not None:
                raise failure

    @contextlib.contextmanager
    def _may_fill(self, uids: Sequence[str]) -> Iterator[_Fill]:
        fill = _Fill(uids)
        with self._state:
            self._fills.append(fill)
        try:
            yield fill
        finally:
            with self._state:
                self._fills.remove(fill)

    async def _fill(self, fill: _Fill, caches: Sequence[Cache], entries: Mapping[str, Entry]) -> None:
        """Put entries into caches, except those that were evicted since the fill began."""
        if not caches or not entries:
            return
        with self._state:
            closed = ALL in self._evicting
            allowed = {
                uid: entry
                for uid, entry in entries.items()
                if not closed and uid in fill.uids and uid not in self._evicting
            }
            finished = fill.finished = Future()
        try:
            if allowed:
                for cache in reversed(caches):  # the last one first: if it refuses, those before it stay empty
                    await cache.put_many(allowed)
        finally:
            with self._state:
                fill.finished = None
            finished.set_result(None)

    def statistics(self) -> dict[str, tuple[int, int]]:
        """Return hits and misses of each cache since it was made, by position and name.

        Example: `{"1 MemoryCache": (90, 10), "2 DiskCache": (6, 4)}`.
        """
        return {
            f"{position} {type(cache).__name__}": (cache.hits, cache.misses)
            for position, cache in enumerate(self.caches, 1)
        }

    @override
    async def maintain(self, budget_s: float) -> None:
        for cache in self.caches:
            await cache.maintain(budget_s / len(self.caches))

    @override
    async def purge_remnants(self, now: dt.datetime) -> dt.datetime:
        for cache in self.caches:
            await cache.purge_remnants()
        elsewhere = now + dt.timedelta(seconds=max(self.ttl_draft, self.ttl_stable))
        return max(await super().purge_remnants(now), elsewhere)

    @override
    async def close(self) -> None:
        failures = await asyncio.gather(*(cache.close() for cache in self.caches), return_exceptions=True)
        await super().close()
        for failure in failures:
            if failure is not None:
                raise failure
