"""The tables of a MetaStore in SQLite, and its contract as plain functions of a connection.

The caller decides about transactions: `commit` and `reindex` must run inside one. MetaStores in memory and on disk,
local copies, and the records beside the bodies all use these tables.

    resources    a row for each resource: its document, the columns that queries compare, and a column `f:{name}` for
                 each indexed field
    list_values  the elements of indexed lists
    revisions    the records
    done         the results of commits with an Idempotency-Key: see `results_table`
    blobs ...    the rows of blobs and their uses: see `blob_tables`. Missing as long as the model has none
    specs        the sets of indexed fields, with their kinds, under which rows were written
    uniques      the fields that every writer keeps unique, and perhaps BLOBS_MARKER, which is no field
    state        one row: `format`; `generation`; `live`, the number of resources that are not deleted; `spec`, the
                 set for which this database was last opened; `stale`, whether rows may have been indexed for another

A row is outdated if the set under which it was written does not cover the bound fields.

Invariant: if the spec of a row is not `state.spec`, `stale` is 1. Opening the database for another spec sets it. So
does a commit by a process that opened it for another spec. Only a pass over all rows that finds none outdated clears
it.
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
    AlreadyCommitted,
    Change,
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
from ...contract.blobs import BLOBS_MARKER
from ...contract.metadata_codec import encoder, hit_of, info_of, meta_of
from ...contract.store_errors import (
    check_expectation,
    expectation_of,
    generation_of,
    missing,
    not_indexed,
    shared,
    storable_id,
    taken,
)
from ..query_sql import quoted
from . import blob_tables, import_table, sql
from .definitions import FORMAT, FORMAT_WITH_BLOBS, INDEXES, META_COLUMNS, TABLES
from .results_table import ResultsTable


class ResourceTables:
    """The tables of one model. Run `create` on the database before any other method.

    spec      the bound model: its name, indexed fields and unique fields
    encoding  of the documents
    lazy      whether the first statement that an index serves makes that index, so that writes maintain only indexes
              that are used. The connection must not be shared then
    """

    def __init__(self, spec: ModelSpec, encoding: Encoding | None = None, *, lazy: bool = False) -> None:
        self.spec, self._lazy = spec, lazy
        self.encoding = encoding or Encoding.json
        self._encode = encoder(self.encoding)
        self.results = ResultsTable(self._encode)
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
        self._covering = "0"  # the ids of the sets that cover the bound fields, as a list in SQL
        self._unmade: dict[str, str] = {}

    def create(self, connection: apsw.Connection) -> None:
        """Make or complete the schema. Several versions of the program may do this, one after the other.

        Raises ConfigError if the database has another format.
        """
        connection.execute(TABLES)
        found = connection.execute("SELECT format FROM state").get
        if found not in (FORMAT, FORMAT_WITH_BLOBS):
            raise ConfigError(
                f"the database of model {self.spec.name!r} has format {found}, this program knows {FORMAT} and"
                f" {FORMAT_WITH_BLOBS}: deploy a newer one"
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

    def indexed(self, connection: apsw.Connection, statement: str) -> str:
        """Make the indexes that may serve a statement, and return the statement."""
        if self._unmade:
            for served in [served for served in self._unmade if served in statement]:
                connection.execute(self._unmade.pop(served))
        return statement

    def get(self, connection: apsw.Connection, resource_id: str) -> ResourceMeta:
        """Return the metadata, of deleted resources too. Raises ResourceNotFound if there is none."""
        doc = connection.execute("SELECT doc FROM resources WHERE id = ?", (storable_id(resource_id),)).get
        if doc is None:
            raise missing(resource_id)
        return meta_of(doc, resource_id)

    def revision(self, connection: apsw.Connection, resource_id: str, revision: int) -> RevisionInfo:
        """Return the record of a revision. Raises RevisionNotFound if there is none."""
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
        """Return at most `limit` records below the number `before`, newest first."""
        rows = connection.execute(
            "SELECT v.doc FROM revisions v JOIN resources r USING (rid)"
            " WHERE r.id = ? AND v.revision < ? ORDER BY v.revision DESC LIMIT ?",
            (storable_id(resource_id), 2**62 if before is None else before, limit + 1),
        ).fetchall()
        items = [info_of(row[0], resource_id) for row in rows[:limit]]
        return Page(items, items[-1].revision if len(rows) > limit else None)

    def search(self, connection: apsw.Connection, query: Query) -> Page[Hit]:
        """Return a page of the resources that match a resolved query."""
        statement, params = self._search(query)
        rows: list[Any] = connection.execute(self.indexed(connection, statement), params).fetchall()
        next_ = None
        if len(rows) > query.limit:
            rows.pop()
            next_ = rows[-1][4:]
        if {row[0][:1] for row in rows} <= {b"{"}:
            return Page([Hit(row[0], row[1], row[2], row[3]) for row in rows], next_)
        return Page([hit_of(*row[:4]) for row in rows], next_)

    def count(self, connection: apsw.Connection, query: Query) -> int:
        """Return the number of resources that match a resolved query."""
        if query.where is None and not query.include_deleted:
            return int(connection.execute("SELECT live FROM state").get)
        statement, params = self._sql.count(query)
        return int(connection.execute(self.indexed(connection, statement), params).get)

    def scan(self, connection: apsw.Connection, after: str, limit: int) -> list[ResourceMeta]:
        """Return at most `limit` metadata whose ids come after `after`, in the order of ids."""
        rows = connection.execute("SELECT doc, id FROM resources WHERE id > ? ORDER BY id LIMIT ?", (after, limit))
        return [meta_of(*row) for row in rows.fetchall()]

    def records(self, connection: apsw.Connection, resource_id: str) -> list[RevisionInfo]:
        """Return all records of a resource, oldest first."""
        rows = connection.execute(
            "SELECT v.doc FROM revisions v JOIN resources r USING (rid) WHERE r.id = ? ORDER BY v.revision",
            (resource_id,),
        )
        return [info_of(row[0], resource_id) for row in rows.fetchall()]

    def unreferenced(self, connection: apsw.Connection, uids: Sequence[str]) -> list[str]:
        """Return those uids that no record names."""
        statement = self.indexed(connection, "SELECT 1 FROM revisions WHERE uid = ?")
        return [uid for uid in uids if connection.execute(statement, (uid,)).get is None]

    def outdated(self, connection: apsw.Connection, limit: int) -> list[ResourceMeta]:
        """Return the metadata of at most `limit` resources whose rows are outdated."""
        if not self.stale(connection):
            return []
        rows = connection.execute(f"SELECT doc, id FROM resources WHERE {self._outdated} LIMIT ?", (limit,))
        return [meta_of(*row) for row in rows.fetchall()]

    def stale(self, connection: apsw.Connection) -> bool:
        """Return whether rows may be outdated."""
        return bool(connection.execute("SELECT stale FROM state").get)

    def is_activated(self, connection: apsw.Connection) -> bool:
        """Return whether `activate_unique_fields` would do nothing."""
        return not self.stale(connection) and set(self.spec.unique) <= self.uniques(connection)

    def activate_unique_fields(self, connection: apsw.Connection, force: bool) -> bool:
        """Make every writer keep the unique fields unique. The caller is in a transaction, so no other write runs.

        Returns False, and changes nothing, if rows may be outdated and `force` is false. Raises ConfigError if two
        resources share a value.
        """
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
        """Stop keeping a field unique, unless all resources are indexed by it."""
        if self.lacks_field(connection, name):
            connection.execute("DELETE FROM uniques WHERE field = ?", (name,))

    def lacks_field(self, connection: apsw.Connection, name: str) -> bool:
        """Return whether some resources are not indexed by a field yet."""
        specs: list[Any] = connection.execute("SELECT id, fields FROM specs").fetchall()
        knowing = ", ".join(str(number) for number, fields in specs if name in msgspec.json.decode(fields))
        found = connection.execute(f"SELECT 1 FROM resources WHERE spec IS NULL OR spec NOT IN ({knowing}) LIMIT 1").get
        return found is not None

    def uniques(self, connection: apsw.Connection) -> set[str]:
        """Return the names of the fields that every writer keeps unique."""
        return {cast("str", row[0]) for row in connection.execute("SELECT field FROM uniques")} - {BLOBS_MARKER}

    def clear_stale_if_indexed(self, connection: apsw.Connection) -> None:
        """Clear `stale` if all rows are indexed for the bound fields. The caller may be in a transaction."""
        connection.execute(
            "UPDATE state SET stale = 0 WHERE spec = ?"
            f" AND NOT EXISTS (SELECT 1 FROM resources WHERE {self._outdated})",
            (self._spec_id,),
        )

    @property
    def _outdated(self) -> str:
        return f"(spec IS NULL OR spec NOT IN ({self._covering}))"

    def generation(self, connection: apsw.Connection) -> int:
        """Return the current generation of bodies."""
        return int(connection.execute("SELECT generation FROM state").get)

    def owner_of(self, connection: apsw.Connection, name: str, key: Key) -> str | None:
        """Return the id of a resource that has this value of an indexed field, or None if there is none."""
        found: str | None = connection.execute(
            f"SELECT id FROM resources WHERE is_deleted IN (0, 1) AND {sql.column(name)} = ?", (key,)
        ).get
        return found

    # Writing, inside the caller's transaction

    def advance_generation(self, connection: apsw.Connection) -> int:
        """Begin the next generation of bodies, and return its number."""
        connection.execute("UPDATE state SET generation = generation + 1")
        return self.generation(connection)

    def commit(
        self,
        connection: apsw.Connection,
        changes: Sequence[Change],
        unique: Collection[str] | None = None,
        once: IdempotentCommit | None = None,
    ) -> list[ResourceMeta]:
        """Apply the changes, and return the metadata after each. The caller is in a transaction.

        unique  the fields to keep unique, if not those of this database

        Raises AlreadyCommitted if the Idempotency-Key was used, VersionConflict if an
        expectation fails, StaleGeneration if a sweep may have removed a body, BlobGone if a record names a blob without
        a row, UniqueConflict if another resource has a unique value, and ConfigError if this program does not index a
        unique field.
        """
        if once is not None and (done := self.results.read(connection, once.key)) is not None:
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
            self.results.keep(connection, once, committed, changed)
        return committed

    def purge(self, connection: apsw.Connection, resource_id: str) -> None:
        """Remove all data of a resource."""
        found: Any = connection.execute("SELECT rid, format FROM resources, state WHERE id = ?", (resource_id,)).get
        if found is not None:
            rid, format_ = found
            for table in ("list_values", "revisions", "resources"):
                connection.execute(f"DELETE FROM {table} WHERE rid = ?", (rid,))
            self.results.forget(connection, resource_id)
            import_table.forget(connection, resource_id)
            if format_ == FORMAT_WITH_BLOBS:
                blob_tables.purge_uses(connection, resource_id)

    def put_index(self, connection: apsw.Connection, resource_id: str, entry: IndexEntry) -> None:
        """Replace the index entry of a resource."""
        rid = connection.execute("SELECT rid FROM resources WHERE id = ?", (resource_id,)).get
        if rid is not None:
            connection.execute(self._update_index, (*self._index_row(entry), rid))
            self._write_lists(connection, cast("int", rid), entry)

    def set_generation(self, connection: apsw.Connection, generation: int) -> None:
        """Set the generation of bodies to that of another store."""
        connection.execute("UPDATE state SET generation = ?1 WHERE generation <> ?1", (generation,))

    def mark_outdated(self, connection: apsw.Connection, resource_id: str) -> None:
        """Mark the index entry of a resource as one that lacks bound fields."""
        connection.execute("UPDATE resources SET spec = NULL WHERE id = ?", (resource_id,))
        connection.execute("UPDATE state SET stale = 1")

    def duplicated(self, connection: apsw.Connection, name: str) -> bool:
        """Return whether two resources share a value of this field."""
        col = sql.column(name)
        shared = f"SELECT 1 FROM resources WHERE {col} IS NOT NULL GROUP BY {col} HAVING count(*) > 1 LIMIT 1"
        return connection.execute(shared).get is not None

    def apply_committed(self, connection: apsw.Connection, changes: Sequence[Change]) -> None:
        """Apply changes that another store has committed, whatever the present state is."""
        for change in changes:
            self._apply(connection, change, committed=True)

    def reindex(
        self, connection: apsw.Connection, entries: Iterable[Reindex], unique: Collection[str] | None = None
    ) -> list[str]:
        """Store new index entries for the resources that are still in the expected state, and return their ids.

        unique  the fields to keep unique, if not those of this database

        Raises UniqueConflict if another resource has one of the values.
        """
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

    def _apply(self, connection: apsw.Connection, change: Change, *, committed: bool = False) -> ResourceMeta:
        meta = change.meta
        # All checks come before the first change, so that a conflict leaves nothing to undo.
        generation, spec, stale, format_, rid, version, nonce = connection.execute(
            "SELECT generation, s.spec, stale, format, rid, r.version, r.nonce"
            " FROM state s LEFT JOIN resources r ON r.id = ?",
            (storable_id(meta.resource_id),),
        ).get
        if not committed:
            found = None if rid is None else Version(version, nonce)
            check_expectation(expectation_of(change), meta.resource_id, found)
            if change.record is not None and generation_of(change.record.uid) < generation - 1:
                self._check_generation(connection, rid, change.record)
            if change.record is not None and change.record.blobs:
                blob_tables.check_record(connection, change.record)
        if spec != self._spec_id and not stale:
            connection.execute("UPDATE state SET stale = 1")
        if change.purge:
            self.purge(connection, meta.resource_id)
            return meta
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
            if format_ == FORMAT_WITH_BLOBS:
                blob_tables.drop_uses(connection, meta.resource_id, rid, uid)
            connection.execute("DELETE FROM revisions WHERE rid = ? AND uid = ?", (rid, uid))
        if change.record is not None:
            if format_ == FORMAT_WITH_BLOBS:
                blob_tables.put_uses(connection, change.record)
            self.put_record(connection, rid, change.record)
        return meta

    def _check_generation(self, connection: apsw.Connection, rid: Any, record: RevisionInfo) -> None:
        """Raise StaleGeneration if a sweep may have removed the body: no record names it yet.

        Publishing a draft keeps an old body, which a record names already.
        """
        kept = connection.execute(
            "SELECT 1 FROM revisions WHERE rid = ? AND revision = ? AND uid = ?", (rid, record.revision, record.uid)
        ).get
        if kept is None:
            raise StaleGeneration(f"{record.uid} is of a generation that may be swept already")

    def put_record(self, connection: apsw.Connection, rid: int, record: RevisionInfo) -> None:
        """Store the record of a revision. `rid` is the number of the row of its resource."""
        connection.execute(
            "INSERT OR REPLACE INTO revisions VALUES (?, ?, ?, ?)",
            (rid, record.revision, record.uid, self._encode(record)),
        )

    def take_staged(self, connection: apsw.Connection) -> None:
        """Insert the resources and records of the attached database `loaded`. There are none in this database."""
        columns = ", ".join([*META_COLUMNS, "shown", "missing", *map(sql.column, self.spec.fields)])
        connection.execute(
            f"INSERT INTO main.resources (rid, spec, {columns})"
            f" SELECT rid, {self._spec_id}, {columns} FROM loaded.resources ORDER BY rid"
        )
        connection.execute("INSERT INTO main.revisions SELECT * FROM loaded.revisions ORDER BY rid, revision")
        if self._lists:
            connection.execute(
                "INSERT INTO main.list_values SELECT * FROM loaded.list_values ORDER BY field, value, rid"
            )
        connection.execute("UPDATE state SET stale = 1 WHERE spec <> ?", (self._spec_id,))

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
        if self._lists:  # the column of a list only says that the list exists
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
                f"SELECT o.id FROM resources o JOIN resources r ON o.is_deleted IN (0, 1) AND o.{col} = r.{col}"
                " AND o.rid <> r.rid WHERE r.id = ?",
                (resource_id,),
            ).fetchall()
            if others:  # several, if earlier programs let resources share the value
                raise taken(name, resource_id, *(str(row[0]) for row in others))
