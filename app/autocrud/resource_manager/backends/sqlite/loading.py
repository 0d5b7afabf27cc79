"""Loading of a whole model: a database file is filled first, and then moved into an empty database in one transaction.

The file has the same tables as the database. No other process opens it, so it has no journal and no syncs, and it is
filled in batches. It lies in a directory of this process, which a later process removes if this one is killed.

- L1, L2 and L3 of `contract.loading` hold because `move` checks and writes in one transaction of the database.
- F1 of `contract.blobs` holds because `check` refuses records that name keys without rows, before anything is moved.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import apsw
from typing_extensions import override

from ...basic import BlobRow, Change, RevisionInfo, StoredKey
from ...contract.loading import LoadedResource, Loader
from ...contract.store_errors import blob_gone, model_not_empty, not_indexed, pin_lost, taken
from ...runtime.files import make_directory
from ...runtime.temporary import ProcessDirectory, remove_abandoned
from ...runtime.threads import shielded
from ..query_sql import quoted
from . import blob_tables, sql
from .errors import translated
from .tables import ResourceTables

T = TypeVar("T")

CACHE_KIB = 16 * 1024


class StagedModel:
    """A database file that is filled with the contents of a model. All methods block.

    directory  holds the file
    tables     the tables of the model; not used for another database
    """

    def __init__(self, directory: Path, tables: ResourceTables) -> None:
        self.path = directory / "loaded.sqlite"
        self.tables = tables
        self._id, self._rid, self._revision = "", 0, 0
        self._marked = False
        self._connection = apsw.Connection(str(self.path))
        self._connection.pragma("journal_mode", "off")
        self._connection.pragma("synchronous", "off")
        self._connection.pragma("cache_size", -CACHE_KIB)
        tables.create(self._connection)

    @contextlib.contextmanager
    def _batch(self) -> Iterator[apsw.Connection]:
        self._connection.execute("BEGIN")
        yield self._connection
        self._connection.execute("COMMIT")

    def add(self, items: Sequence[LoadedResource | RevisionInfo]) -> None:
        """Store resources and their records."""
        with self._batch() as connection:
            for item in items:
                if isinstance(item, RevisionInfo):
                    self._add_record(connection, item)
                else:
                    self._add_resource(connection, item)

    def _add_resource(self, connection: apsw.Connection, resource: LoadedResource) -> None:
        meta = resource.meta
        if meta.resource_id.encode() <= self._id.encode() and self._rid:
            raise ValueError(f"resource {meta.resource_id!r} is loaded after {self._id!r}: load them by ascending id")
        change = Change(meta=meta, record=None, index=resource.entry, expect="any")
        self.tables.apply_committed(connection, [change])
        self._rid = connection.last_insert_rowid()
        self._id, self._revision = meta.resource_id, 0

    def _add_record(self, connection: apsw.Connection, record: RevisionInfo) -> None:
        if record.resource_id != self._id or record.revision <= self._revision:
            raise ValueError(
                f"revision {record.revision} of {record.resource_id!r} is loaded after revision {self._revision} of"
                f" {self._id!r}: load each resource, then its records by ascending number"
            )
        self._revision = record.revision
        self.tables.put_record(connection, self._rid, record)
        if record.blobs:
            if not self._marked:
                raise blob_gone(record.blobs[0])
            blob_tables.put_uses(connection, record)

    def add_blobs(self, rows: Sequence[BlobRow]) -> None:
        """Store rows of blobs."""
        with self._batch() as connection:
            for row in rows:
                blob_tables.put(connection, row)
        self._marked = self._marked or bool(rows)

    def add_keys(self, keys: Sequence[StoredKey]) -> None:
        """Store the results of Idempotency-Keys."""
        with self._batch() as connection:
            for key in keys:
                self.tables.results.put(connection, key)

    def check(self) -> None:
        """Check what was stored, and close the file. Raises UniqueConflict and BlobGone."""
        for name in self.tables.spec.unique:
            check_unique(self._connection, name)
        if self._marked:
            gone: Any = self._connection.execute(
                "SELECT key FROM blob_uses WHERE key NOT IN (SELECT key FROM blobs) LIMIT 1"
            ).get
            if gone is not None:
                raise blob_gone(gone)
        self.close()

    def close(self) -> None:
        """Close the file."""
        self._connection.close(force=True)


def check_empty(connection: apsw.Connection) -> None:
    """Raise ModelNotEmpty if a database has a resource, a row of a blob or a result of an Idempotency-Key."""
    for table, what in (("resources", "resources"), ("done", "results of Idempotency-Keys")):
        if connection.execute(f"SELECT 1 FROM main.{table} LIMIT 1").get is not None:
            raise model_not_empty(what)
    if blob_tables.exist(connection) and connection.execute("SELECT 1 FROM main.blobs LIMIT 1").get is not None:
        raise model_not_empty("files")


def check_unique(connection: apsw.Connection, name: str, schema: str = "main") -> None:
    """Raise UniqueConflict if two resources have the same value of a field."""
    column = sql.column(name)
    shared = (
        f"SELECT {column} FROM {schema}.resources WHERE {column} IS NOT NULL GROUP BY 1 HAVING count(*) > 1 LIMIT 1"
    )
    found: Any = connection.execute(shared).get
    if found is not None:
        rows = connection.execute(
            f"SELECT id FROM {schema}.resources WHERE {column} = ? ORDER BY id LIMIT 2", (found,)
        ).fetchall()
        raise taken(name, *(str(row[0]) for row in rows))


def move(connection: apsw.Connection, tables: ResourceTables, *, only_index: bool = False) -> None:
    """Move what was staged into an empty database. The caller is in a transaction, and has checked that it is empty.

    Indexes are removed and made again, which takes less than half of the time.

    connection  of the database. The staged file is attached as `loaded`
    tables      the tables of the database
    only_index  whether the database is an index of records that are elsewhere, so that it keeps no blobs and no results

    Raises ConfigError if this program does not index a unique field, and UniqueConflict.
    """
    for name in tables.uniques(connection):
        if name not in tables.kinds:
            raise not_indexed(tables.spec.name, name)
        if name not in tables.spec.unique:  # the others are checked already
            check_unique(connection, name, "loaded")
    indexes: list[Any] = connection.execute(
        "SELECT name, sql FROM main.sqlite_schema WHERE type = 'index' AND sql IS NOT NULL"
        " AND tbl_name IN ('resources', 'revisions', 'list_values')"
    ).fetchall()
    for name, _ in indexes:
        connection.execute(f"DROP INDEX main.{quoted(name)}")
    tables.take_staged(connection)
    if not only_index:
        connection.execute("INSERT INTO main.done SELECT * FROM loaded.done ORDER BY key, operation")
        if connection.execute("SELECT 1 FROM loaded.sqlite_schema WHERE name = 'blobs'").get is not None:
            blob_tables.mark(connection)
            for table in ("blobs", "blob_uses"):
                connection.execute(f"INSERT INTO main.{table} SELECT * FROM loaded.{table}")
    for _, statement in indexes:
        connection.execute(statement)


class StagedLoader(Loader):
    """A Loader that fills a StagedModel. `publish` moves it.

    parent   the directory in which the file is made; None for that of the system for temporary files
    tables   new tables of the model
    publish  called with the staged model once it is checked and closed
    """

    def __init__(
        self, parent: Path | None, tables: ResourceTables, publish: Callable[[StagedModel], Awaitable[None]]
    ) -> None:
        self._parent, self._tables, self._publish = parent, tables, publish
        self._lock = threading.Lock()  # a cancelled caller may leave work in its thread
        self._directory: ProcessDirectory | None = None
        self._staged: StagedModel | None = None

    async def _run(self, work: Callable[[StagedModel], T]) -> T:
        def run() -> T:
            with self._lock:
                if self._directory is None:
                    if self._parent is not None:
                        make_directory(self._parent)
                    self._directory = ProcessDirectory(self._parent)
                try:
                    if self._staged is None:
                        self._staged = StagedModel(self._directory.path, self._tables)
                    return work(self._staged)
                except apsw.Error as error:
                    raise translated(error, self._directory.path) from error

        return await shielded(asyncio.get_running_loop().run_in_executor(None, run))

    @override
    async def add(self, items: Sequence[LoadedResource | RevisionInfo]) -> None:
        await self._run(lambda staged: staged.add(items))

    @override
    async def add_blobs(self, rows: Sequence[BlobRow]) -> None:
        await self._run(lambda staged: staged.add_blobs(rows))

    @override
    async def add_keys(self, keys: Sequence[StoredKey]) -> None:
        await self._run(lambda staged: staged.add_keys(keys))

    @override
    async def publish(self) -> None:
        await shielded(asyncio.ensure_future(self._checked_and_published()))

    async def _checked_and_published(self) -> None:
        def checked(staged: StagedModel) -> StagedModel:
            staged.check()
            return staged

        await self._publish(await self._run(checked))

    async def close(self) -> None:
        """Remove the staged file."""

        def close() -> None:
            with self._lock:
                if self._staged is not None:
                    self._staged.close()
                if self._directory is not None:
                    self._directory.remove()

        await asyncio.get_running_loop().run_in_executor(None, close)


@contextlib.asynccontextmanager
async def staged_loader(
    parent: Path | None,
    read: Callable[[Callable[[apsw.Connection], None]], Awaitable[None]],
    tables: ResourceTables,
    publish: Callable[[StagedModel], Awaitable[None]],
) -> AsyncIterator[Loader]:
    """Give a loader, and remove what it staged afterwards. Raises ModelNotEmpty if the database is not empty now.

    parent   the directory in which the file is made; None for that of the system for temporary files
    read     reads the database that is to be loaded, with a function of a connection
    tables   new tables of the model
    publish  called with the staged model once it is checked and closed
    """
    await read(check_empty)
    loader = StagedLoader(parent, tables, publish)
    try:
        yield loader
    finally:
        await loader.close()


async def remove_abandoned_loads(parent: Path) -> None:
    """Remove what was staged in a directory by processes that have ended."""
    await asyncio.get_running_loop().run_in_executor(None, remove_abandoned, parent)


def check_pin(held: bool) -> None:
    """Raise PinLost unless the pin of the load is held."""
    if not held:
        raise pin_lost()
