"""Limits of stored data over HTTP: the response names the limit, the found value, and the field."""

from __future__ import annotations

import httpx
import pytest
from fastapi import FastAPI
from msgspec import Struct

from app.autocrud import AutoCRUD
from app.autocrud.access import Principal
from app.autocrud.resource_manager.contract.limits import MAX_INDEXED, MAX_ITEMS, MAX_NAME

from .conftest import client_of, problem


class Note(Struct):
    title: str = ""
    content: str = ""  # not indexed
    tags: list[str] = []


@pytest.fixture
async def api():
    app = FastAPI()
    crud = AutoCRUD()
    crud.add_model(Note, indexed_fields=["title", ("tags", list[str])])
    crud.apply(app)
    async with client_of(app) as client:
        yield client


ROOM = MAX_INDEXED - len('{"title":"","tags":[]}')


async def test_a_text_at_the_limit(api: httpx.AsyncClient):
    for title in ("x" * ROOM, "é" * (ROOM // 2)):
        made = await api.post("/note", json={"title": title})
        assert made.status_code == 201
        assert (await api.get(made.headers["location"] + "/data")).json()["title"] == title
    for title in ("x" * (ROOM + 1), "é" * (ROOM // 2 + 1)):
        told = problem(await api.post("/note", json={"title": title}), 413, "metadata-too-large")
        assert f"expected at most {MAX_INDEXED}: shorten 'title'" in told["detail"]
        assert [error["pointer"] for error in told["errors"]] == ["/title"]
    assert (await api.get("/note/count")).json() == {"count": 2}


async def test_a_text_that_is_not_indexed_may_be_longer(api: httpx.AsyncClient):
    assert (await api.post("/note", json={"content": "x" * 1_000_000})).status_code == 201


async def test_items_at_the_limit(api: httpx.AsyncClient):
    tags = [f"{number}" for number in range(MAX_ITEMS)]
    assert (await api.put("/note/n", json={"tags": tags}, headers={"If-None-Match": "*"})).status_code == 201
    add = [{"op": "add", "path": "/tags/-", "value": "more"}]
    patched = await api.patch("/note/n", json=add, headers={"Content-Type": "application/json-patch+json"})
    told = problem(patched, 413, "metadata-too-large")
    assert [error["pointer"] for error in told["errors"]] == ["/tags"]
    assert (await api.get("/note", params={"tags[contains]": "9999"})).json()["items"][0]["meta"]["revision"] == 1


async def test_in_a_batch_the_error_names_the_operation(api: httpx.AsyncClient):
    operations = [{"op": "create", "data": {}}, {"op": "create", "data": {"title": "x" * (ROOM + 1)}}]
    told = problem(await api.post("/note/batch", json={"operations": operations}), 413, "metadata-too-large")
    assert [error["pointer"] for error in told["errors"]] == ["/operations/1/data/title"]
    assert (await api.get("/note/count")).json() == {"count": 0}


@pytest.mark.parametrize(("size", "status"), [(MAX_NAME, 201), (MAX_NAME + 1, 401)])
async def test_the_name_of_the_caller(size: int, status: int):
    app = FastAPI()
    crud = AutoCRUD(authenticate=lambda _: Principal(name="x" * size))
    crud.add_model(Note)
    crud.apply(app)
    async with client_of(app) as client:
        assert (await client.post("/note", json={})).status_code == status
