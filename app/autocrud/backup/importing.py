"""Imports of archives into the models of a program.

    result = await import_all(managers, "backup.tar.gz", on_conflict="skip")

The steps, for all models of the archive:

1. Verify the archive, and survey it: `archive_reader`, `survey`. Look for conflicts. Until here nothing is changed.
2. Begin a journal in the store of each model. It refuses a second import, and keeps what the import replaces.
3. Import each model under a pin: its blobs, its resources, its Idempotency-Keys. An empty model is filled in one step
   if its stores can do that, other models in batches: `batched_import`.
4. End the journals.

If the process is killed in step 3, `resume` continues with the same archive, and `abort` takes back what was written:
`undo_import`. Both may be called while the import runs: then it stops (J5 of `contract.import_journal`).
"""

from __future__ import annotations

import asyncio
import contextlib
import datetime as dt
import logging
from collections.abc import Collection, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from typing import Any
from uuid import uuid4

from msgspec.structs import replace

from ..errors import (
    ConfigError,
    CrudError,
    InvalidData,
    LoadTooLarge,
    ModelNotEmpty,
    OutcomeUnknown,
    PinLost,
    UniqueConflict,
)
from ..resource_manager.basic import IStorage
from ..resource_manager.contract.import_journal import ImportJournal, ImportState, ImportStorage, OnConflict
from ..resource_manager.contract.loading import LoadingStorage
from ..resource_manager.contract.storable import MetadataLimits
from .archive_notes import ArchiveNotes
from .archive_reader import Progress, VerifiedArchive, verify_in_thread
from .batched_import import BatchedImport, unique_conflict
from .blob_import import import_blobs
from .errors import BadArchive, ImportTakenOver, ImportUnfinished, NoSuchImport
from .import_conflicts import check_conflicts, exclude_skipped, find_left_out
from .import_messages import Extent, add_outcome, incomplete, still_to_take_back, unfinished, unstorable
from .import_options import Managers, check_options, names_of
from .import_owner import ImportOwner
from .import_space import check_space
from .import_states import ImportResult, ModelImport, ModelSurvey, Surveyed, is_empty
from .key_import import import_keys, key_pages
from .model_load import ModelLoad
from .option_names import option_names
from .pieces import Rewriting, batches_of, pieces_of, prefetched
from .sources import Source, readable_twice
from .survey import Index, Survey
from .undo_import import TakingBack, Undoing

__all__ = ["ImportResult", "ModelImport", "ModelSurvey", "OnConflict", "Surveyed", "import_all"]

log = logging.getLogger("crudstack.import")


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
    undo: bool = False,
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
        resume: Whether to continue an import of the same archive that is not finished. It keeps its `on_conflict`,
            unless "skip" or "replace" is given.
        abort: Whether to take back an import of the same archive that is not finished.
        undo: Whether to take back what was written if the import fails, but not if it is cancelled. Not for `resume`.
        without_journal: Whether to import into models with data whose store keeps no journal. Such an import cannot be
            resumed or taken back.
        check: Whether to stop before anything is changed. The result then tells what does not fit the models, and how
            many resources would be left out because others have their unique values.
        surveyed: Called before anything is changed, unless an import is aborted. If it raises, nothing is changed.
        progress: Called with the amount that is done, the total, and what is counted: "verify" for bytes, or the name
            of a model for resources.

    Raises BadArchive, ArchiveTooLarge, InvalidData or ConfigError if the archive cannot be imported into these models,
    ImportConflict, ImportUnfinished if another import is not finished, and NoSuchImport if there is none to resume or
    abort. Then nothing was changed, unless ImportConflict says otherwise. Raises ModelNotEmpty if an empty model was
    written meanwhile, ImportTakenOver if another program has resumed or aborted this import, ImportIncomplete, and what
    the stores raise. If something was changed, the message says how much is imported, and what to do.
    """
    check_options(managers, models, on_conflict, resume=resume, abort=abort, check=check)
    chosen = {name: manager for name, manager in managers.items() if models is None or name in models}
    for manager in chosen.values():
        await manager.open()
    fresh = not resume and not abort
    empty = {name: await is_empty(manager.storage) for name, manager in chosen.items()} if fresh else {}
    noted = (
        [name for name in chosen if not empty.get(name, False)] if resume or check or on_conflict != "replace" else []
    )
    storages = {} if abort else {name: manager.storage for name, manager in chosen.items()}
    limits = {name: storage for name, storage in storages.items() if isinstance(storage, MetadataLimits)}
    indexes = {name: Index(manager.codec) for name, manager in chosen.items()}
    async with readable_twice(source, max_bytes) as path:
        notes = ArchiveNotes()
        survey = Survey(indexes, notes, noted, limits, strict=not abort)
        archive = await verify_in_thread(
            path, max_bytes=max_bytes, sha256=sha256, notes=notes, visitor=survey, progress=progress
        )
        try:
            await asyncio.to_thread(survey.finish, archive.manifest)
            names = names_of(archive, managers, models)
            run = _Import(managers, archive, names, indexes, survey, surveyed or _untold, progress)
            if abort:
                return await run.abort()
            if resume:
                return await run.resume(on_conflict)
            return await run.begin(on_conflict, empty, without_journal=without_journal, check=check, undo=undo)
        finally:
            await asyncio.to_thread(archive.close)


def _untold(_: Mapping[str, ModelSurvey]) -> None:
    return None


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
        self._owners: dict[str, ImportOwner] = {}  # by model, as soon as this attempt may own its import
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
        self, on_conflict: OnConflict, empty: Mapping[str, bool], *, without_journal: bool, check: bool, undo: bool
    ) -> ImportResult:
        """Check whether everything can be imported, and then import it, unless it is a check alone."""
        for name in self._names:
            journal, storage = self._journal(name), self._storage(name)
            if journal is not None and (state := await journal.state()) is not None:
                raise unfinished(name, state)
            if name in self._survey.unstorable:
                raise unstorable(self._survey.unstorable[name])
            if journal is None and not empty[name] and not without_journal:
                raise ConfigError(
                    f"the model {name!r} has data, and its store keeps no journal of imports, so that this import could"
                    " not be resumed or taken back: import into an empty model, or call import_all with"
                    " without_journal=True"
                )
            taken = self._results[name].unique_conflicts = dict(self._survey.taken[name])  # these are left out
            if on_conflict == "fail":
                if taken:
                    raise unique_conflict(taken, [])
                if not empty[name]:
                    await check_conflicts(storage, self._archive.notes, name)
            elif check and not empty[name]:
                await find_left_out(storage, self._archive.notes, name, self._results[name], on_conflict)
        whole = {name: self._storage(name) for name in self._names if empty[name] or on_conflict != "skip"}
        await asyncio.to_thread(check_space, whole, self._survey)
        self._tell_survey()
        if check:
            return self._result
        import_id, attempt = uuid4().hex, uuid4().hex
        try:
            for name in self._names:
                journal = self._journal(name)
                state = ImportState(
                    id=import_id,
                    sha256=self._archive.sha256,
                    on_conflict=on_conflict,
                    empty=empty[name],
                    attempt=attempt,
                    named=True,
                )
                self._owners[name] = ImportOwner(journal, state)
                if journal is not None and (stored := await journal.begin(state)) != state:
                    raise unfinished(name, stored or state)
            await self._run(again=False)
        except BaseException as error:
            if not self._changed:
                for owner in self._owners.values():
                    with contextlib.suppress(ImportTakenOver):
                        await owner.note(ending=True)
                        await owner.end()
            elif not (undo and all(map(self._journal, self._owners)) and isinstance(error, Exception)):
                self._raise_incomplete(error, again=False)
            elif not isinstance(error, ImportTakenOver):
                await self._take_back_failed(error)
            raise
        return self._result

    def _raise_incomplete(self, error: BaseException, *, again: bool) -> None:
        """Say in the error of an import that has changed something how much is imported, or raise another error."""
        missing = [name for name in self._names if (owner := self._owners.get(name)) and not owner.state.finished]
        # Models are imported one after the other.
        results = [self._results[name] for name in missing[:1]]
        is_begun = again or isinstance(error, OutcomeUnknown) or any(one.created or one.replaced for one in results)
        begun = 1 if is_begun else 0
        failure = incomplete(
            error,
            Extent(
                [name for name in self._names if name not in missing],
                missing[:begun],
                missing[begun:],
                [name for name in self._owners if self._journal(name) is None],
            ),
        )
        if failure is not error:
            raise failure from error

    async def _take_back_failed(self, error: Exception) -> None:
        """Take back what this import has written, and say so in the error."""
        if any(owner.state.ending for owner in self._owners.values()):
            return  # it is complete (J7)
        try:
            await self._take_back()
        except CrudError as second:
            add_outcome(error, None, second)
        else:
            add_outcome(error, sum(result.not_taken_back for result in self._results.values()), None)

    # Run

    async def _run(self, *, again: bool) -> None:
        owned = [(name, self._owners[name]) for name in self._names if name in self._owners]
        for name, owner in owned:
            if not owner.state.finished:
                await self._import_model(name, owner, again=again)
        for _, owner in owned:  # all, before the first one ends (J7): the import is whole or can be taken back
            await owner.note(ending=True)
        for _, owner in owned:
            await owner.end()

    async def _import_model(self, name: str, owner: ImportOwner, *, again: bool) -> None:
        storage = self._storage(name)
        try:
            if not (owner.state.empty and await self._load(name, owner)):
                async with _pinned(storage):
                    if self._archive.model(name).blobs:
                        if owner.state.on_conflict == "skip" and not owner.state.empty:
                            skipped = await exclude_skipped(storage, self._archive.notes, name, owner.state)
                            self._results[name].skipped += skipped
                        self._results[name].blobs = await import_blobs(storage, self._archive, name, again=again)
                    await self._import_batches(name, owner)
                    self._results[name].keys += await import_keys(storage, self._archive, name, owner)
        except (PinLost, ModelNotEmpty):
            await owner.check()  # another attempt may have dropped the pin, or filled the model
            raise
        await owner.note(finished=True)

    async def _load(self, name: str, owner: ImportOwner) -> bool:
        """Fill an empty model in one step. Return False if its stores cannot do that, or if it is not empty.

        The pin is only for this step. An import in batches holds another one, which no other attempt may drop: it keeps
        the bodies that a batch replaces, until the batch cannot be taken back any more.
        """
        storage = self._storage(name)
        loading = storage.loading if isinstance(storage, LoadingStorage) else None
        if loading is None or not isinstance(storage, ImportStorage):
            return False
        load: ModelLoad | None = None
        discarded = True  # whether nothing of the load will ever be visible
        try:
            async with contextlib.AsyncExitStack() as context:
                pin = await context.enter_async_context(_pinned(storage))
                if pin is None:
                    return False
                await owner.note(pin=pin)  # before the model is seen to be empty: from now on, a new owner drops it
                try:
                    counts = self._archive.model(name)
                    loader = await context.enter_async_context(loading.load(pin, size=counts.resources + counts.blobs))
                except (ModelNotEmpty, LoadTooLarge):
                    # It has files or Idempotency-Keys, an earlier attempt has filled it, or the archive is too large.
                    return False
                load = ModelLoad(storage, loader, self._archive, name, self._indexes[name], self._results[name])
                await load.fill(lambda done: self._report(done, name), key_pages(self._archive, name))
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
        except BaseException as error:
            if discarded or (isinstance(error, CrudError) and not isinstance(error, OutcomeUnknown)):
                self._results[name].created = 0  # nothing of the load is visible
            if load is not None and discarded:
                await load.discard()
            raise
        self._results[name].in_one_step = True
        return True

    async def _import_batches(self, name: str, owner: ImportOwner) -> None:
        def changed() -> None:
            self._changed = True

        notes, index = self._archive.notes, self._indexes[name]
        rewriting = Rewriting(lambda _: self._storage(name).new_uid(), lambda key: notes.new_blob(name, key))
        importer = BatchedImport(
            self._storage(name),
            self._journal(name),
            owner,
            TakingBack(self._storage(name), owner.state, self._indexes[name]),
            rewriting,
            notes,
            name,
            self._results[name],
            changed,
        )
        done = self._results[name].skipped
        batches = batches_of(pieces_of(self._archive, name, index, owner.state.after))
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

    def _report(self, done: int, name: str) -> None:
        if self._progress is not None:
            self._progress(done, self._archive.model(name).resources, name)

    # Resume and abort

    async def _states(self) -> dict[str, ImportState]:
        """Return the states of the import of this archive that is not finished, by model.

        Raises NoSuchImport if there is none, and InvalidData if a store keeps no journal.
        """
        states: dict[str, ImportState] = {}
        for name in self._names:
            journal = self._journal(name)
            if journal is None:
                raise InvalidData(
                    f"the store of the model {name!r} keeps no journal, so its import cannot be resumed or taken back:"
                    f" name the other models ({option_names().model})"
                )
            state = await journal.state()
            if state is not None and state.sha256 != self._archive.sha256:
                raise unfinished(name, state)
            if state is not None:
                states[name] = state
        if not states or len({state.id for state in states.values()}) > 1:
            raise NoSuchImport(
                f"there is no unfinished import of the archive with the SHA-256 {self._archive.sha256} in these models"
            )
        return states

    async def _take_over(self, states: Mapping[str, ImportState], **changes: Any) -> None:
        for name, state in states.items():
            journal = self._journal(name)
            assert journal is not None, "it has a state"
            self._owners[name] = await ImportOwner.take_over(self._storage(name), journal, state, **changes)

    async def resume(self, on_conflict: OnConflict) -> ImportResult:
        """Continue an import that is not finished. `on_conflict` replaces that of the import, unless it is "fail"."""
        states = await self._states()
        for name, state in states.items():
            if state.aborting:
                raise ImportUnfinished(
                    f"the import of the archive with the SHA-256 {state.sha256} into the model {name!r} is being taken"
                    f" back, so it cannot be resumed: import that archive with {option_names().abort}"
                )
        for name in states:
            if name in self._survey.unstorable:
                error = unstorable(self._survey.unstorable[name])
                raise BadArchive(f"{error.detail}; take back the import that is not finished ({option_names().abort})")
        self._tell_survey()
        self._changed = True
        await self._take_over(states, **({} if on_conflict == "fail" else {"on_conflict": on_conflict}))
        states = {name: owner.state for name, owner in self._owners.items()}
        begun = any(state.finished or state.after for state in states.values())
        missing = [name for name in self._names if name not in states]
        if missing and not begun and all(self._names.index(name) > len(states) - 1 for name in missing):
            # It was interrupted while it began the journals, so these models are as they were.
            first = next(iter(states.values()))
            for name in missing:
                if (journal := self._journal(name)) is not None:
                    empty = await is_empty(self._storage(name))
                    state = replace(first, empty=empty, pin="", named=True)
                    if await journal.begin(state) != state:
                        raise unfinished(name, state)
                    self._owners[name] = ImportOwner(journal, state)
        try:
            await self._run(again=True)
        except BaseException as error:
            self._raise_incomplete(error, again=True)
            raise
        return self._result

    async def abort(self) -> ImportResult:
        """Take back an import that is not finished."""
        states = await self._states()
        if any(state.ending and not state.aborting for state in states.values()):
            await self._take_over(states)
            await self._run(again=True)
            raise NoSuchImport(
                f"the import of the archive with the SHA-256 {self._archive.sha256} was complete, so nothing was taken"
                " back"
            )
        try:
            await self._take_over(states, aborting=True)
            await self._take_back()
        except CrudError as error:
            failure = still_to_take_back(error)
            if failure is error:
                raise
            raise failure from error
        return self._result

    async def _take_back(self) -> None:
        """Take back what the import has written to all models that this attempt owns."""
        for owner in self._owners.values():  # all, before the first resource is taken back
            await owner.begin_abort()
        for name, owner in self._owners.items():
            journal, storage = self._journal(name), self._storage(name)
            if journal is None:
                continue
            if not owner.state.ending:
                undoing = Undoing(
                    storage, journal, owner.state, self._archive, name, self._indexes[name], self._results[name]
                )
                await undoing.run(lambda done, name=name: self._report(done, name))  # type: ignore[misc]
                await storage.purge_remnants(dt.datetime.now(dt.UTC))
                await owner.note(ending=True)
            await owner.end()


def _pinned(storage: IStorage) -> AbstractAsyncContextManager[str | None]:
    return storage.pinned() if isinstance(storage, ImportStorage) else contextlib.nullcontext(None)
