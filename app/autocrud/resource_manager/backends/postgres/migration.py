"""Completes the tables that another version of the program made: functions, columns, indexes, unique fields."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Sequence
from typing import Any

import msgspec
import psycopg
from psycopg.errors import UniqueViolation

from ...basic import ModelSpec, ResourceMeta
from ...contract.blobs import BLOBS_MARKER
from ...contract.metadata_codec import meta_of
from ...contract.store_errors import not_indexed, shared, unknown_format
from . import pool
from .pool import Connection
from .schema import FORMAT, PostgresSchema, held


class Migration:
    """The schema changes of one model.

    `uniques` are the unique fields as they were last read. Fields are added, and removed only in rare cases.
    """

    def __init__(self, spec: ModelSpec, schema: PostgresSchema) -> None:
        self._spec, self._schema = spec, schema
        self._kinds = {name: spec.fields[name].name for name in sorted(spec.fields)}
        self._fields = msgspec.json.encode(self._kinds).decode()
        self.uniques: set[str] = set()

    def _filled(self, statement: str) -> Any:
        return self._schema.filled(statement)

    async def ready(self, connection: Connection) -> int | None:
        """Return the number of the set of bound fields if no schema change is needed, else None. Takes no lock.

        Raises ConfigError if this program does not index a unique field, or does not know the format of the store.
        """
        try:
            cursor = await connection.execute(
                self._filled(
                    "SELECT (SELECT id FROM <specs> WHERE fields = %s::jsonb), uniques,"
                    " EXISTS (SELECT 1 FROM pg_proc WHERE proname = %s AND pg_function_is_visible(oid)), format,"
                    " fast_store FROM <state>"
                ),
                (self._fields, self._schema.function.strip('"')),
            )
            row = await cursor.fetchone()
        except (
            psycopg.errors.UndefinedTable,
            psycopg.errors.UndefinedColumn,
        ):  # no tables, or those of an older version
            return None
        if row is None or row[0] is None or not row[2]:
            return None
        self._check(row[1], row[3])
        return int(row[0])

    async def make(self, connection: Connection) -> int:
        """Make or complete the schema, and return the number of the set of bound fields.

        Programs of several versions may call this at the same time: a lock makes them take turns. Raises ConfigError if
        this program does not index a unique field, or does not know the format of the store.
        """
        async with self._exclusive_transaction(connection):  # indexes of large tables take their time
            for statement in self._schema.statements():
                await connection.execute(statement.encode())
            self._check(*await self._stored_state(connection))
            await connection.execute(
                self._filled(
                    "INSERT INTO <specs> SELECT max(id) + 1, %s::jsonb FROM <specs> ON CONFLICT (fields) DO NOTHING"
                ),
                (self._fields,),
            )
            cursor = await connection.execute(
                self._filled("SELECT id FROM <specs> WHERE fields = %s::jsonb"), (self._fields,)
            )
            (number,) = await cursor.fetchone() or (None,)
        assert number is not None
        return int(number)

    def _check(self, uniques: Sequence[str], format_: int) -> None:
        if format_ > FORMAT:
            raise unknown_format(self._spec.name, format_, FORMAT)
        self.uniques = set(uniques)
        for name in uniques:
            if name not in self._kinds and name != BLOBS_MARKER:
                raise not_indexed(self._spec.name, name)

    async def outdated(self, connection: Connection, limit: int) -> list[ResourceMeta]:
        """Return the metadata of at most `limit` resources that are not indexed for the bound fields."""
        cursor = await connection.execute(self._filled("SELECT id, fields::text FROM <specs>"))
        lacking = [
            number
            for number, text in await cursor.fetchall()
            if not self._kinds.items() <= msgspec.json.decode(text).items()
        ]
        # Both values of is_deleted, so that PostgreSQL uses the index that begins with it.
        cursor = await connection.execute(
            self._filled("SELECT doc FROM <main> WHERE is_deleted IN (FALSE, TRUE) AND spec = ANY(%s::int[]) LIMIT %s"),
            (lacking, limit),
            binary=True,
        )
        return [meta_of(row[0]) for row in await cursor.fetchall()]

    async def activate_unique_fields(self, connection: Connection, *, force: bool) -> bool:
        """Make every writer keep the unique fields unique. Blocks commits meanwhile.

        Returns False if rows are outdated and `force` is false. Raises ConfigError if two resources share a value.
        """
        async with self._exclusive_transaction(connection):
            stored, _ = await self._stored_state(connection)
            added = [name for name in self._spec.unique if name not in stored]
            if added and not force and await self.outdated(connection, 1):
                return False
            for name in added:
                await self._activate(connection, name)
        self.uniques = {*stored, *added}
        return True

    async def _activate(self, connection: Connection, name: str) -> None:
        values = f"SELECT %s::text, {held('(keys ->> %s)')}, id FROM <main> WHERE (keys ->> %s) IS NOT NULL"
        count = values.count("%s")
        try:
            await connection.execute(self._filled(f"INSERT INTO <unique> {values}"), [name] * count)
            await connection.execute("SET CONSTRAINTS ALL IMMEDIATE")
        except UniqueViolation:
            raise shared(self._spec.name, name) from None
        await connection.execute(self._filled("UPDATE <state> SET uniques = array_append(uniques, %s)"), (name,))

    async def deactivate_unique_field(self, connection: Connection, name: str) -> None:
        """Stop keeping a field unique, unless all resources are indexed by it. Blocks commits meanwhile."""
        async with self._exclusive_transaction(connection):
            cursor = await connection.execute(
                self._filled(
                    "UPDATE <state> SET uniques = array_remove(uniques, %s)"
                    " WHERE EXISTS (SELECT 1 FROM <main> JOIN <specs> s ON spec = s.id WHERE NOT fields ? %s)"
                ),
                (name, name),
            )
            if cursor.rowcount:
                await connection.execute(self._filled("DELETE FROM <unique> WHERE field = %s"), (name,))
                await connection.execute(self._filled("DELETE FROM <shared-values> WHERE field = %s"), (name,))
                self.uniques.discard(name)

    async def _stored_state(self, connection: Connection) -> tuple[Sequence[str], int]:
        """Return the unique fields and the format of the store."""
        cursor = await connection.execute(self._filled("SELECT uniques, format FROM <state>"))
        uniques, format_ = await cursor.fetchone() or ([], 1)
        return list(uniques), int(format_)

    @contextlib.asynccontextmanager
    async def _exclusive_transaction(self, connection: Connection) -> AsyncIterator[None]:
        """Hold the lock of the schema in a transaction that may take long. Commits wait until it ends."""
        async with connection.exclusive_transaction(self._schema.lock, round(pool.IDLE_IN_TRANSACTION_S * 1000)):
            yield
