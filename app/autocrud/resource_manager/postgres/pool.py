"""Connections to PostgreSQL: one pool for each address and event loop, shared by all models; and what failures mean.

Nothing of the server's words reaches a client: they go to the log.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
import threading
import weakref
from collections.abc import Awaitable, Callable, Iterator
from typing import Any, TypeVar

import psycopg
from psycopg import AsyncConnection
from psycopg.conninfo import conninfo_to_dict
from psycopg_pool import AsyncConnectionPool, PoolTimeout, TooManyRequests

from ...errors import ConfigError, CrudError, InvalidData, StoreDamaged, StoreUnavailable

log = logging.getLogger("crudstack.postgres")

T = TypeVar("T")
Connection = AsyncConnection[Any]
Password = Callable[[], str]
"""Makes a password when a connection is made: one that expires, like a sign-in token of IAM."""

MAX_SIZE = 10
WAIT_S = 5.0
"""How long a request waits for a connection."""
STATEMENT_S = 10.0
"""How long the server works at a statement, including its wait for locks. Then it ends it, and nothing of it stays."""
ANSWER_S = 12.0
"""How long an answer is waited for. Then the connection counts as lost: something between us and the server swallows what is sent."""
IDLE_IN_TRANSACTION_S = 10.0

TOOK_TOO_LONG = "57014"
"""SQLSTATE of what STATEMENT_S ended."""

PEER_GONE = {"keepalives_idle": 10, "keepalives_interval": 5, "keepalives_count": 3, "tcp_user_timeout": 15_000}
"""After how many seconds (the last one: milliseconds) a connection counts as lost whose other end acknowledges nothing."""


class Unreachable(Exception):
    """Why no connection could be made, in the server's or the system's words: for logs and whoever starts the program."""


class Pool:
    """The connections of one event loop to one address."""

    def __init__(self, dsn: str, password: Password | None, max_size: int) -> None:
        self._named, self._password = conninfo_to_dict(dsn), password
        self._clock = asyncio.get_running_loop().time
        self._made: weakref.WeakKeyDictionary[Connection, float] = weakref.WeakKeyDictionary()
        self._drained = 0.0
        self._failure: str | None = None  # of the last attempt to connect; psycopg's pool tells nobody but its log
        self._pool: AsyncConnectionPool[Connection] = AsyncConnectionPool(
            dsn,
            connection_class=self._connection_class(),
            kwargs=self._arguments,
            configure=self._configure,
            min_size=0,
            max_size=max_size,
            timeout=WAIT_S,
            max_idle=300,
            reconnect_timeout=WAIT_S,
            open=False,
        )

    @property
    def closed(self) -> bool:
        return self._pool.closed

    async def open(self) -> None:
        await self._pool.open()

    async def close(self) -> None:
        await self._pool.close()

    def abandon(self) -> None:
        """Give back the connections without the event loop, which has ended."""
        for connection in self._made:
            connection.pgconn.finish()

    async def run(self, work: Callable[[Connection], Awaitable[T]], *, again: bool = True, limited: bool = True) -> T:
        """Run something on a connection, within ANSWER_S if `limited`. `again`: once more where the connection turns out to be gone.

        CrudError, with what psycopg raised as its cause: what was asked was surely not done, unless `is_lost` says so of the cause.
        """
        try:
            began = self._clock()
            try:
                return await self._once(work, limited)
            except psycopg.OperationalError as error:
                if not again or not is_lost(error) or self._clock() - began > ANSWER_S:
                    raise
                return await self._once(work, limited)
        except psycopg.Error as error:
            meant = self._translated(error)
            raise meant from (meant.__cause__ or error)

    async def _once(self, work: Callable[[Connection], Awaitable[T]], limited: bool) -> T:
        async with self._pool.connection() as connection:
            try:
                with _cut_after(ANSWER_S, connection) if limited else contextlib.nullcontext():
                    return await work(connection)
            except psycopg.OperationalError as error:
                if is_lost(error) and self._made[connection] >= self._drained:
                    self._drained = self._clock()
                    await self._pool.drain()  # those of its time probably are as it is
                raise

    def _connection_class(self) -> type[Connection]:
        pool = self

        class Connected(AsyncConnection[Any]):
            @classmethod
            async def connect(cls, conninfo: str = "", **given: Any) -> Any:
                try:
                    connection = await super().connect(conninfo, **given)
                except (psycopg.Error, CrudError) as error:
                    pool._failure = str(error).partition("\n")[0]
                    raise
                pool._failure = None
                pool._made[connection] = pool._clock()
                return connection

        return Connected

    async def _arguments(self) -> dict[str, Any]:
        given: dict[str, Any] = {"autocommit": True, "connect_timeout": 5, "application_name": "crudstack"}
        given |= {name: value for name, value in PEER_GONE.items() if name not in self._named}
        if self._password is not None:
            given["password"] = await asyncio.to_thread(self._password)
        return given

    async def _configure(self, connection: Connection) -> None:
        # The commit function looks at what others have committed while it waited; hardened servers have another default. And whoever is
        # stopped inside a transaction (SIGSTOP, a frozen Lambda) would keep its locks for as long, and everybody waiting.
        with _cut_after(WAIT_S, connection):
            await connection.execute(
                "SET default_transaction_isolation = 'read committed';"
                f" SET statement_timeout = {STATEMENT_S * 1000:.0f};"
                f" SET idle_in_transaction_session_timeout = {IDLE_IN_TRANSACTION_S * 1000:.0f}"
            )

    def _translated(self, error: Exception) -> CrudError:
        if isinstance(error, PoolTimeout | TooManyRequests):
            reason = f": {self._failure}" if self._failure else ""
            log.warning("PostgreSQL: no connection within %g s%s", WAIT_S, reason)
            if self._failure is not None:
                unavailable = StoreUnavailable(
                    "the database cannot be reached right now; nothing was changed, try again"
                )
                unavailable.__cause__ = Unreachable(self._failure)
                return unavailable
            return StoreUnavailable("the database has no connection to spare right now; nothing was changed, try again")
        state = getattr(error, "sqlstate", None) or ""
        ordinary = state[:2] in ("CS", "23", "40")  # conflicts and what is tried again
        log.log(logging.DEBUG if ordinary else logging.ERROR, "PostgreSQL: %s %s", type(error).__name__, state)
        log.debug("PostgreSQL said: %s", error)
        if isinstance(error, psycopg.DataError) and state in ("", "22P05", "22021"):
            return InvalidData("the database cannot hold this text: NUL characters and unpaired surrogates are none")
        if isinstance(
            error, psycopg.errors.DataCorrupted | psycopg.errors.IndexCorrupted | psycopg.errors.UndefinedTable
        ):
            return StoreDamaged("the database has lost something that was stored; its log says what")
        if state == TOOK_TOO_LONG:
            return StoreUnavailable(f"the database took longer than {STATEMENT_S:g} s; nothing was changed")
        return StoreUnavailable("the database cannot be used right now; nothing was changed")


@contextlib.contextmanager
def _cut_after(seconds: float, connection: Connection) -> Iterator[None]:
    """Whoever still waits for an answer then hears that the connection is lost."""
    timer = asyncio.get_running_loop().call_later(seconds, _cut, connection)
    try:
        yield
    finally:
        timer.cancel()


def _cut(connection: Connection) -> None:
    # Cancelling psycopg would wait for the server. Closing would free the number of a socket that the event loop still looks at.
    with contextlib.suppress(OSError, psycopg.Error), socket.socket(fileno=os.dup(connection.fileno())) as same:
        same.shutdown(socket.SHUT_RDWR)


_pools: dict[asyncio.AbstractEventLoop, dict[tuple[str, Password | None], Pool]] = {}
_mutex = threading.Lock()


def check_dsn(dsn: str) -> None:
    """ConfigError unless it can be read; it is not quoted, for it may hold a password."""
    try:
        conninfo_to_dict(dsn)
    except psycopg.ProgrammingError:
        raise ConfigError(
            "the address of PostgreSQL cannot be read: expected postgresql://user:password@host:port/database"
        ) from None


async def pool_of(dsn: str, password: Password | None, max_size: int) -> Pool:
    """The open pool of this event loop."""
    loop = asyncio.get_running_loop()
    pool = _pools.get(loop, {}).get((dsn, password))
    if pool is not None and not pool.closed:
        return pool
    pool = Pool(dsn, password, max_size)
    with _mutex:
        for ended in [loop for loop in _pools if loop.is_closed()]:  # without `close`: nobody can use them any more
            for abandoned in _pools.pop(ended).values():
                abandoned.abandon()
        _pools.setdefault(loop, {})[dsn, password] = pool
    await pool.open()
    return pool


async def close_pools(dsn: str, password: Password | None) -> None:
    with _mutex:
        pools = _pools.get(asyncio.get_running_loop(), {})
        pool = pools.pop((dsn, password), None)
        if not pools:
            _pools.pop(asyncio.get_running_loop(), None)
    if pool is not None:
        await pool.close()


def is_lost(error: Exception) -> bool:
    """Whether the connection is gone, and with it perhaps an answer."""
    if isinstance(error, PoolTimeout | TooManyRequests):  # there was none to be lost
        return False
    state = getattr(error, "sqlstate", None)
    return isinstance(error, psycopg.OperationalError) and (
        state is None or (state[:2] in ("08", "57") and state != TOOK_TOO_LONG)
    )
