"""The tables of one model in PostgreSQL, and the stored function that commits.

    {t}                a row for each resource: its document, the columns that queries compare, the keys of its indexed
                       fields
    {t}:revisions      the records
    {t}:unique         the values of unique fields, and the ids of the resources that own them
    {t}:shared-values  values that a resource has although another one owns them. It is used only if an index entry was
                       lost and restored
    {t}:done           the results of commits with an Idempotency-Key
    {t}:recent         the calls of the last day, and the calls that were refused after their reply was lost (P4)
    {t}:specs          the sets of indexed fields, with their kinds, under which rows were written
    {t}:state          one row: format, generation, unique fields, findings (see `storage.reindexing`), and the server
                       epoch of the cache that is in use (see `meta_store.fast_slow`)
    {t}:import         the entries of the journal of an import: see `contract.import_journal`
    {t}:pins           the pins of exports and imports, with the time of the last renewal by the clock of the server
    {t}:blobs, {t}:blob-uses, {t}:blob-state
                       see `blob_schema`; they exist only if an upload was received

A commit is one call of the function, thus one round trip and one transaction. Invariants:

- P1 *An expectation is checked by the statement that changes the row.* It is part of the UPDATE or INSERT, and the row
  stays locked until the commit. A conflict raises an error, so nothing of a batch stays. A batch locks its rows in the
  order of their ids, after the unique values (P2), so commits do not deadlock. If they do all the same, PostgreSQL ends
  one of them, and it is retried.
- P2 *Unique values are unique at the end of the commit.* A deferred constraint checks this, so a batch may swap values.
  A commit first locks its values, in order, because two commits that insert the same value would deadlock at their
  ends. The list of unique fields is in the state. A version of the program that does not know a unique field refuses to
  commit. A field is added to the list when all rows are indexed by it.
- P3 *No body that a sweep may have removed is committed.* Commits hold a shared advisory lock, and advancing the
  generation waits for it.
- P4 *The outcome of a lost reply is found out.* Each call inserts its number into `recent`. A client that lost the
  reply inserts the same number. If this fails, the call has happened. If it succeeds, the call never will happen,
  because its own insertion fails. While the call is running, the insertion waits for it.
- P5 *A function that does not know the format of the store writes nothing.* The format is in the state, and each
  function compares it with the one that it knows. Format 2 is that of a store with blobs. Functions of programs from
  before the formats do not compare: `blob_schema` replaces them in the transaction that sets the format.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping

from ....values import FieldKind
from ...contract.blobs import BLOBS_MARKER
from ..query_sql import quoted
from .query import PostgresDialect, literal

CONFLICT, STALE, DONE, UNKNOWN_UNIQUE, SHARED, WRONG_ISOLATION = "CS001", "CS002", "CS003", "CS004", "CS005", "CS006"
UNKNOWN_FORMAT, NO_BLOB, QUOTA = "CS007", "CS008", "CS009"
"""SQLSTATEs that the functions raise."""

FORMAT = 2
"""The newest format of a store that this program knows: format 1, and blobs (P5)."""
PARTS = (
    *("revisions", "unique", "shared-values", "done", "recent", "specs", "state", "pins", "import"),
    *("blobs", "blob-uses", "blob-state"),
)


def name_of(table: str, part: str = "") -> str:
    """Return an identifier. A hash shortens it to the 63 bytes that PostgreSQL keeps."""
    whole = f"{table}:{part}" if part else table
    if len(whole.encode()) <= 63:
        return whole
    digest = hashlib.sha256(whole.encode()).hexdigest()[:12]
    return whole.encode()[:50].decode("utf-8", "ignore") + "~" + digest


def held(value: str) -> str:
    """Return the SQL of a unique value in the table.

    A long value is replaced by its hash, because an index entry has 2.7 KB at most.
    """
    digest = f"'sha256:' || encode(sha256(convert_to({value}, 'UTF8')), 'hex')"
    return f"(CASE WHEN length({value}) > 500 THEN {digest} ELSE '=' || {value} END)"


class PostgresSchema:
    """The names and statements of one table."""

    def __init__(self, table: str, fields: Mapping[str, FieldKind]) -> None:
        self.table, self.fields = table, fields
        self.names = {"main": quoted(name_of(table))} | {part: quoted(name_of(table, part)) for part in PARTS}
        self.lock = int.from_bytes(hashlib.sha256(f"crudstack:{table}".encode()).digest()[:8], "big", signed=True)
        self.function = self.function_name("commit", _FUNCTION)

    def function_name(self, what: str, text: str) -> str:
        """Return the quoted name of a stored function, with a hash of its text: each version has another one."""
        return quoted(name_of(self.table, f"{what}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"))

    def filled(self, text: str, more: Mapping[str, str] = {}) -> str:
        """Return a statement with the names of this model: `<main>` is a table, `<main-state>` an index of it.

        more  the SQL of further names
        """
        known = self.names | {
            "function": self.function,
            "lock": str(self.lock),
            "held": held("value_"),
            "marker": literal(BLOBS_MARKER),
            "format": str(FORMAT),
            **more,
        }
        return re.sub(r"<([a-z-]+)>", lambda found: known.get(found[1]) or quoted(name_of(self.table, found[1])), text)

    def statements(self) -> list[str]:
        """Return the statements that make or complete the schema.

        Run them under the lock, in one transaction. Programs of several versions may do so.
        """
        made = [part for part in self.filled(_TABLES).split(";\n") if part.strip()]
        return [*made, self.filled(_FUNCTION), *self.indexes()]

    def indexes(self) -> list[str]:
        """Return the statements that make the indexes of the bound fields."""
        dialect, main = PostgresDialect(self.fields), self.names["main"]
        made = []
        for name, kind in self.fields.items():
            index = quoted(name_of(self.table, f"on:{name}:{kind.key_type.__name__}{'s' if kind.is_list else ''}"))
            if kind.is_list:
                on = f"USING gin ({dialect.column(name)} jsonb_path_ops)"
            else:
                key = dialect.prefix(name) if dialect.is_text(name) else dialect.column(name)
                on = f"(is_deleted, {key} NULLS FIRST, id)"
            made.append(f"CREATE INDEX IF NOT EXISTS {index} ON {main} {on}".replace("%%", "%"))
        return made


_TABLES = """
CREATE TABLE IF NOT EXISTS <main> (
  id text COLLATE "C" PRIMARY KEY, version bigint NOT NULL, nonce text NOT NULL, revision bigint NOT NULL,
  total_revision_count bigint NOT NULL, schema_version bigint NOT NULL, status text COLLATE "C" NOT NULL,
  is_deleted boolean NOT NULL, created_time timestamptz NOT NULL, updated_time timestamptz NOT NULL,
  created_by text COLLATE "C" NOT NULL, updated_by text COLLATE "C" NOT NULL, uid text NOT NULL, encoding text NOT NULL,
  doc bytea NOT NULL, shown bytea, keys jsonb NOT NULL DEFAULT '{}', absent text[] NOT NULL DEFAULT '{}', spec int \
NOT NULL DEFAULT 0);
CREATE INDEX IF NOT EXISTS <main-created> ON <main> (is_deleted, created_time NULLS FIRST, id);
CREATE INDEX IF NOT EXISTS <main-updated> ON <main> (is_deleted, updated_time NULLS FIRST, id);
CREATE INDEX IF NOT EXISTS <main-state> ON <main> (is_deleted, spec);
CREATE TABLE IF NOT EXISTS <revisions> (
  id text COLLATE "C" NOT NULL, revision bigint NOT NULL, uid text NOT NULL, doc bytea NOT NULL, PRIMARY KEY (id, \
revision));
CREATE INDEX IF NOT EXISTS <revisions-uid> ON <revisions> (uid);
CREATE TABLE IF NOT EXISTS <unique> (
  field text NOT NULL, value text COLLATE "C" NOT NULL, id text COLLATE "C" NOT NULL,
  CONSTRAINT <taken> UNIQUE (field, value) DEFERRABLE INITIALLY DEFERRED);
CREATE INDEX IF NOT EXISTS <unique-id> ON <unique> (id);
CREATE TABLE IF NOT EXISTS <shared-values> (
  id text COLLATE "C" NOT NULL, field text NOT NULL, value text COLLATE "C" NOT NULL, PRIMARY KEY (id, field));
CREATE INDEX IF NOT EXISTS <shared-values-by-value> ON <shared-values> (field, value);
CREATE TABLE IF NOT EXISTS <done> (
  key text NOT NULL, operation int NOT NULL, request text NOT NULL, time bigint NOT NULL, id text COLLATE "C", doc \
bytea,
  CONSTRAINT <done-pkey> PRIMARY KEY (key, operation));
CREATE INDEX IF NOT EXISTS <done-time> ON <done> (time);
CREATE INDEX IF NOT EXISTS <done-id> ON <done> (id) WHERE id IS NOT NULL;
CREATE TABLE IF NOT EXISTS <recent> (
  call uuid PRIMARY KEY, refused boolean NOT NULL DEFAULT FALSE, at timestamptz NOT NULL DEFAULT now());
CREATE TABLE IF NOT EXISTS <specs> (id int PRIMARY KEY, fields jsonb NOT NULL UNIQUE);
INSERT INTO <specs> VALUES (0, '{}') ON CONFLICT DO NOTHING;
CREATE TABLE IF NOT EXISTS <state> (
  one int PRIMARY KEY CHECK (one = 1), format int NOT NULL, generation bigint NOT NULL, uniques text[] NOT NULL);
ALTER TABLE <state> ADD COLUMN IF NOT EXISTS fast_life text, ADD COLUMN IF NOT EXISTS fast_since timestamptz,
  ADD COLUMN IF NOT EXISTS findings text, ADD COLUMN IF NOT EXISTS fast_lease float8 NOT NULL DEFAULT 0,
  ADD COLUMN IF NOT EXISTS fast_store text NOT NULL DEFAULT gen_random_uuid()::text;
INSERT INTO <state> (one, format, generation, uniques, findings) VALUES (1, 1, 0, '{}', '{"healed":true}')
ON CONFLICT DO NOTHING;
CREATE TABLE IF NOT EXISTS <import> (name text COLLATE "C" PRIMARY KEY, value bytea NOT NULL);
CREATE TABLE IF NOT EXISTS <pins> (pin text PRIMARY KEY, time timestamptz NOT NULL DEFAULT now());
"""

# The name of the function contains a hash of this text. A change, even of a comment, gives every database another one.
_FUNCTION = """
CREATE OR REPLACE FUNCTION <function>(call_ uuid, changes jsonb, docs bytea[], once jsonb) RETURNS void LANGUAGE \
plpgsql AS $body$
#variable_conflict use_variable
DECLARE
  c jsonb; m jsonb; field_ text; value_ text; generation_ bigint; uniques_ text[]; expected boolean;
  format_ int; keys_ text[];
BEGIN
  -- P2 and P3 look at what others have committed while this waited for them.
  IF current_setting('transaction_isolation') <> 'read committed' THEN
    RAISE EXCEPTION 'isolation' USING ERRCODE = 'CS006';
  END IF;
  PERFORM pg_advisory_xact_lock_shared(<lock>);
  -- Conditions with a query in them are nested: each one is planned anew at every call.
  IF once IS NOT NULL THEN
    IF EXISTS (SELECT 1 FROM <done> WHERE key = once->>'key') THEN
      RAISE EXCEPTION 'done before' USING ERRCODE = 'CS003';
    END IF;
  END IF;
  INSERT INTO <recent> (call) VALUES (call_);
  SELECT generation, array_remove(uniques, <marker>), format INTO generation_, uniques_, format_ FROM <state>;
  IF format_ > <format> THEN
    RAISE EXCEPTION 'format' USING ERRCODE = 'CS007', DETAIL = format_;
  END IF;
  IF uniques_ <> '{}' THEN
    PERFORM pg_advisory_xact_lock(h) FROM (
      SELECT DISTINCT hashtextextended(u || ':' || (x->'keys'->>u), <lock>) AS h
      FROM jsonb_array_elements(changes) x, unnest(uniques_) u WHERE x->'keys'->>u IS NOT NULL ORDER BY h) AS wanted;
  END IF;
  -- B2 in `blob_schema`: a later statement looks for the rows.
  IF format_ > 1 THEN
    SELECT array_agg(k) INTO keys_ FROM jsonb_array_elements(changes) x, jsonb_array_elements_text(x->'blobs') k;
    IF keys_ IS NOT NULL THEN
      PERFORM 1 FROM <blobs> WHERE key = ANY (keys_) ORDER BY key FOR KEY SHARE;
    END IF;
  END IF;
  IF jsonb_array_length(changes) > 1 THEN
    PERFORM 1 FROM <main> WHERE id IN (SELECT x->>'id' FROM jsonb_array_elements(changes) x) ORDER BY id FOR UPDATE;
  END IF;
  FOR c IN SELECT x FROM jsonb_array_elements(changes) x LOOP
    m := c->'meta';
    IF (c->>'generation')::bigint < generation_ - 1 THEN
      IF NOT EXISTS (SELECT 1 FROM <revisions> WHERE id = c->>'id' AND revision = (c->>'record')::bigint AND uid = \
c->>'uid') THEN
        RAISE EXCEPTION 'stale' USING ERRCODE = 'CS002';
      END IF;
    END IF;
    IF c ? 'purge' THEN
      DELETE FROM <main> WHERE id = c->>'id' AND version = (c->>'version')::bigint AND nonce = c->>'nonce';
      expected := FOUND;
      DELETE FROM <revisions> WHERE id = c->>'id';
      DELETE FROM <unique> WHERE id = c->>'id';
      DELETE FROM <shared-values> WHERE id = c->>'id';
      UPDATE <done> SET id = NULL, doc = NULL WHERE id = c->>'id';
    ELSIF m IS NULL THEN  -- an index entry for exactly this state
      UPDATE <main> SET keys = c->'keys', absent = ARRAY(SELECT jsonb_array_elements_text(c->'absent')), spec = \
(c->>'spec')::int,
        shown = docs[(c->>'shown')::int]
      WHERE id = c->>'id' AND version = (c->>'version')::bigint AND nonce = c->>'nonce';
      IF NOT FOUND THEN CONTINUE; END IF;
      expected := TRUE;
    ELSIF c ? 'version' THEN
      UPDATE <main> SET version = (m->>'version')::bigint, nonce = m->>'nonce', revision = (m->>'revision')::bigint,
        total_revision_count = (m->>'total_revision_count')::bigint, schema_version = (m->>'schema_version')::bigint,
        status = m->>'status', is_deleted = (m->>'is_deleted')::boolean, created_time = \
(m->>'created_time')::timestamptz,
        updated_time = (m->>'updated_time')::timestamptz, created_by = m->>'created_by', updated_by = m->>'updated_by',
        uid = m->>'uid', encoding = m->>'encoding', doc = docs[(c->>'doc')::int],
        keys = coalesce(c->'keys', keys), spec = coalesce((c->>'spec')::int, spec),
        absent = CASE WHEN c ? 'absent' THEN ARRAY(SELECT jsonb_array_elements_text(c->'absent')) ELSE absent END,
        shown = CASE WHEN c ? 'shown' THEN docs[(c->>'shown')::int] ELSE shown END
      WHERE id = c->>'id' AND version = (c->>'version')::bigint AND nonce = c->>'nonce';
      expected := FOUND;
    ELSE
      INSERT INTO <main> VALUES (c->>'id', (m->>'version')::bigint, m->>'nonce', (m->>'revision')::bigint,
        (m->>'total_revision_count')::bigint, (m->>'schema_version')::bigint, m->>'status', (m->>'is_deleted')::boolean,
        (m->>'created_time')::timestamptz, (m->>'updated_time')::timestamptz, m->>'created_by', m->>'updated_by', \
m->>'uid',
        m->>'encoding', docs[(c->>'doc')::int], docs[(c->>'shown')::int], coalesce(c->'keys', '{}'),
        coalesce(ARRAY(SELECT jsonb_array_elements_text(c->'absent')), '{}'), coalesce((c->>'spec')::int, 0))
      ON CONFLICT (id) DO NOTHING;
      expected := FOUND;
    END IF;
    IF NOT expected THEN
      RAISE EXCEPTION 'conflict' USING ERRCODE = 'CS001', DETAIL = c->>'id';
    END IF;
    IF format_ > 1 THEN
      IF c ? 'blobs' THEN  -- `blob-uses` still has the keys of the record that is replaced
        SELECT k INTO value_ FROM jsonb_array_elements_text(c->'blobs') k
          WHERE NOT EXISTS (SELECT 1 FROM <blobs> WHERE key = k) AND NOT EXISTS (
            SELECT 1 FROM <blob-uses> WHERE key = k AND id = c->>'id' AND revision = (c->>'record')::bigint) LIMIT 1;
        IF FOUND THEN
          RAISE EXCEPTION 'no blob' USING ERRCODE = 'CS008', DETAIL = value_;
        END IF;
      END IF;
      IF c ? 'purge' THEN
        DELETE FROM <blob-uses> WHERE id = c->>'id';
      END IF;
      IF c ? 'drop' THEN
        DELETE FROM <blob-uses> WHERE id = c->>'id' AND revision IN (
          SELECT revision FROM <revisions> WHERE id = c->>'id' AND uid IN (
            SELECT jsonb_array_elements_text(c->'drop')));
      END IF;
      IF c ? 'record' THEN
        DELETE FROM <blob-uses> WHERE id = c->>'id' AND revision = (c->>'record')::bigint;
        INSERT INTO <blob-uses> SELECT DISTINCT k, c->>'id', (c->>'record')::bigint
          FROM jsonb_array_elements_text(coalesce(c->'blobs', '[]')) k;
      END IF;
    ELSIF c ? 'blobs' THEN
      RAISE EXCEPTION 'no blob' USING ERRCODE = 'CS008', DETAIL = c->'blobs'->>0;
    END IF;
    IF c ? 'drop' THEN
      DELETE FROM <revisions> WHERE id = c->>'id' AND uid IN (SELECT jsonb_array_elements_text(c->'drop'));
    END IF;
    IF c ? 'record' THEN
      INSERT INTO <revisions> VALUES (c->>'id', (c->>'record')::bigint, c->>'uid', docs[(c->>'record_doc')::int])
      ON CONFLICT (id, revision) DO UPDATE SET uid = excluded.uid, doc = excluded.doc;
    END IF;
    IF c ? 'keys' AND uniques_ <> '{}' THEN
      DELETE FROM <unique> WHERE id = c->>'id';
      DELETE FROM <shared-values> WHERE id = c->>'id';
      FOREACH field_ IN ARRAY uniques_ LOOP
        IF NOT EXISTS (SELECT 1 FROM <specs> WHERE id = (c->>'spec')::int AND fields ? field_) THEN
          RAISE EXCEPTION 'unique' USING ERRCODE = 'CS004', DETAIL = field_;
        END IF;
        value_ := c->'keys'->>field_;
        IF value_ IS NULL THEN CONTINUE; END IF;
        IF c ? 'share' THEN
          IF EXISTS (SELECT 1 FROM <unique> WHERE field = field_ AND value = <held>) THEN
            INSERT INTO <shared-values> VALUES (c->>'id', field_, <held>);
            CONTINUE;
          END IF;
        END IF;
        INSERT INTO <unique> VALUES (field_, <held>, c->>'id');
      END LOOP;
    END IF;
  END LOOP;
  -- What is held and shared both was lost and came back: nobody may write it.
  IF uniques_ <> '{}' THEN
    SELECT s.field INTO field_ FROM <shared-values> s JOIN <unique> u USING (field, value)
      WHERE u.id IN (SELECT x->>'id' FROM jsonb_array_elements(changes) x WHERE x ? 'keys' AND NOT x ? 'share') LIMIT 1;
    IF FOUND THEN
      RAISE EXCEPTION 'shared' USING ERRCODE = 'CS005', DETAIL = field_;
    END IF;
  END IF;
  IF once IS NOT NULL THEN
    DELETE FROM <done> WHERE time < (once->>'time')::bigint - 86400000000;
    INSERT INTO <done> SELECT once->>'key', x.at - 1, once->>'request', (once->>'time')::bigint, x.result->>'id', \
docs[(x.result->>'doc')::int]
    FROM jsonb_array_elements(once->'results') WITH ORDINALITY AS x(result, at);
  END IF;
END
$body$
"""
