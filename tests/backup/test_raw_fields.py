"""Fields of the type msgspec.Raw: what a model accepts can be exported, imported and served, in both encodings."""

from __future__ import annotations

import datetime as dt
import json
from typing import Any

import httpx
import msgspec
import pytest
from fastapi import FastAPI
from hypothesis import given
from hypothesis import strategies as st
from msgspec import Raw, Struct

from app.autocrud import AutoCRUD, Encoding
from app.autocrud.backup.bodies import check_body
from app.autocrud.errors import InvalidData
from app.autocrud.resource_manager.basic import RevisionInfo
from app.autocrud.resource_manager.model.codec import Codec
from app.autocrud.resource_manager.model.json_shape import MAX_STORED_DEPTH


class Inner(Struct):
    r: Raw


class Item(Struct):
    r: Raw
    any: Any = None
    inner: list[Inner] = []


def application(encoding: Encoding) -> tuple[AutoCRUD, httpx.AsyncClient]:
    crud = AutoCRUD(encoding=encoding)
    crud.add_model(Item)
    app = FastAPI()
    crud.apply(app)
    return crud, httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test")


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (b"1e400", "Number out of range"),
        (b"[-1e999]", "Number out of range"),
        (b"1" * 5000, "Integer value out of range"),
        (rb'"\ud800"', "unpaired surrogate"),
        (b'"\xff"', "utf-8"),
        (b'{"a":1,"a":2}', "the key 'a' stands twice"),
    ],
)
@pytest.mark.parametrize(
    "form", [b'{"r":%b,"any":null,"inner":[]}', b'{"r":%b}', b'{"r":1,"any":null,"inner":[{"r":%b}]}']
)
@pytest.mark.parametrize("encoding", Encoding)
async def test_values_that_no_decoder_reads_are_refused_in_any_form(encoding, form, value, said):
    """The first and the last form are canonical, so they are stored as they are."""
    crud, client = application(encoding)
    answer = await client.post("/item", content=form % value)
    assert (answer.status_code, answer.json()["type"]) == (422, "urn:crudstack:invalid-data")
    assert said in answer.json()["detail"]
    assert await crud.resource_manager(Item).count() == 0
    await client.aclose()


@pytest.mark.parametrize("value", [b"null", b"1", b'"a"', b'[1, {"b": 2,"a":[]}]', b"-0.0", b"1e308", b"12345678901"])
@pytest.mark.parametrize("encoding", Encoding)
async def test_accepted_values_are_served_exported_and_imported(tmp_path, encoding, value):
    crud, client = application(encoding)
    (await client.post("/item", content=b'{"r":%b,"inner":[{"r":%b}]}' % (value, value))).raise_for_status()
    (item,) = (await client.get("/item")).json()["items"]
    assert item["data"] == {"r": json.loads(value), "any": None, "inner": [{"r": json.loads(value)}]}
    await crud.export_all(tmp_path / "x.tar.gz")
    other, imported = application(encoding)
    result = await other.import_all(tmp_path / "x.tar.gz")
    assert (result.models["item"].created, result.models["item"].not_fitting) == (1, 0)
    (found,) = (await imported.get("/item")).json()["items"]
    assert (found["data"], found["meta"]["data_hash"]) == (item["data"], item["meta"]["data_hash"])
    assert (await imported.patch(f"/item/{item['meta']['resource_id']}", json={"any": 2})).status_code == 200
    await client.aclose()
    await imported.aclose()


TEXTS = st.one_of(
    st.from_regex(
        r"-?(0|[1-9][0-9]{0,25})(\.[0-9]{1,20})?([eE][-+]?[0-9]{1,3})?",
        fullmatch=True,
        alphabet=st.characters(codec="ascii"),
    ),
    st.from_regex(r'"([a-z]|\\["\\/bfnrt]|\\u[0-9a-f]{4}|\\ud8[0-9a-f]{2}\\udc[0-9a-f]{2})*"', fullmatch=True),
    st.sampled_from(["null", "true", "false", "1e400", "1" * 4300, "1" * 4301, "NaN", "tru", "", '"\t"']),
)
TREES = st.recursive(
    TEXTS,
    lambda inner: (
        st.lists(inner, max_size=3).map(lambda items: f"[{','.join(items)}]")
        | st.lists(st.tuples(st.sampled_from("abc"), inner), max_size=3).map(
            lambda pairs: "{" + ",".join(f'"{key}":{value}' for key, value in pairs) + "}"
        )
    ),
    max_leaves=6,
)
CODEC = Codec(Item)


def record(encoding: Encoding) -> RevisionInfo:
    now = dt.datetime.now(dt.UTC)
    return RevisionInfo(
        uid="0/a", resource_id="a", revision=1, parent=None, schema_version=1, status="stable", data_hash="0" * 64,
        encoding=encoding, created_time=now, updated_time=now, created_by="a", updated_by="a",
    )  # fmt: skip


@given(TREES, st.sampled_from(['{"r":%s,"any":null,"inner":[]}', '{ "r" : %s }']), st.sampled_from(Encoding))
def test_an_import_accepts_exactly_the_values_that_a_write_accepts(value: str, form: str, encoding: Encoding):
    body = (form % value).encode()
    try:
        data = CODEC.parse(body)
        stored = CODEC.encode(data, encoding)
    except InvalidData:
        try:
            tree = msgspec.json.decode(body)
        except (msgspec.DecodeError, ValueError):
            return
        twice = '{"' in value and msgspec.json.encode(tree).count(b'"') < body.count(b'"')
        assert twice or encoding == Encoding.msgpack  # which has no integers of more than 64 bits
        return
    check_body(record(encoding), stored)
    tree = msgspec.json.decode(body)
    assert msgspec.json.decode(CODEC.to_json(stored, encoding)) == {"any": None, "inner": [], **tree}
    assert msgspec.json.decode(CODEC.decode(stored, encoding).r) == tree["r"]


async def test_data_from_python_are_nested_no_deeper_than_an_import_accepts(tmp_path):
    crud, _ = application(Encoding.json)
    manager = crud.resource_manager(Item)
    most = MAX_STORED_DEPTH - 1  # inside of the object
    await manager.create(Item(Raw(b"[" * most + b"]" * most)))
    with pytest.raises(InvalidData, match=r"^the data is nested 801 deep, expected at most 800$"):
        await manager.create(Item(Raw(b"[" * (most + 1) + b"]" * (most + 1))))
    await crud.export_all(tmp_path / "x.tar.gz")
    other, _ = application(Encoding.json)
    assert (await other.import_all(tmp_path / "x.tar.gz")).models["item"].created == 1
