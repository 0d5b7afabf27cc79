"""What happens if the disk of local copies and caches is full.

Invariants:

- *A full disk is called one*: `DiskFull` names what is free and what there is; the log names the directory.
- *A local copy goes before caches.* A cache does not fill the disk beyond `reserve`, and `make_room` empties caches. So
  nobody fails for want of room that a cache of this process holds.
- *A failure leaves nothing behind that is taken for whole*: files get their names, or are referred to, when they are
  complete. So the same work succeeds as soon as there is room, without a restart.
"""

from __future__ import annotations

import errno
import logging
import os
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, Protocol

from ...errors import StoreUnavailable
from .temporary import remove_abandoned

log = logging.getLogger("crudstack.disk")

MB = 1024**2
RESERVE = 256 * MB
"""Bytes of the disk that caches leave to local copies, or a quarter of the disk if that is less."""
LITTLE = 64 * 1024
"""Bytes that SQLite and a directory entry may need. If fewer are free, an unspecific error is one of a full disk."""
_FULL, _IOERR, _CANTOPEN = 13, 10, 14  # SQLite's result codes


class Space(NamedTuple):
    """Bytes of a file system: all, and those that this user may still write. `inodes`: whether files can be made."""

    total: int
    free: int
    inodes: bool


class DiskFull(StoreUnavailable):
    """There is no room on the disk of local copies and caches."""


class Evictable(Protocol):
    """A cache on a disk, in `cache_dir`."""

    cache_dir: Path

    def empty(self) -> None:
        """Remove all entries. Blocks."""


_caches: weakref.WeakSet[Evictable] = weakref.WeakSet()


def space(directory: Path) -> Space:
    """Return the space of the file system that holds a directory. If it does not exist, its nearest parent counts.

    Raises OSError.
    """
    while True:
        try:
            found = os.statvfs(directory)
        except FileNotFoundError:
            if directory == directory.parent:
                raise
            directory = directory.parent
        else:
            inodes = found.f_files == 0 or found.f_favail > 0  # some file systems count none
            return Space(found.f_blocks * found.f_frsize, found.f_bavail * found.f_frsize, inodes)


def reserve(total: int) -> int:
    return min(RESERVE, total // 4)


def cache_may_grow(directory: Path) -> bool:
    """Return whether the disk of a directory has more room than caches leave to local copies. Raises OSError."""
    found = space(directory)
    return found.free > reserve(found.total)


def is_full(error: BaseException, directory: Path) -> bool:
    """Return whether an error of the system or of SQLite means that there is no room in a directory."""
    if isinstance(error, OSError):
        return error.errno in (errno.ENOSPC, errno.EDQUOT)
    code = getattr(error, "result", None)  # of apsw
    if code in (_IOERR, _CANTOPEN):  # so SQLite calls some of them, a quota for one
        try:
            found = space(directory)
        except OSError:
            return False
        return found.free < LITTLE or not found.inodes
    return code == _FULL


def full(error: BaseException, directory: Path, needed: int = 0) -> DiskFull:
    """Return the error for a full disk. `needed`: bytes that were to be written, if that is known."""
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
    """Have `make_room` empty a cache, for as long as the cache lives."""
    _caches.add(cache)


def make_room(directory: Path, remove_more: Callable[[], None] | None = None) -> bool:
    """Remove what processes left that are gone, and the entries of all caches of this process. Return whether that gave
    the file system of `directory` more room. Blocks."""
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
