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

from typing_extensions import override

from ...errors import ConfigError
from ...secret import Secret
from ..backends.s3.object_store import CACHED, ObjectStore
from ..basic import Encoding, ModelSpec, RevisionInfo
from ..contract.overrides import check_cache
from ..runtime.threads import shielded
from .cache import Cache, Entry, MemoryCache
from .s3 import S3ResourceStore

counter_of_caller = CACHED.get
ARRIVAL_S = 10.0
"""How long a deletion waits for a cache that is being filled with what it deletes. Only a stopped event loop takes so long."""
ANY = "*"
"""In the place of a uid: all of them. No uid is like that."""


class _Arrival:
    """Bodies on their way into the caches. `uids` are those that may still arrive."""

    __slots__ = ("done", "uids")

    def __init__(self, uids: Sequence[str]) -> None:
        self.uids = set(uids)
        self.done: Future[None] | None = None  # while it fills them

    def brings(self, uids: Sequence[str]) -> bool:
        return ANY in uids or not self.uids.isdisjoint(uids)

    def lose(self, uids: Sequence[str]) -> None:
        if ANY in uids:
            self.uids.clear()
        else:
            self.uids.difference_update(uids)


class CachedS3ResourceStore(S3ResourceStore):
    """S3ResourceStore behind `caches`, asked in this order; what one has is copied into those before it, what none has is read from S3.

    ttl_draft    seconds that the body of a draft is kept, counted from its PUT
    ttl_stable   the same, of a stable revision
    and the arguments of S3ResourceStore

    A body that is read from S3 does not tell which it is, so it gets the shorter of the two. A copy gets what is left, never a new life.

    Caches know a body by its uid, which no other body of any store has. So stores may share them, and a cache on disk may lie where another was.

    A body never changes, so what a cache holds is never out of date. What a cache may hold is a body that was deleted or purged:

    - This object does not serve it again: `delete` takes it out of S3 and out of all its caches, also if S3 fails, and what is read from S3 at
      the same time does not arrive in them afterwards.
    - Other instances may serve it, to whoever asks for it by metadata that is as old, and keep it until its time is over, that is for
      max(ttl_draft, ttl_stable) at most. `purge_remnants` says so.
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
        first = self.caches[0] if self.caches else None
        self._memory = first if type(first) is MemoryCache else MemoryCache()  # if it is none, one that stays empty
        self._find, self._clock = self._memory.kept.get, self._memory.clock
        self.ttl_draft, self.ttl_stable = ttl_draft, ttl_stable
        self._state = threading.Lock()  # guards the two below
        self._arrivals: list[_Arrival] = []
        self._leaving: Counter[str] = Counter()
        self._deletions: set[asyncio.Task[None]] = set()  # held, or they might be collected while they run

    @override
    def bind(self, spec: ModelSpec) -> None:
        for cache in self.caches:
            check_cache(cache)
        super().bind(spec)

    async def put(self, uid: str, info: RevisionInfo, body: bytes) -> None:
        with self._arriving([uid]) as arrival:
            await super().put(uid, info, body)
            ttl_s = self.ttl_draft if info.status == "draft" else self.ttl_stable
            await self._fill(arrival, self.caches, {uid: Entry(body, ttl_s)})

    # What a hit in memory costs is nearly all in the calls it is made of, so both write out what `MemoryCache` says a hit is.

    async def get(self, uid: str) -> bytes:
        kept = self._find(uid)
        if kept is None or kept.expires <= self._clock():
            (body,) = await self._look_up([uid])
            return body
        self._memory.hits = kept.used = self._memory.hits + 1
        if (counter := counter_of_caller()) is not None:
            counter["hits"] += 1
        return kept.body

    async def get_many(self, uids: Sequence[str]) -> list[bytes]:
        bodies = []
        now = self._clock()
        for uid in uids:
            kept = self._find(uid)
            if kept is None or kept.expires <= now:
                break
            self._memory.hits = kept.used = self._memory.hits + 1
            bodies.append(kept.body)
        if bodies and (counter := counter_of_caller()) is not None:
            counter["hits"] += len(bodies)
        if len(bodies) < len(uids):
            bodies += await self._look_up(uids[len(bodies) :])
        return bodies

    async def _look_up(self, uids: Sequence[str]) -> list[bytes]:
        wanted = list(dict.fromkeys(uids))
        found: dict[str, Entry] = {}
        with self._arriving(wanted) as arrival:
            for depth, cache in enumerate(self.caches):
                if missing := [uid for uid in wanted if uid not in found]:
                    hits = await cache.get_many(missing)
                    await self._fill(arrival, self.caches[:depth], hits)
                    found |= hits
            missing = [uid for uid in wanted if uid not in found]
            if (counter := counter_of_caller()) is not None:
                counter.update(hits=len(found), misses=len(missing))
            if missing:
                bodies = await super().get_many(missing)
                ttl_s = min(self.ttl_draft, self.ttl_stable)
                read = {uid: Entry(body, ttl_s) for uid, body in zip(missing, bodies, strict=True)}
                await self._fill(arrival, self.caches, read)
                found |= read
        return [found[uid].body for uid in uids]

    async def delete(self, uids: Sequence[str]) -> None:
        if uids:
            task = asyncio.create_task(self._delete(uids))
            self._deletions.add(task)
            task.add_done_callback(self._deletions.discard)
            await shielded(task)  # nobody sweeps caches, so it goes on where the one who asked does not

    async def _delete(self, uids: Sequence[str]) -> None:
        try:
            await super().delete(uids)
        finally:
            await self.forget(uids)

    async def forget(self, uids: Sequence[str]) -> None:
        """Take bodies out of the caches and leave S3 alone, as when another instance has deleted them."""
        await self._take_out(uids, lambda cache: cache.delete(uids))

    async def drop_copies(self, uids: Sequence[str]) -> None:
        await self.forget(uids)

    async def forget_everything(self) -> None:
        """The same with all bodies."""
        await self._take_out([ANY], lambda cache: cache.clear())

    async def _take_out(self, uids: Sequence[str], remove: Callable[[Cache], Awaitable[None]]) -> None:
        with self._state:
            self._leaving.update(uids)
            filling = [one.done for one in self._arrivals if one.done is not None and one.brings(uids)]
        try:
            if filling:
                await asyncio.wait([asyncio.wrap_future(done) for done in filling], timeout=ARRIVAL_S)
            failures = await asyncio.gather(*map(remove, self.caches), return_exceptions=True)
        finally:
            with self._state:
                for arrival in self._arrivals:
                    arrival.lose(uids)
                self._leaving.subtract(uids)
                self._leaving = +self._leaving
        for failure in failures:
            if failure is not None:
                raise failure

    @contextlib.contextmanager
    def _arriving(self, uids: Sequence[str]) -> Iterator[_Arrival]:
        arrival = _Arrival(uids)
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
                uid: entry
                for uid, entry in entries.items()
                if not closed and uid in arrival.uids and uid not in self._leaving
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

    async def purge_remnants(self, now: dt.datetime) -> dt.datetime:
        for cache in self.caches:
            await cache.purge_remnants()
        elsewhere = now + dt.timedelta(seconds=max(self.ttl_draft, self.ttl_stable))
        return max(await super().purge_remnants(now), elsewhere)

    async def close(self) -> None:
        failures = await asyncio.gather(*(cache.close() for cache in self.caches), return_exceptions=True)
        await super().close()
        for failure in failures:
            if failure is not None:
                raise failure
