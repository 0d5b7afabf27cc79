"""Fixtures for tests of files over HTTP: an app with albums, a client, and an album."""

from __future__ import annotations

import pytest

from .albums import app_of, sent
from .conftest import client_of

CONTENT = bytes(range(256)) * 40
PNG = {"content-type": "image/png"}


@pytest.fixture(name="crud_and_app")
def crud_and_app_fixture():
    app, crud = app_of()
    return crud, app


@pytest.fixture(name="crud")
def crud_fixture(crud_and_app):
    return crud_and_app[0]


@pytest.fixture(name="api")
async def api_fixture(crud_and_app):
    async with client_of(crud_and_app[1]) as client:
        yield client


@pytest.fixture(name="album")
async def album_fixture(api):
    """An album with a cover: its path and the reference."""
    cover = await sent(api, CONTENT, "sun.png", **PNG)
    answer = await api.post("/album", json={"title": "Sun", "cover": cover})
    return answer.headers["location"], cover
