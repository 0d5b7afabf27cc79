"""S3SqliteMetaStore: a SQLite index whose durable home is S3. The protocol is in `s3_sqlite`.

S3SqliteMetaStore(bucket="my-app", key="meta/article.sqlite")
"""

from __future__ import annotations

import asyncio
import datetime as dt
import hashlib
import logging
import time
import weakref
from collections.abc import AsyncIterator, Callable, Hashable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar

import apsw
from typing_extensions import override

from ...errors import ConfigError, CrudError, StoreUnavailable
from ...query import Query
from ...secret import Secret
from ..backends.s3.object_store import ObjectStore, s3
from ..backends.s3_sqlite.committer import HeadEdit, S3Committer
from ..backends.s3_sqlite.head import Head, IndexSchema
from ..backends.s3_sqlite.housekeeping import Housekeeping
from ..backends.s3_sqlite.local_copy import HeadState
from ..backends.s3_sqlite.pins import HeadPins
from ..backends.s3_sqlite.replica import Replica
from ..backends.s3_sqlite.write_requests import AddBlob, RemoveBlobs, WriteRequest
from ..backends.sqlite import blob_tables
from ..backends.sqlite.database import LONGEST_SNAPSHOT
from ..backends.sqlite.loading import remove_abandoned_loads
from ..backends.sqlite.tables import ResourceTables
from ..basic import (
    BlobRow,
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
from ..contract.blobs import BlobRows, BlobUsage, BlobUse
from ..contract.import_journal import forget_purged
from ..contract.protocols import FindingsKeeping, Freshness, IndexMigration, MetaSweeping
from .s3_imports import S3ImportKeeping
from .s3_loading import S3Loading
from .s3_pinning import S3Pinning
from .simple import SCAN_PAGE

T = TypeVar("T")

log = logging.getLogger("crudstack.s3sqlite")

Consistency = Literal["strong", "bounded", "local"]
MAX_EDITS = 50


class S3SqliteMetaStore(
    MetaStore, S3Pinning, S3ImportKeeping, S3Loading, Freshness, IndexMigration, FindingsKeeping, MetaSweeping, BlobRows
):
    """A MetaStore in a SQLite database whose durable form is a log and snapshots on S3.

    bucket, key        all objects lie below `{key}/`. A plain database that `export` wrote to `key` itself is imported
                       once. A function makes the key of the bound model
    endpoint_url ...   the address and keys of the S3 server. Without keys the ambient credentials are used, session
                       token included
    encoding           the encoding of metadata documents in the local copy
    auto_sync          must be True: a write is durable before it is acknowledged
    sync_interval      seconds from a write to the merges and snapshots that are due. None: only `maintain` makes them.
                       It does not affect durability. It is the default of max_staleness
    enable_locking     must be True: the conditional PUT of HEAD cannot be turned off
    consistency        what reads see. "strong": a read sees every write that was acknowledged before it began.
                       "bounded": the same, unless the last check of HEAD was sent less than `max_staleness` seconds
                       ago. "local": a read sees the writes that this instance knows
    max_staleness      seconds, or a function that is called at each read
    tail_bytes         how many bytes of the newest records each write contains
    max_batch          how many transactions share one PUT of HEAD at most
    linger_ms          milliseconds that the first transaction of a batch waits for others
    snapshot_ratio     a snapshot is made when the log is larger than the last snapshot times this ratio
    local_dir          the local copy lies below it, in a directory named after bucket and key. Processes may share it.
                       For one endpoint only, and never on a network file system. None: a temporary directory
    export_key         where `export` writes
    object_store       instead of bucket and endpoint
    """

    durable: ClassVar[bool] = True
    remote: ClassVar[bool] = True
    may_be_stale: ClassVar[bool] = True

    def __init__(
        self,
        bucket: str,
        key: str | Callable[[ModelSpec], str],
        endpoint_url: str | Secret | None = None,
        access_key_id: str | None = None,
        secret_access_key: str | Secret | None = None,
        region_name: str | None = None,
        encoding: Encoding | None = None,
        auto_sync: bool = True,
        sync_interval: float | None = 5.0,
        enable_locking: bool = True,
        *,
        consistency: Consistency = "strong",
        max_staleness: float | Callable[[], float] | None = None,
        tail_bytes: int = 32768,
        max_batch: int = 500,
        linger_ms: float = 0,
        snapshot_ratio: float = 0.5,
        local_dir: str | Path | None = None,
        export_key: str | None = None,
        object_store: ObjectStore | None = None,
    ) -> None:
        if not enable_locking:
            raise ValueError("enable_locking=False: the swap cannot be turned off, writers would overwrite each other")
        if not auto_sync:
            raise ValueError(
                "auto_sync=False: a write that is not in S3 is not acknowledged; use `batch` to write many at once"
            )
        if consistency not in ("strong", "bounded", "local"):
            raise ValueError(f"consistency: expected strong, bounded or local, got {consistency!r}")
        if export_key == key:
            raise ValueError("export_key must not be key: what lies there is imported")
        if tail_bytes < 1024 or max_batch < 1 or snapshot_ratio <= 0:
            raise ValueError("expected tail_bytes >= 1024, max_batch >= 1 and snapshot_ratio > 0")
        self._objects = object_store or s3(bucket, endpoint_url, access_key_id, secret_access_key, region_name)
        self._key_of = key if callable(key) else lambda _: key
        self._bucket, self._local_dir = bucket, None if local_dir is None else Path(local_dir)
        self._encoding, self._export_key = encoding, export_key
        self._interval = sync_interval
        self._consistency = consistency
        staleness = max_staleness if max_staleness is not None else (sync_interval or 0.0)
        self._staleness: Callable[[], float] = staleness if callable(staleness) else lambda: staleness
        self._tail_bytes, self._max_batch, self._linger_s = tail_bytes, max_batch, linger_ms / 1000
        self._ratio = snapshot_ratio
        self._loop_states: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, _LoopState] = (
            weakref.WeakKeyDictionary()
        )
        self.bind(ModelSpec("unbound"))

    @override
    def bind(self, spec: ModelSpec) -> None:
        self.key = self._key_of(spec).rstrip("/")
        name = hashlib.sha256(f"{self._bucket}\n{self.key}".encode()).hexdigest()[:16]
        self._directory = None if self._local_dir is None else self._local_dir / name
        self._spec = spec
        self._tables = self._new_tables()
        self._replica = Replica(self._objects, self.key, self._tables, self._directory)
        self._pins = HeadPins(self._replica, self._edit)

    @property
    def local_directory(self) -> Path | None:
        """Return the directory of the local copy, where a fork is recorded, or None if it is temporary."""
        return self._directory

    @property
    def object_store(self) -> ObjectStore:
        """Return the client of the bucket."""
        return self._objects

    @property
    @override
    def location_key(self) -> Hashable:
        return "s3", self._objects, self.key

    @property
    def kept_copy(self) -> Path | None:
        """Return the directory of the local copy if it outlives this process and remembers a HEAD, else None."""
        try:
            return self._directory if self._replica.copy.state().store else None
        except (StoreUnavailable, apsw.Error):  # not open, or torn
            return None

    def _loop_state(self) -> _LoopState:
        """Return the state of the running event loop."""
        loop = asyncio.get_running_loop()
        loop_state = self._loop_states.get(loop)
        if loop_state is None:
            loop_state = self._loop_states.setdefault(
                loop,
                _LoopState(
                    self._replica, self._tail_bytes, self._max_batch, self._linger_s, self._ratio, self._interval
                ),
            )
        return loop_state

    # Reading

    async def _read(self, work: Callable[[apsw.Connection], T], *, quick: bool = False) -> T:
        """Read the local copy, after it is as new as `consistency` requires. `Replica.read` explains `quick`."""
        replica, loop_state = self._replica, self._loop_state()
        await replica.open()
        if self._consistency == "strong" or replica.unapplied_version:
            await replica.coalesced_check()
        elif self._consistency == "bounded":
            now, staleness = loop_state.loop.time(), self._staleness()
            if staleness <= 0 or now - loop_state.checked_at > staleness:
                await replica.coalesced_check()
                loop_state.checked_at = now  # when it was sent, or earlier
        return await replica.read(work, quick=quick)

    @override
    async def get(self, resource_id: str) -> ResourceMeta:
        return await self._read(lambda db: self._tables.get(db, resource_id), quick=True)

    @override
    async def peek(self, resource_id: str) -> ResourceMeta:
        await self._replica.open()
        return await self._replica.read(lambda db: self._tables.get(db, resource_id), quick=True)

    @override
    async def done(self, key: str, *, peek: bool = False) -> CommitResult | None:
        await self._replica.open()
        if not peek:  # with every `consistency`, because a request whose key is not found is carried out
            await self._replica.coalesced_check()
        return await self._replica.read(lambda db: self._tables.results.read(db, key), quick=True)

    @override
    async def revision(self, resource_id: str, revision: int) -> RevisionInfo:
        return await self._read(lambda db: self._tables.revision(db, resource_id, revision), quick=True)

    @override
    async def revisions(self, resource_id: str, before: int | None = None, limit: int = 50) -> Page[RevisionInfo]:
        return await self._read(lambda db: self._tables.revisions(db, resource_id, before, limit))

    @override
    async def search(self, query: Query) -> Page[Hit]:
        return await self._read(lambda db: self._tables.search(db, query))

    @override
    async def count(self, query: Query) -> int:
        return await self._read(
            lambda db: self._tables.count(db, query), quick=query.where is None and not query.include_deleted
        )

    @override
    async def scan(self) -> AsyncIterator[ResourceMeta]:
        after = ""
        while page := await self._read(partial(self._tables.scan, after=after, limit=SCAN_PAGE)):
            for meta in page:
                yield meta
            after = page[-1].resource_id

    @override
    async def refresh(self) -> None:
        """Update the local copy to all writes that are acknowledged now."""
        await self._replica.open()
        await self._replica.coalesced_check()

    @override
    async def catch_up(self) -> None:
        if self._consistency != "strong":
            await self.refresh()

    @override
    async def confirm(self, resource_ids: Sequence[str]) -> None:
        """Do nothing: the local copy contains only commits that are in S3."""

    @override
    async def unreferenced(self, uids: Sequence[str]) -> list[str]:
        await self.refresh()  # with every `consistency`, because the bodies that are found here are removed
        return await self._replica.read(lambda db: self._tables.unreferenced(db, uids))

    @override
    async def outdated(self, limit: int) -> list[ResourceMeta]:
        return await self._read(lambda db: self._tables.outdated(db, limit))

    @override
    async def generation(self) -> int:
        return await self._read(self._tables.generation)

    @override
    async def health(self) -> None:
        await self.refresh()

    # Writing

    @override
    async def commit(self, changes: Sequence[Change], once: IdempotentCommit | None = None) -> list[ResourceMeta]:
        await forget_purged(self, changes)
        return await self._write(WriteRequest(changes=changes, once=once))

    async def _write(self, work: WriteRequest) -> list[Any]:
        await self._replica.open()
        return await self._loop_state().commit(work)

    @override
    async def reindex(self, entries: Sequence[Reindex], *, share: bool = False) -> None:
        await self._write(WriteRequest(entries=entries, share=share))

    @override
    async def findings(self) -> Findings:
        return (await self.head()).findings

    @override
    async def keep_findings(self, findings: Findings) -> None:
        await self._replica.open()
        await self._loop_state().committer.edit(lambda head: head.next(findings=findings))

    @override
    async def activate_unique_fields(self, *, force: bool = False) -> bool:
        if await self._read(self._tables.stale):
            await self._replica.blocking(lambda copy: copy.mark_up_to_date())
        known = (await self._replica.head()).schema.unique
        if set(self._tables.spec.unique) <= set(known):
            return True
        await self.refresh()
        state, schema = await self._replica.blocking(lambda copy: copy.schema_with_unique_fields(force=force))
        return schema is not None and await self._replace_schema(state, schema)

    @override
    async def deactivate_unique_field(self, name: str) -> None:
        for _ in range(MAX_EDITS):
            await self.refresh()
            state, schema = await self._replica.blocking(lambda copy: copy.schema_without_unique_field(name))
            if schema is None or await self._replace_schema(state, schema):
                return

    @override
    async def _edit(self, edit: HeadEdit) -> Head | None:
        return await self._loop_state().committer.edit(edit)

    async def _replace_schema(self, state: HeadState, schema: IndexSchema) -> bool:
        """Return False if HEAD has changed since `state`, so the schema was made for another state."""

        def edit(head: Head) -> Head | None:
            return head.next(schema=schema) if head.ver == state.ver else None

        return await self._loop_state().committer.edit(edit) is not None

    @override
    def _new_tables(self, *, lazy: bool = False) -> ResourceTables:
        return ResourceTables(self._spec, self._encoding, lazy=lazy)

    @override
    def _workers(self) -> tuple[S3Committer, Housekeeping]:
        loop_state = self._loop_state()
        return loop_state.committer, loop_state.housekeeping

    @override
    async def advance_generation(self) -> int:
        await self._replica.open()
        await self._loop_state().committer.edit(lambda head: head.next(sweep=head.sweep + 1))
        return await self.generation()

    # Blobs

    @override
    async def blob_epoch(self) -> int:
        return await self._read(blob_tables.epoch, quick=True)

    @override
    async def add_blob(self, row: BlobRow, *, quota: int | None = None) -> None:
        await self._write(WriteRequest(blobs=AddBlob(row, quota)))

    @override
    async def blobs(self, sha256s: Sequence[str]) -> list[BlobRow]:
        return await self._read(lambda db: blob_tables.rows(db, sha256s), quick=len(sha256s) == 1)

    @override
    async def blob_uses(self, key: str, limit: int = 100) -> list[BlobUse]:
        return await self._read(lambda db: blob_tables.uses(db, key, limit))

    @override
    async def blob_usage(self) -> BlobUsage:
        return await self._read(blob_tables.usage, quick=True)

    @override
    async def remove_blobs(self, keys: Sequence[str]) -> list[str]:
        return await self._write(WriteRequest(blobs=RemoveBlobs(keys)))

    # Maintenance

    @override
    async def maintain(self, budget_s: float) -> None:
        """Make the merges and snapshots that are due, then remove objects that nothing refers to.

        Work that does not fit into `budget_s` seconds is left to the next call.
        """
        await self._replica.open()
        if self._directory is not None:
            await remove_abandoned_loads(self._directory)
        loop_state, deadline = self._loop_state(), time.monotonic() + budget_s
        if await self._read(lambda db: db.execute("SELECT 1 FROM purges LIMIT 1").get):
            await self._forget()  # the purging process was stopped before this step
        else:
            await self._replica.blocking(lambda copy: copy.checkpoint())  # of resources that other processes purged
        await loop_state.keep_house(deadline)
        if time.monotonic() < deadline:
            await loop_state.housekeeping.collect()

    @override
    async def purge_remnants(self, now: dt.datetime) -> dt.datetime:
        """Make a snapshot without the purged data, and remove the log and the snapshots before it.

        A bucket with versioning keeps the removed objects until its own rules remove them.
        """
        await self._replica.open()
        return now if await self._forget() else now + LONGEST_SNAPSHOT

    async def _forget(self) -> bool:
        loop_state = self._loop_state()
        await loop_state.housekeeping.snapshot(forget=True)
        await loop_state.housekeeping.collect()
        return await self._replica.blocking(lambda copy: copy.checkpoint())

    async def head(self) -> Head:
        """Return HEAD as this instance knows it."""
        await self._replica.open()
        return await self._replica.head()

    async def exists(self) -> bool:
        """Return whether the store, or a plain database to import, exists, without creating it."""
        async for _ in self._objects.list(f"{self.key}/"):
            return True
        return await self._objects.get(self.key) is not None

    async def export(self, path: str | Path | None = None) -> None:
        """Write the database as one plain SQLite file: to `path`, or as the object `export_key`."""
        await self._read(self._tables.generation)  # as new as `consistency` requires
        if path is not None:
            await self._replica.blocking(lambda copy: copy.export_to(Path(path)))
        elif self._export_key is None:
            raise ConfigError("export: give a path, or the store an export_key")
        else:
            await self._replica.export(self._export_key)

    @override
    async def close(self) -> None:
        loop = asyncio.get_running_loop()
        loop_state = self._loop_states.pop(loop, None)
        if loop_state is not None:
            await loop_state.close()
        await self._replica.close()


class _LoopState:
    """The parts of a store that belong to one event loop."""

    def __init__(
        self,
        replica: Replica,
        tail_bytes: int,
        max_batch: int,
        linger_s: float,
        ratio: float,
        interval: float | None,
    ) -> None:
        self.loop = asyncio.get_running_loop()
        self.checked_at = float("-inf")
        self.committer = S3Committer(replica, tail_bytes=tail_bytes, max_batch=max_batch, linger_s=linger_s)
        self.housekeeping = Housekeeping(replica, self.committer, snapshot_ratio=ratio, tail_bytes=tail_bytes)
        self._replica, self._interval = replica, interval
        self._keeping: asyncio.Task[None] | None = None

    async def commit(self, work: WriteRequest) -> list[Any]:
        committed = await self.committer.commit(work)
        if self._keeping is None and self._interval is not None:
            self._keeping = self.loop.create_task(self._keep_house_later(self._interval))
        return committed

    async def _keep_house_later(self, seconds: float) -> None:
        """Make merges and snapshots some time after a write. May be suspended with its loop at any point."""
        try:
            await asyncio.sleep(seconds)
            await self.keep_house(time.monotonic() + seconds)
        except CrudError as error:
            log.warning("housekeeping: %s", error)
        finally:
            self._keeping = None

    async def keep_house(self, deadline: float) -> None:
        while time.monotonic() < deadline and await self.housekeeping.step():
            pass

    async def close(self) -> None:
        if self._keeping is not None:
            self._keeping.cancel()
            await asyncio.wait([self._keeping])
        await self.committer.idle()
