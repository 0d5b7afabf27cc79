"""One JSON log line per request: method, route, status, duration, and the requests to the storage.

A line contains no path, query, header or body, because these hold ids, data and secrets. On Lambda the line also
carries metrics in CloudWatch's embedded metric format, so that no request waits for a metrics service.
"""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Callable
from typing import Any
from uuid import uuid4

import msgspec

from .autocrud.http.messages import Receive, Scope, Send
from .autocrud.http.problems import ROUTE
from .autocrud.resource_manager.backends.s3.object_store import CACHED, REQUESTS

_encode = msgspec.json.Encoder().encode

METRICS = [
    {"Name": "duration_ms", "Unit": "Milliseconds"},
    {"Name": "storage_requests", "Unit": "Count"},
    {"Name": "cache_hits", "Unit": "Count"},
    {"Name": "cache_misses", "Unit": "Count"},
    {"Name": "cold_start", "Unit": "Count"},
    {"Name": "failed", "Unit": "Count"},
]


def write_line(line: dict[str, Any]) -> None:
    """Write a JSON line to stdout, where Lambda and container platforms read logs."""
    sys.stdout.write(_encode(line).decode() + "\n")
    sys.stdout.flush()


class RequestLog:
    """ASGI middleware that logs each request.

    service  the value of the metrics' dimension `service`; None writes no metrics
    """

    def __init__(
        self, app: Any, *, service: str | None = None, write: Callable[[dict[str, Any]], None] = write_line
    ) -> None:
        self._app, self._service, self._write = app, service, write
        self._cold = True

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve a request, and log it when it has ended."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = _request_id(scope)
        began, cold, self._cold = time.perf_counter(), self._cold, False
        asked: Counter[str] = Counter()
        cached: Counter[str] = Counter()
        status = 500

        async def sent(message: Any) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", ()), (b"x-request-id", request_id.encode())]
            await send(message)

        counting, counting_cached = REQUESTS.set(asked), CACHED.set(cached)
        try:
            await self._app(scope, receive, sent)
        finally:
            REQUESTS.reset(counting)
            CACHED.reset(counting_cached)
            duration = round((time.perf_counter() - began) * 1e3, 2)
            self._write(self._line(scope, request_id, status, duration, asked, cached, cold))

    def _line(
        self,
        scope: Scope,
        request_id: str,
        status: int,
        duration: float,
        asked: Counter[str],
        cached: Counter[str],
        cold: bool,
    ) -> dict[str, Any]:
        line: dict[str, Any] = {
            "level": "ERROR" if status >= 500 else "INFO",
            "message": "request",
            "request_id": request_id,
            "method": scope["method"] if scope["method"] in METHODS else "other",
            "route": _route(scope),
            "status": status,
            "duration_ms": duration,
            "storage_requests": asked.total(),
            "storage": dict(asked),
            "cache_hits": cached["hits"],
            "cache_misses": cached["misses"],
            "cold_start": int(cold),
            "failed": int(status >= 500),
        }
        if self._service is not None:
            metrics = {"Namespace": "crudstack", "Dimensions": [["service"]], "Metrics": METRICS}
            line["service"] = self._service
            line["_aws"] = {"Timestamp": int(time.time() * 1e3), "CloudWatchMetrics": [metrics]}
        return line


METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})


def _route(scope: Scope) -> str:
    """Return the template of the path, or "none". The path itself is not logged, because it contains ids."""
    found = scope.get(ROUTE) or getattr(scope.get("route"), "path", None)
    return found if isinstance(found, str) else "none"


def _request_id(scope: Scope) -> str:
    """Return Lambda's request id, which Lambda's own log lines contain; outside of Lambda, return a new id.

    An id that the client sends is not used, because it would put the client's text into the log.
    """
    given = getattr(scope.get("aws.context"), "aws_request_id", None)
    return given if isinstance(given, str) and given else str(uuid4())
