"""Queries: filters, sorting and pages. A query means the same in every store.

    Query(where=field("author").eq("alice") & field("views").gte(10), sort=("-meta.created_time",), limit=20)

A name is an indexed field of the model or, with the prefix `meta.`, one of `META_FIELDS`. The prefix may be left out if
no indexed field has that name.

Filters follow the three-valued logic of SQL. A comparison with a field that is null or missing is unknown,
`Not(unknown)` is unknown, and a search finds only resources for which the filter is true. `is_null` is true for null
and for missing fields. `exists` is true for fields that are present, also if they are null. Strings are compared by
code point, and `contains` is case-sensitive.

Null and missing fields are sorted first in ascending and last in descending order. Resources with equal sort keys are
sorted by ascending id. The cursor of a page holds the sort keys of its last row, so rows that are written meanwhile do
not shift the next page.

Stores get a query that `resolve` has checked: names are canonical, and values are keys (see `values`).
"""

from __future__ import annotations

import datetime as dt
import operator
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, Literal

from msgspec import Struct
from typing_extensions import override

from .errors import InvalidQuery, Violation
from .values import FieldKind, Key, kind_of

Op = Literal[
    "eq", "ne", "lt", "lte", "gt", "gte", "in", "not_in", "contains", "starts_with", "ends_with", "is_null", "exists"
]
TEXT_OPS: tuple[Op, ...] = ("contains", "starts_with", "ends_with")
SET_OPS: tuple[Op, ...] = ("in", "not_in")
STATE_OPS: tuple[Op, ...] = ("is_null", "exists")  # their argument is true or false
SCALAR_OPS: tuple[Op, ...] = ("eq", "ne", "lt", "lte", "gt", "gte", *SET_OPS, *STATE_OPS)

MAX_LIMIT = 200
MAX_CONDITIONS = 200
MAX_VALUES = 1000
MAX_NEEDLE = 1000
"""The largest argument of `contains` for a text, in UTF-8 bytes: stores compare it at every position of the text."""

META_FIELDS: dict[str, FieldKind] = {
    name: kind_of(type_)
    for name, type_ in {
        "resource_id": str,
        "version": int,
        "revision": int,
        "total_revision_count": int,
        "schema_version": int,
        "status": Literal["draft", "stable"],
        "is_deleted": bool,
        "created_time": dt.datetime,
        "updated_time": dt.datetime,
        "created_by": str,
        "updated_by": str,
    }.items()
}


class Filter(Struct, frozen=True):
    """A condition on resources. Combine conditions with `&` (and), `|` (or) and `~` (not).

    (field("author").eq("alice") | field("author").eq("bob")) & ~field("published").eq(True)
    """

    def __and__(self, other: Filter) -> Filter:
        return And((self, other))

    def __or__(self, other: Filter) -> Filter:
        return Or((self, other))

    def __invert__(self) -> Filter:
        return Not(self)


class Compare(Filter, frozen=True):
    """A comparison, `field op value`. `in` and `not_in` take a sequence, `is_null` and `exists` a bool."""

    field: str
    op: Op
    value: Any


class And(Filter, frozen=True):
    """True if all of its filters are true."""

    of: tuple[Filter, ...]


class Or(Filter, frozen=True):
    """True if at least one of its filters is true."""

    of: tuple[Filter, ...]


class Not(Filter, frozen=True):
    """True if its filter is false; unknown if its filter is unknown."""

    of: Filter


class field(Struct, frozen=True):  # noqa: N801 - reads as a word in a query, like a function
    """A field by name. Its methods make conditions: `field("views").gte(10)`.

    The name is an indexed field of the model ("author", "address.city") or a metadata field ("meta.created_time").
    """

    name: str

    def eq(self, value: Any) -> Filter:
        """Match resources in which the field equals the value."""
        return Compare(self.name, "eq", value)

    def ne(self, value: Any) -> Filter:
        """Match resources in which the field has another value. Null and missing fields do not match."""
        return Compare(self.name, "ne", value)

    def lt(self, value: Any) -> Filter:
        """Match resources in which the field is less than the value."""
        return Compare(self.name, "lt", value)

    def lte(self, value: Any) -> Filter:
        """Match resources in which the field is less than or equal to the value."""
        return Compare(self.name, "lte", value)

    def gt(self, value: Any) -> Filter:
        """Match resources in which the field is greater than the value."""
        return Compare(self.name, "gt", value)

    def gte(self, value: Any) -> Filter:
        """Match resources in which the field is greater than or equal to the value."""
        return Compare(self.name, "gte", value)

    def in_(self, values: Iterable[Any]) -> Filter:
        """Match resources in which the field equals one of the values, at most 1,000."""
        return Compare(self.name, "in", tuple(values))

    def not_in(self, values: Iterable[Any]) -> Filter:
        """Match resources in which the field equals none of the values. Null and missing fields do not match."""
        return Compare(self.name, "not_in", tuple(values))

    def contains(self, value: Any) -> Filter:
        """Match texts that contain the value, or lists that have it as an item."""
        return Compare(self.name, "contains", value)

    def starts_with(self, value: str) -> Filter:
        """Match texts that start with the value."""
        return Compare(self.name, "starts_with", value)

    def ends_with(self, value: str) -> Filter:
        """Match texts that end with the value."""
        return Compare(self.name, "ends_with", value)

    def is_null(self, yes: bool = True) -> Filter:
        """Match resources in which the field is null or missing; with `yes=False`, all others."""
        return Compare(self.name, "is_null", yes)

    def exists(self, yes: bool = True) -> Filter:
        """Match resources in which the field is present, also if it is null; with `yes=False`, all others."""
        return Compare(self.name, "exists", yes)


class Sort(Struct, frozen=True):
    """A field to sort by."""

    field: str
    descending: bool = False

    @classmethod
    def of(cls, text: str) -> Sort:
        """Return the sort key that a text names: `"views"` is ascending, `"-views"` descending."""
        return cls(text[1:], True) if text.startswith("-") else cls(text)


Cursor = tuple[Key | None, ...]
"""The sort keys of the last row of a page, then its id."""


class Query(Struct, frozen=True, kw_only=True):
    """A search: the resources to find, their order, and the page.

        Query(where=field("tags").contains("news"), sort=("-views", "meta.created_time"), limit=100)

    Attributes:
        where: The condition. None finds all resources.
        sort: Names of fields, or `Sort`s; a name that starts with `-` sorts in descending order.
        limit: The largest number of resources in a page, 1 to 200.
        after: The `next` of the previous page. None starts with the first page.
        include_deleted: Whether deleted resources are found too.
    """

    where: Filter | None = None
    sort: tuple[str | Sort, ...] = ()
    limit: int = 50
    after: Cursor | None = None
    include_deleted: bool = False

    def resolve(self, fields: Mapping[str, FieldKind]) -> Resolved:
        """Return this query in the form that stores take. Raises InvalidQuery, which names the invalid parameter.

        `fields` maps the names of the model's indexed fields to their kinds.
        """
        if type(self.limit) is not int or not 1 <= self.limit <= MAX_LIMIT:
            raise invalid("limit", f"expected 1 to {MAX_LIMIT}, got {self.limit}")
        sort = tuple(resolve_sort(key if isinstance(key, Sort) else Sort.of(key), fields) for key in self.sort)
        if self.after is not None and len(self.after) != len(sort) + 1:
            raise invalid("cursor", "this cursor belongs to another sort order")
        where = None if self.where is None else _resolve(self.where, fields, [MAX_CONDITIONS])
        return Resolved(
            where=where, sort=sort, limit=self.limit, after=self.after, include_deleted=self.include_deleted
        )


class Resolved(Query, frozen=True, kw_only=True):
    """A query that was checked: names are canonical, values are keys, and sort keys are `Sort`s."""

    @override
    def resolve(self, fields: Mapping[str, FieldKind]) -> Resolved:
        return self


def invalid(parameter: str, detail: str) -> InvalidQuery:
    """Return the error for an invalid parameter of a query."""
    return InvalidQuery(f"{parameter}: {detail}", (Violation(f"?{parameter}", detail),))


def resolve_name(name: str, fields: Mapping[str, FieldKind], parameter: str) -> tuple[str, FieldKind]:
    """Return the canonical name and the kind of a field.

    `parameter` is the name that the error uses. Raises InvalidQuery, which lists the fields, if the field is not
    indexed and not metadata.
    """
    if name in fields:
        return name, fields[name]
    bare = name.removeprefix("meta.")
    if bare in META_FIELDS:
        return f"meta.{bare}", META_FIELDS[bare]
    known = ", ".join(sorted(fields)) or "none"
    raise invalid(
        parameter,
        f"{name!r} is not indexed; indexed fields: {known};"
        f" metadata: {', '.join('meta.' + name for name in META_FIELDS)}",
    )


def resolve_sort(key: Sort, fields: Mapping[str, FieldKind]) -> Sort:
    """Return a sort key with its canonical name. Raises InvalidQuery if the field is unknown or a list."""
    name, kind = resolve_name(key.field, fields, "sort")
    if kind.is_list:
        raise invalid("sort", f"{key.field!r} is a list, and lists have no order")
    return Sort(name, key.descending)


def ops_of(kind: FieldKind) -> tuple[Op, ...]:
    """Return the operators that apply to a kind."""
    if kind.is_list:
        return ("contains",)
    return SCALAR_OPS + TEXT_OPS if kind.is_text else SCALAR_OPS


def resolve_compare(condition: Compare, fields: Mapping[str, FieldKind], parameter: str | None = None) -> Compare:
    """Return a comparison with its canonical name, and with keys in place of values.

    `parameter` is the name that the error uses. Raises InvalidQuery if the name, the operator or the value is invalid.
    """
    parameter = parameter or f"{condition.field}[{condition.op}]"
    name, kind = resolve_name(condition.field, fields, parameter)
    if condition.op not in ops_of(kind):
        raise invalid(parameter, f"{condition.op!r} does not apply to {kind.name}; these do: {', '.join(ops_of(kind))}")
    value = condition.value
    if condition.op in STATE_OPS:
        if type(value) is not bool:
            raise invalid(parameter, "expected true or false")
        return Compare(name, condition.op, value)
    try:
        if condition.op in SET_OPS:
            if isinstance(value, str) or not isinstance(value, Sequence | set | frozenset):
                raise ValueError("expected a sequence of values")
            if len(value) > MAX_VALUES:
                raise ValueError(f"expected at most {MAX_VALUES} values, got {len(value)}")
            return Compare(name, condition.op, tuple(kind.key(element) for element in value))
        if value is None:
            raise ValueError("a comparison with null finds nothing; use is_null")
        key = kind.key(value)
        # The limit is for texts only, which are searched at every position; an item of a list is compared once.
        if condition.op == "contains" and kind.is_text and (size := len(str(key).encode())) > MAX_NEEDLE:
            raise ValueError(f"expected at most {MAX_NEEDLE} bytes to look for, got {size}")
        return Compare(name, condition.op, key)
    except ValueError as error:
        raise invalid(parameter, str(error)) from None


def _resolve(where: Filter, fields: Mapping[str, FieldKind], left: list[int]) -> Filter:
    left[0] -= 1
    if left[0] < 0:
        raise invalid("where", f"expected at most {MAX_CONDITIONS} conditions")
    match where:
        case Compare():
            return resolve_compare(where, fields)
        case And():
            return And(tuple(_resolve(part, fields, left) for part in where.of))
        case Or():
            return Or(tuple(_resolve(part, fields, left) for part in where.of))
        case Not():
            return Not(_resolve(where.of, fields, left))
    raise invalid("where", f"expected a Filter, got {type(where).__name__}")


def truth(where: Filter, keys: Mapping[str, Key | Sequence[Key] | None], missing: Collection[str]) -> bool | None:
    """Evaluate a resolved filter for one resource: true, false, or None for unknown.

    `keys` has the keys of the resource's fields by canonical name, None for null. `missing` names the fields that the
    resource does not have; their keys are None too.
    """
    match where:
        case And():
            parts: list[bool | None] = [truth(part, keys, missing) for part in where.of]
            return False if False in parts else None if None in parts else True
        case Or():
            parts = [truth(part, keys, missing) for part in where.of]
            return True if True in parts else None if None in parts else False
        case Not():
            inner = truth(where.of, keys, missing)
            return None if inner is None else not inner
    assert isinstance(where, Compare)
    found, value = keys[where.field], where.value
    absent = where.field in missing
    match where.op:
        case "exists":
            return absent is not bool(value)
        case "is_null":
            return (found is None) is bool(value)
        case "in" | "not_in" if not value:
            return where.op == "not_in"
    return None if found is None else _COMPARISONS[where.op](found, value)


_COMPARISONS: dict[Op, Callable[[Any, Any], bool]] = {
    "eq": operator.eq,
    "ne": operator.ne,
    "lt": operator.lt,
    "lte": operator.le,
    "gt": operator.gt,
    "gte": operator.ge,
    "in": lambda found, values: found in values,
    "not_in": lambda found, values: found not in values,
    "contains": operator.contains,
    "starts_with": str.startswith,
    "ends_with": str.endswith,
}


def uses_data_fields(where: Filter) -> bool:
    """Return whether a resolved filter uses an indexed field, and not only metadata."""
    match where:
        case Compare():
            return not where.field.startswith("meta.")
        case And() | Or():
            return any(map(uses_data_fields, where.of))
        case Not():
            return uses_data_fields(where.of)
    raise AssertionError("there are no other filters")
