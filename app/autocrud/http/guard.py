"""Who a request comes from. Asked once a request, and remembered in its scope."""

from __future__ import annotations

import inspect
from collections.abc import Awaitable, Callable
from typing import Any

from ..access import Principal, Unauthenticated
from ..errors import InvalidData
from ..resource_manager.contract.store_errors import check_name
from . import problems
from .messages import Receive, Request, Scope, Send, route_path

Authenticate = Callable[[Request], Principal | Awaitable[Principal]]
"""Says who asks, or raises Unauthenticated. It sees the headers and the scope, not the body."""

PRINCIPAL = "crudstack.principal"


async def principal(authenticate: Authenticate, scope: Scope, receive: Receive) -> Principal:
    """Who asks; Unauthenticated."""
    found: Principal | None = scope.get(PRINCIPAL)
    if found is None:
        given = authenticate(Request(scope, receive, [], 0))
        found = await given if inspect.isawaitable(given) else given
        if not isinstance(found, Principal):
            raise TypeError(f"authenticate answered {type(found).__name__}; expected a Principal")
        if not found.name:
            raise Unauthenticated("the name of the caller is empty, expected at least one character")
        try:
            check_name(found.name)
        except InvalidData as error:
            raise Unauthenticated(error.detail) from None
        scope[PRINCIPAL] = found
    return found


class Guard:
    """An application that only those reach who are known; anybody reaches the `open` paths."""

    def __init__(self, app: Any, authenticate: Authenticate, open: tuple[str, ...] = ("/healthz",)) -> None:
        self._app, self._authenticate, self._open = app, authenticate, open

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan" or (scope["type"] == "http" and route_path(scope) in self._open):
            await self._app(scope, receive, send)
            return
        if scope["type"] != "http":  # nothing here speaks WebSocket
            await send({"type": "websocket.close", "code": 1008})
            return
        try:
            await principal(self._authenticate, scope, receive)
        except Unauthenticated as error:
            response = problems.response(error)
        except Exception as error:
            response = problems.unexpected(error, scope)
        else:
            await self._app(scope, receive, send)
            return
        await response.send(send, head=scope["method"] == "HEAD")
