"""Conditional requests (RFC 9110, section 13): ETags, If-Match and If-None-Match."""

from __future__ import annotations

import re

from ..errors import CrudError, InvalidQuery
from ..resource_manager.basic import Version
from ..resource_manager.records import NO_STATE
from .messages import Request
from .problems import PreconditionRequired

_ETAG = re.compile(r'(W/)?"([\x21\x23-\x7e\x80-\xff]*)"')
_COMMA = re.compile(r"\s*(?:(,)\s*|\Z)")
MAX_ETAGS = 100


class InvalidCondition(InvalidQuery):
    """A header with a condition or an Idempotency-Key is invalid."""

    type, title = "invalid-condition", "The condition cannot be understood"


class PreconditionFailed(CrudError):
    """The content does not have an ETag that If-Match allows."""

    type, title, status = "precondition-failed", "The content has another ETag", 412


def etags(header: str) -> list[tuple[bool, str]]:
    """Return the ETags of a header, as pairs of "is weak" and the text between the quotes.

    Raises InvalidCondition if the header is not a list of ETags, or has more than MAX_ETAGS of them.
    """
    tags: list[tuple[bool, str]] = []
    at = 0
    while True:
        match = _ETAG.match(header, at)
        if match is None:
            raise InvalidCondition(f'expected * or a list of ETags like "1-0123456789abcdef", got {header[:100]!r}')
        if len(tags) == MAX_ETAGS:
            raise InvalidCondition(f"expected at most {MAX_ETAGS} ETags")
        tags.append((match[1] is not None, match[2]))
        rest = _COMMA.match(header, match.end())
        if rest is None:
            raise InvalidCondition(f"expected a comma between ETags, got {header[:100]!r}")
        if not rest[1]:
            return tags
        at = rest.end()


def expected(request: Request, required: bool) -> list[Version] | None:
    """Return the states that If-Match allows, or None if it allows all states.

    A weak ETag never matches. Raises PreconditionRequired if If-Match is required and missing.
    """
    header = request.header(b"if-match")
    if header is None:
        if required:
            raise PreconditionRequired("send the ETag of the state that you want to change as If-Match")
        return None
    if header.strip() == "*":
        return None
    return [NO_STATE if weak else Version.of_opaque_tag(opaque) for weak, opaque in etags(header)]


def parse_version(etag: str) -> Version:
    """Return the state that the ETag in a body names, or NO_STATE if no resource can have it."""
    ((weak, opaque),) = etags(etag) if etag.count('"') == 2 else [(True, "")]
    return NO_STATE if weak else Version.of_opaque_tag(opaque)


def not_modified(request: Request, etag: str) -> bool:
    """Return whether If-None-Match says that the client already has the state with this ETag, or content."""
    header = request.header(b"if-none-match")
    if header is None:
        return False
    return header.strip() == "*" or any(f'"{opaque}"' == etag for _, opaque in etags(header))


def check_match(request: Request, etag: str) -> None:
    """Raise PreconditionFailed if If-Match does not allow content with this ETag."""
    header = request.header(b"if-match")
    if header is None or header.strip() == "*":
        return
    if not any(not weak and f'"{opaque}"' == etag for weak, opaque in etags(header)):
        raise PreconditionFailed(f"expected content with one of the ETags in If-Match, found {etag}")


def creates(request: Request) -> bool:
    """Return whether a PUT has `If-None-Match: *`, so that it creates the resource and never replaces one.

    Raises InvalidCondition if If-None-Match has another value, or is sent together with If-Match.
    """
    header = request.header(b"if-none-match")
    if header is None:
        return False
    if header.strip() != "*":
        raise InvalidCondition("a PUT takes only * as If-None-Match; use If-Match to name a state")
    if request.header(b"if-match") is not None:
        raise InvalidCondition("If-Match and If-None-Match: * cannot both hold; send one of them")
    return True
