"""Where blocking reads run: a few threads for all stores of the process. What runs here waits for the disk, never for another read.

And how to wait for what goes on without whoever waits.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")

READERS = ThreadPoolExecutor(max_workers=4, thread_name_prefix="crudstack-read")


async def in_thread(work: Callable[[], T]) -> T:
    return await asyncio.get_running_loop().run_in_executor(READERS, work)


async def outlived(future: asyncio.Future[T]) -> T:
    """Wait for something that goes on if this waiter is cancelled; its failure is then no news to anybody."""
    future.add_done_callback(lambda done: done.cancelled() or done.exception())
    return await asyncio.shield(future)
