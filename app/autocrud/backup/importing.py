"""Imports of archives into the models of a program.

    result = await import_all(managers, "backup.tar.gz", on_conflict="skip")

The steps, for all models of the archive:

1. Verify the archive, and survey it: `archive_reader`, `survey`. Look for conflicts. Until here nothing is changed.
2. Begin a journal in the store of each model. It refuses a second import, and keeps what the import replaces.
3. Import each model under a pin: its blobs, its resources, its Idempotency-Keys. An empty model is filled in one step
   if its stores can do that, other models in batches: `batched_import`.
4. End the journals.

If the process is killed in step 3, `resume` continues with the same archive, and `abort` takes back what was written:
`undo_import`.
"""

from __future__ import annotations

import asyncio
import contextlib
import datetime as dt
import itertools
import logging
from collections.abc import AsyncIterator, Collection, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from typing import Any
from uuid import uuid4

from msgspec.structs import replace

from ..errors import (
    ConfigError,
    InvalidData,
    LoadTooLarge,
    ModelNotEmpty,
    OutcomeUnknown,
    PinLost,
    UniqueConflict,
)
from ..query import Compare, Resolved
from ..resource_manager.basic import (
    AlreadyCommitted,
    IdempotentCommit,
    IStorage,
    ResourceMeta,
    StoredKey,
)
from ..resource_manager.contract.import_journal import ImportJournal, ImportState, ImportStorage, OnConflict
from ..resource_manager.contract.loading import LoadingStorage
from ..resource_manager.core import ResourceManager
from .archive_notes import ArchiveNotes
from .archive_reader import Progress, VerifiedArchive, verify_in_thread
from .batched_import import BatchedImport, conflict, unique_conflict
from .blob_import import blobs_of, import_blobs
from .errors import ImportUnfinished, NoSuchImport
from .import_states import ImportResult, ModelImport, ModelSurvey, Surveyed, is_empty, is_written, states_of
from .model_load import ModelLoad
from .pieces import BATCH, Rewriting, batches_of, pieces_of, prefetched
from .sources import Source, readable_twice
from .survey import Index, Survey
from .undo_import import Undoing

__all__ = ["ImportResult", "ModelImport", "ModelSurvey", "OnConflict", "Surveyed", "import_all"]

log = logging.getLogger("crudstack.import")

Managers = Mapping[str, ResourceManager[Any]]


async def import_all(
    managers: Managers,
    source: Source,
    *,
    models: Collection[str] | None = None,
    on_conflict: OnConflict = "fail",
    sha256: str | None = None,
    max_bytes: int | None = None,
    resume: bool = False,
    abort: bool = False,
    without_journal: bool = False,
    check: bool = False,
    surveyed: Surveyed | None = None,
    progress: Progress | None = None,
) -> ImportResult:
    """Import an archive, and return what was imported.

    Args:
        managers: The models of the program, by name.
        source: The archive: a path, an open binary file, or chunks of bytes. A stream is first copied to disk.
        models: Names of the models to import; None: all of the archive.
        on_conflict: What happens to resources whose ids a model has already: "fail" refuses the import, "skip" keeps
            those of the model, "replace" takes those of the archive.
        sha256: The SHA-256 that the archive must have, in hex; None: any.
        max_bytes: How many bytes the archive may have when it is decompressed; None: the free space of the disk for
            temporary files.
        resume: Whether to continue an import of the same archive that was interrupted, with its `on_conflict`.
        abort: Whether to take back an import of the same archive that was interrupted.
        without_journal: Whether to import into models with data whose store keeps no journal. Such an import cannot be
            resumed or taken back.
        check: Whether to stop before anything is changed. The result then tells what does not fit the models, and which
            unique values the archive has twice.
        surveyed: Called before anything is changed, unless an import is aborted. If it raises, nothing is changed.
        progress: Called with the amount that is done, the total, and what is counted: "verify" for bytes, or the name
            of a model for resources.

    Raises BadArchive, ArchiveTooLarge, InvalidData or ConfigError if the archive cannot be imported into these models,
    ImportConflict, ImportUnfinished if another import is not finished, and NoSuchImport if there is none to resume or
    abort. Then nothing was changed, unless ImportConflict says otherwise. Raises ModelNotEmpty if an empty model was
    written meanwhile, and what the stores raise. Then the import can be resumed or aborted.
    """
    _check_options(managers, models, on_conflict, resume=resume, abort=abort, check=check)
    chosen = {name: manager for name, manager in managers.items() if models is None or name in models}
    for manager in chosen.values():
        await manager.open()
    fresh = not resume and not abort
    empty = {name: await is_empty(manager.storage) for name, manager in chosen.items()} if fresh else {}
    noted = [name for name in chosen if not empty.get(name, False)] if resume or on_conflict != "replace" else []
    indexes = {name: Index(manager.codec) for name, manager in chosen.items()}
    async with readable_twice(source, max_bytes) as path:
        notes = ArchiveNotes()
        survey = Survey(indexes, notes, noted)
        archive = await verify_in_thread(
            path, max_bytes=max_bytes, sha256=sha256, notes=notes, visitor=survey, progress=progress
        )
        try:
            await asyncio.to_thread(survey.end)
            names = _names(archive, managers, models)
            run = _Import(managers, archive, names, indexes, survey, surveyed or _untold, progress)
            if abort:
                return await run.abort()
            if resume:
                return await run.resume()
            return await run.begin(on_conflict, empty, without_journal=without_journal, check=check)
        finally:
            await asyncio.to_thread(archive.close)


def _untold(_: Mapping[str, ModelSurvey]) -> None:
    return None


def _check_options(
    managers: Managers, models: Collection[str] | None, on_conflict: str, *, resume: bool, abort: bool, check: bool
) -> None:
    if on_conflict not in ("fail", "skip", "replace"):
        raise InvalidData(f"on_conflict is {on_conflict!r}, expected fail, skip or replace")
    if resume and abort:
        raise InvalidData("an import is either resumed or aborted, not both")
    if check and (resume or abort):
        raise InvalidData("a check changes nothing, so nothing is resumed or aborted: give one of these options")
    for name in models or ():
        if name not in managers:
            raise InvalidData(f"there is no model {name!r}; there are {', '.join(managers)}")


def _names(archive: VerifiedArchive, managers: Managers, models: Collection[str] | None) -> list[str]:
    """Return the names of the models to import, in the order of the archive."""
    found = [model.name for model in archive.manifest.models]
    for name in models or ():
        if name not in found:
            raise InvalidData(f"the archive has no model {name!r}; it has {', '.join(found) or 'none'}")
    names = [name for name in found if models is None or name in models]
    for name in names:
        if name not in managers:
            raise InvalidData(
                f"the archive has the model {name!r}, which this program does not have: add it, or name the models to"
                " import (--model)"
            )
        if archive.model(name).blobs:
            blobs_of(managers[name].storage, name)
    return names


class _Import:
    """One import of some models."""

    def __init__(
        self,
        managers: Managers,
        archive: VerifiedArchive,
        names: Sequence[str],
        indexes: Mapping[str, Index],
        survey: Survey,
        surveyed: Surveyed,
        progress: Progress | None,
    ) -> None:
        self._managers, self._archive, self._names = managers, archive, names
        self._indexes, self._survey, self._surveyed, self._progress = indexes, survey, surveyed, progress
        self._results = {name: ModelImport(not_fitting=survey.not_fitting[name]) for name in names}
        self._changed = False

    def _storage(self, name: str) -> IStorage:
        return self._managers[name].storage

    def _journal(self, name: str) -> ImportJournal | None:
        storage = self._storage(name)
        return storage.import_journal if isinstance(storage, ImportStorage) else None

    @property
    def _result(self) -> ImportResult:
        return ImportResult(self._archive.sha256, self._archive.size, self._results)

    # Begin

    def _tell_survey(self) -> None:
        models, taken = map(self._archive.model, self._names), self._survey.taken
        self._surveyed(
            {
                model.name: ModelSurvey(
                    model.resources, model.revisions, self._survey.not_fitting[model.name], dict(taken[model.name])
                )
                for model in models
            }
        )

    async def begin(
        self, on_conflict: OnConflict, empty: Mapping[str, bool], *, without_journal: bool, check: bool
    ) -> ImportResult:
        """Check whether everything can be imported, and then import it, unless it is a check alone."""
        for name in self._names:
            journal = self._journal(name)
            if journal is not None and (state := await journal.state()) is not None:
                raise _unfinished(name, state)
            if journal is None and not empty[name] and not without_journal:
                raise ConfigError(
                    f"the model {name!r} has data, and its store keeps no journal of imports, so that this import could"
                    " not be resumed or taken back: import into an empty model, or call import_all with"
                    " without_journal=True"
                )
            await self._check_conflicts(name, on_conflict, empty=empty[name])
        self._tell_survey()
        if check:
            return self._result
        import_id = uuid4().hex
        states = {
            name: ImportState(id=import_id, sha256=self._archive.sha256, on_conflict=on_conflict, empty=empty[name])
            for name in self._names
        }
        begun: list[str] = []
        try:
            for name in self._names:
                if (journal := self._journal(name)) is not None:
                    stored = await journal.begin(states[name])
                    if stored is None or stored.id != import_id:
                        raise _unfinished(name, stored or states[name])
                begun.append(name)
            await self._run(states, again=False)
        except BaseException:
            if not self._changed:
                for name in begun:
                    await self._end(name, import_id)
            raise
        return self._result

    async def _check_conflicts(self, name: str, on_conflict: OnConflict, *, empty: bool) -> None:
        """Raise ImportConflict if the import would fail. Count the resources of the archive that are left out."""
        taken = dict(self._survey.taken[name])
        self._results[name].unique_conflicts = taken
        if on_conflict != "fail":
            return
        if taken:
            raise unique_conflict(taken, [])
        if empty:
            return
        storage, notes, after = self._storage(name), self._archive.notes, ""
        ids: list[str] = []
        while page := await asyncio.to_thread(notes.ids, name, after, BATCH):
            ids += [one for one, meta in (await states_of(storage, page)).items() if meta is not None]
            after = page[-1]
        if ids:
            raise conflict(ids[:100], len(ids))
        fields: dict[str, int] = {}
        last = None
        while claims := await asyncio.to_thread(notes.claims, name, last, BATCH):
            for field, value, resource_id in claims:
                query = Resolved(where=Compare(field, "eq", value), limit=1, include_deleted=True)
                if (await storage.search(query)).items:
                    fields[field] = fields.get(field, 0) + 1
                    ids.append(resource_id)
            last = claims[-1][:2]
        if fields:
            raise unique_conflict(fields, ids[:100])

    # Run

    async def _run(self, states: Mapping[str, ImportState], *, again: bool) -> None:
        for name in self._names:
            if name in states and not states[name].finished:
                await self._import_model(name, states[name], again=again)
        for name in self._names:
            if name in states:
                await self._end(name, states[name].id)

    async def _import_model(self, name: str, state: ImportState, *, again: bool) -> None:
        storage = self._storage(name)
        async with _pinned(storage) as pin:
            if not (state.empty and pin is not None and await self._load(name, pin)):
                if self._archive.model(name).blobs:
                    await self._exclude_skipped(name, state)
                    self._results[name].blobs = await import_blobs(storage, self._archive, name, again=again)
                state = await self._import_batches(name, state)
                await self._import_keys(name)
        if (journal := self._journal(name)) is not None:
            await journal.note(state, replace(state, finished=True))

    async def _exclude_skipped(self, name: str, state: ImportState) -> None:
        """Exclude the resources that will be skipped, so that files to which only they refer are not uploaded."""
        if state.on_conflict != "skip" or state.empty:
            return
        notes, result, after = self._archive.notes, self._results[name], ""
        while page := await asyncio.to_thread(notes.ids, name, after, BATCH):
            after = page[-1]
            skipped = [
                resource_id
                for resource_id, meta in (await states_of(self._storage(name), page)).items()
                if meta is not None
                and not is_written(state, meta, meta)  # by an earlier attempt
                and not notes.is_excluded(name, resource_id)
            ]
            await asyncio.to_thread(notes.exclude, name, skipped)
            result.skipped += sum(resource_id > state.after for resource_id in skipped)

    async def _load(self, name: str, pin: str) -> bool:
        """Fill an empty model in one step. Return False if its stores cannot do that, or if it is not empty."""
        storage = self._storage(name)
        loading = storage.loading if isinstance(storage, LoadingStorage) else None
        if loading is None or not isinstance(storage, ImportStorage):
            return False
        load: ModelLoad | None = None
        discarded = True  # whether nothing of the load will ever be visible
        try:
            async with contextlib.AsyncExitStack() as context:
                try:
                    counts = self._archive.model(name)
                    loader = await context.enter_async_context(loading.load(pin, size=counts.resources + counts.blobs))
                except (ModelNotEmpty, LoadTooLarge):
                    # It has files or Idempotency-Keys, an earlier attempt has filled it, or the archive is too large.
                    return False
                load = ModelLoad(storage, loader, self._archive, name, self._indexes[name], self._results[name])
                await load.fill(lambda done: self._report(done, name), self._keys(name))
                discarded = False
                try:
                    await loader.publish()
                except (ModelNotEmpty, LoadTooLarge, PinLost, UniqueConflict):
                    discarded = True
                    raise
                except OutcomeUnknown:
                    self._changed = True
                    raise
                self._changed = True
        except BaseException:
            if load is not None and discarded:
                await load.discard()
            raise
        self._results[name].in_one_step = True
        return True

    async def _import_batches(self, name: str, state: ImportState) -> ImportState:
        def changed() -> None:
            self._changed = True

        notes, index = self._archive.notes, self._indexes[name]
        rewriting = Rewriting(self._storage(name).new_uid, lambda key: notes.new_blob(name, key))
        importer = BatchedImport(
            self._storage(name),
            self._journal(name),
            state,
            rewriting,
            notes,
            name,
            self._results[name],
            changed,
        )
        done = self._results[name].skipped
        batches = batches_of(pieces_of(self._archive, name, index, state.after))
        async with contextlib.aclosing(prefetched(batches)) as prepared:
            async for batch in prepared:
                await importer.add(batch)
                done += sum(piece.entry is not None for piece in batch)
                self._report(done, name)
        while await importer.begin_pass():
            batches = batches_of(pieces_of(self._archive, name, index, left_out=True))
            async with contextlib.aclosing(prefetched(batches)) as prepared:
                async for batch in prepared:
                    await importer.add(batch)
        await importer.end()
        return importer.state

    async def _import_keys(self, name: str) -> None:
        storage = self._storage(name)

        async def add(key: StoredKey) -> None:
            once = IdempotentCommit(key=key.key, request=key.request, time=key.time, results=key.results)
            with contextlib.suppress(AlreadyCommitted):
                await storage.commit([], once)

        async for keys in self._keys(name):
            await asyncio.gather(*map(add, keys))
            self._results[name].keys += len(keys)

    async def _keys(self, name: str) -> AsyncIterator[list[StoredKey]]:
        """Yield the Idempotency-Keys in pages, with the new uids of bodies."""
        notes, keys = self._archive.notes, self._archive.keys(name)

        def moved(meta: ResourceMeta | None) -> ResourceMeta | None:
            new = None if meta is None else notes.new_uid(name, meta.uid)
            return meta if meta is None or new is None else replace(meta, uid=new)

        def page() -> list[StoredKey]:
            return [replace(key, results=tuple(map(moved, key.results))) for key in itertools.islice(keys, BATCH)]

        while found := await asyncio.to_thread(page):
            yield found

    def _report(self, done: int, name: str) -> None:
        if self._progress is not None:
            self._progress(done, self._archive.model(name).resources, name)

    async def _end(self, name: str, import_id: str) -> None:
        if (journal := self._journal(name)) is not None:
            await journal.end(import_id)

    # Resume and abort

    async def _states(self) -> dict[str, ImportState]:
        """Return the states of the interrupted import of this archive, by model.

        Raises NoSuchImport if there is none, and InvalidData if a store keeps no journal.
        """
        states: dict[str, ImportState] = {}
        for name in self._names:
            journal = self._journal(name)
            if journal is None:
                raise InvalidData(
                    f"the store of the model {name!r} keeps no journal, so its import cannot be resumed or taken back:"
                    " name the other models (--model)"
                )
            state = await journal.state()
            if state is not None and state.sha256 != self._archive.sha256:
                raise _unfinished(name, state)
            if state is not None:
                states[name] = state
        if not states or len({state.id for state in states.values()}) > 1:
            raise NoSuchImport(
                f"no import of the archive with the SHA-256 {self._archive.sha256} was interrupted in these models"
            )
        return states

    async def resume(self) -> ImportResult:
        """Continue an interrupted import."""
        states = await self._states()
        self._tell_survey()
        self._changed = True
        begun = any(state.finished or state.after for state in states.values())
        missing = [name for name in self._names if name not in states]
        if missing and not begun and all(self._names.index(name) > len(states) - 1 for name in missing):
            # It was interrupted while it began the journals, so these models are as they were.
            first = next(iter(states.values()))
            for name in missing:
                if (journal := self._journal(name)) is not None:
                    empty = await is_empty(self._storage(name))
                    state = replace(first, empty=empty)
                    if await journal.begin(state) != state:
                        raise _unfinished(name, state)
                    states[name] = state
        await self._run(states, again=True)
        return self._result

    async def abort(self) -> ImportResult:
        """Take back an interrupted import."""
        states = await self._states()
        for name, state in states.items():
            journal, storage = self._journal(name), self._storage(name)
            assert journal is not None, "it has a state"
            undoing = Undoing(storage, journal, state, self._archive, name, self._indexes[name], self._results[name])
            await undoing.run(lambda done, name=name: self._report(done, name))  # type: ignore[misc]
            await storage.purge_remnants(dt.datetime.now(dt.UTC))
            await self._end(name, state.id)
        return self._result


def _pinned(storage: IStorage) -> AbstractAsyncContextManager[str | None]:
    return storage.pinned() if isinstance(storage, ImportStorage) else contextlib.nullcontext(None)


def _unfinished(name: str, state: ImportState) -> ImportUnfinished:
    return ImportUnfinished(
        f"an import of the archive with the SHA-256 {state.sha256} into the model {name!r} is not finished: import that"
        " archive with --resume to continue, or with --abort to take it back"
    )
