"""Receives the invalidations of other instances, and knows until when all of them were handled."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable

from ...runtime.moments import Moment
from .invalidation import NOTHING, Invalidation, decode, encode
from .publisher import SILENCE_S

log = logging.getLogger("crudstack.amqp")

LEASE_S = 1.0
"""How old the lease may be: how long ago the newest marker was sent whose earlier messages were all handled."""
MARKER_S = 0.3
"""How often a marker is sent while callers read."""
IDLE_S = 10.0
"""How long after the last read no more markers are sent."""
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.2, 5.0


class OutOfOrder(Exception):
    """The broker or the driver left a message out."""


class Consumer:
    """The messages of one queue.

    name    of the session; messages that it sent itself are not handled
    handle  does what an invalidation demands. It is called again if it raises.

    Other threads read and write `lease`, `last_read` and `is_idle` too. `lease` is the moment before which every
    confirmed message was handled. `marker_sent` is when the marker was sent that has not come back yet.
    """

    def __init__(self, name: str, handle: Callable[[Invalidation], Awaitable[None]]) -> None:
        self._name, self._handle = name, handle
        self.lease: Moment | None = None
        self.last_read = time.monotonic()
        self.is_idle = False
        self.awake = asyncio.Event()
        self.marker_sent: Moment | None = None
        self._number = 0
        self._returned = asyncio.Event()
        self._deliveries = 0
        self._unhandled = NOTHING
        self._news = asyncio.Event()
        self._marker_received: Moment | None = None  # when the newest marker that came back was sent
        self._drainers: list[tuple[Moment, asyncio.Future[None]]] = []

    def begin(self, missed: Invalidation) -> None:
        """Start with a queue that was just bound. `missed` is handled as soon as a message comes through the queue."""
        self._deliveries, self._marker_received, self.marker_sent = 0, None, None
        self._unhandled = self._unhandled.merged_with(missed)

    def receive(self, delivery: int, body: bytes) -> None:
        """Take a message, number `delivery` of this queue, from 1. Raises OutOfOrder if a number was left out."""
        self._deliveries += 1
        if delivery != self._deliveries:
            raise OutOfOrder(f"message {delivery} came in the place of {self._deliveries}")
        message = decode(body)
        if message.sender != self._name:
            self._unhandled = self._unhandled.merged_with(message.invalidation)
        elif message.marker == self._number and self.marker_sent is not None:
            self._marker_received, self.marker_sent = self.marker_sent, None
            self._returned.set()
        self._news.set()

    async def send_markers(
        self, send: Callable[[bytes], Awaitable[object]], report_success: Callable[[], None]
    ) -> None:
        """Send one marker after the other while callers read. Raises TimeoutError if one does not come back."""
        while True:
            self._number += 1
            self._returned.clear()
            self.awake.clear()
            self.marker_sent = Moment.now()  # before it is sent, not after
            async with asyncio.timeout(SILENCE_S):
                await send(encode(self._name, marker=self._number))
                await self._returned.wait()
            report_success()
            try:
                async with asyncio.timeout(MARKER_S):
                    await self.awake.wait()
            except TimeoutError:
                await self._idle()

    async def _idle(self) -> None:
        if time.monotonic() - self.last_read > IDLE_S:
            self.is_idle = True
            if time.monotonic() - self.last_read > IDLE_S:  # no read came in between
                await self.awake.wait()
            self.is_idle = False

    async def handle_all(self) -> None:
        """Handle received invalidations in batches. A batch that fails is tried again, with what came since."""
        pause = 0.0
        while True:
            await self._news.wait()
            self._news.clear()
            batch, marker = self._unhandled, self._marker_received
            self._unhandled = NOTHING
            try:
                if batch:
                    await self._handle(batch)
            except BaseException as error:
                self._unhandled = batch.merged_with(self._unhandled)
                if not isinstance(error, Exception):
                    raise
                if not pause:
                    log.error("what other instances said cannot be done, and is tried again: %s", error)
                pause = min(max(FIRST_PAUSE_S, 2 * pause), LONGEST_PAUSE_S)
                await asyncio.sleep(pause)
                self._news.set()
                continue
            pause = 0.0
            if marker is not None:
                self.lease = marker
                self._release_drainers(marker)

    async def drain(self, timeout_s: float) -> bool:
        """Wait until all that was confirmed before this call is handled. Return False after `timeout_s` seconds."""
        done = asyncio.get_running_loop().create_future()
        self._drainers.append((Moment.now(), done))
        self.awake.set()
        try:
            async with asyncio.timeout(timeout_s):
                await done
        except TimeoutError:
            return False
        return True

    def _release_drainers(self, marker: Moment) -> None:
        waiting = [(since, done) for since, done in self._drainers if not done.done()]
        for since, done in waiting:
            if since.running <= marker.running:
                done.set_result(None)
        self._drainers = [(since, done) for since, done in waiting if not done.done()]
        if self._drainers:
            self.awake.set()  # they came after the marker was sent, and need another one
