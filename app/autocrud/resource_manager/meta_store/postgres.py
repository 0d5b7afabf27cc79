"""PostgresMetaStore: metadata, records and index in PostgreSQL. `backends.postgres.schema` has the commit protocol.

PostgresMetaStore("postgresql://user:password@localhost:5432/mine", table_name="meta_article")
"""

from __future__ import annotations

import asyncio
import datetime as dt
from collections.abc import AsyncIterator, Sequence
from typing import ClassVar

import msgspec
import psycopg
from psycopg.errors import UniqueViolation
from typing_extensions import override

from ...errors import (
    CrudError,
    ResourceNotFound,
    RevisionNotFound,
    StaleGeneration,
    VersionConflict,
)
from ...query import Query
from ...values import datetime_key
from ..backends.postgres.commit_arguments import CommitArguments
from ..backends.postgres.pool import Connection
from ..backends.postgres.schema import (
    CONFLICT,
    DONE,
    FORMAT,
    NO_BLOB,
    SHARED,
    STALE,
    UNKNOWN_FORMAT,
    UNKNOWN_UNIQUE,
    name_of,
)
from ..basic import (
    AlreadyCommitted,
    Change,
    CommitResult,
    Findings,
    Hit,
    IdempotentCommit,
    Page,
    Reindex,
    ResourceMeta,
    RevisionInfo,
    Version,
)
from ..contract.import_journal import forget_purged
from ..contract.metadata_codec import hit_of, info_of, meta_of
from ..contract.protocols import FindingsKeeping, IndexMigration, MetaSweeping
from ..contract.store_errors import (
    blob_gone,
    check_expectation,
    expectation_of,
    missing,
    not_indexed,
    storable_id,
    taken,
    unknown_format,
)
from ..runtime.threads import shielded
from .fast_slow import Fence
from .postgres_access import server_error
from .postgres_imports import PostgresImports
from .postgres_limits import PostgresLimits
from .postgres_loading import PostgresLoading
from .postgres_snapshots import PostgresSnapshots

SCAN_PAGE = 500
HEALTH_S = 1.5
"""Seconds after which a health check fails if the database does not answer; `/readyz` waits for 2 s."""
FENCE = """fast_life, fast_lease, CASE fast_since WHEN '-infinity' THEN 'infinity'::float8 WHEN 'infinity' THEN -1
ELSE coalesce(extract(epoch FROM clock_timestamp() - fast_since)::float8, -1) END, fast_store"""


class PostgresMetaStore(
    PostgresLoading,
    PostgresSnapshots,
    PostgresImports,
    PostgresLimits,
    IndexMigration,
    FindingsKeeping,
    MetaSweeping,
):
    """A MetaStore in tables of a PostgreSQL database. Durable, and shared by any number of processes.

    pg_dsn      the address of the database. TLS as in libpq: `?sslmode=verify-full&sslrootcert=...`
    encoding    the encoding of metadata documents
    table_name  the prefix of the names of its tables. It must not end like the name of one of them, like `:unique`
    password    makes the password of each new connection, if passwords expire
    max_size    how many connections to the database this process has at most, for all models together
    prepare     whether frequent statements are prepared under names, which are state of the session. None: only if
                there is no pooler in between. True fails behind PgBouncer in transaction mode, unless its
                `max_prepared_statements` is set (1.21 and later)

    No statement finds purged data. PostgreSQL overwrites them in its files when it uses the space again. Only VACUUM
    FULL would do so at once, but it locks the tables for all clients.
    """

    durable: ClassVar[bool] = True
    remote: ClassVar[bool] = True

    async def exists(self) -> bool:
        """Return whether the tables exist, without creating them. Raises StoreUnavailable."""

        async def look(connection: Connection) -> bool:
            cursor = await connection.execute("SELECT to_regclass(%s)", (self._schema.names["main"],))
            row = await cursor.fetchone()
            return row is not None and row[0] is not None

        return await self._on_pool(look)

    # Reading

    @override
    async def get(self, resource_id: str) -> ResourceMeta:
        rows = await self._rows("SELECT doc FROM <main> WHERE id = %s", (storable_id(resource_id),))
        if not rows:
            raise missing(resource_id)
        return meta_of(rows[0][0], resource_id)

    @override
    async def done(self, key: str, *, peek: bool = False) -> CommitResult | None:
        rows = await self._rows("SELECT request, doc FROM <done> WHERE key = %s ORDER BY operation", (key,))
        return CommitResult(rows[0][0], [None if doc is None else meta_of(doc) for _, doc in rows]) if rows else None

    @override
    async def revision(self, resource_id: str, revision: int) -> RevisionInfo:
        rows = await self._rows(
            "SELECT doc FROM <revisions> WHERE id = %s AND revision = %s", (storable_id(resource_id), revision)
        )
        if not rows:
            raise RevisionNotFound(f"resource {resource_id!r} has no revision {revision}")
        return info_of(rows[0][0], resource_id)

    @override
    async def revisions(self, resource_id: str, before: int | None = None, limit: int = 50) -> Page[RevisionInfo]:
        rows = await self._rows(
            "SELECT doc FROM <revisions> WHERE id = %s AND revision < %s ORDER BY revision DESC LIMIT %s",
            (storable_id(resource_id), 2**62 if before is None else before, limit + 1),
        )
        items = [info_of(row[0], resource_id) for row in rows[:limit]]
        return Page(items, items[-1].revision if len(rows) > limit else None)

    @override
    async def search(self, query: Query) -> Page[Hit]:
        statement, params = self._search(query)
        rows = await self._rows(statement, params)
        next_ = None
        if len(rows) > query.limit:
            rows.pop()
            next_ = tuple(datetime_key(key) if isinstance(key, dt.datetime) else key for key in rows[-1][4:])
        items = [
            Hit(doc, uid, encoding, shown or b"{}") if doc[:1] == b"{" else hit_of(doc, uid, encoding, shown or b"{}")
            for doc, uid, encoding, shown, *_ in rows
        ]
        return Page(items, next_)

    @override
    async def count(self, query: Query) -> int:
        ((number,),) = await self._rows(*self._sql.count(query))
        return int(number)

    @override
    async def scan(self) -> AsyncIterator[ResourceMeta]:
        after = ""
        while rows := await self._rows(
            "SELECT doc, id FROM <main> WHERE id > %s ORDER BY id LIMIT %s", (after, SCAN_PAGE)
        ):
            page = [meta_of(*row) for row in rows]
            for meta in page:
                yield meta
            after = page[-1].resource_id

    @override
    async def unreferenced(self, uids: Sequence[str]) -> list[str]:
        rows = await self._rows(
            "SELECT u FROM unnest(%s::text[]) u WHERE NOT EXISTS (SELECT 1 FROM <revisions> WHERE uid = u)",
            (list(uids),),
        )
        gone = {row[0] for row in rows}
        return [uid for uid in uids if uid in gone]

    @override
    async def outdated(self, limit: int) -> list[ResourceMeta]:
        return await self._do(lambda connection: self._migration.outdated(connection, limit))

    @override
    async def generation(self) -> int:
        ((number,),) = await self._rows("SELECT generation FROM <state>")
        return int(number)

    @override
    async def health(self) -> None:
        try:
            async with asyncio.timeout(HEALTH_S):
                await self._rows("SELECT 1 FROM <state>")
        except TimeoutError:
            raise self._pool().silent_for(HEALTH_S) from None

    # Writing

    @override
    async def commit(self, changes: Sequence[Change], once: IdempotentCommit | None = None) -> list[ResourceMeta]:
        # Runs to completion even if the caller is cancelled, so that the outcome is always found out.
        return await shielded(asyncio.ensure_future(self._commit(list(changes), once)))

    async def _commit(self, changes: list[Change], once: IdempotentCommit | None) -> list[ResourceMeta]:
        await forget_purged(self, changes)
        await self._write(CommitArguments(changes, once, await self._opened(), self._encode))
        return [change.meta for change in changes]

    async def _write(self, call: CommitArguments) -> None:
        """Call the stored function that commits."""
        statement = self._filled("SELECT <function>(%s::uuid, %s::jsonb, %b::bytea[], %s::jsonb)")
        try:
            await self._call(statement, *call.parameters)
        except CrudError as error:
            if (cause := server_error(error)) is not None:
                await self._raise(cause, call)
            raise

    async def _raise(self, cause: psycopg.Error, call: CommitArguments) -> None:
        """Raise the error that a SQLSTATE of the stored function stands for. Return if the SQLSTATE is another."""
        state, detail = cause.sqlstate, cause.diag.message_detail or ""
        if state == CONFLICT:
            change = next(change for change in call.changes if change.meta.resource_id == detail)
            try:
                meta = await self.get(detail)
                found = Version(meta.version, meta.nonce)
            except ResourceNotFound:
                found = None
            check_expectation(expectation_of(change), detail, found)
            raise VersionConflict(f"resource {detail!r} was changed by another writer") from None
        if state == STALE:
            raise StaleGeneration("a body is of a generation that may be swept already") from None
        if state == UNKNOWN_UNIQUE:
            raise not_indexed(self._spec.name, detail) from None
        if state == SHARED:
            raise taken(detail) from None
        if state == UNKNOWN_FORMAT:
            raise unknown_format(self._spec.name, int(detail), FORMAT) from None
        if state == NO_BLOB:
            raise blob_gone(detail) from None
        unique = isinstance(cause, UniqueViolation)
        if state == DONE or (unique and cause.diag.constraint_name == name_of(self._table, "done-pkey")):
            found_done = await self.done(call.once.key) if call.once is not None else None
            if found_done is not None:
                raise AlreadyCommitted(found_done) from None
            raise VersionConflict("the key was used a moment ago; look again") from None
        if unique and cause.diag.constraint_name == name_of(self._table, "taken"):
            raise taken(detail.partition("=(")[2].partition(", ")[0]) from None

    @override
    async def reindex(self, entries: Sequence[Reindex], *, share: bool = False) -> None:
        await self._write(CommitArguments([], None, await self._opened(), self._encode, entries, share=share))

    @override
    async def findings(self) -> Findings:
        ((kept,),) = await self._rows("SELECT findings FROM <state>")
        return Findings() if kept is None else msgspec.json.decode(kept, type=Findings)

    @override
    async def keep_findings(self, findings: Findings) -> None:
        async def keep(connection: Connection) -> None:
            kept = msgspec.json.encode(findings).decode()
            await connection.execute(self._filled("UPDATE <state> SET findings = %s"), (kept,))

        await self._do(keep)

    @override
    async def activate_unique_fields(self, *, force: bool = False) -> bool:
        if self._spec_id is not None and self._migration.uniques >= set(self._spec.unique):
            return True
        return await self._do(
            lambda connection: self._migration.activate_unique_fields(connection, force=force), limited=False
        )

    @override
    async def deactivate_unique_field(self, name: str) -> None:
        await self._do(lambda connection: self._migration.deactivate_unique_field(connection, name), limited=False)

    @override
    async def advance_generation(self) -> int:
        async def advance(connection: Connection) -> int:
            cursor = await connection.execute(  # one transaction
                self._filled(
                    "SELECT pg_advisory_xact_lock(<lock>);"
                    " UPDATE <state> SET generation = generation + 1 RETURNING generation"
                )
            )
            cursor.nextset()
            (number,) = await cursor.fetchone() or (0,)
            return int(number)

        return await self._do(advance)

    # The server epoch and the leases of the cache in front of this store: the methods of `fast_slow.Slow`

    async def get_fenced(self, resource_id: str) -> tuple[Fence, ResourceMeta | None]:
        """Return the fence and the metadata (None if there are none), read by one statement."""
        ((doc, *fence),) = await self._rows(
            f"SELECT (SELECT doc FROM <main> WHERE id = %s), {FENCE} FROM <state>", (storable_id(resource_id),)
        )
        return Fence(*fence), None if doc is None else meta_of(doc, resource_id)

    async def fence(self) -> Fence:
        """Return the server epoch in use, with its lease, its age and the id of this store."""
        (fence,) = await self._rows(f"SELECT {FENCE} FROM <state>")
        return Fence(*fence)

    async def adopt(self, server_epoch: str, lease_s: float, min_age_s: float) -> Fence:
        """Make this the epoch in use, with leases of at least `lease_s` seconds, and return the new fence.

        Changes nothing if the epoch and its lease are in use, or if the epoch in use is younger than `min_age_s`
        seconds. Then a second transaction stores the time from which all processes see the epoch, unless it is stored
        already.
        """

        async def adopt(connection: Connection) -> None:
            await connection.execute(
                self._filled(
                    "UPDATE <state> SET fast_life = %s, fast_lease = greatest(fast_lease, %s),"
                    " fast_since = CASE WHEN fast_life IS NULL THEN '-infinity' ELSE 'infinity' END::timestamptz"
                    " WHERE fast_life IS NULL OR ((fast_life <> %s OR fast_lease < %s)"
                    " AND fast_since <= clock_timestamp() - make_interval(secs => %s))"
                ),
                (server_epoch, lease_s, server_epoch, lease_s, min_age_s),
            )
            # A second transaction, because all processes see the epoch only now. At an earlier time, some could
            # still read the former epoch.
            await connection.execute(
                self._filled("UPDATE <state> SET fast_since = clock_timestamp() WHERE fast_since = 'infinity'")
            )

        await self._do(adopt)
        return await self.fence()

    # Maintenance

    @override
    async def maintain(self, budget_s: float) -> None:
        async def forget(connection: Connection) -> int:
            cursor = await connection.execute(
                self._filled(
                    "DELETE FROM <recent> WHERE call IN"
                    " (SELECT call FROM <recent> WHERE at < now() - interval '1 day' LIMIT 10000)"
                )
            )
            return cursor.rowcount

        clock = asyncio.get_running_loop().time
        end = clock() + budget_s
        while await self._do(forget) and clock() < end:
            pass
