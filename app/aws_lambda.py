"""The app on AWS Lambda: events in, answers out.

    HTTP requests (payload format 2.0 of an HTTP API or a function URL)  Mangum and the app
    scheduled events, or {"crudstack": "maintain"}                       housekeeping, for as long as there is time

Between invocations the machine may be frozen for hours and thawed, or never again. So nothing is left to run then: housekeeping has an event
of its own. Event loop, connections and local copies stay, and are good or are made again.
"""

from __future__ import annotations

import asyncio
import base64
import logging
import os
import re
import time
from typing import Any, Literal
from urllib.parse import quote

import msgspec
from mangum import Mangum
from msgspec import Struct

from .autocrud.errors import ConfigError, OutcomeUnknown, StoreUnavailable
from .autocrud.http import problems
from .autocrud.http.messages import Receive, Scope, Send
from .autocrud.resource_manager.runtime.deadline import DEADLINE, Deadline
from .base_path import below, put_below
from .main import create_app
from .request_log import RequestLog, write_line
from .settings import Settings

log = logging.getLogger("crudstack.lambda")

TEXT_TYPES = ["text/", "application/json", "application/problem+json", "application/json-patch+json"]
MAX_ANSWER = 6 * 1024 * 1024 - 64 * 1024
"""Bytes of a body in the answer, as Lambda takes it: 6 MB, less what headers may need."""
LARGE = MAX_ANSWER // 2
WITHOUT_CONTENT = frozenset({204, 205, 304})
MEMORY_OF_CPU, DEFAULT_MEMORY = 1769, 512
"""MB of memory with which a function has one whole CPU, and those of a function that does not say how many it has."""
MARGIN_S = 0.5
"""How long before Lambda ends the function a request is answered at the latest."""
DEFAULT_STAGE = "$default"
"""The stage of an HTTP API that is no part of its paths."""
_STAGE = re.compile(r"[A-Za-z0-9_-]+")
"""Names of all other stages."""
LITERAL = "!$&'()*+,;=:@/-._~%"
"""What may stand in a path as it is."""


class _Http(Struct, rename="camel"):
    method: str
    path: str
    source_ip: str


class _RequestContext(Struct, rename="camel"):
    http: _Http
    stage: str = DEFAULT_STAGE
    domain_name: str = ""


class _HttpEvent(Struct, rename="camel"):
    """What must be there for Mangum."""

    version: Literal["2.0"]
    raw_path: str
    request_context: _RequestContext
    raw_query_string: str = ""
    headers: dict[str, str] = {}
    cookies: list[str] | None = None
    body: str | None = None
    is_base64_encoded: bool = False

    def check_text(self) -> None:
        """ValueError for what is no text, or no base64. JSON can hold half a character."""
        context, http = self.request_context, self.request_context.http
        texts = [self.raw_path, self.raw_query_string, self.body or "", http.method, http.path, http.source_ip]
        texts += [context.stage, context.domain_name]
        for text in (*texts, *self.headers, *self.headers.values(), *(self.cookies or ())):
            text.encode()
        if self.is_base64_encoded:
            base64.b64decode(self.body or "", validate=True)


class LambdaHandler:
    """ConfigError for settings under which the app cannot run there."""

    def __init__(self, settings: Settings) -> None:
        if settings.outputs.auth is None:
            raise ConfigError(
                'auth is not set: say who is let in, for example {"mode": "token", ...}; {"mode": "none"} lets everybody in'
            )
        app = create_app(settings, idle_work=False, fits=fits, own_origin=_origin)
        self._crud = app.state.crud
        if lost := [name for name, manager in self._crud.managers.items() if not manager.storage.remote]:
            raise ConfigError(
                f"the storage of {', '.join(lost)} is in this function's memory or on its disk and would end with it: on Lambda use s3-sqlite, or another storage that lies elsewhere"
            )
        # Set first, because it is what Mangum runs everything on; it lives as long as the process.
        self._loop = asyncio.new_event_loop()
        asyncio.set_event_loop(self._loop)
        logging.getLogger("mangum.http").setLevel(logging.WARNING)  # it would log paths
        service = os.environ.get("AWS_LAMBDA_FUNCTION_NAME", "crudstack")
        logged = RequestLog(_InTime(app), service=service)
        self._mangum = Mangum(_AsAsked(logged), lifespan="off", text_mime_types=TEXT_TYPES)

    def __call__(self, event: Any, context: Any) -> dict[str, Any]:
        if _is_scheduled(event):
            return self._maintain(context)
        _check(event)
        return _encoded(self._mangum(event | {"headers": _sound(event.get("headers", {}))}, context))

    async def _maintained(self, budget: float, seconds: float) -> bool:
        """Do housekeeping. Return False if it was cut off after so many seconds."""
        try:
            async with asyncio.timeout(seconds) as limit:
                await self._crud.maintain(budget)
        except TimeoutError:
            if not limit.expired():
                raise
            return False
        return True

    def _maintain(self, context: Any) -> dict[str, Any]:
        began = time.perf_counter()
        budget = max(0.0, _left(context) - 2 * MARGIN_S)
        line = {
            "level": "INFO",
            "message": "maintain",
            "request_id": context.aws_request_id,
            "budget_s": round(budget, 1),
        }
        try:
            # The budget ends between two steps. A step that takes longer is cut off: housekeeping goes on after it was killed, too.
            if not self._loop.run_until_complete(self._maintained(budget, _left(context) - MARGIN_S)):
                line |= {"level": "WARNING", "message": "maintain was cut off; the next event goes on"}
        except BaseException:
            line |= {"level": "ERROR", "message": "maintain failed"}
            raise
        finally:
            line["duration_ms"] = round((time.perf_counter() - began) * 1e3)
            write_line(line)
        return {"maintained": sorted(self._crud.managers), "duration_ms": line["duration_ms"]}


def _cpus() -> float:
    """Return the share of a CPU that Lambda gives a function of this size."""
    return int(os.environ.get("AWS_LAMBDA_FUNCTION_MEMORY_SIZE", DEFAULT_MEMORY)) / MEMORY_OF_CPU


def _is_scheduled(event: Any) -> bool:
    return isinstance(event, dict) and (
        event == {"crudstack": "maintain"} or event.get("detail-type") == "Scheduled Event"
    )


def _check(event: Any) -> None:
    """ValueError for an event that is no HTTP request."""
    if isinstance(event, dict) and "requestContext" in event:
        try:
            msgspec.convert(event, _HttpEvent).check_text()
        except ValueError as error:
            reason = f"it is no HTTP request of payload format 2.0: {error}"
        else:
            return
    else:
        keys = ", ".join(sorted(map(str, event))[:10]) if isinstance(event, dict) else type(event).__name__
        reason = f"found {keys or 'an empty one'}"
    raise ValueError(
        f"this event cannot be handled: {reason}; expected a request of an HTTP API or a function URL (payload format 2.0), a scheduled event, "
        'or {"crudstack": "maintain"}'
    )


def _sound(headers: dict[str, str]) -> dict[str, str]:
    """The headers without those of the gateway that it did not write: Mangum makes addresses and ports of them, whatever they say."""
    return {
        name: value
        for name, value in headers.items()
        if (pattern := _GATEWAY_HEADERS.get(name.lower())) is None or pattern.fullmatch(value)
    }


_GATEWAY_HEADERS = {
    "host": re.compile(r"[A-Za-z0-9._-]+(:\d{1,5})?"),
    "x-forwarded-port": re.compile(r"\d{1,5}"),
    "x-forwarded-proto": re.compile(r"https?"),
}


def _left(context: Any) -> float:
    """Seconds until Lambda ends this invocation."""
    return float(context.get_remaining_time_in_millis()) / 1e3


def _origin(scope: Scope) -> str:
    """Return the origin under which the gateway was asked. It speaks TLS only."""
    return f"https://{scope['aws.event']['requestContext'].get('domainName', '')}"


class _AsAsked:
    """An application that gets the path as the client asked for it, from the event's `rawPath` and from nothing else.

    A function URL hands the path on as it was sent, an HTTP API decodes all of it but `%25`. Decoding once more gives the same
    `path` for both; characters that no path can hold are escaped again for `raw_path`, from which links are made.

    Under the name that AWS gives to an HTTP API, the path begins with the stage unless that is `$default`. The stage becomes
    the `root_path`. Under a name of one's own the stage is no part of the path; see `base_path` for what may be.
    """

    def __init__(self, app: Any) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        event = scope["aws.event"]
        path = quote(event["rawPath"], safe=LITERAL, errors="replace") or "/"
        context = event["requestContext"]
        stage = context.get("stage", DEFAULT_STAGE)
        named = _STAGE.fullmatch(stage) is not None and ".execute-api." in context.get("domainName", "")
        root = f"/{stage}" if named else ""
        rest = below(path, root)
        put_below(scope, "" if rest is None else root, path if rest is None else rest)
        await self._app(scope, receive, send)


class _InTime:
    """An application that answers before Lambda ends the function: a 503 that says what is known, instead of nothing.

    The timer is for what waits. Python that runs cannot be interrupted, so each request has a deadline too, against which such
    work is checked before it begins (see `deadline`).

    What was begun goes on when the machine is used again, or never; so a write's outcome is unknown then.
    """

    def __init__(self, app: Any) -> None:
        self._app, self._cpus = app, _cpus()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        started = False

        async def sent(message: Any) -> None:
            nonlocal started
            started = True
            await send(message)

        seconds = _left(scope["aws.context"]) - MARGIN_S
        DEADLINE.set(Deadline(seconds, self._cpus))  # for the rest of this task, which is this request's own
        try:
            async with asyncio.timeout(seconds):
                await self._app(scope, receive, sent)
        except TimeoutError:
            if started:
                raise
            if scope["method"] in ("GET", "HEAD"):
                response = problems.response(StoreUnavailable("there was no answer in time; try again"))
            else:
                response = problems.response(
                    OutcomeUnknown(
                        "the time was over before the outcome was known; ask again with the same Idempotency-Key, or look first"
                    )
                )
            await response.send(send, head=scope["method"] == "HEAD")


def fits(body: bytes) -> bool:
    """Whether Lambda can send this body: as text, in which JSON's own characters take two bytes, or as base64."""
    return len(body) < LARGE or min(_as_text(body), _as_base64(body)) <= MAX_ANSWER


def _as_text(body: bytes) -> int:
    separators = body.count(b"\xe2\x80\xa8") + body.count(
        b"\xe2\x80\xa9"
    )  # the runtime's encoder writes them as \u2028
    return len(body) + body.count(b'"') + body.count(b"\\") + body.count(b"\n") + 3 * separators


def _as_base64(body: bytes) -> int:
    return (len(body) + 2) // 3 * 4


def _encoded(answer: dict[str, Any]) -> dict[str, Any]:
    """The answer with a large body in the smaller of its two forms, and without a content type if there can be no content.

    Mangum calls each answer that has no content type JSON.
    """
    if answer["statusCode"] in WITHOUT_CONTENT and not answer.get("body"):
        answer.get("headers", {}).pop("content-type", None)
    text = answer.get("body", "")
    if len(text) >= LARGE and not answer.get("isBase64Encoded"):
        body = text.encode()
        if _as_base64(body) < _as_text(body):
            return answer | {"body": base64.b64encode(body).decode(), "isBase64Encoded": True}
    return answer
