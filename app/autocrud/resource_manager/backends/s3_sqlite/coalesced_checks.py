"""One check of HEAD for all who wait for one."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from ...runtime.threads import shielded


class CoalescedChecks:
    """Shares checks within an event loop: one runs, and those who come meanwhile wait for the next."""

    def __init__(self, check: Callable[[], object]) -> None:
        self._check = check
        self._running: asyncio.Task[None] | None = None
        self._next: asyncio.Task[None] | None = None

    async def next(self) -> None:
        if self._next is None or self._next.done():  # done: cancelled before it began
            self._next = asyncio.create_task(self._run(self._running))
        await shielded(self._next)

    async def _run(self, previous: asyncio.Task[None] | None) -> None:
        if previous is not None:
            await asyncio.wait([previous])
        # From here on the check is being sent: who comes now waits for the next one.
        self._running, self._next = self._next, None
        await self._check()  # type: ignore[misc]
