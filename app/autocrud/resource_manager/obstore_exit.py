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
"""

from __future__ import annotations

import atexit
import functools
import logging
import time
import weakref
from collections.abc import Awaitable, Callable
from typing import TypeVar

T = TypeVar("T")
log = logging.getLogger("crudstack.s3")

LONGEST_WAIT_S = 5.0
"""A request that its event loop left behind may take longer; nobody waits for its answer."""

_futures: weakref.WeakSet[Awaitable[object]] = weakref.WeakSet()


def tracked(future: Awaitable[T]) -> Awaitable[T]:
    """Note that a request is under way, and return its future."""
    _futures.add(future)
    return future


@functools.cache
def wait_at_exit(touch: Callable[[], object]) -> None:
    """Have the end of this process wait for requests. `touch` enters obstore, which then drops references that its threads gave up."""
    atexit.register(wait, touch)


def wait(touch: Callable[[], object]) -> None:
    """Wait until no request is under way, or LONGEST_WAIT_S have passed. Blocks."""
    deadline = time.monotonic() + LONGEST_WAIT_S
    touch()
    while len(_futures) and time.monotonic() < deadline:
        time.sleep(0.001)
        touch()
    if len(_futures):
        log.warning("%s requests to the object storage were still under way when the process ended", len(_futures))
