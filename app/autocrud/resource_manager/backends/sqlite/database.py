"""Two databases with one face: `await db.read(work)` and `await db.write(work)`, where `work` gets an apsw connection.

MemoryDatabase  one connection behind a lock. Short work runs at once where the lock is free; otherwise a thread waits for it.
FileDatabase    a file that several processes may share, durable when `write` returns.

Invariants of FileDatabase:

- W1 *Acknowledged is durable.* A write's future is settled only after COMMIT returned, in WAL mode with synchronous=FULL
  (the log is synced before COMMIT returns). A crash before that leaves the file without the write, or with it, never with half.
- W2 *One writer at a time.* Only a committer thread writes, and only while it holds the file lock, which every process takes;
  so BEGIN IMMEDIATE never waits and `work` decides upon the newest state.
- W3 *A write that was given up was not done, and none waits for longer than WRITE_TIMEOUT_S for other processes*, whatever these
  stand still with. There is a ticket, which one side can take: whoever gives up, or the committer, under the lock of the last stage. So
  whoever gives up knows that the last stage is not done, and never will be. What was done of those before it nobody may need: they
  put bodies, which the last one names. And the committer, once it has the ticket, takes no other lock before it tells the outcome.
- W4 *Order.* `after` callbacks run in the order of commits, before the writer is told. A stage of a write begins when those before it
  are durable: it has come so far only with its ticket there, so none was left out.
- W5 *Only committer threads wait for the file lock.* They are daemons, and nobody waits for them longer than W3 says: not a read that opens
  the file, not a purge, not a close, not the end of the process.

The file lock is two flocks: whoever wants the lock waits at the gate first, so a process that writes without pause cannot
overtake one that waits (SQLite's own busy wait is unfair: 331 ms seen).
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
    """A database in this process's memory, gone with it."""

    def __init__(self, schema: Work[None]) -> None:
        self._lock = threading.Lock()
        self._connection = apsw.Connection(":memory:")
        keep_plans(self._connection)
        self._schema: Work[None] | None = schema

    def run(self, work: Work[T]) -> T:
        """Write now, waiting for the lock; all or nothing."""
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
        """`quick` promises microseconds: then it runs here if nobody holds the lock."""
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
        if self._lock.acquire(blocking=False):
            try:
                return self._transact(work)
            finally:
                self._lock.release()
        return await in_thread(lambda: self.run(work))

    async def close(self) -> None:
        """Nothing to give back: closing must not lose what a later event loop wants to read."""


class FileLock:
    """A lock between processes (and threads of this one) that is granted in about the order it was asked for."""

    def __init__(self, path: Path) -> None:
        self._mutex = threading.Lock()
        self._gate = os.open(f"{path}-gate", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        self._lock = os.open(f"{path}-lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
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
        os.close(self._gate)
        os.close(self._lock)


class FileDatabase:
    """A SQLite file on a local disk. Opened at the first use; directories are made."""

    def __init__(self, path: Path, schema: Work[None]) -> None:
        self.path = path
        self.committer = FileCommitter()
        self._schema = schema
        self._state = threading.Lock()  # guards the file lock
        self._file_lock: FileLock | None = None
        self._writer: apsw.Connection | None = None  # used and changed only under the file lock
        self._idle: list[apsw.Connection] = []

    async def read(self, work: Work[T], *, quick: bool = False) -> T:
        if self._file_lock is None:
            await self.open()
        return await in_thread(lambda: self.read_now(work))

    async def open(self) -> None:
        """Open the file if it is not open, for `read_now` in a thread for reads."""
        if self._file_lock is None:
            await self._write_without_transaction(lambda _: None)

    async def write(self, work: Work[T], after: Callable[[], None] | None = None) -> T:
        """Run `work` in a transaction, durable when this returns; see Committer.write."""
        (result,) = await self.committer.write([Stage(self, work)], after)
        done: T = result
        return done

    async def checkpoint(self) -> None:
        """Move the log into the file and empty it, so that what was deleted leaves no trace in it."""
        await self._write_without_transaction(empty_log)

    async def close(self) -> None:
        """The last one to close moves the log into the file. Where another process keeps the lock it stays open."""
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
        """The writing connection, under the file lock. For committers alone."""
        with self._open_now().held():
            if self._writer is None:
                self._writer = self._connect()
            yield self._writer

    def discard_writer(self) -> None:
        """Close the writing connection, under the file lock: after a failed commit it may know less than the file."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def _open_file_lock(self) -> FileLock:
        """The file lock; whoever asks first in this process makes the file and brings its schema up."""
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
    """Move the write-ahead log into the file and empty it. Where somebody reads without pause, a later one does."""
    try:
        connection.wal_checkpoint(mode=apsw.SQLITE_CHECKPOINT_TRUNCATE)
    except apsw.BusyError as error:
        log.warning("traces of what was purged stay in the log until its next checkpoint: %s", error)


def keep_plans(connection: apsw.Connection) -> None:
    """A statement is planned once. Otherwise SQLite plans those whose parameters it could look up in statistics again for each
    execution, and we keep no statistics: four microseconds of a read's six."""
    connection.config(apsw.SQLITE_DBCONFIG_ENABLE_QPSG, 1)


def _configure(connection: apsw.Connection) -> None:
    keep_plans(connection)
    connection.set_busy_timeout(5000)  # only recovery after a crash and the last close make a connection wait (W2)
    connection.pragma("synchronous", "full")
    connection.pragma("secure_delete", "on")  # what is purged is overwritten, not only unlinked
