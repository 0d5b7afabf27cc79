"""Fills an empty model in one step: its bodies and the content of its blobs are stored first, which nothing names."""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import aclosing
from typing import NamedTuple

from ..resource_manager.basic import IStorage, RevisionInfo, StoredKey
from ..resource_manager.contract.import_journal import BlobRestoring, ImportStorage
from ..resource_manager.contract.loading import LoadedResource, Loader
from ..resource_manager.contract.packs import UidAllotment
from .archive_reader import VerifiedArchive
from .blob_import import blobs_of, import_blobs
from .import_states import ModelImport
from .pieces import BATCH, Piece, Rewriting, batches_of, new_uids, pieces_of, prefetched
from .survey import Index

log = logging.getLogger("crudstack.import")

BATCHES_AT_ONCE = 3
"""The bodies of so many batches are stored at the same time, because a store elsewhere takes long to answer."""


class ModelLoad:
    """Gives the contents of a model of an archive to a loader."""

    def __init__(
        self,
        storage: IStorage,
        loader: Loader,
        archive: VerifiedArchive,
        model: str,
        index: Index,
        result: ModelImport,
    ) -> None:
        self._storage, self._loader, self._archive = storage, loader, archive
        self._model, self._index, self._result = model, index, result
        self._stored: deque[_Batch] = deque()

    async def fill(self, progress: Callable[[int], None], keys: AsyncIterator[list[StoredKey]]) -> None:
        """Store bodies and blobs, and add everything to the loader."""
        try:
            await self._fill(progress, keys)
        finally:
            # Not cancelled, because a thread would go on. `discard` removes all that was stored.
            await asyncio.gather(*(batch.stored for batch in self._stored), return_exceptions=True)

    async def discard(self) -> None:
        """Remove the bodies and the content of blobs that were stored, after the load has failed for good.

        No record will name them. Failures are logged, and a sweep removes the rest.
        """
        storage, notes, model, after = self._storage, self._archive.notes, self._model, ""
        assert isinstance(storage, ImportStorage), "the caller has looked"
        try:
            for uids in notes.stored_bodies(model):
                await storage.discard_bodies(uids)
            while stored := await asyncio.to_thread(notes.stored_blobs, model, after, BATCH):
                blobs = blobs_of(storage, model)
                if isinstance(blobs, BlobRestoring):
                    await blobs.discard([key for _, key in stored])
                after = stored[-1][0]
        except Exception as error:  # the import has failed already, for a reason that must be told
            log.warning("%s: bodies and files of the failed import stay until the next sweep: %s", model, error)

    async def _fill(self, progress: Callable[[int], None], keys: AsyncIterator[list[StoredKey]]) -> None:
        storage, notes, model = self._storage, self._archive.notes, self._model
        assert isinstance(storage, ImportStorage), "the caller has looked"
        if self._archive.model(model).blobs:
            self._result.blobs = await import_blobs(storage, self._archive, model, loader=self._loader)
        allotment = storage.allotment()
        rewriting = Rewriting(allotment.uid_for, lambda key: notes.new_blob(model, key))
        ascending = _Ascending()
        batches = batches_of(pieces_of(self._archive, model, self._index))
        async with aclosing(prefetched(batches)) as prepared:
            async for batch in prepared:
                await self._store(batch, allotment, rewriting, ascending)
                await self._add(most=BATCHES_AT_ONCE - 1)
                progress(self._result.created)
        await self._add(most=0)
        await self._loader.add(ascending.end())
        async for page in keys:
            await self._loader.add_keys(page)
            self._result.keys += len(page)

    async def _store(
        self, batch: Sequence[Piece], allotment: UidAllotment, rewriting: Rewriting, ascending: _Ascending
    ) -> None:
        """Begin to store the bodies of a batch."""
        items: list[LoadedResource | RevisionInfo] = []
        bodies: list[tuple[RevisionInfo, bytes]] = []
        uids: list[tuple[str, str]] = []
        for piece in batch:
            writes = rewriting.writes(piece, piece.meta, None)
            records = [write.change.record for write in writes if write.change.record is not None]
            bodies += zip(records, (body for _, body in piece.revisions), strict=True)
            uids += new_uids(piece, writes)
            if piece.entry is not None:
                items += ascending.end()
                items.append(LoadedResource(writes[0].change.meta, piece.entry))
                self._result.created += 1
            items += ascending.records(piece, records)
        allotment.end_batch()
        assert isinstance(self._storage, ImportStorage), "`fill` has looked"
        await asyncio.to_thread(self._archive.notes.keep_bodies, self._model, [record.uid for record, _ in bodies])
        stored = asyncio.ensure_future(self._storage.put_bodies(bodies))
        self._stored.append(_Batch(stored, items, uids))

    async def _add(self, *, most: int) -> None:
        """Give batches to the loader, in their order, until the bodies of at most so many are being stored."""
        while len(self._stored) > most:
            batch = self._stored[0]
            await asyncio.shield(batch.stored)
            self._stored.popleft()
            await self._loader.add(batch.items)
            await asyncio.to_thread(self._archive.notes.set_uids, self._model, batch.uids)


class _Batch(NamedTuple):
    """A batch whose bodies are being stored."""

    stored: asyncio.Future[None]
    items: list[LoadedResource | RevisionInfo]
    uids: list[tuple[str, str]]


class _Ascending:
    """Puts the current revision of a large resource, which comes first, to its place among the others."""

    def __init__(self) -> None:
        self._current: RevisionInfo | None = None

    def records(self, piece: Piece, records: Sequence[RevisionInfo]) -> Iterator[RevisionInfo]:
        """Yield the records of a piece by ascending number."""
        if piece.large and piece.entry is not None:
            self._current, *records = records
        for record in records:
            if self._current is not None and self._current.revision < record.revision:
                yield from self.end()
            yield record

    def end(self) -> list[RevisionInfo]:
        """Return the current revision, if its place is behind all others of its resource."""
        current, self._current = self._current, None
        return [] if current is None else [current]
