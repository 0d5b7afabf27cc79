"""Authentication of requests. A request is authenticated once; its scope keeps the principal."""

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
"""Returns the principal of a request, or raises Unauthenticated. It gets the headers and the scope, not the body."""

PRINCIPAL = "crudstack.principal"


async def principal(authenticate: Authenticate, scope: Scope, receive: Receive) -> Principal:
    """Return the principal of a request, and keep it in the scope.

    Raises Unauthenticated if the credentials are missing or invalid, or if the name of the principal is invalid. Raises
    TypeError if `authenticate` returns anything but a Principal.
    """
    found: Principal | None = scope.get(PRINCIPAL)
    if found is None:
        given = authenticate(Request(scope, receive, [], 0))
        found = await given if inspect.isawaitable(given) else given
        if not isinstance(found, Principal):
            raise TypeError(f"authenticate returned {type(found).__name__}; expected a Principal")
        if not found.name:
            raise Unauthenticated("the name of the caller is empty, expected at least one character")
        try:
            check_name(found.name)
        except InvalidData as error:
            raise Unauthenticated(error.detail) from None
        scope[PRINCIPAL] = found
    return found


class Guard:
    """An ASGI middleware that requires authentication for the whole application.

    Args:
        app: The application.
        authenticate: Returns the principal of a request, or raises Unauthenticated.
        open: The paths that need no authentication.
    """

    def __init__(self, app: Any, authenticate: Authenticate, open: tuple[str, ...] = ("/healthz",)) -> None:
        self._app, self._authenticate, self._open = app, authenticate, open

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request to the application if it is authenticated, else answer 401. Closes WebSockets."""
        if scope["type"] == "lifespan" or (scope["type"] == "http" and route_path(scope) in self._open):
            await self._app(scope, receive, send)
            return
        if scope["type"] != "http":  # the application has no WebSockets
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
