"""BlobStores on this machine: in memory, and as files of one directory.

MemoryBlobStore()                    gone with the process
DiskBlobStore(rootdir="data/blobs")  one file per blob, shared by processes; local disks only
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import itertools
import logging
import os
import re
import secrets
import threading
import time
from collections.abc import AsyncIterator, Callable, Hashable, Iterator, Sequence
from contextlib import AbstractAsyncContextManager
from io import FileIO
from pathlib import Path
from typing import ClassVar, TypeVar

from typing_extensions import override

from ...errors import StoreUnavailable
from ..basic import BLOB_KEY, BlobStore, BlobWriter
from ..contract.directories import InDirectory
from ..runtime.files import make_directory, sync_directory
from .keys import key_of, missing, stop_of, too_short
from .spool import spooled

T = TypeVar("T")

log = logging.getLogger("crudstack.blobs")

CHUNK = 64 * 1024
"""Bytes that are read at a time: one piece of a download, because each client that reads slowly holds a chunk."""
ABANDONED_AFTER_S = 24 * 3600.0
"""Seconds without a write after which the file of an unfinished upload is removed."""
INCOMING = "incoming"
"""The directory of unfinished uploads, below that of the store."""
_PREFIX = re.compile("[0-9a-f]{2}")


class MemoryBlobStore(BlobStore):
    """Blobs in the memory of this process.

    clock  returns the present time in seconds, from any moment on
    """

    def __init__(self, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._blobs: dict[str, tuple[bytes, float]] = {}
        self._clock = clock

    @override
    @contextlib.asynccontextmanager
    async def receive(self) -> AsyncIterator[BlobWriter]:
        yield _MemoryWriter(self._put)

    def _put(self, key: str, content: bytes) -> None:
        self._blobs[key] = content, self._clock()

    @override
    async def read(self, key: str, start: int = 0, end: int | None = None) -> AsyncIterator[bytes]:
        if key not in self._blobs:
            raise missing(key)
        content, _ = self._blobs[key]
        stop = stop_of(key, len(content), start, end)
        for at in range(start, stop, CHUNK):
            yield content[at : min(at + CHUNK, stop)]

    @override
    async def delete(self, keys: Sequence[str]) -> None:
        for key in keys:
            self._blobs.pop(key, None)

    @override
    async def older_than(self, seconds: float, after: str = "", limit: int = 1000) -> list[str]:
        stored_by = self._clock() - seconds
        found = (key for key in sorted(self._blobs) if key > after and self._blobs[key][1] <= stored_by)
        return list(itertools.islice(found, limit))


class _MemoryWriter(BlobWriter):
    def __init__(self, put: Callable[[str, bytes], None]) -> None:
        self.size = 0
        self._chunks: list[bytes] = []
        self._hash = hashlib.sha256()
        self._put = put

    @property
    @override
    def sha256(self) -> str:
        return self._hash.hexdigest()

    @override
    async def write(self, chunk: bytes) -> None:
        self._chunks.append(chunk)
        self._hash.update(chunk)
        self.size += len(chunk)

    @override
    async def store(self, uid: str) -> str:
        key = key_of(self.sha256, uid)
        self._chunks = [b"".join(self._chunks)]
        self._put(key, self._chunks[0])
        return key


class DiskBlobStore(BlobStore, InDirectory):
    """Blobs as the files `rootdir/{first two digits of the hash}/{hash}/{uid}`. Several processes may share it.

    - *A file that has its name is complete.* An upload is written below `rootdir/incoming`, synced, and then renamed.
    - *A blob is durable once it is stored.* The directories are synced after the rename.
    - *No key leads out of the directory.* All keys are checked; see BLOB_KEY.
    """

    durable: ClassVar[bool] = True

    def __init__(self, rootdir: str | Path) -> None:
        self.rootdir = Path(rootdir)
        self._prepared = False

    @property
    @override
    def location_key(self) -> Hashable:
        return "blobs on disk", self.rootdir.absolute()

    @property
    @override
    def local_directory(self) -> Path:
        return self.rootdir

    @override
    def receive(self) -> AbstractAsyncContextManager[BlobWriter]:
        return spooled(self._new_file, lambda spool, key: spool.move(self._path(key)))

    def _path(self, key: str) -> Path:
        sha256, _, uid = key.partition("/")
        return self.rootdir / sha256[:2] / sha256 / uid

    def _new_file(self) -> Path:
        """Return the path for the file of an upload. Creates the directories."""
        incoming = self.rootdir / INCOMING
        make_directory(incoming)
        if not self._prepared:  # another process may have made the directory, and not synced it yet
            sync_directory(self.rootdir.parent)
            self._prepared = True
        return incoming / secrets.token_hex(16)

    @override
    async def read(self, key: str, start: int = 0, end: int | None = None) -> AsyncIterator[bytes]:
        if BLOB_KEY.fullmatch(key) is None:
            raise missing(key)
        try:
            file = await asyncio.to_thread(_OpenFile, self._path(key))
        except FileNotFoundError:
            raise missing(key) from None
        except OSError as error:
            raise _unavailable(error) from error
        try:
            at, stop = start, stop_of(key, file.size, start, end)
            while at < stop:
                chunk = await asyncio.to_thread(file.read, at, min(CHUNK, stop - at))
                if not chunk:
                    raise too_short(key, at, stop)
                at += len(chunk)
                yield chunk
        except OSError as error:
            raise _unavailable(error) from error
        finally:
            await asyncio.to_thread(file.close)

    @override
    async def delete(self, keys: Sequence[str]) -> None:
        await self._in_thread(lambda: self._delete([key for key in keys if BLOB_KEY.fullmatch(key)]))

    def _delete(self, keys: Sequence[str]) -> None:
        changed = set()
        for path in map(self._path, keys):
            with contextlib.suppress(FileNotFoundError):
                path.unlink()
                changed.add(path.parent)
            with contextlib.suppress(OSError):  # other uploads of the same content are still there
                path.parent.rmdir()
                changed.discard(path.parent)
                changed.add(path.parent.parent)
        for directory in changed:
            with contextlib.suppress(FileNotFoundError):
                sync_directory(directory)

    @override
    async def older_than(self, seconds: float, after: str = "", limit: int = 1000) -> list[str]:
        return await self._in_thread(lambda: list(itertools.islice(self._older_than(seconds, after), limit)))

    def _older_than(self, seconds: float, after: str) -> Iterator[str]:
        stored_by: float | None = None
        for prefix in _names(self.rootdir):
            if prefix < after[:2] or _PREFIX.fullmatch(prefix) is None:
                continue
            for sha256 in _names(self.rootdir / prefix):
                if sha256 < after[:64] or not sha256.startswith(prefix):
                    continue
                uids = _names(self.rootdir / prefix / sha256)
                if not uids:  # an upload was killed before its file had a name; one that goes on makes it again
                    with contextlib.suppress(OSError):
                        (self.rootdir / prefix / sha256).rmdir()
                for uid in uids:
                    key = f"{sha256}/{uid}"
                    if key <= after or BLOB_KEY.fullmatch(key) is None:
                        continue
                    if stored_by is None:
                        stored_by = self._now() - seconds
                    with contextlib.suppress(FileNotFoundError):
                        if self._path(key).stat().st_mtime <= stored_by:
                            yield key

    def _now(self) -> float:
        """Return the present time of the file system: the date of a new file."""
        path = self._new_file()
        try:
            path.touch()
            return path.stat().st_mtime
        finally:
            path.unlink(missing_ok=True)

    @override
    async def health(self) -> None:
        def check() -> None:
            if self.rootdir.exists() and not os.access(self.rootdir, os.R_OK | os.W_OK | os.X_OK):
                raise PermissionError(f"{self.rootdir}: the directory of blobs cannot be read and written")

        await self._in_thread(check)

    @override
    async def maintain(self, budget_s: float) -> None:
        """Remove the files of uploads that were abandoned, for example because their process was killed."""
        await self._in_thread(self._remove_abandoned)

    def _remove_abandoned(self) -> None:
        names = list(_names(self.rootdir / INCOMING))
        written_by = self._now() - ABANDONED_AFTER_S if names else 0.0
        for name in names:
            path = self.rootdir / INCOMING / name
            with contextlib.suppress(FileNotFoundError):
                if path.stat().st_mtime <= written_by:
                    path.unlink()

    async def _in_thread(self, work: Callable[[], T]) -> T:
        try:
            return await asyncio.to_thread(work)
        except OSError as error:
            raise _unavailable(error) from error


class _OpenFile:
    """A file that is read in threads. If the reader is cancelled, the file is closed after the read under way."""

    def __init__(self, path: Path) -> None:
        self._file = FileIO(path)
        self._mutex = threading.Lock()
        self.size = os.fstat(self._file.fileno()).st_size

    def read(self, start: int, size: int) -> bytes:
        """Return up to `size` bytes from `start`."""
        with self._mutex:
            return os.pread(self._file.fileno(), size, start)

    def close(self) -> None:
        """Close the file."""
        with self._mutex:
            self._file.close()


def _names(directory: Path) -> list[str]:
    """Return the names in a directory in order; none if it is not there."""
    try:
        return sorted(path.name for path in directory.iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return []


def _unavailable(error: OSError) -> StoreUnavailable:
    log.error("%s", error)
    return StoreUnavailable("the disk cannot be read or written; nothing was changed, try again")
