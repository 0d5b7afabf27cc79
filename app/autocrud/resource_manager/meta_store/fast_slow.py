"""FastSlowMetaStore: a truth that is shared, and before it a faster store that may lose, forget or invent anything.

    FastSlowMetaStore(RedisMetaStore(redis_url, prefix="article:"), PostgresMetaStore(pg_dsn, table_name="meta_article"))

`get` is answered by the fast store where that can; all else is the slow one's. A commit is the slow store's commit. Fast that is down, paused, flushed,
cut off from one process or from all, restored from an old dump, or failed over to a replica that lags, behind whose back the old primary goes on
answering: reads and writes get slower, and nothing else. **A `get` that begins after a commit was acknowledged sees it, or a later one**; what was
deleted or purged does not come back.

Reading: a *hit* is a document in the fast store. Otherwise the fast store grants a *token* for the resource, unless somebody has it; then the slow
store is read, and what it says is stored upon the token (*filled in*). Writing: remove the documents and take the tokens, commit, then *settle*:
remove documents and tokens again, and store what was committed if the token of before the commit was still there. Invariants; L is the lease:

- F1 *A document ends with its token, and a token L after it was granted*, by the clock of the server that granted it (see `backends.redis.lease`).
- F2 *A document is stored only upon the token that was granted before it was read or committed*, and no other command came between that removes
  tokens. So a document that can be hit was the truth at a time that is less than L ago.
- F3 *Nothing from before a commit is found on the server that settled it*: settling comes after the commit, and removes documents and tokens; what
  is stored afterwards was read upon a later token. This needs no mark to have arrived before the commit, and no flush, eviction or rival undoes it.
- F4 *Nothing from before a commit is found anywhere L after it*, by F2. So a writer that cannot settle waits before it acknowledges.
- F5 *Late commands are harmless*, whatever held them up. A late fill or settle finds its token gone, or no commit was acknowledged since it was
  granted (each one has removed it, F3, or waited for its end, F4). A late mark removes, and takes a token upon which nobody stores: a writer that did
  not hear of its token settles without it. A nonce is sent once, so no token comes back.
- F6 *One life at a time is filled in.* A life is one server process with one history; the slow store knows which one is in use. Documents and the
  life in use are read from it in one step, and stored only in that life. A writer need not wait (F4) if after its commit the life in which it settled
  was in use, and had been for L: whoever read the slow store before the commit, and stores it elsewhere, read that another life was in use, hence
  more than L ago, and by F2 that has ended. What a writer stores is held to the same proof: it committed while its life was in use already, or else
  its token has ended.
- F7 *The age of a life counts from when everybody sees it*: it is noted by a second step, when the adoption is committed. Who finds
  another life than the one in use has it adopted, at most once in 2 L: two servers that are both in use make writers wait, and no more.
- F8 *Leases of different lengths mix*: the slow store remembers the longest that was ever used, which is the L of all who wait.
- F9 *What a key left is acknowledged as a commit is*, and so is what a write found to be so already: the one who committed may have been stopped
  before it could settle, or is still waiting.
- F10 *Two slow stores may share a fast one*, by mistake and under one prefix: a document says of which store it is, and another's is a miss.

Assumed: the clocks of Redis and PostgreSQL, which may be wrong, are not set back or forth by much while they run (a Redis that is set back by more
than L only misses, by less than L it may keep a document for as long), and *all* who write go through this class: a program that writes to the slow store
alone is seen up to L later. Not promised, as docs/storage.md tells users: before a commit is acknowledged, one read may
see it and a later one the older state.
"""

from __future__ import annotations

import asyncio
import contextlib
import datetime as dt
import logging
import time
from collections.abc import AsyncIterator, Hashable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar, NamedTuple, Protocol, runtime_checkable

from typing_extensions import override

from ...errors import ConfigError, CrudError, OutcomeUnknown, StoreDamaged
from ...query import Query
from ..basic import (
    AlreadyCommitted,
    Change,
    CommitResult,
    Encoding,
    Findings,
    Hit,
    IdempotentCommit,
    MetaStore,
    ModelSpec,
    Page,
    Reindex,
    ResourceMeta,
    RevisionInfo,
)
from ..contract.metadata_codec import encoder, meta_of
from ..contract.overrides import check_meta_store
from ..contract.protocols import FindingsKeeping, Freshness, IndexMigration, MetaSweeping
from ..contract.store_errors import missing
from ..runtime.threads import shielded

if TYPE_CHECKING:
    from ..backends.redis.lease import Lease, Leases

log = logging.getLogger("crudstack.fast_slow")

SKIP_S = 1.0
"""How long reads go around a fast store that did not answer."""
LONGEST_LEASE_S = 60.0

_encode = encoder(Encoding.msgpack)


class Fence(NamedTuple):
    """Which life of a fast store is in use.

    life     None if there never was one
    lease_s  the longest lease that was ever used
    age_s    for how long everybody has seen this life at least; infinite if there was none before it, negative if that is not known yet
    store    what the slow store calls itself, drawn at its birth
    """

    server_epoch: str | None
    lease_s: float
    age_s: float
    store: str = ""


@runtime_checkable
class Slow(IndexMigration, FindingsKeeping, MetaSweeping, Protocol):
    """What a slow store must do besides. Every process sees the same."""

    async def get_fenced(self, resource_id: str) -> tuple[Fence, ResourceMeta | None]:
        """The fence and the metadata (None if it is not there), both as they were at one moment after the call began."""

    async def fence(self) -> Fence:
        """The fence as it was at a moment after the call began."""

    async def adopt(self, server_epoch: str, lease_s: float, min_age_s: float) -> Fence:
        """Make this the life in use, with leases of this length or more, unless it is or the one in use is younger than `min_age_s`. Then see to
        it that the age is known. The fence afterwards."""


@runtime_checkable
class Fast(Protocol):
    """What a fast store must do: all processes share it."""

    def leases(self, lease_s: float) -> Leases: ...


class FastSlowMetaStore(MetaStore, Freshness, IndexMigration, FindingsKeeping, MetaSweeping):
    """
    fast_store  a RedisMetaStore, of which only the cache is used; any `maxmemory-policy` will do, and nothing need be kept on its disk
    slow_store  a PostgresMetaStore
    lease_s     how long a write waits where the fast store cannot be asked, and how long a document may be read from it without another look
    """

    may_be_stale: ClassVar[bool] = False

    def __init__(self, fast_store: MetaStore, slow_store: MetaStore, *, lease_s: float = 2.0) -> None:
        if not isinstance(fast_store, Fast):
            raise ConfigError(
                f"{type(fast_store).__name__} cannot be a fast_store: all processes must share it, as a RedisMetaStore"
            )
        if not isinstance(slow_store, Slow):
            raise ConfigError(
                f"{type(slow_store).__name__} cannot be a slow_store: it does not keep which fast store is in use, as a PostgresMetaStore does"
            )
        if not 0 < lease_s <= LONGEST_LEASE_S:
            raise ConfigError(f"lease_s is {lease_s!r}; expected seconds, more than 0 and at most {LONGEST_LEASE_S:g}")
        self._fast, self._slow, self._fences = fast_store, slow_store, slow_store
        self._lease_s, self._leases = lease_s, fast_store.leases(lease_s)
        self._longest_s = lease_s  # of the leases that we know of
        self._seal: bytes | None = None  # what our documents begin with; None until the fence was read
        self._skip_until = self._adopt_after = float("-inf")

    @property
    @override
    def durable(self) -> bool:  # type: ignore[override] # of a class elsewhere, here of the store that is given
        return self._slow.durable

    @property
    @override
    def remote(self) -> bool:  # type: ignore[override] # the same
        return self._slow.remote

    @override
    def bind(self, spec: ModelSpec) -> None:
        check_meta_store(self._fast)
        check_meta_store(self._slow)
        self._fast.bind(spec)
        self._slow.bind(spec)

    @property
    @override
    def location_key(self) -> Hashable:
        return self._slow.location_key

    # Reading

    @override
    async def get(self, resource_id: str) -> ResourceMeta:
        await self._acquainted()
        found = await self._look(resource_id)
        if isinstance(found, ResourceMeta):
            return found
        if found is None:
            return await self._slow.get(resource_id)
        fence, meta = await self._fences.get_fenced(resource_id)
        if not self._in_use(found.server_epoch, self._seen(fence)):
            with contextlib.suppress(CrudError):
                await self._adopt(found.server_epoch, fence)
        elif meta is not None:
            with self._skipping():
                await self._leases.fill(resource_id, found, self._sealed(meta))
        if meta is None:
            raise missing(resource_id)
        return meta

    async def _look(self, resource_id: str) -> ResourceMeta | Lease | None:
        """What the fast store has; a token to fill it in with, or None."""
        found: bytes | Lease | None = None
        if time.monotonic() >= self._skip_until:
            with self._skipping():
                found = await self._leases.read(resource_id)
        if not isinstance(found, bytes):
            return found
        if self._seal is None or not found.startswith(self._seal):  # F10
            return None
        try:
            return meta_of(found[len(self._seal) :])
        except StoreDamaged:  # a copy; or one of a program that knows other metadata
            return None

    @contextlib.contextmanager
    def _skipping(self) -> Iterator[None]:
        """What the fast store does not do is not done."""
        try:
            yield
        except CrudError:
            self._skip_until = time.monotonic() + SKIP_S

    @override
    async def done(self, key: str, *, peek: bool = False) -> CommitResult | None:
        done = await self._slow.done(key, peek=peek)
        if done is not None:
            await self._end_write_of_key(done)
        return done

    @override
    async def peek(self, resource_id: str) -> ResourceMeta:
        return await self.get(resource_id)

    @override
    async def catch_up(self) -> None:
        """Do nothing: a `get` sees every acknowledged commit (F3, F4), and all other reads are the slow store's."""

    @override
    async def confirm(self, resource_ids: Sequence[str]) -> None:
        await self._end_write(dict.fromkeys(resource_ids, b""), None)

    # Writing

    @override
    async def commit(self, changes: Sequence[Change], once: IdempotentCommit | None = None) -> list[ResourceMeta]:
        # Goes on where the one who asked does not: what was committed is settled.
        return await shielded(asyncio.ensure_future(self._commit(list(changes), once)))

    async def _acquainted(self) -> None:
        """Know the slow store, and with it the longest lease, before anything is read from the fast one or has to be waited for."""
        if self._seal is None:
            self._seen(await self._fences.fence())

    def _sealed(self, meta: ResourceMeta) -> bytes:
        return (self._seal or b"") + _encode(meta)

    async def _commit(self, changes: list[Change], once: IdempotentCommit | None) -> list[ResourceMeta]:
        await self._acquainted()
        resource_ids = list(dict.fromkeys(change.meta.resource_id for change in changes))
        lease = None
        if resource_ids and time.monotonic() >= self._skip_until:
            with self._skipping():
                lease = await self._leases.begin_write(resource_ids)
        try:
            committed = await self._slow.commit(changes, once)
        except OutcomeUnknown:
            raise  # it may still come: whoever read before it finds no token
        except AlreadyCommitted as before:
            await self._end_write_of_key(before.done, resource_ids)
            raise
        except CrudError:
            if lease is not None:
                with self._skipping():
                    await self._leases.cancel_write(resource_ids, lease)
            raise
        if changes:
            left = {
                meta.resource_id: b"" if change.purge else self._sealed(meta)
                for change, meta in zip(changes, committed, strict=True)
            }
            await self._end_write(left, lease)
        return committed

    async def _end_write_of_key(self, done: CommitResult, resource_ids: Sequence[str] = ()) -> None:
        """Settle what a key left (F9). Of a purge it does not tell which resource it was, so that is waited for."""
        left = [*resource_ids, *(meta.resource_id for meta in done.results if meta is not None)]
        await self._end_write(dict.fromkeys(left, b""), None, wait=None in done.results)

    async def _end_write(self, left: Mapping[str, bytes], lease: Lease | None, *, wait: bool = False) -> None:
        """Return when nothing of before what was just committed can be read from any fast store. `left`: the documents, b"" for none."""
        began = time.monotonic()
        fence: Fence | None = None
        server_epoch: str | None = None
        with contextlib.suppress(CrudError):
            fence = self._seen(await self._fences.fence())
        # Here the life has to be proven, for the fence was not read in the step that committed.
        if lease is not None and not (
            self._in_use(lease.server_epoch, fence) and self._proven(lease.server_epoch, fence)
        ):
            lease = None
        with self._skipping():
            server_epoch = await self._leases.end_write(left, lease)
            self._skip_until = float("-inf")
        if server_epoch is not None and fence is not None:
            if not self._proven(server_epoch, fence):
                with contextlib.suppress(CrudError):
                    fence = await self._adopt(server_epoch, fence)
            if self._proven(server_epoch, fence) and not wait:
                return
        await asyncio.sleep(began + _surely(self._longest_s) - time.monotonic())

    def _in_use(self, server_epoch: str, fence: Fence | None) -> bool:
        """Whether documents may be stored in this life (F6)."""
        return fence is not None and fence.server_epoch == server_epoch and fence.lease_s >= self._lease_s

    def _proven(self, server_epoch: str, fence: Fence | None) -> bool:
        """Whether nothing from before the fence was read can be found in any other life (F6)."""
        return fence is not None and fence.server_epoch == server_epoch and fence.age_s >= _surely(self._longest_s)

    def _seen(self, fence: Fence) -> Fence:
        self._longest_s = max(self._longest_s, fence.lease_s)
        self._seal = fence.store.encode()
        return fence

    async def _adopt(self, server_epoch: str, fence: Fence) -> Fence:
        """The fence, once this life was adopted if there was a reason to."""
        if (self._in_use(server_epoch, fence) and fence.age_s >= 0) or time.monotonic() < self._adopt_after:
            return fence
        log.info("a fast store is taken into use that was not, or was restarted")
        fence = self._seen(await self._fences.adopt(server_epoch, self._lease_s, 2 * _surely(self._longest_s)))
        if fence.server_epoch != server_epoch:
            self._adopt_after = time.monotonic() + self._longest_s / 2
        return fence

    # All that is the slow store's

    @override
    async def revision(self, resource_id: str, revision: int) -> RevisionInfo:
        return await self._slow.revision(resource_id, revision)

    @override
    async def revisions(self, resource_id: str, before: int | None = None, limit: int = 50) -> Page[RevisionInfo]:
        return await self._slow.revisions(resource_id, before, limit)

    @override
    async def search(self, query: Query) -> Page[Hit]:
        return await self._slow.search(query)

    @override
    async def count(self, query: Query) -> int:
        return await self._slow.count(query)

    @override
    def scan(self) -> AsyncIterator[ResourceMeta]:
        return self._slow.scan()

    @override
    async def unreferenced(self, uids: Sequence[str]) -> list[str]:
        return await self._slow.unreferenced(uids)

    @override
    async def outdated(self, limit: int) -> list[ResourceMeta]:
        return await self._slow.outdated(limit)

    @override
    async def reindex(self, entries: Sequence[Reindex], *, share: bool = False) -> None:
        await self._slow.reindex(entries, share=share)

    @override
    async def findings(self) -> Findings:
        return await self._slow.findings()

    @override
    async def keep_findings(self, findings: Findings) -> None:
        await self._slow.keep_findings(findings)

    @override
    async def activate_unique_fields(self, *, force: bool = False) -> bool:
        return await self._slow.activate_unique_fields(force=force)

    @override
    async def deactivate_unique_field(self, name: str) -> None:
        await self._slow.deactivate_unique_field(name)

    @override
    async def generation(self) -> int:
        return await self._slow.generation()

    @override
    async def advance_generation(self) -> int:
        return await self._slow.advance_generation()

    # Keeping house

    @override
    async def health(self) -> None:
        await self._slow.health()

    @override
    async def degradations(self) -> list[str]:
        slower = f"reads come from the slow store, and writes wait {_surely(self._longest_s):.1f} s"
        found = await self._slow.degradations()
        try:
            server_epoch = await self._leases.server_epoch()
        except CrudError:
            return [*found, f"Redis cannot be reached: {slower}"]
        if server_epoch is None:
            return [*found, f"Redis does not tell scripts its run_id and master_replid (INFO): {slower}"]
        fence = await self._adopt(server_epoch, self._seen(await self._fences.fence()))
        if fence.server_epoch != server_epoch:
            return [*found, f"other processes use another Redis, or did so a moment ago: {slower}"]
        return found

    @override
    async def maintain(self, budget_s: float) -> None:
        await self._slow.maintain(budget_s)

    @override
    async def purge_remnants(self, now: dt.datetime) -> dt.datetime:
        """What was purged left the fast store when that was acknowledged."""
        return await self._slow.purge_remnants(now)

    @override
    async def close(self) -> None:
        await self._leases.close()
        await self._fast.close()
        await self._slow.close()


def _surely(lease_s: float) -> float:
    """So long that by another clock a lease has passed, which may run slower by a few per cent."""
    return lease_s * 1.05 + 0.1
