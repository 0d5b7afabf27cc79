"""Sends the invalidations of one instance.

The broker confirms each message. An unconfirmed invalidation is kept, and sent again on the next connection. Receiving
it twice does no harm.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence

from .invalidation import NOTHING, Invalidation, encode

ANSWER_S = 1.0
"""How long a writer waits for the broker's confirmation."""
SILENCE_S = 5.0
"""How long the broker may not answer before another connection is tried."""


class Publisher:
    """Invalidations that wait to be sent, and the callers that wait for their confirmation.

    name         of the session, the sender of its messages
    unpublished  what an earlier session could not send

    `reachable` is False while the broker is known to be unreachable. Callers do not wait then.
    """

    def __init__(self, name: str, unpublished: Invalidation) -> None:
        self._name = name
        self.reachable = True
        self._queued, self._in_flight = unpublished, NOTHING
        self._waiting: list[asyncio.Future[None]] = []
        self._news = asyncio.Event()
        if unpublished:
            self._news.set()

    @property
    def unpublished(self) -> Invalidation:
        """The invalidations that the broker has not confirmed."""
        return self._in_flight.merged_with(self._queued)

    async def publish(self, invalidation: Invalidation) -> bool:
        """Queue an invalidation, and wait until the broker has confirmed it.

        Waits for ANSWER_S at most, and not at all while the broker is known to be unreachable. Returns False if the
        broker did not answer in that time.
        """
        self._queued = self._queued.merged_with(invalidation)
        self._news.set()
        if not self.reachable:
            return True
        confirmed = asyncio.get_running_loop().create_future()
        self._waiting.append(confirmed)
        try:
            async with asyncio.timeout(ANSWER_S):
                await confirmed
        except TimeoutError:
            return False
        return True

    def release_callers(self) -> None:
        """Let no caller wait until the broker is reachable again."""
        self.reachable = False
        waiting, self._waiting = self._waiting, []
        _release(waiting)

    async def run(self, send: Callable[[bytes], Awaitable[object]], report_success: Callable[[], None]) -> None:
        """Send what is queued, while the connection lasts.

        Calls that come while a message is in flight share the next one.

        Raises TimeoutError if the broker does not confirm a message within SILENCE_S.
        """
        while True:
            await self._news.wait()
            self._news.clear()
            self._in_flight, self._queued = self.unpublished, NOTHING
            waiting, self._waiting = self._waiting, []
            try:
                if self._in_flight:
                    async with asyncio.timeout(SILENCE_S):
                        await send(encode(self._name, self._in_flight))
            except BaseException:
                self._waiting += waiting
                self._news.set()
                raise
            self._in_flight = NOTHING
            report_success()
            _release(waiting)


def _release(waiting: Sequence[asyncio.Future[None]]) -> None:
    for confirmed in waiting:
        if not confirmed.done():
            confirmed.set_result(None)
