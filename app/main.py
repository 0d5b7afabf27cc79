"""Creates the application from the models, the storage and the HTTP API."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fastapi import FastAPI
from starlette.requests import Request
from starlette.responses import JSONResponse

from . import authentication, models, settings, wiring
from .autocrud import AutoCRUD
from .autocrud.errors import ConfigError
from .autocrud.http.guard import Guard
from .autocrud.http.messages import Scope
from .autocrud.resource_manager.core import MAX_BLOB
from .base_path import BasePath
from .foreign_pages import ForeignPages
from .settings_errors import found, meant


def create_app(
    given: settings.Settings | None = None,
    *,
    idle_work: bool = True,
    fits: Callable[[bytes], bool] = lambda _: True,
    loopback: bool = False,
    own_origin: Callable[[Scope], str] | None = None,
) -> FastAPI:
    """Return the application: the API of `models` on the storage and with the authentication of the settings.

    given       the settings; by default those of the environment
    idle_work   whether background work may run between requests; False on Lambda
    fits        whether a response body can be sent; see AutoCRUD
    loopback    whether the server listens on a loopback address
    own_origin  for a gateway that answers CORS preflight requests itself: the origin of the API in a request

    `app.state.crud` is its AutoCRUD. Raises ConfigError if a setting is wrong or missing. Opens no store.
    """
    given = given or settings.load()
    factory = wiring.storage_factory(given, idle_work=idle_work)
    authenticate = authentication.authenticator(given.outputs.auth)
    max_blob, quota = given.local.max_blob_mb, given.local.blob_quota_mb
    crud = AutoCRUD(
        storage_factory=factory,
        authenticate=authenticate,
        authorize=models.authorize,
        max_blob=MAX_BLOB if max_blob is None else max_blob * 1024**2,
        blob_quota=None if quota is None else quota * 1024**2,
        fits=fits,
    )
    models.register(crud)
    for model in factory.overrides:
        if model not in crud.managers:
            there = f"there are {', '.join(crud.managers)}{meant(model, crud.managers)}"
            raise ConfigError(f"storage_overrides names the model {found(model, crud.managers)}; {there}")
    app = FastAPI(
        title="crudstack",
        version="1",
        redoc_url=None,
        redirect_slashes=False,  # a redirect would go to the name in the client's Host header
        exception_handlers={404: _problem, 405: _problem},
    )
    crud.apply(app)
    if authenticate is not None:  # for all routes: also the OpenAPI description, the docs, and paths that do not exist
        app.add_middleware(Guard, authenticate=authenticate)
    app.add_middleware(  # outermost: browsers send preflight requests without credentials
        ForeignPages,
        origins=given.pages.origins,
        hosts=given.pages.hosts,
        loopback=loopback,
        own_origin=own_origin,
        signed_in=authenticate is not None,
    )
    app.state.crud, app.state.base_path = crud, given.base_path
    if given.base_path is not None:
        first = given.base_path.split("/")[1:2]
        if first and first[0] in (taken := [*crud.managers, *settings.OWN_PATHS]):
            raise ConfigError(
                f"CRUDSTACK_BASE_PATH is {given.base_path!r}, which begins like a path of the API: expected"
                f" another first segment than {', '.join(taken)}"
            )
        app.add_middleware(BasePath, base=given.base_path)
    return app


async def _problem(request: Request, error: Any) -> JSONResponse:
    """Return problem details if no route matches the path, or the route does not have the method."""
    path = request.scope["path"]
    if error.status_code == 404:
        kind, title, detail = "no-such-route", "Not found", f"there is nothing at {path}"
    else:
        kind, title = "method-not-allowed", "This method is not allowed here"
        detail = f"{request.method} is not allowed at {path}"
    body = {"type": f"urn:crudstack:{kind}", "title": title, "status": error.status_code, "detail": detail}
    return JSONResponse(body, error.status_code, error.headers, media_type="application/problem+json")
