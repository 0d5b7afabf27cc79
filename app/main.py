"""The application: models, storage and HTTP put together."""

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
    """The API of `models` on the storage that the settings name (default: the environment's), for whom they let in. ConfigError.

    `app.state.crud` is the AutoCRUD behind it. `idle_work`: whether anything may run between requests; `fits`: see AutoCRUD.
    `loopback`: whether it is served on loopback. `own_origin`: for a gateway that answers the questions of browsers itself,
    the origin under which it was asked.
    """
    given = given or settings.load()
    factory = wiring.storage_factory(given, idle_work=idle_work)
    authenticate = authentication.authenticator(given.outputs.auth)
    crud = AutoCRUD(storage_factory=factory, authenticate=authenticate, authorize=models.authorize, fits=fits)
    models.register(crud)
    for model in factory.overrides:
        if model not in crud.managers:
            there = f"there are {', '.join(crud.managers)}{meant(model, crud.managers)}"
            raise ConfigError(f"storage_overrides names the model {found(model, crud.managers)}; {there}")
    app = FastAPI(
        title="crudstack",
        version="1",
        redoc_url=None,
        redirect_slashes=False,  # it would redirect to whatever name the client wrote into Host
        exception_handlers={404: _problem, 405: _problem},
    )
    crud.apply(app)
    if authenticate is not None:  # whatever else the application answers: the description, the docs, what is not there
        app.add_middleware(Guard, authenticate=authenticate)
    app.add_middleware(  # outermost: browsers ask what they may without signing in
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
                f"CRUDSTACK_BASE_PATH is {given.base_path!r}, which begins like a path of the API: expected another first part"
                f" than {', '.join(taken)}"
            )
        app.add_middleware(BasePath, base=given.base_path)
    return app


async def _problem(request: Request, error: Any) -> JSONResponse:
    """Where no route matched, the answer has the same form as everywhere."""
    body = {
        "type": "urn:crudstack:no-such-route",
        "title": "Not found" if error.status_code == 404 else "This method is not allowed here",
        "status": error.status_code,
        "detail": f"there is nothing at {request.scope['path']}"
        if error.status_code == 404
        else f"{request.method} is not allowed at {request.scope['path']}",
    }
    return JSONResponse(body, error.status_code, error.headers, media_type="application/problem+json")
