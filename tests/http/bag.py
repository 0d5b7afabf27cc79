"""An application with one model, for tests of the work that requests cause."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator

import httpx
from fastapi import FastAPI
from msgspec import Struct

from app.autocrud import AutoCRUD

from .conftest import client_of


class Bag(Struct):
    author: str = ""
    x: list = []


@contextlib.asynccontextmanager
async def bag_client() -> AsyncIterator[httpx.AsyncClient]:
    """Yield a client of an application that has the resource `/bag/b`."""
    crud = AutoCRUD()
    crud.add_model(Bag, indexed_fields=["author"])
    app = FastAPI()
    crud.apply(app)
    async with client_of(app) as client:
        assert (await client.put("/bag/b", json={"x": [1]}, headers={"if-none-match": "*"})).status_code == 201
        yield client
