"""A cache of bodies on a local disk, which survives restarts and is shared by processes.

`cache_directory` says which files there are, `cache_file` how an entry is stored.
"""

from __future__ import annotations

import asyncio
import logging
import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import apsw
from typing_extensions import override

from ...errors import ConfigError, StoreUnavailable
from ..runtime.disk_space import cache_may_grow, register
from ..runtime.threads import shielded
from .body_cache import Cache, Entry
from .cache_directory import CacheDirectory
from .cache_file import TEMPORARY, UNUSABLE, CacheFile, is_damage, result_code

T = TypeVar("T")

log = logging.getLogger("crudstack.cache")

MAX_BYTES = 1024**3
"""How large a DiskCache becomes if no bound is given."""


class DiskCache(Cache):
    """The entries that were used last, as many as fit into `max_bytes`, below a directory of a local disk.

    cache_dir  the directory, in which `$NAME` and `~` are expanded; several processes may share it
    max_bytes  how large the cache becomes, 1 GiB by default. A body of more than a quarter of that is not kept, because
               it would remove most of the others.
    clock      tells seconds since 1970

    A put is ignored while the disk has little room (`disk_space.reserve`). A process that starts while the disk has
    little room, or that fills the disk, empties the cache.

    Invariants:

    - D1 *Only bodies that were put are returned.* Each entry has a SHA-256 of its key, expiry and body.
    - D2 *Damage costs entries, nothing else.* If the file cannot be read, the cache starts empty in a new file, and the
      old one is removed. Before each use a process checks that its file was not removed by another process.
    - D3 *Deleted entries are not returned.* If entries cannot be deleted, the cache starts empty as in D2.
    - D4 *Operations run in the order of their calls*, in one thread. So a put that was called before a delete does not
      bring the entry back.
    """

    def __init__(
        self, cache_dir: str | Path, max_bytes: int | None = None, *, clock: Callable[[], float] = time.time
    ) -> None:
        self.cache_dir = Path(os.path.expandvars(cache_dir)).expanduser().absolute()
        self.max_bytes = MAX_BYTES if max_bytes is None else max_bytes
        if self.max_bytes < 1:
            raise ConfigError(f"DiskCache: max_bytes is {max_bytes}, expected at least 1")
        self._clock = clock
        self._state = threading.Lock()  # guards the thread and the counters
        self._thread: ThreadPoolExecutor | None = None
        self._closed: Future[None] | None = None
        self._directory = CacheDirectory(self.cache_dir)  # the thread alone uses this and the rest
        self._file: CacheFile | None = None
        self._generation = 0  # of the open file
        self._was_open = False
        register(self)

    @override
    async def get_many(self, keys: Sequence[str]) -> dict[str, Entry]:
        nothing: dict[str, Entry] = {}
        found = await self._run_or_miss(lambda file: self._get(file, keys), nothing) if keys else nothing
        with self._state:
            self.hits += len(found)
            self.misses += len(keys) - len(found)
        return found

    @override
    async def put_many(self, entries: Mapping[str, Entry]) -> None:
        if entries:
            await self._run_or_miss(lambda file: self._put(file, entries), None)

    @override
    async def delete(self, keys: Sequence[str]) -> None:
        if keys:
            await self._run_or_start_empty(lambda file: file.delete(keys))

    @override
    async def clear(self) -> None:
        await self._run_or_start_empty(lambda _: self._start_empty())

    @override
    async def maintain(self, budget_s: float) -> None:
        deadline = time.monotonic() + budget_s

        def work(file: CacheFile) -> None:
            file.remove_expired(self._clock(), deadline)
            with self._directory.locked():  # a process of an earlier release may have made one since
                self._directory.remove_earlier_format()

        await self._run_or_miss(work, None)

    @override
    async def purge_remnants(self) -> None:
        """Remove expired entries. SQLite has overwritten the deleted ones already."""
        await self._run_or_miss(lambda file: file.remove_expired(self._clock(), float("inf")), None)

    def empty(self) -> None:
        """Remove all entries, as far as possible, to make room on the disk. Blocks."""
        try:
            self._submit(self._start_empty).result()
        except OSError as error:
            log.warning("%s: %s; some entries stay", self.cache_dir, error)

    @override
    async def close(self) -> None:
        with self._state:
            thread, self._thread = self._thread, None
            if thread is None:
                return
            self._closed = thread.submit(self._close_file)
            thread.shutdown(wait=False)
            closed = asyncio.wrap_future(self._closed)
        await shielded(closed)

    # The thread

    def _submit(self, work: Callable[[], T]) -> Future[T]:
        with self._state:
            if self._thread is None:
                before = self._closed  # a new thread waits for the end of the former one
                self._thread = ThreadPoolExecutor(1, "crudstack-cache", lambda: before and before.result())
            return self._thread.submit(work)

    async def _run_or_miss(self, work: Callable[[CacheFile], T], fallback: T) -> T:
        """Return the result of `work`. If it fails, log the error and return `fallback`."""

        def attempt() -> T:
            try:
                return work(self._opened())
            except ConfigError:
                raise
            except Exception as error:  # a damaged file causes errors of any type
                log.warning("%s: %s: %s; a miss", self.cache_dir, type(error).__name__, error)
                if not isinstance(error, apsw.BusyError):
                    self._recover(damaged=is_damage(error))
                return fallback

        return await asyncio.wrap_future(self._submit(attempt))

    def _recover(self, *, damaged: bool) -> None:
        try:
            self._start_empty() if damaged else self._close_file()
        except OSError as error:
            log.warning("%s: %s", self.cache_dir, error)

    async def _run_or_start_empty(self, work: Callable[[CacheFile], object]) -> None:
        """Run `work` to completion even if the caller is cancelled. If it fails, remove all entries.

        Raises StoreUnavailable if that fails too.
        """

        def attempt() -> None:
            try:
                work(self._opened())
            except ConfigError:
                raise
            except Exception as error:  # a damaged file causes errors of any type
                log.warning("%s: %s: %s; it starts empty", self.cache_dir, type(error).__name__, error)
                self._start_empty()

        try:
            await shielded(asyncio.wrap_future(self._submit(attempt)))
        except OSError as error:
            log.error("%s: %s", self.cache_dir, error)
            raise StoreUnavailable(
                "the cache on disk cannot be changed; what was to be removed may still be there"
            ) from error

    def _get(self, file: CacheFile, keys: Sequence[str]) -> dict[str, Entry]:
        found, damaged = file.get(keys, self._clock())
        for _ in range(damaged):
            log.warning("%s: a damaged entry; a miss", self.cache_dir)
        return found

    def _put(self, file: CacheFile, entries: Mapping[str, Entry]) -> None:
        if not cache_may_grow(self.cache_dir):
            file.delete(list(entries))  # the cache must not go on returning the bodies that these should replace
            return
        now = self._clock()
        for key, entry in entries.items():
            file.put(key, entry, now)

    # Opening, in the thread

    def _opened(self) -> CacheFile:
        if self._file is None or not self._file.is_current():
            self._close_file()
            try:
                with self._directory.locked():
                    self._file = self._open()
            except OSError as error:
                if self._was_open or error.errno in TEMPORARY:
                    raise
                raise self._unusable(error) from error
            self._was_open = True
        return self._file

    def _open(self) -> CacheFile:
        self._directory.remove_earlier_format()
        self._generation = self._directory.current()
        if not self._was_open and not cache_may_grow(self.cache_dir):
            self._generation = self._directory.start_next(self._generation)
        path = self._directory.path_of(self._generation)
        try:
            return CacheFile(path, self.max_bytes)
        except Exception as error:  # a damaged file causes errors of any type
            refused = result_code(error) in UNUSABLE  # damage may cause this too
            if refused and not _is_writable(path):
                if self._was_open:
                    raise
                raise self._unusable(error) from error
            if not refused and not is_damage(error):
                raise
            log.warning("%s: %s: %s; it starts empty", self.cache_dir, type(error).__name__, error)
        self._generation = self._directory.start_next(self._generation)
        return CacheFile(self._directory.path_of(self._generation), self.max_bytes)

    def _unusable(self, error: Exception) -> ConfigError:
        log.error("%s: %s", self.cache_dir, error)
        reason = error.strerror if isinstance(error, OSError) else error
        return ConfigError(
            f"DiskCache: cache_dir must be a directory that can be written to ({reason}); its path is in the log"
        )

    def _start_empty(self) -> None:
        """Start an empty generation, unless another process has done so since this one opened the file."""
        opened = None if self._file is None else self._generation
        self._close_file()
        with self._directory.locked():
            current = self._directory.current()
            if opened in (None, current):
                self._directory.start_next(current)

    def _close_file(self) -> None:
        file, self._file = self._file, None
        if file is not None:
            try:
                file.close()
            except Exception as error:  # it is damaged, and not used again
                log.warning("%s: %s", self.cache_dir, error)


def _is_writable(path: Path) -> bool:
    return os.access(path.parent, os.W_OK | os.X_OK) and (not path.exists() or os.access(path, os.R_OK | os.W_OK))
