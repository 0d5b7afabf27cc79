"""The prefix of all paths under which the API is reached: that of a gateway's mapping, or of a proxy.

Some gateways and proxies keep the prefix in the path, others remove it. So requests are answered with the prefix and
without it, and every link in an answer begins with it. The application and its routes know the prefix as ASGI's
`root_path`: `path` and `raw_path` begin with it, and routes are compared with the rest (`messages.route_path`).
"""

from __future__ import annotations

from typing import Any
from urllib.parse import quote, unquote

from .autocrud.http.messages import Receive, Scope, Send


class BasePath:
    """An application that is reached under a prefix like `/v1`. With `""` its links have no prefix at all."""

    def __init__(self, app: Any, base: str) -> None:
        self._app, self._base = app, base

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            raw = (scope.get("raw_path") or quote(scope["path"]).encode()).partition(b"?")[0].decode("latin-1")
            given = below(raw, scope.get("root_path", "")) or raw  # a stage of API Gateway, for one
            put_below(scope, self._base, below(given, self._base) or given)
        await self._app(scope, receive, send)


def below(path: str, prefix: str) -> str | None:
    """Return what follows the prefix in a percent-encoded path, or None unless it begins with all its segments."""
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
    """Make a request one for this percent-encoded path below `root`."""
    scope["root_path"] = root
    scope["raw_path"] = (root + path).encode("latin-1")
    scope["path"] = root + unquote(path)
