"""The directory of a local copy: one that several processes share, or a private one of this process."""

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
from .copy_files import remove_leftovers

T = TypeVar("T")

ATTEMPTS_TO_FREE_SPACE = 3
"""How often space is freed for one piece of work. If other programs fill the disk, each attempt may free a little."""

UNUSED_S = 60.0
"""On a full disk, a file of a shared directory is removed if it is not current and was not modified for this long. A
file that is being built is modified all the time."""

log = logging.getLogger("crudstack.s3sqlite")


class CopyDirectory:
    """`shared`: the directory that processes share; None for a private one, which is removed when the process ends."""

    def __init__(self, shared: Path | None) -> None:
        self.shared = shared
        self._private: ProcessDirectory | None = None

    def path(self) -> Path:
        """Return the directory in use, and create it if it is missing. Blocks. Raises OSError."""
        if self.shared is not None and self._private is None:
            self.shared.mkdir(parents=True, exist_ok=True)
            return self.shared
        return self.use_private()

    def use_private(self) -> Path:
        """Use a directory of this process from now on, and return it. Blocks. Raises OSError."""
        if self._private is None:
            self._private = ProcessDirectory()
        return self._private.path

    def remove_private(self) -> None:
        """Remove the private directory, if there is one. Blocks."""
        private, self._private = self._private, None
        if private is not None:
            private.remove()

    @contextlib.contextmanager
    def translated_errors(self) -> Iterator[None]:
        """Raise errors of SQLite and of the operating system as CrudErrors."""
        try:
            yield
        except apsw.Error as error:
            raise translated(error, self._on_disk()) from error
        except OSError as error:
            if is_full(error, self._on_disk()):
                raise full(error, self._on_disk()) from error
            log.error("%s: %s", self._on_disk(), error)
            raise StoreUnavailable("the directory of the local copy cannot be used") from error

    async def retry_with_space(self, work: Callable[[], Awaitable[T]]) -> T:
        """Do the work. If the disk is full, free space and repeat the work, up to ATTEMPTS_TO_FREE_SPACE times.

        Raises DiskFull if no space can be freed.
        """
        for _ in range(ATTEMPTS_TO_FREE_SPACE):
            try:
                return await work()
            except DiskFull:
                if not await asyncio.get_running_loop().run_in_executor(None, self._free_space):
                    raise
        return await work()

    def _free_space(self) -> bool:
        shared = self.shared
        more = None if shared is None else lambda: remove_leftovers(shared, UNUSED_S)
        return make_room(self._on_disk(), more)

    def _on_disk(self) -> Path:
        """Return the directory, or an existing one on the same disk if it is not created yet."""
        return self._private.path if self._private is not None else self.shared or Path(tempfile.gettempdir())
