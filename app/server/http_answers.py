"""How uvicorn writes an answer on a connection of `http_protocol`."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from uvicorn.protocols.http.flow_control import HIGH_WATER_LIMIT, FlowControl
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, RequestResponseCycle

BODY_MESSAGE = "http.response.body"
UNUSUAL = frozenset({b"connection", b"transfer-encoding"})
WITHOUT_BODY = frozenset({204, 304})


class HeldFlow(FlowControl):
    """Reading stays paused, whoever wants to resume it, while bytes are held that were read before."""

    def __init__(self, transport: asyncio.Transport, holds: Callable[[], bool]) -> None:
        super().__init__(transport)
        self._holds = holds

    def resume_reading(self) -> None:
        if self.read_paused and not self._holds():
            super().resume_reading()


class AnswerTransport:
    """The transport as the writer of an answer sees it: closing waits until the client has read."""

    __slots__ = ("_count", "_write", "close", "is_closing")

    def __init__(self, transport: asyncio.Transport, close: Callable[[], None], count: Callable[[int], None]) -> None:
        self._write, self.is_closing, self.close, self._count = transport.write, transport.is_closing, close, count

    def write(self, data: bytes) -> None:
        if len(data) > HIGH_WATER_LIMIT:
            self._count(len(data))
        self._write(data)


class WholeAnswer(RequestResponseCycle):
    """A request and its answer, which is written at once if it has one part.

    Uvicorn searches each header with two patterns. It is enough to count the line ends of all of them: a header cannot
    add one. Any answer that is not usual is left to uvicorn.
    """

    _start: Any = None

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
        """Write an answer of one part. Return False if it has several, or something unusual about it."""
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
