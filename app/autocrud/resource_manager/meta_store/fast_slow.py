"""FastSlowMetaStore: a read-through cache in front of a durable store, for `get`.

    fast_store = RedisMetaStore(redis_url, prefix="article:")
    FastSlowMetaStore(fast_store, PostgresMetaStore(pg_dsn, table_name="meta_article"))

A `get` that begins after a commit was acknowledged returns the state of this commit or a later one, even if the cache
loses entries or returns old ones. If the cache fails, reads and writes become slower, and nothing else changes.
`docs/design/fast-slow.md` explains the protocol, and why each failure is safe. Invariants (L is the lease time):

- F1 *An entry expires with its lease, and a lease expires L after it was granted.*
- F2 *An entry is stored only under the lease that was granted before its document was read or committed.*
- F3 *After END_WRITE, its server has no entry from before the commit.*
- F4 *L after a commit, no server has an entry from before it.*
- F5 *Late commands are harmless.*
- F6 *Entries are stored in one server epoch at a time.*
- F7 *The age of an epoch counts from the moment at which every process sees it.*
- F8 *Leases of different lengths can be mixed.* Writers wait for the longest one that was ever used.
- F9 *A repeated request with an Idempotency-Key, or one that changes nothing, is acknowledged like a commit.*
- F10 *Two slow stores may share a fast store by mistake.* An entry of another slow store is a cache miss.
"""

from __future__ import annotations

import asyncio
import contextlib
import datetime as dt
import logging
import time
from collections.abc import AsyncIterator, Hashable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager
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
from ..contract.blobs import BlobRows
from ..contract.import_journal import ImportKeeping
from ..contract.loading import BulkLoading, Loader, LoaderAround
from ..contract.metadata_codec import encoder, meta_of
from ..contract.overrides import check_meta_store
from ..contract.protocols import FindingsKeeping, Freshness, IndexMigration, MetaSweeping
from ..contract.snapshots import Pinning, SnapshotReading
from ..contract.store_errors import missing
from ..runtime.threads import shielded
from .slow_blobs import BlobsAndSnapshots, SlowBlobs
from .slow_imports import SlowImports

if TYPE_CHECKING:
    from ..backends.redis.lease import Lease, Leases

log = logging.getLogger("crudstack.fast_slow")

SKIP_S = 1.0
"""Seconds for which reads bypass a fast store that did not answer."""
LONGEST_LEASE_S = 60.0

_encode = encoder(Encoding.msgpack)


class Fence(NamedTuple):
    """The server epoch of the fast store that is in use, as the slow store knows it.

    server_epoch  None if there never was one
    lease_s       the longest lease time that was ever used, in seconds
    age_s         for how many seconds at least every process has seen this epoch. Infinite if it is the first one,
                  negative if the age is not known yet
    store         the id of the slow store, which it drew when it was made
    """

    server_epoch: str | None
    lease_s: float
    age_s: float
    store: str = ""


@runtime_checkable
class Slow(
    IndexMigration,
    FindingsKeeping,
    MetaSweeping,
    BlobRows,
    Pinning,
    SnapshotReading,
    ImportKeeping,
    BulkLoading,
    Protocol,
):
    """The abilities that a slow store needs. All processes see the same state of it."""

    async def get_fenced(self, resource_id: str) -> tuple[Fence, ResourceMeta | None]:
        """Return the fence and the metadata (None if there are none), read in one step after the call began."""

    async def fence(self) -> Fence:
        """Return the fence, read after the call began."""

    async def adopt(self, server_epoch: str, lease_s: float, min_age_s: float) -> Fence:
        """Make this the epoch in use, with leases of at least this length, and return the new fence.

        Does nothing if it is in use already, or if the epoch in use is younger than `min_age_s` seconds. In any case,
        a second step notes the age if it is not known yet.
        """


@runtime_checkable
class Fast(Protocol):
    """The ability that a fast store needs. All processes share it."""

    def leases(self, lease_s: float) -> Leases:
        """Return the cache of this store, with leases of this many seconds."""


class FastSlowMetaStore(
    MetaStore,
    Freshness,
    IndexMigration,
    FindingsKeeping,
    MetaSweeping,
    SlowBlobs,
    SlowImports,
    BulkLoading,
):
    """A durable MetaStore with a cache for `get` in front.

    fast_store  a RedisMetaStore, of which only the cache is used. It needs no persistence, and any `maxmemory-policy`
                works
    slow_store  a PostgresMetaStore
    lease_s     seconds that a write waits if the fast store does not answer, and for which a cached entry is valid
    """

    may_be_stale: ClassVar[bool] = False

    def __init__(self, fast_store: MetaStore, slow_store: MetaStore, *, lease_s: float = 2.0) -> None:
        if not isinstance(fast_store, Fast):
            raise ConfigError(
                f"{type(fast_store).__name__} cannot be a fast_store: all processes must share it, as a RedisMetaStore"
            )
        if not isinstance(slow_store, Slow):
            raise ConfigError(
                f"{type(slow_store).__name__} cannot be a slow_store: it does not keep which fast store is in use, or"
                " lacks another ability that a PostgresMetaStore has"
            )
        if not 0 < lease_s <= LONGEST_LEASE_S:
            raise ConfigError(f"lease_s is {lease_s!r}; expected seconds, more than 0 and at most {LONGEST_LEASE_S:g}")
        self._fast, self._slow, self._fences = fast_store, slow_store, slow_store
        self._lease_s, self._leases = lease_s, fast_store.leases(lease_s)
        self._longest_s = lease_s  # the longest lease time that this process knows
        self._store_id_prefix: bytes | None = (
            None  # the id of the slow store, with which its entries begin; None until the fence was read
        )
        self._skip_until = self._adopt_after = float("-inf")

    @property
    @override
    def _import_keeping(self) -> ImportKeeping:
        return self._slow

    @property
    @override
    def _slow_blobs(self) -> BlobsAndSnapshots:
        return self._slow

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
        await self._learn_store_id()
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
                await self._leases.fill(resource_id, found, self._cache_value(meta))
        if meta is None:
            raise missing(resource_id)
        return meta

    async def _look(self, resource_id: str) -> ResourceMeta | Lease | None:
        """Return the cached metadata, or a lease under which they may be cached, or None."""
        found: bytes | Lease | None = None
        if time.monotonic() >= self._skip_until:
            with self._skipping():
                found = await self._leases.read(resource_id)
        if not isinstance(found, bytes):
            return found
        if self._store_id_prefix is None or not found.startswith(self._store_id_prefix):  # F10
            return None
        try:
            return meta_of(found[len(self._store_id_prefix) :])
        except StoreDamaged:  # damaged, or written by a program with other metadata
            return None

    @contextlib.contextmanager
    def _skipping(self) -> Iterator[None]:
        """Suppress errors of the fast store, and bypass it for a while."""
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
        # Runs to completion even if the caller is cancelled, so that END_WRITE follows each commit.
        return await shielded(asyncio.ensure_future(self._commit(list(changes), once)))

    async def _learn_store_id(self) -> None:
        """Read the fence before the first use of the fast store, for the id of the slow store and the lease time."""
        if self._store_id_prefix is None:
            self._seen(await self._fences.fence())

    def _cache_value(self, meta: ResourceMeta) -> bytes:
        """Return the entry of the fast store for this metadata."""
        return (self._store_id_prefix or b"") + _encode(meta)

    async def _commit(self, changes: list[Change], once: IdempotentCommit | None) -> list[ResourceMeta]:
        await self._learn_store_id()
        resource_ids = list(dict.fromkeys(change.meta.resource_id for change in changes))
        lease = None
        if resource_ids and time.monotonic() >= self._skip_until:
            with self._skipping():
                lease = await self._leases.begin_write(resource_ids)
        try:
            committed = await self._slow.commit(changes, once)
        except OutcomeUnknown:
            raise  # the commit may still happen; readers from before it find no lease
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
                meta.resource_id: b"" if change.purge else self._cache_value(meta)
                for change, meta in zip(changes, committed, strict=True)
            }
            await self._end_write(left, lease)
        return committed

    async def _end_write_of_key(self, done: CommitResult, resource_ids: Sequence[str] = ()) -> None:
        """End the write of an earlier commit (F9). Waits if it purged any, because results do not name them."""
        left = [*resource_ids, *(meta.resource_id for meta in done.results if meta is not None)]
        await self._end_write(dict.fromkeys(left, b""), None, wait=None in done.results)

    async def _end_write(self, left: Mapping[str, bytes], lease: Lease | None, *, wait: bool = False) -> None:
        """Return when no fast store has an entry from before the commit. `left`: new documents by id, b"" for none."""
        began = time.monotonic()
        fence: Fence | None = None
        server_epoch: str | None = None
        with contextlib.suppress(CrudError):
            fence = self._seen(await self._fences.fence())
        # The epoch must be proven here, because the fence was not read in the step that committed.
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
        await asyncio.sleep(began + _with_margin(self._longest_s) - time.monotonic())

    def _in_use(self, server_epoch: str, fence: Fence | None) -> bool:
        """Return whether entries may be stored in this epoch (F6)."""
        return fence is not None and fence.server_epoch == server_epoch and fence.lease_s >= self._lease_s

    def _proven(self, server_epoch: str, fence: Fence | None) -> bool:
        """Return whether no other epoch has an entry from before the fence was read (F6)."""
        return fence is not None and fence.server_epoch == server_epoch and fence.age_s >= _with_margin(self._longest_s)

    def _seen(self, fence: Fence) -> Fence:
        self._longest_s = max(self._longest_s, fence.lease_s)
        self._store_id_prefix = fence.store.encode()
        return fence

    async def _adopt(self, server_epoch: str, fence: Fence) -> Fence:
        """Adopt this epoch if it is not in use, or its age is not known. Return the fence afterwards."""
        if (self._in_use(server_epoch, fence) and fence.age_s >= 0) or time.monotonic() < self._adopt_after:
            return fence
        log.info("the fast store has a new server epoch; it is adopted")
        fence = self._seen(await self._fences.adopt(server_epoch, self._lease_s, 2 * _with_margin(self._longest_s)))
        if fence.server_epoch != server_epoch:
            self._adopt_after = time.monotonic() + self._longest_s / 2
        return fence

    # Methods of the slow store

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

    # Imports

    @override
    @asynccontextmanager
    async def load(self, pin: str, *, size: int = 0) -> AsyncIterator[Loader]:
        async with self._slow.load(pin, size=size) as loader:
            yield LoaderAround(loader, self._until_leases_expire)

    @asynccontextmanager
    async def _until_leases_expire(self) -> AsyncIterator[None]:
        """Wait after a load (F4). A process may have purged a resource of an equal id and ended before END_WRITE."""
        yield
        await self._learn_store_id()
        await asyncio.sleep(_with_margin(self._longest_s))

    # Maintenance

    @override
    async def health(self) -> None:
        await self._slow.health()

    @override
    async def degradations(self) -> list[str]:
        slower = f"reads come from the slow store, and writes wait {_with_margin(self._longest_s):.1f} s"
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
        """Ask the slow store. The fast store has no purged data since the purge was acknowledged (F3, F4)."""
        return await self._slow.purge_remnants(now)

    @override
    async def close(self) -> None:
        await self._leases.close()
        await self._fast.close()
        await self._slow.close()


def _with_margin(lease_s: float) -> float:
    """Return the seconds after which a lease has expired on every server, whose clock may run a few per cent slower."""
    return lease_s * 1.05 + 0.1
