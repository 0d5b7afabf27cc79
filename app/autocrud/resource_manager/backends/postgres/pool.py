"""Connections to PostgreSQL, and the translation of their failures.

There is one pool for each address and event loop, and all models share it. Messages of the server go to the log, never
to a client.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
import threading
import weakref
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import Any, TypeVar

import psycopg
from psycopg.conninfo import conninfo_to_dict
from psycopg.pq import TransactionStatus

from ....errors import ConfigError, CrudError, InvalidData, MetadataTooLarge, StoreDamaged, StoreUnavailable
from ....secret import POSTGRES, Secret, postgres_url
from ...runtime.moments import Moment
from .session import ISOLATION, SessionlessConnection

log = logging.getLogger("crudstack.postgres")

T = TypeVar("T")
Connection = SessionlessConnection
Password = Callable[[], str]
"""Returns the password for a new connection, if passwords expire, like authentication tokens of IAM."""

MAX_SIZE = 10
WAIT_S = 5.0
"""Seconds that a request waits for a free connection, and seconds that it waits for a new one."""
FIRST_PAUSE_S = 0.05
MAX_IDLE_S = 300.0
"""Seconds after which an unused connection is closed; less than the limit that `app.create_db_user` sets."""
STATEMENT_S = 10.0
"""Seconds, including waits for locks, after which the server cancels a statement and rolls it back."""
ANSWER_S = 12.0
"""Seconds to wait for a reply. After that the connection counts as lost, because the network may drop its messages."""
CHECK_AFTER_S = 2.0
"""Seconds after which an idle connection is checked before it is used: a network may have dropped it silently."""
CHECK_S = 2.0
"""Seconds to wait for the reply to that check. A statement may take longer, so its limit is longer."""
IDLE_IN_TRANSACTION_S = 10.0

TOOK_TOO_LONG = "57014"
"""SQLSTATE of a statement that the server cancelled after STATEMENT_S."""
TOO_LARGE = "54000"
"""SQLSTATE of an index entry above 2.7 KB: a long id, which earlier versions accepted, and an indexed text."""

PEER_GONE = {"keepalives_idle": 10, "keepalives_interval": 5, "keepalives_count": 3, "tcp_user_timeout": 5_000}
"""Settings of TCP. A connection is lost if its other end acknowledges nothing for about 25 s, or for 5 s (here in
milliseconds) while sent data is unacknowledged."""

UNREACHABLE = "the database cannot be reached right now; nothing was changed, try again"


def repeat_s() -> float:
    """Return for how many seconds after its start a request is repeated if its connection was lost.

    In this time it may have waited for one check and one reply that never came.
    """
    return ANSWER_S + CHECK_S


def server_settings() -> dict[str, str]:
    """Return the settings of the server that statements need, as values by name.

    The idle limit frees the locks of a client that is stopped in a transaction.
    """
    return {
        "default_transaction_isolation": ISOLATION,  # hardened servers have another default
        "statement_timeout": f"{STATEMENT_S * 1000:.0f}",
        "idle_in_transaction_session_timeout": f"{IDLE_IN_TRANSACTION_S * 1000:.0f}",
    }


class Unreachable(Exception):
    """Has the reason of the server or the driver why connecting failed. For logs and operators, not for clients."""


class Pool:
    """The connections of one event loop to one address.

    psycopg's own pool (3.3) is not used, for two reasons: a cancelled caller may lose one of its connections for ever,
    and that pool keeps an event loop from ending. This pool takes and returns connections without waiting.
    """

    def __init__(self, dsn: Secret, password: Password | None, max_size: int, prepare: bool | None = None) -> None:
        self._dsn, self._password, self._prepare = dsn, password, prepare
        self._settings_in_dsn = frozenset(conninfo_to_dict(dsn.reveal()))
        self._clock = asyncio.get_running_loop().time
        self._slots = asyncio.Semaphore(max_size)
        self._idle: deque[tuple[float, Connection]] = deque()  # with the time since when each is unused, latest last
        self._created_at: weakref.WeakKeyDictionary[Connection, float] = weakref.WeakKeyDictionary()
        self._retired_before = 0.0  # connections that were created before this time are retired
        self._failure: str | None = None  # why the last attempt to connect failed
        self._explicit_isolation = False

    def request_isolation(self) -> None:
        """Ask for READ COMMITTED in each transaction from now on: a connection of the server has another default."""
        self._explicit_isolation = True

    async def run(self, work: Callable[[Connection], Awaitable[T]], *, again: bool = True, limited: bool = True) -> T:
        """Run `work` on a connection, and return its result.

        again    whether to run it once more if the connection turns out to be lost
        limited  whether to stop after ANSWER_S

        Raises CrudError, with the error of psycopg as its cause. The work was not done, unless `is_lost` is true of the
        cause.
        """
        with translating():
            began = self._clock()
            try:
                return await self._run_once(work, limited)
            except psycopg.OperationalError as error:
                if not again or not is_lost(error) or self._clock() - began > repeat_s():
                    raise
                return await self._run_once(work, limited)

    @contextlib.asynccontextmanager
    async def own_connection(self) -> AsyncIterator[Connection]:
        """Open a connection for the caller alone, beside those of the pool. It is closed at the end of the context.

        Its statements are not stopped after ANSWER_S. Raises StoreUnavailable, and the errors of psycopg as CrudError.
        """
        connection = await self._connect()
        try:
            with translating():
                yield connection
        finally:
            _close(connection)

    def silent_for(self, seconds: float) -> StoreUnavailable:
        """Return the error for a database that did not answer for so long."""
        return StoreUnavailable(
            f"the database gave no answer within {seconds:g} s" if self._failure is None else UNREACHABLE
        )

    async def _run_once(self, work: Callable[[Connection], Awaitable[T]], limited: bool) -> T:
        await self._acquire_slot()
        try:
            connection = await self._checked_connection() or await self._connect()
            if self._explicit_isolation:
                connection.request_isolation()
            try:
                with _cut_after(ANSWER_S, connection) if limited else contextlib.nullcontext():
                    return await work(connection)
            except psycopg.OperationalError as error:
                if is_lost(error) and self._created_at[connection] >= self._retired_before:
                    self.retire()  # connections of the same age are probably lost too
                raise
            finally:
                self._give_back(connection)
        finally:
            self._slots.release()

    async def _acquire_slot(self) -> None:
        if not self._slots.locked():  # then it gets a slot at once
            await self._slots.acquire()
            return
        try:
            async with asyncio.timeout(WAIT_S):
                await self._slots.acquire()
        except TimeoutError:
            log.warning("PostgreSQL: no connection became free within %g s", WAIT_S)
            raise StoreUnavailable(
                "the database has no connection to spare right now; nothing was changed, try again"
            ) from None

    async def _checked_connection(self) -> Connection | None:
        """Return an idle connection that works, or None if there is none.

        A connection that was used a moment ago is not checked. If one does not answer, all connections of its age are
        retired, because they have probably failed too. So only one request waits.
        """
        connection = self._pop_idle()
        if connection is None or connection.used.age() <= CHECK_AFTER_S:
            return connection
        try:
            with _cut_after(CHECK_S, connection):
                await connection.check()
        except psycopg.Error as error:
            log.warning("PostgreSQL: an unused connection is gone: %s", type(error).__name__)
            if self._created_at[connection] >= self._retired_before:
                self.retire()
            _close(connection)
            return None
        except BaseException:
            _close(connection)
            raise
        return connection

    def _pop_idle(self) -> Connection | None:
        """Return an unused connection that is not too old, or None. After a freeze of AWS Lambda, all are too old."""
        self._close_idle()
        return self._idle.pop()[1] if self._idle else None

    def _close_idle(self) -> None:
        while self._idle and self._idle[0][0] < self._clock() - MAX_IDLE_S:
            _close(self._idle.popleft()[1])

    def _give_back(self, connection: Connection) -> None:
        idle = connection.pgconn.transaction_status == TransactionStatus.IDLE
        if not idle or connection.disposable or self._created_at[connection] < self._retired_before:
            _close(connection)
            return
        connection.used = Moment.now()
        self._idle.append((self._clock(), connection))
        self._close_idle()

    def retire(self) -> None:
        """Retire all open connections: idle ones are closed now, the others when they are returned."""
        self._retired_before = self._clock()
        while self._idle:
            _close(self._idle.pop()[1])

    def abandon(self) -> None:
        """Close all connections without the event loop, which has ended."""
        for connection in self._created_at:
            _close(connection)

    async def _connect(self) -> Connection:
        """Return a new connection. Retries for WAIT_S: the server may be restarting. Raises StoreUnavailable."""
        end, pause = self._clock() + WAIT_S, FIRST_PAUSE_S
        while True:
            try:
                return await self._connected()
            except psycopg.Error as error:
                reason = self._dsn.hide(str(error).partition("\n")[0])
                if reason != self._failure:
                    log.warning("PostgreSQL cannot be reached: %s", reason)
                self._failure = reason
            if (
                self._clock() + pause > end
            ):  # outside of `except`: the driver's error holds the password in an attribute
                raise StoreUnavailable(UNREACHABLE) from Unreachable(reason)
            await asyncio.sleep(pause)
            pause *= 2

    async def _connected(self) -> Connection:
        given: dict[str, Any] = {"autocommit": True, "connect_timeout": 5, "application_name": "crudstack"}
        given["prepare_threshold"] = None  # until it is known whether a pooler is in between
        given |= {name: value for name, value in PEER_GONE.items() if name not in self._settings_in_dsn}
        if self._password is not None:
            given["password"] = await asyncio.to_thread(self._password)
        connection = await SessionlessConnection.connect(self._dsn.reveal(), **given)
        self._created_at[connection] = self._clock()
        self._failure = None
        try:
            with _cut_after(WAIT_S, connection):
                await connection.apply_settings(server_settings(), prepare=self._prepare)
        except BaseException:
            _close(connection)
            raise
        return connection


@contextlib.contextmanager
def translating() -> Iterator[None]:
    """Raise errors of psycopg in the `with` block as CrudError, with the error of psycopg as its cause."""
    try:
        yield
    except psycopg.Error as error:
        raise _translated(error) from error


def _translated(error: psycopg.Error) -> CrudError:
    state = error.sqlstate or ""
    ordinary = state[:2] in ("CS", "23", "40")  # conflicts and what is tried again
    log.log(logging.DEBUG if ordinary else logging.ERROR, "PostgreSQL: %s %s", type(error).__name__, state)
    log.debug("PostgreSQL said: %s", error)
    if isinstance(error, psycopg.DataError) and state in ("", "22P05", "22021"):
        return InvalidData("the database cannot hold this text: NUL characters and unpaired surrogates are none")
    if isinstance(error, psycopg.errors.DataCorrupted | psycopg.errors.IndexCorrupted | psycopg.errors.UndefinedTable):
        return StoreDamaged(
            "the database has lost something that was stored, its log says what; restore it from a backup"
        )
    if state == TOO_LARGE:
        return MetadataTooLarge(
            "an index of the database cannot hold the id of this resource together with one of its indexed texts:"
            " shorten the text; nothing was changed"
        )
    if state == TOOK_TOO_LONG:
        return StoreUnavailable(f"the database took longer than {STATEMENT_S:g} s; nothing was changed")
    return StoreUnavailable("the database cannot be used right now; nothing was changed")


def _close(connection: Connection) -> None:
    connection.pgconn.finish()  # as `close` does, which is asynchronous for the sake of psycopg's pool


@contextlib.contextmanager
def _cut_after(seconds: float, connection: Connection) -> Iterator[None]:
    """Shut the connection down if the `with` block takes longer than `seconds`. Its pending wait then fails."""
    timer = asyncio.get_running_loop().call_later(seconds, _cut, connection)
    try:
        yield
    finally:
        timer.cancel()


def _cut(connection: Connection) -> None:
    # Cancelling psycopg would wait for the server. Closing would free the number of a socket that the event loop still
    # watches.
    with contextlib.suppress(OSError, psycopg.Error), socket.socket(fileno=os.dup(connection.fileno())) as same:
        same.shutdown(socket.SHUT_RDWR)


_pools: dict[asyncio.AbstractEventLoop, dict[tuple[Secret, Password | None], Pool]] = {}
_mutex = threading.Lock()


def checked_dsn(dsn: str | Secret) -> Secret:
    """Return an address of PostgreSQL. Raises ConfigError, without the address, if it is wrong or ambiguous."""
    secret = postgres_url(dsn)
    try:
        conninfo_to_dict(secret.reveal())
    except psycopg.ProgrammingError:
        readable = False
    else:
        readable = True
    if not readable:  # outside of `except`: the driver's error quotes a part of the address
        raise ConfigError(f"{POSTGRES.name} cannot be read: expected {POSTGRES.like}")
    return secret


def pool_of(dsn: Secret, password: Password | None, max_size: int, prepare: bool | None = None) -> Pool:
    """Return the pool of this event loop. The first caller's `max_size` and `prepare` hold."""
    loop = asyncio.get_running_loop()
    pool = _pools.get(loop, {}).get((dsn, password))
    if pool is None:
        with _mutex:
            for ended in [
                loop for loop in _pools if loop.is_closed()
            ]:  # event loops that ended without `close`, so no caller can use their pools
                for abandoned in _pools.pop(ended).values():
                    abandoned.abandon()
            pool = _pools.setdefault(loop, {})[dsn, password] = Pool(dsn, password, max_size, prepare)
    return pool


def close_pool(dsn: Secret, password: Password | None) -> None:
    """Close the connections of this event loop. Those in use are closed when they are returned."""
    with _mutex:
        pools = _pools.get(asyncio.get_running_loop(), {})
        pool = pools.pop((dsn, password), None)
        if not pools:
            _pools.pop(asyncio.get_running_loop(), None)
    if pool is not None:
        pool.retire()


def is_lost(error: Exception) -> bool:
    """Return whether the connection is lost, perhaps together with a reply."""
    state = getattr(error, "sqlstate", None)
    return isinstance(error, psycopg.OperationalError) and (
        state is None or (state[:2] in ("08", "57") and state != TOOK_TOO_LONG)
    )
