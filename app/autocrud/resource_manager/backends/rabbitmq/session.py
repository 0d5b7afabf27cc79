"""One store's part of the conversation, in the loop of the thread.

There is a durable fanout exchange for each `queue_prefix`, and for each session one queue that is bound to it, exclusive and auto-delete: it ends
with the connection. What one instance publishes reaches the queues of all. A marker is a message that an instance sends to its own queue, past
the exchange. Invariants:

- A1 *A marker that came back proves that everything was heard that the broker had confirmed before the marker was sent.* The broker confirms a
  message when all queues have it, so the marker lies behind it, and a queue is delivered in order; that the driver hands everything on in
  order is not taken for granted: delivery tags are counted.
- A2 *Heard is not done.* What is heard is gathered, and done one batch after the other. The lease, which is the moment when the newest
  marker was sent, moves only when all that was heard before that marker is done; what fails is tried again and holds the lease up.
- A3 *No gap.* A session begins by binding its queue. Only then, and once a marker or a message came back through it, what may have been missed before is
  made up for: the caches are cleared and the index is looked at. No marker counts before that is done.
- A4 *What is not confirmed is not said.* It is kept, and said again.

So whoever finds the lease at most LEASE_S old has done all that was confirmed LEASE_S ago or earlier: no matter whether the process was stopped, the
broker has died or the network is cut, for then no marker comes back. Nothing else has to notice that.

A queue has no maximal length: one that drops messages would let markers pass (A1). It is bounded by the heartbeat, with which the broker ends
the connection of whoever does not read, and the queue with it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Callable, Coroutine
from uuid import uuid4

import aio_pika
from aio_pika.abc import AbstractChannel, AbstractConnection, AbstractExchange, AbstractIncomingMessage
from aio_pika.exceptions import AMQPChannelError

from ...runtime.moments import Moment
from .connection import CLOSE_S, CONNECT_S, Link
from .consumer import FIRST_PAUSE_S, LEASE_S, LONGEST_PAUSE_S, Listener
from .invalidation import EVERYTHING, NOTHING, Words
from .publisher import Speaker

log = logging.getLogger("crudstack.amqp")


class Seat:
    """`missed`: what is to be made up for when the first attempt to connect succeeds. After that it is everything."""

    def __init__(
        self, link: Link, prefix: str, heed: Callable[[Words], Awaitable[None]], unsaid: Words, missed: Words
    ) -> None:
        name = str(uuid4())
        self.speaker, self.listener = Speaker(name, unsaid), Listener(name, heed)
        self._link, self._prefix, self._missed = link, prefix, missed
        self._down: Moment | None = None
        self._complained = False
        self._pause = 0.0
        self._running: asyncio.Task[None] | None = None

    def silent_for(self) -> float | None:
        """For how many seconds it cannot be used, None if it can."""
        down, sent = self._down, self.listener.sent  # which another thread changes
        if down is not None:
            return down.age()
        return None if sent is None or sent.age() <= LEASE_S else sent.age()

    async def say(self, words: Words) -> None:
        if not await self.speaker.say(words):
            self._fell(TimeoutError("it does not answer"))
            self.speaker.give_up()

    async def leave(self) -> None:
        """End `run`, after what is unsaid was said if that can be."""
        if self.speaker.unsaid:
            await self.speaker.say(NOTHING)
        self.speaker.give_up()
        if self._running is not None:
            self._running.cancel()
            await asyncio.wait([self._running])

    async def run(self) -> None:
        """One session after the other."""
        self._running = running = asyncio.current_task()
        while True:
            connection = None
            try:
                connection = await self._link.connection()
                await self._session(connection)
            except AMQPChannelError as error:
                if not self._complained:
                    self._complained = True
                    log.error("RabbitMQ refuses what %r needs: %s: %s", self._prefix, type(error).__name__, error)
                self._fell()
                self.speaker.give_up()
            except (Exception, asyncio.CancelledError) as error:
                # Whatever the driver says of a connection that is no more; whoever waits for it may even be cancelled by the driver.
                if isinstance(error, asyncio.CancelledError):
                    if running is not None and running.cancelling():
                        raise
                    error = ConnectionError("the connection was lost")
                self._fell(error)
                if connection is None:
                    self.speaker.give_up()
                else:
                    self._link.drop(connection)
            self._missed = EVERYTHING
            await asyncio.sleep(self._pause)
            self._pause = min(max(FIRST_PAUSE_S, 2 * self._pause), LONGEST_PAUSE_S)

    async def _session(self, connection: AbstractConnection) -> None:
        channel = connection.channel()
        try:
            async with asyncio.timeout(CONNECT_S):
                exchange, queue = await self._join(channel)
            began = time.monotonic()
            try:
                await _first_end(
                    self.speaker.speak(_publisher(exchange, ""), self._works),
                    self.listener.mark(_publisher(channel.default_exchange, queue), self._works),
                    self.listener.do(),
                    _end(channel),
                )
            finally:
                if time.monotonic() - began > LONGEST_PAUSE_S:
                    self._pause = 0.0
        finally:
            with contextlib.suppress(Exception):  # what cannot be closed is closed already
                async with asyncio.timeout(CLOSE_S):
                    await channel.close()

    async def _join(self, channel: AbstractChannel) -> tuple[AbstractExchange, str]:
        await channel.initialize()
        exchange = await channel.declare_exchange(
            f"{self._prefix}invalidations", aio_pika.ExchangeType.FANOUT, durable=True
        )
        # The type is named because a broker may have another default, and only a classic queue can be exclusive.
        queue = await channel.declare_queue(
            f"{self._prefix}{uuid4()}", exclusive=True, auto_delete=True, arguments={"x-queue-type": "classic"}
        )
        await queue.bind(exchange)
        self.listener.begin(self._missed)

        async def hear(message: AbstractIncomingMessage) -> None:
            if channel.is_closed:
                return  # of a session that has ended
            try:
                self.listener.hear(message.delivery_tag or 0, message.body)
            except Exception as error:  # nobody else would look at it
                log.error("RabbitMQ: %s: %s", type(error).__name__, error)
                await channel.close()

        # Without acknowledgements: hearing is quick, and what a lost connection loses is made up for.
        await queue.consume(hear, no_ack=True)
        return exchange, queue.name

    def _works(self) -> None:
        if self._down is not None or not self.speaker.reachable:
            self._down, self._complained, self.speaker.reachable = None, False, True
            self._link.works()

    def _fell(self, error: Exception | None = None) -> None:
        if self._down is None:
            self._down = Moment.now()
        if error is not None:
            self._link.fails(error)


def _publisher(exchange: AbstractExchange, key: str) -> Callable[[bytes], Awaitable[object]]:
    return lambda body: exchange.publish(aio_pika.Message(body), key, mandatory=False)


async def _end(channel: AbstractChannel) -> None:
    await channel.closed()
    raise ConnectionError("it was closed")


async def _first_end(*parts: Coroutine[object, object, None]) -> None:
    """Run all until one fails, with that failure."""
    tasks = [asyncio.create_task(part) for part in parts]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            if task.cancelled():  # the driver does so to whoever waits for a connection that is no more
                raise ConnectionError("the connection was lost")
            task.result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
