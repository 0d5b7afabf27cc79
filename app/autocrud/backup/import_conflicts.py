"""Conflicts of an archive with the resources that a model has, found before anything is changed."""

from __future__ import annotations

import asyncio

from ..query import Compare, Resolved
from ..resource_manager.basic import IStorage
from ..resource_manager.contract.import_journal import ImportState, OnConflict
from .archive_notes import ArchiveNotes
from .batched_import import conflict, count_left_out, unique_conflict
from .import_states import ModelImport, is_written, states_of
from .pieces import BATCH

IDS = 100
"""An error has the ids of so many resources."""


async def check_conflicts(storage: IStorage, notes: ArchiveNotes, model: str) -> None:
    """Raise ImportConflict if the model has resources with ids of the archive, or with unique values of its resources.

    The error names up to IDS of them.
    """
    ids: list[str] = []
    count, after = 0, ""
    while page := await asyncio.to_thread(notes.ids, model, after, BATCH):
        found = [one for one, meta in (await states_of(storage, page)).items() if meta is not None]
        count += len(found)
        ids += found[: IDS - len(ids)]
        after = page[-1]
    if ids:
        raise conflict(ids, count)
    fields: dict[str, int] = {}
    last = None
    while claims := await asyncio.to_thread(notes.claims, model, last, BATCH):
        for field, value, resource_id in claims:
            query = Resolved(where=Compare(field, "eq", value), limit=1, include_deleted=True)
            if (await storage.search(query)).items:
                fields[field] = fields.get(field, 0) + 1
                ids += [resource_id] if len(ids) < IDS else []
        last = claims[-1][:2]
    if fields:
        raise unique_conflict(fields, ids)


async def find_left_out(
    storage: IStorage, notes: ArchiveNotes, model: str, result: ModelImport, on_conflict: OnConflict
) -> None:
    """Count the resources that an import would leave out, because others of the model have their unique values.

    With "replace", a resource that the archive has too gives its values up, unless it is left out itself (B1 of
    `batched_import`).
    """
    last = None
    while claims := await asyncio.to_thread(notes.claims, model, last, BATCH):
        last = claims[-1][:2]
        found = await states_of(storage, [one for _, _, one in claims]) if on_conflict == "skip" else {}
        for field, value, resource_id in claims:
            if found.get(resource_id) is not None:
                continue  # it is skipped
            query = Resolved(where=Compare(field, "eq", value), limit=BATCH, include_deleted=True)
            for holder in [hit.meta.resource_id for hit in (await storage.search(query)).items]:
                if holder == resource_id:
                    continue
                changes = on_conflict == "replace" and notes.has_id(model, holder)
                if changes and not notes.is_excluded(model, holder):
                    await asyncio.to_thread(notes.note_blocker, model, resource_id, field, holder)
                else:
                    await asyncio.to_thread(notes.leave_out, model, resource_id, field)
    await asyncio.to_thread(notes.leave_out_blocked, model)
    await count_left_out(notes, model, result)


async def exclude_skipped(storage: IStorage, notes: ArchiveNotes, model: str, state: ImportState) -> int:
    """Exclude the resources that the model has, so that files to which only they refer are not uploaded.

    Returns how many of them this attempt would have come to.
    """
    count, after = 0, ""
    while page := await asyncio.to_thread(notes.ids, model, after, BATCH):
        after = page[-1]
        skipped = [
            resource_id
            for resource_id, meta in (await states_of(storage, page)).items()
            if meta is not None
            and not is_written(state, meta, meta)  # by an earlier attempt
            and not notes.is_excluded(model, resource_id)
        ]
        await asyncio.to_thread(notes.exclude, model, skipped)
        count += sum(resource_id > state.after for resource_id in skipped)
    return count
