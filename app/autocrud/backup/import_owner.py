"""One attempt of an import into one model, while it owns the import (J5 of `contract.import_journal`)."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar
from uuid import uuid4

from msgspec.structs import replace

from ..errors import NotEnoughTime, Overloaded, StoreUnavailable
from ..resource_manager.basic import IStorage
from ..resource_manager.contract.import_journal import ImportJournal, ImportState, ImportStorage
from .errors import ImportTakenOver
from .option_names import option_names

T = TypeVar("T")

ATTEMPTS = 8
FIRST_PAUSE_S = 0.05
"""Pause before something is tried again. It doubles with each attempt."""
NOT_NOW = (StoreUnavailable, Overloaded, NotEnoughTime)
"""Errors after which the same work may succeed later."""


class ImportOwner:
    """The state of an import into one model, as this attempt has stored it.

    Only this attempt changes a state that has its name. Without a journal, no other attempt can take over.
    """

    def __init__(self, journal: ImportJournal | None, state: ImportState) -> None:
        self._journal, self.state = journal, state

    @classmethod
    async def take_over(
        cls, storage: IStorage, journal: ImportJournal, state: ImportState, **changes: Any
    ) -> ImportOwner:
        """Take over the import from the attempt that has stored this state, and drop the pin of that attempt.

        That attempt may run: then it may change the state meanwhile, which is no reason to fail. Raises ImportTakenOver
        if a third attempt was faster.
        """
        attempt = uuid4().hex
        for _ in range(ATTEMPTS):
            new = replace(state, attempt=attempt, **changes)
            if await journal.note(state, new):
                if new.pin and isinstance(storage, ImportStorage):
                    await storage.drop_pin(new.pin)
                return cls(journal, new)
            found = await journal.state()
            if found is None or _fixed(found) != _fixed(state):
                break
            state = found
        raise _taken_over("another command has changed the state of this import at the same time: try again")

    async def note(self, **changes: Any) -> None:
        """Change the state. Raises ImportTakenOver if this attempt does not own the import any more."""
        if self._journal is None:
            self.state = replace(self.state, **changes)
            return
        for _ in range(ATTEMPTS):
            new = replace(self.state, **changes)
            if await self._journal.note(self.state, new):
                self.state = new
                return
            await self.check()
        raise _taken_over("another program changes the journal of this import: this import has stopped")

    async def check(self) -> None:
        """Raise ImportTakenOver if this attempt does not own the import any more."""
        if self._journal is None:
            return
        found = await repeated(self._journal.state)
        if found is not None and found.attempt == self.state.attempt:
            self.state = found  # it differs if the outcome of an earlier `note` was unknown
            return
        names = option_names()
        is_same = found is not None and found.id == self.state.id
        if found is not None and is_same and not found.aborting:
            raise _taken_over(f"another command continues this import ({names.resume}): this one has stopped")
        if is_same or await repeated(self._was_aborted):
            error = _taken_over(f"another command has taken this import back ({names.abort}): this one has stopped")
            error.aborted = True
            raise error
        raise _taken_over(
            f"another command has continued this import ({names.resume}) and completed it: this one has stopped"
        )

    async def _was_aborted(self) -> bool:
        return self._journal is not None and await self._journal.was_aborted(self.state.id)

    async def begin_abort(self) -> None:
        """Note that the import is taken back from now on."""
        await self.note(aborting=True)
        if self._journal is not None:
            await self._journal.mark_aborted(self.state.id)

    async def end(self) -> None:
        """Remove the journal, after `note(ending=True)`."""
        if self._journal is not None:
            await self._journal.end(self.state)


def _taken_over(detail: str) -> ImportTakenOver:
    return ImportTakenOver(detail)


def _fixed(state: ImportState) -> tuple[Any, ...]:
    """Return the part of a state that only changes if another attempt takes over, or ends the import."""
    return state.id, state.attempt, state.aborting, state.ending


async def repeated(work: Callable[[], Awaitable[T]]) -> T:
    """Return the result of some work, which is tried again if a store is not available for a moment."""
    for attempt in range(ATTEMPTS - 1):
        try:
            return await work()
        except NOT_NOW:
            await asyncio.sleep(FIRST_PAUSE_S * 2**attempt)
    return await work()
