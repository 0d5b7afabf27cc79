"""The meaning of queries in plain Python, without index and SQL, with three-valued logic."""

from __future__ import annotations

import enum
import functools
from collections.abc import Callable
from typing import Any

from msgspec import UNSET

from ..query import And, Compare, Filter, Not, Or, Query, Sort

MISSING = UNSET


def value_of(meta: Any, data: Any, name: str) -> Any:
    """Return the plain value of a field: None if it is null, MISSING if it is missing."""
    if name.startswith("meta."):
        return getattr(meta, name.removeprefix("meta."))
    for part in name.split("."):
        data = MISSING if data is None else getattr(data, part, MISSING)
        if data is MISSING:
            return MISSING
    return data.value if isinstance(data, enum.Enum) else data


def plain(value: Any) -> Any:
    """Return a value, or the values in a tuple, with enums replaced by their values."""
    if isinstance(value, enum.Enum):
        return value.value
    return tuple(plain(part) for part in value) if isinstance(value, tuple) else value


COMPARE: dict[str, Callable[[Any, Any], Any]] = {
    "eq": lambda a, b: a == b,
    "ne": lambda a, b: a != b,
    "lt": lambda a, b: a < b,
    "lte": lambda a, b: a <= b,
    "gt": lambda a, b: a > b,
    "gte": lambda a, b: a >= b,
    "starts_with": lambda a, b: a.startswith(b),
    "ends_with": lambda a, b: a.endswith(b),
    "contains": lambda a, b: b in a,
}


def truth(where: Filter, meta: Any, data: Any) -> bool | None:
    """Return whether a filter is true for a resource; None means unknown."""
    match where:
        case And(of):
            parts = [truth(part, meta, data) for part in of]
            return False if False in parts else None if None in parts else True
        case Or(of):
            parts = [truth(part, meta, data) for part in of]
            return True if True in parts else None if None in parts else False
        case Not(of):
            inner = truth(of, meta, data)
            return None if inner is None else not inner
    assert isinstance(where, Compare)
    found, op, value = value_of(meta, data, where.field), where.op, plain(where.value)
    if op == "exists":
        return (found is not MISSING) is bool(value)
    if op == "is_null":
        return (found in (None, MISSING)) is bool(value)
    if op in ("in", "not_in") and not value:
        return op == "not_in"
    if found is None or found is MISSING:
        return None
    if op in ("in", "not_in"):
        return (found in value) == (op == "in")
    return bool(COMPARE[op](found, value))


def answer(query: Query, rows: list[tuple[Any, Any]]) -> list[str]:
    """Return all ids that a query finds, in order, without regard to its limit and cursor."""
    found = [
        (meta, data)
        for meta, data in rows
        if (query.include_deleted or not meta.is_deleted)
        and (query.where is None or truth(query.where, meta, data) is True)
    ]
    found.sort(key=functools.cmp_to_key(functools.partial(order, query)))
    return [meta.resource_id for meta, _ in found]


def order(query: Query, left: tuple[Any, Any], right: tuple[Any, Any]) -> int:
    """Return -1 if the left resource is before the right one in the order of a query, and 1 if it is after it."""
    for key in [key if isinstance(key, Sort) else Sort.of(key) for key in query.sort]:
        a, b = value_of(*left, key.field), value_of(*right, key.field)
        a, b = (None if a is MISSING else a), (None if b is MISSING else b)
        if a == b:
            continue
        less = a is None or (b is not None and a < b)
        return (1 if less else -1) if key.descending else (-1 if less else 1)
    a, b = left[0].resource_id, right[0].resource_id
    return -1 if a < b else 1
