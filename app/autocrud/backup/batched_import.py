"""The import of the resources of one model in batches, each a commit, with a journal in the store.

Before each commit, the journal gets what the commit replaces and creates (J1 of `contract.import_journal`). Before and
after it, the import looks whether another command has taken it over (J5): see `_look_again`. If a
commit is refused because another writer was faster, or if its outcome is unknown, the batch is planned again on the
present states. Those that the import has written itself are recognized (N1 of `import_states`).
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from ..errors import CrudError, OutcomeUnknown, UniqueConflict, VersionConflict, WriteContention
from ..resource_manager.basic import IStorage, ResourceMeta, Write
from ..resource_manager.contract.import_journal import ImportJournal, ImportState, ReplacedPart
from .archive_notes import ArchiveNotes
from .errors import ImportConflict, ImportTakenOver
from .import_owner import ATTEMPTS, FIRST_PAUSE_S, NOT_NOW, ImportOwner, repeated
from .import_states import (
    REVISIONS,
    ModelImport,
    created_state,
    digest_of,
    is_written,
    records_of,
    replacing_state,
    states_of,
    version_of,
)
from .pieces import Piece, Rewriting, new_uids
from .undo_import import TakingBack

log = logging.getLogger("crudstack.import")

NOTE_EVERY = 20
"""After how many batches the journal notes how far the import got."""


class Planned(NamedTuple):
    """A piece that is to be written.

    creates   whether the resource is created
    replaced  the metadata of the resource that it replaces; None if it replaces none
    """

    piece: Piece
    writes: list[Write]
    creates: bool = False
    replaced: ResourceMeta | None = None


class BatchedImport:
    """Imports the resources of one model.

    owner    the import, as long as this attempt owns it
    taking   takes back a batch that was committed when an abort had taken over
    changed  called before the first commit
    """

    def __init__(
        self,
        storage: IStorage,
        journal: ImportJournal | None,
        owner: ImportOwner,
        taking: TakingBack,
        rewriting: Rewriting,
        notes: ArchiveNotes,
        model: str,
        result: ModelImport,
        changed: Callable[[], None],
    ) -> None:
        self._storage, self._journal, self._owner, self._taking = storage, journal, owner, taking
        self._rewriting = rewriting
        self._notes, self._model, self._result, self._changed = notes, model, result, changed
        self._left_out: str | None = None  # a large resource whose later pieces are not imported either
        self._batches = 0

    async def add(self, batch: Sequence[Piece]) -> None:
        """Import a batch. Raises ImportConflict, and what the storage raises."""
        await self._add(batch)
        self._batches += 1
        last = batch[-1]
        if self._journal is not None and self._batches % NOTE_EVERY == 0 and not last.large:
            await self._owner.note(after=last.meta.resource_id)

    @property
    def _state(self) -> ImportState:
        return self._owner.state

    async def _add(self, batch: Sequence[Piece]) -> None:
        for attempt in range(ATTEMPTS):
            planned = await self._plan(batch)
            if not planned:
                return
            kept = await self._keep(planned)
            await self._owner.check()
            self._changed()
            try:
                committed = await self._storage.commit([write for one in planned for write in one.writes])
            except UniqueConflict as error:
                if len(batch) > 1:
                    for piece in batch:
                        await self._add([piece])
                else:
                    self._take_conflict(planned[0].piece, error)
                return
            except (VersionConflict, WriteContention, OutcomeUnknown, *NOT_NOW) as error:
                await self._look_again(planned, kept)
                if attempt == ATTEMPTS - 1:
                    raise
                log.info("%s: a batch is tried again: %s", self._model, error)
                await asyncio.sleep(FIRST_PAUSE_S * 2**attempt)
            else:
                await self._look_again(planned, kept)
                await self._note(planned, committed)
                return

    async def _look_again(self, planned: Sequence[Planned], kept: Mapping[str, Sequence[ReplacedPart]]) -> None:
        """Look whether another command has taken over before a batch was committed, or perhaps committed (J5).

        If the import was aborted meanwhile, the abort may have gone past these resources already, and may even be
        complete. So this attempt takes them back itself: it knows what it has replaced, and holds a pin, which keeps
        the replaced bodies. If the import was resumed, the resources stay, because they are those of the same import.
        Later pieces of a large resource are left to the abort: they were committed only if it had not taken back the
        first one.
        """
        try:
            await self._owner.check()
        except ImportTakenOver as error:
            if error.aborted:
                await repeated(lambda: self._take_back(planned, kept))
            raise

    async def _take_back(self, planned: Sequence[Planned], kept: Mapping[str, Sequence[ReplacedPart]]) -> None:
        written = [one for one in planned if one.creates or one.replaced is not None]
        found = await states_of(self._storage, [one.piece.meta.resource_id for one in written])
        for one in written:
            archived = one.piece.meta
            meta = found[archived.resource_id]
            try:
                if meta is not None:
                    await self._taking.take_back(archived, meta, kept.get(archived.resource_id, ()))
            except NOT_NOW:
                raise
            except CrudError as error:
                log.warning("%s %s is not taken back: %s", self._model, archived.resource_id, error.detail)

    async def _plan(self, batch: Sequence[Piece]) -> list[Planned]:
        found = await states_of(self._storage, [piece.meta.resource_id for piece in batch])
        planned = [await self._plan_piece(piece, found[piece.meta.resource_id]) for piece in batch]
        return [one for one in planned if one is not None]

    async def _plan_piece(self, piece: Piece, found: ResourceMeta | None) -> Planned | None:
        meta, state = piece.meta, self._state
        if piece.entry is None:
            if self._left_out == meta.resource_id:
                return None
            return Planned(piece, self._rewriting.writes(piece, meta, None))
        if found is None:
            created = created_state(state, meta)
            return Planned(piece, self._rewriting.writes(piece, created, None), creates=True)
        if is_written(state, meta, found):
            if not piece.large:
                self._count(replaced=found.version != meta.version)
                return None
            writes = self._rewriting.continue_with(piece, found)
            return Planned(piece, writes) if writes else None
        if state.on_conflict == "fail":
            raise conflict([meta.resource_id], 1)
        if state.on_conflict == "skip":
            self._result.skipped += 1
            self._left_out = meta.resource_id
            return None
        drop = [record.uid for record in await records_of(self._storage, meta.resource_id)]
        writes = self._rewriting.writes(piece, replacing_state(state, meta, found), version_of(found), drop)
        return Planned(piece, writes, replaced=found)

    async def _keep(self, planned: Sequence[Planned]) -> dict[str, list[ReplacedPart]]:
        """Write the journal of a batch, before the batch (J1). Return what the batch replaces, by id."""
        if self._journal is None:
            return {}
        created = [digest_of(self._state.id, one.piece.meta.resource_id) for one in planned if one.creates]
        if created:
            await self._journal.keep_created(self._state, b"".join(created))
        kept = {one.replaced.resource_id: await self._parts(one.replaced) for one in planned if one.replaced}
        if kept:
            await self._journal.keep_replaced(self._state, [part for parts in kept.values() for part in parts])
        return kept

    async def _parts(self, found: ResourceMeta) -> list[ReplacedPart]:
        records = await records_of(self._storage, found.resource_id)
        return [
            ReplacedPart(meta=found, number=number, records=tuple(records[start : start + REVISIONS]))
            for number, start in enumerate(range(0, len(records), REVISIONS))
        ]

    async def _note(self, planned: Sequence[Planned], committed: Sequence[ResourceMeta]) -> None:
        """Count what was committed, and note the new uids of bodies."""
        position = 0
        uids: list[tuple[str, str]] = []
        for piece, writes, creates, replaced in planned:
            if creates or replaced is not None:
                self._count(replaced=replaced is not None)
            if committed[position].uid == writes[0].change.meta.uid:
                uids += new_uids(piece, writes)
            else:  # the storage has put the bodies under other uids
                records = {one.revision: one for one in await records_of(self._storage, piece.meta.resource_id)}
                uids += [(record.uid, records[record.revision].uid) for record, _ in piece.revisions]
                self._rewriting.written(committed[position])
            position += len(writes)
        await asyncio.to_thread(self._notes.set_uids, self._model, uids)

    def _count(self, *, replaced: bool) -> None:
        if replaced:
            self._result.replaced += 1
        else:
            self._result.created += 1

    def _take_conflict(self, piece: Piece, error: UniqueConflict) -> None:
        """Leave out a resource whose unique value another one has, or raise ImportConflict."""
        if self._state.on_conflict == "fail":
            raise unique_conflict({error.field: 1}, [piece.meta.resource_id]) from None
        self._left_out = piece.meta.resource_id
        counts = self._result.unique_conflicts
        self._result.unique_conflicts = {**counts, error.field: counts.get(error.field, 0) + 1}
        self._result.name(piece.meta.resource_id)


def conflict(ids: Sequence[str], count: int) -> ImportConflict:
    """Return the error for ids that exist already."""
    named = ", ".join(repr(one) for one in ids[:3])
    error = ImportConflict(
        f"{count} resources of the archive have ids that the model has already, among them {named}: import with"
        " --on-conflict skip or replace"
    )
    error.ids = tuple(ids)
    return error


def unique_conflict(fields: dict[str, int], ids: Sequence[str]) -> ImportConflict:
    """Return the error for unique values that other resources have."""
    told = ", ".join(f"{count} in {name!r}" for name, count in fields.items())
    some = f", among them {', '.join(map(repr, ids[:3]))}" if ids else ""
    error = ImportConflict(
        f"resources of the archive have values of unique fields that other resources have ({told}){some}: change these"
        " values, or import with --on-conflict skip, which leaves such resources out"
    )
    error.fields, error.ids = dict(fields), tuple(ids)
    return error
