"""The fast check of a body never accepts a body that the complete check refuses, and no part of data is lost."""

from __future__ import annotations

import datetime as dt
import json
import math
from typing import Annotated, Any
from uuid import UUID

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from msgspec import Meta, Struct

from app.autocrud.errors import InvalidData
from app.autocrud.resource_manager.model.codec import Codec


class Flat(Struct):
    title: str
    count: int = 0
    note: str | None = None


KEYS = st.sampled_from(["title", "count", "note", "other", 'ti"tle', "t\\u0069tle"])
VALUES = st.one_of(
    st.integers(-5, 5),
    st.none(),
    st.text(max_size=5),
    st.sampled_from(["title", '"', "\\", '","count":"', '"count":1']),
)


def _strictly_valid(body: bytes) -> bool:
    pairs: list[tuple[str, object]] = []
    json.loads(body, object_pairs_hook=pairs.extend)
    data = dict(pairs)
    types_fit = (
        type(data.get("title")) is str
        and type(data.get("count", 0)) is int
        and isinstance(data.get("note"), str | None)
    )
    return len(data) == len(pairs) and data.keys() <= {"title", "count", "note"} and types_fit


@given(
    st.lists(st.tuples(KEYS, VALUES), max_size=5),
    st.sampled_from([(",", ":"), (", ", ": "), (" ,\n", "\t:")]),
    st.booleans(),
)
@example([("title", "a"), ("title", "b")], (",", ":"), False)
@example([("title", "a"), ("t\\u0069tle", "b")], (", ", ": "), True)
@example([("title", 'a":"b')], (", ", ": "), True)
def test_a_body_is_accepted_only_if_each_key_is_known_and_unique(
    pairs: list[tuple[str, object]], separators: tuple[str, str], raw_keys: bool
) -> None:
    comma, colon = separators
    shown = [
        (f'"{key}"' if raw_keys and "\\" in key else json.dumps(key)) + colon + json.dumps(value, ensure_ascii=False)
        for key, value in pairs
    ]
    body = ("{" + comma.join(shown) + "}").encode()
    codec = Codec(Flat)
    try:
        codec.parse(body)
    except InvalidData:
        assert not _strictly_valid(body)
    else:
        assert _strictly_valid(body)


class Described(Struct):
    inner: Annotated[Flat, Meta(description="described")] | None = None
    items: Annotated[list[Annotated[Flat, Meta(title="Item")]], Meta(description="several")] = []


@pytest.mark.parametrize(
    ("body", "pointer"),
    [
        (b'{"inner":{"title":"a","other":1}}', "/inner/other"),
        (b'{"items":[{"title":"a"},{"title":"b","other":1}]}', "/items/1/other"),
    ],
)
def test_unknown_fields_are_found_below_fields_with_a_description(body, pointer):
    with pytest.raises(InvalidData) as refused:
        Codec(Described).parse(body)
    assert [violation.pointer for violation in refused.value.violations] == [pointer]


class Keyed(Struct):
    any: Any = None
    ints: dict[int, int] = {}
    floats: dict[float, int] = {}
    uuids: list[dict[UUID, int]] = []
    times: dict[str, dict[dt.datetime, int]] = {}
    maybe: float | None = None


UUIDS = ("00000000-0000-0000-0000-0000000000AA", "00000000-0000-0000-0000-0000000000aa")


@pytest.mark.parametrize(
    ("body", "pointer"),
    [
        ({"ints": {"0": 1, "-0": 2}}, "/ints/-0"),
        ({"floats": {"1.0": 1, "2.0": 1, "1e0": 2}}, "/floats/1e0"),
        ({"uuids": [{}, dict.fromkeys(UUIDS, 1)]}, f"/uuids/1/{UUIDS[1]}"),
        ({"times": {"a": {"2026-01-01T00:00:00Z": 1, "2026-01-01T01:00:00+01:00": 2}}}, None),
    ],
)
def test_keys_that_the_model_reads_as_equal_are_refused(body, pointer):
    with pytest.raises(InvalidData, match="equals") as refused:
        Codec(Keyed).parse(json.dumps(body).encode())
    (violation,) = refused.value.violations
    assert pointer in (None, violation.pointer)


def test_keys_of_other_types_are_accepted_if_they_differ():
    body = {"ints": {"1": 1, "-1": 2}, "floats": {"1e0": 1, "2": 2}, "uuids": [{UUIDS[0]: 1}]}
    read = Codec(Keyed).parse(json.dumps(body).encode()).data
    assert (read.ints, read.floats, read.uuids) == ({1: 1, -1: 2}, {1.0: 1, 2.0: 2}, [{UUID(UUIDS[0]): 1}])


@pytest.mark.parametrize(
    "value",
    [
        {1: "a", "1": "b"},
        [{"x": {1.5: "a", "1.5": "b"}}],
        {b"x": 1, "eA==": 2},
        {dt.date(2026, 1, 1): 1, "2026-01-01": 2},
    ],
)
def test_data_from_python_with_keys_that_json_writes_alike_is_refused(value):
    with pytest.raises(InvalidData, match="stands twice in one object"):
        Codec(Keyed).accept(Keyed(any=value))


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
def test_numbers_that_json_does_not_have_are_refused_from_python(number):
    """The encoder writes null for them."""
    for data, pointer in ((Keyed(any=[{"a": number}]), "/any/0/a"), (Keyed(maybe=number), "/maybe")):
        with pytest.raises(InvalidData, match="NaN and infinities") as refused:
            Codec(Keyed).accept(data)
        assert refused.value.violations[0].pointer == pointer
    assert Codec(Keyed).accept(Keyed(any=[None, 1.5])).data.any == [None, 1.5]
