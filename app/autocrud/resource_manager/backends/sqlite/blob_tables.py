"""The rows of blobs in SQLite, and their uses by records, as plain functions of a connection.

    blobs       a row for each upload: see BlobRow
    blob_uses   a row for each key in the record of a revision
    blob_state  one row: `epoch` (F2); `blobs` and `size`, the number of blobs and of their bytes

The tables are made by the first commit that needs them, so models without blobs have none of them. The commit of the
first row marks the database: it sets `state.format` to FORMAT_WITH_BLOBS, and adds BLOBS_MARKER to `uniques` (F5).

The caller decides about transactions. Methods that write must run inside one.

- F1 holds because each method checks and writes in the caller's transaction: `check_record` looks for the rows of the
  keys of a new record, and `remove` looks for uses before it removes a row.
- Only a database with FORMAT_WITH_BLOBS has rows of blobs. Only there, uses are kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import apsw

from ....errors import StoreDamaged
from ...basic import BlobRow, RevisionInfo, blob_epoch_of
from ...contract.blobs import BLOBS_MARKER, BlobUsage, BlobUse
from ...contract.store_errors import blob_gone, over_quota, stale_upload
from .definitions import FORMAT_WITH_BLOBS

TABLES = """
CREATE TABLE IF NOT EXISTS blobs (key TEXT PRIMARY KEY, size INTEGER NOT NULL, owner TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS blob_uses (
  key TEXT, id TEXT, revision INTEGER, PRIMARY KEY (key, id, revision)) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS blob_uses_by_id ON blob_uses (id, revision);
CREATE TABLE IF NOT EXISTS blob_state (
  one INTEGER PRIMARY KEY CHECK (one = 1), epoch INTEGER NOT NULL, blobs INTEGER NOT NULL, size INTEGER NOT NULL);
INSERT OR IGNORE INTO blob_state VALUES (1, 0, 0, 0);
CREATE TRIGGER IF NOT EXISTS blobs_insert AFTER INSERT ON blobs
  BEGIN UPDATE blob_state SET blobs = blobs + 1, size = size + NEW.size; END;
CREATE TRIGGER IF NOT EXISTS blobs_delete AFTER DELETE ON blobs
  BEGIN UPDATE blob_state SET blobs = blobs - 1, size = size - OLD.size; END;
"""


def exist(connection: apsw.Connection) -> bool:
    """Return whether the database must have the tables.

    A marked database that has lost them is damaged, so the statements that use them must fail.
    """
    found: Any = connection.execute(
        "SELECT format = ? OR EXISTS (SELECT 1 FROM sqlite_schema WHERE name = 'blob_state') FROM state",
        (FORMAT_WITH_BLOBS,),
    ).get
    return bool(found)


def is_marked(connection: apsw.Connection) -> bool:
    """Return whether the database is marked as one that has, or once had, rows of blobs."""
    found: Any = connection.execute("SELECT format FROM state").get
    return bool(found == FORMAT_WITH_BLOBS)


def epoch(connection: apsw.Connection) -> int:
    """Return the epoch with which the uids of new uploads begin."""
    return _state(connection)[0] if exist(connection) else 0


def usage(connection: apsw.Connection) -> BlobUsage:
    """Return how many blobs have a row, and their size together."""
    return BlobUsage(*_state(connection)[1:]) if exist(connection) else BlobUsage(0, 0)


def rows(connection: apsw.Connection, sha256s: Sequence[str]) -> list[BlobRow]:
    """Return the rows of all blobs with one of these hashes, by ascending key."""
    if not exist(connection):
        return []
    found: list[BlobRow] = []
    for sha256 in sorted(set(sha256s)):  # "0" follows "/", so these are the keys that begin with `{sha256}/`
        ordered: Any = connection.execute(
            "SELECT key, size, owner FROM blobs WHERE key > ? AND key < ? ORDER BY key", (f"{sha256}/", f"{sha256}0")
        )
        found += [BlobRow(key=key, size=size, owner=owner) for key, size, owner in ordered]
    return found


def row(connection: apsw.Connection, key: str) -> BlobRow | None:
    """Return the row of a blob, or None if there is none."""
    found: Any = None
    if exist(connection):
        found = connection.execute("SELECT key, size, owner FROM blobs WHERE key = ?", (key,)).get
    return None if found is None else BlobRow(key=found[0], size=found[1], owner=found[2])


def uses(connection: apsw.Connection, key: str, limit: int) -> list[BlobUse]:
    """Return the newest revision of each resource that names a blob, of at most `limit` resources."""
    if not exist(connection):
        return []
    found: Any = connection.execute(
        "SELECT id, max(revision) FROM blob_uses WHERE key = ? GROUP BY id ORDER BY id LIMIT ?", (key, limit)
    )
    return [BlobUse(*use) for use in found]


# Writing, inside the caller's transaction


def add(connection: apsw.Connection, row: BlobRow, quota: int | None) -> bool:
    """Store the row of an upload, and mark the database. Return False, and do nothing, if the row exists.

    Raises StaleGeneration and BlobQuotaExceeded.
    """
    upload_epoch = blob_epoch_of(row.key)
    if exist(connection):
        if _has_row(connection, row.key):
            return False
        if upload_epoch < epoch(connection):
            raise stale_upload(row.key)
    if quota is not None and (taken := usage(connection).size) + row.size > quota:
        raise over_quota(row, taken, quota)
    put(connection, row)
    return True


def put(connection: apsw.Connection, row: BlobRow) -> None:
    """Store a row without checks, and mark the database."""
    mark(connection)
    connection.execute("INSERT OR IGNORE INTO blobs VALUES (?, ?, ?)", (row.key, row.size, row.owner))


def mark(connection: apsw.Connection) -> None:
    """Mark the database as one with rows of blobs (F5), and make the tables. Does nothing if it is marked."""
    if not is_marked(connection):
        connection.execute(TABLES)
        connection.execute("INSERT OR IGNORE INTO uniques VALUES (?)", (BLOBS_MARKER,))
        connection.execute("UPDATE state SET format = ?", (FORMAT_WITH_BLOBS,))


def remove(connection: apsw.Connection, keys: Sequence[str]) -> tuple[list[str], list[str]]:
    """Remove the rows of those keys that no record names, and raise the epoch above those of the keys without a row.

    Returns the keys that no record names, and those of them that had a row. Changes nothing if no key had a row and
    the epoch is high enough.
    """
    unused = [key for key in dict.fromkeys(keys) if not _has_use(connection, key)]
    removed = [key for key in unused if _has_row(connection, key)]
    raised = max((blob_epoch_of(key) + 1 for key in set(unused).difference(removed)), default=0)
    for key in removed:
        delete(connection, key)
    if raised > epoch(connection):
        set_epoch(connection, raised)
    return unused, removed


def delete(connection: apsw.Connection, key: str) -> None:
    """Remove a row without checks. Does nothing if there is none."""
    if exist(connection):
        connection.execute("DELETE FROM blobs WHERE key = ?", (key,))


def set_epoch(connection: apsw.Connection, number: int) -> None:
    """Set the epoch. The tables are made if the epoch is not 0."""
    if exist(connection) or number:
        connection.execute(TABLES)
        connection.execute("UPDATE blob_state SET epoch = ?1 WHERE epoch <> ?1", (number,))


def check_record(connection: apsw.Connection, record: RevisionInfo) -> None:
    """Raise BlobGone if a record names a key without a row that the record which it replaces does not name."""
    present = exist(connection)
    for key in record.blobs:
        if not present or not (
            _has_row(connection, key)
            or connection.execute(
                "SELECT 1 FROM blob_uses WHERE key = ? AND id = ? AND revision = ?",
                (key, record.resource_id, record.revision),
            ).get
        ):
            raise blob_gone(key)


def put_uses(connection: apsw.Connection, record: RevisionInfo) -> None:
    """Replace the uses of a revision by those of its new record."""
    resource = (record.resource_id, record.revision)
    connection.execute("DELETE FROM blob_uses WHERE id = ? AND revision = ?", resource)
    for key in record.blobs:
        connection.execute("INSERT OR IGNORE INTO blob_uses VALUES (?, ?, ?)", (key, *resource))


def drop_uses(connection: apsw.Connection, resource_id: str, rid: int, uid: str) -> None:
    """Remove the uses of the revisions whose records name this body, before the records are removed."""
    connection.execute(
        "DELETE FROM blob_uses WHERE id = ? AND revision IN (SELECT revision FROM revisions WHERE rid = ? AND uid = ?)",
        (resource_id, rid, uid),
    )


def purge_uses(connection: apsw.Connection, resource_id: str) -> None:
    """Remove the uses of all revisions of a resource."""
    connection.execute("DELETE FROM blob_uses WHERE id = ?", (resource_id,))


def _state(connection: apsw.Connection) -> tuple[int, int, int]:
    """Return the epoch, the number of blobs and their size. Raises StoreDamaged if the row is missing."""
    found: Any = connection.execute("SELECT epoch, blobs, size FROM blob_state").get
    if found is None:
        raise StoreDamaged("the table `blob_state` is empty; restore the database from a copy")
    epoch_, blobs, size = found
    return epoch_, blobs, size


def _has_row(connection: apsw.Connection, key: str) -> bool:
    found = exist(connection) and connection.execute("SELECT 1 FROM blobs WHERE key = ?", (key,)).get
    return bool(found)


def _has_use(connection: apsw.Connection, key: str) -> bool:
    found = exist(connection) and connection.execute("SELECT 1 FROM blob_uses WHERE key = ? LIMIT 1", (key,)).get
    return bool(found)
