"""The thread and the connections that all stores of the process share.

Applications have event loops of their own, several perhaps, and ones that stand still between requests; a connection belongs to one loop. So
everything that has to do with AMQP happens in one thread with one loop, which lives as long as a store uses it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Final

import aio_pika
from aio_pika.abc import AbstractConnection
from yarl import URL

from ....errors import ConfigError
from ....secret import AMQP, Secret, amqp_url

log = logging.getLogger("crudstack.amqp")

for _name in ("aiormq", "aio_pika"):
    # They report each attempt to connect and each lost connection, with tracebacks. What matters of that is said here, once.
    if (_theirs := logging.getLogger(_name)).level == logging.NOTSET:
        _theirs.setLevel(logging.CRITICAL)

CONNECT_S = 5.0
HEARTBEAT_S = 10
"""Unless the URL names one. After three times as long without a sign of life the broker ends a connection, and its queues with it."""
CLOSE_S = 2.0

Address = Secret | Callable[[], str]
"""A URL, or a function that makes one. It is called in a thread for each connection: for passwords that change."""


def checked(address: str | Secret) -> URL:
    """Return the URL for the driver. Raises ConfigError, which does not quote it, if it is none or is ambiguous."""
    text = amqp_url(address).reveal()
    with contextlib.suppress(ValueError, TypeError):
        url = URL(text)
        if url.host and url.port != 0:
            for name in ("cafile", "capath", "certfile", "keyfile"):
                if (path := url.query.get(name)) is not None and not Path(path).exists():
                    raise ConfigError(f"amqp_url: there is no {name} {path}")
            return url if "heartbeat" in url.query else url.update_query(heartbeat=str(HEARTBEAT_S))
    raise ConfigError(f"amqp_url cannot be read: expected {AMQP.like}")


class Link:
    """The connection to one broker: made when somebody asks for it, made again when it was lost."""

    def __init__(self, address: Address) -> None:
        self._address = address
        self._attempt: asyncio.Task[AbstractConnection] | None = None
        self._closing: set[asyncio.Task[None]] = set()
        self._failed = False
        self._secret: Secret | None = None  # of the last attempt

    async def connection(self) -> AbstractConnection:
        """An open connection. Whoever asks at the same time shares the attempt, and its failure."""
        attempt = self._attempt
        if attempt is not None and attempt.done() and not _is_open(attempt):
            attempt = None
        if attempt is None:
            attempt = self._attempt = asyncio.create_task(self._connect())
        return await asyncio.shield(attempt)

    async def _connect(self) -> AbstractConnection:
        address = self._address
        self._secret = address if isinstance(address, Secret) else amqp_url(await asyncio.to_thread(address))
        url = checked(self._secret)
        connection = aio_pika.Connection(url)
        try:
            async with asyncio.timeout(CONNECT_S):
                await connection.connect()
        except BaseException:
            await connection.close()  # or its destructor tries to
            raise
        connection.url = url.with_user(None)  # the driver would keep the password; a lost connection is made anew here
        return connection

    def drop(self, connection: AbstractConnection) -> None:
        """Use another one from now on."""
        attempt = self._attempt
        if attempt is not None and attempt.done() and _is_open(attempt) and attempt.result() is connection:
            self._attempt = None
        task = asyncio.create_task(_closed(connection))
        self._closing.add(task)
        task.add_done_callback(self._closing.discard)

    def fails(self, error: Exception) -> None:
        """Said by whoever cannot use it; in the log once, until it works again."""
        if not self._failed:
            self._failed = True
            words = str(error) if self._secret is None else self._secret.hide(str(error))
            log.error("RabbitMQ cannot be used: %s: %s", type(error).__name__, words)

    def works(self) -> None:
        if self._failed:
            self._failed = False
            log.warning("RabbitMQ can be used again")

    async def close(self) -> None:
        attempt, self._attempt = self._attempt, None
        if attempt is not None:
            attempt.cancel()
            await asyncio.wait([attempt])
            if _is_open(attempt):
                await _closed(attempt.result())
        if self._closing:
            await asyncio.wait(self._closing)


def _is_open(attempt: asyncio.Task[AbstractConnection]) -> bool:
    return not attempt.cancelled() and attempt.exception() is None and attempt.result().connected.is_set()


async def _closed(connection: AbstractConnection) -> None:
    with contextlib.suppress(Exception):  # what cannot be closed is closed already
        async with asyncio.timeout(CLOSE_S):
            await connection.close()


class Thread:
    """The event loop, while somebody uses it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()  # guards the rest
        self._loop: asyncio.AbstractEventLoop | None = None
        self._links: dict[Address, tuple[Link, int]] = {}  # with how many use it

    def enter(self, address: Address) -> tuple[asyncio.AbstractEventLoop, Link]:
        with self._lock:
            if self._loop is None:
                self._loop = asyncio.new_event_loop()
                # A daemon: whoever forgets to close is not kept from ending.
                threading.Thread(target=_run, args=(self._loop,), name="crudstack-amqp", daemon=True).start()
            link, users = self._links.get(address) or (Link(address), 0)
            self._links[address] = link, users + 1
            return self._loop, link

    async def exit(self, address: Address) -> None:
        """In the loop. The last one closes the connection, the last of all ends the thread."""
        with self._lock:
            link, users = self._links.pop(address)
            if users > 1:
                self._links[address] = link, users - 1
            last = not self._links
            if last:
                self._loop = None
        if users == 1:
            await link.close()
        if last:
            asyncio.get_running_loop().stop()


def _run(loop: asyncio.AbstractEventLoop) -> None:
    asyncio.set_event_loop(loop)
    try:
        loop.run_forever()
        tasks = asyncio.all_tasks(loop)
        for task in tasks:
            task.cancel()
        if tasks:
            loop.run_until_complete(asyncio.wait(tasks, timeout=CLOSE_S))
        loop.run_until_complete(loop.shutdown_asyncgens())
        loop.run_until_complete(loop.shutdown_default_executor())
    finally:
        asyncio.set_event_loop(None)
        loop.close()


THREAD: Final = Thread()
