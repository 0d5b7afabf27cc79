"""Publishes and handles invalidations for callers in any thread and any event loop."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import Awaitable, Callable, Coroutine
from concurrent.futures import Future
from typing import Any, NamedTuple, TypeVar

from ....errors import ConfigError
from ....secret import Secret, amqp_url
from ...runtime.threads import shielded
from .connection import THREAD, Address, checked
from .consumer import LEASE_S
from .invalidation import EVERYTHING, NOTHING, REFRESH, Invalidation
from .publisher import ANSWER_S
from .session import Session

T = TypeVar("T")

MARGIN_S = 1.0
"""How much longer than the broker a call may take, for the AMQP thread to get to it."""
END_S = 10.0
"""How long `close` waits. Closing continues if it takes longer."""


class _Joined(NamedTuple):
    loop: asyncio.AbstractEventLoop
    session: Session


class Bus:
    """The invalidations of one store. It connects at the first use, and again at the first use after `close`.

    address  of the broker
    prefix   of the names of exchange and queue, at most 200 bytes
    handle   does what an invalidation of another instance demands. It is called in the AMQP thread, one call at a time,
             and again if it raises.

    Raises ConfigError if address or prefix is wrong.
    """

    def __init__(self, address: str | Address, prefix: str, handle: Callable[[Invalidation], Awaitable[None]]) -> None:
        if isinstance(address, str | Secret):
            checked(address)
            address = amqp_url(address)
        if prefix.startswith("amq.") or len(prefix.encode()) > 200:
            raise ConfigError(f"queue_prefix is {prefix!r}; expected at most 200 bytes that do not begin with amq.")
        self._address, self._prefix, self._handle = address, prefix, handle
        self._lock = threading.Lock()  # guards the rest
        self._joined: _Joined | None = None
        self._unpublished = NOTHING
        self._missed = REFRESH

    def join(self) -> None:
        """Start to connect, unless that was done. Does not block."""
        if self._joined is None:
            self._join()

    def _join(self) -> _Joined:
        with self._lock:
            if self._joined is None:
                loop, connection = THREAD.acquire(self._address)
                session = Session(connection, self._prefix, self._handle, self._unpublished, self._missed)
                self._joined = _Joined(loop, session)
                self._unpublished, self._missed = NOTHING, EVERYTHING
                asyncio.run_coroutine_threadsafe(session.run(), loop)
            return self._joined

    def is_fresh(self) -> bool:
        """Return whether everything was handled that the broker had confirmed LEASE_S ago. Does not block."""
        joined = self._joined or self._join()
        consumer = joined.session.consumer
        consumer.last_read = time.monotonic()
        if consumer.is_idle:  # read after `last_read` was set; `Consumer._idle` does both in the other order
            with contextlib.suppress(RuntimeError):  # the loop has ended
                joined.loop.call_soon_threadsafe(consumer.awake.set)
        lease = consumer.lease
        return lease is not None and lease.age() <= LEASE_S

    async def publish(self, invalidation: Invalidation) -> None:
        """Publish an invalidation, and wait for the broker's confirmation, for ANSWER_S at most.

        An invalidation that is not confirmed by then is published later.
        """
        joined = self._joined or self._join()
        await self._run(joined, joined.session.publish(invalidation), ANSWER_S + MARGIN_S)

    async def drain(self, timeout_s: float) -> bool:
        """Wait until all that was confirmed before this call is handled. Return False after `timeout_s` seconds."""
        joined = self._joined or self._join()
        return bool(await self._run(joined, joined.session.consumer.drain(timeout_s), timeout_s + MARGIN_S))

    def unpublished(self) -> Invalidation:
        """Return what the broker has not confirmed."""
        return self._unpublished if self._joined is None else self._joined.session.publisher.unpublished

    def unreachable_for(self) -> float | None:
        """Return for how many seconds the broker has been unreachable, None if it is reachable."""
        self.is_fresh()  # it has markers sent, which show whether the broker answers
        return None if self._joined is None else self._joined.session.unreachable_for()

    async def close(self) -> None:
        """Publish what is unpublished, if the broker is reachable, and release connection and thread.

        Waits for END_S at most.
        """
        with self._lock:
            joined, self._joined = self._joined, None
        if joined is not None:
            await self._run(joined, self._close(joined), END_S)

    async def _close(self, joined: _Joined) -> None:
        await joined.session.close()
        with self._lock:
            self._unpublished = self._unpublished.merged_with(joined.session.publisher.unpublished)
        await THREAD.release(self._address)

    async def _run(self, joined: _Joined, work: Coroutine[Any, Any, T], timeout_s: float) -> T | None:
        """Run `work` in the AMQP thread. Return None after `timeout_s`; the work runs to completion even then."""
        try:
            answer: Future[T] = asyncio.run_coroutine_threadsafe(work, joined.loop)
        except RuntimeError:  # the loop has ended
            work.close()
            return None
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                return await shielded(asyncio.wrap_future(answer))
        return None
