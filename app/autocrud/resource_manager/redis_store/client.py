"""Connections to Redis: one pool for each URL, event loop and process, for all stores.

    client = client_of("rediss://:secret@cache.example.com:6380/0")
    await client.call(store, "HGET", "article:meta", "seq")

The driver's own retries are never used: it would send a commit twice. What may be repeated is repeated here, once, so a connection that was cut
while nobody used it costs nobody a request.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import re
import weakref
from collections.abc import AsyncIterator, Callable
from typing import Any
from urllib.parse import urlsplit

from ...errors import ConfigError, StoreUnavailable
from .. import drivers
from .scripts import Script

log = logging.getLogger("crudstack.redis")

MAX_CONNECTIONS = 16
"""Of a pool, if the URL names no `max_connections`. Commands that find all in use wait for their turn."""
CONNECT_TIMEOUT_S = 5.0
ANSWER_TIMEOUT_S = 10.0


Password = Callable[[], str]


class Unanswered(Exception):
    """A command was sent, and its answer never came: it may have been done, or will be."""


class Client:
    """`user` is the store that asks: connections are closed when the last one closes, or the event loop ends."""

    def __init__(self, url: str, password: Password | None = None) -> None:
        with drivers.driver("redis"):
            import redis.asyncio
            import redis.asyncio.connection as driver
            import redis.exceptions

        self.errors: Any = redis.exceptions
        try:
            where = urlsplit(url)
            if where.scheme != "unix" and re.fullmatch(r"(/[0-9]*)?", where.path) is None:
                raise ValueError("the driver would take database 0")
            given: dict[str, Any] = dict(driver.parse_url(url))
            # Whatever the URL asks for: answers are bytes, as every server since Redis 6 sends them.
            given |= {"protocol": 2, "decode_responses": False}
            self._slots = int(given.pop("max_connections", MAX_CONNECTIONS))
            self.db = int(given.get("db") or 0)
            if password is not None:
                given["credential_provider"] = _Credentials(given.pop("username", None), password)
                given.pop("password", None)
            pool: Any = redis.asyncio.ConnectionPool(**{"socket_timeout": None, **given})
            self._connect = functools.partial(pool.connection_class, **pool.connection_kwargs)
            self._connect()  # says what is wrong with the settings, and does nothing else
        except (redis.exceptions.RedisError, ValueError, TypeError):
            # Without the driver's words, which may quote a part of the password.
            raise ConfigError(
                "redis_url cannot be read; expected redis://[[user]:password@]host:port/db, where db is a number,"
                " rediss:// with TLS or unix://, with special characters percent-encoded"
            ) from None
        self._rooms: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, _Room] = weakref.WeakKeyDictionary()

    def _room(self, user: object) -> _Room:
        loop = asyncio.get_running_loop()
        room = self._rooms.get(loop)
        if room is None:
            room = self._rooms.setdefault(loop, _Room(self._connect, self.errors, self._slots))
        room.users.add(user)
        return room

    async def call(self, user: object, *command: Any) -> Any:
        """A command that may be done twice. StoreUnavailable."""
        room = self._room(user)
        for last in (False, True):
            try:
                return await self._send(room, *command)
            except Unanswered:
                if last:
                    raise StoreUnavailable("Redis does not answer; try again") from None
        raise AssertionError

    async def run(self, user: object, script: Script, key: str, *arguments: Any) -> Any:
        """A script that may be run twice. StoreUnavailable."""
        try:
            return await self.call(user, "EVALSHA", script.sha, 1, key, *arguments)
        except self.errors.NoScriptError:
            return await self.call(user, "EVAL", script.text, 1, key, *arguments)

    async def run_once(self, user: object, script: Script, key: str, *arguments: Any, limited: bool = False) -> Any:
        """A script that is sent at most once. StoreUnavailable: it surely did not run; Unanswered. `limited`: the caller stops waiting by itself."""
        room = self._room(user)
        try:
            return await self._send(room, "EVALSHA", script.sha, 1, key, *arguments, limited=limited)
        except self.errors.NoScriptError:  # an answer: it did not run
            return await self._send(room, "EVAL", script.text, 1, key, *arguments, limited=limited)

    async def ask(self, user: object, script: Script, key: str, *arguments: Any, limit_s: float) -> Any:
        """As `run_once`, by whoever can do without the answer: StoreUnavailable too if it takes longer, and it may then be done later."""
        try:
            async with asyncio.timeout(limit_s):
                return await self.run_once(user, script, key, *arguments, limited=True)
        except TimeoutError:
            log.warning("Redis: no answer within %g s", limit_s)
            await self._room(user).close()  # the other connections may lead to the same silence
            raise StoreUnavailable("Redis does not answer") from None

    async def _send(self, room: _Room, *command: Any, limited: bool = False) -> Any:
        try:
            return await room.exchange(command, limited)
        except self.errors.NoScriptError:
            raise
        except (self.errors.ResponseError, self.errors.BusyLoadingError) as error:
            text = str(error)
            log.error("Redis: %s: %s", type(error).__name__, text)
            if text.startswith(("MOVED", "ASK ", "CROSSSLOT")) or "cross slot" in text.lower():
                raise ConfigError(
                    "this is a Redis Cluster, which cannot be used: one server must hold all keys"
                ) from None
            raise StoreUnavailable("Redis cannot do this right now; nothing was changed") from error

    async def close(self, user: object) -> None:
        """Close the connections of this event loop, unless another store uses them."""
        room = self._rooms.get(asyncio.get_running_loop())
        if room is not None:
            room.users.discard(user)
            if not room.users:
                await room.close()


class _Room:
    """The connections of one event loop."""

    def __init__(self, connect: Any, errors: Any, slots: int) -> None:
        self.users: set[object] = set()
        self._connect, self._failures = connect, (errors.RedisError, OSError)
        self._answers = (errors.ResponseError, errors.BusyLoadingError)
        self._idle: list[Any] = []
        self._slots = asyncio.Semaphore(slots)
        self._guard: AsyncIterator[None] | None = None

    async def exchange(self, command: tuple[Any, ...], limited: bool) -> Any:
        """Send a command and read its answer. StoreUnavailable: it was not sent."""
        if self._guard is None:
            self._guard = self._until_the_loop_ends()
            await anext(self._guard)
        async with self._slots:
            connection = self._idle.pop() if self._idle else self._connect()
            try:
                if not connection.is_connected:
                    await self._open(connection)
                if limited:  # a second clock would be a tenth of what an answer takes
                    return await self._ask(connection, command)
                async with asyncio.timeout(ANSWER_TIMEOUT_S):
                    return await self._ask(connection, command)
            except self._answers:
                raise
            except self._failures as error:
                log.warning("Redis: %s: %s", type(error).__name__, error)
                await connection.disconnect(nowait=True)
                await self.close()  # what was cut was probably not cut alone
                raise Unanswered from None
            except BaseException:  # cancelled between the question and the answer
                await connection.disconnect(nowait=True)
                raise
            finally:
                if connection.is_connected:
                    self._idle.append(connection)

    async def _ask(self, connection: Any, command: tuple[Any, ...]) -> Any:
        await connection.send_command(*command)
        return await connection.read_response()

    async def _open(self, connection: Any) -> None:
        try:
            async with asyncio.timeout(CONNECT_TIMEOUT_S):
                await connection.connect()
        except self._failures as error:
            log.error("Redis: %s: %s", type(error).__name__, error)
            await connection.disconnect(nowait=True)
            raise StoreUnavailable("Redis cannot be reached; nothing was changed") from error

    async def _until_the_loop_ends(self) -> AsyncIterator[None]:
        """An event loop that is shut down closes its asynchronous generators: the one moment to close the connections of loops in which
        nobody called `close`."""
        try:
            yield
        finally:
            await self.close()

    async def close(self) -> None:
        while self._idle:
            with contextlib.suppress(*self._failures):
                await self._idle.pop().disconnect()


class _Credentials:
    """What the driver asks whenever it connects; it knows the type by these two methods."""

    def __init__(self, user: str | None, password: Password) -> None:
        self._user, self._password = user, password

    def get_credentials(self) -> tuple[str, ...]:
        made = self._password()
        return (made,) if self._user is None else (self._user, made)

    async def get_credentials_async(self) -> tuple[str, ...]:
        return self.get_credentials()


@functools.lru_cache(maxsize=64)
def client_of(url: str, password: Password | None = None) -> Client:
    """The client of this URL: one for all stores of the process, so that they share connections."""
    return Client(url, password)
