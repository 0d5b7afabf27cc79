"""A response that is sent in pieces, in constant memory."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable

from ..errors import CrudError, StoreDamaged
from . import problems
from .messages import Receive, Request, Send
from .transfers import Transfer, transfers

log = logging.getLogger("crudstack.http")

PIECE = 64 * 1024
"""Bytes that are passed to the server at once. The server holds about as many for a client that reads slowly."""


class StreamedResponse:
    """A response whose body is read while it is sent. It counts as a download; see `transfers`.

    request         the request, whose caller the download belongs to
    status          the status
    headers         the headers, with Content-Type
    length          the number of bytes that `content` yields
    content         returns an iterator of the body; called once, unless only headers are sent
    check           called if the first bytes of the body cannot be read; raises the error to send, if it finds a better
                    one than StoreDamaged

    Errors are sent as problems until the first bytes are read. After that, the response ends too early, so that the
    server closes the connection. If the client closes the connection, reading stops.
    """

    def __init__(
        self,
        request: Request,
        status: int,
        headers: tuple[tuple[bytes, bytes], ...],
        length: int,
        content: Callable[[], AsyncIterator[bytes]],
        check: Callable[[], Awaitable[object]],
    ) -> None:
        self._request, self.status, self.headers, self.length = request, status, headers, length
        self._content, self._check = content, check
        self._left = length

    async def send(self, send: Send, *, head: bool = False) -> None:
        """Send the response. With `head`, only the headers are sent."""
        start = {
            "type": "http.response.start",
            "status": self.status,
            "headers": [*self.headers, (b"content-length", b"%d" % self.length)],
        }
        if head or not self.length:
            await send(start)
            await send({"type": "http.response.body", "body": b""})
            return
        started = False
        try:
            async with (
                transfers().downloads.one(self._request.caller.name) as transfer,
                contextlib.aclosing(_pieces(self._content())) as pieces,
            ):
                first = await self._first(pieces)
                started = True
                await send(start)
                await self._send_all(send, first, pieces, transfer)
        except CrudError as error:
            if not started:
                await problems.response(error).send(send)
            else:
                log.error("a download of %s ends too early: %s", self._request.scope.get(problems.ROUTE), error)

    async def _first(self, pieces: AsyncGenerator[bytes]) -> bytes:
        try:
            return await anext(pieces)
        except StopAsyncIteration:
            found = StoreDamaged("a file has no content; restore it from a backup")
        except StoreDamaged as error:
            found = error
        await self._check()
        raise found

    async def _send_all(self, send: Send, first: bytes, pieces: AsyncGenerator[bytes], transfer: Transfer) -> None:
        await self._send_piece(send, first, transfer)
        gone = asyncio.ensure_future(_disconnected(self._request.receive))
        try:
            async for piece in pieces:
                if gone.done():
                    return
                await self._send_piece(send, piece, transfer)
        finally:
            gone.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await gone

    async def _send_piece(self, send: Send, piece: bytes, transfer: Transfer) -> None:
        self._left -= len(piece)
        with transfer.waits():
            await send({"type": "http.response.body", "body": piece, "more_body": self._left > 0})


async def _pieces(chunks: AsyncIterator[bytes]) -> AsyncGenerator[bytes]:
    """Yield the bytes of chunks in pieces that are not too large for the server."""
    try:
        async for chunk in chunks:
            for start in range(0, len(chunk), PIECE):
                yield chunk[start : start + PIECE]
    finally:
        if isinstance(chunks, AsyncGenerator):
            await chunks.aclose()


async def _disconnected(receive: Receive) -> None:
    """Wait until the client has closed the connection."""
    while (await receive())["type"] != "http.disconnect":
        pass
