"""HTTP/1.1 on one connection: uvicorn's protocol, with a bound on everything that a client can send or leave unread.

Uvicorn's parser (httptools) has no limit on bytes, and its protocol none on time; docs/limits.md lists those that hold here.

Invariants (`connections` has those of all connections):

- P1 *A client makes a connection hold a bounded number of bytes.* The parser is fed at most MAX_HEAD bytes of a head
  before the head is complete, exactly the bytes of a body with a length, and MAX_CHUNKS chunks and MAX_FRAMING bytes of
  framing of a chunked one. It is fed one request at a time: the bytes of the next one wait, unparsed, until the answer
  has been read, and reading is paused meanwhile. So never more is held than was read at once.
- P2 *Waiting for a client ends.* In each phase in which the client has the next move (head, body, reading the answer, idle,
  closing) a deadline runs, and a client that keeps moving must keep up a minimal rate. No deadline runs while the
  application works, or does not read.
- P3 *A refusal is the last answer on its connection, and can be read.* The bytes that follow are read and thrown away for
  a short time: closing at once would reset the connection before the client has read the answer (RFC 9112, 9.6). An answer
  that is given before the body has arrived is treated alike.
- P4 *Where a request ends is never guessed.* A head ends at its first empty line, which the parser takes in no other form.
  A body with a length ends there. Only the parser knows where a chunked body ends; if a request follows in the same bytes,
  the connection ends after the answer, and that request was not read.
"""

from __future__ import annotations

import asyncio
from typing import Any, cast
from urllib.parse import unquote

import httptools
from uvicorn.protocols.http.flow_control import HIGH_WATER_LIMIT
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from ..autocrud.errors import CrudError
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
from .http_answers import AnswerTransport, HeldFlow, WholeAnswer

MAX_LINE = 16 * 1024
MAX_HEAD = 32 * 1024
MAX_FIELDS = 100
MAX_CHUNKS = 32 * 1024
MAX_FRAMING = 32 * 1024
"""Bytes of chunk extensions and trailers of a body."""
CHUNK_FRAMING = 12
"""Bytes that each chunk may have for its size and line ends."""
SLICE = 32 * 1024
"""Bytes of a chunked body that are parsed before other connections have their turn."""

HEAD_S = 10.0
IDLE_S = 5.0
BODY_S = 10.0
WRITE_S = 30.0
"""How long a client may take to read the first of an answer, or the next. The buffers of two kernels lie between: they take
megabytes before a reader of 40 KB a second is seen to read."""
MIN_RATE = 4096
"""Bytes a second that a client must send of a body, or read of an answer, after BODY_S or WRITE_S."""
LINGER_S = 5.0
MAX_LINGER = 64 * 1024 * 1024

HEAD, BODY, ANSWER, CLOSING = range(4)
"""What a connection waits for: the head of a request, its body, the application, the end."""

END = b"\r\n\r\n"
FRAMING = frozenset({b"host", b"content-length", b"transfer-encoding", b"expect", b"upgrade"})


class _OneAtATime(Exception):
    """A request began in the bytes after a chunked body, whose end only the parser knows."""


class LimitedProtocol(HttpToolsProtocol):
    """A connection. The answers are uvicorn's; what is read, and when, is decided here."""

    cycle: WholeAnswer

    def __init__(self, connections: Connections, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.phase = HEAD
        self.body_bytes = self.answer_bytes = 0
        self._registry = connections
        self._since = self.loop.time()
        self._tail = b""
        """The last bytes of an incomplete head, where its end may begin."""
        self._head_bytes = 0
        self._line_ended = False
        self._left: int | None = 0
        """Bytes of the body that are still to come; None if it is chunked."""
        self._raw = self._received = self._chunks = 0
        self._keep_alive = True
        self.held = b""
        """Bytes after the request that is being answered."""
        self._refusal: CrudError | None = None
        self._dropped = 0
        self._progress = (0, 0)
        """Bytes of the body and of the unsent answer when the client last moved, which was at `_moved`."""
        self._moved = self._unsent_since = self._since
        self._unsent_at_first = 0

    @property
    def uploads(self) -> bool:
        return self.phase == BODY

    # Connections

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(cast("asyncio.Transport", transport))
        self.flow = HeldFlow(self.transport, lambda: bool(self.held))
        self._answers = AnswerTransport(self.transport, self._finish, self._count_answer)
        if self._registry.add(self):
            self._registry.waiting[self] = None
        else:
            self.refuse(
                TooManyConnections(
                    f"found {self._registry.limit} connections with requests in progress, which is the limit; try again"
                ),
                linger=False,
            )

    def connection_lost(self, exc: Exception | None) -> None:
        self._abandon_request()
        self._closing()
        self._registry.remove(self)
        super().connection_lost(exc)

    def eof_received(self) -> bool:  # type: ignore[override]
        """Return whether the connection stays open: a client that has sent all of its request may still read the answer."""
        if self.phase != ANSWER or self.held:
            return False
        self.cycle.keep_alive = False
        return True

    def shutdown(self) -> None:
        """End the connection as soon as the answer in progress is written; requests that have not arrived are dropped."""
        if self.phase == ANSWER and not self.cycle.response_complete:
            self.cycle.keep_alive = False
            self.held = b""
        else:
            self._abandon_request()
            self._close()

    def make_room(self) -> None:
        """End a connection that waits for its client, now."""
        if self.phase == CLOSING or self.transport.get_write_buffer_size():
            self._abort()
        elif self.phase == HEAD and not self._head_bytes:
            self._close()
        else:
            error = TooManyConnections("found newer connections than this one, and no room for all; try again")
            self.refuse(error, linger=False)

    def check(self) -> None:
        """End the connection if its client is late."""
        now = self.loop.time()
        unsent = self.transport.get_write_buffer_size()
        progress = (self._raw, unsent)
        if progress != self._progress:
            self._progress, self._moved = progress, now
        if unsent:
            self._check_reader(now, unsent)
            return
        self._unsent_at_first = 0
        waited = now - self._since
        if self.phase == HEAD:
            if self._head_bytes and waited > HEAD_S:
                self.refuse(RequestTimeout(f"found no complete head after {HEAD_S:g} s; send it at once"))
            elif not self._head_bytes and waited > (HEAD_S if self.cycle is None else IDLE_S):
                self._close()
        elif self.phase == BODY:
            if self.flow.read_paused:  # the application does not read
                self._since += SWEEP_S
            elif waited > BODY_S + self._raw / MIN_RATE or now - max(self._moved, self._since) > BODY_S:
                self.refuse(
                    RequestTimeout(
                        f"found {self._received} bytes of a body after {waited:.0f} s;"
                        f" expected {MIN_RATE} bytes a second after the first {BODY_S:g} s"
                    )
                )
        elif self.phase == CLOSING and waited > LINGER_S:
            self.transport.abort()

    def _check_reader(self, now: float, unsent: int) -> None:
        self._since = now  # nothing else is late before the answer is read
        if unsent > self._unsent_at_first:
            self._unsent_since, self._unsent_at_first = now, unsent
        read = self._unsent_at_first - unsent
        if now - self._unsent_since > WRITE_S + read / MIN_RATE or now - self._moved > WRITE_S:
            self._abort()

    # What the client sends

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
        """Keep bytes for later, and stop reading. So never more is held than was read at once."""
        self.held += data
        self.flow.pause_reading()

    def _feed(self, data: bytes) -> None:
        """Give the parser the bytes of one request."""
        while data:
            if self.phase == HEAD:
                taken = self._head_part(data)
            elif self.phase == BODY:
                taken = min(len(data), SLICE if self._left is None else self._left)
            else:
                if self.phase == ANSWER:
                    self._hold(data)
                return
            sliced = self.phase == BODY and taken < len(data) and self._left is None
            if taken:
                self._parse(data if taken == len(data) else data[:taken])
                data = data[taken:]
            if sliced and self.phase == BODY:
                self._hold(data)
                self.loop.call_soon(self._go_on)
                return

    def _go_on(self) -> None:
        """Parse what is held, if it is its turn."""
        if self.held and self.phase in (HEAD, BODY):
            data, self.held = self.held, b""
            self._feed(data)
            if self.cycle is None or len(self.cycle.body) <= HIGH_WATER_LIMIT:
                self.flow.resume_reading()

    def _head_part(self, data: bytes) -> int:
        """Return how many bytes belong to the head of a request. Refuse it if these are too many."""
        before = self._head_bytes
        if not before:
            self._since = self.loop.time()
        found = data.find(END)
        end = found + len(END) if found >= 0 else len(data)
        if self._tail:
            overlap = (self._tail + data[: len(END) - 1]).find(END)
            if overlap >= 0:
                found, end = 0, overlap + len(END) - len(self._tail)
        self._head_bytes += end
        if found >= 0:
            self._tail = b""
            if self._head_bytes <= MAX_HEAD:
                self._line_ended = True
                return end
        else:
            self._tail = (self._tail + data)[1 - len(END) :]
        if not self._line_ended:
            line = data.find(b"\r\n", 0, end)
            self._line_ended = line >= 0
            if before + (line if line >= 0 else end) > MAX_LINE:
                self.refuse(UriTooLong(f"found a request line of over {MAX_LINE} bytes; expected at most {MAX_LINE}"))
                return 0
        if self._head_bytes > MAX_HEAD:
            self.refuse(HeadersTooLarge(f"found over {MAX_HEAD} bytes of headers; expected at most {MAX_HEAD}"))
            return 0
        return end

    def _parse(self, data: bytes) -> None:
        chunked = self.phase == BODY and self._left is None
        if self.phase == BODY:
            self._raw += len(data)
            if self._left is not None:
                self._left -= len(data)
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade:
            pass  # the request was read, and is answered as if it had not asked
        except httptools.HttpParserError as error:
            if isinstance(error.__context__, _OneAtATime):
                self.cycle.keep_alive = self._keep_alive = False
            elif self.phase != CLOSING:
                said = "it could not be read" if isinstance(error, httptools.HttpParserCallbackError) else str(error)
                self.refuse(
                    self._refusal or MalformedRequest(f"found a request that breaks HTTP: {said}; expected HTTP/1.1")
                )
            return
        if chunked and self.phase == BODY:
            self._check_framing()

    def _check_framing(self) -> None:
        if self._chunks > MAX_CHUNKS:
            self.refuse(MalformedRequest(f"found a body of over {MAX_CHUNKS} chunks; expected fewer and larger ones"))
        elif self._raw - self._received > MAX_FRAMING + CHUNK_FRAMING * self._chunks:
            self.refuse(
                HeadersTooLarge(
                    f"found over {MAX_FRAMING} bytes of chunk extensions or trailers; expected at most {MAX_FRAMING}"
                )
            )

    # What the parser finds

    def on_message_begin(self) -> None:
        if self.phase != HEAD:
            raise _OneAtATime
        super().on_message_begin()

    def on_header(self, name: bytes, value: bytes) -> None:
        self.headers.append((name.lower(), value))

    def on_headers_complete(self) -> None:
        parser, scope, headers = self.parser, self.scope, self.headers
        version = parser.get_http_version()
        if version not in ("1.0", "1.1"):
            raise self._refused(MalformedRequest(f"found HTTP/{version}; expected HTTP/1.1 or HTTP/1.0"))
        if version != "1.1":
            scope["http_version"] = version
        scope["method"] = parser.get_method().decode("ascii")
        self._left, expect, hosts = 0, False, 0
        for name, value in headers:
            if name not in FRAMING:
                continue
            if name == b"content-length":
                self._left = int(value)
            elif name == b"host":
                hosts += 1
            elif name == b"transfer-encoding":
                self._left = None
                if value.strip().lower() != b"chunked" or version != "1.1":
                    raise self._refused(CodingNotSupported("found a transfer coding besides chunked; expected chunked"))
            elif name == b"expect":
                expect = value.strip().lower() == b"100-continue"
            elif value.strip().lower() == b"websocket":
                raise self._refused(UpgradeNotSupported("found Upgrade: websocket; expected a plain HTTP request"))
        if self._left != 0 and parser.should_upgrade():  # the parser would take the body for the next request
            raise self._refused(UpgradeNotSupported("found an upgrade of a request with a body; expected one of both"))
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
        self._begin(expect, keep_alive=version != "1.0" and parser.should_keep_alive())

    def _target(self, headers: list[tuple[bytes, bytes]]) -> bytes:
        """Note the query of the request's target, and return its path. An absolute one says itself for which host it is."""
        target = httptools.parse_url(self.url)
        if target.host is not None:
            port = b"" if target.port is None else b":%d" % target.port
            host = b"[%b]" % target.host if b":" in target.host else target.host
            headers[:] = [(b"host", host + port), *(pair for pair in headers if pair[0] != b"host")]
        self.scope["query_string"] = target.query or b""
        path: bytes = target.path or b"/"
        return path

    def _begin(self, expect: bool, *, keep_alive: bool) -> None:
        self.headers = []  # trailers are no headers of the request (RFC 9110, 6.5.1)
        self.phase, self._keep_alive = BODY, keep_alive
        self._raw = self._received = self._chunks = 0
        # Until the body has arrived no further request can follow on this connection.
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
        self._chunks += 1

    def on_body(self, body: bytes) -> None:
        cycle = self.cycle
        self._received += len(body)
        if self.phase != BODY or cycle.disconnected or cycle.response_complete:
            return
        cycle.body += body
        if self._left != 0:
            self._registry.count_body(self, len(body))
        if len(cycle.body) > HIGH_WATER_LIMIT:
            self.flow.pause_reading()
        cycle.message_event.set()

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

    # Answers

    def on_response_complete(self) -> None:
        self.server_state.total_requests += 1
        if self.body_bytes:
            self._registry.forget_body(self)
        if self.phase != ANSWER or self.transport.is_closing():
            return
        self._registry.waiting[self] = None
        if self.flow.write_paused:
            self.flow.pause_reading()
        else:
            self._next_request()

    def _next_request(self) -> None:
        self.phase, self._since = HEAD, self.loop.time()
        self._head_bytes, self._line_ended = 0, False
        if self.held:
            self._go_on()
        else:
            self.flow.resume_reading()

    def _count_answer(self, size: int) -> None:
        self.answer_bytes += size
        self._registry.writing.add(self)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self.phase == ANSWER and self.cycle.response_complete and not self.transport.is_closing():
            self._next_request()

    def send_400_response(self, msg: str) -> None:
        self.refuse(MalformedRequest(msg))

    def _refused(self, error: CrudError) -> CrudError:
        """Note why the parser is stopped, and return what stops it."""
        self._refusal = error
        return error

    def refuse(self, error: CrudError, *, linger: bool = True) -> None:
        """Answer with an error, and end the connection. Nothing is written into an answer that has begun."""
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
        """Tell the application, if it works on a request, that the client is gone."""
        if self.phase in (BODY, ANSWER) and not self.cycle.response_complete:
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        self._registry.forget_body(self)

    def _abort(self) -> None:
        """End the connection now, with what is not sent."""
        self._abandon_request()
        self._closing()
        self.transport.abort()

    def _finish(self) -> None:
        """End the connection after the answer: at once if the client has sent nothing more, otherwise when it has read."""
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
