"""Connections to PostgreSQL: one pool for each address and event loop, shared by all models; and what failures mean.

Nothing of the server's words reaches a client: they go to the log.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import psycopg
from psycopg import AsyncConnection
from psycopg.conninfo import conninfo_to_dict
from psycopg_pool import AsyncConnectionPool, PoolTimeout, TooManyRequests

from ...errors import ConfigError, CrudError, InvalidData, StoreDamaged, StoreUnavailable

log = logging.getLogger("crudstack.postgres")

Connection = AsyncConnection[Any]
Pool = AsyncConnectionPool[Connection]
Password = Callable[[], str]
"""Makes a password when a connection is made: one that expires, like a sign-in token of IAM."""

MAX_SIZE = 10
WAIT_S = 5.0
"""How long a request waits for a connection."""

PEER_GONE = {"keepalives_idle": 10, "keepalives_interval": 5, "keepalives_count": 3, "tcp_user_timeout": 15_000}
"""After how many seconds (the last one: milliseconds) a connection counts as lost whose other end acknowledges nothing."""
IDLE_IN_TRANSACTION_MS = 10_000


class _Opened(NamedTuple):
    pool: Pool
    connections: weakref.WeakSet[Connection]


class Unreachable(Exception):
    """Why no connection could be made, in the server's or the system's words: for logs and whoever starts the program."""


_opened: dict[asyncio.AbstractEventLoop, dict[tuple[str, Password | None], _Opened]] = {}
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
    opened = _opened.get(loop, {}).get((dsn, password))
    if opened is not None and not opened.pool.closed:
        return opened.pool
    connections: weakref.WeakSet[Connection] = weakref.WeakSet()
    named = conninfo_to_dict(dsn)

    async def arguments() -> dict[str, Any]:
        given: dict[str, Any] = {"autocommit": True, "connect_timeout": 5, "application_name": "crudstack"}
        given |= {name: value for name, value in PEER_GONE.items() if name not in named}
        if password is not None:
            given["password"] = await asyncio.to_thread(password)
        return given

    async def configure(connection: Connection) -> None:
        connections.add(connection)
        # The commit function looks at what others have committed while it waited; hardened servers have another default. And whoever is
        # stopped inside a transaction (SIGSTOP, a frozen Lambda) would keep its locks for as long, and everybody waiting.
        await connection.execute(
            "SET default_transaction_isolation = 'read committed';"
            f" SET idle_in_transaction_session_timeout = {IDLE_IN_TRANSACTION_MS}"
        )

    class Reporting(AsyncConnection[Any]):
        """Keeps why the last attempt failed; the pool tells nobody but its log."""

        failure: str | None = None

        @classmethod
        async def connect(cls, conninfo: str = "", **given: Any) -> Any:
            try:
                connection = await super().connect(conninfo, **given)
            except (psycopg.Error, CrudError) as error:
                cls.failure = str(error).partition("\n")[0]
                raise
            cls.failure = None
            return connection

    pool: Pool = AsyncConnectionPool(
        dsn,
        connection_class=Reporting,
        kwargs=arguments,
        configure=configure,
        min_size=0,
        max_size=max_size,
        timeout=WAIT_S,
        max_idle=300,
        reconnect_timeout=WAIT_S,
        open=False,
    )
    with _mutex:
        _leave_closed_loops()
        _opened.setdefault(loop, {})[dsn, password] = _Opened(pool, connections)
    await pool.open()
    return pool


def _leave_closed_loops() -> None:
    """Give back the connections of event loops that ended without `close`: nobody can use them any more."""
    for loop in [loop for loop in _opened if loop.is_closed()]:
        for opened in _opened.pop(loop).values():
            for connection in opened.connections:
                connection.pgconn.finish()


async def close_pools(dsn: str, password: Password | None) -> None:
    with _mutex:
        pools = _opened.get(asyncio.get_running_loop(), {})
        opened = pools.pop((dsn, password), None)
        if not pools:
            _opened.pop(asyncio.get_running_loop(), None)
    if opened is not None:
        await opened.pool.close()


def translated(error: Exception, pool: Pool) -> CrudError:
    """An error in the words of the engine. What was asked was surely not done, unless a commit lost its answer, which is another matter."""
    if isinstance(error, PoolTimeout | TooManyRequests):
        failure = getattr(pool.connection_class, "failure", None)
        log.warning("PostgreSQL: no connection within %g s%s", WAIT_S, (failure and f": {failure}") or "")
        if failure is not None:
            unavailable = StoreUnavailable("the database cannot be reached right now; nothing was changed, try again")
            unavailable.__cause__ = Unreachable(failure)
            return unavailable
        return StoreUnavailable("the database has no connection to spare right now; nothing was changed, try again")
    state = getattr(error, "sqlstate", None) or ""
    ordinary = state[:2] in ("CS", "23", "40")  # conflicts and what is tried again
    log.log(logging.DEBUG if ordinary else logging.ERROR, "PostgreSQL: %s %s", type(error).__name__, state)
    log.debug("PostgreSQL said: %s", error)
    if isinstance(error, psycopg.DataError) and state in ("", "22P05", "22021"):
        return InvalidData("the database cannot hold this text: NUL characters and unpaired surrogates are none")
    if isinstance(error, psycopg.errors.DataCorrupted | psycopg.errors.IndexCorrupted | psycopg.errors.UndefinedTable):
        return StoreDamaged("the database has lost something that was stored; its log says what")
    return StoreUnavailable("the database cannot be used right now; nothing was changed")


def is_lost(error: Exception) -> bool:
    """Whether the connection is gone, and with it perhaps an answer."""
    state = getattr(error, "sqlstate", None)
    if isinstance(error, PoolTimeout | TooManyRequests):  # there was none to be lost
        return False
    return isinstance(error, psycopg.OperationalError) and (state is None or state[:2] in ("08", "57"))
