"""Uploads the blobs of an archive to the storage of a model, before the resources that refer to them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import aclosing
from functools import partial

from ..errors import ConfigError
from ..resource_manager.basic import BlobRow, IStorage
from ..resource_manager.contract.blobs import Blobs, BlobStorage, Upload
from ..resource_manager.contract.import_journal import BlobRestoring
from ..resource_manager.contract.loading import Loader
from .archive_reader import VerifiedArchive
from .errors import BadArchive
from .pieces import prefetched

UPLOADS_AT_ONCE, BYTES_AT_ONCE = 8, 64 * 1024 * 1024
"""How many blobs are stored at the same time, and how many bytes they have together. A larger blob is stored alone."""
UPLOADER = "import"
"""The owner of blobs in a custom storage that cannot keep the owners of the archive."""


def blobs_of(storage: IStorage, model: str) -> Blobs:
    """Return the blobs of a storage. Raises ConfigError if it keeps none."""
    blobs = storage.blobs if isinstance(storage, BlobStorage) else None
    if blobs is None:
        raise ConfigError(
            f"the archive holds files of model {model!r}, but its storage keeps none: give it a BlobStore"
        )
    return blobs


async def import_blobs(
    storage: IStorage, archive: VerifiedArchive, model: str, *, again: bool = False, loader: Loader | None = None
) -> int:
    """Upload the blobs to which resources refer, and return their number.

    again   whether an earlier attempt may have uploaded some. Those are used
    loader  gets the rows; None: they are committed
    """
    blobs, absent, count = blobs_of(storage, model), set(archive.model(model).absent), 0
    items = archive.blobs(model)
    running: dict[asyncio.Task[BlobRow], BlobRow] = {}

    async def note(*, most: int, most_bytes: int) -> None:
        """Add the uploads that have ended to what is stored.

        Waits until at most `most` uploads are left, with at most `most_bytes` bytes together.
        """
        while running:
            fits = len(running) <= most and sum(row.size for row in running.values()) <= most_bytes
            ready, _ = await asyncio.wait(running, timeout=0 if fits else None, return_when=asyncio.FIRST_COMPLETED)
            for task in ready:
                stored = await task
                running.pop(task)
                if loader is not None:
                    await loader.add_blobs([stored])
            if fits and not ready:
                return

    try:
        while (item := await asyncio.to_thread(next, items, None)) is not None:
            row, chunks = item
            if not await asyncio.to_thread(archive.notes.is_referred_to, model, row.key, absent):
                continue
            count += 1
            if again and (found := await _uploaded(blobs, row)) is not None:
                await asyncio.to_thread(archive.notes.set_blob, model, row.key, found.key)
                continue
            await note(most=UPLOADS_AT_ONCE - 1, most_bytes=max(0, BYTES_AT_ONCE - row.size))
            received = asyncio.get_running_loop().create_future()
            noted = partial(archive.notes.set_blob, model, row.key)
            upload = _upload(blobs, row, chunks, received, noted, committed=loader is None)
            running[asyncio.create_task(upload)] = row
            await received  # the next blob follows these bytes in the archive
        await note(most=0, most_bytes=0)
    finally:
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)
    return count


async def _uploaded(blobs: Blobs, row: BlobRow) -> BlobRow | None:
    rows = await blobs.rows([row.sha256])
    return next((one for one in rows if one.owner == row.owner and one.size == row.size), None)


async def _upload(
    blobs: Blobs,
    row: BlobRow,
    chunks: Iterator[bytes],
    received: asyncio.Future[None],
    note: Callable[[str], None],
    *,
    committed: bool,
) -> BlobRow:
    """Upload a blob. `received` is done once its bytes are read from the archive, or if they cannot be used.

    `note` gets the key of each blob that was stored, also if the upload is cancelled meanwhile.
    """

    async def finish(upload: Upload) -> BlobRow:
        stored = await upload.finish()
        await asyncio.to_thread(note, stored.key)
        return stored

    try:
        if isinstance(blobs, BlobRestoring):
            context = blobs.restore(row.owner, max_size=row.size, row=committed)
        elif committed:
            context = blobs.receive(UPLOADER, max_size=row.size)
        else:
            raise ConfigError("the files of this storage cannot be loaded in one step")
        async with context as upload:
            async with aclosing(prefetched(chunks)) as prepared:
                async for chunk in prepared:
                    await upload.write(chunk)
            received.set_result(None)
            finished = asyncio.ensure_future(finish(upload))
            try:
                stored = await asyncio.shield(finished)
            except asyncio.CancelledError:
                await asyncio.gather(finished, return_exceptions=True)  # a thread would go on
                raise
    finally:
        if not received.done():
            received.set_result(None)
    if stored.sha256 != row.sha256:
        raise BadArchive("the archive was changed while it was read")
    return stored
