"""PostgresMetaStore: metadata, records and index in PostgreSQL. `backends.postgres.schema` has the commit protocol.

PostgresMetaStore("postgresql://user:password@localhost:5432/mine", table_name="meta_article")
"""

from __future__ import annotations

import asyncio
import datetime as dt
import functools
import logging
import weakref
from collections.abc import AsyncIterator, Awaitable, Callable, Hashable, Sequence
from typing import Any, ClassVar, TypeVar
from uuid import uuid4

import msgspec
import psycopg
from psycopg.errors import UniqueViolation
from typing_extensions import override

from ...errors import (
    ConfigError,
    CrudError,
    OutcomeUnknown,
    ResourceNotFound,
    RevisionNotFound,
    StaleGeneration,
    VersionConflict,
)
from ...query import Query
from ...secret import Secret
from ...values import datetime_key
from ..backends.postgres.commit_arguments import CommitArguments
from ..backends.postgres.migration import Migration
from ..backends.postgres.pool import (
    MAX_SIZE,
    STATEMENT_S,
    TOOK_TOO_LONG,
    Connection,
    Password,
    Pool,
    checked_dsn,
    close_pool,
    is_lost,
    pool_of,
    repeat_s,
)
from ..backends.postgres.query import PostgresDialect
from ..backends.postgres.schema import (
    CONFLICT,
    DONE,
    PARTS,
    SHARED,
    STALE,
    UNKNOWN_UNIQUE,
    WRONG_ISOLATION,
    PostgresSchema,
    name_of,
)
from ..backends.query_sql import SqlBuilder
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
    Version,
)
from ..contract.metadata_codec import encoder, hit_of, info_of, meta_of
from ..contract.protocols import FindingsKeeping, IndexMigration, MetaSweeping
from ..contract.store_errors import check_expectation, expectation_of, missing, not_indexed, storable_id, taken
from ..runtime.threads import shielded
from .fast_slow import Fence

T = TypeVar("T")

log = logging.getLogger("crudstack.postgres")

SCAN_PAGE = 500
HEALTH_S = 1.5
"""Seconds after which a health check fails if the database does not answer; `/readyz` waits for 2 s."""
RESOLVE_S = 15.0
"""Seconds for which the outcome of a commit is looked up after its reply was lost."""
FENCE = """fast_life, fast_lease, CASE fast_since WHEN '-infinity' THEN 'infinity'::float8 WHEN 'infinity' THEN -1
ELSE coalesce(extract(epoch FROM clock_timestamp() - fast_since)::float8, -1) END, fast_store"""
RETRIED = ("40001", "40P01")
"""SQLSTATEs of serialization failures and deadlocks, after which a transaction is tried again."""


class PostgresMetaStore(MetaStore, IndexMigration, FindingsKeeping, MetaSweeping):
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

    def __init__(
        self,
        pg_dsn: str | Secret,
        encoding: Encoding | None = None,
        table_name: str = "resource_meta",
        *,
        password: Password | None = None,
        max_size: int = MAX_SIZE,
        prepare: bool | None = None,
    ) -> None:
        dsn = checked_dsn(pg_dsn)
        owner, colon, part = table_name.rpartition(":")
        if colon and part in PARTS:
            raise ConfigError(
                f"table_name is {table_name!r}: that is a table of the store whose table_name is {owner!r}"
            )
        self._dsn, self._password, self._max_size, self._table = dsn, password, max_size, table_name
        self._prepare = prepare
        self._encode = encoder(encoding or Encoding.json)
        self._opening: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, asyncio.Lock] = weakref.WeakKeyDictionary()
        self.bind(ModelSpec("unbound"))

    @override
    def bind(self, spec: ModelSpec) -> None:
        self._spec = spec
        self._schema = PostgresSchema(self._table, spec.fields)
        self._migration = Migration(spec, self._schema)
        self._sql = SqlBuilder(PostgresDialect(spec.fields), self._schema.names["main"])
        self._search = functools.lru_cache(maxsize=512)(self._sql.search)
        self._spec_id: int | None = None

    @property
    @override
    def location_key(self) -> Hashable:
        return "postgres", self._dsn, self._table

    # Connections

    async def _do(self, work: Callable[[Connection], Awaitable[T]], *, again: bool = True, limited: bool = True) -> T:
        """Run `work` on a connection of the pool, after the schema exists."""
        if self._spec_id is None:
            await self._open()
        return await self._on_pool(work, again=again, limited=limited)

    async def _on_pool(
        self, work: Callable[[Connection], Awaitable[T]], *, again: bool = True, limited: bool = True
    ) -> T:
        return await self._pool().run(work, again=again, limited=limited)

    def _pool(self) -> Pool:
        return pool_of(self._dsn, self._password, self._max_size, self._prepare)

    async def _rows(self, statement: str, params: Sequence[Any] = ()) -> list[tuple[Any, ...]]:
        """Return the rows of a statement that only reads. `<main>` and other such names stand for its tables."""

        async def read(connection: Connection) -> list[tuple[Any, ...]]:
            cursor = await connection.execute(self._filled(statement), params, binary=True)
            return await cursor.fetchall()

        return await self._do(read)

    def _filled(self, statement: str) -> Any:
        return self._schema.filled(statement)

    async def exists(self) -> bool:
        """Return whether the tables exist, without creating them. Raises StoreUnavailable."""

        async def look(connection: Connection) -> bool:
            cursor = await connection.execute("SELECT to_regclass(%s)", (self._schema.names["main"],))
            row = await cursor.fetchone()
            return row is not None and row[0] is not None

        return await self._on_pool(look)

    async def _open(self) -> None:
        lock = self._opening.setdefault(asyncio.get_running_loop(), asyncio.Lock())
        async with lock:
            if self._spec_id is None:
                ready, make = self._migration.ready, self._migration.make
                self._spec_id = await self._on_pool(ready) or await self._on_pool(make, limited=False)

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
        if self._spec_id is None:
            await self._open()
        await self._call(CommitArguments(changes, once, self._spec_id or 0, self._encode))
        return [change.meta for change in changes]

    async def _call(self, call: CommitArguments) -> None:
        """Call the stored function that commits. If the answer is lost, find out whether it committed (P4)."""
        clock = asyncio.get_running_loop().time
        began = clock()
        for last in (False, False, False, True):
            number = uuid4()
            parameters = (number, *call.parameters)

            async def execute(connection: Connection, parameters: Any = parameters) -> None:
                statement = self._filled("SELECT <function>(%s::uuid, %s::jsonb, %b::bytea[], %s::jsonb)")
                await connection.execute(statement, parameters)

            try:
                await self._on_pool(execute, again=False)
            except CrudError as error:
                cause = error.__cause__
                if not isinstance(cause, psycopg.Error):
                    raise
                if (
                    is_lost(cause) or cause.sqlstate == TOOK_TOO_LONG
                ):  # PostgreSQL may report this even if the transaction has just ended
                    if await self._happened(number):
                        return
                elif cause.sqlstate == WRONG_ISOLATION:  # the session of a pooler; see `postgres.session`
                    self._pool().request_isolation()
                elif cause.sqlstate in RETRIED:
                    log.info("PostgreSQL ended the transaction for another one; it is tried again")
                else:
                    await self._raise(cause, call)
                    raise
                if last or clock() - began > (repeat_s() if is_lost(cause) else STATEMENT_S):
                    raise
            else:
                return

    async def _happened(self, number: Any) -> bool:
        """Return whether a call whose reply was lost was committed. If not, it never will be.

        Raises OutcomeUnknown if the database does not answer for RESOLVE_S seconds.
        """

        async def refuse(connection: Connection) -> bool:
            await connection.execute(
                self._filled("INSERT INTO <recent> (call, refused) VALUES (%s, TRUE) ON CONFLICT DO NOTHING"), (number,)
            )
            cursor = await connection.execute(self._filled("SELECT refused FROM <recent> WHERE call = %s"), (number,))
            row = await cursor.fetchone()
            return row is not None and not row[0]

        deadline = asyncio.get_running_loop().time() + RESOLVE_S
        while True:
            try:
                return await self._on_pool(refuse)
            except CrudError as error:
                if asyncio.get_running_loop().time() > deadline:
                    raise OutcomeUnknown(
                        "the database did not say whether this was stored; look before you try again"
                    ) from error
                await asyncio.sleep(0.2)

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
        if self._spec_id is None:
            await self._open()
        await self._call(CommitArguments([], None, self._spec_id or 0, self._encode, entries, share=share))

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

    @override
    async def close(self) -> None:
        self._spec_id = None
        close_pool(self._dsn, self._password)
