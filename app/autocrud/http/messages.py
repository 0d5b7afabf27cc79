"""A request and a response, as thin as ASGI allows: the hot routes spend no time in a framework's."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, MutableMapping
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
"""Bytes of a query string."""
MAX_PARAMETERS = 1000
_ANYBODY = Caller(ANONYMOUS.name)


class BodyTooLarge(CrudError):
    type, title, status = "body-too-large", "The body is too large", 413


class QueryTooLong(CrudError):
    type, title, status = "query-too-long", "The query string is too long", 414


class UnsupportedMediaType(CrudError):
    """The body's content type is none that this route takes; `accept` is the header that says which are."""

    type, title, status = "unsupported-media-type", "This content type is not taken here", 415


class ClientGone(Exception):
    """The client closed the connection while its body was read; nobody is there to be answered."""


class Response(NamedTuple):
    """`brief` is what is said of a write whose full answer cannot be sent, because it would be too large."""

    status: int
    body: bytes = b""
    headers: tuple[tuple[bytes, bytes], ...] = ()
    content_type: bytes = JSON
    brief: bytes | None = None

    async def send(self, send: Send, *, head: bool = False) -> None:
        headers = [*self.headers]
        if self.status not in (204, 304):
            headers.append((b"content-type", self.content_type))
            headers.append((b"content-length", b"%d" % len(self.body)))
        await send({"type": "http.response.start", "status": self.status, "headers": headers})
        await send({"type": "http.response.body", "body": b"" if head else self.body})


def route_path(scope: Scope) -> str:
    """Return the path that routes are compared with: `path` without the prefix in `root_path`, as Starlette does it."""
    path: str = scope["path"]
    root: str = scope.get("root_path", "")
    return path[len(root) :] if root and path.startswith(f"{root}/") else path


class Request:
    """`rest` is what follows the model's path, split at slashes."""

    __slots__ = ("_max_body", "_read", "_receive", "_weight", "caller", "rest", "scope")

    def __init__(self, scope: Scope, receive: Receive, rest: list[str], max_body: int) -> None:
        self.scope, self.rest = scope, rest
        self.caller = _ANYBODY
        self._receive, self._max_body = receive, max_body
        self._read: bytes | None = None
        self._weight = 0  # of a large body whose turn it is

    @property
    def receive(self) -> Receive:
        return self._receive

    @property
    def path(self) -> str:
        """Return the path as the client wrote it, with the prefix under which the API is reached: links are made of it."""
        raw: bytes | None = self.scope.get("raw_path")
        return raw.split(b"?")[0].decode("latin-1") if raw else str(self.scope["path"])

    def header(self, name: bytes) -> str | None:
        """A header, by lower-case name; several of the same name are one list (RFC 9110, 5.3)."""
        values = [value for key, value in self.scope["headers"] if key == name]
        return b", ".join(values).decode("latin-1") if values else None

    def parameters(self) -> list[tuple[str, str]]:
        """The query string, decoded."""
        return parse_parameters(self.scope["query_string"])

    def options(self, *allowed: str) -> dict[str, str]:
        """The query string where each parameter stands at most once and all are allowed."""
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
        """The whole body. UnsupportedMediaType unless it is of one of these types (none sent counts as JSON)."""
        self.content_type(*content_types)
        if (coding := self.header(b"content-encoding")) is not None and coding.strip().lower() != "identity":
            raise UnsupportedMediaType(f"expected a body without Content-Encoding, got {coding[:60]!r}")
        return await self.raw_body()

    async def json(self, *content_types: str) -> bytes:
        """The whole body, as `body` gives it. InvalidData if it holds more than a JSON text may."""
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
        """Give back what the request was given; its answer is made."""
        if self._weight:
            large_turns().leave(self._weight)
            self._weight = 0

    async def raw_body(self) -> bytes:
        """The whole body, whatever its type."""
        if self._read is None:
            self._read = await self._receive_all()
        return self._read

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
        given = self.header(b"content-type")
        if given == "application/json" and not expected:
            return given
        media = "application/json" if given is None else given.partition(";")[0].strip().lower()
        if media not in (expected or ("application/json",)):
            wanted = ", ".join(expected or ("application/json",))
            raise UnsupportedMediaType(f"expected {wanted}, got {media or 'an empty content type'}")
        return media


def parse_parameters(raw: bytes) -> list[tuple[str, str]]:
    """The parameters of a query string. QueryTooLong, or InvalidQuery if it is not UTF-8."""
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
    return InvalidQuery(f"{name}: {detail}", (Violation(f"?{name}", detail),))


def unknown_parameter(name: str, allowed: Iterable[str]) -> InvalidQuery:
    known = ", ".join(allowed)
    return bad_parameter(name, f"unknown parameter; expected {f'one of {known}' if known else 'none'}")


def parse_integer(name: str, text: str, least: int, most: int) -> int:
    """A whole number in a query string."""
    if text.isascii() and text.isdigit() and len(text) < 20 and least <= int(text) <= most:
        return int(text)
    raise bad_parameter(name, f"expected a whole number from {least} to {most}, got {text[:60]!r}")


def parse_flag(name: str, text: str) -> bool:
    if text in ("true", "false"):
        return text == "true"
    raise bad_parameter(name, f"expected true or false, got {text[:60]!r}")
