"""The index of a DiskCache: diskcache as it is used there, and what its errors mean."""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import struct
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ..runtime import drivers

HEADER = struct.Struct(">d32s")
TEMPORARY = {errno.ENOSPC, errno.EDQUOT, errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EIO, errno.EINTR, errno.EAGAIN}
"""Why a directory may be unusable just now."""

# SQLite's result codes
UNUSABLE = {3, 8, 14, 23}  # PERM, READONLY, CANTOPEN, AUTH
UNHARMED = {5, 6, 7, 9, 13, 15, *UNUSABLE}  # BUSY, LOCKED, NOMEM, INTERRUPT, FULL, PROTOCOL

STRAY_AFTER_S = 3600.0

TIMEOUT_S = 1.0
"""How long another process may keep the index, or the directory, for itself until it is a miss."""


class Driver(NamedTuple):
    Index: Callable[[Path, int], Any]
    Timeout: type[Exception]


@functools.cache
def driver() -> Driver:
    """diskcache as it is used here; imported with the first DiskCache."""
    with drivers.driver("cache"):
        import diskcache  # type: ignore[import-untyped]
        from diskcache.core import MODE_BINARY, MODE_RAW, UNKNOWN  # type: ignore[import-untyped]

    class Values(diskcache.Disk):  # type: ignore[misc]
        written: str | None = None

        def filename(self, key: Any = UNKNOWN, value: Any = UNKNOWN) -> tuple[str, str]:
            self.written, path = super().filename(key, value)
            return self.written, path

        def fetch(self, mode: int, filename: str, value: Any, read: bool) -> Any:
            if mode not in (MODE_RAW, MODE_BINARY):
                raise OSError("only bytes are kept here")  # diskcache would unpickle it
            return super().fetch(mode, filename, value, read)

    class Index(diskcache.Cache):  # type: ignore[misc]
        def __init__(self, directory: Path, max_bytes: int) -> None:
            try:
                super().__init__(
                    str(directory),
                    timeout=TIMEOUT_S,  # a cache that makes its caller wait is none
                    disk=Values,
                    eviction_policy="least-recently-used",
                    size_limit=max_bytes,
                    cull_limit=1,
                    sqlite_secure_delete=1,
                    # Nothing is mapped, because a mapped file that somebody truncates ends the process: so no write-ahead log either.
                    sqlite_mmap_size=0,
                    sqlite_journal_mode="truncate",
                    sqlite_synchronous=0,  # what a power failure damages is found out (D1, D2)
                )
            except BaseException:
                self.close()
                raise

    return Driver(Index, diskcache.Timeout)


def life_of(directory: Path) -> int | None:
    name, _, number = directory.name.partition("-")
    return int(number) if name == "life" and number.isdecimal() and number.isascii() else None


def identity(index: Any) -> tuple[int, int] | None:
    try:
        status = os.stat(os.path.join(index.directory, "cache.db"))  # noqa: PTH118, PTH116 - before each use, and half as dear
    except OSError:
        return None
    return status.st_dev, status.st_ino


def sqlite_code(error: Exception) -> int | None:
    code: int | None = getattr(error, "sqlite_errorcode", None)
    return None if code is None else code & 0xFF


def is_damage(error: Exception) -> bool:
    """Whether the index itself must be at fault: all errors of SQLite but a few, and what diskcache makes of rows that make no sense."""
    if isinstance(error, (OSError, MemoryError, driver().Timeout)):
        return False
    return sqlite_code(error) not in UNHARMED


def delete_rows(index: Any, addresses: Sequence[bytes]) -> None:
    with index.transact():
        for address in addresses:
            index.delete(address)


def remove_strays(directory: Path, now: float, deadline: float) -> None:
    """Files that no row names, left by processes that were killed: their own expiry says when they go."""
    for path in directory.glob("??/??/*.val"):
        if time.monotonic() > deadline:
            return
        with contextlib.suppress(OSError):  # another process removes it too
            with path.open("rb") as file:
                header, modified = file.read(HEADER.size), os.fstat(file.fileno()).st_mtime
            torn = len(header) < HEADER.size
            if modified < time.time() - STRAY_AFTER_S if torn else not HEADER.unpack(header)[0] > now:
                path.unlink()
