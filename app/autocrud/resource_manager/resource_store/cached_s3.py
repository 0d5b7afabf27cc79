"""Bodies on S3 behind caches: one PUT a revision, and for what was written or read here lately no GET.

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

from ...errors import ConfigError
from ..basic import Encoding, RevisionInfo
from ..object_store import CACHED, ObjectStore
from ..threads import outlived
from .cache import Cache, Entry, MemoryCache
from .s3 import S3ResourceStore

ARRIVAL_S = 10.0
"""How long a deletion waits for a cache that is being filled with what it deletes. Only a stopped event loop takes so long."""
ANY = "*"
"""In the place of a key: all of them. No key is like that."""


class _Arrival:
    """Bodies on their way into the caches. `keys` are those that may still arrive."""

    __slots__ = ("done", "keys")

    def __init__(self, keys: Sequence[str]) -> None:
        self.keys = set(keys)
        self.done: Future[None] | None = None  # while it fills them

    def brings(self, keys: Sequence[str]) -> bool:
        return ANY in keys or not self.keys.isdisjoint(keys)

    def lose(self, keys: Sequence[str]) -> None:
        if ANY in keys:
            self.keys.clear()
        else:
            self.keys.difference_update(keys)


class CachedS3ResourceStore(S3ResourceStore):
    """S3ResourceStore behind `caches`, asked in this order; what one has is copied into those before it, what none has is read from S3.

    ttl_draft    seconds that the body of a draft is kept, counted from its PUT
    ttl_stable   the same, of a stable revision
    and the arguments of S3ResourceStore

    A body that is read from S3 does not tell which it is, so it gets the shorter of the two. A copy gets what is left, never a new life.

    A body never changes, so what a cache holds is never out of date. What a cache may hold is a body that was deleted or purged:

    - This object does not serve it again: `delete` takes it out of S3 and out of all its caches, also if S3 fails, and what is read from S3 at
      the same time does not arrive in them afterwards.
    - Other instances may serve it, to whoever asks for it by metadata that is as old, and keep it until its time is over, that is for
      max(ttl_draft, ttl_stable) at most. `erase` says so.
    """

    def __init__(
        self,
        caches: Sequence[Cache],
        ttl_draft: float = 3600,
        ttl_stable: float = 86400,
        *,
        bucket: str,
        prefix: str = "",
        endpoint_url: str | None = None,
        access_key_id: str | None = None,
        secret_access_key: str | None = None,
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
        self._memory = self.caches[0] if self.caches and isinstance(self.caches[0], MemoryCache) else None
        self.ttl_draft, self.ttl_stable = ttl_draft, ttl_stable
        self._state = threading.Lock()  # guards the two below
        self._arrivals: list[_Arrival] = []
        self._leaving: Counter[str] = Counter()
        self._deletions: set[asyncio.Task[None]] = set()  # held, or they might be collected while they run

    async def put(self, uid: str, info: RevisionInfo, body: bytes) -> None:
        key = self._prefix + uid
        with self._arriving([key]) as arrival:
            await super().put(uid, info, body)
            ttl_s = self.ttl_draft if info.status == "draft" else self.ttl_stable
            await self._fill(arrival, self.caches, {key: Entry(body, ttl_s)})

    async def get_many(self, uids: Sequence[str]) -> list[bytes]:
        if (
            self._memory is not None and len(uids) == 1
        ):  # the most frequent question; if it has the answer, nothing below is needed
            body = self._memory.body(self._prefix + uids[0])
            if body is not None:
                if (counter := CACHED.get()) is not None:
                    counter["hits"] += 1
                return [body]
        wanted = {self._prefix + uid: uid for uid in uids}
        found: dict[str, Entry] = {}
        with self._arriving(list(wanted)) as arrival:
            for depth, cache in enumerate(self.caches):
                if missing := [key for key in wanted if key not in found]:
                    hits = await cache.get_many(missing)
                    await self._fill(arrival, self.caches[:depth], hits)
                    found |= hits
            if (counter := CACHED.get()) is not None:
                counter.update(hits=len(found), misses=len(wanted) - len(found))
            if missing := [key for key in wanted if key not in found]:
                bodies = await super().get_many([wanted[key] for key in missing])
                ttl_s = min(self.ttl_draft, self.ttl_stable)
                read = {key: Entry(body, ttl_s) for key, body in zip(missing, bodies, strict=True)}
                await self._fill(arrival, self.caches, read)
                found |= read
        return [found[self._prefix + uid].body for uid in uids]

    async def delete(self, uids: Sequence[str]) -> None:
        if uids:
            task = asyncio.create_task(self._delete(uids))
            self._deletions.add(task)
            task.add_done_callback(self._deletions.discard)
            await outlived(task)  # nobody sweeps caches, so it goes on where the one who asked does not

    async def _delete(self, uids: Sequence[str]) -> None:
        try:
            await super().delete(uids)
        finally:
            await self.forget(uids)

    async def forget(self, uids: Sequence[str]) -> None:
        """Take bodies out of the caches and leave S3 alone, as when another instance has deleted them."""
        keys = [self._prefix + uid for uid in uids]
        await self._take_out(keys, lambda cache: cache.delete(keys))

    async def forget_everything(self) -> None:
        """The same with all bodies."""
        await self._take_out([ANY], lambda cache: cache.clear())

    async def _take_out(self, keys: Sequence[str], remove: Callable[[Cache], Awaitable[None]]) -> None:
        with self._state:
            self._leaving.update(keys)
            filling = [one.done for one in self._arrivals if one.done is not None and one.brings(keys)]
        try:
            if filling:
                await asyncio.wait([asyncio.wrap_future(done) for done in filling], timeout=ARRIVAL_S)
            failures = await asyncio.gather(*map(remove, self.caches), return_exceptions=True)
        finally:
            with self._state:
                for arrival in self._arrivals:
                    arrival.lose(keys)
                self._leaving.subtract(keys)
                self._leaving = +self._leaving
        for failure in failures:
            if failure is not None:
                raise failure

    @contextlib.contextmanager
    def _arriving(self, keys: Sequence[str]) -> Iterator[_Arrival]:
        arrival = _Arrival(keys)
        with self._state:
            self._arrivals.append(arrival)
        try:
            yield arrival
        finally:
            with self._state:
                self._arrivals.remove(arrival)

    async def _fill(self, arrival: _Arrival, caches: Sequence[Cache], entries: Mapping[str, Entry]) -> None:
        """Put into the caches what has not been deleted since the arrival began."""
        if not caches or not entries:
            return
        with self._state:
            closed = ANY in self._leaving
            welcome = {
                key: entry
                for key, entry in entries.items()
                if not closed and key in arrival.keys and key not in self._leaving
            }
            done = arrival.done = Future()
        try:
            if welcome:
                for cache in reversed(caches):  # from the back: one that refuses leaves those before it empty
                    await cache.put_many(welcome)
        finally:
            with self._state:
                arrival.done = None
            done.set_result(None)

    def statistics(self) -> dict[str, tuple[int, int]]:
        """Hits and misses of each cache since it was made, by place and name: `{"1 MemoryCache": (90, 10), "2 DiskCache": (6, 4)}`."""
        return {
            f"{place} {type(cache).__name__}": (cache.hits, cache.misses) for place, cache in enumerate(self.caches, 1)
        }

    async def maintain(self, budget_s: float) -> None:
        """Remove what has expired from the caches, for at most about `budget_s` seconds."""
        for cache in self.caches:
            await cache.maintain(budget_s / len(self.caches))

    async def erase(self, now: dt.datetime) -> dt.datetime:
        for cache in self.caches:
            await cache.erase()
        elsewhere = now + dt.timedelta(seconds=max(self.ttl_draft, self.ttl_stable))
        return max(await super().erase(now), elsewhere)

    async def close(self) -> None:
        failures = await asyncio.gather(*(cache.close() for cache in self.caches), return_exceptions=True)
        await super().close()
        for failure in failures:
            if failure is not None:
                raise failure
