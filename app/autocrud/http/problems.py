"""Errors as problem details (RFC 9457): stable types, the location of each violation, and no traceback."""

from __future__ import annotations

import logging
from typing import Any

import msgspec

from ..access import Unauthenticated
from ..errors import CrudError, KeyInFlight, NotEnoughTime, Overloaded, StoreUnavailable, WriteContention
from .messages import Response, Scope
from .transfers import TooManyDownloads

log = logging.getLogger("crudstack.http")

CONTENT_TYPE = b"application/problem+json"
MAX_TEXT, MAX_VIOLATIONS = 1000, 100
AGAIN = (Overloaded, StoreUnavailable, WriteContention, KeyInFlight, TooManyDownloads)
"""Errors after which the same request can succeed a second later, besides those with the status 429."""
ROUTE = "crudstack.route"
"""The key in the scope of the template of the path, which logs show."""
_encode = msgspec.json.Encoder().encode


class NoSuchRoute(CrudError):
    """The path has no route."""

    type, title, status = "no-such-route", "Not found", 404


class MethodNotAllowed(CrudError):
    """The route does not have this method."""

    type, title, status = "method-not-allowed", "This method is not allowed here", 405


class ResponseTooLarge(CrudError):
    """The response is too large to be sent."""

    type, title, status = "response-too-large", "The answer is too large to be sent", 400


class PreconditionRequired(CrudError):
    """The write has no If-Match, which is required."""

    type, title, status = "precondition-required", "If-Match is required", 428


def response(error: CrudError, headers: tuple[tuple[bytes, bytes], ...] = ()) -> Response:
    """Return the response for an error, with Retry-After if the same request can succeed a second later."""
    problem: dict[str, Any] = {
        "type": f"urn:crudstack:{error.type}",
        "title": error.title,
        "status": error.status,
        "detail": shortened(error.detail),
    }
    if error.violations:
        problem["errors"] = [
            {"pointer": shortened(violation.pointer), "detail": shortened(violation.detail)}
            for violation in error.violations[:MAX_VIOLATIONS]
        ]
    if error.status == 429 or isinstance(error, AGAIN) or (isinstance(error, NotEnoughTime) and error.may_fit):
        headers = (*headers, (b"retry-after", b"1"))
    if isinstance(error, Unauthenticated):
        headers = (*headers, (b"www-authenticate", error.challenge.encode()))
    return Response(error.status, _encode(problem), headers, CONTENT_TYPE)


def shortened(text: str) -> str:
    """Return a text for a message, cut after MAX_TEXT characters: texts of clients and libraries may be very long."""
    return text if len(text) <= MAX_TEXT else f"{text[:MAX_TEXT]}..."


def unexpected(error: Exception, scope: Scope) -> Response:
    """Return the response for an unexpected exception. It is logged without the path, and not shown to the client."""
    log.error("%s %s failed", scope["method"], scope.get(ROUTE, "none"), exc_info=error)
    return response(CrudError("the server failed; its log says why"))
