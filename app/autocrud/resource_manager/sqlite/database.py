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
import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import apsw

from ...errors import CrudError, OutcomeUnknown, StoreDamaged, StoreUnavailable
from ..directories import make_directory
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


class GaveUp(StoreUnavailable):
    """Its turn did not come. The same database would make the next one wait as long."""


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
        connection = self._opened()
        connection.execute("BEGIN")
        try:
            result = work(connection)
        except BaseException:
            connection.execute("ROLLBACK")
            raise
        connection.execute("COMMIT")
        return result

    def _opened(self) -> apsw.Connection:
        if self._schema is not None:
            self._schema(self._connection)
            self._schema = None
        return self._connection

    async def read(self, work: Work[T], *, quick: bool = False) -> T:
        """`quick` promises microseconds: then it runs here if nobody holds the lock."""
        if quick and self._lock.acquire(blocking=False):
            try:
                return work(self._opened())
            finally:
                self._lock.release()

        def locked() -> T:
            with self._lock:
                return work(self._opened())

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


class Stage(NamedTuple):
    """A write as a part of a larger one: `work` in a transaction of `database`; `alone`: under its lock, without one."""

    database: FileDatabase
    work: Work[Any]
    alone: bool = False


class _Job:
    """A write that waits for its turn: stages, each durable before the next begins. Whoever pops the ticket decides (W3)."""

    __slots__ = ("after", "claimed", "error", "future", "loop", "results", "stages", "ticket")

    def __init__(
        self, stages: Sequence[Stage], after: Callable[[], None] | None, loop: asyncio.AbstractEventLoop
    ) -> None:
        self.stages, self.after, self.loop = stages, after, loop
        self.future: asyncio.Future[list[Any]] = loop.create_future()
        self.ticket = [True]
        self.claimed = False
        self.results: list[Any] = []
        self.error: BaseException | None = None

    def goes_on(self, number: int) -> bool:
        """For the committer, under the lock of this stage: whether it is to be done. The last one takes the ticket."""
        return self.claim() if number == len(self.stages) - 1 else bool(self.ticket)

    def claim(self) -> bool:
        """For the committer: whether the job is its own."""
        if not self.claimed:
            self.claimed = self._take()
        return self.claimed

    @property
    def over(self) -> bool:
        return self.error is not None or len(self.results) == len(self.stages)

    def _take(self) -> bool:
        try:
            return self.ticket.pop()
        except IndexError:
            return False

    def give_up(self) -> None:
        if self._take() and not self.future.done():
            self.future.set_exception(
                GaveUp(f"the database was busy for {WRITE_TIMEOUT_S:g} s; nothing was changed, try again")
            )

    def settle(self) -> None:
        if self.future.done():  # the one who asked is gone
            return
        if self.error is None:
            self.future.set_result(self.results)
        else:
            self.future.set_exception(self.error)


Run = Callable[[apsw.Connection, list[_Job], int], bool]
"""Run a stage of jobs. False: the connection must not be used again."""


class Committer:
    """The one thread that writes to some databases. Writes that wait at the same time share their commits."""

    def __init__(self) -> None:
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._state = threading.Lock()  # guards the two above

    async def write(self, stages: Sequence[Stage], after: Callable[[], None] | None = None) -> list[Any]:
        """Do the stages in turn; what each returned. All are durable when this returns, and none is done twice.

        Where a stage fails, those before it stay done; where it is given up (GaveUp), all but the last may be. `after` runs in the committer's
        thread, before anyone is told. A write that is cancelled may still happen.
        """
        loop = asyncio.get_running_loop()
        job = _Job(stages, after, loop)
        with self._state:
            if self._thread is None:
                thread = threading.Thread(target=self._run, args=(self._jobs,), name="crudstack-commit", daemon=True)
                thread.start()
                self._thread = thread
            self._jobs.put(job)
        timer = loop.call_later(WRITE_TIMEOUT_S, job.give_up)
        try:
            return await job.future
        finally:
            timer.cancel()

    def stop(self) -> bool:
        """Do what waits, then end the thread; the next write starts another one. False: it stands still, and ends when it no longer does."""
        with self._state:
            thread, self._thread = self._thread, None
            jobs, self._jobs = self._jobs, queue.SimpleQueue()
        if thread is None:
            return True
        jobs.put(None)
        thread.join(WRITE_TIMEOUT_S)
        return not thread.is_alive()

    def _run(self, waiting: queue.SimpleQueue[_Job | None]) -> None:
        running = True
        while running:
            taken = [waiting.get()]
            with contextlib.suppress(queue.Empty):
                while taken[-1] is not None and len(taken) < MAX_GROUP:
                    taken.append(waiting.get_nowait())
            running = taken[-1] is not None
            jobs = [job for job in taken if job is not None]
            for number in range(max((len(job.stages) for job in jobs), default=0)):
                groups: dict[tuple[FileDatabase, bool], list[_Job]] = {}
                for job in jobs:
                    if job.error is None and number < len(job.stages):
                        stage = job.stages[number]
                        groups.setdefault((stage.database, stage.alone), []).append(job)
                for (database, alone), group in groups.items():
                    self._commit(database, group, number, _do if alone else _transact)
                    _finish([job for job in group if job.over and job.claim()])

    def _commit(self, database: FileDatabase, group: list[_Job], number: int, run: Run) -> None:
        try:
            with database.writing() as connection:
                # Asked only now: while another process holds the lock, a write may still be given up.
                if not run(connection, [job for job in group if job.goes_on(number)], number):
                    database.discard_writer()
        except BaseException as error:  # the thread must live, and nobody may wait for ever
            for job in group:
                if job.claim() and job.error is None:
                    job.error = error


class FileDatabase:
    """A SQLite file on a local disk. Opened at the first use; directories are made."""

    def __init__(self, path: Path, schema: Work[None]) -> None:
        self.path = path
        self.committer = Committer()
        self._schema = schema
        self._state = threading.Lock()  # guards the file lock
        self._file_lock: FileLock | None = None
        self._writer: apsw.Connection | None = None  # used and changed only under the file lock
        self._idle: list[apsw.Connection] = []

    async def read(self, work: Work[T], *, quick: bool = False) -> T:
        if self._file_lock is None:
            await self.opened()
        return await in_thread(lambda: self.read_now(work))

    async def opened(self) -> None:
        """Open the file if it is not open, for `read_now` in a thread for reads."""
        if self._file_lock is None:
            await self._alone(lambda _: None)

    async def write(self, work: Work[T], after: Callable[[], None] | None = None) -> T:
        """Run `work` in a transaction, durable when this returns; see Committer.write."""
        (result,) = await self.committer.write([Stage(self, work)], after)
        done: T = result
        return done

    async def checkpoint(self) -> None:
        """Move the log into the file and empty it, so that what was deleted leaves no trace in it."""
        await self._alone(empty_log)

    async def close(self) -> None:
        """The last one to close moves the log into the file. Where another process keeps the lock it stays open."""
        try:
            if self._file_lock is not None:
                await self._alone(self._close_connections)
            closed = await asyncio.get_running_loop().run_in_executor(None, self._close)
        except GaveUp:
            closed = False
        if not closed:
            log.warning("%s stays open: another process keeps its lock", self.path)

    async def _alone(self, work: Work[object]) -> None:
        await self.committer.write([Stage(self, work, alone=True)])

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

    @contextlib.contextmanager
    def writing(self) -> Iterator[apsw.Connection]:
        """The writing connection, under the file lock. For committers alone."""
        with self._opened().held():
            if self._writer is None:
                self._writer = self._connect()
            yield self._writer

    def discard_writer(self) -> None:
        """Close the writing connection, under the file lock: after a failed commit it may know less than the file."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def _file(self) -> FileLock:
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

    def _opened(self) -> FileLock:
        try:
            return self._file()
        except apsw.Error as error:
            raise translated(error) from error
        except OSError as error:
            log.error("%s: %s", self.path, error)
            raise StoreUnavailable("the data directory cannot be used") from error

    def _connect(self) -> apsw.Connection:
        self._opened()
        try:
            connection = apsw.Connection(str(self.path))
            _configure(connection)
        except apsw.Error as error:
            raise translated(error) from error
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


def _do(connection: apsw.Connection, jobs: list[_Job], number: int) -> bool:
    """Run a stage of jobs, one after the other, without a transaction."""
    for job in jobs:
        try:
            job.results.append(job.stages[number].work(connection))
        except apsw.Error as error:
            job.error = translated(error)
    return all(job.error is None for job in jobs)


def _transact(connection: apsw.Connection, jobs: list[_Job], number: int) -> bool:
    """Run a stage of jobs in one transaction, each all or nothing."""
    if not jobs:
        return True
    try:
        connection.execute("BEGIN IMMEDIATE")
        if not _attempt(connection, jobs, number, savepoints=False):
            # A job failed half way. Savepoints take it back alone, but cost every job two statements, so only now.
            connection.execute("ROLLBACK")
            connection.execute("BEGIN IMMEDIATE")
            _attempt(connection, jobs, number, savepoints=True)
    except apsw.Error as error:
        if connection.in_transaction:
            connection.execute("ROLLBACK")
        for job in jobs:
            job.error = translated(error)
        return False
    done = [job for job in jobs if job.error is None]
    try:
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
    return True


def _attempt(connection: apsw.Connection, jobs: list[_Job], number: int, *, savepoints: bool) -> bool:
    """Run the jobs, keeping their results or errors. False: one failed after it had changed something, without a savepoint."""
    for job in jobs:
        del job.results[number:]
        job.error = None
        if savepoints:
            connection.execute("SAVEPOINT job")
        before = connection.total_changes()
        try:
            job.results.append(job.stages[number].work(connection))
        except apsw.FullError:
            raise  # nobody's write would fit
        except BaseException as error:
            job.error = translated(error) if isinstance(error, apsw.Error) else error
            if not connection.in_transaction:
                raise apsw.AbortError("the transaction was rolled back") from error
            if savepoints:
                connection.execute("ROLLBACK TO job")
            elif connection.total_changes() != before:
                return False
        if savepoints:
            connection.execute("RELEASE job")
    return True


def _finish(jobs: list[_Job]) -> None:
    """Call back, then tell the ones who wait, with one wake-up for each event loop."""
    for job in jobs:
        if job.error is None and job.after is not None:
            try:
                job.after()
            except BaseException as error:  # the others are durable and must hear it
                job.error = error
    by_loop: dict[asyncio.AbstractEventLoop, list[_Job]] = {}
    for job in jobs:
        by_loop.setdefault(job.loop, []).append(job)
    for loop, settled in by_loop.items():
        with contextlib.suppress(RuntimeError):  # the loop is closed, and so is everyone who waited on it
            loop.call_soon_threadsafe(_settle_here, settled)


def _settle_here(jobs: list[_Job]) -> None:
    for job in jobs:
        job.settle()
