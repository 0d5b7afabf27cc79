"""ResourceStores on this machine: in memory, and in one SQLite file.

    MemoryResourceStore()                    gone with the process
    DiskResourceStore(rootdir="data/data")   `rootdir/bodies.sqlite`, shared by processes; local disks only

All bodies lie in one file. A file for each body would cost two syncs at every create, and make a directory of a million
entries. No id becomes a path.
"""

from __future__ import annotations

import datetime as dt
import fcntl
import os
from collections.abc import AsyncIterator, Callable, Hashable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, cast

import apsw
import msgspec
from typing_extensions import override

from ...errors import ConfigError, CrudError, OutcomeUnknown, StoreDamaged, StoreUnavailable
from ..backends.sqlite import loading
from ..backends.sqlite.blob_rows import DatabaseBlobRows
from ..backends.sqlite.committer import Stage
from ..backends.sqlite.database import FileDatabase
from ..backends.sqlite.import_keeping import DatabaseImportKeeping
from ..backends.sqlite.loading import StagedModel
from ..backends.sqlite.tables import ResourceTables
from ..basic import Change, CommitResult, Encoding, IdempotentCommit, ModelSpec, ResourceStore, RevisionInfo, Write
from ..contract.directories import InDirectory
from ..contract.loading import IndexLoading, Loader, RecordLoading
from ..contract.protocols import BodySweeping, RecordKeeping
from ..contract.snapshots import BodySnapshot, BodySnapshots, RecordSnapshot, RecordSnapshots
from ..contract.staged_stores import StagedResourceStore
from ..runtime.files import make_directory

SCAN_PAGE = 500


class MemoryResourceStore(ResourceStore, BodySnapshots):
    """Bodies in this process's memory."""

    verified: ClassVar[bool] = False
    shows_later_bodies: ClassVar[bool] = False

    def __init__(self, encoding: Encoding | None = None) -> None:
        self.encoding = encoding
        self._bodies: dict[str, bytes] = {}

    @override
    async def put(self, uid: str, info: RevisionInfo, body: bytes) -> None:
        self._bodies[uid] = body

    @override
    async def get(self, uid: str) -> bytes:
        try:
            return self._bodies[uid]
        except KeyError:
            raise _lost(uid) from None

    @override
    async def get_many(self, uids: Sequence[str]) -> list[bytes]:
        try:
            return [self._bodies[uid] for uid in uids]
        except KeyError as error:
            raise _lost(error.args[0]) from None

    @override
    async def delete(self, uids: Sequence[str]) -> None:
        for uid in uids:
            self._bodies.pop(uid, None)

    @override
    @asynccontextmanager
    async def snapshot(self) -> AsyncIterator[BodySnapshot]:
        yield _BodiesInMemory(dict(self._bodies))


class _BodiesInMemory(BodySnapshot):
    """The bodies of one moment: a dict of its own, of the same bytes."""

    def __init__(self, bodies: Mapping[str, bytes]) -> None:
        self._bodies = bodies

    @override
    async def bodies(self, uids: Sequence[str]) -> list[bytes | None]:
        return [self._bodies.get(uid) for uid in uids]


def _lost(uid: str) -> StoreDamaged:
    return StoreDamaged(f"the body {uid} is missing")


class DiskResourceStore(
    DatabaseBlobRows,
    DatabaseImportKeeping,
    StagedResourceStore,
    BodySweeping,
    RecordKeeping,
    BodySnapshots,
    RecordSnapshots,
    RecordLoading,
    InDirectory,
):
    """Bodies as rows of `rootdir/bodies.sqlite`. It also keeps the records for a MetaStore that is not durable.

    If its records are the commit, its rows of blobs are those of the storage. Otherwise they are not used.
    """

    _db: FileDatabase

    durable: ClassVar[bool] = True
    shows_later_bodies: ClassVar[bool] = False

    def __init__(self, rootdir: str | Path, encoding: Encoding | None = None) -> None:
        self.encoding = encoding
        self.rootdir = Path(rootdir)
        self._owned: int | None = None
        self.bind(ModelSpec("unbound"))

    @override
    def bind(self, spec: ModelSpec) -> None:
        self._spec = spec
        # Records need no index: searches are the MetaStore's.
        self._records = ResourceTables(msgspec.structs.replace(spec, fields={}, unique=()))
        self._db = FileDatabase(self.rootdir / "bodies.sqlite", self._create)

    @property
    @override
    def location_key(self) -> Hashable:
        return "disk", self.rootdir.absolute()

    @property
    @override
    def local_directory(self) -> Path:
        return self.rootdir

    def _create(self, connection: apsw.Connection) -> None:
        connection.execute("CREATE TABLE IF NOT EXISTS bodies (uid TEXT PRIMARY KEY, body BLOB NOT NULL)")
        self._records.create(connection)

    @override
    async def put(self, uid: str, info: RevisionInfo, body: bytes) -> None:
        await self._db.write(lambda db: _put(db, [(uid, body)]))

    @override
    async def put_many(self, bodies: Sequence[tuple[RevisionInfo, bytes]]) -> None:
        rows = [(info.uid, body) for info, body in bodies]
        await self._db.write(lambda db: _put(db, rows))

    @override
    def put_stage(self, bodies: Sequence[tuple[str, bytes]]) -> Stage:
        return Stage(self._db, lambda db: _put(db, bodies))

    @override
    async def get_many(self, uids: Sequence[str]) -> list[bytes]:
        return await self._db.read(lambda db: _bodies(db, uids))

    @override
    async def opened(self) -> None:
        await self._db.open()

    @override
    def get_many_now(self, uids: Sequence[str]) -> list[bytes]:
        return self._db.read_now(lambda db: _bodies(db, uids)) if uids else []

    @override
    def get_first_now(self, uids: Sequence[str], most: int) -> list[bytes]:
        return self._db.read_now(lambda db: _first_bodies(db, uids, most)) if uids else []

    @override
    async def delete(self, uids: Sequence[str]) -> None:
        rows = [(uid,) for uid in uids]
        await self._db.write(lambda db: db.executemany("DELETE FROM bodies WHERE uid = ?", rows) and None)

    @override
    async def older_than(self, generation: int, after: str = "", limit: int = 1000) -> list[str]:
        # Uids compare as text, so the number is compared by itself: '10/...' < '9/...'.
        return await self._db.read(
            lambda db: [
                cast("str", uid)
                for (uid,) in db.execute(
                    "SELECT uid FROM bodies WHERE uid > ? AND CAST(uid AS INTEGER) < ? ORDER BY uid LIMIT ?",
                    (after, generation, limit),
                ).fetchall()
            ]
        )

    @override
    def lock_exclusively(self) -> None:
        if self._owned is None:
            try:
                make_directory(self.rootdir)
                self._owned = os.open(self.rootdir / "owner.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            except OSError as error:
                raise StoreUnavailable("the data directory cannot be used") from error
            try:
                fcntl.flock(self._owned, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                self._disown()
                raise ConfigError(
                    f"{self.rootdir} is in use by another process: an index in memory needs the directory for itself;"
                    " stop the other process, or use the storage kind 'disk', which several processes share"
                ) from None

    def _disown(self) -> None:
        if self._owned is not None:
            os.close(self._owned)
            self._owned = None

    @override
    async def put_records(
        self, writes: Sequence[Write], then: Callable[[Sequence[Change]], None], once: IdempotentCommit | None = None
    ) -> None:
        changes = [write.change for write in writes]
        bodies = [
            (change.record.uid, body) for change, body in writes if change.record is not None and body is not None
        ]

        def work(connection: apsw.Connection) -> None:
            _put(connection, bodies)
            self._records.commit(connection, changes, once=once)

        await self._db.write(work, after=lambda: then(changes))

    @override
    async def done(self, key: str) -> CommitResult | None:
        return await self._db.read(lambda db: self._records.results.read(db, key))

    @override
    async def records(self) -> AsyncIterator[Change]:
        after = ""
        while page := await self._db.read(partial(self._page, after=after)):
            for change in page:
                yield change
            after = page[-1].meta.resource_id

    def _page(self, connection: apsw.Connection, after: str) -> list[Change]:
        return [
            Change(meta=meta, record=record, index=None, expect="any")
            for meta in self._records.scan(connection, after, SCAN_PAGE)
            for record in self._records.records(connection, meta.resource_id)
        ]

    @override
    def snapshot(self) -> AbstractAsyncContextManager[BodySnapshot]:
        return self._db.snapshot()

    @override
    def record_snapshot(self) -> AbstractAsyncContextManager[RecordSnapshot]:
        return self._db.snapshot()

    @override
    def load_records(self, index: IndexLoading, pin: str) -> AbstractAsyncContextManager[Loader]:
        def move(db: apsw.Connection) -> None:
            loading.check_empty(db)
            loading.check_pin(index.holds_pin(pin))
            loading.move(db, self._records)

        async def publish(staged: StagedModel) -> None:
            await self._db.load(staged.path, move, after=lambda: _applied(index, staged))

        return loading.staged_loader(self.rootdir, self._db.read, ResourceTables(self._spec, lazy=True), publish)

    @override
    async def health(self) -> None:
        await self._db.read(lambda db: db.execute("SELECT 1 FROM bodies LIMIT 1").get)

    @override
    async def maintain(self, budget_s: float) -> None:
        await self._db.checkpoint()  # the process that purged may have ended before its own checkpoint
        await loading.remove_abandoned_loads(self.rootdir)

    @override
    async def purge_remnants(self, now: dt.datetime) -> dt.datetime:
        return await self._db.purge_remnants(now)

    @override
    async def close(self) -> None:
        await self._db.close()
        self._disown()


def _applied(index: IndexLoading, staged: StagedModel) -> None:
    """Let the index follow what was committed. Raises OutcomeUnknown if it cannot: its next start makes it again."""
    try:
        index.apply_loaded(staged)
    except (apsw.Error, CrudError, MemoryError) as error:
        raise OutcomeUnknown(
            "the model is loaded, but the index in memory could not be filled: start the program again"
        ) from error


def _put(connection: apsw.Connection, bodies: Sequence[tuple[str, bytes]]) -> None:
    for body in bodies:
        connection.execute("INSERT OR REPLACE INTO bodies VALUES (?, ?)", body)


def _first_bodies(connection: apsw.Connection, uids: Sequence[str], most: int) -> list[bytes]:
    marks = ", ".join("?" * len(uids))
    found: dict[str, bytes] = {}
    size = 0
    rows: Any = connection.execute(f"SELECT uid, body FROM bodies WHERE uid IN ({marks})", uids)
    for uid, body in rows:
        found[uid] = body
        size += len(body)
        if size > most:  # SQLite returns them in any order, so these may not be the first ones
            break
    else:
        try:
            return [found[uid] for uid in uids]
        except KeyError as error:
            raise _lost(error.args[0]) from None
    found.clear()
    bodies: list[bytes] = []
    while len(bodies) < len(uids) and sum(map(len, bodies)) <= most:
        bodies += _bodies(connection, uids[len(bodies) : len(bodies) + 1])
    return bodies


def _bodies(connection: apsw.Connection, uids: Sequence[str]) -> list[bytes]:
    if len(uids) == 1:
        body = connection.execute("SELECT body FROM bodies WHERE uid = ?", uids).get
        if body is None:
            raise _lost(uids[0])
        return [cast("bytes", body)]
    marks = ", ".join("?" * len(uids))
    rows: list[Any] = connection.execute(f"SELECT uid, body FROM bodies WHERE uid IN ({marks})", uids).fetchall()
    found: dict[str, bytes] = dict(rows)
    try:
        return [found[uid] for uid in uids]
    except KeyError as error:
        raise _lost(error.args[0]) from None
