from __future__ import annotations

import httpx
import pytest
from fastapi import FastAPI
from msgspec import Struct

from app.autocrud import AutoCRUD, IndexedField

MERGE = {"content-type": "application/merge-patch+json"}
PATCH = {"content-type": "application/json-patch+json"}


class Inner(Struct):
    code: str = ""


class Note(Struct):
    title: str
    author: str = "unknown"
    views: int = 0
    tags: list[str] = []
    slug: str | None = None
    inner: Inner | None = None


def make_crud(**options) -> AutoCRUD:
    crud = AutoCRUD(**options)
    crud.add_model(
        Note, indexed_fields=["title", "author", "views", "tags", IndexedField("slug", unique=True), "inner.code"]
    )
    return crud


def client_of(app) -> httpx.AsyncClient:
    transport = httpx.ASGITransport(app, raise_app_exceptions=True)
    return httpx.AsyncClient(transport=transport, base_url="http://test")


def problem(answer: httpx.Response, status: int, type_: str) -> dict:
    """Assert that the answer is a problem of this status and type, and return it."""
    assert (answer.status_code, answer.headers["content-type"]) == (status, "application/problem+json"), answer.text
    body = answer.json()
    assert (body["status"], body["type"]) == (status, f"urn:crudstack:{type_}")
    return body


@pytest.fixture
def crud() -> AutoCRUD:
    return make_crud()


@pytest.fixture
async def api(crud):
    app = FastAPI()
    crud.apply(app)
    async with client_of(app) as client:
        yield client


@pytest.fixture
async def note(api):
    """A resource: its path and its ETag."""
    answer = await api.post("/note", json={"title": "Sun", "author": "alice", "views": 1})
    return answer.headers["location"], answer.headers["etag"]
