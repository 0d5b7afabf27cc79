"""Concurrent calls, of which only some are under way at the same time."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable


async def limited(limit: int, calls: Iterable[Callable[[], Awaitable[object]]]) -> None:
    """Run calls in their order, at most `limit` at the same time.

    After a failure, starts no further calls, waits for those that are under way, and raises the first error.
    """
    left = iter(calls)

    async def work() -> None:
        try:
            for call in left:
                await call()
        except BaseException:
            for _ in left:
                pass
            raise

    for result in await asyncio.gather(*(work() for _ in range(limit)), return_exceptions=True):
        if isinstance(result, BaseException):
            raise result
