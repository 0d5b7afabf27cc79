"""Files and directories that are written under another name beside their place, and then get their name.

A process that is killed leaves what it wrote. So a writer locks its file or directory (flock) until it has its name or
is removed, and each new writer removes those in the same directory that no process has locked. See `temporary` for why
this is safe: a lock counts only while the name still leads to the locked inode.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import shutil
import stat
from pathlib import Path
from uuid import uuid4

from .files import sync_directory

_NAME = re.compile(r"\..+\.[0-9a-f]{32}\.partial", re.DOTALL)
ATTEMPTS = 20
"""How often a name is tried again that another process has removed at once."""
NO_LINKS = {errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK}
"""Errors of file systems without hard links."""


class Partial:
    """A new file or directory beside `target`, with the mode 0600 or 0700. Its path is `path`, its descriptor `handle`.

    Blocks. Raises OSError, as all methods do.
    """

    def __init__(self, target: Path, *, directory: bool = False) -> None:
        remove_abandoned_partials(target.parent)
        self.target = target
        for _ in range(ATTEMPTS):
            self.path = target.with_name(f".{target.name}.{uuid4().hex}.partial")
            self.handle = _created(self.path, directory=directory)
            if _lock(self.handle, self.path):
                return
            os.close(self.handle)
        raise OSError(errno.EBUSY, "new files are removed by another program at once")

    def publish(self, *, replace: bool) -> None:
        """Give the file or directory its name. Blocks until the name is durable.

        The caller syncs the content before.

        replace  whether a file with this name is replaced. A directory with files is never replaced

        Raises FileExistsError if something has the name that is not to be replaced.
        """
        if stat.S_ISDIR(os.fstat(self.handle).st_mode):
            try:
                self.path.rename(self.target)
            except OSError as error:
                if error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                    raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(self.target)) from error
                raise
        elif replace:
            self.path.replace(self.target)
        else:
            self._publish_new()
        sync_directory(self.target.parent)

    def _publish_new(self) -> None:
        """Give the file a name that no file has. `rename` would replace a file that was made a moment ago."""
        try:
            os.link(self.path, self.target, follow_symlinks=False)
        except OSError as error:
            if error.errno not in NO_LINKS:
                raise
            os.close(os.open(self.target, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
            self.path.replace(self.target)
        else:
            self.path.unlink()

    def discard(self) -> None:
        """Remove the file or directory, unless it was published, and release the lock. Called once, at the end."""
        try:
            _remove(self.path)
        finally:
            os.close(self.handle)


def _created(path: Path, *, directory: bool) -> int:
    if directory:
        path.mkdir(mode=0o700)
        return os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)


def _lock(handle: int, path: Path) -> bool:
    """Lock a new file or directory. Return False if another process is removing it.

    Some file systems have no locks. There no process removes what others write, because none gets the lock.
    """
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return True
    return _is_at(handle, path)


def _is_at(handle: int, path: Path) -> bool:
    try:
        at_name, locked = path.lstat(), os.fstat(handle)
    except FileNotFoundError:
        return False
    return (at_name.st_dev, at_name.st_ino) == (locked.st_dev, locked.st_ino)


def remove_abandoned_partials(directory: Path) -> None:
    """Remove the files and directories of writers in `directory` that have ended. Blocks; raises no OSError."""
    with contextlib.suppress(OSError), os.scandir(directory) as entries:
        paths = [Path(entry.path) for entry in entries if _NAME.fullmatch(entry.name)]
        for path in paths:
            with contextlib.suppress(OSError):  # its writer is running, or it belongs to another user
                _remove_abandoned(path)


def _remove_abandoned(path: Path) -> None:
    if path.lstat().st_uid != os.geteuid():
        return
    handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if _is_at(handle, path):
            _remove(path)
    finally:
        os.close(handle)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
