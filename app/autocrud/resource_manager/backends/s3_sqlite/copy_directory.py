"""The directory that a local copy lies in: one that processes share, or one of this process."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import tempfile
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import TypeVar

import apsw

from ....errors import StoreUnavailable
from ...runtime.disk_space import DiskFull, full, is_full, make_room
from ...runtime.temporary import ProcessDirectory
from ..sqlite.errors import translated
from .local_copy import remove_leftovers

T = TypeVar("T")

ROUNDS = 3
"""How often room is made for one piece of work. On a disk that others fill, each round may find a little."""

UNUSED_S = 60.0
"""On a full disk, a file of a shared directory that nobody has written to for so long is removed. A file in the making
is written to all the time."""

log = logging.getLogger("crudstack.s3sqlite")


class CopyDirectory:
    """`given`: the shared directory; None for one of this process, which is gone with it."""

    def __init__(self, given: Path | None) -> None:
        self.given = given
        self._own: ProcessDirectory | None = None

    def made(self) -> Path:
        """Return the directory; it is made if it is not there. Blocks. Raises OSError."""
        if self.given is not None and self._own is None:
            self.given.mkdir(parents=True, exist_ok=True)
            return self.given
        return self.own()

    def own(self) -> Path:
        """Return the directory of this process, which `made` returns from then on too. Blocks. Raises OSError."""
        if self._own is None:
            self._own = ProcessDirectory()
        return self._own.path

    def remove_own(self) -> None:
        own, self._own = self._own, None
        if own is not None:
            own.remove()

    @contextlib.contextmanager
    def errors(self) -> Iterator[None]:
        """Raise errors of SQLite and of the system as CrudErrors."""
        try:
            yield
        except apsw.Error as error:
            raise translated(error, self._where()) from error
        except OSError as error:
            if is_full(error, self._where()):
                raise full(error, self._where()) from error
            log.error("%s: %s", self._where(), error)
            raise StoreUnavailable("the directory of the local copy cannot be used") from error

    async def with_room(self, work: Callable[[], Awaitable[T]]) -> T:
        """Do the work. If the disk is full, make room on it and do the work again, at most ROUNDS times."""
        for _ in range(ROUNDS):
            try:
                return await work()
            except DiskFull:
                if not await asyncio.get_running_loop().run_in_executor(None, self._make_room):
                    raise
        return await work()

    def _make_room(self) -> bool:
        given = self.given
        more = None if given is None else lambda: remove_leftovers(given, UNUSED_S)
        return make_room(self._where(), more)

    def _where(self) -> Path:
        """Return the directory, or a place on the disk that it is to be made on."""
        return self._own.path if self._own is not None else self.given or Path(tempfile.gettempdir())
