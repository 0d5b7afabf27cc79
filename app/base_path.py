"""A path prefix under which a gateway or a proxy offers the API, like `/v1`.

Some gateways and proxies keep the prefix in the path, others remove it. So the app accepts paths with and without the
prefix, and every link in a response begins with it. Routes see the prefix as ASGI's `root_path`: `path` and `raw_path`
begin with it, and routes are compared with the rest (`messages.route_path`).
"""

from __future__ import annotations

from typing import Any
from urllib.parse import quote, unquote

from .autocrud.http.messages import Receive, Scope, Send


class BasePath:
    """ASGI middleware that sets `root_path` to a prefix like `/v1`. With `""` links have no prefix."""

    def __init__(self, app: Any, base: str) -> None:
        self._app, self._base = app, base

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve a request below the prefix."""
        if scope["type"] == "http":
            raw = (scope.get("raw_path") or quote(scope["path"]).encode()).partition(b"?")[0].decode("latin-1")
            given = below(raw, scope.get("root_path", "")) or raw  # for example a stage of API Gateway
            put_below(scope, self._base, below(given, self._base) or given)
        await self._app(scope, receive, send)


def below(path: str, prefix: str) -> str | None:
    """Return the rest of a percent-encoded path after the prefix, or None if the path has other first segments."""
    rest = path
    for segment in prefix.split("/")[1:]:
        if not rest.startswith("/"):
            return None
        found, slash, following = rest[1:].partition("/")
        if unquote(found) != segment:
            return None
        rest = slash + following
    return rest or "/"


def put_below(scope: Scope, root: str, path: str) -> None:
    """Set the path of a request to this percent-encoded path below `root`."""
    scope["root_path"] = root
    scope["raw_path"] = (root + path).encode("latin-1")
    scope["path"] = root + unquote(path)
