"""Connections to Redis: one pool for each URL, event loop and process, for all stores.

    client = client_of("rediss://:secret@cache.example.com:6380/0")
    await client.call(store, "HGET", "article:meta", "seq")

The driver's own retries are never used, because they would send a commit twice. This module repeats a command once, if
the command may run twice. So no request fails because its connection was cut while it was idle.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import weakref
from collections.abc import AsyncIterator, Callable
from typing import Any

from ....errors import ConfigError, StoreDamaged, StoreUnavailable
from ....secret import REDIS, Secret, redis_url
from ...runtime import drivers
from ...runtime.moments import Moment
from .script_parts import Script

log = logging.getLogger("crudstack.redis")

MAX_CONNECTIONS = 16
"""Connections of a pool, if the URL has no `max_connections`. If all are in use, commands wait for their turn."""
CONNECT_TIMEOUT_S = 5.0
ANSWER_TIMEOUT_S = 10.0
CHECK_AFTER_S = 2.0
"""Seconds after which an idle connection is checked before it is used: a network may have dropped it silently."""
CHECK_S = 2.0
"""Seconds to wait for the reply to that check. The limit for a command is longer, because a script may take long."""


Password = Callable[[], str]


class ConnectionFailed(Exception):
    """Has the reason of the server or the driver why connecting failed. For logs and operators, not for clients."""


class ReplyLost(Exception):
    """A command was sent, and its reply was lost. It may have run, or may run later."""


class Client:
    """The connections of this process to one URL: a pool for each event loop.

    Each method takes the store that calls it (`user`). Connections are closed when the last store closes, or when the
    event loop ends.
    """

    def __init__(self, url: str | Secret, password: Password | None = None) -> None:
        with drivers.driver("redis"):
            import redis.asyncio
            import redis.asyncio.connection as driver
            import redis.exceptions

        self.errors: Any = redis.exceptions
        self._address = address = redis_url(url)
        connect = None
        try:
            given: dict[str, Any] = dict(driver.parse_url(address.reveal()))
            # These override the URL: replies are bytes, in the protocol of every server since Redis 6.
            given |= {"protocol": 2, "decode_responses": False}
            self._slots = int(given.pop("max_connections", MAX_CONNECTIONS))
            self.db = int(given.get("db") or 0)
            # The driver would show user and password among the settings of its connections.
            user, fixed = given.pop("username", None), given.pop("password", None)
            if password is not None or user is not None or fixed is not None:
                given["credential_provider"] = _Credentials(user, password or Secret(fixed or "").reveal)
            pool: Any = redis.asyncio.ConnectionPool(**{"socket_timeout": None, **given})
            connect = functools.partial(pool.connection_class, **pool.connection_kwargs)
            connect()  # raises an error for wrong settings; does not connect
        except (redis.exceptions.RedisError, ValueError, TypeError):
            connect = None
        if connect is None:  # outside of `except`: the driver's error may quote a part of the password
            raise ConfigError(
                f"{REDIS.name} cannot be read: expected {REDIS.like}, with parameters that the driver knows"
            )
        self._connect = connect
        self._loop_states: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, _LoopState] = (
            weakref.WeakKeyDictionary()
        )

    def _loop_state(self, user: object) -> _LoopState:
        loop = asyncio.get_running_loop()
        loop_state = self._loop_states.get(loop)
        if loop_state is None:
            loop_state = self._loop_states.setdefault(
                loop, _LoopState(self._connect, self.errors, self._slots, self._without_password)
            )
        loop_state.users.add(user)
        return loop_state

    def _without_password(self, error: Exception) -> str:
        """Return what the driver or the server says, without the password: a server that has no AUTH repeats it."""
        return self._address.hide(str(error).partition(", with args beginning with")[0])

    async def call(self, user: object, *command: Any) -> Any:
        """Run a command that may run twice, and return its reply. Raises StoreUnavailable."""
        loop_state = self._loop_state(user)
        for last in (False, True):
            try:
                return await self._send(loop_state, *command)
            except ReplyLost:
                if last:
                    raise StoreUnavailable("Redis does not answer; try again") from None
        raise AssertionError

    async def run(self, user: object, script: Script, key: str, *arguments: Any) -> Any:
        """Run a script that may run twice, and return its reply. Raises StoreUnavailable."""
        try:
            return await self.call(user, "EVALSHA", script.sha, 1, key, *arguments)
        except self.errors.NoScriptError:
            return await self.call(user, "EVAL", script.text, 1, key, *arguments)

    async def run_once(self, user: object, script: Script, key: str, *arguments: Any, limited: bool = False) -> Any:
        """Send a script at most once, and return its reply.

        limited  whether the caller limits the waiting time itself

        Raises StoreUnavailable if the script did not run, and ReplyLost if it may have run.
        """
        loop_state = self._loop_state(user)
        try:
            return await self._send(loop_state, "EVALSHA", script.sha, 1, key, *arguments, limited=limited)
        except self.errors.NoScriptError:  # a reply: the script did not run
            return await self._send(loop_state, "EVAL", script.text, 1, key, *arguments, limited=limited)

    async def run_within(self, user: object, script: Script, key: str, *arguments: Any, limit_s: float) -> Any:
        """Send a script at most once, and wait for its reply for `limit_s` seconds.

        Raises StoreUnavailable if there is no reply in time; the script may then run later. Raises ReplyLost if the
        connection was cut.
        """
        try:
            async with asyncio.timeout(limit_s):
                return await self.run_once(user, script, key, *arguments, limited=True)
        except TimeoutError:
            log.warning("Redis: no answer within %g s", limit_s)
            await self._loop_state(user).close()  # the other connections may be silent too
            raise StoreUnavailable("Redis does not answer") from None

    async def _send(self, loop_state: _LoopState, *command: Any, limited: bool = False) -> Any:
        try:
            return await loop_state.exchange(command, limited)
        except self.errors.NoScriptError:
            raise
        except (self.errors.ResponseError, self.errors.BusyLoadingError) as error:
            text = str(error)
            log.error("Redis: %s: %s", type(error).__name__, text)
            if text.startswith(("MOVED", "ASK ", "CROSSSLOT")) or "cross slot" in text.lower():
                raise ConfigError(
                    "this is a Redis Cluster, which cannot be used: one server must hold all keys"
                ) from None
            if text.startswith("WRONGTYPE"):
                raise StoreDamaged("a key of the store in Redis is of another type; restore it from a backup") from None
            raise StoreUnavailable("Redis cannot do this right now; nothing was changed") from error

    async def close(self, user: object) -> None:
        """Close the connections of this event loop, unless another store uses them."""
        loop_state = self._loop_states.get(asyncio.get_running_loop())
        if loop_state is not None:
            loop_state.users.discard(user)
            if not loop_state.users:
                await loop_state.close()


class _LoopState:
    """The connections of one event loop."""

    def __init__(self, connect: Any, errors: Any, slots: int, words: Callable[[Exception], str]) -> None:
        self.users: set[object] = set()
        self._without_password, self._connect, self._failures = words, connect, (errors.RedisError, OSError)
        self._answers = (errors.ResponseError, errors.BusyLoadingError)
        self._idle: list[tuple[Any, Moment]] = []  # connections, and when each was used last
        self._slots = asyncio.Semaphore(slots)
        self._guard: AsyncIterator[None] | None = None

    async def exchange(self, command: tuple[Any, ...], limited: bool) -> Any:
        """Send a command, and return its reply.

        Raises StoreUnavailable if it was not sent, and ReplyLost if the connection failed after that.
        """
        if self._guard is None:
            self._guard = self._until_the_loop_ends()
            await anext(self._guard)
        async with self._slots:
            connection = await self._checked_connection() or self._connect()
            try:
                if not connection.is_connected:
                    await self._open(connection)
                if limited:  # then no second time limit is set, because that costs a tenth of a request
                    return await self._exchange_on(connection, command)
                async with asyncio.timeout(ANSWER_TIMEOUT_S):
                    return await self._exchange_on(connection, command)
            except self._answers:
                raise
            except self._failures as error:
                log.warning("Redis: %s: %s", type(error).__name__, self._without_password(error))
                await connection.disconnect(nowait=True)
                await self.close()  # the other connections were probably cut too
                raise ReplyLost from None
            except BaseException:  # cancelled between the command and its reply
                await connection.disconnect(nowait=True)
                raise
            finally:
                if connection.is_connected:
                    self._idle.append((connection, Moment.now()))

    async def _checked_connection(self) -> Any:
        """Return an idle connection that works, or None if there is none.

        A connection that was used a moment ago is not checked. If one does not answer, all idle connections are closed,
        because the others have probably failed too. So only one request waits.
        """
        if not self._idle:
            return None
        connection, used = self._idle.pop()
        if used.age() <= CHECK_AFTER_S:
            return connection
        try:
            async with asyncio.timeout(CHECK_S):
                await self._exchange_on(connection, ("PING",))
        except self._failures as error:
            log.warning("Redis: an unused connection is gone: %s", type(error).__name__)
            await connection.disconnect(nowait=True)
            await self.close()
            return None
        except BaseException:
            await connection.disconnect(nowait=True)
            raise
        return connection

    async def _exchange_on(self, connection: Any, command: tuple[Any, ...]) -> Any:
        await connection.send_command(*command)
        return await connection.read_response()

    async def _open(self, connection: Any) -> None:
        try:
            async with asyncio.timeout(CONNECT_TIMEOUT_S):
                await connection.connect()
        except self._failures as error:
            log.error("Redis: %s: %s", type(error).__name__, self._without_password(error))
            await connection.disconnect(nowait=True)
            reason = ConnectionFailed(self._without_password(error))
        else:
            return
        raise StoreUnavailable("Redis cannot be reached; nothing was changed") from reason

    async def _until_the_loop_ends(self) -> AsyncIterator[None]:
        """Close the connections when the event loop shuts down.

        An event loop that shuts down closes its asynchronous generators. No other hook closes the connections of loops
        in which `close` was not called.
        """
        try:
            yield
        finally:
            await self.close()

    async def close(self) -> None:
        while self._idle:
            connection, _ = self._idle.pop()
            with contextlib.suppress(*self._failures):
                await connection.disconnect()


class _Credentials:
    """Gives the driver user and password for each new connection. The driver requires these two methods."""

    def __init__(self, user: str | None, password: Password) -> None:
        self._user, self._password = user, password

    def get_credentials(self) -> tuple[str, ...]:
        made = self._password()
        return (made,) if self._user is None else (self._user, made)

    async def get_credentials_async(self) -> tuple[str, ...]:
        return self.get_credentials()


def client_of(url: str | Secret, password: Password | None = None) -> Client:
    """Return the client of this URL: one for all stores of the process, so that they share connections."""
    return _client_of(redis_url(url), password)


@functools.lru_cache(maxsize=64)
def _client_of(url: Secret, password: Password | None) -> Client:
    return Client(url, password)
