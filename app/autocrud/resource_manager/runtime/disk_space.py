"""Full disks: recognition, and removal of caches to make room for local copies.

Invariants:

- *A full disk is reported as a full disk.* `DiskFull` has the free and the total space; the log has the directory.
- *Local copies take precedence over caches.* Caches leave `reserve` bytes of the disk free, and `make_room` empties the
  caches of this process. So no request fails for space that such a cache takes.
- *A failure leaves no incomplete file that is used as a complete one.* A file gets its name, or is referred to, when it
  is complete. So the same work succeeds without a restart when there is space again.
"""

from __future__ import annotations

import errno
import logging
import os
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, Protocol, TypeVar

from ...errors import StoreUnavailable
from .temporary import remove_abandoned

T = TypeVar("T")

log = logging.getLogger("crudstack.disk")

MB = 1024**2
RESERVE = 256 * MB
"""Bytes of the disk that caches leave free for local copies; a quarter of the disk if that is less."""
LITTLE = 64 * 1024
"""If fewer bytes are free, an I/O error of SQLite counts as a full disk."""
_FULL, _IOERR, _CANTOPEN = 13, 10, 14  # SQLite's result codes


class Space(NamedTuple):
    """The space of a file system.

    total   its size in bytes
    free    bytes that this user may still write
    inodes  whether new files can be created
    """

    total: int
    free: int
    inodes: bool


class DiskFull(StoreUnavailable):
    """The disk of local copies and caches is full."""


class Evictable(Protocol):
    """A cache on a disk, in the directory `cache_dir`."""

    cache_dir: Path

    def empty(self) -> None:
        """Remove all entries. Blocks."""


_caches: weakref.WeakSet[Evictable] = weakref.WeakSet()


def space(directory: Path) -> Space:
    """Return the space of the file system of a directory, or of its nearest parent if it does not exist.

    Raises OSError.
    """
    found = _of_nearest(directory, os.statvfs)
    inodes = found.f_files == 0 or found.f_favail > 0  # 0: the file system has no fixed number of inodes
    return Space(found.f_blocks * found.f_frsize, found.f_bavail * found.f_frsize, inodes)


def device(directory: Path) -> int:
    """Return the number of the file system of a directory, or of its nearest parent if it does not exist.

    Raises OSError.
    """
    return _of_nearest(directory, os.stat).st_dev


def _of_nearest(directory: Path, look: Callable[[Path], T]) -> T:
    """Return a fact about a directory, or about its nearest parent if it does not exist."""
    directory = directory.absolute()
    while True:
        try:
            return look(directory)
        except FileNotFoundError:
            if directory == directory.parent:
                raise
            directory = directory.parent


def reserve(total: int) -> int:
    """Return how many bytes of a disk of `total` bytes the caches leave free."""
    return min(RESERVE, total // 4)


def cache_may_grow(directory: Path) -> bool:
    """Return whether a cache in this directory leaves `reserve` bytes free. Raises OSError."""
    found = space(directory)
    return found.free > reserve(found.total)


def is_full(error: BaseException, directory: Path) -> bool:
    """Return whether an error of the system or of SQLite means that the disk of a directory is full."""
    if isinstance(error, OSError):
        return error.errno in (errno.ENOSPC, errno.EDQUOT)
    code = getattr(error, "result", None)  # of apsw
    if code in (_IOERR, _CANTOPEN):  # SQLite reports some full disks this way, for example an exceeded quota
        try:
            found = space(directory)
        except OSError:
            return False
        return found.free < LITTLE or not found.inodes
    return code == _FULL


def full(error: BaseException, directory: Path, needed: int = 0) -> DiskFull:
    """Log that a disk is full, and return the error. `needed`: bytes that were to be written; 0 if unknown."""
    try:
        found = space(directory)
    except OSError:
        log.error("%s: %s", directory, error)
        return DiskFull("the disk is full; nothing was changed, make room on it")
    known = f"{found.free / MB:.1f} of {found.total / MB:.0f} MB are free"
    if not found.inodes:
        known = "no more files can be made"
    wanted = f", and {needed / MB:.1f} MB are needed" if needed else ""
    log.error("%s: the disk is full: %s%s: %s", directory, known, wanted, error)
    return DiskFull(
        f"the disk is full: {known}{wanted}; nothing was changed. Make room on it, or give it more; its directory is in"
        " the log"
    )


def register(cache: Evictable) -> None:
    """Let `make_room` empty a cache. The cache is forgotten when it is garbage-collected."""
    _caches.add(cache)


def make_room(directory: Path, remove_more: Callable[[], None] | None = None) -> bool:
    """Make room on the disk of a directory, and return whether there is more free space than before.

    Removes directories of processes that have ended, calls `remove_more`, and empties the caches of this process on the
    same disk. Blocks. Raises OSError.
    """
    before = space(directory)
    remove_abandoned()
    if remove_more is not None:
        remove_more()
    for cache in list(_caches):
        if _on_same_disk(cache.cache_dir, directory):
            cache.empty()
    after = space(directory)
    freed = after.free > before.free or (after.inodes and not before.inodes)
    log.warning("%s: room was made: %.1f MB are free, before %.1f MB", directory, after.free / MB, before.free / MB)
    return freed


def _on_same_disk(one: Path, other: Path) -> bool:
    try:
        return one.stat().st_dev == other.stat().st_dev
    except OSError:  # a cache that was never used has no directory; a cache whose directory is unusable is empty
        return False
