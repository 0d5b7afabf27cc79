"""Keys of values: `<` on keys is `<` on values, for every kind of field."""

from __future__ import annotations

import datetime as dt
import enum
from decimal import Decimal
from typing import Any
from uuid import UUID

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from app.autocrud.values import INT_MAX, INT_MIN, kind_of


class Size(enum.IntEnum):
    small = 1
    large = 20


class Color(enum.Enum):
    red = "red"
    green = "green"


TEXTS = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=6)
MOMENTS = st.datetimes(timezones=st.timezones() | st.just(dt.UTC), allow_imaginary=False)
DECIMALS = st.decimals(allow_nan=False, allow_infinity=False) | st.decimals(-100, 100, places=3)
NUMBERS = st.floats(allow_nan=False, allow_infinity=False)
VALUES: dict[Any, st.SearchStrategy[Any]] = {
    str: TEXTS,
    int: st.integers(INT_MIN, INT_MAX),
    float: NUMBERS,
    bool: st.booleans(),
    dt.datetime: MOMENTS,
    dt.date: st.dates(),
    UUID: st.uuids(),
    Decimal: DECIMALS,
}
KINDS = pytest.mark.parametrize("type_", VALUES, ids=lambda type_: type_.__name__)


@KINDS
def test_keys_are_ordered_as_their_values(type_):
    key = kind_of(type_).key

    @given(VALUES[type_], VALUES[type_])
    def check(one: Any, other: Any) -> None:
        assert (one < other) == (key(one) < key(other))
        assert (one == other) == (key(one) == key(other))

    check()


@given(DECIMALS, st.integers(-3, 3), st.booleans())
@example(Decimal("1E+30"), 1, False)
@example(Decimal("-0.0"), 0, True)
def test_keys_of_close_decimals_are_ordered(one, steps, negative):
    """Neighbours that differ in the last digit, in the sign or only in how they are written."""
    key = kind_of(Decimal).key
    exponent = one.as_tuple().exponent
    other = one + steps * Decimal(1).scaleb(exponent) if abs(one) < 10**20 and -20 < exponent < 0 else -one
    other = -other if negative else other
    assert (one < other) == (key(one) < key(other))
    assert (one == other) == (key(one) == key(other))


@KINDS
def test_every_key_has_the_type_that_the_kind_declares(type_):
    kind = kind_of(type_)

    @given(VALUES[type_])
    def check(value: Any) -> None:
        assert type(kind.key(value)) is kind.key_type

    check()


@pytest.mark.parametrize(
    ("type_", "written"),
    [
        (str, str),
        (int, str),
        (float, repr),
        (bool, lambda value: str(value).lower()),
        (dt.date, dt.date.isoformat),
        (UUID, str),
        (Decimal, lambda value: f"{value:f}"),
        (dt.datetime, lambda value: value.astimezone(dt.UTC).isoformat()),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_value_in_a_query_string_is_the_value(type_, written):
    kind = kind_of(type_)
    values = VALUES[type_]
    if type_ is dt.datetime:
        values = st.datetimes(dt.datetime(1000, 1, 1), timezones=st.just(dt.UTC))  # noqa: DTZ001 - bounds have none
    if type_ is Decimal:
        values = st.decimals(-(10**30), 10**30, places=5)

    @given(values)
    def check(value: Any) -> None:
        assert kind.key(kind.parse(written(value))) == kind.key(value)

    check()


@pytest.mark.parametrize(
    ("type_", "text"),
    [
        (int, "1_0"),
        (int, "１"),
        (int, " 1"),
        (float, "nan"),
        (float, "1e"),
        (bool, "True"),
        (dt.date, "20260131"),
        (dt.datetime, "2026-01-31T12:00:00"),
        (dt.datetime, "2026-01-31T12:00:00 01:00"),
        (UUID, "{00000000-0000-0000-0000-000000000000}"),
        (Decimal, "Infinity"),
        (Color, "blue"),
        (Size, "3"),
    ],
)
def test_other_spellings_are_refused_with_what_was_expected(type_, text):
    with pytest.raises(ValueError, match="expected"):
        kind_of(type_).parse(text)


@pytest.mark.parametrize(
    ("type_", "value"),
    [
        (str, "a\0"),
        (str, "\ud800"),
        (str, 1),
        (int, True),
        (int, INT_MAX + 1),
        (float, float("inf")),
        (float, 10**400),
        (bool, 1),
        (dt.datetime, dt.datetime(2026, 1, 1)),  # noqa: DTZ001 - it has none
        (dt.date, dt.datetime(2026, 1, 1, tzinfo=dt.UTC)),
        (Decimal, Decimal("NaN")),
        (UUID, "00000000-0000-0000-0000-000000000000"),
        (Color, "red"),
    ],
)
def test_values_without_a_key_are_refused(type_, value):
    with pytest.raises(ValueError):
        kind_of(type_).key(value)


@given(st.sampled_from([0.0, -0.0, 5e-324, -5e-324, 1.0]), st.sampled_from([0.0, -0.0, 5e-324, -5e-324, 1.0]))
def test_zero_has_one_key_whatever_its_sign(one, other):
    key = kind_of(float).key
    assert (one == other) == (repr(key(one)) == repr(key(other)))


@pytest.mark.parametrize("type_", [list[Size], set[Color], tuple[int, ...], int | None, list[str]])
def test_kinds_of_compound_types(type_):
    kind = kind_of(type_)
    assert kind.is_list == (type_ != int | None)


@pytest.mark.parametrize("type_", [dict, list[list[int]], int | str, object, tuple[int, str], complex])
def test_types_that_cannot_be_indexed_are_refused_with_those_that_can(type_):
    with pytest.raises(ValueError, match="cannot be indexed; these can: str, int, float"):
        kind_of(type_)
