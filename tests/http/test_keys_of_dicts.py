"""Fields like dict[int, X]: JSON has text as keys. Writes, patches, lists and backups work in both encodings."""

from __future__ import annotations

import datetime as dt
from uuid import UUID

import httpx
import pytest
from fastapi import FastAPI
from msgspec import Raw, Struct

from app.autocrud import AutoCRUD, Encoding


class Grade(Struct):
    name: str
    per_level: dict[int, str] = {}
    per_day: dict[dt.date, dict[UUID, float]] = {}
    raw: Raw = Raw(b"null")


DATA = {
    "name": "n",
    "per_level": {"10": "ten", "9": "nine", "-1": "minus"},
    "per_day": {"2026-01-31": {"0" * 8 + "-0000-7000-8000-" + "0" * 12: 1.5}},
    "raw": {"b": [1.25, "x"], "a": None},
}


def application(encoding: Encoding) -> tuple[AutoCRUD, httpx.AsyncClient]:
    crud = AutoCRUD(encoding=encoding)
    crud.add_model(Grade, indexed_fields=["name"])
    app = FastAPI()
    crud.apply(app)
    return crud, httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test")


@pytest.mark.parametrize("encoding", Encoding)
async def test_keys_that_are_no_text(encoding, tmp_path):
    crud, client = application(encoding)
    created = await client.post("/grade", json=DATA)
    assert created.status_code == 201, created.text
    path = created.headers["location"]
    assert (await client.get(path)).json()["data"] == DATA
    patch = {"per_level": {"9": None, "11": "eleven"}}
    patched = await client.patch(path, json=patch, headers={"content-type": "application/merge-patch+json"})
    assert patched.status_code == 200, patched.text
    expected = {**DATA, "per_level": {"10": "ten", "-1": "minus", "11": "eleven"}}
    assert (await client.get(path)).json()["data"] == expected
    (item,) = (await client.get("/grade")).json()["items"]
    assert item["data"] == expected
    assert (await client.put(path, json=DATA | {"per_level": {"x": "no integer"}})).status_code == 422

    await crud.export_all(tmp_path / "a.tar.gz")
    other, reader = application(encoding)
    await other.import_all(tmp_path / "a.tar.gz")
    assert (await reader.get(path)).json()["data"] == expected
    assert (await reader.get(path, params={"revision": 1})).json()["data"] == DATA


async def test_the_order_of_such_keys_does_not_matter():
    """A write of equal data changes nothing."""
    _, client = application(Encoding.json)
    created = await client.post("/grade", json=DATA)
    path = created.headers["location"]
    again = await client.put(path, json=DATA | {"per_level": dict(reversed(DATA["per_level"].items()))})
    assert again.headers["etag"] == created.headers["etag"]
