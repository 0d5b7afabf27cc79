"""The application: models, storage and HTTP put together."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from starlette.requests import Request
from starlette.responses import JSONResponse

from . import models, settings, wiring
from .autocrud import AutoCRUD
from .autocrud.errors import ConfigError


def create_app(given: settings.Settings | None = None) -> FastAPI:
    """The API of `models` on the storage that the settings name (default: the environment's). ConfigError.

    `app.state.crud` is the AutoCRUD behind it.
    """
    factory = wiring.storage_factory(given or settings.load())
    crud = AutoCRUD(storage_factory=factory)
    models.register(crud)
    for model in factory.overrides:
        if model not in crud.managers:
            raise ConfigError(f"storage_overrides names the model {model!r}; there are {', '.join(crud.managers)}")
    app = FastAPI(title="crudstack", version="1", redoc_url=None, exception_handlers={404: _problem, 405: _problem})
    crud.apply(app)
    app.state.crud = crud
    return app


async def _problem(request: Request, error: Any) -> JSONResponse:
    """Where no route matched, the answer has the same form as everywhere."""
    body = {
        "type": "urn:crudstack:no-such-route",
        "title": "Not found" if error.status_code == 404 else "This method is not allowed here",
        "status": error.status_code,
        "detail": f"there is nothing at {request.url.path}"
        if error.status_code == 404
        else f"{request.method} is not allowed at {request.url.path}",
    }
    return JSONResponse(body, error.status_code, error.headers, media_type="application/problem+json")
