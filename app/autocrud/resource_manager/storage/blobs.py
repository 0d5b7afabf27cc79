"""The blobs of one model: the rows of a MetaStore together with the content in a BlobStore.

This module keeps the invariants of `contract.blobs`, which also explains them:

- F1: `finish` stores the content before it adds the row, and `release` and `BlobSweep` remove the row before the
  content.
- F2: `finish` takes the epoch before it stores the content. If the row is refused, the content is stored again.
- F3: each attempt to add a row has a key of its own. After an attempt of unknown outcome, the row is looked for, and
  if it is not there, the content is stored again under another key. If the same row was added again instead, a sweep
  could have removed the first one meanwhile, and then would remove the content of the second one.
- F4: BlobSweep looks at all content, whether it has a row or not.
- P1 of `contract.snapshots`: BlobSweep asks for pins after it has removed rows, and before it removes content.
"""

from __future__ import annotations

import logging
import time
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import asynccontextmanager

from typing_extensions import override
from uuid_utils import uuid7

from ...errors import (
    BlobQuotaExceeded,
    BlobTooLarge,
    ConfigError,
    CrudError,
    OutcomeUnknown,
    StaleGeneration,
    StoreUnavailable,
)
from ..basic import BlobRow, BlobStore, BlobWriter, owner_of
from ..contract.blobs import BlobRows, Blobs, BlobUse, Upload
from ..contract.direct import without_reservations
from ..contract.import_journal import BlobRestoring
from ..contract.snapshots import Pinning
from ..contract.store_errors import WriteTimedOut

log = logging.getLogger("crudstack.blobs")

KEEP_UPLOADS_S = 24 * 3600.0
"""Seconds for which an upload is kept that no record names, by the dates of the BlobStore."""
MAX_ATTEMPTS = 8
"""How often an upload is stored again, because sweeps were faster."""
PAGE = 1000
"""How many blobs are looked up and removed at a time."""


class StoredBlobs(Blobs, BlobRestoring):
    """The blobs of one model.

    rows   the MetaStore, or the ResourceStore whose records are the commit
    store  keeps the content
    """

    def __init__(self, rows: BlobRows, store: BlobStore) -> None:
        self._rows, self._store = rows, store
        self._unreleased: dict[str, None] = {}

    @override
    @asynccontextmanager
    async def receive(self, caller: str, *, max_size: int, quota: int | None = None) -> AsyncIterator[Upload]:
        left = None if quota is None else quota - (await self._rows.blob_usage()).size
        async with self._store.receive() as writer:
            yield _Upload(self._rows, self._store, writer, owner_of(caller), max_size, quota, left)

    @override
    @asynccontextmanager
    async def restore(self, owner: str, *, max_size: int, row: bool = True) -> AsyncIterator[Upload]:
        kind = _Upload if row else _Content
        async with self._store.receive() as writer:
            yield kind(self._rows, self._store, writer, owner, max_size, None, None)

    @override
    async def discard(self, keys: Sequence[str]) -> None:
        await self._store.delete(keys)

    @override
    async def rows(self, sha256s: Sequence[str]) -> list[BlobRow]:
        return without_reservations(await self._rows.blobs(sha256s))

    @override
    async def uses(self, key: str, limit: int = 100) -> list[BlobUse]:
        return await self._rows.blob_uses(key, limit)

    @override
    def read(self, key: str, start: int = 0, end: int | None = None) -> AsyncIterator[bytes]:
        return self._store.read(key, start, end)

    @override
    async def release(self, keys: Sequence[str]) -> None:
        ordered = list(dict.fromkeys(keys))
        for at in range(0, len(ordered), PAGE):
            removable = await self._rows.remove_blobs(ordered[at : at + PAGE])
            if removable:
                await self._store.delete(removable)

    async def release_purged(self, keys: Iterable[str]) -> None:
        """Release the blobs of purged resources. If that fails, it is logged, and `release_rest` tries it again."""
        self._unreleased.update(dict.fromkeys(keys))
        try:
            await self.release_rest()
        except CrudError as error:
            log.warning("%d blobs of purged resources stay for now: %s", len(self._unreleased), error)

    async def release_rest(self) -> None:
        """Release the blobs of purged resources whose release failed. Raises StoreUnavailable."""
        if keys := sorted(self._unreleased):
            try:
                await self.release(keys)
            except OutcomeUnknown as error:  # a removal does no harm if it is repeated
                raise StoreUnavailable("files of purged resources may still be there; try again") from error
            for key in keys:
                self._unreleased.pop(key, None)


class _Upload(Upload):
    """An upload.

    left  how many bytes the quota had left when the upload began; None: no quota
    """

    def __init__(
        self,
        rows: BlobRows,
        store: BlobStore,
        writer: BlobWriter,
        owner: str,
        max_size: int,
        quota: int | None,
        left: int | None,
    ) -> None:
        self.size = 0
        self._rows, self._store, self._writer = rows, store, writer
        self._owner, self._max_size, self._quota, self._left = owner, max_size, quota, left

    @override
    async def write(self, chunk: bytes) -> None:
        size = self.size + len(chunk)
        if size > self._max_size:
            raise BlobTooLarge(f"the file has more than {self._max_size} bytes, which is the limit; nothing was stored")
        if self._left is not None and size > self._left:  # adding the row would fail
            raise BlobQuotaExceeded(
                f"the file has at least {size} bytes, and the quota of {self._quota} bytes for all files of this model"
                f" has {max(0, self._left)} bytes left: remove files that are not needed, or ask for a larger quota"
            )
        await self._writer.write(chunk)
        self.size = size

    @override
    async def finish(self) -> BlobRow:
        unknown = False
        for _ in range(MAX_ATTEMPTS):
            epoch = await self._rows.blob_epoch()
            key = await self._writer.store(f"{epoch}-{uuid7().hex}")
            row = BlobRow(key=key, size=self.size, owner=self._owner)
            try:
                await self._rows.add_blob(row, quota=self._quota)
                return row
            except StaleGeneration:
                await self._remove(key)
            except OutcomeUnknown as error:  # the row may exist, or may be added later, so its content stays
                if await self._was_added(row, error):
                    return row
                if unknown:
                    raise
                unknown = True
            except WriteTimedOut:
                raise  # there is no time left to remove the content
            except CrudError:
                await self._remove(key)
                raise
        raise StoreUnavailable("the file was swept faster than it could be stored; nothing was changed, try again")

    async def _was_added(self, row: BlobRow, error: OutcomeUnknown) -> bool:
        try:
            return row in await self._rows.blobs([row.sha256])
        except CrudError:
            raise error from None

    async def _remove(self, key: str) -> None:
        """Remove content whose row was refused for good. If that fails, the sweep removes it."""
        try:
            await self._store.delete([key])
        except CrudError as error:
            log.warning("the content of an upload stays until the next sweep: %s", error)


class _Content(_Upload):
    """An upload whose row another step adds, while a pin keeps the content."""

    @override
    async def finish(self) -> BlobRow:
        key = await self._writer.store(f"{await self._rows.blob_epoch()}-{uuid7().hex}")
        return BlobRow(key=key, size=self.size, owner=self._owner)


class BlobSweep:
    """Removes the blobs that no record names and that are older than the time for which uploads are kept.

    Each call continues where the last one stopped.

    pinning  the MetaStore, if it keeps pins
    keep_s   how old a blob must be, in seconds by the dates of the BlobStore. Raises ConfigError if it is negative
    """

    def __init__(self, rows: BlobRows, store: BlobStore, pinning: Pinning | None, keep_s: float) -> None:
        if not keep_s >= 0:
            raise ConfigError(f"keep_uploads_s is {keep_s}, expected seconds from 0")
        self._rows, self._store, self._pinning, self._keep_s = rows, store, pinning, keep_s
        self._after = ""  # the last key that this sweep looked at; empty between two sweeps

    async def run(self, deadline: float) -> None:
        """Sweep until the deadline, in seconds of `time.monotonic`."""
        while time.monotonic() < deadline:
            keys = await self._store.older_than(self._keep_s, self._after, PAGE)
            # While there is a pin, rows stay too: an import may need them for longer than uploads are kept.
            if keys and (await self._are_pinned() or not await self._remove(keys)):
                return
            self._after = keys[-1] if len(keys) == PAGE else ""
            if not self._after:
                return

    async def _remove(self, keys: Sequence[str]) -> bool:
        """Remove those of these blobs that no record names. Return False if a pin keeps their content."""
        removable = await self._rows.remove_blobs(keys)
        if removable:
            if await self._are_pinned():  # P1: asked again, because pins that were added since count too
                return False
            await self._store.delete(removable)
        return True

    async def _are_pinned(self) -> bool:
        return self._pinning is not None and await self._pinning.has_pins()
