"""A model with files, and requests that send and read them."""

from __future__ import annotations

import hashlib

import httpx
from fastapi import FastAPI
from msgspec import Struct

from app.autocrud import AutoCRUD, Blob, Principal, Unauthenticated


class Page(Struct):
    text: str = ""
    photo: Blob | None = None


class Album(Struct):
    title: str
    cover: Blob | None = None
    photos: list[Blob] = []
    pages: dict[str, Page] = {}


def sha256_of(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def sign_in(request) -> Principal:
    """Return the principal that a header names, without any check: for tests only."""
    name = request.header(b"x-name")
    if name is None:
        raise Unauthenticated("send x-name")
    return Principal(name=name, roles=frozenset(filter(None, (request.header(b"x-roles") or "").split(","))))


def by(name: str, **more: str) -> dict[str, str]:
    return {"x-name": name, **more}


def register(crud: AutoCRUD) -> None:
    """Add the model. `app.models.register` calls it in servers of tests."""
    crud.add_model(Album, indexed_fields=["title", "cover.sha256"])


def app_of(**options) -> tuple[FastAPI, AutoCRUD]:
    crud = AutoCRUD(**options)
    register(crud)
    app = FastAPI()
    crud.apply(app)
    return app, crud


async def sent(api: httpx.AsyncClient, content: bytes, name: str = "", **headers: str) -> dict:
    """Upload content and return its reference."""
    if name:
        headers["content-disposition"] = f'attachment; filename="{name}"'
    answer = await api.post("/album/blobs", content=content, headers=headers)
    assert answer.status_code == 201, answer.text
    return answer.json()
