"""The local copy that a process uses now: open it, run work on it, and replace it if it is damaged or locked."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path
from typing import TypeVar

import apsw

from ....errors import StoreUnavailable
from ...runtime.disk_space import is_full
from ...runtime.threads import in_thread
from ..sqlite.errors import translated
from ..sqlite.tables import ResourceTables
from .copy_directory import CopyDirectory
from .copy_files import current_path, make_current, new_path, remove_database, remove_leftovers
from .fork_detector import ForkDetector
from .local_copy import NO_HEAD, CopyBusy, HeadState, LocalCopy

T = TypeVar("T")

log = logging.getLogger("crudstack.s3sqlite")

DAMAGED_FILE = (apsw.CorruptError, apsw.NotADBError, apsw.CantOpenError, apsw.SQLError)
"""The errors of SQLite if a file is damaged, or if a part of it is missing."""


async def in_executor(work: Callable[[], T]) -> T:
    """Run blocking work in a thread of the event loop's default pool."""
    return await asyncio.get_running_loop().run_in_executor(None, work)


class CurrentCopy:
    """Holds the local copy in use, which changes when it is rebuilt.

    Args:
        tables: The tables of the model.
        directory: The shared directory of the copy.
        forks: Refuses every use of the copy once history has forked.
        refill: Brings the copy up to HEAD. Called after the copy was replaced by an empty one.
    """

    def __init__(
        self,
        tables: ResourceTables,
        directory: CopyDirectory,
        forks: ForkDetector,
        refill: Callable[[], Awaitable[None]],
    ) -> None:
        self.directory = directory
        self._tables, self._forks, self._refill = tables, forks, refill
        self._mutex = threading.Lock()
        self._copy: LocalCopy | None = None

    async def open(self) -> HeadState:
        """Open the copy of the directory, or create an empty one. Return its state; NO_HEAD if it is new.

        Does nothing if the copy is open. Raises HistoryForked if a fork is recorded in the directory.
        """
        state = await self.directory.retry_with_space(lambda: in_executor(self._open))
        if self.directory.shared is not None:
            await in_executor(lambda: remove_leftovers(self.directory.path()))
        return state

    async def close(self) -> None:
        """Close the copy, and remove it if it is private."""
        copy, self._copy = self._copy, None
        if copy is not None:
            await in_executor(copy.close)
        await in_executor(self.directory.remove_private)

    def get(self) -> LocalCopy:
        """Return the copy. Raises HistoryForked if history has forked, and StoreUnavailable if it is not open."""
        self._forks.raise_if_forked()
        if self._copy is None:
            raise StoreUnavailable("the store is not open")
        return self._copy

    def _open(self) -> HeadState:
        with self._mutex, self.directory.translated_errors():
            if self._copy is not None:
                return NO_HEAD
            try:
                self._forks.raise_if_recorded()
                path = current_path(self.directory.path())
                if path is not None:
                    try:
                        self._copy = LocalCopy(path, self._tables)
                        return self._copy.state()
                    except apsw.Error as error:
                        if is_full(error, path.parent):
                            raise
                        log.warning("%s cannot be used and is rebuilt: %s", path, error)
                self._switch_to(self._empty_copy())
            except CopyBusy:
                self._use_private()
            return NO_HEAD

    # Replacing

    async def replace_damaged(self, copy: LocalCopy, error: Exception) -> None:
        """Use an empty copy instead of a damaged one, unless another thread has replaced it."""
        log.warning("%s is damaged and is rebuilt: %s", copy.path, error)
        await in_executor(lambda: self._replace(copy))

    async def use_private(self) -> None:
        """Use an empty copy in a private directory, because another process holds the lock of the shared one."""
        await in_executor(self._use_private_safely)

    def use_instead(self, built: LocalCopy, old: LocalCopy) -> None:
        """Use the copy `built` instead of `old`. If `old` is no longer in use, remove `built`. Blocks."""
        with self._mutex:
            if self._copy is old:
                self._switch_to(built)
            else:
                built.close()
                built.remove()

    def is_current(self, copy: LocalCopy) -> bool:
        """Return whether this copy is in use."""
        return self._copy is copy

    def _replace(self, lost: LocalCopy) -> None:
        with self._mutex, self.directory.translated_errors():
            if self._copy is lost:
                try:
                    self._switch_to(self._empty_copy())
                except CopyBusy:
                    self._use_private()

    def _switch_to(self, copy: LocalCopy) -> None:
        """Use another file from now on. Reads of the old one can finish."""
        try:
            make_current(copy.path)
        except OSError:
            copy.close()
            copy.remove()
            raise
        old, self._copy = self._copy, copy
        if old is not None:
            old.remove()

    def _use_private_safely(self) -> None:
        with self._mutex, self.directory.translated_errors():
            self._use_private()

    def _use_private(self) -> None:
        log.warning("%s: another process holds the lock; this process uses a private copy", self.directory.shared)
        self._copy = self._empty_copy(self.directory.use_private())

    def _empty_copy(self, directory: Path | None = None) -> LocalCopy:
        path = new_path(directory or self.directory.path())
        try:
            return LocalCopy(path, self._tables)
        except BaseException:
            remove_database(path)
            raise

    # Running work

    async def blocking(self, work: Callable[[LocalCopy], T]) -> T:
        """Run work on the copy in a thread, and return its result.

        If the copy is damaged or locked, replaces it, refills it and repeats the work. Raises StoreUnavailable if the
        second replacement does not help either.
        """
        return await self.directory.retry_with_space(lambda: self._on_copy(work, in_executor))

    async def read(self, work: Callable[[apsw.Connection], T], *, quick: bool = False) -> T:
        """Run a read on a connection of the copy.

        `quick` says that the read takes microseconds. Then it runs on the event loop if it need not wait for a lock,
        because a thread switch takes four times as long.
        """
        if quick:
            with contextlib.suppress(apsw.Error):  # the thread waits for the lock, or raises the error again
                return self.get().read_without_waiting(work)
        return await self.directory.retry_with_space(lambda: self._on_copy(lambda copy: copy.read(work), in_thread))

    async def _on_copy(self, work: Callable[[LocalCopy], T], run: Callable[[Callable[[], T]], Awaitable[T]]) -> T:
        for last in (False, False, True):
            copy = self.get()
            try:
                return await run(partial(work, copy))
            except CopyBusy:
                if last:
                    raise StoreUnavailable("the local copy is locked; nothing was changed") from None
                await self.use_private()
            except apsw.Error as error:
                if last or not isinstance(error, DAMAGED_FILE) or is_full(error, copy.path.parent):
                    raise translated(error, copy.path.parent) from error
                await self.replace_damaged(copy, error)
            await self._refill()
        raise AssertionError("unreachable")

    async def state(self) -> HeadState:
        """Return the HEAD that the copy is at. A damaged copy is replaced by an empty one, which is at NO_HEAD.

        Reads one row on the event loop. No writer blocks this read, and a thread switch would take ten times as long.
        """
        copy = self.get()
        try:
            return copy.state()
        except DAMAGED_FILE as error:
            await self.replace_damaged(copy, error)
            return self.get().state()
