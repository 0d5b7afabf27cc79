"""Where blocking reads run: a few threads for all stores of the process. What runs here waits for the disk, never for another read.

And how to wait for what goes on without whoever waits.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")

HEAVY_BYTES = 64 * 1024
"""JSON from here on is worked on in the lane for heavy work: some milliseconds at most stay on the event loop."""
READERS = ThreadPoolExecutor(max_workers=4, thread_name_prefix="crudstack-read")


async def in_thread(work: Callable[[], T]) -> T:
    return await asyncio.get_running_loop().run_in_executor(READERS, work)


_LANE = ThreadPoolExecutor(max_workers=1, thread_name_prefix="crudstack-heavy")
"""One thread for the heavy work of all requests. It shares the interpreter lock with the event loop, which gets its turn
every few milliseconds; with more threads it would wait for all of them each time. All that runs here is bounded by the
size of a body, so nobody's work waits for ever, and none goes on after its request."""


async def heavy(size: int, work: Callable[[], T]) -> T:
    """Do work on JSON of so many bytes: at once, or if it is large after what else is heavy, while others are answered."""
    if size < HEAVY_BYTES:
        return work()
    return await asyncio.get_running_loop().run_in_executor(_LANE, work)


async def outlived(future: asyncio.Future[T]) -> T:
    """Wait for something that goes on if this waiter is cancelled; its failure is then no news to anybody."""
    future.add_done_callback(lambda done: done.cancelled() or done.exception())
    return await asyncio.shield(future)
