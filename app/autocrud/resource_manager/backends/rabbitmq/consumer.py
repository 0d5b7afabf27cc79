"""What an instance hears, and how far that is done."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable

from ...runtime.moments import Moment
from .invalidation import NOTHING, Words, read, written
from .publisher import SILENCE_S

log = logging.getLogger("crudstack.amqp")

LEASE_S = 1.0
"""How old the newest marker may be."""
MARKER_S = 0.3
"""How often markers are sent while somebody reads."""
IDLE_S = 10.0
"""How long after the last read they end."""
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.2, 5.0


class OutOfOrder(Exception):
    """The broker or the driver left a message out."""


class Listener:
    """`heed` does what was heard. `lease`, `used` and `resting` are read and written by other threads too."""

    def __init__(self, name: str, heed: Callable[[Words], Awaitable[None]]) -> None:
        self._name, self._heed = name, heed
        self.lease: Moment | None = None  # when the marker was sent before which everything is done
        self.used = time.monotonic()
        self.resting = False
        self.awake = asyncio.Event()
        self.sent: Moment | None = None  # when the marker that is under way was sent
        self._number = 0
        self._returned = asyncio.Event()
        self._deliveries = 0
        self._todo = NOTHING
        self._news = asyncio.Event()
        self._heard: Moment | None = None  # when the newest marker that came back was sent
        self._drainers: list[tuple[Moment, asyncio.Future[None]]] = []

    def begin(self, missed: Words) -> None:
        """A queue is bound. `missed` is done as soon as something comes through it."""
        self._deliveries, self._heard, self.sent = 0, None, None
        self._todo = self._todo.and_(missed)

    def hear(self, delivery: int, body: bytes) -> None:
        self._deliveries += 1
        if delivery != self._deliveries:
            raise OutOfOrder(f"message {delivery} came in the place of {self._deliveries}")
        message = read(body)
        if message.sender != self._name:
            self._todo = self._todo.and_(message.words)
        elif message.marker == self._number and self.sent is not None:
            self._heard, self.sent = self.sent, None
            self._returned.set()
        self._news.set()

    async def mark(self, publish: Callable[[bytes], Awaitable[object]], works: Callable[[], None]) -> None:
        """Send markers, one after the other, while somebody reads. TimeoutError if one does not come back."""
        while True:
            self._number += 1
            self._returned.clear()
            self.awake.clear()
            self.sent = Moment.now()  # before it is sent, not after
            async with asyncio.timeout(SILENCE_S):
                await publish(written(self._name, marker=self._number))
                await self._returned.wait()
            works()
            try:
                async with asyncio.timeout(MARKER_S):
                    await self.awake.wait()
            except TimeoutError:
                await self._rest()

    async def _rest(self) -> None:
        if time.monotonic() - self.used > IDLE_S:
            self.resting = True
            if time.monotonic() - self.used > IDLE_S:  # nobody came in between
                await self.awake.wait()
            self.resting = False

    async def do(self) -> None:
        """Do what was heard, one batch after the other."""
        pause = 0.0
        while True:
            await self._news.wait()
            self._news.clear()
            todo, heard = self._todo, self._heard
            self._todo = NOTHING
            try:
                if todo:
                    await self._heed(todo)
            except BaseException as error:
                self._todo = todo.and_(self._todo)
                if not isinstance(error, Exception):
                    raise
                if not pause:
                    log.error("what other instances said cannot be done, and is tried again: %s", error)
                pause = min(max(FIRST_PAUSE_S, 2 * pause), LONGEST_PAUSE_S)
                await asyncio.sleep(pause)
                self._news.set()
                continue
            pause = 0.0
            if heard is not None:
                self.lease = heard
                self._drained(heard)

    async def drain(self, timeout_s: float) -> bool:
        """Do all that was confirmed before this call; False if that took too long."""
        done = asyncio.get_running_loop().create_future()
        self._drainers.append((Moment.now(), done))
        self.awake.set()
        try:
            async with asyncio.timeout(timeout_s):
                await done
        except TimeoutError:
            return False
        return True

    def _drained(self, heard: Moment) -> None:
        waiting = [(since, done) for since, done in self._drainers if not done.done()]
        for since, done in waiting:
            if since.running <= heard.running:
                done.set_result(None)
        self._drainers = [(since, done) for since, done in waiting if not done.done()]
        if self._drainers:
            self.awake.set()  # a marker was under way already: another one
