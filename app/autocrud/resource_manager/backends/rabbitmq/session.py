"""The part of one store in the invalidation protocol. Everything here runs in the loop of the AMQP thread.

Each `queue_prefix` has a durable fanout exchange. Each session has a queue that is bound to it, exclusive and
auto-delete, so it ends with the connection. A message that one instance publishes reaches the queues of all. A marker
is a message that an instance sends to its own queue, past the exchange.

Invariants:

- A1 *When a marker comes back, every message was received that the broker had confirmed before the marker was sent.*
  The broker confirms a message when all queues have it, and delivers a queue in order. Delivery numbers are counted,
  because the driver does not promise to keep the order.
- A2 *The lease follows the handling.* Received messages are gathered and handled in batches. The lease is the moment
  when the newest marker was sent whose earlier messages were all handled. A batch that fails is tried again, and the
  lease does not move meanwhile.
- A3 *No gap between connections.* A session first binds its queue. When the first message has come through it, the
  session handles what it may have missed before: the index is read again, and the caches are cleared unless the first
  attempt to connect succeeded. No marker counts before that is done.
- A4 *Unconfirmed invalidations are sent again.*

If the lease is at most LEASE_S old, everything was handled that was confirmed LEASE_S ago or earlier. No failure needs
to be detected for that: without a broker, a network or a running process no marker comes back.

A queue has no maximum length, because a queue that drops messages would let markers pass (A1). The heartbeat bounds it:
the broker closes the connection of an instance that does not read, and removes its queue.

docs/design/cache-invalidation.md explains why that is enough.
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
from .connection import CLOSE_S, CONNECT_S, RabbitConnection
from .consumer import FIRST_PAUSE_S, LEASE_S, LONGEST_PAUSE_S, Consumer
from .invalidation import EVERYTHING, NOTHING, Invalidation
from .publisher import Publisher

log = logging.getLogger("crudstack.amqp")


class Session:
    """Publisher and consumer of one store, on one connection after the other.

    connection   to the broker
    prefix       of the names of exchange and queue
    handle       does what an invalidation of another instance demands
    unpublished  what an earlier session could not send
    missed       what to handle when the first attempt to connect succeeds; after any later one it is EVERYTHING
    """

    def __init__(
        self,
        connection: RabbitConnection,
        prefix: str,
        handle: Callable[[Invalidation], Awaitable[None]],
        unpublished: Invalidation,
        missed: Invalidation,
    ) -> None:
        name = str(uuid4())
        self.publisher, self.consumer = Publisher(name, unpublished), Consumer(name, handle)
        self._connection, self._prefix, self._missed = connection, prefix, missed
        self._down: Moment | None = None
        self._refusal_logged = False
        self._pause = 0.0
        self._running: asyncio.Task[None] | None = None

    def unreachable_for(self) -> float | None:
        """Return for how many seconds the broker has been unreachable, None if it is reachable.

        Any thread may call this.
        """
        down, sent = self._down, self.consumer.marker_sent  # the loop of the AMQP thread may change them meanwhile
        if down is not None:
            return down.age()
        return None if sent is None or sent.age() <= LEASE_S else sent.age()

    async def publish(self, invalidation: Invalidation) -> None:
        """Publish an invalidation; see `Publisher.publish`. If the broker does not answer, it counts as unreachable."""
        if not await self.publisher.publish(invalidation):
            self._report_failure(TimeoutError("it does not answer"))
            self.publisher.release_callers()

    async def close(self) -> None:
        """Publish what is unpublished, if the broker is reachable. Then end `run`."""
        if self.publisher.unpublished:
            await self.publisher.publish(NOTHING)
        self.publisher.release_callers()
        if self._running is not None:
            self._running.cancel()
            await asyncio.wait([self._running])

    async def run(self) -> None:
        """Connect again whenever the connection was lost, until the task is cancelled."""
        self._running = running = asyncio.current_task()
        while True:
            connection = None
            try:
                connection = await self._connection.open()
                await self._use(connection)
            except AMQPChannelError as error:
                if not self._refusal_logged:
                    self._refusal_logged = True
                    log.error("RabbitMQ refuses what %r needs: %s: %s", self._prefix, type(error).__name__, error)
                self._report_failure()
                self.publisher.release_callers()
            except (Exception, asyncio.CancelledError) as error:
                # The driver raises any error for a lost connection, and may even cancel the task that waits for it.
                if isinstance(error, asyncio.CancelledError):
                    if running is not None and running.cancelling():
                        raise
                    error = ConnectionError("the connection was lost")
                self._report_failure(error)
                if connection is None:
                    self.publisher.release_callers()
                else:
                    self._connection.discard(connection)
            self._missed = EVERYTHING
            await asyncio.sleep(self._pause)
            self._pause = min(max(FIRST_PAUSE_S, 2 * self._pause), LONGEST_PAUSE_S)

    async def _use(self, connection: AbstractConnection) -> None:
        channel = connection.channel()
        try:
            async with asyncio.timeout(CONNECT_S):
                exchange, queue = await self._bind(channel)
            began = time.monotonic()
            try:
                await _until_first_failure(
                    self.publisher.run(_sender(exchange, ""), self._report_success),
                    self.consumer.send_markers(_sender(channel.default_exchange, queue), self._report_success),
                    self.consumer.handle_all(),
                    _until_closed(channel),
                )
            finally:
                if time.monotonic() - began > LONGEST_PAUSE_S:
                    self._pause = 0.0
        finally:
            with contextlib.suppress(Exception):  # then it is closed already
                async with asyncio.timeout(CLOSE_S):
                    await channel.close()

    async def _bind(self, channel: AbstractChannel) -> tuple[AbstractExchange, str]:
        await channel.initialize()
        exchange = await channel.declare_exchange(
            f"{self._prefix}invalidations", aio_pika.ExchangeType.FANOUT, durable=True
        )
        # The type is named because a broker may have another default, and only a classic queue can be exclusive.
        queue = await channel.declare_queue(
            f"{self._prefix}{uuid4()}", exclusive=True, auto_delete=True, arguments={"x-queue-type": "classic"}
        )
        await queue.bind(exchange)
        self.consumer.begin(self._missed)

        async def receive(message: AbstractIncomingMessage) -> None:
            if channel.is_closed:
                return  # the connection was given up
            try:
                self.consumer.receive(message.delivery_tag or 0, message.body)
            except Exception as error:  # the driver would ignore it
                log.error("RabbitMQ: %s: %s", type(error).__name__, error)
                await channel.close()

        # Without acknowledgements: receiving is quick, and A3 covers what a lost connection loses.
        await queue.consume(receive, no_ack=True)
        return exchange, queue.name

    def _report_success(self) -> None:
        if self._down is not None or not self.publisher.reachable:
            self._down, self._refusal_logged, self.publisher.reachable = None, False, True
            self._connection.report_success()

    def _report_failure(self, error: Exception | None = None) -> None:
        if self._down is None:
            self._down = Moment.now()
        if error is not None:
            self._connection.report_failure(error)


def _sender(exchange: AbstractExchange, key: str) -> Callable[[bytes], Awaitable[object]]:
    return lambda body: exchange.publish(aio_pika.Message(body), key, mandatory=False)


async def _until_closed(channel: AbstractChannel) -> None:
    await channel.closed()
    raise ConnectionError("it was closed")


async def _until_first_failure(*parts: Coroutine[object, object, None]) -> None:
    """Run all parts until one fails. Raises its error, and cancels the others."""
    tasks = [asyncio.create_task(part) for part in parts]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            if task.cancelled():  # the driver cancels tasks that wait for a lost connection
                raise ConnectionError("the connection was lost")
            task.result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
