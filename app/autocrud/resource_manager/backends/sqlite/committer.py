"""How writes to a FileDatabase share their commits, and how they are given up. W1 to W5 in `database` are what it keeps."""

from __future__ import annotations

import asyncio
import contextlib
import queue
import threading
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar

import apsw

from ....errors import CrudError, OutcomeUnknown
from ...contract.store_errors import WriteTimedOut
from .errors import translated

T = TypeVar("T")
Work = Callable[[apsw.Connection], T]

MAX_GROUP = 500
"""Writes that share one commit at most."""

WRITE_TIMEOUT_S = 10.0
"""How long a write waits for its turn before it is given up."""


class Database(Protocol):
    """What the committer needs of a database file; `database.FileDatabase` is the one."""

    @property
    def path(self) -> Path:
        """Return the path of the file."""

    @property
    def committer(self) -> FileCommitter:
        """Return the committer that writes to this database."""

    def writing(self) -> AbstractContextManager[apsw.Connection]:
        """Hold the file lock, and give the writing connection."""

    def discard_writer(self) -> None:
        """Close the writing connection: the next write opens another one."""


class Stage(NamedTuple):
    """A write as a part of a larger one: `work` in a transaction of `database`; `without_transaction`: under its lock, without one."""

    database: Database
    work: Work[Any]
    without_transaction: bool = False


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

    def may_run(self, number: int) -> bool:
        """For the committer, under the lock of this stage: whether it is to be done. The last one takes the ticket."""
        return self.claim() if number == len(self.stages) - 1 else bool(self.ticket)

    def claim(self) -> bool:
        """For the committer: whether the job is its own."""
        if not self.claimed:
            self.claimed = self._take_ticket()
        return self.claimed

    @property
    def is_complete(self) -> bool:
        return self.error is not None or len(self.results) == len(self.stages)

    def _take_ticket(self) -> bool:
        try:
            return self.ticket.pop()
        except IndexError:
            return False

    def withdraw(self) -> None:
        if self._take_ticket() and not self.future.done():
            self.future.set_exception(
                WriteTimedOut(f"the database was busy for {WRITE_TIMEOUT_S:g} s; nothing was changed, try again")
            )

    def deliver(self) -> None:
        if self.future.done():  # the one who asked is gone
            return
        if self.error is None:
            self.future.set_result(self.results)
        else:
            self.future.set_exception(self.error)


Run = Callable[[apsw.Connection, list[_Job], int], bool]
"""Run a stage of jobs. False: the connection must not be used again."""


class FileCommitter:
    """The one thread that writes to some databases. Writes that wait at the same time share their commits."""

    def __init__(self) -> None:
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._state = threading.Lock()  # guards the two above

    async def write(self, stages: Sequence[Stage], after: Callable[[], None] | None = None) -> list[Any]:
        """Do the stages in turn; what each returned. All are durable when this returns, and none is done twice.

        Where a stage fails, those before it stay done; where it is given up (WriteTimedOut), all but the last may be. `after` runs in the committer's
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
        timer = loop.call_later(WRITE_TIMEOUT_S, job.withdraw)
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
                groups: dict[tuple[Database, bool], list[_Job]] = {}
                for job in jobs:
                    if job.error is None and number < len(job.stages):
                        stage = job.stages[number]
                        groups.setdefault((stage.database, stage.without_transaction), []).append(job)
                for (database, without_transaction), group in groups.items():
                    self._commit(
                        database,
                        group,
                        number,
                        _run_without_transaction if without_transaction else _run_in_transaction,
                    )
                    _report([job for job in group if job.is_complete and job.claim()])

    def _commit(self, database: Database, group: list[_Job], number: int, run: Run) -> None:
        try:
            with database.writing() as connection:
                # Asked only now: while another process holds the lock, a write may still be given up.
                if not run(connection, [job for job in group if job.may_run(number)], number):
                    database.discard_writer()
        except BaseException as error:  # the thread must live, and nobody may wait for ever
            for job in group:
                if job.claim() and job.error is None:
                    job.error = error


def _run_without_transaction(connection: apsw.Connection, jobs: list[_Job], number: int) -> bool:
    """Run a stage of jobs, one after the other, without a transaction."""
    for job in jobs:
        try:
            job.results.append(job.stages[number].work(connection))
        except apsw.Error as error:
            job.error = _translated(error, job, number)
    return all(job.error is None for job in jobs)


def _run_in_transaction(connection: apsw.Connection, jobs: list[_Job], number: int) -> bool:
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
            job.error = _translated(error, job, number)
        return False
    done = [job for job in jobs if job.error is None]
    try:
        connection.execute("COMMIT" if done else "ROLLBACK")
    except apsw.Error as error:
        failure = _translated(error, done[0], number) if done else translated(error)
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
            job.error = _translated(error, job, number) if isinstance(error, apsw.Error) else error
            if not connection.in_transaction:
                raise apsw.AbortError("the transaction was rolled back") from error
            if savepoints:
                connection.execute("ROLLBACK TO job")
            elif connection.total_changes() != before:
                return False
        if savepoints:
            connection.execute("RELEASE job")
    return True


def _translated(error: apsw.Error, job: _Job, number: int) -> CrudError:
    return translated(error, job.stages[number].database.path.parent)


def _report(jobs: list[_Job]) -> None:
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
            loop.call_soon_threadsafe(_deliver_all, settled)


def _deliver_all(jobs: list[_Job]) -> None:
    for job in jobs:
        job.deliver()
