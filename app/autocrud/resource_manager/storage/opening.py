"""The opening of a storage, once for all callers, and the rebuilding of an index from records."""

from __future__ import annotations

import asyncio
import concurrent.futures
import threading
from collections.abc import Awaitable, Callable

from ...errors import StoreUnavailable
from ..basic import Change
from ..contract.protocols import RecordKeeping, RecordReplay
from ..runtime.threads import shielded

REBUILD_PAGE = 200
"""How many records the MetaStore applies at a time."""


class Opening:
    """Runs the opening once for all callers in all event loops. If it fails, the next call runs it again."""

    def __init__(self) -> None:
        self._mutex = threading.Lock()  # guards `_opening`
        self._opening: concurrent.futures.Future[None] | None = None
        self._task: asyncio.Task[None] | None = None  # a strong reference, because the event loop holds a weak one

    async def run(self, work: Callable[[], Awaitable[None]]) -> None:
        """Do the work, or wait for the caller that is doing it. Raises the errors of the work."""
        with self._mutex:
            opening, first = self._opening, self._opening is None
            if opening is None:
                opening = self._opening = concurrent.futures.Future()
        if first:
            # A task, because the first caller may be cancelled while others wait for the same opening.
            self._task = asyncio.get_running_loop().create_task(self._run(work, opening))
        await shielded(asyncio.wrap_future(opening))

    async def _run(self, work: Callable[[], Awaitable[None]], opening: concurrent.futures.Future[None]) -> None:
        try:
            await work()
        except BaseException as error:
            self.reset()
            if isinstance(error, asyncio.CancelledError):
                opening.set_exception(StoreUnavailable("the store was stopped while it was opened; try again"))
                raise
            opening.set_exception(error)
        else:
            opening.set_result(None)

    def reset(self) -> None:
        """Let the next call of `run` do the work again."""
        with self._mutex:
            self._opening = None


async def rebuild(replay: RecordReplay, records: RecordKeeping) -> None:
    """Apply all records to an empty MetaStore."""
    batch: list[Change] = []
    async for change in records.records():
        batch.append(change)
        if len(batch) >= REBUILD_PAGE:
            await asyncio.to_thread(replay.apply_committed, batch)
            batch = []
    await asyncio.to_thread(replay.apply_committed, batch)
