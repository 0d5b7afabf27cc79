"""Two databases with one interface: `await db.read(work)` and `await db.write(work)`. `work` gets an apsw connection.

MemoryDatabase  one connection behind a lock. If the lock is free, short work runs at once. Otherwise a thread waits.
FileDatabase    a file that several processes may share. A write is durable when `write` returns.

Invariants of FileDatabase; docs/design/disk-commits.md explains them:

- W1 *An acknowledged write is durable.* Its future gets the result only after COMMIT returned, in WAL mode with
  synchronous=FULL. A crash before that leaves the file with the whole write or without it.
- W2 *One writer at a time.* Only a committer thread writes, and only while it holds the file lock. So BEGIN IMMEDIATE
  never waits, and `work` sees the newest state.
- W3 *A withdrawn write was not carried out, and no write waits longer than WRITE_TIMEOUT_S for other processes.* The
  caller's timer or the committer takes the ticket of a write. The committer takes it under the lock of the last stage,
  and then takes no other lock before it reports the outcome. Earlier stages store bodies, which only the last one
  names.
- W4 *The order is kept.* `after` callbacks run in the order of commits, before the caller gets its result. A stage
  begins when the stages before it are durable.
- W5 *Only committer threads wait for the file lock.* They are daemon threads, and no other part waits for them longer
  than W3 allows.

The file lock is two flocks. A process waits at the gate first, so a process that writes without pause cannot overtake
one that waits. SQLite's own busy wait is unfair: a wait of 331 ms was measured.
"""

from __future__ import annotations

import asyncio
import contextlib
import datetime as dt
import fcntl
import logging
import os
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TypeVar

import apsw

from ....errors import CrudError, StoreUnavailable
from ...contract.store_errors import WriteTimedOut
from ...runtime.disk_space import full, is_full
from ...runtime.files import make_directory
from ...runtime.threads import in_thread
from .committer import FileCommitter, Stage, Work, failed_commit
from .errors import translated
from .snapshot import SqliteSnapshot, begin_reading

T = TypeVar("T")

log = logging.getLogger("crudstack.sqlite")

BUSY_MS = 5000
EMPTY_LOG_MS = 100
"""How long `empty_log` waits for the readers of other connections."""
LONGEST_SNAPSHOT = dt.timedelta(days=1)
"""After a purge during a snapshot, its traces are gone from the disk at the latest after this time."""


class MemoryDatabase:
    """A database in the memory of this process. It is lost when the process ends."""

    def __init__(self, schema: Work[None]) -> None:
        self._lock = threading.Lock()
        self._connection = apsw.Connection(":memory:")
        keep_plans(self._connection)
        self._schema: Work[None] | None = schema

    def run(self, work: Work[T]) -> T:
        """Run `work` in a transaction, and return its result. Blocks until the lock is free."""
        with self._lock:
            return self._transact(work)

    def _transact(self, work: Work[T]) -> T:
        connection = self._open_now()
        connection.execute("BEGIN")
        try:
            result = work(connection)
        except BaseException:
            connection.execute("ROLLBACK")
            raise
        connection.execute("COMMIT")
        return result

    def _open_now(self) -> apsw.Connection:
        if self._schema is not None:
            self._schema(self._connection)
            self._schema = None
        return self._connection

    async def read(self, work: Work[T], *, quick: bool = False) -> T:
        """Run `work`, and return its result.

        quick  whether `work` takes microseconds only. Then it runs in the event loop if the lock is free.
        """
        if quick and self._lock.acquire(blocking=False):
            try:
                return work(self._open_now())
            finally:
                self._lock.release()

        def locked() -> T:
            with self._lock:
                return work(self._open_now())

        return await in_thread(locked)

    async def write(self, work: Work[T]) -> T:
        """Run `work` in a transaction, and return its result. Runs in the event loop if the lock is free."""
        if self._lock.acquire(blocking=False):
            try:
                return self._transact(work)
            finally:
                self._lock.release()
        return await in_thread(lambda: self.run(work))

    @contextlib.asynccontextmanager
    async def snapshot(self) -> AsyncIterator[SqliteSnapshot]:
        """Give one moment of the database: a copy of its pages. Other work waits while a thread copies them."""

        def copied() -> apsw.Connection:
            copy = apsw.Connection(":memory:")
            with self._lock, copy.backup("main", self._open_now(), "main") as backup:
                backup.step()
            return copy

        snapshot = SqliteSnapshot(await in_thread(copied), lambda error: StoreUnavailable(f"SQLite: {error}"))
        try:
            yield snapshot
        finally:
            snapshot.close()

    async def load(self, path: Path, move: Work[None]) -> None:
        """Run `move` in a transaction, with the database `path` attached as `loaded`. Other work waits meanwhile."""
        await asyncio.get_running_loop().run_in_executor(None, lambda: self.load_now(path, move))

    def load_now(self, path: Path, move: Work[None]) -> None:
        """Do the same as `load`. Blocks."""
        with self._lock:
            self._open_now().execute("ATTACH ? AS loaded", (str(path),))
            try:
                self._transact(move)
            finally:
                self._connection.execute("DETACH loaded")

    async def close(self) -> None:
        """Do nothing: a later event loop may still read the data."""


class FileLock:
    """A lock between processes, and between the threads of this one, granted in about the order of the requests."""

    def __init__(self, path: Path) -> None:
        self._mutex = threading.Lock()
        self._gate = os.open(f"{path}-gate", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        self._lock = os.open(f"{path}-lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Hold the lock. Blocks until it is granted."""
        with self._mutex:
            fcntl.flock(self._gate, fcntl.LOCK_EX)
            try:
                fcntl.flock(self._lock, fcntl.LOCK_EX)
            finally:
                fcntl.flock(self._gate, fcntl.LOCK_UN)
            try:
                yield
            finally:
                fcntl.flock(self._lock, fcntl.LOCK_UN)

    def close(self) -> None:
        """Close the files of the lock."""
        os.close(self._gate)
        os.close(self._lock)


class FileDatabase:
    """A SQLite file on a local disk. The first use opens it, and makes its directories."""

    def __init__(self, path: Path, schema: Work[None]) -> None:
        self.path = path
        self.committer = FileCommitter()
        self._schema = schema
        self._state = threading.Lock()  # guards the file lock
        self._file_lock: FileLock | None = None
        self._writer: apsw.Connection | None = None  # used and changed only under the file lock
        self._idle: list[apsw.Connection] = []

    async def read(self, work: Work[T], *, quick: bool = False) -> T:
        """Run `work` in a thread, and return its result. `quick` has no effect: a read may wait for the disk.

        Raises StoreUnavailable or StoreDamaged if SQLite reports an error.
        """
        if self._file_lock is None:
            await self.open()
        return await in_thread(lambda: self.read_now(work))

    async def open(self) -> None:
        """Open the file if it is not open. Call this before `read_now` in a thread for reads."""
        if self._file_lock is None:
            await self._write_without_transaction(lambda _: None)

    async def write(self, work: Work[T], after: Callable[[], None] | None = None) -> T:
        """Run `work` in a transaction, and return its result. The write is durable on return.

        `after` runs in the thread of the committer, before the result is returned. Raises WriteTimedOut if the write
        did not get its turn within WRITE_TIMEOUT_S.
        """
        (result,) = await self.committer.write([Stage(self, work)], after)
        done: T = result
        return done

    async def checkpoint(self) -> bool:
        """Move the log into the file and empty it, so that the log has no trace of deleted data.

        Returns False if a snapshot still reads the log. The end of the snapshot, or a later call, empties it.
        """
        return await self._write_without_transaction(lambda connection: empty_log(connection, BUSY_MS))

    async def purge_remnants(self, now: dt.datetime) -> dt.datetime:
        """Empty the log, and return the time at which the last trace of what was purged will be gone."""
        return now if await self.checkpoint() else now + LONGEST_SNAPSHOT

    @contextlib.asynccontextmanager
    async def snapshot(self) -> AsyncIterator[SqliteSnapshot]:
        """Give one moment of the file: a read transaction. Reads and writes of others do not wait for it.

        SQLite keeps the log until the transaction ends, so that the log grows with each write. Then it is emptied.
        """
        await self.open()
        snapshot = SqliteSnapshot(await in_thread(self._begin_reading), partial(translated, directory=self.path.parent))
        try:
            yield snapshot
        finally:
            await asyncio.get_running_loop().run_in_executor(None, snapshot.close)
            try:
                await self.checkpoint()  # also removes the traces of what was purged meanwhile
            except CrudError as error:
                log.warning("%s: the log stays until its next checkpoint: %s", self.path, error)

    async def close(self) -> None:
        """Close the connections. The last connection to a file moves the log into it.

        The file stays open if another process holds the lock for too long.
        """
        try:
            if self._file_lock is not None:
                await self._write_without_transaction(self._close_connections)
            closed = await asyncio.get_running_loop().run_in_executor(None, self._close)
        except WriteTimedOut:
            closed = False
        if not closed:
            log.warning("%s stays open: another process keeps its lock", self.path)

    async def load(self, path: Path, move: Work[None], after: Callable[[], None] | None = None) -> None:
        """Run `move` in a transaction, with the database `path` attached as `loaded`. Durable on return.

        `after` is called as that of `write`. Raises OutcomeUnknown if the disk failed during the commit.
        """
        await self.open()
        (connection,) = await self.committer.write(
            [Stage(self, lambda _: self._load(path, move), without_transaction=True)], after
        )
        await asyncio.get_running_loop().run_in_executor(None, _checkpoint_and_close, connection)

    async def _write_without_transaction(self, work: Work[T]) -> T:
        (result,) = await self.committer.write([Stage(self, work, without_transaction=True)])
        done: T = result
        return done

    # The rest runs in threads.

    def _load(self, path: Path, move: Work[None]) -> apsw.Connection:
        """Load a database, under the file lock. Return the connection, whose log is still to be moved into the file.

        The connection is a new one, because a database cannot be attached in a transaction.
        """
        connection = self._connect()
        with contextlib.ExitStack() as failed:
            failed.callback(connection.close, force=True)
            connection.wal_autocheckpoint(0)  # it would prolong the lock
            connection.execute("ATTACH ? AS loaded", (str(path),))
            connection.execute("BEGIN IMMEDIATE")
            move(connection)
            try:
                connection.execute("COMMIT")
            except apsw.Error as error:
                raise failed_commit(error, self.path.parent) from error
            failed.pop_all()
        return connection

    def read_now(self, work: Work[T]) -> T:
        """Run `work`, and return its result. Blocks.

        Raises StoreUnavailable or StoreDamaged if SQLite reports an error.
        """
        try:
            connection = self._idle.pop()
        except IndexError:
            connection = self._connect()
        try:
            return work(connection)
        except apsw.Error as error:
            raise translated(error, self.path.parent) from error
        finally:
            self._idle.append(connection)

    def _begin_reading(self) -> apsw.Connection:
        connection = self._connect()
        try:
            begin_reading(connection)
        except apsw.Error as error:
            connection.close()
            raise translated(error, self.path.parent) from error
        return connection

    @contextlib.contextmanager
    def writing(self) -> Iterator[apsw.Connection]:
        """Hold the file lock, and return the writing connection. Blocks. Only committers may call this."""
        with self._open_now().held():
            if self._writer is None:
                self._writer = self._connect()
            yield self._writer

    def discard_writer(self) -> None:
        """Close the writing connection, because after a failed commit it may know less than the file.

        The caller holds the file lock.
        """
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def _open_file_lock(self) -> FileLock:
        """Return the file lock. The first call in a process makes the file and completes its schema."""
        with self._state:
            if self._file_lock is None:
                make_directory(self.path.parent)
                lock = FileLock(self.path)
                try:
                    with lock.held(), contextlib.closing(apsw.Connection(str(self.path))) as connection:
                        _configure(connection)
                        connection.pragma("journal_mode", "wal")
                        connection.execute("BEGIN IMMEDIATE")
                        with contextlib.ExitStack() as undo:
                            undo.callback(connection.execute, "ROLLBACK")
                            self._schema(connection)
                            undo.pop_all()
                        connection.execute("COMMIT")
                except BaseException:
                    lock.close()
                    raise
                self._file_lock = lock
            return self._file_lock

    def _open_now(self) -> FileLock:
        try:
            return self._open_file_lock()
        except apsw.Error as error:
            raise translated(error, self.path.parent) from error
        except OSError as error:
            if is_full(error, self.path.parent):
                raise full(error, self.path.parent) from error
            log.error("%s: %s", self.path, error)
            raise StoreUnavailable("the data directory cannot be used") from error

    def _connect(self) -> apsw.Connection:
        self._open_now()
        try:
            connection = apsw.Connection(str(self.path))
            _configure(connection)
        except apsw.Error as error:
            raise translated(error, self.path.parent) from error
        return connection

    def _close_connections(self, _: apsw.Connection) -> None:
        self.discard_writer()
        while self._idle:
            self._idle.pop().close()

    def _close(self) -> bool:
        if not self.committer.stop():
            return False
        with self._state:
            lock, self._file_lock = self._file_lock, None
        if lock is not None:
            lock.close()
        return True


def _checkpoint_and_close(connection: apsw.Connection) -> None:
    """Move the log into the file, as far as no snapshot reads it. Writers go on meanwhile."""
    try:
        with contextlib.suppress(apsw.BusyError):  # another process does it
            connection.wal_checkpoint(mode=apsw.SQLITE_CHECKPOINT_PASSIVE)
    except apsw.Error as error:
        log.warning("the log stays until its next checkpoint: %s", error)
    finally:
        connection.close(force=True)


def empty_log(connection: apsw.Connection, busy_ms: int) -> bool:
    """Move the write-ahead log into the file and empty it. Return False if others read it: a later call empties it.

    A snapshot may read it for hours, and the caller holds the lock of all writers. So the wait is short.

    busy_ms  the busy timeout that the connection gets back
    """
    connection.set_busy_timeout(EMPTY_LOG_MS)
    try:
        connection.wal_checkpoint(mode=apsw.SQLITE_CHECKPOINT_TRUNCATE)
        return True
    except apsw.BusyError as error:
        log.warning("traces of what was purged stay in the log until its next checkpoint: %s", error)
        return False
    finally:
        connection.set_busy_timeout(busy_ms)


def keep_plans(connection: apsw.Connection) -> None:
    """Make SQLite plan each statement only once.

    Otherwise it plans some statements again at each execution, to look up their parameters in statistics. There are no
    statistics, and the planning takes four of the six microseconds of a read.
    """
    connection.config(apsw.SQLITE_DBCONFIG_ENABLE_QPSG, 1)


def _configure(connection: apsw.Connection) -> None:
    keep_plans(connection)
    connection.set_busy_timeout(BUSY_MS)  # only recovery after a crash and the last close make a connection wait (W2)
    connection.pragma("synchronous", "full")
    connection.pragma("secure_delete", "on")  # purged data is overwritten, not only unlinked
