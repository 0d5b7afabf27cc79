"""Two databases with one face: `await db.read(work)` and `await db.write(work)`, where `work` gets an apsw connection.

MemoryDatabase  one connection behind a lock. Short work runs at once where the lock is free; otherwise a thread waits for it.
FileDatabase    a file that several processes may share, durable when `write` returns.

Invariants of FileDatabase:

- W1 *Acknowledged is durable.* A write's future is settled only after COMMIT returned, in WAL mode with synchronous=FULL
  (the log is synced before COMMIT returns). A crash before that leaves the file without the write, or with it, never with half.
- W2 *One writer at a time.* Only the committer thread writes, and only while it holds the file lock, which every process takes;
  so BEGIN IMMEDIATE never waits and `work` decides upon the newest state.
- W3 *A write that was given up was not done.* It can be given up only before the committer claims it (a ticket that one side
  can take); afterwards its outcome is told, however long that takes.
- W4 *Order.* `after` callbacks run in the order of commits, before the writer is told.

The file lock is two flocks: whoever wants the lock waits at the gate first, so a process that writes without pause cannot
overtake one that waits (SQLite's own busy wait is unfair: 331 ms seen).
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import logging
import os
import queue
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Generic, TypeVar

import apsw

from ...errors import CrudError, OutcomeUnknown, StoreDamaged, StoreUnavailable
from ..threads import in_thread

T = TypeVar("T")
Work = Callable[[apsw.Connection], T]

log = logging.getLogger("crudstack.sqlite")

MAX_GROUP = 500
"""Writes that share one commit at most."""

WRITE_TIMEOUT_S = 10.0
"""How long a write waits for its turn before it is given up."""


def translated(error: apsw.Error) -> CrudError:
    """A SQLite error in the words of the engine. The details, a path for one, go to the log and not to clients."""
    log.error("SQLite: %s: %s", type(error).__name__, error)
    if isinstance(error, apsw.CorruptError | apsw.NotADBError | apsw.FormatError):
        return StoreDamaged("the database file is damaged; restore it from a copy")
    if isinstance(error, apsw.FullError):
        return StoreUnavailable("the disk is full; nothing was changed")
    return StoreUnavailable("the database cannot be used right now; nothing was changed")


class MemoryDatabase:
    """A database in this process's memory, gone with it."""

    def __init__(self, schema: Work[None]) -> None:
        self._lock = threading.Lock()
        self._connection = apsw.Connection(":memory:")
        self._schema: Work[None] | None = schema

    def run(self, work: Work[T]) -> T:
        """Do it now, waiting for the lock; all or nothing."""
        with self._lock:
            return self._run(work)

    def _run(self, work: Work[T]) -> T:
        connection = self._connection
        if self._schema is not None:
            self._schema(connection)
            self._schema = None
        connection.execute("SAVEPOINT work")
        try:
            result = work(connection)
        except BaseException:
            connection.execute("ROLLBACK TO work")
            raise
        finally:
            connection.execute("RELEASE work")
        return result

    async def read(self, work: Work[T], *, quick: bool = False) -> T:
        """`quick` promises microseconds: then it runs here if nobody holds the lock."""
        if quick and self._lock.acquire(blocking=False):
            try:
                return self._run(work)
            finally:
                self._lock.release()
        return await in_thread(lambda: self.run(work))

    async def write(self, work: Work[T], after: Callable[[], None] | None = None) -> T:
        result = await self.read(work, quick=True)
        if after is not None:
            after()
        return result

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


class _Job(Generic[T]):
    """A write that waits for its turn. Whoever pops the ticket decides what becomes of it (W3)."""

    __slots__ = ("after", "error", "future", "loop", "result", "ticket", "work")

    def __init__(self, work: Work[T], after: Callable[[], None] | None, loop: asyncio.AbstractEventLoop) -> None:
        self.work, self.after, self.loop = work, after, loop
        self.future: asyncio.Future[T] = loop.create_future()
        self.ticket = [True]
        self.result: Any = None
        self.error: BaseException | None = None

    def claim(self) -> bool:
        try:
            return self.ticket.pop()
        except IndexError:
            return False

    def give_up(self) -> None:
        if self.claim() and not self.future.done():
            self.future.set_exception(
                StoreUnavailable(f"the database was busy for {WRITE_TIMEOUT_S:g} s; nothing was changed, try again")
            )

    def settle(self) -> None:
        if self.future.done():  # the one who asked is gone
            return
        if self.error is None:
            self.future.set_result(self.result)
        else:
            self.future.set_exception(self.error)


class FileDatabase:
    """A SQLite file on a local disk. Opened at the first use; directories are made."""

    def __init__(self, path: Path, schema: Work[None]) -> None:
        self.path = path
        self._schema = schema
        self._state = threading.Lock()  # guards the four below
        self._file_lock: FileLock | None = None
        self._committer: threading.Thread | None = None
        self._jobs: queue.SimpleQueue[_Job[Any] | None] = queue.SimpleQueue()
        self._idle: list[apsw.Connection] = []

    async def read(self, work: Work[T], *, quick: bool = False) -> T:
        return await in_thread(lambda: self.read_now(work))

    async def write(self, work: Work[T], after: Callable[[], None] | None = None) -> T:
        """Run `work` in a transaction together with whatever waits at the same time; durable when this returns.

        `after` runs in the committer thread once the write is durable. A write that is cancelled may still happen.
        """
        loop = asyncio.get_running_loop()
        job = _Job(work, after, loop)
        if self._committer is None:
            self._start()
        self._jobs.put(job)
        timer = loop.call_later(WRITE_TIMEOUT_S, job.give_up)
        try:
            return await job.future
        finally:
            timer.cancel()

    async def checkpoint(self) -> None:
        """Move the log into the file and empty it, so that what was deleted leaves no trace in it."""
        await in_thread(self._checkpoint)

    async def close(self) -> None:
        await asyncio.get_running_loop().run_in_executor(None, self._close)

    # The rest runs in threads.

    def read_now(self, work: Work[T]) -> T:
        try:
            connection = self._idle.pop()
        except IndexError:
            connection = self._connect()
        try:
            return work(connection)
        except apsw.Error as error:
            raise translated(error) from error
        finally:
            self._idle.append(connection)

    def _lock(self) -> FileLock:
        """The file lock; whoever asks first in this process makes the file and brings its schema up."""
        with self._state:
            if self._file_lock is None:
                self.path.parent.mkdir(parents=True, exist_ok=True)
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

    def _connect(self) -> apsw.Connection:
        try:
            self._lock()
            connection = apsw.Connection(str(self.path))
            _configure(connection)
        except apsw.Error as error:
            raise translated(error) from error
        except OSError as error:
            log.error("%s: %s", self.path, error)
            raise StoreUnavailable("the data directory cannot be used") from error
        return connection

    def _checkpoint(self) -> None:
        with self._lock().held():
            self.read_now(lambda db: db.pragma("wal_checkpoint(truncate)"))

    def _start(self) -> None:
        with self._state:
            if self._committer is None:
                self._committer = threading.Thread(target=self._commit_forever, name="crudstack-commit", daemon=True)
                self._committer.start()

    def _commit_forever(self) -> None:
        connection: apsw.Connection | None = None
        running = True
        while running:
            jobs = [self._jobs.get()]
            if jobs[0] is None:
                break
            claimed: list[_Job[Any]] = []
            try:
                if connection is None:
                    connection = self._connect()
                with self._lock().held():
                    with contextlib.suppress(queue.Empty):
                        while len(jobs) < MAX_GROUP and jobs[-1] is not None:
                            jobs.append(self._jobs.get_nowait())
                    running = jobs[-1] is not None
                    claimed = [job for job in jobs if job is not None and job.claim()]
                    if not _transact(connection, claimed):
                        connection.close()
                        connection = None
            except BaseException as error:  # the thread must live, and nobody may wait for ever
                claimed = claimed or [job for job in jobs if job is not None and job.claim()]
                for job in claimed:
                    job.error = error
            _settle(claimed)
        if connection is not None:
            with self._lock().held():
                connection.close()

    def _close(self) -> None:
        with self._state:
            committer, self._committer = self._committer, None
        if committer is not None:
            self._jobs.put(None)
            committer.join()
        with self._state:
            lock, self._file_lock = self._file_lock, None
        if lock is not None:
            with lock.held():  # the last one to close moves the log into the file
                while self._idle:
                    self._idle.pop().close()
            lock.close()


def _configure(connection: apsw.Connection) -> None:
    connection.set_busy_timeout(5000)  # only recovery after a crash and the last close make a connection wait (W2)
    connection.pragma("synchronous", "full")
    connection.pragma("secure_delete", "on")  # what is purged is overwritten, not only unlinked


def _transact(connection: apsw.Connection, jobs: list[_Job[Any]]) -> bool:
    """Run jobs in one transaction, each all or nothing. False: the connection must not be used again."""
    if not jobs:
        return True
    try:
        connection.execute("BEGIN IMMEDIATE")
        for job in jobs:
            _attempt(connection, job, alone=len(jobs) == 1)
            if not connection.in_transaction:  # SQLite gave the whole transaction up
                raise apsw.AbortError("the transaction was rolled back")
    except apsw.Error as error:
        if connection.in_transaction:
            connection.execute("ROLLBACK")
        for job in jobs:
            job.error = translated(error)
        return False
    done = [job for job in jobs if job.error is None]
    try:
        if connection.in_transaction:
            connection.execute("COMMIT" if done else "ROLLBACK")
    except apsw.Error as error:
        failure = translated(error)
        if not isinstance(error, apsw.FullError | apsw.BusyError):
            # The log may hold the commit although its sync failed; what a restart makes of it nobody knows.
            failure = OutcomeUnknown("the disk failed during the commit; read before you try again")
        if connection.in_transaction:
            connection.execute("ROLLBACK")
        for job in done:
            job.error = failure
        return False
    for job in done:
        if job.after is not None:
            try:
                job.after()
            except BaseException as error:  # the others are durable and must hear it
                job.error = error
    return True


def _attempt(connection: apsw.Connection, job: _Job[Any], alone: bool) -> None:
    if not alone:
        connection.execute("SAVEPOINT job")
    try:
        job.result = job.work(connection)
    except apsw.FullError:
        raise  # nobody's write would fit
    except BaseException as error:
        job.error = translated(error) if isinstance(error, apsw.Error) else error
        if not alone and connection.in_transaction:
            connection.execute("ROLLBACK TO job")
    if not alone and connection.in_transaction:
        connection.execute("RELEASE job")


def _settle(jobs: list[_Job[Any]]) -> None:
    """Tell the ones who wait, one wake-up for each event loop."""
    by_loop: dict[asyncio.AbstractEventLoop, list[_Job[Any]]] = {}
    for job in jobs:
        by_loop.setdefault(job.loop, []).append(job)
    for loop, settled in by_loop.items():
        with contextlib.suppress(RuntimeError):  # the loop is closed, and so is everyone who waited on it
            loop.call_soon_threadsafe(_settle_here, settled)


def _settle_here(jobs: list[_Job[Any]]) -> None:
    for job in jobs:
        job.settle()
