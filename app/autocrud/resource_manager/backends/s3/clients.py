"""The clients of obstore, which are pools of connections to S3, and when a pool is retired.

A NAT or a firewall may drop a connection silently, without FIN or RST. Requests on it get no answer, and a pool may
hold many such connections. So the first attempt waits only a short time, and connections that gave no answer are not
used again.

- C1 *After a request without an answer, every later attempt uses a new connection.* The pools of the request are
  retired, so no request takes a connection out of them again. So all connections that were lost together cost one
  time-out.
- C2 *Connections that were idle for IDLE_S are not used*, even if the machine was frozen. Idle time is measured by the
  clock that runs while a machine sleeps, and by the wall clock, which is set after a thaw.
- C3 *A request that may have taken effect is repeated only if that does no harm*: reads, lists, deletes and
  unconditional PUTs. A conditional PUT is repeated here only if S3 answered that it refused the time or the credentials
  of the request, because then nothing was stored. If there is no answer, the outcome is `Unknown`.
- C4 *The waiting time is bounded.* WAITS_S has one entry for each attempt: the seconds without a byte after which it is
  given up. Within an attempt, obstore repeats refused connections and answers of 500 and above for RETRY_S. That is
  shorter than every entry, so obstore never repeats a request without an answer on a connection of the same pool.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from ...runtime.moments import Moment
from .errors import had_no_answer, s3_answer

if TYPE_CHECKING:
    from obstore.store import ClientConfig, RetryConfig, S3Store

log = logging.getLogger("crudstack.s3")

RequestKind = Literal["swap", "small", "large", "file"]
"""In this order: conditional PUTs; reads and requests with small bodies; bodies of some megabytes; files."""
WAITS_S: dict[RequestKind, tuple[float, ...]] = {
    "swap": (4, 6, 10),
    "small": (3, 5, 8),
    "large": (4, 6, 15),
    "file": (30, 30),
}
"""Seconds without a byte of an answer, by attempt. They include the time to send the body, so large bodies have more:
the last attempt to send 6 MB succeeds at 3.5 Mbit/s."""
LARGE, FILE = 128 * 1024, 8 * 1024 * 1024
"""A body above LARGE bytes has the kind "large", and one above FILE bytes the kind "file"."""
RETRIES, RETRY_S = 4, 2.0
IDLE_S = 60.0
CONFLICT, CONFLICT_PAUSE_S = 409, 0.1
"""The status of S3 for a request that met another one in progress (OperationAborted), and the pause before it is
repeated. versitygw answers it too, if two requests create the same directory."""
RENEW_PAUSE_S = 0.25
"""The pause before a request with a wrong time is repeated. A thawed machine sets its clock within this time."""
RENEWABLE = {
    "RequestTimeTooSkewed",
    "RequestExpired",
    "ExpiredToken",
    "ExpiredTokenException",
    "TokenRefreshRequired",
    "InvalidToken",
}
"""The error codes of S3 for a signature with an old time or old credentials: the request may be repeated with new
ones."""


def kind_of(size: int) -> RequestKind:
    """Return the kind of an unconditional PUT with a body of `size` bytes."""
    return "small" if size <= LARGE else "large" if size <= FILE else "file"


def content_of(path: Path) -> bytes | Path:
    """Return what obstore is to upload: the bytes of a small file, sent in one request, or the path of a large one."""
    return path if path.stat().st_size > FILE else path.read_bytes()


class Attempts:
    """Counts the attempts of a request since it began, or since it last received data."""

    def __init__(self) -> None:
        self.count = 0
        """The number of failed attempts."""
        self.renewed = False
        """Whether the last attempt had a new time and new credentials. They are renewed once per request."""


class Pools:
    """Clients that are retired together, each with its own connections. A client is created at its first use."""

    def __init__(self, make: Callable[[ClientConfig, RetryConfig], S3Store]) -> None:
        self._make = make
        self._clients: dict[tuple[RequestKind, int], S3Store] = {}

    def client(self, kind: RequestKind, attempt: int) -> S3Store:
        """Return the client for an attempt of a request, counted from 0."""
        found = self._clients.get((kind, attempt))
        if found is None:
            client: ClientConfig = {
                "timeout": "1h",
                "read_timeout": timedelta(seconds=WAITS_S[kind][attempt]),
                "pool_idle_timeout": timedelta(seconds=IDLE_S),  # for each connection, even if others are in use
            }
            retry: RetryConfig = {
                "max_retries": 0 if kind == "swap" else RETRIES,
                "retry_timeout": timedelta(seconds=RETRY_S),
            }
            found = self._clients[kind, attempt] = self._make(client, retry)
        return found


class Clients:
    """The pools in use.

    Args:
        make: Creates a client with these options.
        renew: Forgets cached credentials, so that new ones are fetched. None if they cannot change.
    """

    def __init__(self, make: Callable[[ClientConfig, RetryConfig], S3Store], renew: Callable[[], None] | None) -> None:
        self._make, self._renew = make, renew
        self._pools = Pools(make)
        self._used = Moment.now()
        self._slow_swaps = 0
        self._pools.client("small", 0)
        self._pools.client("swap", 0)

    def current(self) -> Pools:
        """Return the pools to use now (C2)."""
        now = Moment.now()
        if now.after(self._used) > IDLE_S:
            self._retire(self._pools)
        self._used = now
        return self._pools

    def swap_client(self, pools: Pools) -> S3Store:
        """Return the client for a conditional PUT. It waits longer if the last conditional PUTs got no answer."""
        return pools.client("swap", self._slow_swaps)

    def swap_answered(self) -> None:
        """Note that a conditional PUT got an answer, so that the next one waits the shortest time again."""
        self._slow_swaps = 0

    def swap_failed(self, pools: Pools, error: BaseException) -> None:
        """Note that the outcome of a conditional PUT is unknown. Retires the pools if there was no answer."""
        if had_no_answer(error):
            self._slow_swaps = min(self._slow_swaps + 1, len(WAITS_S["swap"]) - 1)
            self._retire(pools)

    async def may_repeat(self, kind: RequestKind, pools: Pools, attempts: Attempts, error: BaseException) -> bool:
        """Count a failed attempt, and return whether the request may be sent again.

        Only for requests that do no harm if they take effect twice (C3).
        """
        waited_s = WAITS_S[kind][attempts.count]
        attempts.count += 1
        if attempts.count >= len(WAITS_S[kind]):
            return False
        if had_no_answer(error):
            log.info("no answer within %g s; the connections are retired", waited_s)
            self._retire(pools)
            return True
        answer = s3_answer(error)
        if answer is not None and answer[0] == CONFLICT:
            await asyncio.sleep(CONFLICT_PAUSE_S)
            return True
        if attempts.renewed or not await self.renewed(pools, error):
            return False
        attempts.renewed = True
        return True

    async def renewed(self, pools: Pools, error: BaseException) -> bool:
        """Return whether S3 refused the time or the credentials of a request, so that it can be repeated with new ones.

        If so, first forgets the credentials, retires the pools, and waits RENEW_PAUSE_S for the clock to be set.
        """
        answer = s3_answer(error)
        if answer is None or answer[1] not in RENEWABLE:
            return False
        log.warning("S3 refused a request: %s; it is repeated with the current time and new credentials", answer[1])
        if self._renew is not None:
            self._renew()
        self._retire(pools)  # obstore keeps credentials for each client
        await asyncio.sleep(RENEW_PAUSE_S)
        return True

    def _retire(self, pools: Pools) -> None:
        """Never use a connection of these pools again (C1). Does nothing if another request retired them already."""
        if self._pools is pools:
            self._pools = Pools(self._make)
