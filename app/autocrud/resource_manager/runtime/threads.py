"""Threads for blocking work: a few for reads of all stores, and one for heavy work on JSON.

A read in the READERS threads waits for the disk, never for another read. `shielded` waits for work that runs to
completion even if the caller is cancelled. `until_cancelled` waits for work that stops if the caller is cancelled.
"""

from __future__ import annotations

import asyncio
import contextlib
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
"""JSON of this many bytes or more is heavy. One thread processes it, because it would block the event loop."""
MAX_WAITING = 64 * 1024 * 1024
"""Bytes of JSON that may wait for the thread for heavy work. A single piece of work may be larger."""
AT_ONCE = 16 * 1024 * 1024
"""Bytes of memory for the heavy bodies that are processed at the same time, by `json_shape.weight`."""
READERS = ThreadPoolExecutor(max_workers=4, thread_name_prefix="crudstack-read")


async def in_thread(work: Callable[[], T]) -> T:
    """Run a blocking read in one of the READERS threads, and return its result."""
    return await asyncio.get_running_loop().run_in_executor(READERS, work)


async def in_daemon_thread(work: Callable[[], T]) -> T:
    """Run blocking work in a new thread, and return its result. The end of the process does not wait for the thread."""
    loop = asyncio.get_running_loop()
    done: asyncio.Future[T] = loop.create_future()

    def finish(result: T | None, error: BaseException | None) -> None:
        if done.cancelled():
            return
        if error is not None:
            done.set_exception(error)
        else:
            done.set_result(result)  # type: ignore[arg-type] # there is a result if there is no error

    def run() -> None:
        result, failed = None, None
        try:
            result = work()
        except BaseException as error:  # raised again where the result is awaited
            failed = error
        with contextlib.suppress(RuntimeError):  # the event loop was closed meanwhile
            loop.call_soon_threadsafe(finish, result, failed)

    threading.Thread(target=run, name="crudstack-call", daemon=True).start()
    return await done


class Stopped(Exception):
    """The caller of `until_cancelled` was cancelled."""


async def until_cancelled(work: Callable[[Callable[[], None]], T]) -> T:
    """Run long blocking work in a thread, and return its result. If the caller is cancelled, waits until it has ended.

    work  called with a function that it must call often: it raises Stopped once the caller is cancelled
    """
    cancelled = threading.Event()

    def check() -> None:
        if cancelled.is_set():
            raise Stopped

    running = asyncio.ensure_future(asyncio.to_thread(work, check))
    try:
        return await asyncio.shield(running)
    except asyncio.CancelledError:
        cancelled.set()
        await asyncio.wait([running])
        if not running.cancelled():
            running.exception()  # taken, so that it is not logged
        raise


class Turn(Protocol):
    """The permission of a server to process a request. A server gives a few at a time."""

    def leave(self) -> None:
        """Give the turn to another request."""

    async def come_back(self) -> None:
        """Wait until the server gives the turn again."""


TURN: ContextVar[Turn | None] = ContextVar("crudstack.turn", default=None)
"""The turn of the request that is being answered, if a server gives turns."""


class _Lane:
    """One thread for the heavy work of all requests.

    The thread shares the interpreter lock with the event loop, which gets the lock every few milliseconds. With more
    threads, the event loop would wait for each of them every time. The size of a body bounds each piece of work, so no
    work waits for ever, and no work continues after its request. A request that waits here gives up its turn, so that
    the server answers small requests meanwhile. MAX_WAITING bounds the JSON that waits.
    """

    def __init__(self) -> None:
        self.executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="crudstack-heavy")
        self.waiting = 0  # bytes, of all event loops together
        self._mutex = threading.Lock()

    async def run(self, size: int, work: Callable[[], T]) -> T:
        """Run the work after all earlier work, and return its result. `size`: bytes of its JSON. Raises Overloaded."""
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
                    f"found {self.waiting} bytes of JSON that wait to be worked on; expected at most {MAX_WAITING}"
                    " with yours; try again"
                )
            self.waiting += size


LANE = _Lane()


class LargeTurns:
    """Limits how many requests of an event loop process a heavy body at the same time.

    A request holds its share of memory from the time when its body is read until its answer. The decoded data take many
    times the size of the body. So all requests that process a heavy body take at most AT_ONCE bytes together; only a
    single request may take more. The other requests wait in order, and give up their turns at the server. The bodies
    of the waiting requests take at most MAX_WAITING bytes.
    """

    def __init__(self) -> None:
        self.used = 0
        self.waiting_bytes = 0
        self._waiting: deque[tuple[asyncio.Future[None], int]] = deque()

    async def take(self, size: int, weight: int) -> None:
        """Wait until a body may be processed.

        size    bytes of the body
        weight  bytes of memory that it takes with its data

        Raises Overloaded if more than MAX_WAITING bytes would wait.
        """
        if not self._waiting and self._fits(weight):
            self.used += weight
            return
        if self.waiting_bytes + size > MAX_WAITING:
            raise Overloaded(
                f"found {self.waiting_bytes} bytes of bodies that wait to be worked on; expected at most {MAX_WAITING}"
                " with yours; try again"
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
                self.leave(weight)  # the share was given, but the request was cancelled
            raise
        finally:
            self.waiting_bytes -= size

    def leave(self, weight: int) -> None:
        """Give back the share of a body of this weight, and let the next ones begin."""
        self.used -= weight
        while self._waiting and (self._waiting[0][0].done() or self._fits(self._waiting[0][1])):
            waiting, next_weight = self._waiting.popleft()
            if not waiting.done():
                self.used += next_weight
                waiting.set_result(None)

    def _fits(self, weight: int) -> bool:
        return not self.used or self.used + weight <= AT_ONCE


_LARGE_TURNS: WeakKeyDictionary[asyncio.AbstractEventLoop, LargeTurns] = WeakKeyDictionary()


def large_turns() -> LargeTurns:
    """Return the LargeTurns of the running event loop."""
    return _LARGE_TURNS.setdefault(asyncio.get_running_loop(), LargeTurns())


async def heavy(size: int, work: Callable[[], T], *texts: bytes, more: int = 0) -> T:
    """Run work on JSON, and return its result. Small work runs on the event loop, other work in the heavy thread.

    size   bytes of the JSON
    texts  the JSON itself, which bounds the steps of the work; without it, `size` is the number of steps
    more   steps besides those on the texts

    Raises Overloaded if too much heavy work waits. Raises NotEnoughTime if the request has a deadline and the work may
    not end before it. The deadline is checked when the work is about to begin.
    """
    if (deadline := DEADLINE.get()) is not None:
        count = (operations(*texts) if texts else size) + more
        unchecked = work

        def work() -> T:
            deadline.check(count)
            return unchecked()

    return work() if size < HEAVY_BYTES else await LANE.run(size, work)


async def shielded(future: asyncio.Future[T]) -> T:
    """Return the result of a future that runs to completion even if the caller is cancelled.

    If the caller is cancelled, an exception of the future is discarded without a log line.
    """
    future.add_done_callback(lambda done: done.cancelled() or done.exception())
    return await asyncio.shield(future)
