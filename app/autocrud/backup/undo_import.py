"""Takes back what an interrupted import has written into a model.

A resource is taken back if it is still in the state that the import has written (N1 of `import_states`). A resource
that the import created is purged. A resource that it replaced gets its former metadata and revisions back, with a
higher version. Other resources stay as they are, and the result counts those that the import may have written.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import Callable, Iterator, Sequence

from msgspec.structs import replace

from ..errors import CrudError, ResourceNotFound, VersionConflict
from ..resource_manager.basic import Change, IStorage, ResourceMeta, RevisionInfo, Write
from ..resource_manager.contract.blobs import BlobStorage
from ..resource_manager.contract.import_journal import ImportJournal, ImportState, ReplacedPart
from ..resource_manager.contract.limits import next_version
from ..resource_manager.engine.planning import new_nonce
from .archive_reader import VerifiedArchive
from .import_owner import NOT_NOW
from .import_states import ModelImport, derived_nonce, digest_of, is_written, records_of, states_of, version_of
from .pieces import BATCH, Piece, Rewriting
from .survey import LARGE_REVISIONS, Index

log = logging.getLogger("crudstack.import")

DIGEST = 16
ATTEMPTS = 8
"""How often a resource is tried that another process changes at the same time."""


class TakingBack:
    """Takes back single resources."""

    def __init__(self, storage: IStorage, state: ImportState, index: Index) -> None:
        self._storage, self._state, self._index = storage, state, index

    async def take_back(self, archived: ResourceMeta, found: ResourceMeta, parts: Sequence[ReplacedPart]) -> bool:
        """Take back what the import has written of a resource. Returns False if it was not written, or changed since.

        archived  the metadata of the resource in the archive
        found     its present metadata
        parts     what the import has replaced of it; empty if it has created it

        Another process may do the same at the same time. Raises CrudError if the store refuses it.
        """
        attempt = 0
        while True:
            undone = found.nonce == self._undone_nonce(found.resource_id, found.version)
            if undone and await self._is_complete(parts):
                return True  # by an earlier attempt
            if not undone and not is_written(self._state, archived, found):
                return False
            try:
                if parts:
                    await self._restore(parts, found)
                else:
                    await self._purge(found)
            except (VersionConflict, ResourceNotFound):
                attempt += 1
                now = (await states_of(self._storage, [found.resource_id]))[found.resource_id]
                if now is None:
                    return True
                if attempt == ATTEMPTS:
                    raise
                found = now
            else:
                return True

    def _undone_nonce(self, resource_id: str, version: int) -> str:
        return derived_nonce(f"{self._state.id}-undone", resource_id, version)

    async def _is_complete(self, parts: Sequence[ReplacedPart]) -> bool:
        records = sum(len(part.records) for part in parts)
        return records <= LARGE_REVISIONS or records == len(await records_of(self._storage, parts[0].meta.resource_id))

    async def _purge(self, found: ResourceMeta) -> None:
        drop = {record.uid for record in await records_of(self._storage, found.resource_id)}
        change = Change(
            meta=replace(found, version=next_version(found.version), nonce=new_nonce()),
            record=None,
            index=None,
            expect=version_of(found),
            drop=tuple(sorted(drop)),
            purge=True,
        )
        await self._storage.commit([Write(change, None)])

    async def _restore(self, parts: Sequence[ReplacedPart], found: ResourceMeta) -> None:
        """Write the former revisions of a resource again. They get new uids, and their bodies are stored again."""
        before = parts[0].meta
        records = [record for part in parts for record in part.records]
        present = await self._blobs(records)
        rewriting = Rewriting(lambda _: self._storage.new_uid(), lambda key: key if key in present else None)
        version = next_version(max(before.version, found.version))
        meta = replace(before, version=version, nonce=self._undone_nonce(before.resource_id, version))
        drop = [record.uid for record in await records_of(self._storage, found.resource_id)]
        records.sort(key=lambda record: record.revision != before.revision)  # Q1 of `pieces`
        for start in range(0, len(records), LARGE_REVISIONS):
            some = records[start : start + LARGE_REVISIONS]
            bodies = await self._storage.bodies([record.uid for record in some])
            entry = None if start else self._index.entry(bodies[0], some[0].encoding)
            piece = Piece(before, list(zip(some, bodies, strict=True)), entry, large=True)
            await self._storage.commit(rewriting.writes(piece, meta, version_of(found), drop))

    async def _blobs(self, records: Sequence[RevisionInfo]) -> set[str]:
        """Return the keys of those blobs of these records that are stored."""
        hashes = sorted({key.partition("/")[0] for record in records for key in record.blobs})
        blobs = self._storage.blobs if isinstance(self._storage, BlobStorage) else None
        if blobs is None or not hashes:
            return set()
        return {
            row.key for start in range(0, len(hashes), 100) for row in await blobs.rows(hashes[start : start + 100])
        }


class Undoing:
    """Takes back an import into one model. It may be interrupted, and repeated."""

    def __init__(
        self,
        storage: IStorage,
        journal: ImportJournal,
        state: ImportState,
        archive: VerifiedArchive,
        model: str,
        index: Index,
        result: ModelImport,
    ) -> None:
        self._storage, self._journal, self._state, self._archive = storage, journal, state, archive
        self._model, self._result = model, result
        self._taking = TakingBack(storage, state, index)

    async def run(self, progress: Callable[[int], None]) -> None:
        """Take back all that can be taken back. Raises StoreUnavailable; then it must be repeated."""
        notes = self._archive.notes
        async for digests in self._journal.created(self._state):
            parts = [digests[start : start + DIGEST] for start in range(0, len(digests), DIGEST)]
            await asyncio.to_thread(notes.note_digests, self._model, parts)
        metas = self._metas()
        done = 0
        while batch := await asyncio.to_thread(lambda: list(itertools.islice(metas, BATCH))):
            found = await states_of(self._storage, [meta.resource_id for meta in batch])
            for archived in batch:
                meta = found[archived.resource_id]
                if meta is not None:
                    await self._take_back(archived, meta)
            done += len(batch)
            progress(done)

    def _metas(self) -> Iterator[ResourceMeta]:
        return (item for item in self._archive.resources(self._model) if isinstance(item, ResourceMeta))

    async def _take_back(self, archived: ResourceMeta, found: ResourceMeta) -> None:
        parts = await self._journal.replaced(self._state, found.resource_id)
        try:
            taken_back = await self._taking.take_back(archived, found, parts)
        except NOT_NOW:
            raise
        except CrudError as error:
            self._give_up(found, error.detail)
            return
        if taken_back:
            self._result.taken_back += 1
        elif self._may_have_written(archived, found, parts):
            self._give_up(found, "it was changed since")

    def _may_have_written(self, archived: ResourceMeta, found: ResourceMeta, parts: Sequence[ReplacedPart]) -> bool:
        if parts:
            return version_of(parts[0].meta) != version_of(found)
        return self._archive.notes.has_digest(self._model, digest_of(self._state.id, archived.resource_id))

    def _give_up(self, found: ResourceMeta, reason: str) -> None:
        log.warning("%s %s is not taken back: %s", self._model, found.resource_id, reason)
        self._result.not_taken_back += 1
        self._result.name(found.resource_id)
