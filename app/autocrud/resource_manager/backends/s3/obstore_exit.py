"""End a process only after the threads of obstore have left Python.

obstore answers from threads of Rust. Such a thread calls `call_soon_threadsafe` of the event loop, which releases the
GIL when it wakes the loop. The main thread then continues with the answer, and may end the interpreter before the other
thread has the GIL again. Python up to 3.13 ends a thread that requests the GIL after that by unwinding its stack, and
then Rust aborts the process (exit code 134).

Invariant: A thread of obstore enters Python for a request only while it holds a reference to the future of that
request. It drops the reference after its last call. So if no future is alive, no thread of obstore is in Python or will
enter it. If a request is cancelled, obstore stops it and soon drops its future. `wait` is called at exit, when no event
loop runs any more.

A credential provider (credentials.py) needs no counter. obstore calls it within the request that needs credentials, on
the thread of that request. A cancelled request is dropped only between two steps, so its thread holds the future until
the provider has returned.

An event loop is closed only after its requests have ended too. If obstore answers to a closed loop,
`call_soon_threadsafe` raises. Python then prints that error and keeps its traceback, which holds the future.
`asyncio.run` first cancels all tasks and then closes the asynchronous generators of its loop, so each loop has a
generator that waits when it is closed.
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
"""The longest wait at the end of the process. A request whose event loop is gone may take longer; its answer is
unused."""
LOOP_WAIT_S = 1.0
"""The longest wait at the end of an event loop. Cancelled requests take a moment to stop."""

_futures: weakref.WeakSet[asyncio.Future[Any]] = weakref.WeakSet()
_guards: dict[asyncio.AbstractEventLoop, AsyncGenerator[None, None]] = {}
_touch: list[Callable[[], object]] = []


def tracked(request: Awaitable[T]) -> Awaitable[T]:
    """Note that a request is under way, and return it.

    obstore declares that requests are coroutines, but returns futures.
    """
    future = cast("asyncio.Future[Any]", request)
    _futures.add(future)
    loop = future.get_loop()
    if loop not in _guards and loop.is_running():
        for closed in [one for one in _guards if one.is_closed()]:
            del _guards[closed]
        _guards[loop] = guard = _wait_at_close()
        with contextlib.suppress(StopIteration):
            guard.__anext__().send(None)  # runs up to its `yield`, which registers the generator with the loop
    return request


async def _wait_at_close() -> AsyncGenerator[None, None]:
    """When the event loop closes this generator, wait for the requests of the loop, for LOOP_WAIT_S at most."""
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
    """Make the end of this process and of each event loop wait for requests.

    `touch` calls obstore, which then drops the references that its threads gave up.
    """
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
    """Drop the traceback of the last error that Python printed. That of an answer to a closed loop holds a future."""
    for name in ("last_exc", "last_type", "last_value", "last_traceback"):
        vars(sys).pop(name, None)
