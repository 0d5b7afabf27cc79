"""Flow control and the writing of responses, derived from uvicorn's classes for `http_protocol`."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from typing_extensions import override
from uvicorn.protocols.http.flow_control import HIGH_WATER_LIMIT, FlowControl
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, RequestResponseCycle

from .request_body import MIN_RATE

WRITE_S = 30.0
"""Seconds within which a client must read something of a response.

The buffers of both kernels hold megabytes, so progress is visible only rarely if a client reads 40 KB per second.
"""
BODY_MESSAGE = "http.response.body"
UNUSUAL = frozenset({b"connection", b"transfer-encoding"})
WITHOUT_BODY = frozenset({204, 304})


class HeldFlow(FlowControl):
    """Flow control that does not resume reading while the connection holds bytes that it has not parsed."""

    def __init__(self, transport: asyncio.Transport, holds: Callable[[], bool]) -> None:
        super().__init__(transport)
        self._holds = holds

    @override
    def resume_reading(self) -> None:
        if self.read_paused and not self._holds():
            super().resume_reading()


class AnswerTransport:
    """The transport for the writer of a response: `close` lets the client read the response first."""

    __slots__ = ("_count", "_write", "close", "is_closing")

    def __init__(self, transport: asyncio.Transport, close: Callable[[], None], count: Callable[[int], None]) -> None:
        self._write, self.is_closing, self.close, self._count = transport.write, transport.is_closing, close, count

    def write(self, data: bytes) -> None:
        """Write bytes of a response, and count them."""
        self._count(len(data))
        self._write(data)


class ReadDeadline:
    """The time in which a client must read what was written to it. `written` counts all bytes of responses."""

    __slots__ = ("_read_at_first", "_since", "written")

    def __init__(self) -> None:
        self.written = 0
        self._since: float | None = None
        self._read_at_first = 0

    def is_missed(self, now: float, unsent: int, pause: float) -> bool:
        """Return whether the client reads too slowly. Called regularly while bytes are unsent.

        A response in parts is written as fast as the client reads, so bytes are unsent all the time. Only the number of
        bytes that the client has read shows its progress.

        pause  seconds since the client has read anything
        """
        read = self.written - unsent
        if self._since is None:
            self._since, self._read_at_first = now, read
        return now - self._since > WRITE_S + (read - self._read_at_first) / MIN_RATE or pause > WRITE_S

    def restart(self) -> None:
        """Begin again: no bytes are unsent."""
        self._since = None


class WholeAnswer(RequestResponseCycle):
    """A request and its response. A response with one part is written in one step.

    uvicorn checks each header with two regular expressions. Counting the line ends of the whole head is enough to
    show that no header contains one. uvicorn itself writes all other responses.
    """

    _start: Any = None

    @override
    async def send(self, message: Any) -> None:
        start = self._start
        if start is None:
            if message["type"] == "http.response.start" and not self.response_started:
                self._start = message
                return
        else:
            self._start = None
            if self._written(start, message):
                return
            await super().send(start)
        await super().send(message)

    def _written(self, start: Any, message: Any) -> bool:
        """Write a response that has one part. Return False if it has several parts, or needs uvicorn's own writer."""
        if self.disconnected or self.flow.write_paused or message.get("more_body") or message["type"] != BODY_MESSAGE:
            return False
        status, body = start["status"], message.get("body", b"")
        lines = [STATUS_LINE[status]]
        length = None
        for name, value in (*self.default_headers, *start.get("headers", ())):
            if name == b"content-length":
                length = value
            elif name in UNUSUAL:
                return False
            lines.append(b"%b: %b\r\n" % (name, value))
        is_head = self.scope["method"] == "HEAD"
        if not is_head and (status not in WITHOUT_BODY if length is None else length != b"%d" % len(body)):
            return False
        if not self.keep_alive:
            lines.append(b"connection: close\r\n")
        lines.append(b"\r\n")
        head = b"".join(lines)
        if not len(lines) == head.count(b"\n") == head.count(b"\r"):
            return False
        self.response_started = self.response_complete = True
        self.waiting_for_100_continue = False
        if is_head or not body:
            self.transport.write(head)
        elif len(body) < HIGH_WATER_LIMIT:
            self.transport.write(head + body)
        else:
            self.transport.write(head)
            self.transport.write(body)
        self.message_event.set()
        if not self.keep_alive:
            self.transport.close()
        self.on_response()
        return True
