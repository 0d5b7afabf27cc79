"""The temporary file that receives an upload."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
import os
import shutil
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from io import FileIO
from pathlib import Path
from typing import TypeVar

from typing_extensions import override

from ...errors import StoreUnavailable
from ..basic import BlobWriter
from ..runtime.disk_space import full, is_full
from ..runtime.files import sync_directory
from ..runtime.threads import shielded
from .keys import key_of

T = TypeVar("T")

log = logging.getLogger("crudstack.blobs")

COLLECTED = 256 * 1024
"""Small chunks are collected up to this many bytes. So an upload that is smaller needs no thread and no file."""
ATTEMPTS = 20
"""How often a file is moved to a directory that other processes remove at once because it is empty."""


class Spool:
    """The bytes of one upload, with their number and their SHA-256: first in memory, then in a file.

    create  returns the path of a new file; called in a thread

    If the caller is cancelled, a step that is under way in a thread ends before the file is closed. Methods raise
    StoreUnavailable if the disk fails or is full. Then the upload is lost, and all later calls raise it too.
    """

    def __init__(self, create: Callable[[], Path]) -> None:
        self.size = 0
        self._create = create
        self._hash = hashlib.sha256()  # of the bytes in the file
        self._collected: list[bytes] = []
        self._collected_size = 0
        self._path: Path | None = None
        self._file: FileIO | None = None
        self._kept = False
        self._failed = False
        self._mutex = threading.Lock()  # guards the file

    @property
    def sha256(self) -> str:
        """Return the SHA-256 of all bytes so far, in hex."""
        digest = self._hash.copy()
        for chunk in self._collected:
            digest.update(chunk)
        return digest.hexdigest()

    @property
    def content(self) -> bytes | None:
        """Return all bytes, or None if there are so many that they are in a file."""
        return b"".join(self._collected) if self._path is None else None

    async def write(self, chunk: bytes) -> None:
        """Append bytes."""
        self._collected.append(chunk)
        self._collected_size += len(chunk)
        self.size += len(chunk)
        if self._collected_size >= COLLECTED:
            await self.flush()

    async def flush(self) -> Path:
        """Write all bytes to the file, and return its path."""
        chunks, self._collected, self._collected_size = self._collected, [], 0
        return await self._in_thread(lambda: self._append(chunks))

    async def move(self, target: Path) -> None:
        """Give the file, with all bytes and synced, a path on the same disk. Its date is that of this call.

        Creates the directory above if there is none. May be called again with another path. Then the file has both,
        even if the first one was removed meanwhile.
        """
        await self.flush()
        await self._in_thread(lambda: self._move(target))

    async def close(self) -> None:
        """Close the file, and remove it unless it was moved. Done even if the caller is cancelled again."""
        await shielded(asyncio.ensure_future(asyncio.to_thread(self._close)))

    async def _in_thread(self, work: Callable[[], T]) -> T:
        try:
            return await asyncio.to_thread(self._guarded, work)
        except OSError as error:
            directory = Path() if self._path is None else self._path.parent
            if is_full(error, directory):
                raise full(error, directory, self.size) from error
            log.error("%s: an upload cannot be written: %s", directory, error)
            raise StoreUnavailable("the disk cannot be written to; nothing was stored, try again") from error

    def _guarded(self, work: Callable[[], T]) -> T:
        with self._mutex:
            if self._failed:
                raise StoreUnavailable("the upload was interrupted by an error of the disk; nothing was stored")
            try:
                return work()
            except BaseException:
                self._failed = True
                raise

    def _append(self, chunks: list[bytes]) -> Path:
        if self._file is None or self._path is None:
            self._path = self._create()
            self._file = FileIO(os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644), "r+")
        for chunk in chunks:
            self._hash.update(chunk)
            rest = memoryview(chunk)
            while rest:
                rest = rest[self._file.write(rest) :]
        return self._path

    def _move(self, target: Path) -> None:
        assert self._file is not None
        assert self._path is not None
        os.utime(self._file.fileno())
        os.fsync(self._file.fileno())
        _place(self._path, target, self._copy, is_link=self._kept)
        self._path, self._kept = target, True

    def _copy(self) -> Path:
        """Return the path of a synced copy of the file, which has no name any more."""
        assert self._file is not None
        path = self._create()
        self._file.seek(0)
        with path.open("xb") as copy:
            shutil.copyfileobj(self._file, copy, COLLECTED)
            copy.flush()
            os.fsync(copy.fileno())
        return path

    def _close(self) -> None:
        with self._mutex:
            self._failed = True
            if self._file is not None:
                self._file.close()
            if self._path is not None and not self._kept:
                with contextlib.suppress(OSError):  # the directory may be gone
                    self._path.unlink()


def _place(path: Path, target: Path, copy: Callable[[], Path], *, is_link: bool) -> None:
    """Rename a file, or give it a second name. Then sync its directory and the two above it.

    The directories may be new, or another process may have made them and not synced them yet. So all are synced.

    copy  makes the file again, if it was removed, or if the file system has no links
    """
    for attempt in range(ATTEMPTS):
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            if is_link:
                target.hardlink_to(path)
            else:
                path.rename(target)
            break
        except FileNotFoundError:  # another process removed the directory, because it was empty, or the file
            if attempt == ATTEMPTS - 1:
                raise
            if not path.exists():
                path, is_link = copy(), False
        except OSError:
            if not is_link:
                raise
            path, is_link = copy(), False
    for directory in (target.parent, target.parent.parent, target.parent.parent.parent):
        with contextlib.suppress(FileNotFoundError):  # a sweep removed the blob already
            sync_directory(directory)


@contextlib.asynccontextmanager
async def spooled(
    create: Callable[[], Path], store: Callable[[Spool, str], Awaitable[None]]
) -> AsyncIterator[BlobWriter]:
    """Return a writer that receives an upload in a Spool.

    create  returns the path of a new file; called in a thread
    store   stores the bytes of the Spool under a key
    """
    spool = Spool(create)
    try:
        yield _SpoolWriter(spool, store)
    finally:
        await spool.close()


class _SpoolWriter(BlobWriter):
    def __init__(self, spool: Spool, store: Callable[[Spool, str], Awaitable[None]]) -> None:
        self.size = 0
        self._spool, self._store = spool, store

    @property
    @override
    def sha256(self) -> str:
        return self._spool.sha256

    @override
    async def write(self, chunk: bytes) -> None:
        await self._spool.write(chunk)
        self.size = self._spool.size

    @override
    async def store(self, uid: str) -> str:
        key = key_of(self.sha256, uid)
        await self._store(self._spool, key)
        return key
