"""The routes /healthz and /readyz, and the functions that add all routes to an application."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any

import msgspec
from starlette.applications import Starlette
from starlette.convertors import PathConvertor, register_url_convertor
from starlette.routing import BaseRoute, Route, Router

from ..errors import CrudError
from ..resource_manager.core import ResourceManager
from . import docs, problems
from .guard import Authenticate, principal
from .messages import Receive, Request, Response, Scope, Send, route_path
from .model_context import Policy
from .openapi import Description, describe
from .routes import ModelRoutes


class _AnyPath(PathConvertor):
    """Matches the rest of a path, with any characters, also line breaks."""

    regex = "(?s:.*)"


register_url_convertor("anything", _AnyPath())

READY_TIMEOUT_S = 2.0
_encode = msgspec.json.Encoder().encode

Managers = Mapping[str, ResourceManager[Any]]
Lifespan = Callable[[], contextlib.AbstractAsyncContextManager[None]]


class HealthCheck:
    """The ASGI application of one path with GET and HEAD."""

    def __init__(self, answer: Callable[[], Any], authenticate: Authenticate | None = None) -> None:
        self._answer, self._authenticate = answer, authenticate

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request."""
        method = scope["method"]
        scope[problems.ROUTE] = route_path(scope)
        try:
            if self._authenticate is not None:
                await principal(self._authenticate, scope, receive)
            if method in ("GET", "HEAD"):
                Request(scope, receive, [], 0).options()
                response = await self._answer()
            else:
                error = problems.MethodNotAllowed(f"expected one of GET, HEAD, got {method}")
                response = problems.response(error, ((b"allow", b"GET, HEAD"),))
        except CrudError as error:
            response = problems.response(error)
        except Exception as error:
            response = problems.unexpected(error, scope)
        await response.send(send, head=method == "HEAD")


def routes(managers: Managers, policy: Policy) -> list[BaseRoute]:
    """Return the routes of all models. Each model has two; paths below it are looked up in a dictionary."""

    async def healthz() -> Response:
        return Response(200, b'{"status":"ok"}')

    async def readyz() -> Response:
        return await ready(managers)

    made: list[BaseRoute] = []
    for name, manager in managers.items():
        endpoint = ModelRoutes(manager, policy)
        made += [
            Route(f"/{name}", endpoint, include_in_schema=False),
            Route(f"/{name}/{{rest:anything}}", endpoint, include_in_schema=False),
        ]
    return [
        *made,
        Route("/healthz", HealthCheck(healthz), include_in_schema=False),
        Route("/readyz", HealthCheck(readyz, policy.authenticate), include_in_schema=False),
    ]


async def ready(managers: Managers) -> Response:
    """Return the response of /readyz.

    The response tells for each model whether its stores answer, what is degraded, and whether its data would survive a
    crash.
    """

    async def check(manager: ResourceManager[Any]) -> tuple[str, list[str]]:
        try:
            async with asyncio.timeout(READY_TIMEOUT_S):
                await manager.open()
                await manager.storage.health()
                return "ready", await manager.degradations()
        except TimeoutError:
            return f"no answer within {READY_TIMEOUT_S:g} s", []
        except CrudError as error:
            return error.detail, []
        except Exception as error:
            problems.log.error("readyz: %s", manager.name, exc_info=error)
            return "the store failed; the log says why", []

    states = await asyncio.gather(*(check(manager) for manager in managers.values()))
    all_ready = all(state == "ready" for state, _ in states)
    answer = {
        "status": "ready" if all_ready else "unavailable",
        "models": {
            name: {"status": state, "durable": manager.storage.durable, "impairments": degradations}
            for (name, manager), (state, degradations) in zip(managers.items(), states, strict=True)
        },
        "not_durable": [name for name, manager in managers.items() if not manager.storage.durable],
    }
    return Response(200 if all_ready else 503, _encode(answer))


def mount(
    target: Any, made: list[BaseRoute], lifespan: Lifespan, managers: Managers, *, authenticated: bool = False
) -> None:
    """Add the routes to an application or a router, and run `lifespan` inside of the lifespan of the target."""
    router: Router = target.router if isinstance(target, Starlette) else target
    router.routes.extend(made)
    around = router.lifespan_context

    @contextlib.asynccontextmanager
    async def both(app: Any) -> AsyncIterator[Any]:
        async with around(app) as state, lifespan():
            yield state

    router.lifespan_context = both
    if hasattr(target, "openapi") and hasattr(target, "openapi_url"):  # a FastAPI application
        describe_application(target, managers, prefix="", authenticated=authenticated)


def describe_application(app: Any, managers: Managers, prefix: str, *, authenticated: bool) -> None:
    """Add the models to the OpenAPI document of an application, and replace its docs page with a local one."""
    generate = app.openapi
    merged: dict[int, dict[str, Any]] = {}

    def openapi() -> dict[str, Any]:
        own = generate()
        if id(own) not in merged:  # FastAPI caches its document until routes change
            merged.clear()
            merged[id(own)] = describe(Description(managers, prefix, authenticated), own)
        return merged[id(own)]

    app.openapi = openapi
    docs.serve_docs_page(app)
