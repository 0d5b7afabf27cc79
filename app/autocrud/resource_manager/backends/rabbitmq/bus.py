"""The conversation for callers: from any thread and any event loop."""

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
from .connection import THREAD, Address, Link, checked
from .consumer import LEASE_S
from .invalidation import EVERYTHING, NOTHING, REFRESH, Words
from .publisher import ANSWER_S
from .session import Seat

T = TypeVar("T")

MARGIN_S = 1.0
"""How long the thread may take for itself."""
END_S = 10.0
"""How long the end may take. What takes longer goes on without the one who waits."""


class _Joined(NamedTuple):
    loop: asyncio.AbstractEventLoop
    link: Link
    seat: Seat


class Bus:
    """Joins at the first use. `heed` does what others say: in the thread, one call at a time, and again if it fails."""

    def __init__(self, address: str | Address, prefix: str, heed: Callable[[Words], Awaitable[None]]) -> None:
        if isinstance(address, str | Secret):
            checked(address)
            address = amqp_url(address)
        if prefix.startswith("amq.") or len(prefix.encode()) > 200:
            raise ConfigError(f"queue_prefix is {prefix!r}; expected at most 200 bytes that do not begin with amq.")
        self._address, self._prefix, self._heed = address, prefix, heed
        self._lock = threading.Lock()  # guards the rest
        self._joined: _Joined | None = None
        self._unsaid = NOTHING
        self._missed = REFRESH

    def join(self) -> None:
        if self._joined is None:
            self._join()

    def _join(self) -> _Joined:
        with self._lock:
            if self._joined is None:
                loop, link = THREAD.enter(self._address)
                seat = Seat(link, self._prefix, self._heed, self._unsaid, self._missed)
                self._joined = _Joined(loop, link, seat)
                self._unsaid, self._missed = NOTHING, EVERYTHING
                asyncio.run_coroutine_threadsafe(seat.run(), loop)
            return self._joined

    def fresh(self) -> bool:
        """Whether all is done that the broker had confirmed LEASE_S ago."""
        joined = self._joined or self._join()
        listener = joined.seat.listener
        listener.used = time.monotonic()
        if listener.resting:  # looked at after `used` was set, as the one that rests does it the other way round
            with contextlib.suppress(RuntimeError):  # the loop has ended
                joined.loop.call_soon_threadsafe(listener.awake.set)
        lease = listener.lease
        return lease is not None and lease.age() <= LEASE_S

    async def say(self, words: Words) -> None:
        """Tell the other instances. What cannot be said within ANSWER_S is said later."""
        joined = self._joined or self._join()
        await self._ask(joined, joined.seat.say(words), ANSWER_S + MARGIN_S)

    async def drain(self, timeout_s: float) -> bool:
        """Do all that was confirmed before this call; False if that took too long."""
        joined = self._joined or self._join()
        return bool(await self._ask(joined, joined.seat.listener.drain(timeout_s), timeout_s + MARGIN_S))

    def unsaid(self) -> Words:
        return self._unsaid if self._joined is None else self._joined.seat.speaker.unsaid

    def silent_for(self) -> float | None:
        """For how many seconds the broker cannot be used, None if it can."""
        self.fresh()  # so that somebody finds out
        return None if self._joined is None else self._joined.seat.silent_for()

    async def leave(self) -> None:
        """Say what is unsaid, if that can be, and give back connection and thread, if nobody else uses them."""
        with self._lock:
            joined, self._joined = self._joined, None
        if joined is not None:
            await self._ask(joined, self._leave(joined), END_S)

    async def _leave(self, joined: _Joined) -> None:
        await joined.seat.leave()
        with self._lock:
            self._unsaid = self._unsaid.and_(joined.seat.speaker.unsaid)
        await THREAD.exit(self._address)

    async def _ask(self, joined: _Joined, question: Coroutine[Any, Any, T], timeout_s: float) -> T | None:
        """Let the thread do it; None if that takes too long. It goes on without the one who asks."""
        try:
            answer: Future[T] = asyncio.run_coroutine_threadsafe(question, joined.loop)
        except RuntimeError:  # the loop has ended
            question.close()
            return None
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                return await shielded(asyncio.wrap_future(answer))
        return None
