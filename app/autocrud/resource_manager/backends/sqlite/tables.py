"""The tables of a MetaStore in SQLite, and its contract as plain functions of a connection.

Whoever calls decides about transactions: `commit` and `reindex` must run inside one. The same tables serve the memory and disk
MetaStores and the records beside the bodies.

    resources    a row each: its document, the columns that queries compare, and one column `f:{name}` for each indexed field
    list_values  the elements of indexed lists
    revisions    the records
    done         what the commits left that carried an Idempotency-Key: a row for each operation; `doc` is NULL once it was purged
    specs        the sets of indexed fields, with their kinds, that rows were written under
    uniques      the fields that every writer keeps unique
    state        one row: `generation`; `live`, how many resources are not deleted; `spec`, the set that this database was last
                 opened for; `stale`, whether rows may have been indexed for another one

A row is outdated if the set it was written under does not cover the bound fields.

Invariant: if a row's spec is not `state.spec`, `stale` is 1. Opening for another spec sets it, and so does a commit by a process that was
opened for another one; only a pass over all rows that found none outdated clears it.
"""

from __future__ import annotations

import functools
from collections.abc import Collection, Iterable, Sequence
from typing import Any, cast

import apsw
import msgspec

from ....errors import ConfigError, RevisionNotFound, StaleGeneration
from ....query import Query
from ....values import Key, datetime_key
from ...basic import (
    KEEP_KEYS_US,
    AlreadyCommitted,
    Change,
    CommitResult,
    Encoding,
    Hit,
    IdempotentCommit,
    IndexEntry,
    ModelSpec,
    Page,
    Reindex,
    ResourceMeta,
    RevisionInfo,
    Version,
)
from ...contract.idempotency import results_to_keep
from ...contract.metadata_codec import encoder, hit_of, info_of, meta_of
from ...contract.store_errors import check_expectation, generation_of, missing, not_indexed, shared, storable_id, taken
from ..query_sql import quoted
from . import sql

META_COLUMNS = (
    "id",
    "version",
    "nonce",
    "revision",
    "total_revision_count",
    "schema_version",
    "status",
    "is_deleted",
    "created_time",
    "updated_time",
    "created_by",
    "updated_by",
    "uid",
    "encoding",
    "doc",
)
TABLES = """
CREATE TABLE IF NOT EXISTS resources (
  rid INTEGER PRIMARY KEY, id TEXT NOT NULL UNIQUE, version INTEGER NOT NULL, nonce TEXT NOT NULL,
  revision INTEGER NOT NULL, total_revision_count INTEGER NOT NULL, schema_version INTEGER NOT NULL,
  status TEXT NOT NULL, is_deleted INTEGER NOT NULL, created_time INTEGER NOT NULL, updated_time INTEGER NOT NULL,
  created_by TEXT NOT NULL, updated_by TEXT NOT NULL, uid TEXT NOT NULL, encoding TEXT NOT NULL, doc BLOB NOT NULL,
  shown BLOB, missing TEXT, spec INTEGER);
CREATE TABLE IF NOT EXISTS list_values (field TEXT, value, rid INTEGER, PRIMARY KEY (field, value, rid)) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS list_values_by_rid ON list_values (rid);
CREATE TABLE IF NOT EXISTS revisions (
  rid INTEGER, revision INTEGER, uid TEXT NOT NULL, doc BLOB NOT NULL, PRIMARY KEY (rid, revision)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS done (
  key TEXT, operation INTEGER, request TEXT NOT NULL, time INTEGER NOT NULL, id TEXT, doc BLOB, PRIMARY KEY (key, operation)) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS done_by_time ON done (time);
CREATE INDEX IF NOT EXISTS done_by_id ON done (id) WHERE id IS NOT NULL;
CREATE TABLE IF NOT EXISTS specs (id INTEGER PRIMARY KEY, fields TEXT NOT NULL UNIQUE);
CREATE TABLE IF NOT EXISTS uniques (field TEXT PRIMARY KEY) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS state (
  one INTEGER PRIMARY KEY CHECK (one = 1), format INTEGER, generation INTEGER, live INTEGER, spec INTEGER, stale INTEGER);
INSERT OR IGNORE INTO state VALUES (1, 1, 0, 0, 0, 0);
CREATE TRIGGER IF NOT EXISTS live_insert AFTER INSERT ON resources WHEN NOT NEW.is_deleted
  BEGIN UPDATE state SET live = live + 1; END;
CREATE TRIGGER IF NOT EXISTS live_delete AFTER DELETE ON resources WHEN NOT OLD.is_deleted
  BEGIN UPDATE state SET live = live - 1; END;
CREATE TRIGGER IF NOT EXISTS live_update AFTER UPDATE OF is_deleted ON resources WHEN OLD.is_deleted <> NEW.is_deleted
  BEGIN UPDATE state SET live = live + OLD.is_deleted - NEW.is_deleted; END;
"""
INDEXES = {
    "created_time": "CREATE INDEX IF NOT EXISTS by_created ON resources (is_deleted, created_time, id)",
    "updated_time": "CREATE INDEX IF NOT EXISTS by_updated ON resources (is_deleted, updated_time, id)",
    "uid = ?": "CREATE INDEX IF NOT EXISTS by_uid ON revisions (uid)",
}
"""What makes each index, by the text of a statement that it serves."""

FORMAT = 1


class ResourceTables:
    """The tables of one model. `create` must have run on the database before anything else.

    `lazy`: an index is made by the first statement that it serves, so that writes pay only for those that somebody uses. For one
    connection that nobody shares.
    """

    def __init__(self, spec: ModelSpec, encoding: Encoding | None = None, *, lazy: bool = False) -> None:
        self.spec, self._lazy = spec, lazy
        self.encoding = encoding or Encoding.json
        self._encode = encoder(self.encoding)
        self._sql = sql.SqliteBuilder(sql.SqliteDialect(spec.fields), "resources")
        self._search = functools.lru_cache(maxsize=512)(self._sql.search)
        self._lists = [name for name, kind in spec.fields.items() if kind.is_list]
        names = [*META_COLUMNS, "shown", "missing", "spec", *(sql.column(name) for name in spec.fields)]
        self._insert = f"INSERT INTO resources ({', '.join(names)}) VALUES ({', '.join('?' * len(names))})"
        self._update = f"UPDATE resources SET {', '.join(f'{name} = ?' for name in names)} WHERE rid = ?"
        self._update_meta = f"UPDATE resources SET {', '.join(f'{name} = ?' for name in META_COLUMNS)} WHERE rid = ?"
        index_names = names[len(META_COLUMNS) :]
        self._update_index = f"UPDATE resources SET {', '.join(f'{name} = ?' for name in index_names)} WHERE rid = ?"
        self.kinds = {name: spec.fields[name].name for name in sorted(spec.fields)}
        self._spec_id = 0
        self._covering = "0"  # the ids of the sets that cover the bound fields, for SQL
        self._unmade: dict[str, str] = {}

    def create(self, connection: apsw.Connection) -> None:
        """Make or complete the schema. Several versions of the program may do this, one after the other."""
        connection.execute(TABLES)
        found = connection.execute("SELECT format FROM state").get
        if found != FORMAT:
            raise ConfigError(
                f"the database of model {self.spec.name!r} has format {found}, this program knows {FORMAT}"
            )
        present = {row[1] for row in connection.execute("PRAGMA table_info(resources)")}
        indexes = dict(INDEXES)
        for name in self.spec.fields:
            column = sql.column(name)
            if sql.index_column(name) not in present:
                connection.execute(f"ALTER TABLE resources ADD COLUMN {column}")
            if name not in self._lists:
                index = quoted(f"by_{sql.index_column(name)}")
                indexes[column] = f"CREATE INDEX IF NOT EXISTS {index} ON resources (is_deleted, {column}, id)"
        now = map(sql.column, self.spec.unique) if self._lazy else tuple(indexes)
        for served in now:
            connection.execute(indexes.pop(served))
        self._unmade = indexes
        fields = msgspec.json.encode(self.kinds).decode()
        connection.execute("INSERT OR IGNORE INTO specs (fields) VALUES (?)", (fields,))
        self._spec_id = connection.execute("SELECT id FROM specs WHERE fields = ?", (fields,)).get
        covering = [
            str(number)
            for number, text in connection.execute("SELECT id, fields FROM specs").fetchall()
            if self.kinds.items() <= msgspec.json.decode(str(text)).items()
        ]
        self._covering = ", ".join(covering)
        connection.execute("UPDATE state SET spec = ?1, stale = 1 WHERE spec <> ?1", (self._spec_id,))

    # Reading

    def _indexed(self, connection: apsw.Connection, statement: str) -> str:
        """The statement, once the indexes are made that may serve it."""
        if self._unmade:
            for served in [served for served in self._unmade if served in statement]:
                connection.execute(self._unmade.pop(served))
        return statement

    def get(self, connection: apsw.Connection, resource_id: str) -> ResourceMeta:
        doc = connection.execute("SELECT doc FROM resources WHERE id = ?", (storable_id(resource_id),)).get
        if doc is None:
            raise missing(resource_id)
        return meta_of(doc, resource_id)

    def revision(self, connection: apsw.Connection, resource_id: str, revision: int) -> RevisionInfo:
        doc = connection.execute(
            "SELECT v.doc FROM revisions v JOIN resources r USING (rid) WHERE r.id = ? AND v.revision = ?",
            (storable_id(resource_id), revision),
        ).get
        if doc is None:
            raise RevisionNotFound(f"resource {resource_id!r} has no revision {revision}")
        return info_of(doc, resource_id)

    def revisions(
        self, connection: apsw.Connection, resource_id: str, before: int | None, limit: int
    ) -> Page[RevisionInfo]:
        rows = connection.execute(
            "SELECT v.doc FROM revisions v JOIN resources r USING (rid)"
            " WHERE r.id = ? AND v.revision < ? ORDER BY v.revision DESC LIMIT ?",
            (storable_id(resource_id), 2**62 if before is None else before, limit + 1),
        ).fetchall()
        items = [info_of(row[0], resource_id) for row in rows[:limit]]
        return Page(items, items[-1].revision if len(rows) > limit else None)

    def search(self, connection: apsw.Connection, query: Query) -> Page[Hit]:
        statement, params = self._search(query)
        rows: list[Any] = connection.execute(self._indexed(connection, statement), params).fetchall()
        next_ = None
        if len(rows) > query.limit:
            rows.pop()
            next_ = rows[-1][4:]
        if {row[0][:1] for row in rows} <= {b"{"}:
            return Page([Hit(row[0], row[1], row[2], row[3]) for row in rows], next_)
        return Page([hit_of(*row[:4]) for row in rows], next_)

    def count(self, connection: apsw.Connection, query: Query) -> int:
        if query.where is None and not query.include_deleted:
            return int(connection.execute("SELECT live FROM state").get)
        statement, params = self._sql.count(query)
        return int(connection.execute(self._indexed(connection, statement), params).get)

    def scan(self, connection: apsw.Connection, after: str, limit: int) -> list[ResourceMeta]:
        rows = connection.execute("SELECT doc, id FROM resources WHERE id > ? ORDER BY id LIMIT ?", (after, limit))
        return [meta_of(*row) for row in rows.fetchall()]

    def records(self, connection: apsw.Connection, resource_id: str) -> list[RevisionInfo]:
        """All records of a resource, oldest first."""
        rows = connection.execute(
            "SELECT v.doc FROM revisions v JOIN resources r USING (rid) WHERE r.id = ? ORDER BY v.revision",
            (resource_id,),
        )
        return [info_of(row[0], resource_id) for row in rows.fetchall()]

    def unreferenced(self, connection: apsw.Connection, uids: Sequence[str]) -> list[str]:
        statement = self._indexed(connection, "SELECT 1 FROM revisions WHERE uid = ?")
        return [uid for uid in uids if connection.execute(statement, (uid,)).get is None]

    def outdated(self, connection: apsw.Connection, limit: int) -> list[ResourceMeta]:
        if not self.stale(connection):
            return []
        rows = connection.execute(f"SELECT doc, id FROM resources WHERE {self._outdated} LIMIT ?", (limit,))
        return [meta_of(*row) for row in rows.fetchall()]

    def stale(self, connection: apsw.Connection) -> bool:
        return bool(connection.execute("SELECT stale FROM state").get)

    def is_activated(self, connection: apsw.Connection) -> bool:
        """Whether `activate_unique_fields` would do nothing."""
        return not self.stale(connection) and set(self.spec.unique) <= self.uniques(connection)

    def activate_unique_fields(self, connection: apsw.Connection, force: bool) -> bool:
        """As MetaStore.activate_unique_fields; in a transaction, so that nobody writes meanwhile."""
        self.clear_stale_if_indexed(connection)
        added = set(self.spec.unique) - self.uniques(connection)
        if added and not force and self.stale(connection):
            return False
        for name in added:
            if self.duplicated(connection, name):
                raise shared(self.spec.name, name)
            connection.execute("INSERT INTO uniques VALUES (?)", (name,))
        return True

    def deactivate_unique_field(self, connection: apsw.Connection, name: str) -> None:
        if self.lacks_field(connection, name):
            connection.execute("DELETE FROM uniques WHERE field = ?", (name,))

    def lacks_field(self, connection: apsw.Connection, name: str) -> bool:
        """Whether resources are not indexed by a field yet."""
        specs: list[Any] = connection.execute("SELECT id, fields FROM specs").fetchall()
        knowing = ", ".join(str(number) for number, fields in specs if name in msgspec.json.decode(fields))
        found = connection.execute(f"SELECT 1 FROM resources WHERE spec IS NULL OR spec NOT IN ({knowing}) LIMIT 1").get
        return found is not None

    def uniques(self, connection: apsw.Connection) -> set[str]:
        return {cast("str", row[0]) for row in connection.execute("SELECT field FROM uniques")}

    def clear_stale_if_indexed(self, connection: apsw.Connection) -> None:
        """Note that all rows are indexed for the bound fields, if they are; in a transaction too."""
        connection.execute(
            f"UPDATE state SET stale = 0 WHERE spec = ? AND NOT EXISTS (SELECT 1 FROM resources WHERE {self._outdated})",
            (self._spec_id,),
        )

    @property
    def _outdated(self) -> str:
        return f"(spec IS NULL OR spec NOT IN ({self._covering}))"

    def done(self, connection: apsw.Connection, key: str) -> CommitResult | None:
        rows = connection.execute("SELECT request, doc FROM done WHERE key = ? ORDER BY operation", (key,)).fetchall()
        if not rows:
            return None
        return CommitResult(cast("str", rows[0][0]), [None if doc is None else meta_of(doc) for _, doc in rows])

    def generation(self, connection: apsw.Connection) -> int:
        return int(connection.execute("SELECT generation FROM state").get)

    def owner_of(self, connection: apsw.Connection, name: str, key: Key) -> str | None:
        found: str | None = connection.execute(
            f"SELECT id FROM resources WHERE is_deleted IN (0, 1) AND {sql.column(name)} = ?", (key,)
        ).get
        return found

    # Writing, inside the caller's transaction

    def advance_generation(self, connection: apsw.Connection) -> int:
        connection.execute("UPDATE state SET generation = generation + 1")
        return self.generation(connection)

    def commit(
        self,
        connection: apsw.Connection,
        changes: Sequence[Change],
        unique: Collection[str] | None = None,
        once: IdempotentCommit | None = None,
    ) -> list[ResourceMeta]:
        """`unique`: the fields to be kept unique, if not those of this database. ConfigError where this program does not index them."""
        if once is not None and (done := self.done(connection, once.key)) is not None:
            raise AlreadyCommitted(done)
        if unique is None:
            unique = self.uniques(connection)
        for name in unique:
            if name not in self.kinds:
                raise not_indexed(self.spec.name, name)
        committed = [self._apply(connection, change) for change in changes]
        for change in changes:
            if change.index is not None and not change.purge:
                self._check_unique(connection, change.meta.resource_id, unique)
        if once is not None:
            changed = [(change.meta.resource_id, change.purge) for change in changes]
            self.keep_results(connection, once, committed, changed)
        return committed

    def keep_results(
        self,
        connection: apsw.Connection,
        once: IdempotentCommit,
        left: Sequence[ResourceMeta | None],
        changed: Sequence[tuple[str, bool]],
    ) -> None:
        """Store the results of a commit under its Idempotency-Key.

        left     the metadata after each change of the commit
        changed  for each change the id of its resource, and whether it is a purge
        """
        connection.execute("DELETE FROM done WHERE time < ?", (once.time - KEEP_KEYS_US,))
        for operation, result in enumerate(results_to_keep(once, changed)):
            meta = left[result] if isinstance(result, int) else result
            kept = (None, None) if meta is None else (meta.resource_id, self._encode(meta))
            connection.execute(
                "INSERT OR REPLACE INTO done VALUES (?, ?, ?, ?, ?, ?)",
                (once.key, operation, once.request, once.time, *kept),
            )

    def purge(self, connection: apsw.Connection, resource_id: str) -> None:
        """Remove what there is of a resource."""
        rid = connection.execute("SELECT rid FROM resources WHERE id = ?", (resource_id,)).get
        if rid is not None:
            for table in ("list_values", "revisions", "resources"):
                connection.execute(f"DELETE FROM {table} WHERE rid = ?", (rid,))
            connection.execute("UPDATE done SET id = NULL, doc = NULL WHERE id = ?", (resource_id,))

    def put_index(self, connection: apsw.Connection, resource_id: str, entry: IndexEntry) -> None:
        """Replace a resource's index entry."""
        rid = connection.execute("SELECT rid FROM resources WHERE id = ?", (resource_id,)).get
        if rid is not None:
            connection.execute(self._update_index, (*self._index_row(entry), rid))
            self._write_lists(connection, cast("int", rid), entry)

    def set_generation(self, connection: apsw.Connection, generation: int) -> None:
        connection.execute("UPDATE state SET generation = ?1 WHERE generation <> ?1", (generation,))

    def mark_outdated(self, connection: apsw.Connection, resource_id: str) -> None:
        """Note that a resource's index lacks bound fields."""
        connection.execute("UPDATE resources SET spec = NULL WHERE id = ?", (resource_id,))
        connection.execute("UPDATE state SET stale = 1")

    def duplicated(self, connection: apsw.Connection, name: str) -> bool:
        """Whether resources share a value of this field."""
        col = sql.column(name)
        shared = f"SELECT 1 FROM resources WHERE {col} IS NOT NULL GROUP BY {col} HAVING count(*) > 1 LIMIT 1"
        return connection.execute(shared).get is not None

    def apply_committed(self, connection: apsw.Connection, changes: Sequence[Change]) -> None:
        """Apply what was decided elsewhere, whatever is here."""
        for change in changes:
            self._apply(connection, msgspec.structs.replace(change, expect="any"), follow=True)

    def reindex(
        self, connection: apsw.Connection, entries: Iterable[Reindex], unique: Collection[str] | None = None
    ) -> list[str]:
        """The ids of those that were still in the expected state. `unique` as in `commit`."""
        done = []
        if unique is None:
            unique = self.uniques(connection)
        for resource_id, expect, entry in entries:
            row = connection.execute(
                "SELECT rid FROM resources WHERE id = ? AND version = ? AND nonce = ?", (resource_id, *expect)
            ).get
            if row is not None:
                connection.execute(self._update_index, (*self._index_row(entry), row))
                self._write_lists(connection, row, entry)
                done.append(resource_id)
        for resource_id in done:
            self._check_unique(connection, resource_id, unique)
        return done

    def _apply(self, connection: apsw.Connection, change: Change, *, follow: bool = False) -> ResourceMeta:
        meta = change.meta
        # Everything is checked before anything is changed, so that a conflict leaves nothing to take back.
        generation, spec, stale, rid, version, nonce = connection.execute(
            "SELECT generation, s.spec, stale, rid, r.version, r.nonce FROM state s LEFT JOIN resources r ON r.id = ?",
            (storable_id(meta.resource_id),),
        ).get
        check_expectation(change.expect, meta.resource_id, None if rid is None else Version(version, nonce))
        if not follow and change.record is not None and generation_of(change.record.uid) < generation - 1:
            self._check_generation(connection, rid, change.record)
        if spec != self._spec_id and not stale:
            connection.execute("UPDATE state SET stale = 1")
        if change.purge:
            self.purge(connection, meta.resource_id)
            return meta
        if change.expect == "any" and not follow:
            meta = msgspec.structs.replace(meta, version=1 if rid is None else version + 1)
        row = self._meta_row(meta)
        if rid is None:
            index = change.index
            connection.execute(self._insert, (*row, *(self._no_index() if index is None else self._index_row(index))))
            rid = connection.last_insert_rowid()
        elif change.index is None:
            connection.execute(self._update_meta, (*row, rid))
        else:
            connection.execute(self._update, (*row, *self._index_row(change.index), rid))
        if change.index is not None and self._lists:
            self._write_lists(connection, rid, change.index)
        for uid in change.drop:
            connection.execute("DELETE FROM revisions WHERE rid = ? AND uid = ?", (rid, uid))
        if change.record is not None:
            self.put_record(connection, rid, change.record)
        return meta

    def _check_generation(self, connection: apsw.Connection, rid: Any, record: RevisionInfo) -> None:
        """Raise StaleGeneration for a body that a sweep may have removed: one that no record names yet. Publishing keeps an old body."""
        kept = connection.execute(
            "SELECT 1 FROM revisions WHERE rid = ? AND revision = ? AND uid = ?", (rid, record.revision, record.uid)
        ).get
        if kept is None:
            raise StaleGeneration(f"{record.uid} is of a generation that may be swept already")

    def put_record(self, connection: apsw.Connection, rid: int, record: RevisionInfo) -> None:
        connection.execute(
            "INSERT OR REPLACE INTO revisions VALUES (?, ?, ?, ?)",
            (rid, record.revision, record.uid, self._encode(record)),
        )

    def _meta_row(self, meta: ResourceMeta) -> tuple[Any, ...]:
        created = datetime_key(meta.created_time)
        return (
            meta.resource_id,
            meta.version,
            meta.nonce,
            meta.revision,
            meta.total_revision_count,
            meta.schema_version,
            meta.status,
            meta.is_deleted,
            created,
            created if meta.updated_time is meta.created_time else datetime_key(meta.updated_time),
            meta.created_by,
            meta.updated_by,
            meta.uid,
            meta.encoding.value,
            self._encode(meta),
        )

    def _index_row(self, index: IndexEntry) -> tuple[Any, ...]:
        absent = "".join([f"\n{name}\n" for name in index.missing]) if index.missing else ""
        keys = index.keys
        if self._lists:  # a list's column only says that it is there
            keys = {name: 1 if isinstance(key, list) else key for name, key in keys.items()}
        return (index.shown, absent, self._spec_id, *map(keys.get, self.spec.fields))

    def _no_index(self) -> tuple[Any, ...]:
        return (None, "", None, *(None for _ in self.spec.fields))

    def _write_lists(self, connection: apsw.Connection, rid: int, index: IndexEntry) -> None:
        connection.execute("DELETE FROM list_values WHERE rid = ?", (rid,))
        for name in self._lists:
            values = index.keys.get(name)
            if isinstance(values, list):
                connection.executemany(
                    "INSERT OR IGNORE INTO list_values VALUES (?, ?, ?)", [(name, value, rid) for value in values]
                )

    def _check_unique(self, connection: apsw.Connection, resource_id: str, unique: Collection[str]) -> None:
        for name in unique:
            col = sql.column(name)
            others = connection.execute(
                f"SELECT o.id FROM resources o JOIN resources r ON o.is_deleted IN (0, 1) AND o.{col} = r.{col} AND o.rid <> r.rid"
                " WHERE r.id = ?",
                (resource_id,),
            ).fetchall()
            if others:  # several, if earlier programs let resources share the value
                raise taken(name, resource_id, *(str(row[0]) for row in others))
