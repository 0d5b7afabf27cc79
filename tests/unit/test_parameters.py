"""The query string of a list: values, operators, sort keys and cursors."""

from __future__ import annotations

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from app.autocrud.errors import InvalidQuery
from app.autocrud.http.searching import decode_cursor, encode_cursor, parse_search, split
from app.autocrud.query import And, Compare, Sort
from app.autocrud.resource_manager.model.codec import Codec
from app.autocrud.testing.model import INDEXED, Item

CODEC = Codec(Item, INDEXED)
SCOPE = b"123456789"
KEYS = st.none() | st.integers(-(2**63), 2**63 - 1) | st.text(max_size=5) | st.floats(allow_nan=False)


def written(values: list[str]) -> str:
    """Return the values as a client writes them after `[in]=`."""
    return ",".join(value.replace("\\", "\\\\").replace(",", "\\,") for value in values)


@given(st.lists(st.text(max_size=5), min_size=1, max_size=6))
def test_a_list_of_values_is_split_as_it_was_written(values):
    assert split(written(values)) == values


@given(st.lists(st.text(st.sampled_from(",\\a"), max_size=4), min_size=1, max_size=4))
def test_commas_and_backslashes_are_escaped(values):
    assert split(written(values)) == values


def test_a_backslash_at_the_end_is_refused():
    with pytest.raises(ValueError, match="after the backslash"):
        split("a,b\\")


def test_repeated_parameters_are_one_list():
    one = parse_search([("choice[in]", "a,b")], CODEC, "item").query
    assert parse_search([("choice[in]", "a"), ("choice[in]", "b")], CODEC, "item").query == one
    assert one.where == Compare("choice", "in", ("a", "b"))


def test_conditions_are_joined_by_and():
    query = parse_search([("number[gte]", "1"), ("flag", "true"), ("sort", "-number,text")], CODEC, "item").query
    assert query.where == And((Compare("number", "gte", 1), Compare("flag", "eq", 1)))
    assert query.sort == (Sort("number", True), Sort("text"))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("other", "1"),
        ("number[about]", "1"),
        ("number", "one"),
        ("number[in]", "1,x"),
        ("number[gte", "1"),
        ("limit", "0"),
        ("limit", "1001"),
        ("sort", "note"),
        ("sort", "tags"),
        ("fields", "other"),
        ("cursor", "x"),
        ("flag[gte]", "yes"),
        ("tags", "x"),
    ],
)
def test_a_wrong_parameter_is_refused_by_its_name(name, value):
    with pytest.raises(InvalidQuery) as refused:
        parse_search([(name, value)], CODEC, "item")
    assert name.partition("[")[0] in refused.value.detail


@given(st.lists(KEYS, max_size=4).map(tuple))
def test_a_cursor_is_read_as_it_was_written(cursor):
    text = encode_cursor(cursor, SCOPE)
    assert decode_cursor(text, SCOPE, len(cursor)) == cursor
    for scope, length in ((b"987654321", len(cursor)), (SCOPE, len(cursor) + 1)):
        with pytest.raises(InvalidQuery, match="another model, filter or sort order"):
            decode_cursor(text, scope, length)


@given(st.text(max_size=40))
def test_another_text_is_no_cursor(text):
    assume(not text.startswith(encode_cursor((), SCOPE)))
    with pytest.raises(InvalidQuery):
        decode_cursor(text, SCOPE, 1)
