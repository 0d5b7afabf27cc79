"""The settings that statements run under, without state in the session.

A pooler in transaction mode (PgBouncer, RDS Proxy) may run each transaction on another connection to the server, which
other clients use in between. So a SET would be lost for this client and change the others, and a prepared statement
would not be found.

Invariants:

- S1 *A commit runs at READ COMMITTED.* The function that commits refuses any other level (`schema.WRONG_ISOLATION`).
  The store then asks for the level in each transaction. So no setting that was read once, from one of the pooler's
  connections, decides about a commit.
- S2 *The server ends a statement after `statement_timeout`.* The setting comes from the first of these that applies:
    1. the role, the database or the server has it (`ALTER ROLE ... SET`, as app.bootstrap does): nothing is sent;
    2. the session is this client's own, because no pooler is in between: one SET when the connection is made;
    3. the session is a pooler's: `SET LOCAL` before each statement, in the same message and the same implicit
       transaction. The server runs a message only once it has all of it, so a client that is stopped half way holds
       no lock. An error ends an implicit transaction without a ROLLBACK, so a client that is stopped afterwards keeps
       no connection of the pooler's;
    4. the pooler is RDS Proxy, where SET and SET LOCAL pin the server's connection to the client: the client stops
       waiting after `pool.ANSWER_S`, and the log says which ALTER ROLE is missing.
- S3 *Explicit transactions are `exclusive_transaction` and `snapshot_transaction` only.* They set the limits
  themselves; behind RDS Proxy their connection is closed afterwards, which ends the pinning.
- S4 *Only a session of this client's own has prepared statements with names*, unless the caller asks for them. Without
  them a read costs twice the server's CPU time.

All locks are those of transactions (`pg_advisory_xact_lock`), and so are all cursors of the server. There is no LISTEN
and no temporary table.
"""

from __future__ import annotations

import contextlib
import logging
import re
from collections.abc import AsyncIterator, Mapping
from typing import Any, NamedTuple

from psycopg import AsyncClientCursor, AsyncConnection, AsyncCursor, IsolationLevel
from psycopg.adapt import Dumper
from psycopg.pq import TransactionStatus
from typing_extensions import override

from ...runtime.moments import Moment

log = logging.getLogger("crudstack.postgres")

ISOLATION = "read committed"
RDS_PROXY = re.compile(r"\.proxy-[a-z0-9]+\.[a-z0-9-]+\.rds\.amazonaws\.com(\.cn)?\.?\Z")
"""Endpoints of RDS Proxy, https://docs.aws.amazon.com/AmazonRDS/latest/UserGuide/rds-proxy-endpoints.html"""


PREPARE_AFTER = 5
"""After how many executions on a connection a statement is prepared: psycopg's default."""


class Guard(NamedTuple):
    """The settings that are sent with each statement, because the server does not have them."""

    isolation: bool = False
    statement_ms: int | None = None

    def prefix(self) -> str:
        """Return the SQL that goes in front of a statement, or an empty text."""
        isolation = f"SET TRANSACTION ISOLATION LEVEL {ISOLATION.upper()}; " if self.isolation else ""
        return isolation + ("" if self.statement_ms is None else f"SET LOCAL statement_timeout = {self.statement_ms}; ")


class _NumberDumper(Dumper):
    """Writes integers in parentheses: -9223372036854775808::bigint negates what is out of range."""

    @override
    def dump(self, obj: int) -> bytes:
        return b"%d" % obj

    @override
    def quote(self, obj: int) -> bytes:
        return b"(%d)" % obj


class _LiteralCursor(AsyncClientCursor[Any]):
    """Puts values into the statement, because a message with parameters holds one statement only."""

    def __init__(self, connection: AsyncConnection[Any]) -> None:
        super().__init__(connection)
        self.adapters.register_dumper(int, _NumberDumper)


class SessionlessConnection(AsyncConnection[Any]):
    """A connection whose statements run under the settings that the store needs, also through a pooler."""

    guard = Guard()
    pooled = False
    """Whether a pooler answered: the server's connection is not this client's own."""
    pins = False
    """Whether this is RDS Proxy, so that no SET may be sent."""
    disposable = False
    """Whether to close it instead of using it again."""
    used: Moment
    """When it was last given back."""

    async def apply_settings(self, wanted: Mapping[str, str], *, prepare: bool | None) -> None:
        """Compare the server's settings with `wanted`, a value by name, and arrange for those that differ.

        Sends one or two statements.

        prepare  whether to prepare frequent statements under names; None: only if the session is this client's own
        """
        await self.set_isolation_level(IsolationLevel.READ_COMMITTED)  # of explicit transactions; it sends nothing
        cursor = await super().execute(
            "SELECT pg_backend_pid(), name, setting, reset_val FROM pg_settings WHERE name = ANY(%s)", (list(wanted),)
        )
        rows = await cursor.fetchall()
        # A pooler makes up the process id that it sends a client, because it has one for several servers' connections.
        self.pooled = any(pid != self.info.backend_pid for pid, *_ in rows)
        self.pins = RDS_PROXY.search(self.info.host) is not None
        own = not self.pooled and not self.pins
        self.prepare_threshold = PREPARE_AFTER if (own if prepare is None else prepare) else None
        if own:
            differing = [name for _, name, setting, _ in rows if setting != wanted[name]]
            if differing:
                await super().execute("; ".join(f"SET {name} = '{wanted[name]}'" for name in differing).encode())
            return
        # `reset_val` is what the server gives each new session; another client's SET may have left another `setting`.
        lacking = {name for _, name, *found in rows if found != [wanted[name]] * 2}
        self.guard = Guard(
            isolation="default_transaction_isolation" in lacking,
            statement_ms=int(wanted["statement_timeout"]) if "statement_timeout" in lacking and not self.pins else None,
        )
        if lacking and self.pins:
            log.warning(
                "RDS Proxy: the server does not have the settings %s."
                " Statements may outlast their limits. As the user %r run:%s",
                ", ".join(sorted(lacking)),
                self.info.user,
                "".join(f" ALTER ROLE CURRENT_USER SET {name} = '{wanted[name]}';" for name in sorted(lacking)),
            )

    async def check(self) -> None:
        """Raise psycopg.Error if the server does not answer on this connection."""
        await super().execute("SELECT 1")

    def request_isolation(self) -> None:
        """Ask for READ COMMITTED in each transaction from now on."""
        self.guard = self.guard._replace(isolation=True)

    @override
    async def execute(
        self, query: Any, params: Any = None, *, prepare: bool | None = None, binary: bool = False
    ) -> AsyncCursor[Any]:
        """Run a statement as psycopg does.

        The settings that the server does not have go in front of it, in the same round trip.
        """
        prefix = self.guard.prefix()
        if not prefix or self.info.transaction_status != TransactionStatus.IDLE:
            return await super().execute(query, params, prepare=prepare, binary=binary)
        if self.pins:
            async with self.transaction():  # BEGIN ISOLATION LEVEL, which does not pin
                return await super().execute(query, params, prepare=prepare, binary=binary)
        # One message of several statements: its values are quoted by libpq, and its results are texts.
        statement = query if isinstance(query, bytes) else query.encode()
        cursor = _LiteralCursor(self)
        await cursor.execute(prefix.encode() + statement, params)
        while cursor.nextset():
            pass
        return cursor

    @contextlib.asynccontextmanager
    async def exclusive_transaction(self, lock: int, idle_ms: int) -> AsyncIterator[None]:
        """Hold an advisory lock in an explicit transaction. It may idle for `idle_ms`; statements may take any time."""
        self.disposable = self.disposable or self.pins
        async with self.transaction():
            await super().execute(
                "SET LOCAL statement_timeout = 0;"
                f" SET LOCAL idle_in_transaction_session_timeout = {idle_ms};"
                f" SELECT pg_advisory_xact_lock({lock})".encode()
            )
            yield

    @contextlib.asynccontextmanager
    async def snapshot_transaction(self) -> AsyncIterator[None]:
        """Read as at one moment, in an explicit transaction that takes no lock which writers wait for.

        On the server, the transaction and its statements have no time limit.
        """
        self.disposable = True
        await self.set_isolation_level(IsolationLevel.REPEATABLE_READ)
        await self.set_read_only(True)
        async with self.transaction():
            await super().execute(f"{self._without_limits()}SELECT 1".encode())  # the first query chooses the moment
            yield

    async def begin_load(self) -> None:
        """Begin a transaction that writes, without time limits on the server. The caller commits it by a statement."""
        self.disposable = True
        await super().execute(f"BEGIN ISOLATION LEVEL READ COMMITTED; {self._without_limits()}SELECT 1".encode())

    def _without_limits(self) -> str:
        limits = ["statement_timeout", "idle_in_transaction_session_timeout"]
        if self.info.server_version >= 170_000:
            limits.append("transaction_timeout")
        return "".join(f"SET LOCAL {name} = 0; " for name in limits)
