"""Caches of bodies: the contract, one in this process's memory, one on a local disk.

    MemoryCache(max_size=100)
    DiskCache(cache_dir="cache/article")     needs the extra `cache`

A cache may lose anything at any time, and never gives back anything but what was put: what it cannot do is a miss and a line in the log,
not an error. Two things are different, because somebody relies on them: `delete` and `clear` raise StoreUnavailable where the entries
might be read again, and a cache that cannot work at all raises ConfigError at its first use.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
import os
import shutil
import struct
import threading
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from operator import itemgetter
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from ...errors import ConfigError, StoreUnavailable
from ..runtime.disk_space import cache_may_grow, register
from ..runtime.files import lock_within
from ..runtime.threads import shielded
from .disk_index import (
    HEADER,
    TEMPORARY,
    TIMEOUT_S,
    UNUSABLE,
    delete_rows,
    driver,
    identity,
    is_damage,
    life_of,
    remove_strays,
    sqlite_code,
)

T = TypeVar("T")

log = logging.getLogger("crudstack.cache")

SWEEP_S = 60.0
"""How often a MemoryCache that is written to looks for what has expired."""
MAX_BYTES = 1024**3
"""How large a DiskCache becomes if nothing else is said."""


class Entry(NamedTuple):
    """A body and how many seconds it may still be kept. Read from one cache and put into another it stays as old as it is."""

    body: bytes
    ttl_s: float


class Cache(ABC):
    """Bodies by key. Any text is a key. Several event loops may use one at once."""

    hits: int = 0
    misses: int = 0

    async def get(self, key: str) -> bytes | None:
        found = (await self.get_many([key])).get(key)
        return None if found is None else found.body

    async def put(self, key: str, body: bytes, ttl_s: float) -> None:
        await self.put_many({key: Entry(body, ttl_s)})

    @abstractmethod
    async def get_many(self, keys: Sequence[str]) -> dict[str, Entry]:
        """What is there of these. Each key is a hit or a miss."""

    @abstractmethod
    async def put_many(self, entries: Mapping[str, Entry]) -> None:
        """Keep these in place of what was there; one whose time is over only removes it."""

    @abstractmethod
    async def delete(self, keys: Sequence[str]) -> None:
        """Remove entries, surely; those that are not there are no error."""

    @abstractmethod
    async def clear(self) -> None:
        """Remove everything, surely."""

    async def maintain(self, budget_s: float) -> None:
        """Remove what has expired, for at most about `budget_s` seconds. Without it that happens little by little."""
        return None

    async def purge_remnants(self) -> None:
        """Remove the traces of what was deleted."""
        return None

    async def close(self) -> None:
        """Give back what is open; the cache may be used again afterwards."""
        return None


class Kept:
    """What a MemoryCache knows of an entry.

    born     the number of the put that brought it
    expires  when its time is over, by the cache's clock
    used     the number of the hit that was its last, or the last one before it was put
    """

    __slots__ = ("body", "born", "expires", "used")

    def __init__(self, body: bytes, expires: float, born: int, used: int) -> None:
        self.body, self.expires, self.born, self.used = body, expires, born, used


class MemoryCache(Cache):
    """The `max_size` entries that were used last, in this process's memory.

    `clock` tells seconds. It is the wall clock, because one that stands still while a machine sleeps would keep entries for longer.

    Finding is all there is to a hit, so it takes no lock, moves nothing, and may be done where the body is wanted (CachedS3ResourceStore.get):

    - *Only who holds the lock changes `kept`, and a `Kept` never gets another body.* So one look-up, which is atomic, is a hit whole.
    - *A hit leaves its number, and the order of use is made of the numbers when something must go.* Entries of the same number are in the
      order they were put, which is `kept`'s. What was the coldest when they were last sorted, and has not been used since, still is.
    - Two threads may take the same number where Python has no GIL: then one hit is not counted, and two entries pass for used at once.
    """

    def __init__(self, max_size: int = 100, *, clock: Callable[[], float] = time.time) -> None:
        if max_size < 1:
            raise ConfigError(f"MemoryCache: max_size is {max_size}, expected at least 1")
        self.max_size, self.clock = max_size, clock
        self.kept: dict[str, Kept] = {}
        self._lock = threading.Lock()
        self._coldest: deque[tuple[str, int, int]] = deque()  # keys with `born` and `used`, the coldest first
        self._puts = 0
        self._swept = clock()

    async def get_many(self, keys: Sequence[str]) -> dict[str, Entry]:
        found = {}
        with self._lock:
            now = self.clock()
            for key in keys:
                kept = self.kept.get(key)
                if kept is None:
                    self.misses += 1
                elif kept.expires > now:
                    found[key] = Entry(kept.body, kept.expires - now)
                    self.hits = kept.used = self.hits + 1
                else:
                    del self.kept[key]
                    self.misses += 1
        return found

    async def put_many(self, entries: Mapping[str, Entry]) -> None:
        with self._lock:
            now = self.clock()
            for key, (body, ttl_s) in entries.items():
                self.kept.pop(key, None)
                if ttl_s > 0:
                    self._puts += 1
                    self.kept[key] = Kept(body, now + ttl_s, self._puts, self.hits)
            if now - self._swept > SWEEP_S:
                self._expire(now)
            while len(self.kept) > self.max_size:
                self._drop_coldest()

    async def delete(self, keys: Sequence[str]) -> None:
        with self._lock:
            for key in keys:
                self.kept.pop(key, None)

    async def clear(self) -> None:
        with self._lock:
            self.kept.clear()

    async def maintain(self, budget_s: float) -> None:
        with self._lock:
            self._expire(self.clock())

    def _expire(self, now: float) -> None:
        self._swept = now
        for key in [key for key, kept in self.kept.items() if kept.expires <= now]:
            del self.kept[key]

    def _drop_coldest(self) -> None:
        while True:
            while self._coldest:
                key, born, used = self._coldest.popleft()
                kept = self.kept.get(key)
                if kept is not None and (kept.born, kept.used) == (born, used):
                    del self.kept[key]
                    return
            ages = [(key, kept.born, kept.used) for key, kept in self.kept.items()]
            self._coldest.extend(sorted(ages, key=itemgetter(2)))


class DiskCache(Cache):
    """The entries that were used last, as many as fit into `max_bytes` (1 GiB), below a directory of a local disk.

    They survive restarts, and several processes may share the directory. A body of more than a quarter of `max_bytes` is not kept: it would
    drive out the rest. What a killed process left half done is not counted, and goes when its time is over. A disk with little room
    (disk_space.reserve) takes no more entries, and a process that starts with little room, or fills the disk, empties the cache.

    Invariants:

    - D1 *Nothing but what was put.* Each value is stored with its expiry and a SHA-256 over key, expiry and body, which diskcache has not.
    - D2 *Damage costs entries, nothing else.* An index that cannot be read is left behind: the cache lives on, empty, in `life-{n + 1}`, and
      `life-{n}` is removed. The names differ because SQLite finds the journal of a database by its name, whosever it is by then. Other
      processes see before each use that their index is gone.
    - D3 *Deleted is deleted.* Where entries cannot be deleted one by one, everything is left behind as in D2.
    - D4 *In order.* One thread does everything in the order it was asked for, so what is deleted does not come back by a put that was
      asked for earlier. (And only the thread that opened one of diskcache's connections may close it.)

    `clock` tells seconds; in tests it may be ahead of `time.time`, but not behind, because diskcache asks that one too.
    """

    def __init__(
        self, cache_dir: str | Path, max_bytes: int | None = None, *, clock: Callable[[], float] = time.time
    ) -> None:
        driver()
        self.cache_dir = Path(os.path.expandvars(cache_dir)).expanduser().absolute()  # as diskcache does
        self.max_bytes = MAX_BYTES if max_bytes is None else max_bytes
        if self.max_bytes < 1:
            raise ConfigError(f"DiskCache: max_bytes is {max_bytes}, expected at least 1")
        self._clock = clock
        self._state = threading.Lock()  # guards the thread and the counters
        self._thread: ThreadPoolExecutor | None = None
        self._closed: Future[None] | None = None
        self._index: Any = None  # this and the rest belong to the thread
        self._identity: tuple[int, int] | None = None
        self._worked = False
        register(self)

    async def get_many(self, keys: Sequence[str]) -> dict[str, Entry]:
        nothing: dict[str, Entry] = {}
        found = await self._try(lambda index: self._get(index, keys), nothing) if keys else nothing
        with self._state:
            self.hits += len(found)
            self.misses += len(keys) - len(found)
        return found

    async def put_many(self, entries: Mapping[str, Entry]) -> None:
        if entries:
            await self._try(lambda index: self._put(index, entries), None)

    async def delete(self, keys: Sequence[str]) -> None:
        if keys:
            await self._surely(lambda index: delete_rows(index, [_address(key) for key in keys]))

    async def clear(self) -> None:
        await self._surely(lambda index: index.clear())

    async def maintain(self, budget_s: float) -> None:
        deadline = time.monotonic() + budget_s

        def work(index: Any) -> None:
            index.expire(now=self._clock())
            remove_strays(Path(index.directory), self._clock(), deadline)

        await self._try(work, None)

    async def purge_remnants(self) -> None:
        # SQLite overwrites what it deletes, and diskcache deletes only what has not expired.
        await self._try(lambda index: index.expire(now=self._clock()), 0)

    def empty(self) -> None:
        """Remove all entries, as far as possible. Blocks; for disk_space.make_room."""
        try:
            self._ask(self._leave_behind).result()
        except OSError as error:
            log.warning("%s: %s; some entries stay", self.cache_dir, error)

    async def close(self) -> None:
        with self._state:
            thread, self._thread = self._thread, None
            if thread is None:
                return
            self._closed = thread.submit(self._shut)
            thread.shutdown(wait=False)
            closed = asyncio.wrap_future(self._closed)
        await shielded(closed)

    # The thread

    def _ask(self, work: Callable[[], T]) -> Future[T]:
        with self._state:
            if self._thread is None:
                before = self._closed  # a new thread begins where the former one has ended
                self._thread = ThreadPoolExecutor(1, "crudstack-cache", lambda: before and before.result())
            return self._thread.submit(work)

    async def _try(self, work: Callable[[Any], T], otherwise: T) -> T:
        """Do it, or say why not in the log and return `otherwise`."""

        def attempt() -> T:
            began = time.monotonic()
            try:
                return work(self._opened())
            except ConfigError:
                raise
            except Exception as error:  # a damaged index fails in any way it likes
                log.warning("%s: %s: %s; a miss", self.cache_dir, type(error).__name__, error)
                busy = isinstance(error, driver().Timeout) and time.monotonic() - began >= TIMEOUT_S
                if not busy:  # diskcache calls it a time-out whenever a transaction cannot begin
                    self._recover(damaged=is_damage(error))
                return otherwise

        return await asyncio.wrap_future(self._ask(attempt))

    def _recover(self, *, damaged: bool) -> None:
        try:
            self._leave_behind() if damaged else self._shut()
        except OSError as error:
            log.warning("%s: %s", self.cache_dir, error)

    async def _surely(self, work: Callable[[Any], object]) -> None:
        def attempt() -> None:
            try:
                work(self._opened())
            except ConfigError:
                raise
            except Exception as error:  # see above
                log.warning("%s: %s: %s; it starts empty", self.cache_dir, type(error).__name__, error)
                self._leave_behind()

        try:
            await shielded(asyncio.wrap_future(self._ask(attempt)))
        except OSError as error:
            log.error("%s: %s", self.cache_dir, error)
            raise StoreUnavailable(
                "the cache on disk cannot be changed; what was to be removed may still be there"
            ) from error

    # Opening, in the thread

    def _opened(self) -> Any:
        if self._index is None or identity(self._index) != self._identity:
            self._shut()
            try:
                with self._lock_of_directory():
                    self._index = self._open()
            except OSError as error:
                if self._worked or error.errno in TEMPORARY:
                    raise
                raise self._unusable(error) from error
            self._identity = identity(self._index)
            self._worked = True
        return self._index

    def _open(self) -> Any:
        number = self._life()
        if not self._worked and not cache_may_grow(self.cache_dir):
            self._next_life(number)  # perhaps with files that killed processes left, which nothing counts
            number += 1
        try:
            return driver().Index(self._directory(number), self.max_bytes)
        except Exception as error:  # see `is_damage`
            refused = sqlite_code(error) in UNUSABLE  # as a damaged index may be, for one
            if refused and not self._writable(number):
                if self._worked:
                    raise
                raise self._unusable(error) from error
            if not refused and not is_damage(error):
                raise
            log.warning("%s: %s: %s; it starts empty", self.cache_dir, type(error).__name__, error)
        self._next_life(number)
        return driver().Index(self._directory(number + 1), self.max_bytes)

    def _writable(self, life: int) -> bool:
        directory = self._directory(life)
        index = directory / "cache.db"
        return os.access(directory, os.W_OK | os.X_OK) and (not index.exists() or os.access(index, os.R_OK | os.W_OK))

    def _unusable(self, error: Exception) -> ConfigError:
        log.error("%s: %s", self.cache_dir, error)
        reason = error.strerror if isinstance(error, OSError) else error
        return ConfigError(
            f"DiskCache: cache_dir must be a directory that can be written to ({reason}); its path is in the log"
        )

    def _leave_behind(self) -> None:
        """Start empty, unless another process has done so since this one opened the index."""
        number = None if self._index is None else life_of(Path(self._index.directory))
        self._shut()
        with self._lock_of_directory():
            current = self._life()
            if number in (None, current):
                self._next_life(current)

    def _shut(self) -> None:
        index, self._index = self._index, None
        if index is not None:
            try:
                index.close()
            except Exception as error:  # what cannot be closed was damaged, and is not used again
                log.warning("%s: %s", self.cache_dir, error)

    @contextlib.contextmanager
    def _lock_of_directory(self) -> Iterator[None]:
        self.cache_dir.mkdir(parents=True, exist_ok=True)
        lock = os.open(self.cache_dir / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            lock_within(TIMEOUT_S, lock, 0.005)
            yield
        finally:
            os.close(lock)

    def _directory(self, life: int) -> Path:
        return self.cache_dir / f"life-{life}"

    def _life(self) -> int:
        """The number of the life that counts. Those before it ended; what is left of them goes."""
        *former, current = sorted({1, *filter(None, map(life_of, self.cache_dir.iterdir()))})
        for number in former:
            shutil.rmtree(self._directory(number), ignore_errors=True)
        return current

    def _next_life(self, after: int) -> None:
        with contextlib.suppress(OSError):  # a full disk: there is room as soon as the former life is gone
            self._directory(after + 1).mkdir()
        shutil.rmtree(self._directory(after), ignore_errors=True)
        self._directory(after + 1).mkdir(exist_ok=True)

    # Reading and writing, in the thread

    def _get(self, index: Any, keys: Sequence[str]) -> dict[str, Entry]:
        with index.transact():  # being used is written down, so one transaction for all
            stored = {key: index.get(_address(key)) for key in keys}
        found, useless = {}, []
        now = self._clock()
        for key, value in stored.items():
            if value is None:
                continue
            entry = _unpacked(_address(key), value, now)
            if entry is not None and entry.ttl_s > 0:
                found[key] = entry
            else:
                useless.append(_address(key))
                if entry is None:
                    log.warning("%s: a damaged entry; a miss", self.cache_dir)
        if useless:
            delete_rows(index, useless)
        return found

    def _put(self, index: Any, entries: Mapping[str, Entry]) -> None:
        now = self._clock()
        if not cache_may_grow(self.cache_dir):
            delete_rows(index, [_address(key) for key in entries])  # they may be other bodies than those there
            return
        for key, (body, ttl_s) in entries.items():
            address, expires = _address(key), now + ttl_s
            if ttl_s <= 0 or 4 * (HEADER.size + len(body)) > self.max_bytes:
                delete_rows(index, [address])
                continue
            index.disk.written = None
            try:
                index.set(address, _packed(address, body, expires), expire=expires - time.time())
            except BaseException:
                if index.disk.written is not None:  # a file that no row names
                    index.disk.remove(index.disk.written)
                raise
        if index.volume() > self.max_bytes:  # one put drives out one entry, which may have been smaller
            index.cull()


# A value on disk


def _address(key: str) -> bytes:
    """What the index knows of a key: any text will do, and no key is too long."""
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()


def _digest(address: bytes, body: bytes | memoryview, expires: float) -> bytes:
    digest = hashlib.sha256(b"crudstack-cache-1" + struct.pack(">d", expires) + address)
    digest.update(body)
    return digest.digest()


def _packed(address: bytes, body: bytes, expires: float) -> bytes:
    return HEADER.pack(expires, _digest(address, body, expires)) + body


def _unpacked(address: bytes, value: object, now: float) -> Entry | None:
    """The entry, None if it is damaged."""
    if not isinstance(value, bytes) or len(value) < HEADER.size:
        return None
    expires, digest = HEADER.unpack_from(value)
    if digest != _digest(address, memoryview(value)[HEADER.size :], expires):
        return None
    return Entry(value[HEADER.size :], expires - now)


# diskcache, in the thread
