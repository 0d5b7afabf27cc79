"""One SQLite file with the entries of a DiskCache, and the meaning of its errors.

The file has one table, `entries`:

| column | value |
| --- | --- |
| key | SHA-256 of the caller's key, so that any text is a key and no key is too long |
| expiry | when the entry expires, in seconds since 1970 |
| last_use | a number that grows with each put and each hit; the entry with the lowest one was used longest ago |
| size | bytes of the body |
| sha256 | SHA-256 of key, expiry and body |
| body | the body |

Bodies lie in the row, not in files of their own. One transaction then changes an entry as a whole, a killed process
leaves no files that no row names, and the size of this file is all that needs a bound. A file for each larger body was
not faster: a body of 64 KB was put in 270 us against 800 us and read in 160 us against 220 us, one of 1 MB was read in
about 1 ms either way.

The settings of SQLite:

- `journal_mode=truncate`, `mmap_size=0`: if another process truncates a file that is mapped into memory, the kernel
  ends this process. So nothing is mapped, and write-ahead logs need a mapped file. Truncation also removes the old
  content of changed pages from the journal.
- `synchronous=off`: a cache need not survive a power failure. What the failure damaged is detected.
- `secure_delete=on`: deleted content is overwritten with zeros.
- `auto_vacuum=incremental`: `remove_expired` gives free pages back to the file system.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import struct
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import apsw

from .body_cache import Entry

TIMEOUT_S = 1.0
"""How long an operation waits for another process that has the file or the directory locked."""
TEMPORARY = {errno.ENOSPC, errno.EDQUOT, errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EIO, errno.EINTR, errno.EAGAIN}
"""Errors of the system after which a directory may be usable again later."""
UNUSABLE = {apsw.SQLITE_PERM, apsw.SQLITE_READONLY, apsw.SQLITE_CANTOPEN, apsw.SQLITE_AUTH}
"""SQLite's result codes for a file that this process may not use."""
UNDAMAGED = {
    *(apsw.SQLITE_BUSY, apsw.SQLITE_LOCKED, apsw.SQLITE_NOMEM, apsw.SQLITE_INTERRUPT, apsw.SQLITE_FULL),
    *(apsw.SQLITE_PROTOCOL, *UNUSABLE),
}
"""SQLite's result codes that say nothing about the content of the file. All others mean damage."""
EXPIRED_A_PUT = 2
"""How many expired entries each put removes. It is more than a put adds, so they become fewer without `maintain`."""
VACUUMED_PAGES = 256
"""How many free pages are given back to the file system at a time."""
FIRST_USE = 2**40
"""The lowest `last_use`. Numbers from here to 2**47 take six bytes, so a hit overwrites its row in place."""
ROW_BYTES = 160
"""Bytes of a row beside its body, with its index entries, rounded up."""

_SCHEMA = """
CREATE TABLE IF NOT EXISTS entries (
    key BLOB PRIMARY KEY, expiry REAL NOT NULL, last_use INTEGER NOT NULL, size INTEGER NOT NULL, sha256 BLOB NOT NULL,
    body BLOB NOT NULL
) STRICT;
CREATE INDEX IF NOT EXISTS entries_expiry ON entries (expiry);
CREATE INDEX IF NOT EXISTS entries_last_use ON entries (last_use);
"""


def result_code(error: Exception) -> int | None:
    """Return SQLite's primary result code of an error, or None if the error is not SQLite's."""
    code: int | None = getattr(error, "result", None)
    return None if code is None else code & 0xFF


def is_damage(error: Exception) -> bool:
    """Return whether an error means that the content of the file is damaged.

    Rows without meaning cause errors of any type, so every error means damage unless it is known to be harmless.
    """
    return not isinstance(error, (OSError, MemoryError)) and result_code(error) not in UNDAMAGED


class CacheFile:
    """An open file. Blocks; one thread at a time may use it, and other processes may use the same file.

    path       where it lies; it is created if it does not exist
    max_bytes  how large the file becomes

    Every method may raise any Exception if the file is damaged (see `is_damage`), and apsw.BusyError if another process
    has the file locked for TIMEOUT_S.
    """

    def __init__(self, path: Path, max_bytes: int) -> None:
        self.path, self.max_bytes = path, max_bytes
        self._connection = apsw.Connection(str(path))
        try:
            self._configure()
            self._identity = self._identity_on_disk()
        except BaseException:
            self._connection.close()
            raise

    def _configure(self) -> None:
        execute = self._connection.execute
        self._connection.set_busy_timeout(int(1000 * TIMEOUT_S))
        for setting in ("auto_vacuum=incremental", "journal_mode=truncate", "synchronous=off", "secure_delete=on"):
            execute(f"PRAGMA {setting}").fetchall()
        execute("PRAGMA mmap_size=0").fetchall()
        with self._transaction():
            execute(_SCHEMA)
        self._page_bytes: int = execute("PRAGMA page_size").get

    def is_current(self) -> bool:
        """Return whether the path still names this file. Another process may have removed it."""
        return self._identity_on_disk() == self._identity

    def _identity_on_disk(self) -> tuple[int, int] | None:
        try:
            status = os.stat(self.path)  # noqa: PTH116 - called before each use, and half as fast as a method of Path
        except OSError:
            return None
        return status.st_dev, status.st_ino

    def close(self) -> None:
        """Close the file."""
        self._connection.close()

    def get(self, keys: Sequence[str], now: float) -> tuple[dict[str, Entry], int]:
        """Return the valid entries of these keys, and how many damaged ones were found.

        Valid entries count as used. Expired and damaged ones are removed.
        """
        found: dict[str, Entry] = {}
        damaged = 0
        with self._transaction():
            last_use = self._last_use()
            for key in keys:
                digest = _digest(key)
                row: Any = self._connection.execute(
                    "SELECT expiry, size, sha256, body FROM entries WHERE key = ?", (digest,)
                ).fetchone()
                if row is None:
                    continue
                expiry, size, checksum, body = row
                if not _is_valid(digest, expiry, size, checksum, body):
                    damaged += 1
                    self._delete(digest)
                elif expiry <= now:
                    self._delete(digest)
                else:
                    # Not one statement with RETURNING: SQLite would copy the body, six times as slow for 1 MB.
                    last_use += 1
                    self._connection.execute("UPDATE entries SET last_use = ? WHERE key = ?", (last_use, digest))
                    found[key] = Entry(body, expiry - now)
        return found, damaged

    def put(self, key: str, entry: Entry, now: float) -> None:
        """Keep an entry in place of the one that the key had, and remove others until it fits.

        An entry that has no time left, or whose body takes more than a quarter of `max_bytes`, is not kept.
        """
        digest, expiry = _digest(key), now + entry.ttl_s
        with self._transaction():
            self._delete(digest)
            self._connection.execute(
                "DELETE FROM entries WHERE key IN (SELECT key FROM entries WHERE expiry <= ? ORDER BY expiry LIMIT ?)",
                (now, EXPIRED_A_PUT),
            )
            size = len(entry.body)
            if entry.ttl_s > 0 and 4 * (ROW_BYTES + size) <= self.max_bytes and self._make_room(size):
                checksum = _checksum(digest, expiry, entry.body)
                row = digest, expiry, self._last_use() + 1, size, checksum, entry.body
                self._connection.execute("INSERT INTO entries VALUES (?, ?, ?, ?, ?, ?)", row)

    def delete(self, keys: Sequence[str]) -> None:
        """Remove the entries of these keys, all or none of them."""
        with self._transaction():
            for key in keys:
                self._delete(_digest(key))

    def remove_expired(self, now: float, deadline: float) -> None:
        """Remove expired entries, and give free pages back to the file system.

        Stops when `time.monotonic()` reaches `deadline`.
        """
        removed = 1
        while removed and time.monotonic() < deadline:
            with self._transaction():
                self._connection.execute(
                    "DELETE FROM entries WHERE key IN (SELECT key FROM entries WHERE expiry <= ? LIMIT 100)", (now,)
                )
                removed = self._connection.changes()
        while self._pragma("freelist_count") and time.monotonic() < deadline:
            with self._transaction():
                self._connection.execute(f"PRAGMA incremental_vacuum({VACUUMED_PAGES})").fetchall()

    def _delete(self, digest: bytes) -> None:
        self._connection.execute("DELETE FROM entries WHERE key = ?", (digest,))

    def _last_use(self) -> int:
        highest: int | None = self._connection.execute("SELECT max(last_use) FROM entries").get
        return FIRST_USE if highest is None else highest

    def _make_room(self, size: int) -> bool:
        """Remove least recently used entries until a body of `size` bytes fits. Return False if it never fits."""
        # An overflow page holds its size without 4 bytes; the table and an index may each need one more page.
        wanted = (ROW_BYTES + size) // (self._page_bytes - 4) + 3
        while self._pragma("page_count") - self._pragma("freelist_count") + wanted > self.max_bytes // self._page_bytes:
            self._connection.execute(
                "DELETE FROM entries WHERE key = (SELECT key FROM entries ORDER BY last_use LIMIT 1)"
            )
            if not self._connection.changes():
                return False
        return True

    def _pragma(self, name: str) -> int:
        value: int = self._connection.execute(f"PRAGMA {name}").get
        return value

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[None]:
        # A transaction that reads first and locks later could fail without waiting for the other process.
        self._connection.execute("BEGIN IMMEDIATE")
        try:
            yield
            self._connection.execute("COMMIT")
        except BaseException:
            if self._connection.in_transaction:
                with contextlib.suppress(apsw.Error):  # the first error matters
                    self._connection.execute("ROLLBACK")
            raise


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()


def _checksum(digest: bytes, expiry: float, body: bytes) -> bytes:
    checksum = hashlib.sha256(struct.pack(">d", expiry) + digest)
    checksum.update(body)
    return checksum.digest()


def _is_valid(digest: bytes, expiry: Any, size: Any, checksum: Any, body: Any) -> bool:
    return (
        isinstance(expiry, float)
        and isinstance(body, bytes)
        and len(body) == size
        and checksum == _checksum(digest, expiry, body)
    )
