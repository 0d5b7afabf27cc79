"""The app on AWS Lambda.

    HTTP requests (payload format 2.0 of an HTTP API or a function URL)  Mangum passes them to the app
    scheduled events, or {"crudstack": "maintain"}                       run maintenance for the remaining time

Lambda freezes the machine between invocations, for hours or for ever. So no work is left running after a response, and
maintenance has events of its own. The event loop, connections and local copies stay in memory; each is checked before
its next use, and replaced if it is no longer valid.
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
from .old_exports import remove_old_exports
from .request_log import RequestLog, write_line
from .settings import Settings
from .wiring import pairs

log = logging.getLogger("crudstack.lambda")

TEXT_TYPES = ["text/", "application/json", "application/problem+json", "application/json-patch+json"]
MAX_ANSWER = 6 * 1024 * 1024 - 64 * 1024
"""Bytes of a body in a response of Lambda: 6 MB minus a reserve for headers."""
LARGE = MAX_ANSWER // 2
"""Bytes below which a body fits in any encoding: escapes at most double it."""
WITHOUT_CONTENT = frozenset({204, 205, 304})
MEMORY_OF_CPU, DEFAULT_MEMORY = 1769, 512
"""MB of memory that give a function one whole CPU, and the MB to assume if the environment does not name them."""
MARGIN_S = 0.5
"""Seconds between the last moment for a response and the end of the invocation."""
DEFAULT_STAGE = "$default"
"""The stage of an HTTP API that its paths do not contain."""
_STAGE = re.compile(r"[A-Za-z0-9_-]+")
"""The pattern of the names of all other stages."""
LITERAL = "!$&'()*+,;=:@/-._~%"
"""Characters of a path that need no percent-encoding."""


class _Http(Struct, rename="camel"):
    method: str
    path: str
    source_ip: str


class _RequestContext(Struct, rename="camel"):
    http: _Http
    stage: str = DEFAULT_STAGE
    domain_name: str = ""


class _HttpEvent(Struct, rename="camel"):
    """The fields of an event that Mangum requires."""

    version: Literal["2.0"]
    raw_path: str
    request_context: _RequestContext
    raw_query_string: str = ""
    headers: dict[str, str] = {}
    cookies: list[str] | None = None
    body: str | None = None
    is_base64_encoded: bool = False

    def check_text(self) -> None:
        """Raise ValueError if a text has unpaired surrogates, which JSON can hold, or if the body is not base64."""
        context, http = self.request_context, self.request_context.http
        texts = [self.raw_path, self.raw_query_string, self.body or "", http.method, http.path, http.source_ip]
        texts += [context.stage, context.domain_name]
        for text in (*texts, *self.headers, *self.headers.values(), *(self.cookies or ())):
            text.encode()
        if self.is_base64_encoded:
            base64.b64decode(self.body or "", validate=True)


class LambdaHandler:
    """The handler of the Lambda function. Raises ConfigError if the app cannot run on Lambda with these settings."""

    def __init__(self, settings: Settings) -> None:
        if settings.outputs.auth is None:
            raise ConfigError(
                'auth is not set: expected the authentication, for example {"mode": "token", ...};'
                ' {"mode": "none"} gives every caller access'
            )
        self._settings = settings
        app = create_app(settings, idle_work=False, fits=fits, own_origin=_origin)
        self._crud = app.state.crud
        if lost := [name for name, manager in self._crud.managers.items() if not manager.storage.remote]:
            raise ConfigError(
                f"the storage of {', '.join(lost)} is in the memory or on the disk of this function and would be lost"
                " with it: on Lambda use s3-sqlite, or another remote storage"
            )
        # Mangum runs the app on the current event loop, so the loop is set first. It lives as long as the process.
        self._loop = asyncio.new_event_loop()
        asyncio.set_event_loop(self._loop)
        logging.getLogger("mangum.http").setLevel(logging.WARNING)  # its lines contain paths
        service = os.environ.get("AWS_LAMBDA_FUNCTION_NAME", "crudstack")
        logged = RequestLog(_InTime(app), service=service)
        self._mangum = Mangum(_AsAsked(logged), lifespan="off", text_mime_types=TEXT_TYPES)

    def __call__(self, event: Any, context: Any) -> dict[str, Any]:
        """Answer an HTTP request, or run maintenance. Raises ValueError for any other event."""
        if _is_scheduled(event):
            return self._maintain(context)
        _check(event)
        return _encoded(self._mangum(event | {"headers": _sound(event.get("headers", {}))}, context))

    async def _maintained(self, budget: float, seconds: float) -> bool:
        """Run all maintenance with a budget of seconds. Return False if it was cancelled after `seconds`."""
        try:
            async with asyncio.timeout(seconds) as limit:
                began = time.monotonic()
                await self._remove_old_exports()
                await self._crud.maintain(max(0.0, budget - (time.monotonic() - began)))
        except TimeoutError:
            if not limit.expired():
                raise
            return False
        return True

    async def _remove_old_exports(self) -> None:
        """Remove archives that commands have left in the bucket, if the stack has a function for backups."""
        if not any(pair.servers for pair in pairs(self._settings)):
            return
        from botocore.exceptions import BotoCoreError, ClientError

        try:
            removed = await asyncio.to_thread(remove_old_exports, self._settings)
        except (BotoCoreError, ClientError) as error:
            log.warning("old archives in the bucket could not be removed, it is tried again: %s", error)
        else:
            if removed:
                log.info("%d versions of old archives were removed from the bucket", removed)

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
            # The budget is checked between two steps. A longer step is cancelled, which is safe at any point.
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
    """Return the number of CPUs, usually a fraction of one, that Lambda gives a function with this memory."""
    return int(os.environ.get("AWS_LAMBDA_FUNCTION_MEMORY_SIZE", DEFAULT_MEMORY)) / MEMORY_OF_CPU


def _is_scheduled(event: Any) -> bool:
    return isinstance(event, dict) and (
        event == {"crudstack": "maintain"} or event.get("detail-type") == "Scheduled Event"
    )


def _check(event: Any) -> None:
    """Raise ValueError if an event is not an HTTP request."""
    if isinstance(event, dict) and "requestContext" in event:
        try:
            msgspec.convert(event, _HttpEvent).check_text()
        except ValueError as error:
            reason = f"it is not an HTTP request of payload format 2.0: {error}"
        else:
            return
    else:
        keys = ", ".join(sorted(map(str, event))[:10]) if isinstance(event, dict) else type(event).__name__
        reason = f"found {keys or 'an empty one'}"
    raise ValueError(
        f"this event cannot be handled: {reason}; expected a request of an HTTP API or a function URL (payload format"
        ' 2.0), a scheduled event, or {"crudstack": "maintain"}'
    )


def _sound(headers: dict[str, str]) -> dict[str, str]:
    """Return the headers without malformed values of those that a gateway sets and Mangum parses."""
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
    """Return the seconds until Lambda ends this invocation."""
    return float(context.get_remaining_time_in_millis()) / 1e3


def _origin(scope: Scope) -> str:
    """Return the origin of the gateway in this request. Gateways support TLS only."""
    return f"https://{scope['aws.event']['requestContext'].get('domainName', '')}"


class _AsAsked:
    """ASGI middleware that sets the path of a request from the event's `rawPath`.

    A function URL passes the path as the client sent it; an HTTP API decodes everything but `%25`. Decoding once more
    gives the same `path` for both. Characters that a path cannot contain are encoded again in `raw_path`, which links
    use.

    Under the host name that AWS gives to an HTTP API, the path begins with the stage, unless the stage is `$default`.
    The stage becomes the `root_path`. Under a custom domain name the path does not contain the stage; see `base_path`
    for the prefixes of such names.
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
    """ASGI middleware that answers 503 before Lambda ends the invocation without a response.

    A timer ends requests that wait. Running Python cannot be interrupted, so each request also has a deadline, which is
    checked before such work begins (see `deadline`).

    After a time-out the work continues in the next invocation, or never. So the outcome of a write is unknown then.
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
        DEADLINE.set(Deadline(seconds, self._cpus))  # for the rest of this task, which serves this request only
        try:
            async with asyncio.timeout(seconds):
                await self._app(scope, receive, sent)
        except TimeoutError:
            if started:
                raise
            if scope["method"] in ("GET", "HEAD"):
                response = problems.response(StoreUnavailable("the storage did not answer in time; try again"))
            else:
                response = problems.response(
                    OutcomeUnknown(
                        "the time of the function ended before the outcome was known; send the request again with the"
                        " same Idempotency-Key, or read the resource first"
                    )
                )
            await response.send(send, head=scope["method"] == "HEAD")


def fits(body: bytes) -> bool:
    """Return whether Lambda can send this body, as base64 or as a JSON string with its escapes."""
    return len(body) < LARGE or min(_as_text(body), _as_base64(body)) <= MAX_ANSWER


def _as_text(body: bytes) -> int:
    # The runtime's encoder writes the line separators as \\u2028 and \\u2029.
    separators = body.count(b"\xe2\x80\xa8") + body.count(b"\xe2\x80\xa9")
    return len(body) + body.count(b'"') + body.count(b"\\") + body.count(b"\n") + 3 * separators


def _as_base64(body: bytes) -> int:
    return (len(body) + 2) // 3 * 4


def _encoded(answer: dict[str, Any]) -> dict[str, Any]:
    """Return the response with a large body in the smaller of its two encodings.

    Removes the content type of a response that has no content: Mangum adds `application/json` to each response that
    has none.
    """
    if answer["statusCode"] in WITHOUT_CONTENT and not answer.get("body"):
        answer.get("headers", {}).pop("content-type", None)
    text = answer.get("body", "")
    if len(text) >= LARGE and not answer.get("isBase64Encoded"):
        body = text.encode()
        if _as_base64(body) < _as_text(body):
            return answer | {"body": base64.b64encode(body).decode(), "isBase64Encoded": True}
    return answer
