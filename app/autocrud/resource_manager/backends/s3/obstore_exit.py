"""End a process only after the threads of obstore have left Python.

obstore answers from threads of Rust. Such a thread calls the event loop's `call_soon_threadsafe`, which releases the
GIL when it wakes the loop. The main thread then goes on with the answer, and may end the interpreter before the other
thread has the GIL again. Python up to 3.13 ends a thread that asks for the GIL after that by unwinding its stack, and
Rust aborts the process (exit code 134).

Invariant: a thread of obstore enters Python for a request only while it holds a reference to the future of that
request. It drops the reference after its last call. So if no future lives, no thread of obstore is in Python or will
enter it. A request that was cancelled drops its future soon, because obstore stops it. `wait` is called at exit, when
no event loop runs any more.

A credential provider (s3_credentials.py) needs no count of its own: obstore calls it within the request that needs
credentials, on that request's thread. A cancelled request is dropped only between two steps, so its thread holds the
future until the provider has returned.

An event loop is closed only after its requests too. If obstore answers to a closed loop, `call_soon_threadsafe` raises,
and Python prints that error and keeps its traceback, which holds the future. `asyncio.run` first cancels all tasks and
then closes the asynchronous generators of its loop, so each loop has a generator that waits as it is closed.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import functools
import logging
import sys
import time
import weakref
from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import Any, TypeVar, cast

T = TypeVar("T")
log = logging.getLogger("crudstack.s3")

LONGEST_WAIT_S = 5.0
"""A request that its event loop left behind may take longer; nobody waits for its answer."""
LOOP_WAIT_S = 1.0
"""The same for the end of an event loop: cancelled requests need a moment."""

_futures: weakref.WeakSet[asyncio.Future[Any]] = weakref.WeakSet()
_guards: dict[asyncio.AbstractEventLoop, AsyncGenerator[None, None]] = {}
_touch: list[Callable[[], object]] = []


def tracked(request: Awaitable[T]) -> Awaitable[T]:
    """Note that a request is under way, and return it. obstore types requests as coroutines, and returns futures."""
    future = cast("asyncio.Future[Any]", request)
    _futures.add(future)
    loop = future.get_loop()
    if loop not in _guards and loop.is_running():
        for closed in [one for one in _guards if one.is_closed()]:
            del _guards[closed]
        _guards[loop] = guard = _wait_at_close()
        with contextlib.suppress(StopIteration):
            guard.__anext__().send(None)  # runs up to its `yield`, and makes the loop know the generator
    return request


async def _wait_at_close() -> AsyncGenerator[None, None]:
    """Wait, as the event loop closes this generator, until no request of the loop is under way or LOOP_WAIT_S have passed."""
    try:
        yield
    finally:
        loop = asyncio.get_running_loop()
        deadline = loop.time() + LOOP_WAIT_S
        while any(future.get_loop() is loop for future in _futures) and loop.time() < deadline:
            for touch in _touch:
                touch()
            await asyncio.sleep(0.001)
        _guards.pop(loop, None)


@functools.cache
def wait_at_exit(touch: Callable[[], object]) -> None:
    """Have the end of this process and of each event loop wait for requests. `touch` enters obstore, which then drops
    references that its threads gave up."""
    _touch.append(touch)
    atexit.register(wait, touch)


def wait(touch: Callable[[], object]) -> None:
    """Wait until no request is under way, or LONGEST_WAIT_S have passed. Blocks."""
    deadline = time.monotonic() + LONGEST_WAIT_S
    touch()
    while len(_futures) and time.monotonic() < deadline:
        _forget_last_error()
        time.sleep(0.001)
        touch()
    if len(_futures):
        log.warning("%s requests to the object storage were still under way when the process ended", len(_futures))


def _forget_last_error() -> None:
    """Drop the traceback that Python keeps of an error that it printed: that of an answer to a closed loop holds a future."""
    for name in ("last_exc", "last_type", "last_value", "last_traceback"):
        vars(sys).pop(name, None)
