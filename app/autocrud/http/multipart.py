"""A body of multipart/form-data with exactly one file (RFC 7578), read in constant memory.

A field `sha256` before the file may announce the SHA-256 of its content. No other field is accepted.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import NamedTuple

from ..resource_manager.model.blob import OCTET_STREAM
from .header_values import InvalidUpload, file_name, with_parameters

MAX_BOUNDARY = 70
MAX_PART_HEAD = 16 * 1024
"""Largest headers of a part, in bytes."""
MAX_FIELD = 1024
"""Largest value of a field, in bytes."""
MAX_PADDING = 1024
"""Bytes after the last boundary, and of white space after each boundary."""
OVERHEAD = 64 * 1024
"""A body is at most this many bytes larger than its file."""


class FilePart(NamedTuple):
    """The file of a body.

    name          its name as the client sent it; "" if it has none
    content_type  its media type
    sha256        the SHA-256 that the field before it announces, or None
    content       yields its content, and raises InvalidUpload at the end if more than one file was sent
    """

    name: str
    content_type: str
    sha256: str | None
    content: AsyncIterator[bytes]


async def file_part(content_type: str, chunks: AsyncIterator[bytes]) -> FilePart:
    """Read a body up to the content of its file. Raises InvalidUpload.

    content_type  the Content-Type of the request, with its boundary
    chunks        yields the body
    """
    _, parameters = with_parameters("Content-Type", content_type)
    boundary = parameters.get("boundary", "")
    if not 1 <= len(boundary) <= MAX_BOUNDARY or not boundary.isascii():
        raise InvalidUpload(
            f"Content-Type: expected a boundary of 1 to {MAX_BOUNDARY} characters, got {boundary[:80]!r}"
        )
    body = _Body(chunks, b"\r\n--" + boundary.encode())
    sha256: str | None = None
    if not await body.begins():
        raise InvalidUpload("expected a body that begins with its boundary")
    while await body.next_part():
        headers = await body.headers()
        kind, named = with_parameters("Content-Disposition", headers.get("content-disposition", ""))
        if kind != "form-data":
            raise InvalidUpload(f"expected parts with Content-Disposition: form-data, got {kind[:80]!r}")
        name = file_name("Content-Disposition", named)
        if name is not None:
            if not name:
                raise InvalidUpload("expected a file, got a part with an empty file name: no file was chosen")
            return FilePart(name, headers.get("content-type", OCTET_STREAM), sha256, _content(body))
        if named.get("name") != "sha256" or sha256 is not None:
            raise InvalidUpload(
                f"expected exactly one file, and at most a field sha256 before it; got the field"
                f" {named.get('name', '')[:80]!r}"
            )
        sha256 = (await body.small_value()).decode("latin-1").strip().lower()
    raise InvalidUpload("expected exactly one file, got none")


async def _content(body: _Body) -> AsyncIterator[bytes]:
    async for chunk in body.content():
        yield chunk
    if await body.next_part():
        raise InvalidUpload("expected exactly one file and nothing after it; send other files by requests of their own")
    await body.end()


class _Body:
    """The parts of a body. The boundary is searched in a window of the chunks that arrived last."""

    def __init__(self, chunks: AsyncIterator[bytes], delimiter: bytes) -> None:
        self._chunks, self._delimiter = chunks, delimiter
        self._window = bytearray(b"\r\n")  # so that the first boundary is like the others

    async def _more(self) -> None:
        try:
            self._window += await anext(self._chunks)
        except StopAsyncIteration:
            raise InvalidUpload("expected the boundary at the end of the body; the body ends before it") from None

    async def _needs(self, size: int) -> None:
        while len(self._window) < size:
            await self._more()

    async def _line(self, end: bytes, most: int, what: str) -> bytes:
        """Return the bytes before `end`, and remove both from the window."""
        while (at := self._window.find(end)) < 0 and len(self._window) <= most:
            await self._more()
        if not 0 <= at <= most:
            raise InvalidUpload(f"expected at most {most} bytes of {what}")
        found = bytes(self._window[:at])
        del self._window[: at + len(end)]
        return found

    async def begins(self) -> bool:
        """Return whether the body begins with its boundary, and remove it."""
        await self._needs(len(self._delimiter))
        begins = self._window.startswith(self._delimiter)
        del self._window[: len(self._delimiter)]
        return begins

    async def next_part(self) -> bool:
        """Return whether a part follows a boundary. False: it was the last one."""
        await self._needs(2)
        if self._window.startswith(b"--"):
            del self._window[:2]
            return False
        if (await self._line(b"\r\n", MAX_PADDING, "white space after a boundary")).strip(b" \t"):
            raise InvalidUpload("expected a line break after each boundary")
        return True

    async def headers(self) -> dict[str, str]:
        """Return the headers of a part, by lower-case name."""
        await self._needs(2)
        if self._window.startswith(b"\r\n"):
            del self._window[:2]
            return {}
        found: dict[str, str] = {}
        for line in (await self._line(b"\r\n\r\n", MAX_PART_HEAD, "headers of a part")).split(b"\r\n"):
            name, colon, value = line.decode("latin-1").partition(":")
            if not colon or name.lower() in found:
                raise InvalidUpload(f"expected headers of a part like Name: value, each once; got {name[:80]!r}")
            found[name.lower()] = value.strip(" \t")
        if found.get("content-transfer-encoding", "binary").lower() not in ("binary", "8bit", "7bit"):
            raise InvalidUpload("expected a part without Content-Transfer-Encoding")
        return found

    async def small_value(self) -> bytes:
        """Return the content of a part that is a field, and remove the boundary after it."""
        return await self._line(self._delimiter, MAX_FIELD, "a field")

    async def content(self) -> AsyncIterator[bytes]:
        """Yield the content of a part, and remove the boundary after it."""
        kept = len(self._delimiter) - 1  # bytes that may be the beginning of a boundary
        while (at := self._window.find(self._delimiter)) < 0:
            if len(self._window) > kept:
                found = bytes(self._window[:-kept])
                del self._window[:-kept]
                yield found
            await self._more()
        if at:
            yield bytes(self._window[:at])
        del self._window[: at + len(self._delimiter)]

    async def end(self) -> None:
        """Read the rest of the body, which has no meaning."""
        left = MAX_PADDING - len(self._window)
        async for chunk in self._chunks:
            left -= len(chunk)
        if left < 0:
            raise InvalidUpload(f"expected at most {MAX_PADDING} bytes after the last boundary")
