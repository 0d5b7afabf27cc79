"""Load shedding: IN_PROGRESS requests run, QUEUED requests wait for a slot, and the others get 503 with Retry-After.

An event loop accepts every request that arrives. Under more load than it can serve, all requests become slower, until
each client times out before its response is ready. This module refuses a request at once, before its body is read, if
the request could not begin soon. So the accepted requests are answered in time.

Invariants:

- O1 *At most IN_PROGRESS requests run.* A request holds a slot from its admission until its response is passed to the
  server. It releases the slot while the server waits for the client to send the body, and while the request waits for
  its turn with large JSON (`threads.heavy` limits that). So a client that sends slowly, or sends much, holds no slot.
  Uploads and downloads of files hold none either; `autocrud.http.transfers` limits their number.
- O2 *The queue is bounded.* At most QUEUED requests wait, each for at most WAIT_S. An admitted request is never
  refused: after its body has arrived, it gets the next free slot, before all new requests.
- O3 *Slots are not lost.* `free` plus the held slots is always IN_PROGRESS, also after errors and cancellation: each
  slot is released exactly once.
- O4 *Responses that clients do not read hold a bounded number of bytes.* While MAX_UNSENT bytes of responses are
  unread, a large response to a read is replaced by 503 before its first byte is passed to the server. While
  2 * MAX_UNSENT bytes are unread, a large response to a write is replaced by 503 `outcome-unknown`. Small responses are
  always sent, so a client that reads slowly does not delay others.
- O5 *Health checks do not wait.* /healthz uses no store and needs no slot. /readyz uses the stores, so it has PROBES
  slots of its own: other requests do not delay it, and its work is bounded.

Why IN_PROGRESS is 32: the event loop runs Python on one core and needs 0.2 to 1 ms for a request, which is 1,000 to
5,000 requests per second. The rest of a request's time is spent waiting for a store: a disk (0 to 5 ms; four threads
read, and one commit takes all waiting writes) or a network (5 to 30 ms for PostgreSQL or S3). 1,000 requests per second
of 30 ms each are 30 in progress. More would hardly reduce the latency, and each holds memory: 32 pages of 4 MB are
128 MB. QUEUED is 100 to 200 ms of work.

AWS Lambda runs one request at a time in a process and limits the number of processes, so it does not need this module.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from typing import Any

from typing_extensions import override

from ..autocrud.errors import CrudError, OutcomeUnknown, Overloaded
from ..autocrud.http import problems
from ..autocrud.http.messages import Receive, Scope, Send
from ..autocrud.resource_manager.runtime.threads import TURN
from .connections import TooMuchInTransfer

IN_PROGRESS = 32
QUEUED = 128
WAIT_S = 3.0
PROBES = 4
MAX_UNSENT = 32 * 1024 * 1024
LARGE = 64 * 1024
"""Bytes above which a response may wait for its client; a smaller one fits into the buffers of the sockets."""
HEALTH, READINESS = "/healthz", "/readyz"
RETRY_AFTER = ((b"retry-after", b"1"),)


class Gate:
    """A semaphore with `limit` slots and a queue of at most `queued` requests. Used from one event loop only."""

    def __init__(self, limit: int, queued: int) -> None:
        self.free, self._limit, self._queued = limit, limit, queued
        self._new: deque[asyncio.Future[bool]] = deque()
        self._returning: deque[asyncio.Future[bool]] = deque()

    def take(self) -> bool:
        """Take a slot if one is free (then the queue is empty). Return whether it was taken."""
        if self.free:
            self.free -= 1
            return True
        return False

    async def wait(self) -> bool:
        """Wait for a slot. Return False if the queue is full, or if no slot becomes free within WAIT_S."""
        return len(self._new) < self._queued and await self._wait(self._new, WAIT_S)

    async def come_back(self) -> None:
        """Wait for a slot again, with priority over new requests."""
        await self._wait(self._returning, None)

    def leave(self) -> None:
        """Release a slot: the next waiting request gets it."""
        for queue in (self._returning, self._new):
            while queue:
                waiting = queue.popleft()
                if not waiting.done():
                    waiting.set_result(True)
                    return
        self.free += 1

    async def _wait(self, queue: deque[asyncio.Future[bool]], seconds: float | None) -> bool:
        loop = asyncio.get_running_loop()
        waiting: asyncio.Future[bool] = loop.create_future()
        queue.append(waiting)
        late = None if seconds is None else loop.call_later(seconds, _give_up, waiting)
        try:
            admitted = await waiting
        except asyncio.CancelledError:
            if waiting.done() and not waiting.cancelled() and waiting.result():
                self.leave()  # it was admitted and cancelled in the same moment
            elif waiting in queue:
                queue.remove(waiting)
            raise
        finally:
            if late is not None:
                late.cancel()
        if not admitted:
            queue.remove(waiting)
        return admitted

    @override
    def __str__(self) -> str:
        return f"{self._limit} requests in progress and {self._queued} waiting"


def _give_up(waiting: asyncio.Future[bool]) -> None:
    if not waiting.done():
        waiting.set_result(False)


class _Slot:
    """The slot of an admitted request, around the `receive` and `send` of the application."""

    __slots__ = ("_gate", "_held", "_reads", "_receive", "_send", "_start", "_unsent")

    def __init__(self, gate: Gate, scope: Scope, receive: Receive, send: Send, unsent: Callable[[], int]) -> None:
        self._gate, self._receive, self._send, self._unsent = gate, receive, send, unsent
        self._reads = scope["method"] == "GET"
        self._held, self._start = True, None

    def leave(self) -> None:
        if self._held:
            self._held = False
            self._gate.leave()

    async def come_back(self) -> None:
        if not self._held:
            if not self._gate.take():
                await self._gate.come_back()
            self._held = True

    async def receive(self) -> Any:
        """Receive the next message, without the slot while the client sends."""
        if not self._held:
            return await self._receive()
        self.leave()
        message = await self._receive()
        await self.come_back()
        return message

    async def send(self, message: Any) -> None:
        """Send a message. Releases the slot with the first part of the body, because the work is done then."""
        if message["type"] == "http.response.start":
            self._start = message
            return
        self.leave()
        if self._start is not None:
            start, self._start = self._start, None
            whole = not message.get("more_body", False)
            if whole and len(message.get("body", b"")) > LARGE and (error := self._unsendable()) is not None:
                await _refuse(error, self._send)
                return
            await self._send(start)
        await self._send(message)

    def _unsendable(self) -> CrudError | None:
        """Return the error that replaces a large response, or None if few enough bytes are unread."""
        unsent = self._unsent()
        if self._reads:
            return _unread() if unsent > MAX_UNSENT else None
        if unsent <= 2 * MAX_UNSENT:
            return None
        return OutcomeUnknown(
            "the write was tried, but its response cannot be sent because too many responses are unread; send the"
            " request again with the same Idempotency-Key, or read the resource"
        )


class Overload:
    """ASGI middleware that refuses requests that the application could not serve in time.

    unsent   returns the number of bytes of responses that clients have not read
    base     the path prefix under which the API is reached, or ""
    """

    def __init__(
        self,
        app: Any,
        *,
        unsent: Callable[[], int] = lambda: 0,
        in_progress: int = IN_PROGRESS,
        queued: int = QUEUED,
        base: str = "",
    ) -> None:
        self._app, self._unsent = app, unsent
        # Requests arrive with the prefix and without it; see base_path.
        self._health, self._readiness = {HEALTH, base + HEALTH}, {READINESS, base + READINESS}
        self._gate, self._probes = Gate(in_progress, queued), Gate(PROBES, 0)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve a request in a slot, or refuse it with 503."""
        if scope["type"] != "http" or scope["path"] in self._health:
            await self._app(scope, receive, send)
            return
        gate = self._probes if scope["path"] in self._readiness else self._gate
        if gate.take() or await gate.wait():
            slot = _Slot(gate, scope, receive, send, self._unsent)
            TURN.set(slot)  # for the rest of this task, which serves this request only
            try:
                await self._app(scope, slot.receive, slot.send)
            finally:
                slot.leave()
        else:
            await _refuse(Overloaded(f"found {gate}; expected fewer concurrent requests; try again"), send, scope)


def _unread() -> TooMuchInTransfer:
    return TooMuchInTransfer(f"found over {MAX_UNSENT} bytes of responses that clients have not read; try again")


async def _refuse(error: CrudError, send: Send, scope: Scope | None = None) -> None:
    head = scope is not None and scope["method"] == "HEAD"
    headers = () if isinstance(error, Overloaded) else RETRY_AFTER  # Overloaded has the header already
    await problems.response(error, headers).send(send, head=head)
