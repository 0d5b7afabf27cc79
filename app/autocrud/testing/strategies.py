"""Data and queries for hypothesis: few values, so that equal ones are frequent, and hostile ones among them."""

from __future__ import annotations

import datetime as dt
from decimal import Decimal
from typing import Any
from uuid import UUID

from hypothesis import strategies as st
from msgspec import UNSET

from ..query import META_FIELDS, And, Compare, Filter, Not, Or, Query, Sort, ops_of
from ..resource_manager.model.codec import Codec
from .model import INDEXED, Color, Inner, Item, Level

FIELDS = Codec(Item, INDEXED).fields

TEXTS = [
    "",
    "a",
    "A",
    "ab",
    "b",
    "aB",
    "%",
    "_",
    "a%",
    "'",
    '"',
    "\\",
    "ä",
    "z",
    "é",
    "\ue000",
    "😀",
    "😀x",
    "\U0010ffff",
]
texts = st.sampled_from(TEXTS)
texts |= st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=4)
INTEGERS = [0, 1, -1, 2, 10, 9, 2**63 - 1, -(2**63), 2**53 + 1, 2**53]
integers = st.sampled_from(INTEGERS)
REALS = [0.0, -0.0, 1.0, 1.5, -1.5, 1e300, -1e300, 5e-324, float(2**53)]
reals = st.sampled_from(REALS)
TIMES = [
    dt.datetime(2026, 1, 1, tzinfo=dt.UTC),
    dt.datetime(2026, 1, 1, 1, tzinfo=dt.timezone(dt.timedelta(hours=1))),  # the same moment
    dt.datetime(2026, 1, 1, 0, 0, 0, 1, tzinfo=dt.UTC),
    dt.datetime(1, 1, 1, 12, tzinfo=dt.UTC),
    dt.datetime(9999, 12, 31, tzinfo=dt.UTC),
    dt.datetime(1969, 12, 31, 23, 59, 59, 999999, tzinfo=dt.UTC),
]
times = st.sampled_from(TIMES)
DAYS = [dt.date(1, 1, 1), dt.date(2026, 1, 31), dt.date(2026, 2, 1), dt.date(9999, 12, 31)]
days = st.sampled_from(DAYS)
UUIDS = [UUID(int=0), UUID(int=1), UUID(int=2**128 - 1), UUID(int=10 << 120)]
uuids = st.sampled_from(UUIDS)
PRICES = [
    Decimal(text)
    for text in (
        "0",
        "-0",
        "1",
        "1.0",
        "1.00",
        "10",
        "9",
        "-1",
        "-1.5",
        "-1.55",
        "0.1",
        "0.10",
        "1E+30",
        "1E-30",
        "-1E-30",
        "12345678901234567890.123456789",
    )
]
prices = st.sampled_from(PRICES)

VALUES = {
    "str": texts,
    "int": integers,
    "float": reals,
    "bool": st.booleans(),
    "datetime": times,
    "date": days,
    "UUID": uuids,
    "Decimal": prices,
    "Color": st.sampled_from(Color),
    "Level": st.sampled_from(Level),
    "Literal": st.sampled_from(["a", "b"]),
    "list of str": texts,
    "list of int": integers,
}

SAMPLES: dict[str, list[Any]] = {
    "text": TEXTS,
    "number": [None, *INTEGERS],
    "real": [None, *REALS],
    "flag": [False, True],
    "at": [None, *TIMES],
    "day": DAYS,
    "key": UUIDS,
    "price": [None, *PRICES],
    "color": list(Color),
    "level": list(Level),
    "choice": ["a", "b"],
    "tags": [None, [], *([text] for text in TEXTS), TEXTS],
    "numbers": [[], *([number] for number in INTEGERS), INTEGERS],
    "maybe": [UNSET, None, *TEXTS],
}
"""All values of each field, for the test that tries every operator with every value."""

items = st.builds(
    Item,
    text=texts,
    number=st.none() | integers,
    real=st.none() | reals,
    flag=st.booleans(),
    at=st.none() | times,
    day=days,
    key=uuids,
    price=st.none() | prices,
    color=st.sampled_from(Color),
    level=st.sampled_from(Level),
    choice=st.sampled_from(["a", "b"]),
    tags=st.none() | st.lists(texts, max_size=3),
    numbers=st.lists(integers, max_size=3),
    inner=st.none() | st.builds(Inner, code=st.none() | texts),
    maybe=st.just(UNSET) | st.none() | texts,
)

META_VALUES = {
    "resource_id": texts,
    "version": st.sampled_from([1, 2, 3]),
    "revision": st.sampled_from([1, 2]),
    "total_revision_count": st.sampled_from([1, 2]),
    "schema_version": st.just(1),
    "status": st.sampled_from(["draft", "stable"]),
    "is_deleted": st.booleans(),
    "created_time": times,
    "updated_time": times,
    "created_by": texts,
    "updated_by": texts,
}


@st.composite
def comparisons(draw: st.DrawFn) -> Filter:
    """Draw a comparison of a field with a value of its kind."""
    name = draw(st.sampled_from([*FIELDS, *(f"meta.{name}" for name in META_FIELDS)]))
    bare = name.removeprefix("meta.")
    kind, values = (META_FIELDS[bare], META_VALUES[bare]) if bare != name else (FIELDS[name], VALUES[FIELDS[name].name])
    op = draw(st.sampled_from(ops_of(kind)))
    if op in ("is_null", "exists"):
        return Compare(name, op, draw(st.booleans()))
    if op in ("in", "not_in"):
        return Compare(name, op, tuple(draw(st.lists(values, max_size=3))))
    return Compare(name, op, draw(values))


filters = st.recursive(
    comparisons(),
    lambda inner: (
        st.builds(And, st.lists(inner, max_size=3).map(tuple))
        | st.builds(Or, st.lists(inner, max_size=3).map(tuple))
        | st.builds(Not, inner)
    ),
    max_leaves=5,
)
sort_keys = st.builds(
    Sort,
    st.sampled_from(
        [*(name for name, kind in FIELDS.items() if not kind.is_list), *(f"meta.{name}" for name in META_FIELDS)]
    ),
    st.booleans(),
)
queries = st.builds(
    Query,
    where=st.none() | filters,
    sort=st.lists(sort_keys, max_size=3).map(tuple),
    limit=st.integers(1, 4),
    include_deleted=st.booleans(),
)
