"""A request and a response, as thin wrappers of ASGI, so that frequent routes spend no time in a framework."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, MutableMapping
from contextlib import AbstractContextManager
from typing import Any, NamedTuple
from urllib.parse import parse_qsl

from ..access import ANONYMOUS
from ..errors import CrudError, InvalidData, InvalidQuery, Violation
from ..resource_manager.engine.caller import Caller
from ..resource_manager.model.json_shape import EXPECTED_SHAPE, misshapen, weight
from ..resource_manager.runtime.threads import HEAVY_BYTES, heavy, large_turns

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]

JSON = b"application/json"


MAX_QUERY = 32 * 1024
"""The largest query string, in bytes."""
MAX_PARAMETERS = 1000
STREAMED = "crudstack.streamed"
"""The key in the scope of a function of the server, which a handler calls before it receives a body in parts.

The server then applies its limits for uploads: parts that were received hold no memory.
"""
CHUNK = 128 * 1024
"""Bytes of a streamed body that are collected before they are passed on, because each step has a cost."""
_ANYBODY = Caller(ANONYMOUS.name)


class BodyTooLarge(CrudError):
    """The request body exceeds the limit."""

    type, title, status = "body-too-large", "The body is too large", 413


class QueryTooLong(CrudError):
    """The query string exceeds the limit."""

    type, title, status = "query-too-long", "The query string is too long", 414


class UnsupportedMediaType(CrudError):
    """The route does not accept the content type of the body. The response lists the accepted types."""

    type, title, status = "unsupported-media-type", "This content type is not taken here", 415


class ClientGone(Exception):
    """The client closed the connection while its body was read, so no response is sent."""


class Response(NamedTuple):
    """A response.

    `brief` is a shorter body for a write whose full response is too large to be sent.
    """

    status: int
    body: bytes = b""
    headers: tuple[tuple[bytes, bytes], ...] = ()
    content_type: bytes = JSON
    brief: bytes | None = None

    async def send(self, send: Send, *, head: bool = False) -> None:
        """Send the response. With `head`, only the headers are sent."""
        headers = [*self.headers]
        if self.status not in (204, 304):
            headers.append((b"content-type", self.content_type))
            headers.append((b"content-length", b"%d" % len(self.body)))
        await send({"type": "http.response.start", "status": self.status, "headers": headers})
        await send({"type": "http.response.body", "body": b"" if head else self.body})


def route_path(scope: Scope) -> str:
    """Return the path that routes are compared with: `path` without the prefix in `root_path`, like Starlette."""
    path: str = scope["path"]
    root: str = scope.get("root_path", "")
    return path[len(root) :] if root and path.startswith(f"{root}/") else path


class Request:
    """A request to a route.

    `rest` is the part of the path after the model, split at slashes. `caller` is the caller on whose behalf the engine
    works.
    """

    __slots__ = ("_max_body", "_read", "_receive", "_weight", "caller", "rest", "scope")

    def __init__(self, scope: Scope, receive: Receive, rest: list[str], max_body: int) -> None:
        self.scope, self.rest = scope, rest
        self.caller = _ANYBODY
        self._receive, self._max_body = receive, max_body
        self._read: bytes | None = None
        self._weight = 0  # the memory budget that a large body holds

    @property
    def receive(self) -> Receive:
        """The ASGI function that receives the body."""
        return self._receive

    @property
    def path(self) -> str:
        """The path as the client sent it, with the prefix of the API, so that it can be used in links."""
        raw: bytes | None = self.scope.get("raw_path")
        return raw.split(b"?")[0].decode("latin-1") if raw else str(self.scope["path"])

    def header(self, name: bytes) -> str | None:
        """Return a header by its lower-case name, or None.

        Several headers of this name are joined to one list (RFC 9110, 5.3).
        """
        values = [value for key, value in self.scope["headers"] if key == name]
        return b", ".join(values).decode("latin-1") if values else None

    def parameters(self) -> list[tuple[str, str]]:
        """Return the decoded parameters of the query string."""
        return parse_parameters(self.scope["query_string"])

    def options(self, *allowed: str) -> dict[str, str]:
        """Return the query string as a dictionary.

        Raises InvalidQuery if a parameter is not in `allowed`, or is given twice.
        """
        if not self.scope["query_string"]:
            return {}
        found: dict[str, str] = {}
        for name, value in self.parameters():
            if name not in allowed:
                raise unknown_parameter(name, allowed)
            if name in found:
                raise bad_parameter(name, "given twice")
            found[name] = value
        return found

    async def body(self, *content_types: str) -> bytes:
        """Return the whole body. Waits until the client has sent it.

        Raises UnsupportedMediaType if the body has another content type than these, or a Content-Encoding. A missing
        content type counts as JSON. Raises BodyTooLarge if the body exceeds the limit.
        """
        self.content_type(*content_types)
        if (coding := self.header(b"content-encoding")) is not None and coding.strip().lower() != "identity":
            raise UnsupportedMediaType(f"expected a body without Content-Encoding, got {coding[:60]!r}")
        return await self.raw_body()

    async def json(self, *content_types: str) -> bytes:
        """Return the whole body, like `body`, and check its shape. A large body waits for its turn.

        Raises InvalidData if the JSON text is nested too deeply or has too many objects, lists or values.
        """
        found = await self.body(*content_types)
        if len(found) < HEAVY_BYTES:
            too_much = misshapen(found)
        else:
            of_tree = weight(found)
            await large_turns().take(len(found), of_tree)
            self._weight = of_tree
            too_much = await heavy(len(found), lambda: misshapen(found), found)
        if too_much is not None:
            raise InvalidData(f"the body {too_much}; {EXPECTED_SHAPE}", (Violation("", too_much),))
        return found

    def release(self) -> None:
        """Release the memory budget of a large body. Called when the response is made."""
        if self._weight:
            large_turns().leave(self._weight)
            self._weight = 0

    async def raw_body(self) -> bytes:
        """Return the whole body, of any content type."""
        if self._read is None:
            self._read = await self._receive_all()
        return self._read

    async def stream(self, waits: Callable[[], AbstractContextManager[None]]) -> AsyncIterator[bytes]:
        """Yield the body while it arrives, in chunks of at least CHUNK bytes, except the last one.

        waits  a context that is entered for the time in which the client sends

        Raises ClientGone if the client closes the connection before the end of the body.
        """
        if (streamed := self.scope.get(STREAMED)) is not None:
            streamed()
        part, total, more = bytearray(), 0, True
        while more:
            with waits():
                message = await self._receive()
            if message["type"] == "http.disconnect":
                raise ClientGone
            chunk, more = message.get("body", b""), message.get("more_body", False)
            total += len(chunk)
            part += chunk
            if len(part) >= CHUNK or (part and not more):
                yield bytes(part)
                part.clear()
        if (length := self.header(b"content-length")) is not None and length != str(total):
            raise ClientGone

    async def _receive_all(self) -> bytes:
        message = await self._receive()
        if message["type"] == "http.disconnect":
            raise ClientGone
        body: bytes = message.get("body", b"")
        if not message.get("more_body", False) and len(body) <= self._max_body:
            return body
        chunks, size = [body], len(body)
        while size <= self._max_body and message.get("more_body", False):
            message = await self._receive()
            if message["type"] == "http.disconnect":
                raise ClientGone
            chunk = message.get("body", b"")
            size += len(chunk)
            chunks.append(chunk)
        if size > self._max_body:
            raise BodyTooLarge(f"expected at most {self._max_body} bytes")
        return b"".join(chunks)

    def content_type(self, *expected: str) -> str:
        """Return the media type of the body, in lower case and without parameters.

        The default for `expected` is JSON. Raises UnsupportedMediaType if the body has another type.
        """
        given = self.header(b"content-type")
        if given == "application/json" and not expected:
            return given
        media = "application/json" if given is None else given.partition(";")[0].strip().lower()
        if media not in (expected or ("application/json",)):
            wanted = ", ".join(expected or ("application/json",))
            raise UnsupportedMediaType(f"expected {wanted}, got {media or 'an empty content type'}")
        return media


def parse_parameters(raw: bytes) -> list[tuple[str, str]]:
    """Return the decoded parameters of a query string.

    Raises QueryTooLong, or InvalidQuery if there are too many parameters or the string is not percent-encoded UTF-8.
    """
    if not raw:
        return []
    if len(raw) > MAX_QUERY:
        raise QueryTooLong(f"the query string has {len(raw)} bytes; expected at most {MAX_QUERY}")
    if (count := raw.count(b"&") + 1) > MAX_PARAMETERS:
        raise InvalidQuery(f"the query string has {count} parameters; expected at most {MAX_PARAMETERS}")
    try:
        return parse_qsl(raw.decode("ascii"), keep_blank_values=True, errors="strict")
    except ValueError:
        raise InvalidQuery("the query string is not percent-encoded UTF-8") from None


def bad_parameter(name: str, detail: str) -> InvalidQuery:
    """Return the error for an invalid parameter of the query string."""
    return InvalidQuery(f"{name}: {detail}", (Violation(f"?{name}", detail),))


def unknown_parameter(name: str, allowed: Iterable[str]) -> InvalidQuery:
    """Return the error for an unknown parameter, which lists the allowed ones."""
    known = ", ".join(allowed)
    return bad_parameter(name, f"unknown parameter; expected {f'one of {known}' if known else 'none'}")


def parse_integer(name: str, text: str, least: int, most: int) -> int:
    """Return a whole number of the query string. Raises InvalidQuery if it is out of bounds."""
    if text.isascii() and text.isdigit() and len(text) < 20 and least <= int(text) <= most:
        return int(text)
    raise bad_parameter(name, f"expected a whole number from {least} to {most}, got {text[:60]!r}")


def parse_flag(name: str, text: str) -> bool:
    """Return a bool of the query string. Raises InvalidQuery if it is not "true" or "false"."""
    if text in ("true", "false"):
        return text == "true"
    raise bad_parameter(name, f"expected true or false, got {text[:60]!r}")
