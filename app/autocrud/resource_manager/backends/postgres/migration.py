"""What a program needs in the tables of a model that another one made: functions, columns, indexes, unique fields."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Sequence
from typing import Any

import msgspec
import psycopg
from psycopg.errors import UniqueViolation

from ...basic import ModelSpec, ResourceMeta
from ...contract.metadata_codec import meta_of
from ...contract.store_errors import not_indexed, shared
from . import pool
from .pool import Connection
from .schema import PostgresSchema, held


class Migration:
    """`uniques`: the unique fields, as they were when somebody last looked. They become more, hardly ever less."""

    def __init__(self, spec: ModelSpec, schema: PostgresSchema) -> None:
        self._spec, self._schema = spec, schema
        self._kinds = {name: spec.fields[name].name for name in sorted(spec.fields)}
        self._fields = msgspec.json.encode(self._kinds).decode()
        self.uniques: set[str] = set()

    def _filled(self, statement: str) -> Any:
        return self._schema.filled(statement)

    async def ready(self, connection: Connection) -> int | None:
        """The number of the bound fields, if all that they need is there: then nothing has to be made, nor anybody locked out."""
        try:
            cursor = await connection.execute(
                self._filled(
                    "SELECT (SELECT id FROM <specs> WHERE fields = %s::jsonb), uniques,"
                    " EXISTS (SELECT 1 FROM pg_proc WHERE proname = %s AND pg_function_is_visible(oid)), fast_store FROM <state>"
                ),
                (self._fields, self._schema.function.strip('"')),
            )
            row = await cursor.fetchone()
        except (psycopg.errors.UndefinedTable, psycopg.errors.UndefinedColumn):  # none, or an older program's
            return None
        if row is None or row[0] is None or not row[2]:
            return None
        self._check(row[1])
        return int(row[0])

    async def make(self, connection: Connection) -> int:
        """Make or complete the schema. Several programs and versions may do it at once: they take turns."""
        async with self._exclusive_transaction(connection):  # indexes of large tables take their time
            for statement in self._schema.statements():
                await connection.execute(statement.encode())
            self._check(await self._stored_uniques(connection))
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

    def _check(self, uniques: Sequence[str]) -> None:
        self.uniques = set(uniques)
        for name in uniques:
            if name not in self._kinds:
                raise not_indexed(self._spec.name, name)

    async def outdated(self, connection: Connection, limit: int) -> list[ResourceMeta]:
        cursor = await connection.execute(self._filled("SELECT id, fields::text FROM <specs>"))
        lacking = [
            number
            for number, text in await cursor.fetchall()
            if not self._kinds.items() <= msgspec.json.decode(text).items()
        ]
        # Both of them, so that the index is used, which is this one to keep counts cheap.
        cursor = await connection.execute(
            self._filled("SELECT doc FROM <main> WHERE is_deleted IN (FALSE, TRUE) AND spec = ANY(%s::int[]) LIMIT %s"),
            (lacking, limit),
            binary=True,
        )
        return [meta_of(row[0]) for row in await cursor.fetchall()]

    async def activate_unique_fields(self, connection: Connection, *, force: bool) -> bool:
        """As MetaStore.activate_unique_fields."""
        async with self._exclusive_transaction(connection):
            stored = await self._stored_uniques(connection)
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
        """As MetaStore.deactivate_unique_field."""
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

    async def _stored_uniques(self, connection: Connection) -> Sequence[str]:
        cursor = await connection.execute(self._filled("SELECT uniques FROM <state>"))
        (uniques,) = await cursor.fetchone() or ([],)
        return list(uniques)

    @contextlib.asynccontextmanager
    async def _exclusive_transaction(self, connection: Connection) -> AsyncIterator[None]:
        """A transaction that may take its time, while nobody commits."""
        async with connection.exclusive_transaction(self._schema.lock, round(pool.IDLE_IN_TRANSACTION_S * 1000)):
            yield
