"""The tables and stored functions for blobs, which the first upload to a model makes, and the move to format 2.

    {t}:blobs       a row for each blob: its key, size and owner
    {t}:blob-uses   the keys that records name
    {t}:blob-state  one row: the epoch of uploads, and number and size of the blobs

Invariants, for F1 to F5 of `contract.blobs`. All functions run at READ COMMITTED, so each of their statements sees
all that was committed before the statement began.

- B1 *Uploads and removals take turns.* Both lock the row of `blob-state` before they look at anything. So an upload
  that waited for a removal sees the epoch that the removal left, and a removal that waited for an upload sees its row.
- B2 *A row is not removed while a commit that names it is running.* A commit locks the rows of all keys that it names
  (FOR KEY SHARE), in order of the keys and before it locks resources. A removal locks its rows in the same order (FOR
  UPDATE), which waits for these commits. Only then, in another statement, it looks for uses: the statement that waited
  still sees the state from before. A commit that waits for a removal finds no row afterwards.
- B3 *Uses are those of the records.* The function that commits changes both. The uses of a key that a commit replaces
  are visible to removals until this commit ends, and so keep the row.
- B4 *No commit that began before format 2 drops a reference.* The move to format 2 holds the lock of the schema (P3)
  alone, and replaces the functions that do not know formats by functions that refuse. A program of such a version may
  have called its function just before. Its change expects a state from before the first row, so no reference.
- B5 *Locks are taken in one order*, so no two transactions wait for each other: the lock of the schema, `blob-state`,
  unique values, rows of `blobs` by key, resources by id.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from typing import Any

from ...contract.blobs import BLOBS_MARKER
from . import pool
from .pool import Connection
from .query import literal
from .schema import UNKNOWN_FORMAT, UNKNOWN_UNIQUE, PostgresSchema


class BlobSchema:
    """The tables and functions for blobs of one model."""

    def __init__(self, schema: PostgresSchema) -> None:
        self._schema = schema
        self._functions = {
            "add": schema.function_name("add-blob", _ADD),
            "remove": schema.function_name("remove-blobs", _REMOVE),
        }

    def filled(self, statement: str) -> Any:
        """Return a statement with the names of this model, like `PostgresSchema.filled`."""
        return self._schema.filled(statement, self._functions)

    async def has_tables(self, connection: Connection) -> bool:
        """Return whether the tables exist."""
        cursor = await connection.execute("SELECT to_regclass(%s)", (self._schema.names["blobs"],))
        row = await cursor.fetchone()
        return row is not None and row[0] is not None

    async def ready(self, connection: Connection) -> bool:
        """Return whether the store has format 2, and the functions of this program. Takes no lock."""
        cursor = await connection.execute(
            self.filled(
                "SELECT format > 1 AND 2 = (SELECT count(*) FROM pg_proc WHERE proname = ANY(%s)"
                " AND pg_function_is_visible(oid)) FROM <state>"
            ),
            ([name.strip('"') for name in self._functions.values()],),
        )
        row = await cursor.fetchone()
        return row is not None and bool(row[0])

    @contextlib.asynccontextmanager
    async def making(self, connection: Connection, *, mark: bool) -> AsyncIterator[None]:
        """Make or complete the tables and functions, in the transaction of the first upload or removal.

        mark  whether to move to format 2 (B4)

        Commits wait until the context ends.
        """
        idle_ms = round(pool.IDLE_IN_TRANSACTION_S * 1000)
        async with connection.exclusive_transaction(self._schema.lock, idle_ms):
            for statement in _TABLES.split(";\n"):
                await connection.execute(self.filled(statement))
            for function in (_ADD, _REMOVE):
                await connection.execute(self.filled(function))
            if mark:
                await self._mark(connection)
            yield

    async def _mark(self, connection: Connection) -> None:
        cursor = await connection.execute(self.filled("SELECT format FROM <state>"))
        (found,) = await cursor.fetchone() or (2,)
        if found >= 2:
            return
        for name, arguments, result in await self._functions_without_format(connection):
            refusal = (
                f"CREATE OR REPLACE FUNCTION {name}({arguments}) RETURNS {result} LANGUAGE plpgsql AS $body$ BEGIN"
                f" RAISE EXCEPTION 'format' USING ERRCODE = '{UNKNOWN_UNIQUE}', DETAIL = {literal(BLOBS_MARKER)};"
                " END $body$"
            )
            await connection.execute(refusal.encode())
        await connection.execute(
            self.filled(
                "UPDATE <state> SET format = 2, uniques = array_append(array_remove(uniques, <marker>), <marker>)"
            )
        )

    async def _functions_without_format(self, connection: Connection) -> list[tuple[str, str, str]]:
        """Return the functions that write to this model and do not compare its format, with arguments and result."""
        cursor = await connection.execute(
            "SELECT format('%%I.%%I', n.nspname, p.proname), pg_get_function_arguments(p.oid),"
            " pg_get_function_result(p.oid) FROM pg_proc p JOIN pg_namespace n ON n.oid = p.pronamespace"
            " WHERE n.oid = (SELECT relnamespace FROM pg_class WHERE oid = to_regclass(%s))"
            " AND strpos(p.prosrc, %s) > 0 AND strpos(p.prosrc, %s) = 0",
            (self._schema.names["recent"], f"INSERT INTO {self._schema.names['recent']} ", UNKNOWN_FORMAT),
        )
        return [(str(name), str(arguments), str(result)) for name, arguments, result in await cursor.fetchall()]


_TABLES = """CREATE TABLE IF NOT EXISTS <blobs> (
  key text COLLATE "C" PRIMARY KEY, size bigint NOT NULL, owner text NOT NULL);
CREATE TABLE IF NOT EXISTS <blob-uses> (
  key text COLLATE "C" NOT NULL, id text COLLATE "C" NOT NULL, revision bigint NOT NULL, PRIMARY KEY (key, id, \
revision));
CREATE INDEX IF NOT EXISTS <blob-uses-by-id> ON <blob-uses> (id, revision);
CREATE TABLE IF NOT EXISTS <blob-state> (
  one int PRIMARY KEY CHECK (one = 1), epoch bigint NOT NULL, blobs bigint NOT NULL, size numeric NOT NULL);
INSERT INTO <blob-state> VALUES (1, 0, 0, 0) ON CONFLICT DO NOTHING"""

_BEGIN = """
  IF current_setting('transaction_isolation') <> 'read committed' THEN
    RAISE EXCEPTION 'isolation' USING ERRCODE = 'CS006';
  END IF;
  PERFORM pg_advisory_xact_lock_shared(<lock>);
  SELECT format INTO format_ FROM <state>;
  IF format_ > <format> THEN
    RAISE EXCEPTION 'format' USING ERRCODE = 'CS007', DETAIL = format_;
  END IF;
  INSERT INTO <recent> (call) VALUES (call_);
  SELECT epoch, size INTO state_ FROM <blob-state> FOR UPDATE;
"""

_ADD = f"""
CREATE OR REPLACE FUNCTION <add>(call_ uuid, key_ text, epoch_ bigint, size_ bigint, owner_ text, quota_ bigint)
RETURNS void LANGUAGE plpgsql AS $body$
DECLARE
  format_ int; state_ record;
BEGIN{_BEGIN}
  IF EXISTS (SELECT 1 FROM <blobs> WHERE key = key_) THEN RETURN; END IF;
  IF epoch_ < state_.epoch THEN
    RAISE EXCEPTION 'stale' USING ERRCODE = 'CS002';
  END IF;
  IF state_.size + size_ > quota_ THEN
    RAISE EXCEPTION 'quota' USING ERRCODE = 'CS009', DETAIL = state_.size;
  END IF;
  INSERT INTO <blobs> VALUES (key_, size_, owner_);
  UPDATE <blob-state> SET blobs = blobs + 1, size = size + size_;
END
$body$
"""

_REMOVE = f"""
CREATE OR REPLACE FUNCTION <remove>(call_ uuid, keys_ text[], epochs_ bigint[]) RETURNS SETOF text LANGUAGE plpgsql
AS $body$
DECLARE
  format_ int; state_ record; rows_ text[]; free_ text[]; epoch_ bigint;
BEGIN{_BEGIN}
  SELECT array_agg(key) INTO rows_ FROM
    (SELECT key FROM <blobs> WHERE key = ANY (keys_) ORDER BY key FOR UPDATE) locked;
  -- B2: a statement of its own, after the locks are held.
  SELECT array_agg(k) INTO free_ FROM unnest(keys_) k WHERE NOT EXISTS (SELECT 1 FROM <blob-uses> WHERE key = k);
  WITH gone AS (DELETE FROM <blobs> WHERE key = ANY (free_) RETURNING size)
    UPDATE <blob-state> s SET blobs = s.blobs - g.count, size = s.size - g.sum
    FROM (SELECT count(*), sum(size) FROM gone) g WHERE g.count > 0;
  SELECT max(e) + 1 INTO epoch_ FROM unnest(keys_, epochs_) x(k, e)
    WHERE k = ANY (free_) AND k <> ALL (coalesce(rows_, '{{}}'));
  UPDATE <blob-state> SET epoch = epoch_ WHERE epoch < epoch_;
  RETURN QUERY SELECT unnest(free_);
END
$body$
"""
