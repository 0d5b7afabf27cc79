"""The hashes of bodies in MessagePack: each one that the program writes is accepted, and another hash is refused."""

from __future__ import annotations

import datetime as dt
import enum
import hashlib
from decimal import Decimal
from typing import Any
from uuid import UUID

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec import Raw, Struct
from msgspec.structs import replace

from app.autocrud import AutoCRUD, Encoding
from app.autocrud.backup.bodies import check_body, check_hash
from app.autocrud.backup.errors import BadArchive
from app.autocrud.errors import InvalidData
from app.autocrud.resource_manager.model.codec import Codec, ModelData
from tests.http.everything import Circle, Color, EveryType, Level, Point, Square

from .archives import resource
from .test_bodies import archive_with
from .test_importing import Killed, stop_after

msgpack = msgspec.msgpack.encode
RECORD = resource("a", [{}], encoding=Encoding.msgpack)[1][0][0]


def sha(text: bytes) -> str:
    return hashlib.sha256(text).hexdigest()


class Entry(Struct):
    title: str
    a: int = 0
    at: dt.datetime | None = None
    by_number: dict[int, str] = {}


@pytest.mark.parametrize(
    "body",
    [
        {"title": "t"},
        {"title": "t", "a": 1, "at": None, "by_number": {}},
        {"title": 5},  # it does not fit
        {"title": "t", "at": "2026-01-01T00:00:00"},  # a time without an offset is text
    ],
)
async def test_a_body_in_messagepack_with_another_hash_is_refused(tmp_path, body):
    crud = AutoCRUD()
    crud.add_model(Entry, name="article")
    path = await archive_with(tmp_path, Encoding.msgpack, msgpack(body), "0" * 64)
    with pytest.raises(BadArchive, match=r"^the body of revision 2 of resource 'a' has another hash "):
        await crud.import_all(path)
    assert [meta async for meta in crud.resource_manager(Entry).storage.scan()] == []
    await crud.close()


@pytest.mark.parametrize(
    ("body", "hashed"),
    [
        pytest.param({"title": "t", "a": 1}, b'{"title":"t","a":1}', id="in the order of the body"),
        pytest.param({"title": "t", "a": 1}, b'{"a":1,"title":"t"}', id="with sorted keys"),
        pytest.param(
            {"by_number": {1: "x"}, "title": "t"},
            b'{"a":0,"at":null,"by_number":{"1":"x"},"title":"t"}',
            id="with the defaults and keys of the model",
        ),
        pytest.param({"a": 1, "title": "t"}, b'{"title":"t","a":1,"at":null,"by_number":{}}', id="of the model"),
        pytest.param(
            {"title": "t", "at": dt.datetime(2026, 1, 1, tzinfo=dt.UTC)},
            b'{"title":"t","a":0,"at":"2026-01-01T01:00:00+01:00"}',
            id="with a time whose offset is lost",
        ),
        pytest.param(
            {"title": "t", "x": [{"y": {dt.datetime(2026, 1, 1, tzinfo=dt.UTC): 1}}]},
            b"anything",
            id="with such a time as a key that the model does not have",
        ),
    ],
)
async def test_a_body_in_messagepack_may_have_the_hash_of_each_json_that_it_may_come_from(tmp_path, body, hashed):
    crud = AutoCRUD()
    crud.add_model(Entry, name="article")
    result = await crud.import_all(await archive_with(tmp_path, Encoding.msgpack, msgpack(body), sha(hashed)))
    assert result.models["article"].created == 2
    await crud.close()


async def test_an_import_that_an_earlier_program_began_with_another_hash_can_be_taken_back(tmp_path, monkeypatch):
    crud = AutoCRUD()
    manager = crud.add_model(Entry, name="article")
    await manager.create(Entry("mine"), resource_id="mine")
    path = await archive_with(tmp_path, Encoding.msgpack, msgpack({"title": "t"}), "0" * 64)
    with monkeypatch.context() as patch:
        patch.setattr("app.autocrud.backup.survey.check_hash", lambda *_: None)
        stop_after(patch, manager.storage, 1)
        with pytest.raises(Killed):
            await crud.import_all(path, on_conflict="replace")
    with pytest.raises(BadArchive, match="has another hash"):
        await crud.import_all(path, resume=True)
    assert (await crud.import_all(path, abort=True)).models["article"].taken_back == 2
    assert [meta.resource_id async for meta in manager.storage.scan()] == ["mine"]
    await crud.close()


class Ring(enum.Enum):
    one = "1"
    two = "two"


class Deep(Struct, tag=True):
    z: int
    a: Any = None


class Flat(Struct, tag=True, array_like=True):
    x: float
    y: str = ""


class Wide(Struct, kw_only=True, rename="camel"):
    """Fields whose MessagePack differs most from their JSON, and which are not in the order of their names."""

    title: str
    anything: Any = None
    by_text: dict[str, Any] = {}
    by_number: dict[int, str] = {}
    by_day: dict[dt.date, dict[UUID, float]] = {}
    by_bytes: dict[bytes, int] = {}
    by_ring: dict[Ring, int] = {}
    by_time: dict[dt.datetime, int] = {}
    words: set[str] = set()
    ids: set[UUID] = set()
    prices: frozenset[Decimal] = frozenset()
    bits: set[bytes] = set()
    days: set[dt.date] = set()
    rings: set[Ring] = set()
    either: set[int | str] = set()
    number: int | float = 0
    real: float | None = None
    inner: Deep | None = None
    flat: Flat | None = None
    at: dt.datetime | None = None
    hour: dt.time | None = None
    span: dt.timedelta | None = None
    data: bytes = b""


class Sparse(Wide, omit_defaults=True):
    """The same, without defaults in its bodies."""


class Later(Struct):
    """A later version of these models. Their bodies do not fit it, or lack fields of it."""

    words: list[int] = []
    title: str = ""
    more: int = 0


numbers = st.integers(-(2**63), 2**64 - 1)
floats = st.floats(allow_nan=False, allow_infinity=False)
texts = st.text(st.characters(codec="utf-8"), max_size=3)
rings, days = st.sampled_from(Ring), st.dates()
offsets = st.builds(dt.timezone, st.integers(-1439, 1439).map(lambda minutes: dt.timedelta(minutes=minutes)))
times = st.datetimes(timezones=st.none() | offsets)
prices = st.decimals(allow_nan=False, allow_infinity=False)
trees = st.recursive(
    st.none() | st.booleans() | numbers | floats | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=5,
)
wide: dict[str, st.SearchStrategy[Any]] = {
    "title": texts,
    "anything": trees,
    "by_text": st.dictionaries(texts, trees, max_size=3),
    "by_number": st.dictionaries(numbers, texts, max_size=3),
    "by_day": st.dictionaries(days, st.dictionaries(st.uuids(), floats, max_size=2), max_size=2),
    "by_bytes": st.dictionaries(st.binary(max_size=3), numbers, max_size=3),
    "by_ring": st.dictionaries(rings, numbers),
    "by_time": st.dictionaries(times, numbers, max_size=2),
    "words": st.sets(texts, max_size=4),
    "ids": st.sets(st.uuids(), max_size=3),
    "prices": st.frozensets(prices, max_size=3),
    "bits": st.sets(st.binary(max_size=3), max_size=3),
    "days": st.sets(days, max_size=3),
    "rings": st.sets(rings),
    "either": st.sets(numbers | texts, max_size=4),
    "number": numbers | floats,
    "real": st.none() | floats,
    "inner": st.none() | st.builds(Deep, z=numbers, a=trees),
    "flat": st.builds(Flat, x=floats, y=texts),
    "at": st.none() | times,
    "hour": st.none() | st.times(timezones=st.none() | offsets),
    "span": st.none() | st.timedeltas(dt.timedelta(-999999), dt.timedelta(999999)),
    "data": st.binary(max_size=9),
}
every: dict[str, st.SearchStrategy[Any]] = {
    "text": texts,
    "number": numbers,
    "real": floats,
    "flag": st.booleans(),
    "at": times,
    "day": days,
    "hour": wide["hour"],
    "span": wide["span"],
    "key": st.uuids(),
    "price": prices,
    "color": st.sampled_from(Color),
    "level": st.sampled_from(Level),
    "point": st.builds(Point, x=floats, y=floats),
    "points": st.lists(st.builds(Point, x=floats), max_size=2),
    "tags": st.lists(texts, max_size=3),
    "numbers": st.sets(numbers, max_size=4),
    "pair": st.tuples(numbers, texts),
    "blob": st.binary(max_size=5),
    "labels": st.dictionaries(texts, numbers, max_size=4),
    "shape": st.builds(Circle, radius=st.floats(0.5, 2)) | st.builds(Square, side=numbers),
    "maybe": texts,
    "code": texts,
}


def some_of(model: Any, fields: dict[str, st.SearchStrategy[Any]], required: set[str]) -> st.SearchStrategy[Any]:
    """Return instances of a model with some of its fields."""
    optional = {name: strategy for name, strategy in fields.items() if name not in required}
    return st.fixed_dictionaries({name: fields[name] for name in required}, optional=optional).map(
        lambda values: model(**values)
    )


@given(
    some_of(Wide, wide, {"title"}) | some_of(Sparse, wide, {"title"}) | some_of(EveryType, every, {"text", "number"})
)
def test_each_body_that_the_program_writes_is_accepted(data):
    """With its model, and with one that it has become since."""
    model = type(data)
    codec: Codec[Any] = Codec(model)
    try:
        model_data: ModelData[Any] = codec.accept(data)
        body = codec.encode(model_data, Encoding.msgpack)
        codec.decode(body, Encoding.msgpack)
    except (InvalidData, msgspec.MsgspecError):  # it is refused, or no body that can be read
        return
    record = replace(RECORD, data_hash=model_data.hash)
    check_body(record, body)
    check_hash(codec, record, body, None)
    check_hash(Codec(Later), record, body, None)
    if "tzinfo" not in repr(model_data.data):
        with pytest.raises(BadArchive):
            check_hash(codec, replace(RECORD, data_hash="0" * 64), body, model_data.data)


class WithRaw(Struct):
    title: str
    raw: Raw = Raw(b"null")


@pytest.mark.parametrize("raw", [b'{"b": 1, "a":2}', b"1e2", b'"\\u0061"'])
def test_a_body_of_a_model_with_raw_json_is_accepted(raw):
    """MessagePack does not keep the form of the JSON."""
    codec = Codec(WithRaw)
    model_data = codec.parse(b'{"title":"t","raw":%b}' % raw)
    body = codec.encode(model_data, Encoding.msgpack)
    check_hash(codec, replace(RECORD, data_hash=model_data.hash), body, model_data.data)
