"""The directory of a DiskCache, which several processes may share.

    lock                  locked (flock) while a process opens the cache or starts an empty one
    entries-{n}.sqlite    generation n of the cache, and SQLite's journal beside it

Only the highest generation counts. Starting empty means: create generation n + 1, then remove generation n. The names
differ because SQLite finds the journal of a file by its name: the journal of a removed file must never be applied to
another file.

Earlier releases kept a diskcache in `life-{n}/` directories, under the same lock. `remove_earlier_format` removes their
files. A process of such a release that shares the directory during a rolling deploy then finds its cache missing, and
starts an empty one.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator
from pathlib import Path

from ..runtime.files import lock_within
from .cache_file import TIMEOUT_S

_GENERATION = re.compile(r"entries-([1-9][0-9]*)\.sqlite(?:-journal)?", re.ASCII)
_EARLIER = re.compile(r"life-[0-9]+", re.ASCII)
LOOK_S = 0.005
"""How often a process that waits for the lock tries to get it."""


class CacheDirectory:
    """The files of a cache below `path`. Blocks. All methods but `path_of` need the lock. Errors are OSError."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the lock between processes. Raises BlockingIOError if another process holds it for TIMEOUT_S."""
        self.path.mkdir(parents=True, exist_ok=True)
        lock = os.open(self.path / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            lock_within(TIMEOUT_S, lock, LOOK_S)
            yield
        finally:
            os.close(lock)

    def path_of(self, generation: int) -> Path:
        """Return the path of the file of a generation."""
        return self.path / f"entries-{generation}.sqlite"

    def current(self) -> int:
        """Return the current generation, 1 if there is none yet, and remove the files of earlier ones."""
        generations = {
            int(match[1])
            for path in self.path.iterdir()
            if (match := _GENERATION.fullmatch(path.name)) and path.is_file()
        }
        *former, current = sorted({1, *generations})
        for generation in former:
            self._remove(generation)
        return current

    def start_next(self, generation: int) -> int:
        """Start an empty generation after the given one, which is removed. Return its number."""
        following = self.path_of(generation + 1)
        with contextlib.suppress(OSError):  # if the disk is full, removing the former generation makes room
            following.touch()
        self._remove(generation)
        following.touch()
        return generation + 1

    def remove_earlier_format(self) -> None:
        """Remove the caches that earlier releases kept here. Files that they did not write stay."""
        for directory in self.path.iterdir():
            if _EARLIER.fullmatch(directory.name) and directory.is_dir() and not directory.is_symlink():
                for pattern in ("cache.db*", "??/??/*.val"):
                    for path in directory.glob(pattern):
                        with contextlib.suppress(OSError):
                            path.unlink()
                for pattern in ("??/??", "??"):
                    for path in directory.glob(pattern):
                        with contextlib.suppress(OSError):  # it has other files
                            path.rmdir()
                with contextlib.suppress(OSError):
                    directory.rmdir()

    def _remove(self, generation: int) -> None:
        path = self.path_of(generation)
        for one in (path, path.with_name(f"{path.name}-journal")):
            with contextlib.suppress(OSError):  # a higher generation counts, whether this one can be removed or not
                one.unlink()


def remove_former_cache(path: Path) -> None:
    """Remove a directory with a cache of an earlier release. Files of other programs and caches in use stay. Blocks."""
    lock = path / "lock"
    if lock.exists():
        directory = CacheDirectory(path)
        with contextlib.suppress(OSError):
            with directory.locked():
                directory.remove_earlier_format()
                if list(path.iterdir()) == [lock]:
                    lock.unlink()
            path.rmdir()
