"""Run one check of HEAD for all callers that wait for one."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from ...runtime.threads import shielded


class CoalescedChecks:
    """Coalesces checks within one event loop.

    A caller may use only a check that began after the call. So while one check runs, all new callers share the next
    one.
    """

    def __init__(self, check: Callable[[], Awaitable[None]]) -> None:
        self._check = check
        self._running: asyncio.Task[None] | None = None
        self._next: asyncio.Task[None] | None = None

    async def next(self) -> None:
        """Wait for the next check. Raises the errors of the check."""
        if self._next is None or self._next.done():  # done: cancelled before it began
            self._next = asyncio.create_task(self._run(self._running))
        await shielded(self._next)

    async def _run(self, previous: asyncio.Task[None] | None) -> None:
        if previous is not None:
            await asyncio.wait([previous])
        # The check is sent from here on, so later callers must wait for another one.
        self._running, self._next = self._next, None
        await self._check()
