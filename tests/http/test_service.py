"""Everything beside the routes of a model: 404 and 405, health checks, OpenAPI, the docs page, other applications."""

from __future__ import annotations

import pytest
from fastapi import APIRouter, FastAPI
from starlette.applications import Starlette

from app import main
from app.autocrud.resource_manager.core import ResourceManager

from .conftest import client_of, make_crud, problem

PATCH = {"content-type": "application/json-patch+json"}


def main_app(crud):
    app = FastAPI(exception_handlers={404: main._problem, 405: main._problem})
    crud.apply(app)
    return app


async def test_a_405_lists_the_allowed_methods(api, note):
    for path, allowed in (
        ("/note", "GET, POST, HEAD"),
        (note[0], "GET, PUT, PATCH, DELETE, HEAD"),
        (f"{note[0]}/publish", "POST"),
        ("/healthz", "GET, HEAD"),
    ):
        answer = await api.request("TRACE", path)
        problem(answer, 405, "method-not-allowed")
        assert answer.headers["allow"] == allowed
    problem(await api.get(f"{note[0]}/nothing"), 404, "no-such-route")
    problem(await api.get(f"{note[0]}/revisions/one"), 404, "no-such-route")


async def test_an_unexpected_exception_is_logged_but_not_shown_to_the_client(api, note, monkeypatch, caplog):
    async def explode(*_, **__):
        raise RuntimeError("secret")

    monkeypatch.setattr(ResourceManager, "get", explode)
    answer = await api.get(note[0])
    problem(answer, 500, "internal-error")
    assert "secret" not in answer.text
    assert "secret" in caplog.text


async def test_health(api, crud, monkeypatch):
    assert (await api.get("/healthz")).json() == {"status": "ok"}
    ready = await api.get("/readyz")
    assert (ready.status_code, ready.json()["not_durable"]) == (200, ["note"])

    async def fail():
        raise RuntimeError("secret")

    monkeypatch.setattr(crud.managers["note"].storage, "health", fail)
    answer = await api.get("/readyz")
    assert (answer.status_code, answer.json()["status"]) == (503, "unavailable")
    assert "secret" not in answer.text


@pytest.mark.parametrize("prefix", ["", "/v1"])
async def test_a_router_serves_the_same_api(prefix):
    router = APIRouter(prefix=prefix)
    crud = make_crud()
    crud.apply(router)
    app = FastAPI()
    app.include_router(router, prefix="/api")
    crud.describe(app, prefix="/api")
    async with client_of(app) as api:
        created = await api.post("/api/note", json={"title": "Sun"})
        assert created.headers["location"].startswith("/api/note/")
        assert (await api.get(created.headers["location"])).status_code == 200
        problem(await api.get("/api/note/nothing"), 404, "not-found")
        problem(await api.delete("/api/note"), 405, "method-not-allowed")
        assert "/api/note/{id}" in (await api.get("/openapi.json")).json()["paths"]


async def test_a_starlette_application_serves_the_api():
    app = Starlette()
    make_crud().apply(app)
    async with client_of(app) as api:
        assert (await api.post("/note", json={"title": "Sun"})).status_code == 201


async def test_the_docs_page_loads_only_local_assets(api):
    page = (await api.get("/docs")).text
    assert "//" not in page.replace("// ", "").replace("http://www.w3.org", "")
    for name in ("swagger-ui-bundle.js", "swagger-ui.css", "favicon.png"):
        assert f"/docs/assets/{name}" in page
        assert (await api.get(f"/docs/assets/{name}")).status_code == 200
    assert (await api.get("/docs/assets/other")).status_code == 404
    assert (await api.get("/redoc")).status_code == 404


async def test_the_openapi_document_describes_models_and_parameters(api):
    document = (await api.get("/openapi.json")).json()
    assert document["openapi"] == "3.1.0"
    for schema in document["components"]["schemas"].values():
        if "properties" in schema and "meta" in schema["properties"]:
            assert schema["additionalProperties"] is False
    names = {parameter["name"] for parameter in document["paths"]["/note"]["get"]["parameters"]}
    assert {"views[gte]", "tags[contains]", "meta.created_time[gte]", "sort", "limit", "cursor"} <= names


async def test_an_invalid_scheme_makes_no_error(crud):
    app = main_app(crud)
    sent = []

    async def send(message):
        sent.append(message)

    scope = {
        "type": "http",
        "method": "GET",
        "path": "/nowhere",
        "raw_path": b"/nowhere",
        "query_string": b"",
        "headers": [],
    }
    await app(scope | {"scheme": "*", "root_path": "", "http_version": "1.1", "server": ("x", 1)}, None, send)
    assert sent[0]["status"] == 404


async def test_a_405_of_the_application_has_the_type_of_all_others(crud):
    async with client_of(main_app(crud)) as api:
        answer = await api.post("/docs")
        assert "POST" in problem(answer, 405, "method-not-allowed")["detail"]
        assert "GET" in answer.headers["allow"]
        problem(await api.post("/nothing"), 404, "no-such-route")
