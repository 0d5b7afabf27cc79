"""Temporary directories that belong to one process, and the removal of those whose process has ended.

A process that is killed cannot remove its directory. Lambda keeps /tmp when it ends a process, so the next process must
remove such directories. On other machines several processes share the parent directory.

A process locks its directory (flock on the directory itself) for as long as it lives. The kernel releases the lock when
the process ends for any reason. Invariants:

- P1 *Only the owner of the lock removes a directory, and only while its name still leads to the locked inode.*
- P2 *A process uses a directory only after it has locked it, and has then found it under its name.* If a cleaner takes
  the lock between `mkdir` and the lock of the creator, the creator makes another directory.
- P3 *A cleaner waits for no lock, follows no symbolic link, and keeps directories of other users.* If two cleaners
  meet, one of them skips the directory. If a cleaner is killed, the next one removes the rest.

A child of `fork` shares the lock with its parent, so the directory stays until both have ended. Other programs that a
process starts do not share it.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import re
import secrets
import shutil
import stat
import tempfile
import time
import weakref
from pathlib import Path
from typing import Self

log = logging.getLogger("crudstack.temporary")

PREFIX = "crudstack-process-"
_NAME = re.compile(rf"{PREFIX}[0-9a-f]{{16}}")
_OLD_NAME = re.compile(r"crudstack-[a-z0-9_]{8}")
"""Names of the directories of earlier releases, which took no lock."""
OLD_AFTER_S = 24 * 3600.0
"""Seconds without a change after which a directory of an earlier release may be removed."""
_IN_USE_BYTE = 128
"""The byte of a -shm file on which each connection of SQLite holds a shared lock (UNIX_SHM_DMS in os_unix.c)."""
_FOR_NOW = {errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EINTR}
"""Errors that may be temporary, and do not mean that the file system cannot lock directories."""
ATTEMPTS = 20
"""How often a process tries to create a directory if cleaners remove each one immediately."""

_cleaned: set[str] = set()


class ProcessDirectory:
    """A new directory in the system's directory for temporary files, or in `parent`. Its `path` is an attribute.

    The directory is removed by `remove`, when this object is garbage-collected, or when the process ends. If the
    process is killed, a later process removes it: the first ProcessDirectory of a process removes those of processes
    that have ended, in the same parent. Blocks. Raises OSError.
    """

    def __init__(self, parent: Path | None = None) -> None:
        within = tempfile.gettempdir() if parent is None else str(parent)
        if within not in _cleaned:
            _cleaned.add(within)
            remove_abandoned(parent)
        self.path, lock = _make(within)
        self._finalizer = weakref.finalize(self, _remove, self.path, lock, os.getpid())

    def remove(self) -> None:
        """Remove the directory. Blocks."""
        self._finalizer()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()


def _make(parent: str) -> tuple[Path, int | None]:
    """Return a new directory and the descriptor that holds its lock (P2)."""
    for _ in range(ATTEMPTS):
        path = os.path.join(parent, f"{PREFIX}{secrets.token_hex(8)}")  # noqa: PTH118 - as scandir gives it
        os.mkdir(path, 0o700)  # noqa: PTH102
        try:
            lock = _locked(path)
        except BlockingIOError:
            continue  # a cleaner has locked the directory, and removes it
        except OSError as error:
            os.rmdir(path)  # noqa: PTH106
            if error.errno in _FOR_NOW:
                raise
            log.warning(
                "%s: directories cannot be locked here (%s); if this process is killed, its directory stays",
                parent,
                error,
            )
            return Path(tempfile.mkdtemp(prefix="crudstack-unlocked-")), None
        if lock is not None:
            return Path(path), lock
    raise OSError(f"{parent}: new directories are removed by another program at once")


def _locked(path: str) -> int | None:
    """Lock a directory and return the descriptor, or None if the directory no longer has this name.

    Raises BlockingIOError if another process holds the lock.
    """
    try:
        lock = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        with contextlib.suppress(FileNotFoundError):
            at_name, locked = os.lstat(path), os.fstat(lock)
            if (at_name.st_dev, at_name.st_ino) == (locked.st_dev, locked.st_ino):
                return lock
    except BaseException:
        os.close(lock)
        raise
    os.close(lock)
    return None


def _remove(path: Path, lock: int | None, process: int) -> None:
    if os.getpid() == process:  # a forked child must not remove the directory of its parent
        shutil.rmtree(path, ignore_errors=True)
    if lock is not None:
        os.close(lock)


def remove_abandoned(parent: Path | None = None) -> None:
    """Remove the directories of processes that have ended. Blocks until they are removed; logs errors, raises none."""
    try:
        with os.scandir(tempfile.gettempdir() if parent is None else parent) as entries:
            paths = [
                entry.path
                for entry in entries
                if _NAME.fullmatch(entry.name) or (_OLD_NAME.fullmatch(entry.name) and _is_old_and_unused(entry.path))
            ]
    except OSError as error:
        log.warning("directories of earlier processes cannot be looked for: %s", error)
        return
    for path in paths:
        try:
            if os.lstat(path).st_uid != os.geteuid():
                continue
            lock = _locked(path)
        except OSError:  # its process is running, or it cannot be opened
            continue
        if lock is not None:
            shutil.rmtree(path, ignore_errors=True)
            os.close(lock)


def _is_old_and_unused(path: str) -> bool:
    """Return whether this is an old directory of an earlier release, with a local copy that no process has open."""
    try:
        found = os.lstat(path)
        if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid():
            return False
        names = {entry.name for entry in Path(path).iterdir()}
        if not names >= {"current", "lock"} or found.st_mtime > time.time() - OLD_AFTER_S:
            return False
        return not any(_is_open(os.path.join(path, name)) for name in names if name.endswith("-shm"))  # noqa: PTH118
    except OSError:
        return False


def _is_open(shared_memory: str) -> bool:
    """Return whether another process has the database of this -shm file open."""
    handle = os.open(shared_memory, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, _IN_USE_BYTE)
    except BlockingIOError:
        return True
    finally:
        os.close(handle)
    return False
