"""The entries of the journal of an import in a SQLite database: rows of a table that the first entry makes.

A purge removes the entries of its resource in the same transaction (J3 of `contract.import_journal`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import apsw

from ...contract.import_journal import entries_of

TABLE = "CREATE TABLE IF NOT EXISTS import_entries (name TEXT PRIMARY KEY, value BLOB NOT NULL) WITHOUT ROWID"


def read(connection: apsw.Connection, name: str) -> bytes | None:
    """Return an entry, or None."""
    if not _exists(connection):
        return None
    found: bytes | None = connection.execute("SELECT value FROM import_entries WHERE name = ?", (name,)).get
    return found


def put(connection: apsw.Connection, name: str, value: bytes, replaces: bytes | None) -> bool:
    """Store an entry in place of an equal one, or of none. The caller is in a transaction."""
    if read(connection, name) != replaces:
        return False
    connection.execute(TABLE)
    connection.execute("INSERT OR REPLACE INTO import_entries VALUES (?, ?)", (name, value))
    return True


def names(connection: apsw.Connection, prefix: str, after: str, limit: int) -> list[str]:
    """Return names with a prefix, ascending."""
    if not _exists(connection):
        return []
    rows: Any = connection.execute(
        "SELECT name FROM import_entries WHERE name > ?1 AND name >= ?2 AND substr(name, 1, length(?2)) = ?2"
        " ORDER BY name LIMIT ?3",
        (after, prefix, limit),
    )
    return [name for (name,) in rows]


def remove(connection: apsw.Connection, removed: Sequence[str]) -> None:
    """Remove entries. The caller is in a transaction."""
    if _exists(connection):
        connection.executemany("DELETE FROM import_entries WHERE name = ?", [(name,) for name in removed])


def forget(connection: apsw.Connection, resource_id: str) -> None:
    """Remove the entries of a resource that is purged. The caller is in a transaction."""
    if _exists(connection):
        prefix = entries_of(resource_id)
        connection.execute("DELETE FROM import_entries WHERE name >= ? AND name < ?", (prefix, prefix[:-1] + "0"))


def _exists(connection: apsw.Connection) -> bool:
    return connection.execute("SELECT 1 FROM sqlite_schema WHERE name = 'import_entries'").get is not None
