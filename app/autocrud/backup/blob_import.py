"""Uploads the blobs of an archive to the storage of a model, before the resources that refer to them."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import aclosing

from ..errors import ConfigError
from ..resource_manager.basic import BlobRow, IStorage
from ..resource_manager.contract.blobs import Blobs, BlobStorage
from ..resource_manager.contract.import_journal import BlobRestoring
from ..resource_manager.contract.loading import Loader
from .archive_reader import VerifiedArchive
from .errors import BadArchive
from .pieces import prefetched

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
    while (item := await asyncio.to_thread(next, items, None)) is not None:
        row, chunks = item
        if not await asyncio.to_thread(archive.notes.is_referred_to, model, row.key, absent):
            continue
        found = await _uploaded(blobs, row) if again else None
        stored = found or await _upload(blobs, row, chunks, loader)
        await asyncio.to_thread(archive.notes.set_blob, model, row.key, stored.key)
        count += 1
    return count


async def _uploaded(blobs: Blobs, row: BlobRow) -> BlobRow | None:
    rows = await blobs.rows([row.sha256])
    return next((one for one in rows if one.owner == row.owner and one.size == row.size), None)


async def _upload(blobs: Blobs, row: BlobRow, chunks: Iterator[bytes], loader: Loader | None) -> BlobRow:
    if isinstance(blobs, BlobRestoring):
        context = blobs.restore(row.owner, max_size=row.size, row=loader is None)
    elif loader is None:
        context = blobs.receive(UPLOADER, max_size=row.size)
    else:
        raise ConfigError("the files of this storage cannot be loaded in one step")
    async with context as upload:
        async with aclosing(prefetched(chunks)) as prepared:
            async for chunk in prepared:
                await upload.write(chunk)
        stored = await upload.finish()
    if stored.sha256 != row.sha256:
        raise BadArchive("the archive was changed while it was read")
    if loader is not None:
        await loader.add_blobs([stored])
    return stored
