"""Where blocking reads run: a few threads for all stores of the process. What runs here waits for the disk, never for another read.

And how to wait for what goes on without whoever waits.
"""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextvars import ContextVar
from typing import Protocol, TypeVar
from weakref import WeakKeyDictionary

from ...errors import Overloaded
from .deadline import DEADLINE, operations

T = TypeVar("T")

HEAVY_BYTES = 64 * 1024
"""JSON from here on is worked on in the lane for heavy work: some milliseconds at most stay on the event loop."""
MAX_WAITING = 64 * 1024 * 1024
"""Bytes of JSON that may wait for that; one piece of work may be larger."""
AT_ONCE = 16 * 1024 * 1024
"""Bytes that the bodies of HEAVY_BYTES and more that are worked on at once may take, as `json_shape.weight` has it."""
READERS = ThreadPoolExecutor(max_workers=4, thread_name_prefix="crudstack-read")


async def in_thread(work: Callable[[], T]) -> T:
    return await asyncio.get_running_loop().run_in_executor(READERS, work)


class Turn(Protocol):
    """The turn of a request, of which a server gives a few at once."""

    def leave(self) -> None:
        """Let another request have it."""

    async def come_back(self) -> None:
        """Wait for it again."""


TURN: ContextVar[Turn | None] = ContextVar("crudstack.turn", default=None)
"""The turn of the request that is being answered, if a server gives turns."""


class _Lane:
    """One thread for the heavy work of all requests.

    It shares the interpreter lock with the event loop, which gets its turn every few milliseconds; with more threads it
    would wait for all of them each time. All that runs here is bounded by the size of a body, so nobody's work waits for
    ever, and none goes on after its request. A request that waits here has no turn elsewhere, so that small requests are
    answered meanwhile; how many may wait is bounded by MAX_WAITING.
    """

    def __init__(self) -> None:
        self.executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="crudstack-heavy")
        self.waiting = 0  # bytes, of all event loops together
        self._mutex = threading.Lock()

    async def run(self, size: int, work: Callable[[], T]) -> T:
        """Do the work after all that was here before. `size`: bytes of JSON that wait with it."""
        self._enter(size)
        turn = TURN.get()
        if turn is not None:
            turn.leave()
        try:
            done = await asyncio.get_running_loop().run_in_executor(self.executor, work)
        finally:
            with self._mutex:
                self.waiting -= size
        if turn is not None:
            await turn.come_back()
        return done

    def _enter(self, size: int) -> None:
        with self._mutex:
            if self.waiting and self.waiting + size > MAX_WAITING:
                raise Overloaded(
                    f"found {self.waiting} bytes of JSON that wait to be worked on; expected at most {MAX_WAITING} with"
                    " yours; try again"
                )
            self.waiting += size


LANE = _Lane()


class LargeTurns:
    """Turns of the requests of an event loop that have large bodies, from when the body is read to the answer.

    What is made of a body takes many times its size. So only as many requests have it at a time as take AT_ONCE, or one
    that takes more; the others wait in order with the bytes of their bodies, of which there may be MAX_WAITING, and have no
    turn elsewhere.
    """

    def __init__(self) -> None:
        self.used = 0
        self.waiting_bytes = 0
        self._waiting: deque[tuple[asyncio.Future[None], int]] = deque()

    async def take(self, size: int, weight: int) -> None:
        """Wait for a turn with a body of `size` bytes that will take `weight`. Raises Overloaded if too much waits."""
        if not self._waiting and self._fits(weight):
            self.used += weight
            return
        if self.waiting_bytes + size > MAX_WAITING:
            raise Overloaded(
                f"found {self.waiting_bytes} bytes of bodies that wait to be worked on; expected at most {MAX_WAITING} with"
                " yours; try again"
            )
        turn = TURN.get()
        if turn is not None:
            turn.leave()
        mine = asyncio.get_running_loop().create_future()
        self._waiting.append((mine, weight))
        self.waiting_bytes += size
        try:
            await mine
            if turn is not None:
                await turn.come_back()
        except BaseException:
            if mine.done() and not mine.cancelled():
                self.leave(weight)  # it had come, and is not used
            raise
        finally:
            self.waiting_bytes -= size

    def leave(self, weight: int) -> None:
        self.used -= weight
        while self._waiting and (self._waiting[0][0].done() or self._fits(self._waiting[0][1])):
            waiting, its = self._waiting.popleft()
            if not waiting.done():
                self.used += its
                waiting.set_result(None)

    def _fits(self, weight: int) -> bool:
        return not self.used or self.used + weight <= AT_ONCE


_LARGE_TURNS: WeakKeyDictionary[asyncio.AbstractEventLoop, LargeTurns] = WeakKeyDictionary()


def large_turns() -> LargeTurns:
    """Return the turns of the running event loop."""
    return _LARGE_TURNS.setdefault(asyncio.get_running_loop(), LargeTurns())


async def heavy(size: int, work: Callable[[], T], *texts: bytes, more: int = 0) -> T:
    """Do work on JSON of so many bytes: at once, or if it is large after what else is heavy, while others are answered.

    texts, more  the JSON, and operations beside those on it: what bounds the work if the request has a deadline

    Raises NotEnoughTime if the work might not end before that, when its turn has come.
    """
    if (deadline := DEADLINE.get()) is not None:
        count = (operations(*texts) if texts else size) + more
        unchecked = work

        def work() -> T:
            deadline.check(count)
            return unchecked()

    return work() if size < HEAVY_BYTES else await LANE.run(size, work)


async def shielded(future: asyncio.Future[T]) -> T:
    """Wait for something that goes on if this waiter is cancelled; its failure is then no news to anybody."""
    future.add_done_callback(lambda done: done.cancelled() or done.exception())
    return await asyncio.shield(future)
