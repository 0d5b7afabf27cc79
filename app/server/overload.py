"""Overload: at most IN_PROGRESS requests in progress, QUEUED that wait for their turn, and 503 with Retry-After for the rest.

An event loop takes every request that arrives. Under more load than it can serve all of them get slower together, until
each client has given up before its answer is there. Here a request is refused at once, before its body is read, if it
could not begin soon, so that the accepted ones are answered in time.

Invariants:

- O1 *In progress are IN_PROGRESS requests at most.* A slot is held from the admission of a request until its answer is handed
  to the server, except while the server waits for the client to send the body, and while the request waits for its turn
  with large JSON (`threads.heavy`, which bounds it). So neither a slow client nor one that sends much holds a slot.
- O2 *The queue is bounded.* QUEUED requests wait, each for at most WAIT_S. A request that was admitted is never refused: after
  its body has arrived it has the next free slot, before all that are new.
- O3 *Slots are not lost.* `free` and the slots that are held are IN_PROGRESS together, also after errors and cancellation: a slot
  is given back exactly once.
- O4 *Answers that nobody reads hold a bounded number of bytes.* While MAX_UNSENT bytes of answers wait for their readers, a large
  answer to a read is replaced by 503 before its first byte is handed to the server; while it is twice as many, a large answer to a
  write is replaced by 503 `outcome-unknown`. Small answers are always given: who reads slowly keeps nobody else waiting.
- O5 *Health checks do not wait.* /healthz touches no store and needs no slot. /readyz asks the stores, so it has a few slots of
  its own: neither do requests keep it waiting, nor does it add work without bound.

IN_PROGRESS: the event loop runs Python on one core, at 0.2 to 1 ms a request, that is 1,000 to 5,000 requests a second. A
request beyond that waits for a store: for a disk (0 to 5 ms; four threads read, a commit takes all the writes that wait
for it) or for a network (5 to 30 ms for PostgreSQL or S3). 1,000 a second at 30 ms each are 30 in progress. More would be
answered little sooner, and each holds memory: 32 pages of 4 MB are 128 MB. QUEUED is a tenth of a second of work, or two.

On Lambda one request runs at a time in a process, and the service limits how many processes there are, so this is not used there.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from typing import Any

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
"""An answer of so many bytes may wait for its reader; a smaller one fits into the buffers of the sockets."""
HEALTH, READINESS = "/healthz", "/readyz"
RETRY_AFTER = ((b"retry-after", b"1"),)


class Gate:
    """Slots for `limit` holders and a queue of `queued` that wait for one. All in one event loop."""

    def __init__(self, limit: int, queued: int) -> None:
        self.free, self._limit, self._queued = limit, limit, queued
        self._new: deque[asyncio.Future[bool]] = deque()
        self._returning: deque[asyncio.Future[bool]] = deque()

    def take(self) -> bool:
        """Take a slot if one is free; then nobody waits. Return whether it was."""
        if self.free:
            self.free -= 1
            return True
        return False

    async def wait(self) -> bool:
        """Wait for a slot if the queue has room. Return False if there is none within WAIT_S."""
        return len(self._new) < self._queued and await self._wait(self._new, WAIT_S)

    async def come_back(self) -> None:
        """Wait for a slot again, before all that are new."""
        await self._wait(self._returning, None)

    def leave(self) -> None:
        """Give a slot back: to whoever waits, or to all."""
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
                self.leave()  # it was admitted in the moment in which it was cancelled
            elif waiting in queue:
                queue.remove(waiting)
            raise
        finally:
            if late is not None:
                late.cancel()
        if not admitted:
            queue.remove(waiting)
        return admitted

    def __str__(self) -> str:
        return f"{self._limit} requests in progress and {self._queued} that wait"


def _give_up(waiting: asyncio.Future[bool]) -> None:
    if not waiting.done():
        waiting.set_result(False)


class _Slot:
    """A slot of an admitted request, and what the application receives and sends meanwhile."""

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
        """Wait for the client without the slot."""
        if not self._held:
            return await self._receive()
        self.leave()
        message = await self._receive()
        await self.come_back()
        return message

    async def send(self, message: Any) -> None:
        """Send without the slot, as soon as there is a body: the work is done, and what streams waits for its reader."""
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
        """Return what a large answer is replaced by, if too much waits to be read."""
        unsent = self._unsent()
        if self._reads:
            return _unread() if unsent > MAX_UNSENT else None
        if unsent <= 2 * MAX_UNSENT:
            return None
        return OutcomeUnknown(
            "this was tried, but its answer cannot be told while so much waits to be read; ask again with the same"
            " Idempotency-Key, or read it"
        )


class Overload:
    """An application that refuses what it cannot serve in time.

    unsent  says how many bytes of answers wait for their readers
    base    the prefix under which the API is reached, if there is one
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
        # Requests come with the prefix and without it; see base_path.
        self._health, self._readiness = {HEALTH, base + HEALTH}, {READINESS, base + READINESS}
        self._gate, self._probes = Gate(in_progress, queued), Gate(PROBES, 0)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in self._health:
            await self._app(scope, receive, send)
            return
        gate = self._probes if scope["path"] in self._readiness else self._gate
        if gate.take() or await gate.wait():
            slot = _Slot(gate, scope, receive, send, self._unsent)
            TURN.set(slot)  # for the rest of this task, which is this request's own
            try:
                await self._app(scope, slot.receive, slot.send)
            finally:
                slot.leave()
        else:
            await _refuse(Overloaded(f"found {gate}; expected fewer requests at once; try again"), send, scope)


def _unread() -> TooMuchInTransfer:
    return TooMuchInTransfer(f"found over {MAX_UNSENT} bytes of answers that wait to be read; try again")


async def _refuse(error: CrudError, send: Send, scope: Scope | None = None) -> None:
    head = scope is not None and scope["method"] == "HEAD"
    headers = () if isinstance(error, Overloaded) else RETRY_AFTER  # which has it already
    await problems.response(error, headers).send(send, head=head)
