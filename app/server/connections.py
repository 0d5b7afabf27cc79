"""The open connections of a server: their number, the bytes that they hold, and the deadlines of their clients.

Invariants (`http_protocol` has those of a single connection):

- C1 *All connections together hold a bounded number of bytes.* Incoming bodies share MAX_BODIES. Above that, the
  request that holds the most bytes is refused. `unsent` counts bytes of unread responses, and `overload` limits them.
- C2 *Waiting for a client ends.* Every SWEEP_S seconds, `sweep` makes each connection check its deadlines. One timer
  for all connections costs less than one for each request.
- C3 *A new client gets a connection.* Above the limit of connections, the connection that has waited longest for its
  client is closed. So any number of idle clients cannot lock out an active one. An upload, and a response that is sent
  in parts, wait for their clients after each part. Any other connection with a request in progress is never closed; if
  all connections have one, the new connection is refused.
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
    """The header fields exceed a limit."""

    type, title, status = "request-headers-too-large", "The headers are too large", 431


class UriTooLong(CrudError):
    """The request line exceeds a limit."""

    type, title, status = "uri-too-long", "The request line is too long", 414


class RequestTimeout(CrudError):
    """The client sends a request too slowly."""

    type, title, status = "request-timeout", "The request took too long to arrive", 408


class MalformedRequest(CrudError):
    """The bytes are not a valid HTTP request."""

    type, title, status = "malformed-request", "This is not a valid HTTP request", 400


class UpgradeNotSupported(CrudError):
    """The client asks for WebSocket, or for an upgrade of a request with a body."""

    type, title, status = "upgrade-not-supported", "This server has no WebSocket", 400


class CodingNotSupported(CrudError):
    """The body has a transfer coding other than chunked."""

    type, title, status = "transfer-coding-not-supported", "This transfer coding is not supported", 501


class TooManyConnections(CrudError):
    """Every connection up to the limit has a request in progress."""

    type, title, status = "too-many-connections", "Too many connections", 503


class TooMuchInTransfer(CrudError):
    """The bodies or the unread responses of all connections exceed a limit."""

    type, title, status = "too-much-in-transfer", "Too many bytes are in transfer", 503


def refusal(error: CrudError, headers: Iterable[tuple[bytes, bytes]]) -> bytes:
    """Return the bytes of an error response that closes the connection. Its first headers are `headers`."""
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
    """A connection, as `Connections` uses it."""

    loop: asyncio.AbstractEventLoop
    transport: asyncio.Transport
    body_bytes: int
    """Bytes of the incoming body that `Connections` has counted."""
    answer_bytes: int
    """Bytes of large responses that were written and may be unsent."""

    @property
    def uploads(self) -> bool:
        """Return whether a body is arriving."""

    def check(self) -> None:
        """End the connection if its client has missed a deadline."""

    def make_room(self) -> None:
        """End this connection, which waits for its client, without a delay."""

    def refuse(self, error: CrudError) -> None:
        """Send an error response, and end the connection."""


class Connections:
    """The connections of a server, at most `limit`. Used from the thread of the event loop only."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.waiting: OrderedDict[Connection, None] = OrderedDict()
        """Connections that wait for their clients, the longest waiting one first."""
        self.ending: OrderedDict[Connection, None] = OrderedDict()
        """Connections that have sent their last response."""
        self.writing: set[Connection] = set()
        """Connections to which large responses were written."""
        self.body_bytes = 0
        self._open: set[Connection] = set()
        self._uploads: dict[Connection, None] = {}
        self._sweeping: asyncio.TimerHandle | None = None

    def add(self, connection: Connection) -> bool:
        """Add a connection, and close a waiting one if the limit is exceeded. Return False if none was waiting."""
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

    def wait(self, connection: Connection) -> None:
        """Note that a connection waits for its client from now on."""
        self.waiting[connection] = None
        self.waiting.move_to_end(connection)

    def remove(self, connection: Connection) -> None:
        """Forget a connection that has ended."""
        self._open.discard(connection)
        self.waiting.pop(connection, None)
        self.ending.pop(connection, None)
        self.writing.discard(connection)
        self.forget_body(connection)

    def sweep(self) -> None:
        """Make each connection check its deadlines, and schedule the next sweep."""
        self._sweeping = None
        for connection in list(self._open):
            connection.check()
        if self._open:
            loop = asyncio.get_running_loop()
            self._sweeping = loop.call_later(SWEEP_S, self.sweep)

    def unsent(self) -> int:
        """Return the bytes of all unread responses. A response counts as a whole until its last byte is sent."""
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
        """Count bytes of an incomplete body. Above MAX_BODIES, refuse the request that holds the most bytes."""
        connection.body_bytes += size
        self.body_bytes += size
        self._uploads[connection] = None
        if self.body_bytes > MAX_BODIES:
            largest = max(self._uploads, key=lambda upload: upload.body_bytes if upload.uploads else 0)
            if largest.uploads:
                largest.refuse(
                    TooMuchInTransfer(
                        f"found over {MAX_BODIES} bytes of incomplete bodies, most of them of this request; try again"
                    )
                )

    def forget_body(self, connection: Connection) -> None:
        """Stop counting the body of a connection."""
        self.body_bytes -= connection.body_bytes
        connection.body_bytes = 0
        self._uploads.pop(connection, None)
