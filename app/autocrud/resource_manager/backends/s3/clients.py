"""obstore's clients, which are pools of connections to S3, and when they are given up.

A NAT or a firewall may forget a connection without a word: no FIN, no RST. Requests on it have no answer, and a pool
may hold many such connections. So an answer is waited for only shortly at first, and what had none is not trusted
again.

- C1 *After a request without an answer, every later attempt goes on a new connection.* Its pools are retired: no
  request takes a connection out of them again. So one request pays for all connections that were lost together.
- C2 *Connections that were idle for IDLE_S are not used*, whether the machine was frozen or not: by the clock that goes
  on while a machine sleeps, and by the wall clock, which is set after a thaw.
- C3 *What may have taken place is repeated only if that does no harm*: reads, lists, deletes, unconditional PUTs. A
  conditional PUT is repeated here only if S3 answered that it refused the request for its time or its credentials. Such
  an answer says that nothing was stored; no answer says nothing, and is `Unknown`.
- C4 *Bound.* WAITS_S are the seconds without a byte after which an attempt is given up; there are no more attempts.
  Within one, obstore repeats refused connections and answers of 500 and above for RETRY_S, which is shorter than any of
  the waits: so obstore never repeats what had no answer, on a connection of the same pool.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from datetime import timedelta
from typing import TYPE_CHECKING, Literal

from ...runtime.moments import Moment
from .errors import had_no_answer, s3_answer

if TYPE_CHECKING:
    from obstore.store import ClientConfig, RetryConfig, S3Store

log = logging.getLogger("crudstack.s3")

RequestKind = Literal["swap", "small", "large", "file"]
"""Conditional PUTs; reads and what sends few bytes; bodies of some megabytes; files."""
WAITS_S: dict[RequestKind, tuple[float, ...]] = {
    "swap": (4, 6, 10),
    "small": (3, 5, 8),
    "large": (4, 6, 15),
    "file": (30, 30),
}
"""Seconds without a byte of an answer, by attempt. The time in which a body is sent counts, so larger ones have more:
the last attempt of 6 MB succeeds at 3.5 Mbit/s."""
LARGE, FILE = 128 * 1024, 8 * 1024 * 1024
"""Bytes from which a body is large, or sent as a file is."""
RETRIES, RETRY_S = 4, 2.0
IDLE_S = 60.0
RENEW_PAUSE_S = 0.25
"""Pause before a request that S3 refused for its time is repeated: a thawed machine sets its clock within moments."""
RENEWABLE = {
    "RequestTimeTooSkewed",
    "RequestExpired",
    "ExpiredToken",
    "ExpiredTokenException",
    "TokenRefreshRequired",
    "InvalidToken",
}
"""S3's codes for a signature with an old clock or old credentials."""


def kind_of(size: int) -> RequestKind:
    """Return the kind of a PUT with so many bytes."""
    return "small" if size <= LARGE else "large" if size <= FILE else "file"


class Attempts:
    """What a request has been through, since it began or last made progress."""

    def __init__(self) -> None:
        self.count = 0
        """Attempts that failed."""
        self.renewed = False
        """Whether the time and the credentials of the last one are those of a renewal: one is enough."""


class Pools:
    """Clients that were made at the same time, each with connections of its own. Made at their first use."""

    def __init__(self, make: Callable[[ClientConfig, RetryConfig], S3Store]) -> None:
        self._make = make
        self._clients: dict[tuple[RequestKind, int], S3Store] = {}

    def client(self, kind: RequestKind, attempt: int) -> S3Store:
        found = self._clients.get((kind, attempt))
        if found is None:
            client: ClientConfig = {
                "timeout": "1h",
                "read_timeout": timedelta(seconds=WAITS_S[kind][attempt]),
                "pool_idle_timeout": timedelta(seconds=IDLE_S),  # of each one, while others of the pool are used
            }
            retry: RetryConfig = {
                "max_retries": 0 if kind == "swap" else RETRIES,
                "retry_timeout": timedelta(seconds=RETRY_S),
            }
            found = self._clients[kind, attempt] = self._make(client, retry)
        return found


class Clients:
    """The pools in use. `renew`: forgets credentials, so that new ones are fetched."""

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
        """Return the client for a conditional PUT: one that waits longer after those that had no answer."""
        return pools.client("swap", self._slow_swaps)

    def swap_answered(self) -> None:
        self._slow_swaps = 0

    def swap_failed(self, pools: Pools, error: BaseException) -> None:
        """A conditional PUT had no answer that says what it did. It is not repeated here (C3)."""
        if had_no_answer(error):
            self._slow_swaps = min(self._slow_swaps + 1, len(WAITS_S["swap"]) - 1)
            self._retire(pools)

    async def may_repeat(self, kind: RequestKind, pools: Pools, attempts: Attempts, error: BaseException) -> bool:
        """Return whether a request that does no harm if it is done twice is to be repeated, and count the attempt."""
        waited_s = WAITS_S[kind][attempts.count]
        attempts.count += 1
        if attempts.count >= len(WAITS_S[kind]):
            return False
        if had_no_answer(error):
            log.info("no answer within %g s; the connections are given up", waited_s)
            self._retire(pools)
            return True
        if attempts.renewed or not await self.renewed(pools, error):
            return False
        attempts.renewed = True
        return True

    async def renewed(self, pools: Pools, error: BaseException) -> bool:
        """Return whether S3 refused a request for its time or its credentials.

        If it did, this has waited for the clock and forgotten the credentials.
        """
        answer = s3_answer(error)
        if answer is None or answer[1] not in RENEWABLE:
            return False
        log.warning("S3 refused a request: %s; once more, with the time and the credentials of now", answer[1])
        if self._renew is not None:
            self._renew()
        self._retire(pools)  # obstore keeps credentials with the client
        await asyncio.sleep(RENEW_PAUSE_S)
        return True

    def _retire(self, pools: Pools) -> None:
        """Use no connection of these pools again (C1). If another request has retired them, its new ones stay."""
        if self._pools is pools:
            self._pools = Pools(self._make)
