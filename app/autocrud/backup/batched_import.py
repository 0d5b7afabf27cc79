"""The import of the resources of one model in batches, each a commit, with a journal in the store.

Before each commit, the journal gets what the commit replaces and creates (J1 of `contract.import_journal`). Before and
after it, the import looks whether another command has taken it over (J5): see `_look_again`. If a commit is refused
because another writer was faster, or if its outcome is unknown, the batch is planned again on the present states. Those
that the import has written itself are recognized (N1 of `import_states`).

- B1 *The batches do not decide what is imported.* If a unique value belongs to a resource that a batch does not change,
  only the resources that want the value are left out of the batch. With `replace`, a later batch may free the value, so
  further passes try what was left out, until a pass imports nothing. Resources that pass values on in a circle must be
  in one batch: those that were left out are, up to the size of a batch.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from ..errors import CrudError, OutcomeUnknown, UniqueConflict, VersionConflict, WriteContention
from ..query import Compare, Resolved
from ..resource_manager.basic import IStorage, ResourceMeta, Write
from ..resource_manager.contract.import_journal import ImportJournal, ImportState, ReplacedPart
from .archive_notes import ArchiveNotes
from .errors import ImportConflict, ImportTakenOver
from .import_owner import ATTEMPTS, FIRST_PAUSE_S, NOT_NOW, ImportOwner, repeated
from .import_states import (
    NAMED,
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
from .option_names import option_names
from .pieces import Piece, Rewriting, new_uids
from .undo_import import TakingBack

log = logging.getLogger("crudstack.import")

NOTE_EVERY = 20
"""After how many batches the journal notes how far the import got."""


class Plan(NamedTuple):
    """The work that a batch needs.

    planned  the pieces that are to be written
    written  for each resource that the import has written before, whether it replaced one
    skipped  how many resources the model had already
    """

    planned: list[Planned]
    written: list[bool]
    skipped: int


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
        self._large_left_out: set[str] = set()  # large resources whose later pieces are not imported either
        self._batches = 0
        self._notes_progress = True
        self._left_out_before = 0  # how many resources were left out before the present pass

    async def add(self, batch: Sequence[Piece]) -> None:
        """Import a batch. Raises ImportConflict, and what the storage raises."""
        await self._add(batch)
        self._batches += 1
        last = batch[-1]
        if self._journal is None or not self._notes_progress:
            return
        if self._batches % NOTE_EVERY == 0 and not last.large:
            await self._owner.note(after=last.meta.resource_id)

    @property
    def _state(self) -> ImportState:
        return self._owner.state

    async def _add(self, batch: Sequence[Piece]) -> None:
        attempt = 0
        while batch:
            plan = await self._plan(batch)
            if not plan.planned:
                self._count_plan(plan)
                return
            kept = await self._keep(plan.planned)
            await self._owner.check()
            self._changed()
            try:
                committed = await self._storage.commit([write for one in plan.planned for write in one.writes])
            except UniqueConflict as error:
                refused = await self._refused(plan.planned, error)
                if not refused:
                    for piece in batch:
                        await self._add([piece])
                    return
                for piece in refused:
                    await self._leave_out(piece, error)
                ids = {piece.meta.resource_id for piece in refused}
                batch = [piece for piece in batch if piece.meta.resource_id not in ids]
            except (VersionConflict, WriteContention, OutcomeUnknown, *NOT_NOW) as error:
                await self._look_again(plan.planned, kept)
                attempt += 1
                if attempt == ATTEMPTS:
                    raise
                log.info("%s: a batch is tried again: %s", self._model, error)
                await asyncio.sleep(FIRST_PAUSE_S * 2 ** (attempt - 1))
            else:
                await self._look_again(plan.planned, kept)
                self._count_plan(plan)
                await self._note(plan.planned, committed)
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

    async def _refused(self, planned: Sequence[Planned], error: UniqueConflict) -> list[Piece]:
        """Return the pieces with a value of the field that a resource has which this batch does not change.

        Returns an empty list if none is found. Then the pieces must be tried one by one.
        """
        if len(planned) == 1:
            return [planned[0].piece]
        changed = {one.piece.meta.resource_id for one in planned}

        async def is_taken(value: Any) -> bool:
            query = Resolved(where=Compare(error.field, "eq", value), limit=2, include_deleted=True)
            return any(hit.meta.resource_id not in changed for hit in (await self._storage.search(query)).items)

        found: list[Piece] = []
        for piece in (one.piece for one in planned):
            value = None if piece.entry is None else piece.entry.keys.get(error.field)
            if value is not None and not isinstance(value, list) and await is_taken(value):
                found.append(piece)
        return found

    async def _plan(self, batch: Sequence[Piece]) -> Plan:
        found = await states_of(self._storage, [piece.meta.resource_id for piece in batch])
        plan = Plan([], [], 0)
        for piece in batch:
            meta = found[piece.meta.resource_id]
            if piece.entry is None:
                if piece.meta.resource_id not in self._large_left_out:
                    plan.planned.append(Planned(piece, self._rewriting.writes(piece, piece.meta, None)))
            elif meta is None:
                created = created_state(self._state, piece.meta)
                plan.planned.append(Planned(piece, self._rewriting.writes(piece, created, None), creates=True))
            elif is_written(self._state, piece.meta, meta):
                if not piece.large:
                    plan.written.append(meta.version != piece.meta.version)
                elif writes := self._rewriting.continue_with(piece, meta):
                    plan.planned.append(Planned(piece, writes))
            elif self._state.on_conflict == "skip":
                plan = plan._replace(skipped=plan.skipped + 1)
                if piece.large:
                    self._large_left_out.add(piece.meta.resource_id)
            else:
                plan.planned.append(await self._replacing(piece, meta))
        return plan

    async def _replacing(self, piece: Piece, found: ResourceMeta) -> Planned:
        if self._state.on_conflict == "fail":
            raise conflict([found.resource_id], 1)
        drop = [record.uid for record in await records_of(self._storage, found.resource_id)]
        meta = replacing_state(self._state, piece.meta, found)
        return Planned(piece, self._rewriting.writes(piece, meta, version_of(found), drop), replaced=found)

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
                uids += await self._stored_uids(piece)
                self._rewriting.written(committed[position])
            position += len(writes)
        await asyncio.to_thread(self._notes.set_uids, self._model, uids)
        if self._left_out_before:
            ids = [one.piece.meta.resource_id for one in planned]
            await asyncio.to_thread(self._notes.take_up, self._model, ids)

    async def _stored_uids(self, piece: Piece) -> list[tuple[str, str]]:
        """Return pairs of uids for the bodies of a piece: in the archive, and as they are stored.

        Records that another program has removed since they were committed are left out.
        """
        found = await records_of(self._storage, piece.meta.resource_id)
        stored = {record.revision: record.uid for record in found}
        return [(record.uid, stored[record.revision]) for record, _ in piece.revisions if record.revision in stored]

    def _count_plan(self, plan: Plan) -> None:
        """Count the resources that need no write. Called once for a batch, which may be planned several times."""
        self._result.skipped += plan.skipped
        for replaced in plan.written:
            self._count(replaced=replaced)

    def _count(self, *, replaced: bool) -> None:
        if replaced:
            self._result.replaced += 1
        else:
            self._result.created += 1

    async def _leave_out(self, piece: Piece, error: UniqueConflict) -> None:
        """Leave out a resource of the archive, because another resource has one of its unique values.

        Raises ImportConflict if conflicts are to fail.
        """
        resource_id = piece.meta.resource_id
        if self._state.on_conflict == "fail":
            raise unique_conflict({error.field: 1}, [resource_id]) from None
        if piece.large:
            self._large_left_out.add(resource_id)
        if self._state.on_conflict == "replace":
            self._notes_progress = False  # a resumed import must see it again, because a later pass may import it
        await asyncio.to_thread(self._notes.leave_out, self._model, resource_id, error.field)

    async def begin_pass(self) -> bool:
        """Begin another pass over the resources that were left out, if it may import some of them.

        Another resource of the archive may have replaced the one that had the value. Returns False if there are none,
        or if the last pass has imported none.
        """
        left_out = await asyncio.to_thread(self._notes.count_left_out, self._model)
        may_help = self._state.on_conflict == "replace" and left_out not in (0, self._left_out_before)
        self._left_out_before = left_out
        self._large_left_out.clear()
        return may_help

    async def end(self) -> None:
        """Count the resources that stay left out."""
        await count_left_out(self._notes, self._model, self._result)


async def count_left_out(notes: ArchiveNotes, model: str, result: ModelImport) -> None:
    """Add the resources that are noted as left out to a result."""
    counts = dict(result.unique_conflicts)
    for field, count, ids in await asyncio.to_thread(notes.left_out, model, NAMED):
        counts[field] = counts.get(field, 0) + count
        for resource_id in ids:
            result.name(resource_id)
    result.unique_conflicts = counts


def conflict(ids: Sequence[str], count: int) -> ImportConflict:
    """Return the error for ids that exist already."""
    named = ", ".join(repr(one) for one in ids[:3])
    return ImportConflict(
        f"{count} resources of the archive have ids that the model has already, among them {named}",
        f"import with {option_names().on_conflict}skip or replace",
        ids=ids,
    )


def unique_conflict(fields: dict[str, int], ids: Sequence[str]) -> ImportConflict:
    """Return the error for unique values that other resources have."""
    told = ", ".join(f"{count} in {name!r}" for name, count in fields.items())
    some = f", among them {', '.join(map(repr, ids[:3]))}" if ids else ""
    return ImportConflict(
        f"resources of the archive have values of unique fields that other resources have ({told}){some}",
        f"change these values, or import with {option_names().on_conflict}skip, which leaves such resources out",
        ids=ids,
        fields=fields,
    )
