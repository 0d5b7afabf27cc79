"""MetaStores on this machine: in memory, and in one SQLite file.

MemoryMetaStore()                    gone with the process, unless records beside the bodies keep it (see SimpleStorage)
DiskMetaStore(rootdir="data/meta")   `rootdir/index.sqlite`, shared safely by several processes; local disks only
"""

from __future__ import annotations

import datetime as dt
from collections.abc import AsyncIterator, Hashable, Sequence
from contextlib import AbstractAsyncContextManager
from functools import partial
from pathlib import Path
from typing import ClassVar

import apsw
from typing_extensions import override

from ...query import Query
from ...values import Key
from ..backends.sqlite import loading
from ..backends.sqlite.blob_rows import DatabaseBlobRows
from ..backends.sqlite.committer import Stage
from ..backends.sqlite.database import FileDatabase, MemoryDatabase
from ..backends.sqlite.findings_table import keep_findings, read_findings
from ..backends.sqlite.import_keeping import DatabaseImportKeeping
from ..backends.sqlite.loading import StagedModel
from ..backends.sqlite.pins import has_pin
from ..backends.sqlite.tables import ResourceTables
from ..basic import (
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
from ..contract.loading import BulkLoading, IndexLoading, Loader
from ..contract.protocols import FindingsKeeping, IndexMigration, MetaSweeping, RecordReplay
from ..contract.snapshots import MetaSnapshot, SnapshotReading
from ..contract.staged_stores import StagedMetaStore, WriteStage
from .pinning import FilePinning, MemoryPinning

SCAN_PAGE = 500


class _TablesMetaStore(
    DatabaseBlobRows, DatabaseImportKeeping, MetaStore, SnapshotReading, IndexMigration, MetaSweeping
):
    """A MetaStore whose truth is `ResourceTables` in a database."""

    _db: MemoryDatabase | FileDatabase
    _tables: ResourceTables

    def __init__(self, encoding: Encoding | None = None) -> None:
        self._encoding = encoding

    @override
    async def generation(self) -> int:
        return await self._db.read(self._tables.generation, quick=True)

    @override
    async def advance_generation(self) -> int:
        return await self._db.write(self._tables.advance_generation)

    @override
    async def get(self, resource_id: str) -> ResourceMeta:
        tables = self._tables
        return await self._db.read(lambda db: tables.get(db, resource_id), quick=True)

    @override
    async def commit(self, changes: Sequence[Change], once: IdempotentCommit | None = None) -> list[ResourceMeta]:
        return await self._db.write(lambda db: self._tables.commit(db, changes, once=once))

    @override
    async def done(self, key: str, *, peek: bool = False) -> CommitResult | None:
        return await self._db.read(lambda db: self._tables.results.read(db, key), quick=True)

    @override
    async def revision(self, resource_id: str, revision: int) -> RevisionInfo:
        return await self._db.read(lambda db: self._tables.revision(db, resource_id, revision), quick=True)

    @override
    async def revisions(self, resource_id: str, before: int | None = None, limit: int = 50) -> Page[RevisionInfo]:
        return await self._db.read(lambda db: self._tables.revisions(db, resource_id, before, limit))

    @override
    async def search(self, query: Query) -> Page[Hit]:
        return await self._db.read(lambda db: self._tables.search(db, query))

    @override
    async def count(self, query: Query) -> int:
        return await self._db.read(lambda db: self._tables.count(db, query))

    @override
    async def scan(self) -> AsyncIterator[ResourceMeta]:
        after = ""
        while page := await self._db.read(partial(self._tables.scan, after=after, limit=SCAN_PAGE)):
            for meta in page:
                yield meta
            after = page[-1].resource_id

    @override
    async def unreferenced(self, uids: Sequence[str]) -> list[str]:
        return await self._db.read(lambda db: self._tables.unreferenced(db, uids))

    @override
    async def outdated(self, limit: int) -> list[ResourceMeta]:
        return await self._db.read(lambda db: self._tables.outdated(db, limit))

    @override
    async def reindex(self, entries: Sequence[Reindex], *, share: bool = False) -> None:
        await self._db.write(lambda db: self._tables.reindex(db, entries, () if share else None) and None)

    @override
    async def activate_unique_fields(self, *, force: bool = False) -> bool:
        tables = self._tables
        return await self._db.read(tables.is_activated) or await self._db.write(
            lambda db: tables.activate_unique_fields(db, force)
        )

    @override
    async def deactivate_unique_field(self, name: str) -> None:
        await self._db.write(lambda db: self._tables.deactivate_unique_field(db, name))

    @override
    def snapshot(self) -> AbstractAsyncContextManager[MetaSnapshot]:
        return self._db.snapshot()

    @override
    async def health(self) -> None:
        await self._db.read(self._tables.generation)

    @override
    async def close(self) -> None:
        await self._db.close()


class MemoryMetaStore(_TablesMetaStore, MemoryPinning, RecordReplay, BulkLoading, IndexLoading):
    """A MetaStore in the memory of this process. Not durable by itself: see SimpleStorage."""

    authoritative: ClassVar[bool] = False

    _db: MemoryDatabase

    def __init__(self, encoding: Encoding | None = None) -> None:
        super().__init__(encoding)
        self.bind(ModelSpec("unbound"))

    @override
    def bind(self, spec: ModelSpec) -> None:
        MemoryPinning.__init__(self)
        self._spec = spec
        self._tables = ResourceTables(spec, self._encoding, lazy=True)
        self._db = MemoryDatabase(self._tables.create)

    @override
    def apply_committed(self, changes: Sequence[Change]) -> None:
        self._db.run(lambda db: self._tables.apply_committed(db, changes))

    @override
    async def owner_of(self, name: str, key: Key) -> str | None:
        return await self._db.read(lambda db: self._tables.owner_of(db, name, key), quick=True)

    @override
    def load(self, pin: str, *, size: int = 0) -> AbstractAsyncContextManager[Loader]:
        async def publish(staged: StagedModel) -> None:
            await self._db.load(staged.path, move)

        def move(db: apsw.Connection) -> None:
            loading.check_empty(db)
            loading.check_pin(self.holds_pin(pin))
            loading.move(db, self._tables)

        return loading.staged_loader(
            None, self._db.read, ResourceTables(self._spec, self._encoding, lazy=True), publish
        )

    @override
    def apply_loaded(self, staged: StagedModel) -> None:
        self._db.load_now(staged.path, lambda db: loading.move(db, self._tables, only_index=True))


class DiskMetaStore(_TablesMetaStore, FilePinning, StagedMetaStore, FindingsKeeping, BulkLoading):
    """A MetaStore in `rootdir/index.sqlite`. Durable, and shared by the processes of one machine."""

    durable: ClassVar[bool] = True

    _db: FileDatabase

    def __init__(self, rootdir: str | Path, encoding: Encoding | None = None) -> None:
        super().__init__(encoding)
        self._path = Path(rootdir) / "index.sqlite"
        self.bind(ModelSpec("unbound"))

    @property
    @override
    def location_key(self) -> Hashable:
        return "disk", self._path.absolute()

    @override
    async def commit_after(
        self, stages: Sequence[WriteStage], changes: Sequence[Change], once: IdempotentCommit | None = None
    ) -> list[ResourceMeta]:
        commit = Stage(self._db, lambda db: self._tables.commit(db, changes, once=once))
        results = await self._db.committer.write([*stages, commit])
        committed: list[ResourceMeta] = results[-1]
        return committed

    @override
    async def findings(self) -> Findings:
        return await self._db.read(read_findings)

    @override
    async def keep_findings(self, findings: Findings) -> None:
        await self._db.write(lambda db: keep_findings(db, findings))

    @override
    async def opened(self) -> None:
        await self._db.open()

    @override
    def get_now(self, resource_id: str) -> ResourceMeta:
        return self._db.read_now(lambda db: self._tables.get(db, resource_id))

    @override
    def search_now(self, query: Query) -> Page[Hit]:
        return self._db.read_now(lambda db: self._tables.search(db, query))

    @override
    def load(self, pin: str, *, size: int = 0) -> AbstractAsyncContextManager[Loader]:
        async def publish(staged: StagedModel) -> None:
            await self._db.load(staged.path, move)

        def move(db: apsw.Connection) -> None:
            loading.check_empty(db)
            loading.check_pin(has_pin(db, pin))
            loading.move(db, self._tables)

        tables = ResourceTables(self._spec, self._encoding, lazy=True)
        return loading.staged_loader(self._path.parent, self._db.read, tables, publish)

    @override
    async def maintain(self, budget_s: float) -> None:
        await self._db.checkpoint()  # the process that purged may have ended before its own checkpoint
        await loading.remove_abandoned_loads(self._path.parent)

    @override
    async def purge_remnants(self, now: dt.datetime) -> dt.datetime:
        return await self._db.purge_remnants(now)

    @override
    def bind(self, spec: ModelSpec) -> None:
        self._spec = spec
        self._tables = ResourceTables(spec, self._encoding)
        self._db = FileDatabase(self._path, self._tables.create)
