"""The part of PostgresMetaStore that reaches the tables of its model: the pool, the schema and the stored functions."""

from __future__ import annotations

import asyncio
import functools
import logging
import weakref
from collections.abc import Awaitable, Callable, Hashable, Sequence
from contextlib import AbstractAsyncContextManager
from typing import Any, TypeVar
from uuid import UUID, uuid4

import psycopg
from typing_extensions import override

from ...errors import ConfigError, CrudError, OutcomeUnknown
from ...secret import Secret
from ..backends.postgres import pool
from ..backends.postgres.migration import Migration
from ..backends.postgres.pool import Connection, Password, Pool, checked_dsn, close_pool, is_lost, pool_of, repeat_s
from ..backends.postgres.query import PostgresDialect
from ..backends.postgres.schema import PARTS, WRONG_ISOLATION, PostgresSchema
from ..backends.query_sql import SqlBuilder
from ..basic import Encoding, MetaStore, ModelSpec
from ..contract.metadata_codec import encoder

T = TypeVar("T")

log = logging.getLogger("crudstack.postgres")

RESOLVE_S = 15.0
"""Seconds for which the outcome of a commit is looked up after its reply was lost."""
RETRIED = ("40001", "40P01")
"""SQLSTATEs of serialization failures and deadlocks, after which a transaction is tried again."""


def server_error(error: CrudError) -> psycopg.Error | None:
    """Return the error of the server or the driver that is the cause of an error, or None."""
    return error.__cause__ if isinstance(error.__cause__, psycopg.Error) else None


class PostgresAccess(MetaStore):
    """A MetaStore that has tables in PostgreSQL. PostgresMetaStore documents the arguments."""

    def __init__(
        self,
        pg_dsn: str | Secret,
        encoding: Encoding | None = None,
        table_name: str = "resource_meta",
        *,
        password: Password | None = None,
        max_size: int = pool.MAX_SIZE,
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

    async def _do(self, work: Callable[[Connection], Awaitable[T]], *, again: bool = True, limited: bool = True) -> T:
        """Run `work` on a connection of the pool, after the schema exists."""
        await self._opened()
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

    async def _changed(self, statement: str, params: Sequence[Any] = ()) -> int:
        """Run a statement that changes rows and may run twice. Return how many rows it changed."""

        async def change(connection: Connection) -> int:
            return (await connection.execute(self._filled(statement), params)).rowcount

        return await self._do(change)

    def _filled(self, statement: str) -> Any:
        return self._schema.filled(statement)

    async def _opened(self) -> int:
        """Make or complete the schema at the first call. Return the number of the set of bound fields."""
        if self._spec_id is not None:
            return self._spec_id
        lock = self._opening.setdefault(asyncio.get_running_loop(), asyncio.Lock())
        async with lock:
            if self._spec_id is not None:
                return self._spec_id
            spec_id = await self._on_pool(self._migration.ready)
            if not spec_id:
                spec_id = await self._on_pool(self._migration.make, limited=False)
            self._spec_id = spec_id
            return spec_id

    async def _call(
        self,
        statement: Any,
        *parameters: Any,
        within: Callable[[Connection], AbstractAsyncContextManager[None]] | None = None,
    ) -> list[tuple[Any, ...]] | None:
        """Call a stored function that writes, once. If the reply is lost, find out whether it committed (P4).

        statement   the call, with filled names; its first parameter is the number of the call, which this method draws
        parameters  the further parameters
        within      the transaction of the call, which may take longer than other statements; None: one of its own

        Returns the rows of the call, or None if it committed and its reply was lost. Raises CrudError with the error of
        psycopg as its cause; then nothing was changed. Raises OutcomeUnknown.
        """
        clock = asyncio.get_running_loop().time
        began = clock()
        for last in (False, False, False, True):
            number = uuid4()

            async def execute(connection: Connection, number: UUID = number) -> list[tuple[Any, ...]]:
                if within is None:
                    return await (await connection.execute(statement, (number, *parameters))).fetchall()
                async with within(connection):
                    return await (await connection.execute(statement, (number, *parameters))).fetchall()

            try:
                return await self._on_pool(execute, again=False, limited=within is None)
            except CrudError as error:
                cause = server_error(error)
                if cause is None:
                    raise
                lost = is_lost(cause)
                # PostgreSQL may report TOOK_TOO_LONG even if the transaction has just ended.
                if lost or cause.sqlstate == pool.TOOK_TOO_LONG:
                    if await self._happened(number):
                        return None
                elif cause.sqlstate == WRONG_ISOLATION:  # the session of a pooler; see `postgres.session`
                    self._pool().request_isolation()
                elif cause.sqlstate in RETRIED:
                    log.info("PostgreSQL ended the transaction for another one; it is tried again")
                else:
                    raise
                if last or clock() - began > (repeat_s() if lost else pool.STATEMENT_S):
                    raise
        raise AssertionError

    async def _happened(self, number: UUID) -> bool:
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

    @override
    async def close(self) -> None:
        self._spec_id = None
        close_pool(self._dsn, self._password)
