"""What must be remembered about an archive for as long as it is read, in a temporary file: memory stays constant.

Nothing is written for an archive without blobs and Idempotency-Keys.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable

import apsw

from ..resource_manager.runtime.disk_space import full, is_full
from ..resource_manager.runtime.temporary import ProcessDirectory

_TABLES = """
CREATE TABLE blob_refs (model TEXT, key TEXT, id TEXT, PRIMARY KEY (model, key, id)) WITHOUT ROWID;
CREATE TABLE blobs (model TEXT, key TEXT, new TEXT, PRIMARY KEY (model, key)) WITHOUT ROWID;
CREATE TABLE uids (model TEXT, uid TEXT, new TEXT, PRIMARY KEY (model, uid)) WITHOUT ROWID;
BEGIN;
"""

_UNRESOLVED = "WHERE model = ?1 AND NOT EXISTS (SELECT 1 FROM blobs b WHERE b.model = r.model AND b.key = r.key)"


class ArchiveNotes:
    """A temporary database. Blocks. Used by one thread at a time.

    blob_refs  the resources whose records name a blob
    blobs      the blobs of the archive, with their keys in the store of the model
    uids       the bodies that results of Idempotency-Keys name, with their uids in the store of the model
    """

    def __init__(self) -> None:
        self._directory: ProcessDirectory | None = None
        self._connection: apsw.Connection | None = None

    def close(self) -> None:
        """Remove the database."""
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.close()
        if self._directory is not None:
            self._directory.remove()

    def note_references(self, model: str, resource_id: str, keys: Iterable[str]) -> None:
        """Note that a record of a resource names these blobs."""
        self._write("INSERT OR IGNORE INTO blob_refs VALUES (?, ?, ?)", [(model, key, resource_id) for key in keys])

    def note_blobs(self, model: str, keys: Iterable[str]) -> None:
        """Note that the archive has these blobs."""
        self._write("INSERT OR IGNORE INTO blobs VALUES (?, ?, NULL)", [(model, key) for key in keys])

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
        rows = self._rows(f"SELECT key, id FROM blob_refs r {_UNRESOLVED}", (model,))
        return next(((key, resource_id) for key, resource_id in rows if resource_id not in absent), None)

    def is_referred_to(self, model: str, key: str, absent: Collection[str]) -> bool:
        """Return whether a resource that is not absent refers to a blob."""
        rows = self._rows("SELECT id FROM blob_refs WHERE model = ? AND key = ?", (model, key))
        return any(resource_id not in absent for (resource_id,) in rows)

    def set_blob(self, model: str, key: str, new: str) -> None:
        """Note the key that a blob has in the store."""
        self._write("UPDATE blobs SET new = ?3 WHERE model = ?1 AND key = ?2", [(model, key, new)])

    def new_blob(self, model: str, key: str) -> str | None:
        """Return the key that a blob has in the store; None if it is not stored."""
        return next(
            (new for (new,) in self._rows("SELECT new FROM blobs WHERE model = ? AND key = ?", (model, key))), None
        )

    def want_uids(self, model: str, uids: Iterable[str]) -> None:
        """Note that results of Idempotency-Keys name these bodies."""
        self._write("INSERT OR IGNORE INTO uids VALUES (?, ?, NULL)", [(model, uid) for uid in uids])

    def set_uid(self, model: str, uid: str, new: str) -> None:
        """Note the uid that a body has in the store, if a result names it."""
        if self._connection is not None:
            self._write("UPDATE uids SET new = ?3 WHERE model = ?1 AND uid = ?2", [(model, uid, new)])

    def new_uid(self, model: str, uid: str) -> str | None:
        """Return the uid that a body has in the store; None if it is not known."""
        return next(
            (new for (new,) in self._rows("SELECT new FROM uids WHERE model = ? AND uid = ?", (model, uid))), None
        )

    def _write(self, statement: str, rows: list[tuple[str, ...]]) -> None:
        if not rows:
            return
        connection = self._opened()
        try:
            connection.executemany(statement, rows)
        except apsw.Error as error:
            assert self._directory is not None, "`_opened` makes it"
            if is_full(error, self._directory.path):
                raise full(error, self._directory.path) from error
            raise

    def _rows(self, statement: str, values: tuple[str | int, ...]) -> Iterable[tuple[str, ...]]:
        if self._connection is None:
            return ()
        rows: Iterable[tuple[str, ...]] = self._connection.execute(statement, values)
        return rows

    def _opened(self) -> apsw.Connection:
        if self._connection is None:
            self._directory = self._directory or ProcessDirectory()
            self._connection = apsw.Connection(str(self._directory.path / "notes.sqlite"))
            for name, value in (("journal_mode", "off"), ("synchronous", "off"), ("cache_size", -8192)):
                self._connection.pragma(name, value)
            self._connection.execute(_TABLES)
        return self._connection
