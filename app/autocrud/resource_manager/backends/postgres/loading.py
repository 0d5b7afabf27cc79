"""Loading of a whole model in one transaction of PostgreSQL.

Everything is copied into temporary tables first, which disappear with the transaction, and then inserted into the
tables of the model. Only then the lock of the schema is taken, which commits hold shared (P3). So commits wait for the
last checks and the COMMIT, and not for the insertions, which no other transaction sees.

- L1: one transaction. L2: under the lock, no row is looked at that another transaction may still add, and rows that are
  not those of this load refuse it. Before, a commit with an id or a unique value of the load waits for its end.
- L3: the row of the pin is locked until the end of the transaction, so a sweep that drops it waits.
- A commit that waits for a row of the load, while the load waits for the lock, is a deadlock. PostgreSQL ends one of
  them. If it is the load, the insertions are undone, so that the commit goes on, and are done again.
- The transaction may last for hours, so it touches `{t}:state` and `{t}:recent` only at its end: see `snapshot`.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import Any

import msgspec
from psycopg.errors import DeadlockDetected, UniqueViolation
from typing_extensions import override

from ....errors import StoreUnavailable
from ...basic import BlobRow, ModelSpec, ResourceMeta, RevisionInfo, StoredKey
from ...contract.blobs import BLOBS_MARKER
from ...contract.loading import LoadedResource, Loader
from ...contract.store_errors import blob_gone, model_not_empty, not_indexed, pin_lost, taken, unknown_format
from .blob_schema import BlobSchema
from .pool import Connection, translating
from .schema import FORMAT, PostgresSchema, held

MAX_DEADLOCKS = 5

_TEMPORARY = """
CREATE TEMPORARY TABLE loaded (LIKE <main> INCLUDING DEFAULTS) ON COMMIT DROP;
CREATE TEMPORARY TABLE loaded_revisions (LIKE <revisions> INCLUDING DEFAULTS) ON COMMIT DROP;
CREATE TEMPORARY TABLE loaded_done (LIKE <done> INCLUDING DEFAULTS) ON COMMIT DROP;
CREATE TEMPORARY TABLE loaded_blobs (key text COLLATE "C", size bigint, owner text) ON COMMIT DROP;
CREATE TEMPORARY TABLE loaded_uses (key text COLLATE "C", id text COLLATE "C", revision bigint) ON COMMIT DROP
"""
_COLUMNS = (
    "id, version, nonce, revision, total_revision_count, schema_version, status, is_deleted, created_time,"
    " updated_time, created_by, updated_by, uid, encoding, doc, shown, keys, absent, spec"
)


class PostgresLoader(Loader):
    """A Loader in the transaction of a connection.

    connection  in a transaction at READ COMMITTED
    spec_id     the number of the set of bound fields
    pin         the pin of the load
    commit      ends the transaction, and finds out whether it committed
    """

    def __init__(
        self,
        connection: Connection,
        spec: ModelSpec,
        schema: PostgresSchema,
        blob_schema: BlobSchema,
        encode: Callable[[Any], bytes],
        spec_id: int,
        pin: str,
        commit: Callable[[], Awaitable[None]],
    ) -> None:
        self._connection, self._spec, self._schema, self._blob_schema = connection, spec, schema, blob_schema
        self._encode, self._spec_id, self._pin, self._commit = encode, spec_id, pin, commit
        self._has_blobs = False

    async def begin(self) -> None:
        """Make the temporary tables."""
        for statement in _TEMPORARY.split(";\n"):
            await self._execute(statement)

    async def _execute(self, statement: str, params: Sequence[Any] = ()) -> Any:
        return await self._connection.execute(self._blob_schema.filled(statement), params)

    async def _first(self, statement: str, params: Sequence[Any] = ()) -> Any:
        return await (await self._execute(statement, params)).fetchone()

    async def _copy(self, into: str, rows: Iterable[Sequence[Any]]) -> None:
        with translating():
            async with self._connection.cursor() as cursor, cursor.copy(f"COPY {into} FROM STDIN".encode()) as copy:
                for row in rows:
                    await copy.write_row(row)

    @override
    async def add(self, items: Sequence[LoadedResource | RevisionInfo]) -> None:
        resources = [item for item in items if isinstance(item, LoadedResource)]
        records = [item for item in items if isinstance(item, RevisionInfo)]
        await self._copy(f"loaded ({_COLUMNS})", map(self._row, resources))
        await self._copy(
            "loaded_revisions (id, revision, uid, doc)",
            ((one.resource_id, one.revision, one.uid, self._encode(one)) for one in records),
        )
        uses = [(key, one.resource_id, one.revision) for one in records for key in one.blobs]
        if uses:
            await self._copy("loaded_uses (key, id, revision)", uses)

    def _row(self, resource: LoadedResource) -> Sequence[Any]:
        meta, entry = resource
        keys = {name: key for name, key in entry.keys.items() if key is not None}
        return (
            *(meta.resource_id, meta.version, meta.nonce, meta.revision, meta.total_revision_count),
            *(meta.schema_version, meta.status, meta.is_deleted, meta.created_time, meta.updated_time),
            *(meta.created_by, meta.updated_by, meta.uid, meta.encoding.value, self._encode(meta)),
            *(entry.shown, msgspec.json.encode(keys).decode(), list(entry.missing), self._spec_id),
        )

    @override
    async def add_blobs(self, rows: Sequence[BlobRow]) -> None:
        await self._copy("loaded_blobs (key, size, owner)", ((row.key, row.size, row.owner) for row in rows))
        self._has_blobs = self._has_blobs or bool(rows)

    @override
    async def add_keys(self, keys: Sequence[StoredKey]) -> None:
        rows = (
            (key.key, at, key.request, key.time, *self._kept(meta))
            for key in keys
            for at, meta in enumerate(key.results)
        )
        await self._copy("loaded_done (key, operation, request, time, id, doc)", rows)

    def _kept(self, meta: ResourceMeta | None) -> tuple[str | None, bytes | None]:
        return (None, None) if meta is None else (meta.resource_id, self._encode(meta))

    @override
    async def publish(self) -> None:
        with translating():
            await self._check_and_insert()
        await self._commit()

    async def _check_and_insert(self) -> None:
        gone = await self._first(
            "SELECT key FROM loaded_uses u WHERE NOT EXISTS (SELECT 1 FROM loaded_blobs b WHERE b.key = u.key) LIMIT 1"
        )
        if gone is not None:
            raise blob_gone(gone[0])
        for name in self._spec.unique:
            await self._check_unique(name)
        for table in ("loaded", "loaded_revisions", "loaded_done"):
            await self._execute(f"ANALYZE {table}")
        for _ in range(MAX_DEADLOCKS):
            await self._execute("SAVEPOINT load")
            try:
                await self._insert()
                break
            except DeadlockDetected:
                await self._execute("ROLLBACK TO load")
            except UniqueViolation:
                raise model_not_empty("resources") from None
        else:
            raise StoreUnavailable("commits of the same ids went on and on; nothing was loaded, try again")

    async def _check_unique(self, name: str) -> None:
        found = await self._first(
            "SELECT array_agg(id ORDER BY id) FROM loaded WHERE keys->>%s IS NOT NULL GROUP BY keys->>%s"
            " HAVING count(*) > 1 LIMIT 1",
            (name, name),
        )
        if found is not None:
            raise taken(name, *found[0])

    async def _insert(self) -> None:
        """Insert everything, and check that the model was empty."""
        await self._execute(f"INSERT INTO <main> ({_COLUMNS}) SELECT {_COLUMNS} FROM loaded ORDER BY id")
        await self._execute("INSERT INTO <revisions> SELECT * FROM loaded_revisions ORDER BY id, revision")
        await self._execute("INSERT INTO <done> SELECT * FROM loaded_done ORDER BY key, operation")
        (uniques,) = await self._first("SELECT uniques FROM <state>")
        await self._insert_unique(uniques)
        if self._has_blobs:
            async with self._blob_schema.making(self._connection, mark=True):  # takes the lock
                await self._check_and_finish(uniques)
        else:
            await self._execute("SELECT pg_advisory_xact_lock(<lock>)")
            await self._check_and_finish(uniques)

    async def _check_and_finish(self, inserted: Sequence[str]) -> None:
        """Check everything under the lock. `inserted`: the unique fields whose values were inserted."""
        uniques, format_ = await self._first("SELECT uniques, format FROM <state>")
        if format_ > FORMAT:
            raise unknown_format(self._spec.name, format_, FORMAT)
        if set(uniques) - {BLOBS_MARKER} != set(inserted) - {BLOBS_MARKER}:
            raise StoreUnavailable("a field became unique meanwhile; nothing was loaded, try again")
        # All rows of the load are there, so there are others if there are more. This takes one pass, with any plan.
        for table, loaded, what in (
            ("main", "loaded", "resources"),
            ("done", "loaded_done", "results of Idempotency-Keys"),
        ):
            (more,) = await self._first(f"SELECT (SELECT count(*) FROM <{table}>) > (SELECT count(*) FROM {loaded})")
            if more:
                raise model_not_empty(what)
        if await self._blob_schema.has_tables(self._connection):
            if await self._first("SELECT 1 FROM <blobs> LIMIT 1"):
                raise model_not_empty("files")
            if self._has_blobs:
                await self._execute("INSERT INTO <blobs> SELECT * FROM loaded_blobs")
                await self._execute("INSERT INTO <blob-uses> SELECT DISTINCT * FROM loaded_uses")
                await self._execute(
                    "UPDATE <blob-state> SET blobs = l.count, size = l.sum"
                    " FROM (SELECT count(*), coalesce(sum(size), 0) AS sum FROM loaded_blobs) l"
                )
        if await self._first("SELECT 1 FROM <pins> WHERE pin = %s FOR SHARE", (self._pin,)) is None:
            raise pin_lost()

    async def _insert_unique(self, uniques: Sequence[str]) -> None:
        for name in uniques:
            if name == BLOBS_MARKER:
                continue
            if name not in self._spec.fields:
                raise not_indexed(self._spec.name, name)
            if name not in self._spec.unique:
                await self._check_unique(name)
            await self._execute(
                f"INSERT INTO <unique> (field, value, id) SELECT %s, {held('value')}, id"
                " FROM (SELECT id, keys->>%s AS value FROM loaded) l WHERE value IS NOT NULL",
                (name, name),
            )
