"""The open connections of a server: how many there are, how many bytes they hold, and whose client is late.

Invariants (`http_protocol` has those of a single connection):

- C1 *All connections together hold a bounded number of bytes.* Bodies that arrive share MAX_BODIES: the request that
  holds most of it is refused to make room. `unsent` says how many bytes of answers wait for their readers, and `overload`
  bounds them.
- C2 *Waiting for a client ends.* `sweep` has each connection check its deadlines, every SWEEP_S seconds. One timer for all
  costs less than one for each request.
- C3 *There is room for who asks now.* Above the limit of connections the one that has been waiting for its client longest
  is closed, so that a client that asks at once is served beside any number that do not. A connection for which the
  application works is never closed; if it works for all of them, the new one is refused.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Iterable
from http import HTTPStatus
from typing import Protocol

from ..autocrud.errors import CrudError
from ..autocrud.http import problems

MAX_BODIES = 64 * 1024 * 1024
SWEEP_S = 1.0


class HeadersTooLarge(CrudError):
    type, title, status = "request-headers-too-large", "The headers are too large", 431


class UriTooLong(CrudError):
    type, title, status = "uri-too-long", "The request line is too long", 414


class RequestTimeout(CrudError):
    type, title, status = "request-timeout", "The request took too long to arrive", 408


class MalformedRequest(CrudError):
    type, title, status = "malformed-request", "This is not a valid HTTP request", 400


class UpgradeNotSupported(CrudError):
    type, title, status = "upgrade-not-supported", "This server has no WebSocket", 400


class CodingNotSupported(CrudError):
    type, title, status = "transfer-coding-not-supported", "This transfer coding is not taken here", 501


class TooManyConnections(CrudError):
    type, title, status = "too-many-connections", "Too many connections", 503


class TooMuchInTransfer(CrudError):
    type, title, status = "too-much-in-transfer", "Too many bytes are in transfer", 503


def refusal(error: CrudError, headers: Iterable[tuple[bytes, bytes]]) -> bytes:
    """Return the bytes of an error answer, after which the connection is closed. `headers` come first in it."""
    response = problems.response(error, ((b"retry-after", b"1"),) if error.status == 503 else ())
    lines = [
        b"HTTP/1.1 %d %b" % (error.status, HTTPStatus(error.status).phrase.encode()),
        *(b"%b: %b" % header for header in (*headers, *response.headers)),
        b"content-type: %b" % response.content_type,
        b"content-length: %d" % len(response.body),
        b"connection: close",
        b"",
        response.body,
    ]
    return b"\r\n".join(lines)


class Connection(Protocol):
    """A connection, as the connections of a server know it."""

    loop: asyncio.AbstractEventLoop
    transport: asyncio.Transport
    body_bytes: int
    """Bytes of a body that were counted."""
    answer_bytes: int
    """Bytes of large answers that were written, and perhaps not sent."""

    @property
    def uploads(self) -> bool:
        """Whether a body is arriving."""

    def check(self) -> None:
        """End the connection if its client is late."""

    def make_room(self) -> None:
        """End a connection that waits for its client, now."""

    def refuse(self, error: CrudError) -> None:
        """Answer with an error, and end the connection."""


class Connections:
    """The connections of a server, at most `limit`.

    Everything runs in the thread of the event loop.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.waiting: OrderedDict[Connection, None] = OrderedDict()
        """Connections that wait for their clients, the one that has been waiting longest first."""
        self.ending: OrderedDict[Connection, None] = OrderedDict()
        """Connections that have had their last answer."""
        self.writing: set[Connection] = set()
        """Connections that were given large answers to write."""
        self.body_bytes = 0
        self._open: set[Connection] = set()
        self._uploads: dict[Connection, None] = {}
        self._sweeping: asyncio.TimerHandle | None = None

    def add(self, connection: Connection) -> bool:
        """Add a connection. Return whether there is room for it."""
        self._open.add(connection)
        if self._sweeping is None:
            self._sweeping = connection.loop.call_later(SWEEP_S, self.sweep)
        if len(self._open) <= self.limit:
            return True
        for oldest in (*self._first(self.ending), *self._first(self.waiting)):
            oldest.make_room()
            return True
        return False

    @staticmethod
    def _first(some: OrderedDict[Connection, None]) -> list[Connection]:
        return [next(iter(some))] if some else []

    def remove(self, connection: Connection) -> None:
        self._open.discard(connection)
        self.waiting.pop(connection, None)
        self.ending.pop(connection, None)
        self.writing.discard(connection)
        self.forget_body(connection)

    def sweep(self) -> None:
        """Close the connections whose clients are late, then wait SWEEP_S."""
        self._sweeping = None
        for connection in list(self._open):
            connection.check()
        if self._open:
            loop = asyncio.get_running_loop()
            self._sweeping = loop.call_later(SWEEP_S, self.sweep)

    def unsent(self) -> int:
        """Return how many bytes the answers have that are not read yet. Each is held as a whole until its last byte is sent."""
        if not self.writing:
            return 0
        total = 0
        for connection in list(self.writing):
            if connection.transport.get_write_buffer_size():
                total += connection.answer_bytes
            else:
                connection.answer_bytes = 0
                self.writing.discard(connection)
        return total

    def count_body(self, connection: Connection, size: int) -> None:
        """Count bytes of a body that has not arrived as a whole. Above MAX_BODIES, refuse the request that holds most."""
        connection.body_bytes += size
        self.body_bytes += size
        self._uploads[connection] = None
        if self.body_bytes > MAX_BODIES:
            largest = max(self._uploads, key=lambda upload: upload.body_bytes if upload.uploads else 0)
            if largest.uploads:
                largest.refuse(
                    TooMuchInTransfer(
                        f"found over {MAX_BODIES} bytes of bodies in transfer; this request has the most of them; try again"
                    )
                )

    def forget_body(self, connection: Connection) -> None:
        self.body_bytes -= connection.body_bytes
        connection.body_bytes = 0
        self._uploads.pop(connection, None)
