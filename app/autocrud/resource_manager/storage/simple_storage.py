"""SimpleStorage: any MetaStore with any ResourceStore and any BlobStore.

    SimpleStorage(MemoryMetaStore(), DiskResourceStore("data/article"), DiskBlobStore("data/article/blobs"))

This module only composes others. These modules do the work, and state the invariants that they keep:

- `commits` and `disk_pair` commit (M1: a commit never names a body that is not stored),
- `sweeping` removes orphaned bodies (M2: a body that was swept cannot be committed),
- `dropped_bodies` removes bodies whose records were removed, and `blobs` stores and removes files (F1 to F4),
- `snapshots` reads one moment for exports (P1, P2). All removals obey pins, except those of a purge,
- `imports` keeps the journal of an import (J1 to J4),
- `opening` opens and rebuilds, `reindexing` completes the index (R1 to R5),
- `unique_values` reserves values of unique fields if the commit is a record on disk.

M3 *Exactly one step is the commit.* This module chooses it:

- If the MetaStore is authoritative, its commit is the commit.
- If it is not (memory), and the ResourceStore has an index beside the bodies (S3), this index replaces the MetaStore.
  The index is authoritative.
- If it is not, and the ResourceStore keeps records (disk), the record is the commit. The MetaStore applies the records
  in the order of their commits, and is rebuilt from them at start. One process owns such a store.
- If it is not, and the ResourceStore has neither (memory), the MetaStore's commit is the commit. It is not durable.
"""

from __future__ import annotations

import datetime as dt
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Hashable, Sequence
from contextlib import AbstractAsyncContextManager

from msgspec.structs import replace
from typing_extensions import override

from ...errors import ConfigError, CrudError, OutcomeUnknown, StaleGeneration, StoreUnavailable
from ...query import Query
from ..basic import (
    BlobStore,
    CommitResult,
    Encoding,
    Hit,
    IdempotentCommit,
    IndexOf,
    IStorage,
    MetaStore,
    ModelSpec,
    Page,
    ResourceMeta,
    ResourceStore,
    RevisionInfo,
    Write,
)
from ..contract.blobs import BlobRows, Blobs, BlobStorage
from ..contract.direct import DirectStorage, DirectTransfer
from ..contract.directories import Directories, DirectoryStorage, directory_of
from ..contract.loading import BulkLoading, LoadingStorage
from ..contract.overrides import check_blob_store, check_meta_store, check_resource_store
from ..contract.protocols import (
    FindingsKeeping,
    Freshness,
    IndexKeeping,
    IndexMigration,
    RecordKeeping,
    RecordReplay,
)
from ..contract.snapshots import SnapshotStorage, StorageSnapshot
from ..contract.staged_stores import StagedMetaStore, StagedResourceStore
from ..contract.store_errors import WriteTimedOut
from .blobs import KEEP_UPLOADS_S, BlobSweep, StoredBlobs
from .commits import AnnouncedCommits, Commits, MetaStoreCommits, RecordCommits, new_bodies
from .disk_pair import DiskPair
from .dropped_bodies import DroppedBodies
from .imports import StorageImports
from .loading import loading_of
from .opening import Opening, rebuild
from .reindexing import Reindexing
from .snapshots import open_snapshot
from .sweeping import Sweep
from .unique_values import UniqueValues

log = logging.getLogger("crudstack.storage")

MAX_RENEWALS = 8
"""How often a commit may fail because a sweep was faster. Each time, the bodies are put again under new uids."""


class SimpleStorage(
    IStorage, SnapshotStorage, BlobStorage, DirectStorage, LoadingStorage, DirectoryStorage, StorageImports
):
    """A MetaStore, a ResourceStore and perhaps a BlobStore as one storage.

    If a MemoryMetaStore is combined with a ResourceStore on S3, an index on S3 beside the bodies replaces it, because
    memory alone would not be durable. Then the attribute `meta_store` is the index, and the log says so when the
    storage is opened. Only a MetaStore that is not authoritative is replaced.

    meta_store      keeps the metadata and the index
    resource_store  keeps the bodies
    blob_store      keeps the files; None: models with Blob fields are refused
    before_open     awaited before the stores are opened; if it raises, the opening fails with its error
    keep_uploads_s  seconds for which an upload is kept that no revision refers to, by the dates of the BlobStore
    """

    def __init__(
        self,
        meta_store: MetaStore,
        resource_store: ResourceStore,
        blob_store: BlobStore | None = None,
        *,
        before_open: Callable[[], Awaitable[None]] | None = None,
        keep_uploads_s: float = KEEP_UPLOADS_S,
    ) -> None:
        index: MetaStore | None = None
        if isinstance(resource_store, IndexKeeping) and not meta_store.authoritative:
            index = resource_store.index()
        self.meta_store = index or meta_store
        self.resource_store, self.blob_store = resource_store, blob_store
        self._replaced = None if index is None else meta_store
        # The abilities of these stores. No other code asks for them per request.
        self._freshness = self.meta_store if isinstance(self.meta_store, Freshness) else None
        self._records: RecordKeeping | None = None
        if isinstance(resource_store, RecordKeeping) and not self.meta_store.authoritative:
            self._records = resource_store
        self._replay = self.meta_store if isinstance(self.meta_store, RecordReplay) else None
        self._index_keeper = resource_store if isinstance(resource_store, IndexKeeping) else None
        self._migration = self.meta_store if isinstance(self.meta_store, IndexMigration) else None
        self._findings = self.meta_store if isinstance(self.meta_store, FindingsKeeping) else None
        self._pair: DiskPair | None = None
        if isinstance(meta_store, StagedMetaStore) and isinstance(resource_store, StagedResourceStore):
            self._pair = DiskPair(meta_store, resource_store)
        self._before_open, self.keep_uploads_s = before_open, keep_uploads_s
        self._opening = Opening()
        self._compose_imports()
        pins = self._pins
        self._sweep = Sweep(self.meta_store, resource_store, pins)
        self._dropped = DroppedBodies(resource_store, pins)
        self._blobs: StoredBlobs | None = None
        self._blob_sweep: BlobSweep | None = None
        self._direct: DirectTransfer | None = None
        self._blob_rows = blob_rows = self.meta_store if self._records is None else resource_store
        if blob_store is not None and isinstance(blob_rows, BlobRows):
            self._blobs = StoredBlobs(blob_rows, blob_store)
            self._blob_sweep = BlobSweep(blob_rows, blob_store, pins, keep_uploads_s)
        self._compose(ModelSpec("unbound"))

    def _compose(self, spec: ModelSpec) -> None:
        self._spec = spec
        self._reindexing: Reindexing | None = None
        if self._migration is not None:
            self._reindexing = Reindexing(
                spec, self.meta_store, self.resource_store, migration=self._migration, findings=self._findings
            )
        self._index: IndexOf | None = None
        self._commits: Commits
        if self._pair is not None:
            self._commits = self._pair
        elif self._records is not None and self._replay is not None:
            unique_values = UniqueValues(self._replay, spec.unique)
            self._commits = RecordCommits(self._replay, self._records, unique_values)
        elif self._replaced is not None and self._index_keeper is not None:
            self._commits = AnnouncedCommits(self.meta_store, self.resource_store, self._index_keeper)
        else:
            self._commits = MetaStoreCommits(self.meta_store, self.resource_store)

    @property
    def _stores(self) -> list[MetaStore | ResourceStore | BlobStore]:
        return [self.meta_store, self.resource_store, *([] if self.blob_store is None else [self.blob_store])]

    @property
    @override
    def durable(self) -> bool:
        records = self._records is not None
        return all(store.durable or (store is self.meta_store and records) for store in self._stores)

    @property
    @override
    def remote(self) -> bool:
        records = self._records is not None
        return self.durable and all(store.remote or (store is self.meta_store and records) for store in self._stores)

    @property
    @override
    def blobs(self) -> Blobs | None:
        return self._blobs

    @property
    @override
    def in_process(self) -> bool:
        records = self._records is not None
        return any(
            not store.durable and not store.remote and not (store is self.meta_store and records)
            for store in self._stores
        )

    @property
    @override
    def exclusive(self) -> bool:
        return self.in_process or self._records is not None

    @property
    @override
    def direct(self) -> DirectTransfer | None:
        if self._direct is None and self.blob_store is not None and self.blob_store.remote:
            from .direct_s3 import direct_transfer

            self._direct = direct_transfer(self.blob_store, self._blob_rows)
        return self._direct

    @property
    @override
    def encoding(self) -> Encoding:
        return self.resource_store.encoding or self._spec.encoding or Encoding.json

    @override
    def bind(self, spec: ModelSpec) -> None:
        check_meta_store(self.meta_store if self._replaced is None else self._replaced)
        check_resource_store(self.resource_store)
        if self.blob_store is not None:
            check_blob_store(self.blob_store)
        if self._records is not None and self._replay is None:
            raise ConfigError(
                f"{type(self.meta_store).__name__} is not authoritative, and cannot apply the records of"
                f" {type(self.resource_store).__name__}: define `apply_committed` and `owner_of`, or set"
                " `authoritative = True`"
            )
        self._compose(spec)
        for store in self._stores:
            store.bind(spec)

    @property
    @override
    def location_keys(self) -> list[Hashable]:
        return [key for store in self._stores if (key := store.location_key) is not None]

    @property
    @override
    def directories(self) -> Directories:
        return Directories(directory_of(self.resource_store), directory_of(self.blob_store))

    # Opening

    @override
    async def open(self, index: IndexOf) -> None:
        self._index = index
        await self._opening.run(self._open)

    async def _open(self) -> None:
        if self._before_open is not None:
            await self._before_open()
        if self._replaced is not None:
            log.info(
                "%s: the %s that was given is replaced by the index beside the bodies, %s",
                self._spec.name,
                type(self._replaced).__name__,
                type(self.meta_store).__name__,
            )
        if self._records is not None and self._replay is not None:
            self._records.lock_exclusively()
            self.meta_store.bind(self._spec)  # empties it, because another process may have written records since
            await rebuild(self._replay, self._records)
            await self._sweep.run_alone()
        await self._sweep.load_generation()
        assert self._index is not None, "`open` sets it"
        if self._reindexing is not None:
            await self._reindexing.open(self._index)

    # Reading

    @override
    def new_uid(self) -> str:
        return self._sweep.new_uid()

    @override
    async def get(self, resource_id: str) -> ResourceMeta:
        return await self.meta_store.get(resource_id)

    @property
    @override
    def verified(self) -> bool:
        return self.resource_store.verified

    @override
    async def drop_copies(self, uids: Sequence[str]) -> None:
        await self.resource_store.drop_copies(uids)

    @property
    @override
    def may_be_stale(self) -> bool:
        return self._freshness is not None and self._freshness.may_be_stale

    @override
    async def peek(self, resource_id: str) -> ResourceMeta:
        if self._freshness is None:
            return await self.meta_store.get(resource_id)
        return await self._freshness.peek(resource_id)

    @override
    async def catch_up(self) -> None:
        if self._freshness is not None:
            await self._freshness.catch_up()

    @override
    async def bodies(self, uids: Sequence[str]) -> list[bytes]:
        return await self.resource_store.get_many(uids) if uids else []

    @override
    async def body(self, uid: str) -> bytes:
        return await self.resource_store.get(uid)

    @override
    async def get_with_body(self, resource_id: str) -> tuple[ResourceMeta, bytes]:
        if self._pair is not None:
            return await self._pair.get_with_body(resource_id)
        return await super().get_with_body(resource_id)

    @override
    async def search_with_bodies(self, query: Query) -> tuple[Page[Hit], list[bytes]]:
        if self._pair is not None:
            return await self._pair.search_with_bodies(query)
        return await super().search_with_bodies(query)

    @override
    async def revision(self, resource_id: str, revision: int) -> RevisionInfo:
        return await self.meta_store.revision(resource_id, revision)

    @override
    async def revisions(self, resource_id: str, before: int | None = None, limit: int = 50) -> Page[RevisionInfo]:
        return await self.meta_store.revisions(resource_id, before, limit)

    @override
    async def search(self, query: Query) -> Page[Hit]:
        return await self.meta_store.search(query)

    @override
    async def count(self, query: Query) -> int:
        return await self.meta_store.count(query)

    @override
    def scan(self) -> AsyncIterator[ResourceMeta]:
        return self.meta_store.scan()

    @property
    @override
    def loading(self) -> BulkLoading | None:
        return loading_of(self.meta_store, self.resource_store, self._commits)

    @override
    def snapshot(self, *, each_resource: bool = False) -> AbstractAsyncContextManager[StorageSnapshot]:
        return open_snapshot(
            self,
            self.meta_store,
            self.resource_store,
            self.blob_store,
            records=self._records is not None,
            each_resource=each_resource,
        )

    # Writing

    @override
    async def done(self, key: str, *, peek: bool = False) -> CommitResult | None:
        return await self._commits.done(key, peek=peek)

    @override
    async def commit(self, writes: Sequence[Write], once: IdempotentCommit | None = None) -> list[ResourceMeta]:
        released, kept = await self._blobs_of_purged(writes), await self._kept_of_purged(writes)
        for _ in range(MAX_RENEWALS):
            try:
                committed = await self._commit(writes, once)
                break
            except StaleGeneration:
                await self._dropped.remove(_uids_of(writes))
                await self._sweep.load_generation()
                writes = self._renewed(writes)
            except OutcomeUnknown:
                raise  # the commit may have happened, and its bodies are needed then
            except WriteTimedOut:
                raise  # removing the bodies might time out too
            except CrudError:
                await self._dropped.remove(_uids_of(writes))
                raise
        else:
            await self._dropped.remove(_uids_of(writes))
            raise StoreUnavailable(
                "bodies were swept faster than they could be written; nothing was changed, try again"
            )
        await self._dropped.remove_of(writes)
        await self._dropped.remove([record.uid for record in kept])
        released.update(key for record in kept for key in record.blobs)
        if released and self._blobs is not None:
            await self._blobs.release_purged(released)
        return committed

    async def _commit(self, writes: Sequence[Write], once: IdempotentCommit | None) -> list[ResourceMeta]:
        return await self._commits.commit(writes, once)

    @override
    async def confirm(self, resource_ids: Sequence[str]) -> None:
        await self._commits.confirm(resource_ids)

    async def _blobs_of_purged(self, writes: Sequence[Write]) -> set[str]:
        """Return the keys of all blobs, in any revision, of the resources that these writes purge.

        They are read before the commit, and none is missing if it succeeds: a purge is refused if its resource was
        changed meanwhile.
        """
        purged = {change.meta.resource_id for change, _ in writes if change.purge}
        if not purged or self._blobs is None:
            return set()
        records = [change.record for change, _ in writes if change.record is not None]
        keys = {key for record in records if record.resource_id in purged for key in record.blobs}
        for resource_id in purged:
            before, more = None, True
            while more:
                page = await self.meta_store.revisions(resource_id, before, 200)
                keys.update(key for record in page.items for key in record.blobs)
                before, more = page.next, page.next is not None
        return keys

    def _renewed(self, writes: Sequence[Write]) -> list[Write]:
        """Return the same writes with new uids for their bodies.

        Such a uid is replaced in all changes, because a later write of a batch may publish, delete or drop the body of
        an earlier one.
        """
        new = {uid: self.new_uid() for uid in _uids_of(writes)}
        renewed = []
        for change, body in writes:
            record = change.record
            changed = replace(
                change,
                meta=replace(change.meta, uid=new.get(change.meta.uid, change.meta.uid)),
                record=None if record is None else replace(record, uid=new.get(record.uid, record.uid)),
                drop=tuple(new.get(uid, uid) for uid in change.drop),
            )
            renewed.append(Write(changed, body))
        return renewed

    # Maintenance

    @override
    async def health(self) -> None:
        for store in self._stores:
            await store.health()

    @override
    async def degradations(self) -> list[str]:
        found = [sentence for store in self._stores for sentence in await store.degradations()]
        found += await self._unfinished_import(self._spec.name)
        return found if self._reindexing is None else [*found, *self._reindexing.degradations()]

    @override
    async def maintain(self, budget_s: float) -> None:
        """Index resources that an older program has written, then maintain the stores, then sweep bodies and blobs.

        Work that does not fit into `budget_s` seconds is left to the next call.
        """
        deadline = time.monotonic() + budget_s
        await self._unfinished_import(self._spec.name)
        if self._records is None:
            await self._maintain_index(deadline)
        await self.resource_store.maintain(max(0.0, deadline - time.monotonic()) / 2)
        await self._dropped.remove_kept()
        if self._records is None:  # else `open` sweeps
            now = time.monotonic()
            await self._sweep.run(deadline if self.blob_store is None else (now + deadline) / 2)
        if self.blob_store is not None:
            await self.blob_store.maintain(max(0.0, deadline - time.monotonic()))
        if self._blobs is not None and self._blob_sweep is not None:
            await self._blobs.release_rest()
            await self._blob_sweep.run(deadline)
        if (direct := self.direct) is not None:
            await direct.expire()

    async def _maintain_index(self, deadline: float) -> None:
        assert self._index is not None, "`open` sets it"
        if self._reindexing is not None:
            while time.monotonic() < deadline and await self._reindexing.step(self._index):
                pass
            await self._reindexing.look_again(self._index)
        await self.meta_store.maintain(max(0.0, deadline - time.monotonic()) / 2)

    @override
    async def purge_remnants(self, now: dt.datetime) -> dt.datetime:
        if self._blobs is not None:
            await self._blobs.release_rest()
        return max([await store.purge_remnants(now) for store in self._stores])

    @override
    async def close(self) -> None:
        self._opening.reset()
        stores = self._stores
        if self._replaced is not None:
            stores.reverse()  # an open ResourceStore may refresh the index, which would open a closed index again
        for store in stores:
            await store.close()


def _uids_of(writes: Sequence[Write]) -> list[str]:
    return [record.uid for record, _ in new_bodies(writes)]
