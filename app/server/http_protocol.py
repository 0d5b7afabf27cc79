"""HTTP/1.1 on one connection: uvicorn's protocol, with limits on everything that a client can send or leave unread.

uvicorn's parser (httptools) limits no bytes, and its protocol limits no time; docs/limits.md lists the limits of this
module. `LimitedProtocol` is a subclass of uvicorn's HttpToolsProtocol. uvicorn's code starts the application, controls
the flow and writes responses. The code of this module feeds the parser and ends connections.

Invariants (`connections` has those of all connections):

- P1 *A connection holds a bounded number of bytes.* The parser gets at most MAX_HEAD bytes before the head is complete.
  If a body has a length, the parser gets exactly that length. If a body is chunked, the parser gets at most MAX_CHUNKS
  chunks and MAX_FRAMING bytes of framing. The parser gets one request at a time: the bytes of the next request wait,
  unparsed, until the client has read the response. During that time, the connection does not read from its socket. So
  a connection never holds more than one read.
- P2 *Waiting for a client ends.* A deadline runs in each phase in which the client must act (head, body, reading the
  response, idle, closing). A client that sends or reads continuously must keep up a minimal rate. No deadline runs
  while the application works or does not read the body.
- P3 *A refusal is the last response on its connection, and the client can read it.* The bytes that follow are read and
  discarded for a short time, because closing at once would reset the connection before the client has read the response
  (RFC 9112, 9.6). A response that is sent before the body has arrived is treated in the same way.
- P4 *The end of a request is never guessed.* A head ends at its first empty line, and the parser accepts no other form.
  A body with a length ends after that length. Only the parser knows the end of a chunked body; if another request
  follows in the same bytes, the connection ends after the response, and that request is not processed.
"""

from __future__ import annotations

import asyncio
from typing import Any, cast
from urllib.parse import unquote

import httptools
from typing_extensions import override
from uvicorn.protocols.http.flow_control import HIGH_WATER_LIMIT
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from ..autocrud.errors import CrudError
from ..autocrud.http.messages import STREAMED
from .connections import (
    SWEEP_S,
    CodingNotSupported,
    Connections,
    HeadersTooLarge,
    MalformedRequest,
    RequestTimeout,
    TooManyConnections,
    UpgradeNotSupported,
    UriTooLong,
    refusal,
)
from .http_answers import AnswerTransport, HeldFlow, ReadDeadline, WholeAnswer
from .request_body import RequestBody
from .request_head import MAX_LINE, RequestHead

MAX_FIELDS = 100
SLICE = 32 * 1024
"""Bytes of a chunked body that are parsed before the event loop serves other connections."""

HEAD_S = 10.0
IDLE_S = 5.0
LINGER_S = 5.0
MAX_LINGER = 64 * 1024 * 1024

HEAD, BODY, ANSWER, CLOSING = range(4)
"""Phases of a connection. It waits for the head of a request, the rest of the body, the application, or its end."""

FRAMING = frozenset({b"host", b"content-length", b"transfer-encoding", b"expect", b"upgrade"})


class _OneAtATime(Exception):
    """A request begins in the same bytes as the end of a chunked body."""


class LimitedProtocol(HttpToolsProtocol):
    """A connection. uvicorn writes the responses; this class decides what is read and when."""

    cycle: WholeAnswer

    def __init__(self, connections: Connections, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.phase = HEAD
        self.body_bytes = self.answer_bytes = 0
        self._registry = connections
        self._since = self.loop.time()
        self._head = RequestHead()
        self._body = RequestBody()
        self._keep_alive = True
        self.held = b""
        """Unparsed bytes after the request in progress."""
        self._refusal: CrudError | None = None
        self._dropped = 0
        self._progress = (0, 0)
        """Bytes that the client had sent and read at `_moved`, when it last sent or read something."""
        self._moved = self._since
        self._reading = ReadDeadline()

    @property
    def uploads(self) -> bool:
        """Return whether a body is arriving."""
        return self.phase == BODY

    # Connections

    @override
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(cast("asyncio.Transport", transport))
        self.flow = HeldFlow(self.transport, lambda: bool(self.held))
        self._answers = AnswerTransport(self.transport, self._finish, self._wrote)
        if self._registry.add(self):
            self._registry.wait(self)
        else:
            self.refuse(
                TooManyConnections(
                    f"found {self._registry.limit} connections with requests in progress, which is the limit; try again"
                ),
                linger=False,
            )

    @override
    def connection_lost(self, exc: Exception | None) -> None:
        self._abandon_request()
        self._closing()
        self._registry.remove(self)
        super().connection_lost(exc)

    @override
    def eof_received(self) -> bool:  # type: ignore[override]
        """Keep the connection open (True) if the client has sent its whole request and may read the response."""
        if self.phase != ANSWER or self.held:
            return False
        self.cycle.keep_alive = False
        return True

    @override
    def shutdown(self) -> None:
        """End the connection after the response in progress. Incomplete requests and streamed responses are dropped."""
        if self.phase == ANSWER and self.cycle.response_started and not self.cycle.response_complete:
            self._abort()
        elif self.phase == ANSWER and not self.cycle.response_complete:
            self.cycle.keep_alive = False
            self.held = b""
        else:
            self._abandon_request()
            self._close()

    def make_room(self) -> None:
        """End this connection, which waits for its client, without a delay."""
        if self.phase == CLOSING or self.transport.get_write_buffer_size():
            self._abort()
        elif self.phase == HEAD and not self._head.size:
            self._close()
        else:
            error = TooManyConnections("found newer connections than this one, and no room for all; try again")
            self.refuse(error, linger=False)

    def check(self) -> None:
        """End the connection if its client has missed a deadline."""
        now = self.loop.time()
        unsent = self.transport.get_write_buffer_size()
        progress = (self._body.raw, self._reading.written - unsent)
        if progress != self._progress:
            self._progress, self._moved = progress, now
        if unsent:
            self._since = now  # no other deadline runs until the client has read the response
            if self._reading.is_missed(now, unsent, now - self._moved):
                self._abort()
            return
        self._reading.restart()
        waited = now - self._since
        if self.phase == HEAD:
            if self._head.size and waited > HEAD_S:
                self.refuse(RequestTimeout(f"found no complete head after {HEAD_S:g} s; send it at once"))
            elif not self._head.size and waited > (HEAD_S if self.cycle is None else IDLE_S):
                self._close()
        elif self.phase == BODY:
            if self.flow.read_paused:  # the application does not read
                self._since += SWEEP_S
            elif (late := self._body.lateness(waited, now - max(self._moved, self._since))) is not None:
                self.refuse(late)
        elif self.phase == CLOSING and waited > LINGER_S:
            self.transport.abort()

    # Input from the client

    @override
    def data_received(self, data: bytes) -> None:
        if self.phase == CLOSING:
            self._dropped += len(data)
            if self._dropped > MAX_LINGER:
                self.transport.abort()
        elif self.phase == ANSWER or self.held:
            self._hold(data)
        else:
            self._feed(data)

    def _hold(self, data: bytes) -> None:
        """Keep bytes for later, and stop reading. So the connection never holds more than one read."""
        self.held += data
        self.flow.pause_reading()

    def _feed(self, data: bytes) -> None:
        """Pass the bytes of one request to the parser."""
        while data:
            if self.phase == HEAD:
                taken = self._head_part(data)
            elif self.phase == BODY:
                taken = min(len(data), SLICE if self._body.left is None else self._body.left)
            else:
                if self.phase == ANSWER:
                    self._hold(data)
                return
            sliced = self.phase == BODY and taken < len(data) and self._body.left is None
            if taken:
                self._parse(data if taken == len(data) else data[:taken])
                data = data[taken:]
            if sliced and self.phase == BODY:
                self._hold(data)
                self.loop.call_soon(self._go_on)
                return

    def _go_on(self) -> None:
        """Parse the held bytes if no request is in progress."""
        if self.held and self.phase in (HEAD, BODY):
            data, self.held = self.held, b""
            self._feed(data)
            if self.cycle is None or len(self.cycle.body) <= HIGH_WATER_LIMIT:
                self.flow.resume_reading()

    def _head_part(self, data: bytes) -> int:
        """Return how many of the bytes belong to the head. Refuse the request if the head exceeds a limit."""
        if not self._head.size:
            self._since = self.loop.time()
        try:
            return self._head.add(data)
        except CrudError as error:
            self.refuse(error)
            return 0

    def _parse(self, data: bytes) -> None:
        chunked = self.phase == BODY and self._body.left is None
        if self.phase == BODY:
            self._body.arrived(len(data))
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade:
            pass  # the request is complete, and is answered without the upgrade
        except httptools.HttpParserError as error:
            if isinstance(error.__context__, _OneAtATime):
                self.cycle.keep_alive = self._keep_alive = False
            elif self.phase != CLOSING:
                said = "it could not be read" if isinstance(error, httptools.HttpParserCallbackError) else str(error)
                self.refuse(
                    self._refusal or MalformedRequest(f"found a request that breaks HTTP: {said}; expected HTTP/1.1")
                )
            return
        if chunked and self.phase == BODY and (wrong := self._body.framing_error()) is not None:
            self.refuse(wrong)

    # Callbacks of the parser

    @override
    def on_message_begin(self) -> None:
        if self.phase != HEAD:
            raise _OneAtATime
        super().on_message_begin()

    @override
    def on_header(self, name: bytes, value: bytes) -> None:
        self.headers.append((name.lower(), value))

    @override
    def on_headers_complete(self) -> None:
        parser, scope, headers = self.parser, self.scope, self.headers
        version = parser.get_http_version()
        if version not in ("1.0", "1.1"):
            raise self._refused(MalformedRequest(f"found HTTP/{version}; expected HTTP/1.1 or HTTP/1.0"))
        if version != "1.1":
            scope["http_version"] = version
        scope["method"] = parser.get_method().decode("ascii")
        body, expect, hosts = RequestBody(), False, 0
        for name, value in headers:
            if name not in FRAMING:
                continue
            if name == b"content-length":
                body.left = int(value)
            elif name == b"host":
                hosts += 1
            elif name == b"transfer-encoding":
                body.left = None
                if value.strip().lower() != b"chunked" or version != "1.1":
                    raise self._refused(CodingNotSupported("found a transfer coding besides chunked; expected chunked"))
            elif name == b"expect":
                expect = value.strip().lower() == b"100-continue"
            elif value.strip().lower() == b"websocket":
                raise self._refused(UpgradeNotSupported("found Upgrade: websocket; expected a plain HTTP request"))
        if body.left != 0 and parser.should_upgrade():  # the parser would parse the body as the next request
            raise self._refused(
                UpgradeNotSupported("found an upgrade of a request with a body; expected only one of the two")
            )
        if len(headers) > MAX_FIELDS:
            raise self._refused(HeadersTooLarge(f"found {len(headers)} header fields; expected at most {MAX_FIELDS}"))
        if len(self.url) > MAX_LINE:
            raise self._refused(
                UriTooLong(f"found a request target of {len(self.url)} bytes; expected at most {MAX_LINE}")
            )
        if hosts > 1 or (not hosts and version != "1.0"):
            raise self._refused(MalformedRequest(f"found {hosts} Host headers; expected one"))
        raw_path = self._target(headers)
        path = raw_path.decode("ascii")
        scope["path"] = unquote(path) if "%" in path else path
        scope["raw_path"] = raw_path
        self._begin(body, expect, keep_alive=version != "1.0" and parser.should_keep_alive())

    def _target(self, headers: list[tuple[bytes, bytes]]) -> bytes:
        """Set the query string, and return the path. The host of an absolute target replaces the Host header."""
        target = httptools.parse_url(self.url)
        if target.host is not None:
            port = b"" if target.port is None else b":%d" % target.port
            host = b"[%b]" % target.host if b":" in target.host else target.host
            headers[:] = [(b"host", host + port), *(pair for pair in headers if pair[0] != b"host")]
        self.scope["query_string"] = target.query or b""
        path: bytes = target.path or b"/"
        return path

    def _begin(self, body: RequestBody, expect: bool, *, keep_alive: bool) -> None:
        self.headers = []  # trailers are not headers of the request (RFC 9110, 6.5.1)
        self.phase, self._keep_alive, self._body = BODY, keep_alive, body
        cast("dict[str, Any]", self.scope)[STREAMED] = self._stream_body
        # No further request can follow on this connection before the body has arrived.
        self.cycle = WholeAnswer(
            scope=self.scope,
            transport=cast("asyncio.Transport", self._answers),
            flow=self.flow,
            logger=self.logger,
            access_logger=self.access_logger,
            access_log=False,
            default_headers=self.server_state.default_headers,
            message_event=asyncio.Event(),
            expect_100_continue=expect,
            keep_alive=False,
            on_response=self.on_response_complete,
        )
        self._start_asgi_task(self.cycle, self.app)

    def on_chunk_header(self) -> None:
        """Count the chunks of a body."""
        self._body.chunks += 1

    def _stream_body(self) -> None:
        """Apply the limits of uploads to the body: what has arrived holds no memory, and has more time."""
        self._body.streamed = True
        self._registry.forget_body(self)

    @override
    def on_body(self, body: bytes) -> None:
        cycle = self.cycle
        self._body.received += len(body)
        if self.phase != BODY or cycle.disconnected or cycle.response_complete:
            return
        cycle.body += body
        if self._body.streamed:
            self._registry.wait(self)
        elif self._body.left != 0:
            self._registry.count_body(self, len(body))
        if len(cycle.body) > HIGH_WATER_LIMIT:
            self.flow.pause_reading()
        cycle.message_event.set()

    @override
    def on_message_complete(self) -> None:
        if self.phase != BODY:
            return
        cycle = self.cycle
        self.phase = ANSWER
        self._registry.waiting.pop(self, None)
        if not cycle.response_started:
            cycle.keep_alive = self._keep_alive
        cycle.more_body = False
        cycle.message_event.set()

    # Responses

    @override
    def on_response_complete(self) -> None:
        self.server_state.total_requests += 1
        if self.body_bytes:
            self._registry.forget_body(self)
        if self.phase != ANSWER or self.transport.is_closing():
            return
        self._registry.wait(self)
        if self.flow.write_paused:
            self.flow.pause_reading()
        else:
            self._next_request()

    def _next_request(self) -> None:
        self.phase, self._since = HEAD, self.loop.time()
        self._head = RequestHead()
        if self.held:
            self._go_on()
        else:
            self.flow.resume_reading()

    def _wrote(self, size: int) -> None:
        self._reading.written += size
        if not self.cycle.response_complete:  # further parts of the response wait until the client has read this one
            self._registry.wait(self)
        if size > HIGH_WATER_LIMIT:
            self.answer_bytes += size
            self._registry.writing.add(self)

    @override
    def resume_writing(self) -> None:
        super().resume_writing()
        if self.phase == ANSWER and self.cycle.response_complete and not self.transport.is_closing():
            self._next_request()

    @override
    def send_400_response(self, msg: str) -> None:
        self.refuse(MalformedRequest(msg))

    def _refused(self, error: CrudError) -> CrudError:
        """Remember the reason of a refusal, and return the error to raise in the parser's callback."""
        self._refusal = error
        return error

    def refuse(self, error: CrudError, *, linger: bool = True) -> None:
        """Send an error response and end the connection. If a response has begun, abort the connection instead."""
        if self.transport.is_closing() or (self.phase in (BODY, ANSWER) and self.cycle.response_started):
            self._abort()
            return
        self._abandon_request()
        self.transport.write(refusal(error, self.server_state.default_headers))
        if linger:
            self._finish()
        else:
            self._close()

    def _abandon_request(self) -> None:
        """Tell the application, if it works on a request, that the client has disconnected."""
        if self.phase in (BODY, ANSWER) and not self.cycle.response_complete:
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        self._registry.forget_body(self)

    def _abort(self) -> None:
        """End the connection at once, and drop unsent bytes."""
        self._abandon_request()
        self._closing()
        self.transport.abort()

    def _finish(self) -> None:
        """End the connection after the response: at once, or after LINGER_S if the client may send more."""
        if self.phase == ANSWER and not self.held:
            self._close()
            return
        self._closing()
        if self.transport.can_write_eof():
            self.transport.write_eof()
        self.flow.resume_reading()

    def _close(self) -> None:
        self._closing()
        self.transport.close()

    def _closing(self) -> None:
        self.phase, self._since, self.held = CLOSING, self.loop.time(), b""
        self._registry.waiting.pop(self, None)
        self._registry.ending[self] = None
