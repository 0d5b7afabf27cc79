"""Group commit of the writes to a FileDatabase, and the withdrawal of writes that wait too long.

It maintains the invariants W1 to W5 of `database`. docs/design/disk-commits.md explains them.
"""

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
"""The largest number of writes that share one commit."""

WRITE_TIMEOUT_S = 10.0
"""Seconds that a write waits for its turn before it is withdrawn."""


class Database(Protocol):
    """The part of `database.FileDatabase` that the committer uses."""

    @property
    def path(self) -> Path:
        """Return the path of the file."""

    @property
    def committer(self) -> FileCommitter:
        """Return the committer that writes to this database."""

    def writing(self) -> AbstractContextManager[apsw.Connection]:
        """Hold the file lock, and return the writing connection."""

    def discard_writer(self) -> None:
        """Close the writing connection. The next write opens another one."""


class Stage(NamedTuple):
    """One part of a write: runs `work` under the file lock of `database`, in a transaction.

    without_transaction  whether to run `work` outside of a transaction, as a checkpoint needs it
    """

    database: Database
    work: Work[Any]
    without_transaction: bool = False


class _Job:
    """A write that waits for its turn: stages, each durable before the next begins.

    The committer or the caller's timer takes the ticket, never both (W3).
    """

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
        """Return whether the committer must run this stage. The last stage takes the ticket.

        The committer calls this under the lock of the stage.
        """
        return self.claim() if number == len(self.stages) - 1 else bool(self.ticket)

    def claim(self) -> bool:
        """Take the ticket for the committer, and return whether the committer has it."""
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
        if self.future.done():  # the caller was cancelled
            return
        if self.error is None:
            self.future.set_result(self.results)
        else:
            self.future.set_exception(self.error)


Run = Callable[[apsw.Connection, list[_Job], int], bool]
"""Runs a stage of jobs. Returns False if the connection must not be used again."""


class FileCommitter:
    """The thread that writes to a database. Writes that wait at the same time share a commit."""

    def __init__(self) -> None:
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._state = threading.Lock()  # guards the two above

    async def write(self, stages: Sequence[Stage], after: Callable[[], None] | None = None) -> list[Any]:
        """Run the stages in order, and return the result of each. All are durable on return, and none runs twice.

        If a stage fails, the stages before it stay committed. `after` runs in the thread of the committer, before the
        caller gets the result. A write whose caller is cancelled may still be carried out.

        Raises WriteTimedOut if the write did not get its turn within WRITE_TIMEOUT_S. Then the last stage never runs,
        but earlier stages may have run.
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
        """Run the waiting writes, then end the thread. The next write starts another one.

        Blocks for WRITE_TIMEOUT_S at most. Returns False if the thread is blocked; it ends once it is unblocked.
        """
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
                # Checked only now: while another process holds the lock, a write may still be withdrawn.
                if not run(connection, [job for job in group if job.may_run(number)], number):
                    database.discard_writer()
        except BaseException as error:  # the thread must live, and no caller may wait for ever
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
        except CrudError as error:
            job.error = error
    return all(job.error is None for job in jobs)


def _run_in_transaction(connection: apsw.Connection, jobs: list[_Job], number: int) -> bool:
    """Run a stage of jobs in one transaction. Each job happens completely or not at all."""
    if not jobs:
        return True
    try:
        connection.execute("BEGIN IMMEDIATE")
        if not _attempt(connection, jobs, number, savepoints=False):
            # A job failed half way. Savepoints undo only that job, but cost two statements for each job, so only now.
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
        failure = failed_commit(error, done[0].stages[number].database.path.parent if done else None)
        if connection.in_transaction:
            connection.execute("ROLLBACK")
        for job in done:
            job.error = failure
        return False
    return True


def failed_commit(error: apsw.Error, directory: Path | None) -> CrudError:
    """Return the error of the engine for a COMMIT that failed in a database in `directory`."""
    failure = translated(error, directory)
    if isinstance(error, apsw.FullError | apsw.BusyError):
        return failure
    # The log may contain the commit although its sync failed. The state after a restart cannot be known.
    return OutcomeUnknown("the disk failed during the commit; read before you try again")


def _attempt(connection: apsw.Connection, jobs: list[_Job], number: int, *, savepoints: bool) -> bool:
    """Run the jobs, and keep their results or errors.

    Returns False if a job without a savepoint failed after it changed something.
    """
    for job in jobs:
        del job.results[number:]
        job.error = None
        if savepoints:
            connection.execute("SAVEPOINT job")
        before = connection.total_changes()
        try:
            job.results.append(job.stages[number].work(connection))
        except apsw.FullError:
            raise  # no other write would fit either
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
    """Run the callbacks, then deliver the results, with one wake-up for each event loop."""
    for job in jobs:
        if job.error is None and job.after is not None:
            try:
                job.after()
            except BaseException as error:  # the other writes are durable, and their callers must get their results
                job.error = error
    by_loop: dict[asyncio.AbstractEventLoop, list[_Job]] = {}
    for job in jobs:
        by_loop.setdefault(job.loop, []).append(job)
    for loop, settled in by_loop.items():
        with contextlib.suppress(RuntimeError):  # the loop is closed, so no caller waits
            loop.call_soon_threadsafe(_deliver_all, settled)


def _deliver_all(jobs: list[_Job]) -> None:
    for job in jobs:
        job.deliver()
