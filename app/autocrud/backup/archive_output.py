"""The file of an archive that is being written: entries, compression and I/O, in a thread of its own."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO

from ..errors import InvalidData, StoreUnavailable
from ..resource_manager.runtime.disk_space import full, is_full
from ..resource_manager.runtime.partial import Partial
from .compression import Compression, compressor
from .tar import BLOCK, encode_header, padding

COMPRESS_AT_ONCE = 1024 * 1024


class EntryDigest:
    """The name of an entry, its size in bytes, and the SHA-256 of its content."""

    def __init__(self, name: str, size: int) -> None:
        self.name, self.size, self.hash = name, size, hashlib.sha256()


class ArchiveOutput:
    """Writes entries to a file. At most one piece of work runs while the caller prepares the next one.

    target       the path of the archive, or an open binary file
    compression  None: that of the name of the path, and gzip for a file
    time         the time of all entries, in seconds since 1970
    replace      whether an existing file is replaced
    """

    def __init__(
        self, target: str | Path | BinaryIO, compression: Compression | None, time: int, *, replace: bool = True
    ) -> None:
        self._path = Path(target) if isinstance(target, str | Path) else None
        if compression is None:
            compression = Compression.gzip if self._path is None else Compression.of_name(self._path.name)
        self._given = None if isinstance(target, str | Path) else target
        self._compressor, self._time = compressor(compression), time
        self._replace = replace
        self._partial: Partial | None = None
        self._file: BinaryIO | None = None
        self._hash, self._size = hashlib.sha256(), 0
        self._dense = False
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="crudstack-archive")
        self._running: asyncio.Future[None] | None = None

    async def open(self) -> None:
        """Create the file under a temporary name, beside the path. Raises InvalidData if it cannot be created."""
        await self._run(self._open)
        await self.wait()

    def _open(self) -> None:
        if self._path is None:
            self._file = self._given
            return
        try:
            self._partial = Partial(self._path)
        except OSError as error:
            raise InvalidData(f"the archive cannot be written to {self._path.parent}: {error.strerror}") from None
        self._file = os.fdopen(self._partial.handle, "wb", closefd=False)

    async def restart(self, *, dense: bool = False) -> None:
        """Begin a new member, so that a reader can begin here. `dense`: see `Compressor.restart`."""
        self._dense = dense
        await self._run(lambda: self._put(self._compressor.restart(dense=dense)))

    async def entry(self, name: str, pieces: Sequence[bytes]) -> EntryDigest:
        """Write an entry. The digest is complete after `wait`."""
        written = EntryDigest(name, sum(map(len, pieces)))
        if self._dense:
            await self.restart()

        def write() -> None:
            self._compress(encode_header(name, written.size, self._time))
            for content in joined(pieces):
                written.hash.update(content)
                self._compress(content)
            self._compress(bytes(padding(written.size)))

        await self._run(write)
        return written

    async def begin(self, name: str, size: int, *, dense: bool) -> None:
        """Begin an entry whose content follows."""
        if dense != self._dense:
            await self.restart(dense=dense)
        header = encode_header(name, size, self._time)
        await self._run(lambda: self._compress(header))

    async def write(self, content: bytes) -> None:
        """Write a part of the content of the entry."""
        await self._run(lambda: self._compress(content))

    async def end(self, size: int) -> None:
        """End the entry, whose content had this size."""
        await self._run(lambda: self._compress(bytes(padding(size))))

    async def finish(self) -> tuple[str, int]:
        """End the archive, and give the file its name. Return the SHA-256 in hex, and the size."""
        await self._run(self._finish)
        await self.wait()
        return self._hash.hexdigest(), self._size

    def _finish(self) -> None:
        self._compress(bytes(2 * BLOCK))
        self._put(self._compressor.finish())
        assert self._file is not None, "`open` comes first"
        self._file.flush()
        if self._path is None or self._partial is None:
            return
        os.fsync(self._file.fileno())
        try:
            self._partial.publish(replace=self._replace)
        except FileExistsError:
            raise InvalidData(f"{self._path} was made by another program meanwhile, and is kept") from None

    async def discard(self) -> None:
        """Remove the file, unless it has its name. A file that was given stays open."""
        running, self._running = self._running, None
        if running is not None:
            await asyncio.wait([running])
        await asyncio.get_running_loop().run_in_executor(self._thread, self._discard)
        self._thread.shutdown(wait=False)

    def _discard(self) -> None:
        if self._file is not None and self._file is not self._given:
            with contextlib.suppress(OSError):  # the disk may be full
                self._file.close()
        if self._partial is not None:
            self._partial.discard()
            self._partial = None

    def _compress(self, content: bytes) -> None:
        for start in range(0, len(content), COMPRESS_AT_ONCE):
            self._put(self._compressor.compress(content[start : start + COMPRESS_AT_ONCE]))

    def _put(self, compressed: bytes) -> None:
        if compressed:
            assert self._file is not None, "`open` comes first"
            self._file.write(compressed)
            self._hash.update(compressed)
            self._size += len(compressed)

    async def _run(self, work: Callable[[], None]) -> None:
        """Do the work in the thread, once the work before has ended. Raises the error of the work before."""
        await self.wait()
        self._running = asyncio.get_running_loop().run_in_executor(self._thread, work)

    async def wait(self) -> None:
        """Wait until everything that was given is written. Raises DiskFull and StoreUnavailable."""
        running = self._running
        if running is None:
            return
        await asyncio.wait([running])  # the work goes on if the caller is cancelled, and `discard` waits for it
        self._running = None
        try:
            running.result()
        except OSError as error:
            directory = Path() if self._path is None else self._path.parent
            if is_full(error, directory):
                raise full(error, directory) from error
            raise StoreUnavailable(f"the archive cannot be written: {error.strerror}") from error


def joined(pieces: Sequence[bytes]) -> Sequence[bytes]:
    """Return the same bytes in fewer pieces, of about COMPRESS_AT_ONCE bytes."""
    found: list[bytes] = []
    batch: list[bytes] = []
    size = 0
    for piece in pieces:
        batch.append(piece)
        size += len(piece)
        if size >= COMPRESS_AT_ONCE:
            found.append(b"".join(batch))
            batch, size = [], 0
    return [*found, b"".join(batch)] if batch else found
