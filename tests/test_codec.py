"""The fast check of a body never accepts a body that the complete check refuses."""

from __future__ import annotations

import json
from typing import Annotated

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
