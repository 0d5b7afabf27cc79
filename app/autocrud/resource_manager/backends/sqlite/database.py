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
import fcntl
import logging
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import apsw

from ....errors import StoreUnavailable
from ...contract.store_errors import WriteTimedOut
from ...runtime.disk_space import full, is_full
from ...runtime.files import make_directory
from ...runtime.threads import in_thread
from .committer import FileCommitter, Stage, Work
from .errors import translated

T = TypeVar("T")

log = logging.getLogger("crudstack.sqlite")


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

    async def checkpoint(self) -> None:
        """Move the log into the file and empty it, so that the log has no trace of deleted data."""
        await self._write_without_transaction(empty_log)

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

    async def _write_without_transaction(self, work: Work[object]) -> None:
        await self.committer.write([Stage(self, work, without_transaction=True)])

    # The rest runs in threads.

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


def empty_log(connection: apsw.Connection) -> None:
    """Move the write-ahead log into the file and empty it. If other processes read without pause, a later call does."""
    try:
        connection.wal_checkpoint(mode=apsw.SQLITE_CHECKPOINT_TRUNCATE)
    except apsw.BusyError as error:
        log.warning("traces of what was purged stay in the log until its next checkpoint: %s", error)


def keep_plans(connection: apsw.Connection) -> None:
    """Make SQLite plan each statement only once.

    Otherwise it plans some statements again at each execution, to look up their parameters in statistics. There are no
    statistics, and the planning takes four of the six microseconds of a read.
    """
    connection.config(apsw.SQLITE_DBCONFIG_ENABLE_QPSG, 1)


def _configure(connection: apsw.Connection) -> None:
    keep_plans(connection)
    connection.set_busy_timeout(5000)  # only recovery after a crash and the last close make a connection wait (W2)
    connection.pragma("synchronous", "full")
    connection.pragma("secure_delete", "on")  # purged data is overwritten, not only unlinked
