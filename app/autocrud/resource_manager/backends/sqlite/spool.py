"""Sorted names, rows of blobs and records of one resource in a temporary file, so that exports take constant memory.

The file is a SQLite database in a directory of this process, which is removed with the spool. It needs no durability.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import apsw

from ...basic import BlobRow, Encoding, RevisionInfo
from ...contract.metadata_codec import encoder, info_of
from ...runtime.temporary import ProcessDirectory
from ...runtime.threads import in_thread
from .errors import translated

T = TypeVar("T")

CACHE_KIB = 4096
_encode = encoder(Encoding.msgpack)


class Spool:
    """A temporary file. The file is made by the first method that is called."""

    def __init__(self) -> None:
        self._directory: ProcessDirectory | None = None
        self._db: apsw.Connection | None = None
        self._lock = threading.Lock()  # a cancelled caller may leave work in its thread

    async def _run(self, work: Callable[[apsw.Connection], T]) -> T:
        def run() -> T:
            with self._lock:
                if self._directory is None:
                    self._directory = ProcessDirectory()
                try:
                    if self._db is None:
                        self._db = _opened(str(self._directory.path / "spool.sqlite"))
                    return work(self._db)
                except apsw.Error as error:
                    raise translated(error, self._directory.path) from error

        return await in_thread(run)

    async def add_names(self, kind: str, names: Sequence[str]) -> None:
        """Add names of a kind, such as the ids of resources. A name may be added twice."""
        rows = [(kind, name) for name in names]
        await self._run(lambda db: db.executemany("INSERT OR IGNORE INTO names VALUES (?, ?)", rows) and None)

    async def names(self, kind: str, after: str, limit: int) -> list[str]:
        """Return up to `limit` names of a kind that follow `after`, ascending."""

        def read(db: apsw.Connection) -> list[str]:
            select = "SELECT name FROM names WHERE kind = ? AND name > ? ORDER BY name LIMIT ?"
            return [name for (name,) in db.execute(select, (kind, after, limit))]

        return await self._run(read)

    async def add_blob_rows(self, rows: Sequence[BlobRow]) -> None:
        """Keep rows of blobs."""
        values = [(row.key, row.size, row.owner) for row in rows]
        if values:
            await self._run(lambda db: db.executemany("INSERT OR REPLACE INTO blobs VALUES (?, ?, ?)", values) and None)

    async def blob_rows(self, keys: Sequence[str]) -> dict[str, BlobRow]:
        """Return those rows of blobs that were kept, by key."""

        def read(db: apsw.Connection) -> dict[str, BlobRow]:
            found: dict[str, BlobRow] = {}
            for key in keys:
                row: Any = db.execute("SELECT size, owner FROM blobs WHERE key = ?", (key,)).get
                if row is not None:
                    found[key] = BlobRow(key=key, size=row[0], owner=row[1])
            return found

        return await self._run(read)

    async def forget_records(self) -> None:
        """Remove all records."""
        await self._run(lambda db: db.execute("DELETE FROM records") and None)

    async def add_records(self, records: Sequence[RevisionInfo]) -> None:
        """Keep records of one resource."""
        values = [(record.revision, _encode(record)) for record in records]
        await self._run(lambda db: db.executemany("INSERT OR REPLACE INTO records VALUES (?, ?)", values) and None)

    async def records(self, after: int, limit: int) -> list[RevisionInfo]:
        """Return up to `limit` of the kept records with numbers above `after`, ascending."""

        def read(db: apsw.Connection) -> list[RevisionInfo]:
            select = "SELECT doc FROM records WHERE revision > ? ORDER BY revision LIMIT ?"
            return [info_of(doc) for (doc,) in db.execute(select, (after, limit))]

        return await self._run(read)

    async def close(self) -> None:
        """Remove the file."""

        def close() -> None:
            with self._lock:
                if self._db is not None:
                    self._db.close()
                    self._db = None
                if self._directory is not None:
                    self._directory.remove()
                    self._directory = None

        await in_thread(close)


def _opened(path: str) -> apsw.Connection:
    connection = apsw.Connection(path)
    connection.pragma("journal_mode", "off")
    connection.pragma("synchronous", "off")
    connection.pragma("cache_size", -CACHE_KIB)
    connection.execute("CREATE TABLE names (kind TEXT, name TEXT, PRIMARY KEY (kind, name)) WITHOUT ROWID")
    connection.execute("CREATE TABLE blobs (key TEXT PRIMARY KEY, size INTEGER, owner TEXT) WITHOUT ROWID")
    connection.execute("CREATE TABLE records (revision INTEGER PRIMARY KEY, doc BLOB)")
    return connection
