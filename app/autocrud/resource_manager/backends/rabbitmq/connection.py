"""The thread and the connections that all stores of the process share.

A connection belongs to one event loop. An application may have several loops, and loops that are frozen between
requests. So everything that has to do with AMQP runs in one thread with one loop. The thread lives as long as a store
uses it.
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
    # They log each attempt to connect and each lost connection, with tracebacks. This module logs each state once.
    if (_theirs := logging.getLogger(_name)).level == logging.NOTSET:
        _theirs.setLevel(logging.CRITICAL)

CONNECT_S = 5.0
HEARTBEAT_S = 10
"""Seconds between heartbeats, unless the URL sets them.

A broker that receives none for three times as long closes the connection and removes its queues.
"""
CLOSE_S = 2.0

Address = Secret | Callable[[], str]
"""A URL, or a function that returns one, for passwords that change. It is called in a thread for each connection."""


def checked(address: str | Secret) -> URL:
    """Return the URL for the driver. Raises ConfigError, without the URL in its text, if it is wrong or ambiguous."""
    text = amqp_url(address).reveal()
    with contextlib.suppress(ValueError, TypeError):
        url = URL(text)
        if url.host and url.port != 0:
            for name in ("cafile", "capath", "certfile", "keyfile"):
                if (path := url.query.get(name)) is not None and not Path(path).exists():
                    raise ConfigError(f"amqp_url: there is no {name} {path}")
            return url if "heartbeat" in url.query else url.update_query(heartbeat=str(HEARTBEAT_S))
    raise ConfigError(f"amqp_url cannot be read: expected {AMQP.like}")


class RabbitConnection:
    """The connection to one broker. It is opened when it is asked for, and again if it was lost."""

    def __init__(self, address: Address) -> None:
        self._address = address
        self._attempt: asyncio.Task[AbstractConnection] | None = None
        self._closing: set[asyncio.Task[None]] = set()
        self._failed = False
        self._secret: Secret | None = None  # of the last attempt

    async def open(self) -> AbstractConnection:
        """Return an open connection. Calls at the same time share one attempt, and its failure."""
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
        connection.url = url.with_user(None)  # the driver must not keep the password; it never reconnects itself
        return connection

    def discard(self, connection: AbstractConnection) -> None:
        """Close a connection. Later calls of `open` open another one."""
        attempt = self._attempt
        if attempt is not None and attempt.done() and _is_open(attempt) and attempt.result() is connection:
            self._attempt = None
        task = asyncio.create_task(_closed(connection))
        self._closing.add(task)
        task.add_done_callback(self._closing.discard)

    def report_failure(self, error: Exception) -> None:
        """Log that the broker cannot be used. Logs once, until the broker can be used again."""
        if not self._failed:
            self._failed = True
            text = str(error) if self._secret is None else self._secret.hide(str(error))
            log.error("RabbitMQ cannot be used: %s: %s", type(error).__name__, text)

    def report_success(self) -> None:
        """Log that the broker can be used again, if a failure was logged."""
        if self._failed:
            self._failed = False
            log.warning("RabbitMQ can be used again")

    async def close(self) -> None:
        """Close the connection, and wait until discarded ones are closed."""
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
    with contextlib.suppress(Exception):  # then it is closed already
        async with asyncio.timeout(CLOSE_S):
            await connection.close()


class Thread:
    """The thread with its event loop, while a store uses it, and the connections by address."""

    def __init__(self) -> None:
        self._lock = threading.Lock()  # guards the rest
        self._loop: asyncio.AbstractEventLoop | None = None
        self._connections: dict[Address, tuple[RabbitConnection, int]] = {}  # with the number of stores that use it

    def acquire(self, address: Address) -> tuple[asyncio.AbstractEventLoop, RabbitConnection]:
        """Return the event loop and the connection to an address. Start the thread if it does not run."""
        with self._lock:
            if self._loop is None:
                self._loop = asyncio.new_event_loop()
                # A daemon thread does not keep a process alive that forgot to close its stores.
                threading.Thread(target=_run, args=(self._loop,), name="crudstack-amqp", daemon=True).start()
            connection, users = self._connections.get(address) or (RabbitConnection(address), 0)
            self._connections[address] = connection, users + 1
            return self._loop, connection

    async def release(self, address: Address) -> None:
        """Close the connection if no other store uses it, and end the thread if no store is left. Runs in its loop."""
        with self._lock:
            connection, users = self._connections.pop(address)
            if users > 1:
                self._connections[address] = connection, users - 1
            last = not self._connections
            if last:
                self._loop = None
        if users == 1:
            await connection.close()
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
