"""Facts about an archive that must be remembered while it is read, in a temporary file: memory stays constant.

The file is made when the first fact is noted.
"""

from __future__ import annotations

import threading
from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import apsw
import msgspec

from ..resource_manager.basic import BlobRow, RevisionInfo
from ..resource_manager.runtime.disk_space import full, is_full
from ..resource_manager.runtime.temporary import ProcessDirectory
from ..values import Key

_TABLES = """
CREATE TABLE blob_refs (model TEXT, key TEXT, id TEXT, PRIMARY KEY (model, key, id)) WITHOUT ROWID;
CREATE TABLE blobs (model TEXT, key TEXT, size INTEGER, new TEXT, PRIMARY KEY (model, key)) WITHOUT ROWID;
CREATE TABLE sizes (model TEXT, sha256 TEXT, size INTEGER, id TEXT, revision INTEGER,
    PRIMARY KEY (model, sha256, size, id)) WITHOUT ROWID;
CREATE TABLE rows (model TEXT, key TEXT, size INTEGER, owner TEXT, PRIMARY KEY (model, key)) WITHOUT ROWID;
CREATE TABLE uids (model TEXT, uid TEXT, new TEXT, PRIMARY KEY (model, uid)) WITHOUT ROWID;
CREATE TABLE bodies (number INTEGER PRIMARY KEY, model TEXT, uids BLOB);
CREATE TABLE currents (model TEXT, id TEXT, record BLOB, body BLOB, PRIMARY KEY (model, id));
CREATE TABLE uniques (model TEXT, field TEXT, value, id TEXT, PRIMARY KEY (model, field, value)) WITHOUT ROWID;
CREATE TABLE excluded (model TEXT, id TEXT, PRIMARY KEY (model, id)) WITHOUT ROWID;
CREATE TABLE blockers (model TEXT, id TEXT, field TEXT, blocker TEXT, PRIMARY KEY (model, id, field)) WITHOUT ROWID;
CREATE INDEX blocked ON blockers (model, blocker);
CREATE TABLE left_out (model TEXT, id TEXT, field TEXT, PRIMARY KEY (model, id)) WITHOUT ROWID;
CREATE TABLE ids (model TEXT, id TEXT, PRIMARY KEY (model, id)) WITHOUT ROWID;
CREATE TABLE digests (model TEXT, digest BLOB, PRIMARY KEY (model, digest)) WITHOUT ROWID;
BEGIN;
"""

MOST = 200_000
"""How many references to missing blobs, or with wrong sizes, are looked at."""
_UNRESOLVED = "WHERE model = ?1 AND NOT EXISTS (SELECT 1 FROM blobs b WHERE b.model = r.model AND b.key = r.key)"
_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(RevisionInfo).decode


class WrongSize(NamedTuple):
    """Data of a revision that give a blob another size than it has."""

    resource_id: str
    revision: int
    sha256: str
    given: int
    size: int


class ArchiveNotes:
    """A temporary database. Blocks. May be used by several threads.

    blob_refs  the resources whose records name a blob
    blobs      the blobs of the archive, with their sizes, and their keys in the store of the model
    sizes      the sizes of blobs as data give them, with a revision that has the data
    rows       the rows of blobs
    uids       the bodies that results of Idempotency-Keys name, with their uids in the store of the model
    bodies     the uids of the bodies that an import has stored before their records
    currents   the current revisions of large resources, which an import stores first
    uniques    the values of unique fields, with the resources that have them
    excluded   the resources that are never written: another one of the archive has a unique value of theirs, or the
               model has them and keeps its own
    left_out   the resources that are left out, because another one of the model has a unique value of theirs
    blockers   the resources that have a unique value which one of the archive wants, and that it may change
    ids        the ids of the resources of models with data
    digests    the resources that an interrupted import may have created
    """

    def __init__(self) -> None:
        self._directory: ProcessDirectory | None = None
        self._connection: apsw.Connection | None = None
        self._used: set[str] = set()  # tables that have rows, of those that are asked for each resource
        self._lock = threading.Lock()

    def close(self) -> None:
        """Remove the database."""
        with self._lock:
            connection, self._connection = self._connection, None
            if connection is not None:
                connection.close()
        if self._directory is not None:
            self._directory.remove()

    def note_references(self, model: str, resource_id: str, keys: Iterable[str]) -> None:
        """Note that a record of a resource names these blobs."""
        self._write("INSERT OR IGNORE INTO blob_refs VALUES (?, ?, ?)", [(model, key, resource_id) for key in keys])

    def note_blobs(self, model: str, rows: Iterable[BlobRow]) -> None:
        """Note that the archive has these blobs."""
        values = [(model, row.key, row.size) for row in rows]
        self._write("INSERT OR IGNORE INTO blobs VALUES (?, ?, ?, NULL)", values)

    def note_sizes(self, model: str, record: RevisionInfo, sizes: Iterable[tuple[str, int]]) -> None:
        """Note that the data of a revision give blobs, by their SHA-256, these sizes."""
        values = [(model, sha256, size, record.resource_id, record.revision) for sha256, size in sizes]
        self._write("INSERT OR IGNORE INTO sizes VALUES (?, ?, ?, ?, ?)", values)

    def wrong_size(self, model: str, absent: Collection[str]) -> WrongSize | None:
        """Return data that give a blob of the archive another size than it has, of no absent resource; None if none."""
        rows = self._rows(
            "SELECT s.id, s.revision, s.sha256, s.size, b.size FROM sizes s JOIN blobs b ON b.model = s.model"
            " AND b.key > s.sha256 || '/' AND b.key < s.sha256 || '0' AND b.size <> s.size"
            f" WHERE s.model = ? LIMIT {MOST}",
            (model,),
        )
        found = next((row for row in rows if row[0] not in absent), None)
        if found is None and len(rows) == MOST:
            found = rows[-1]
        return None if found is None else WrongSize(*found)

    def referred_to(self, model: str, after: str, limit: int) -> list[str]:
        """Return up to `limit` blobs that records name, ascending, that follow `after`."""
        return [
            key
            for (key,) in self._rows(
                "SELECT DISTINCT key FROM blob_refs WHERE model = ? AND key > ? ORDER BY key LIMIT ?",
                (model, after, limit),
            )
        ]

    def unresolved_ids(self, model: str) -> list[str]:
        """Return the ids of the resources that refer to blobs that the archive lacks."""
        rows = self._rows(f"SELECT DISTINCT id FROM blob_refs r {_UNRESOLVED}", (model,))
        return [resource_id for (resource_id,) in rows]

    def unresolved(self, model: str, absent: Collection[str]) -> tuple[str, str] | None:
        """Return a blob that the archive lacks, and a resource that refers to it and is not absent; None if none."""
        rows = self._rows(f"SELECT key, id FROM blob_refs r {_UNRESOLVED} LIMIT {MOST}", (model,))
        found = next(((key, resource_id) for key, resource_id in rows if resource_id not in absent), None)
        return rows[-1] if found is None and len(rows) == MOST else found

    def is_referred_to(self, model: str, key: str, absent: Collection[str]) -> bool:
        """Return whether a resource that is not absent and not excluded refers to a blob."""
        rows = self._rows(
            "SELECT id FROM blob_refs r WHERE model = ? AND key = ?"
            " AND NOT EXISTS (SELECT 1 FROM excluded e WHERE e.model = r.model AND e.id = r.id) LIMIT ?",
            (model, key, len(absent) + 1),
        )
        return any(resource_id not in absent for (resource_id,) in rows)

    def keep_rows(self, model: str, rows: Iterable[BlobRow]) -> None:
        """Keep the rows of blobs."""
        values = [(model, row.key, row.size, row.owner) for row in rows]
        self._write("INSERT OR IGNORE INTO rows VALUES (?, ?, ?, ?)", values)

    def row(self, model: str, key: str) -> BlobRow:
        """Return the row of a blob that was kept. Raises KeyError if there is none."""
        found = self._rows("SELECT size, owner FROM rows WHERE model = ? AND key = ?", (model, key))
        if not found:
            raise KeyError(key)
        return BlobRow(key=key, size=found[0][0], owner=found[0][1])

    def set_blob(self, model: str, key: str, new: str) -> None:
        """Note the key that a blob has in the store."""
        self._write("UPDATE blobs SET new = ?3 WHERE model = ?1 AND key = ?2", [(model, key, new)])

    def new_blob(self, model: str, key: str) -> str | None:
        """Return the key that a blob has in the store; None if it is not stored."""
        new: str | None = self._first("SELECT new FROM blobs WHERE model = ? AND key = ?", (model, key))
        return new

    def stored_blobs(self, model: str, after: str, limit: int) -> list[tuple[str, str]]:
        """Return up to `limit` stored blobs whose keys in the archive follow `after`, with their keys in the store."""
        statement = "SELECT key, new FROM blobs WHERE model = ? AND key > ? AND new NOT NULL ORDER BY key LIMIT ?"
        return self._rows(statement, (model, after, limit))

    def keep_bodies(self, model: str, uids: Sequence[str]) -> None:
        """Note the uids of bodies that are being stored."""
        self._write("INSERT INTO bodies VALUES (NULL, ?, ?)", [(model, msgspec.msgpack.encode(uids))])

    def stored_bodies(self, model: str) -> Iterator[list[str]]:
        """Yield the uids that were noted, as `keep_bodies` got them."""
        after = 0
        while rows := self._rows(
            "SELECT number, uids FROM bodies WHERE model = ? AND number > ? ORDER BY number LIMIT 1", (model, after)
        ):
            after, uids = rows[0]
            yield msgspec.msgpack.decode(uids, type=list[str])

    def want_uids(self, model: str, uids: Iterable[str]) -> None:
        """Note that results of Idempotency-Keys name these bodies."""
        self._used.add("uids")
        self._write("INSERT OR IGNORE INTO uids VALUES (?, ?, NULL)", [(model, uid) for uid in uids])

    def set_uids(self, model: str, uids: Iterable[tuple[str, str]]) -> None:
        """Note which uid replaces which, as pairs (archive, store). Keeps those of `want_uids` only."""
        if "uids" in self._used:
            self._write(
                "UPDATE uids SET new = ?3 WHERE model = ?1 AND uid = ?2", [(model, old, new) for old, new in uids]
            )

    def new_uid(self, model: str, uid: str) -> str | None:
        """Return the uid that a body has in the store; None if it is not known."""
        new: str | None = self._first("SELECT new FROM uids WHERE model = ? AND uid = ?", (model, uid))
        return new

    def keep_current(self, model: str, record: RevisionInfo, body: bytes) -> None:
        """Keep the current revision of a large resource."""
        self._used.add("currents")
        self._write("INSERT INTO currents VALUES (?, ?, ?, ?)", [(model, record.resource_id, _encode(record), body)])

    def current(self, model: str, resource_id: str) -> tuple[RevisionInfo, bytes] | None:
        """Return the current revision of a large resource; None if the resource is not large."""
        if "currents" not in self._used:
            return None
        rows = self._rows("SELECT record, body FROM currents WHERE model = ? AND id = ?", (model, resource_id))
        return next(((_decode(record), body) for record, body in rows), None)

    def claim(self, model: str, field: str, value: Key, resource_id: str) -> None:
        """Note that a resource has a value of a unique field."""
        self._write("INSERT OR IGNORE INTO uniques VALUES (?, ?, ?, ?)", [(model, field, value, resource_id)])

    def owner(self, model: str, field: str, value: Key) -> str | None:
        """Return the resource that has a value of a unique field; None if none has it."""
        found: str | None = self._first(
            "SELECT id FROM uniques WHERE model = ? AND field = ? AND value = ?", (model, field, value)
        )
        return found

    def claims(self, model: str, after: tuple[str, Key] | None, limit: int) -> list[tuple[str, Key, str]]:
        """Return values of unique fields that follow `after`, with their fields and resources."""
        where, values = ("", (model,)) if after is None else ("AND (field, value) > (?, ?)", (model, *after))
        return self._rows(
            f"SELECT field, value, id FROM uniques WHERE model = ? {where} ORDER BY field, value LIMIT ?",
            (*values, limit),
        )

    def note_id(self, model: str, resource_id: str) -> None:
        """Note the id of a resource."""
        self._write("INSERT OR IGNORE INTO ids VALUES (?, ?)", [(model, resource_id)])

    def ids(self, model: str, after: str, limit: int) -> list[str]:
        """Return up to `limit` noted ids that follow `after`, ascending."""
        rows = self._rows("SELECT id FROM ids WHERE model = ? AND id > ? ORDER BY id LIMIT ?", (model, after, limit))
        return [resource_id for (resource_id,) in rows]

    def exclude(self, model: str, ids: Iterable[str]) -> None:
        """Note that resources are never written."""
        self._used.add("excluded")
        self._write("INSERT OR IGNORE INTO excluded VALUES (?, ?)", [(model, resource_id) for resource_id in ids])

    def is_excluded(self, model: str, resource_id: str) -> bool:
        """Return whether a resource is never written."""
        if "excluded" not in self._used:
            return False
        return self._first("SELECT id FROM excluded WHERE model = ? AND id = ?", (model, resource_id)) is not None

    def leave_out(self, model: str, resource_id: str, field: str) -> None:
        """Note that a resource is left out for now, because another one has its value of a unique field."""
        self._write("INSERT OR REPLACE INTO left_out VALUES (?, ?, ?)", [(model, resource_id, field)])

    def note_blocker(self, model: str, resource_id: str, field: str, blocker: str) -> None:
        """Note that a resource of the archive is left out, with this field, if `blocker` is left out."""
        self._write("INSERT OR IGNORE INTO blockers VALUES (?, ?, ?, ?)", [(model, resource_id, field, blocker)])

    def leave_out_blocked(self, model: str) -> None:
        """Note as left out whichever resources are blocked by one that is left out."""
        before, count = 0, self.count_left_out(model)
        while before != count:
            self._write(
                "INSERT OR IGNORE INTO left_out SELECT b.model, b.id, b.field FROM blockers b JOIN left_out l"
                " ON l.model = b.model AND l.id = b.blocker WHERE b.model = ? ORDER BY b.field",
                [(model,)],
            )
            before, count = count, self.count_left_out(model)

    def has_id(self, model: str, resource_id: str) -> bool:
        """Return whether the id of a resource is noted."""
        return self._first("SELECT id FROM ids WHERE model = ? AND id = ?", (model, resource_id)) is not None

    def take_up(self, model: str, ids: Iterable[str]) -> None:
        """Note that resources are not left out any more."""
        if self._connection is not None:
            values = [(model, resource_id) for resource_id in ids]
            self._write("DELETE FROM left_out WHERE model = ? AND id = ?", values)

    def is_left_out(self, model: str, resource_id: str) -> bool:
        """Return whether a resource is left out for now."""
        return self._first("SELECT id FROM left_out WHERE model = ? AND id = ?", (model, resource_id)) is not None

    def count_left_out(self, model: str) -> int:
        """Return how many resources are left out for now."""
        return self._first("SELECT count(*) FROM left_out WHERE model = ?", (model,)) or 0

    def left_out(self, model: str, limit: int) -> list[tuple[str, int, list[str]]]:
        """Return each field because of which resources are left out, how many they are, and up to `limit` ids."""
        fields = self._rows("SELECT field, count(*) FROM left_out WHERE model = ? GROUP BY field", (model,))
        ids = "SELECT id FROM left_out WHERE model = ? AND field = ? ORDER BY id LIMIT ?"
        return [
            (field, count, [resource_id for (resource_id,) in self._rows(ids, (model, field, limit))])
            for field, count in fields
        ]

    def note_digests(self, model: str, digests: Iterable[bytes]) -> None:
        """Note resources that an interrupted import may have created."""
        self._write("INSERT OR IGNORE INTO digests VALUES (?, ?)", [(model, digest) for digest in digests])

    def has_digest(self, model: str, digest: bytes) -> bool:
        """Return whether an interrupted import may have created a resource."""
        return self._first("SELECT digest FROM digests WHERE model = ? AND digest = ?", (model, digest)) is not None

    def _first(self, statement: str, values: tuple[Any, ...]) -> Any:
        return next((value for (value,) in self._rows(statement, values)), None)

    def _write(self, statement: str, rows: list[tuple[Any, ...]]) -> None:
        if not rows:
            return
        with self._lock:
            connection = self._opened()
            try:
                connection.executemany(statement, rows)
            except apsw.Error as error:
                assert self._directory is not None, "`_opened` makes it"
                if is_full(error, self._directory.path):
                    raise full(error, self._directory.path) from error
                raise

    def _rows(self, statement: str, values: tuple[Any, ...]) -> list[tuple[Any, ...]]:
        with self._lock:
            return [] if self._connection is None else self._connection.execute(statement, values).fetchall()

    def _opened(self) -> apsw.Connection:
        if self._connection is None:
            self._directory = self._directory or ProcessDirectory()
            self._connection = apsw.Connection(str(self._directory.path / "notes.sqlite"))
            for name, value in (("journal_mode", "off"), ("synchronous", "off"), ("cache_size", -8192)):
                self._connection.pragma(name, value)
            self._connection.execute(_TABLES)
        return self._connection
