"""Sources of archives: files that can be read twice, and streams, which are first copied to a temporary file."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterable, AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import BinaryIO

from ..errors import InvalidData
from ..resource_manager.runtime.disk_space import full, is_full, space
from ..resource_manager.runtime.temporary import ProcessDirectory
from .errors import ArchiveTooLarge
from .plain_stream import CHUNK

Source = str | Path | BinaryIO | AsyncIterable[bytes]
"""A path, an open binary file such as stdin, or chunks of bytes such as the body of a request."""


@asynccontextmanager
async def readable_twice(source: Source, max_bytes: int | None) -> AsyncIterator[Path]:
    """Give the path of a regular file with the bytes of a source. A stream is copied to a temporary file.

    `max_bytes` is the largest size of the copy; None: the free space of its disk. Raises ArchiveTooLarge, InvalidData
    if the source cannot be read, and StoreUnavailable if the disk is full.
    """
    if isinstance(source, str | Path) and not await asyncio.to_thread(Path(source).is_fifo):
        yield Path(source)
        return
    directory = await asyncio.to_thread(ProcessDirectory)
    try:
        path = directory.path / "archive"
        free = space(directory.path).free
        await _copy(source, path, free if max_bytes is None else min(max_bytes, free))
        yield path
    finally:
        await asyncio.to_thread(directory.remove)


async def _copy(source: Source, path: Path, most: int) -> None:
    size = 0
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600), "wb") as file:
        async for chunk in _chunks(source):
            size += len(chunk)
            if size > most:
                raise ArchiveTooLarge(f"the archive has more than {most} bytes, which is what there is room for")
            try:
                await asyncio.to_thread(file.write, chunk)
            except OSError as error:
                if is_full(error, path.parent):
                    raise full(error, path.parent) from error
                raise


async def _chunks(source: Source) -> AsyncIterator[bytes]:
    if isinstance(source, str | Path):
        try:
            file: BinaryIO = await asyncio.to_thread(Path(source).open, "rb")
        except OSError as error:
            raise InvalidData(f"the archive cannot be opened: {error.strerror}") from None
        with file:
            async for chunk in _chunks(file):
                yield chunk
    elif isinstance(source, AsyncIterable):
        async for chunk in source:
            yield chunk
    else:
        while chunk := await asyncio.to_thread(source.read, CHUNK):
            yield chunk
