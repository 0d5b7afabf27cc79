"""Files and directories: creation that survives a power cut, and locks between processes."""

from __future__ import annotations

import fcntl
import os
import time
from pathlib import Path


def make_directory(path: Path) -> None:
    """Create a directory and its parents, and sync the parent of each one that is new.

    A file survives a power cut only if every directory above it is on disk too.
    """
    if path.is_dir():
        return
    make_directory(path.parent)
    path.mkdir(exist_ok=True)
    sync_directory(path.parent)


def sync_directory(path: Path) -> None:
    """Make the names in a directory durable. Blocks."""
    handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def lock_within(seconds: float, handle: int, look_every_s: float) -> None:
    """Lock an open file exclusively. Tries every `look_every_s` seconds, for `seconds` at most. Blocks.

    `handle` is the descriptor of the file. The kernel releases the lock when the process ends, even if it is killed.
    Raises BlockingIOError if another process holds the lock all that time.
    """
    deadline = time.monotonic() + seconds
    while True:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise
            time.sleep(look_every_s)
