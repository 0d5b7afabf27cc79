"""Translates a resolved Query to SQL. One builder makes a query mean the same in every SQL store.

A `Dialect` has the syntax of one database. Names become quoted identifiers, and values become parameters only. SQL has
the three-valued logic that Query promises. If a form was chosen so that an index serves it, a comment says why it means
the same.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import ClassVar, NamedTuple, cast

from ...query import And, Compare, Filter, Not, Or, Query, Sort
from ...values import FieldKind, Key

Params = list[Key | None]

ORDER_OPS = {"eq": "=", "ne": "<>", "lt": "<", "lte": "<=", "gt": ">", "gte": ">="}


class Statement(NamedTuple):
    """A statement, and its parameters in order."""

    sql: str
    params: Params


class Dialect(ABC):
    """The SQL of one database. Parameters are positional, in the order in which methods add them to `params`.

    fields  the kinds of the indexed fields
    """

    mark: ClassVar[str]
    true: ClassVar[str]
    false: ClassVar[str]

    def __init__(self, fields: Mapping[str, FieldKind]) -> None:
        self.fields = fields

    @abstractmethod
    def column(self, name: str) -> str:
        """Return the expression for the key of a canonical name. It is NULL for null and missing fields."""

    def value(self, name: str) -> str:
        """Return the expression for a parameter that is compared with the column."""
        return self.mark

    def compare(self, name: str, op: str, value: Key, params: Params) -> str:
        """Return a comparison. `op` is an operator of SQL."""
        params.append(value)
        return f"{self.column(name)} {op} {self.value(name)}"

    def one_of(self, name: str, values: Sequence[Key], params: Params) -> str:
        """Return the condition that the key is one of these values."""
        params.extend(values)
        return f"{self.column(name)} IN ({', '.join([self.value(name)] * len(values))})"

    @abstractmethod
    def same(self, name: str, value: Key | None, params: Params) -> str:
        """Return a test for equality in which null equals null."""

    @abstractmethod
    def exists(self, name: str, params: Params) -> str:
        """Return the condition that an indexed field exists. It may be null."""

    @abstractmethod
    def ends_with(self, name: str, text: str, params: Params) -> str:
        """Return the condition that a text ends with this text."""

    @abstractmethod
    def contains(self, name: str, text: str, params: Params) -> str:
        """Return the condition that a text contains this text."""

    @abstractmethod
    def has_element(self, name: str, value: Key, params: Params, *, positive: bool) -> str:
        """Return the condition that a list has an element. If `positive`, it may be false instead of unknown."""

    @abstractmethod
    def alive(self, *, deleted_too: bool) -> str:
        """Return the condition on is_deleted with which every query begins, in a form that indexes serve."""

    @abstractmethod
    def order(self, name: str, *, descending: bool) -> str:
        """Return the ORDER BY term: nulls come first if ascending, and last if descending."""


class SqlBuilder:
    """Builds statements for one table in one dialect."""

    def __init__(self, dialect: Dialect, table: str) -> None:
        self._dialect, self._table = dialect, table

    def search(self, query: Query) -> Statement:
        """Return a statement for rows of (doc, uid, encoding, shown, sort keys..., id).

        It finds one row more than the limit, if there is one. So the caller sees whether a next page exists.
        """
        sort = cast("tuple[Sort, ...]", query.sort)
        dialect = self._dialect
        columns = [dialect.column(key.field) for key in sort] + ["id"]
        where, params = self._where(query)
        if not sort and query.where is None:
            where = self.from_ids(where)
        if query.after is not None:
            where += f" AND {self._after(sort, query.after, params)}"
        order = [dialect.order(key.field, descending=key.descending) for key in sort]
        params.append(query.limit + 1)
        return Statement(
            f"SELECT doc, uid, encoding, shown, {', '.join(columns)} FROM {self._table} WHERE {where}"
            f" ORDER BY {', '.join([*order, 'id'])} LIMIT {dialect.mark}",
            params,
        )

    def from_ids(self, where: str) -> str:
        """Return the condition for a search of all resources in the order of ids."""
        return where

    def count(self, query: Query) -> Statement:
        """Return a statement for the number of matching rows."""
        where, params = self._where(query)
        return Statement(f"SELECT count(*) FROM {self._table} WHERE {where}", params)

    def _where(self, query: Query) -> tuple[str, Params]:
        params: Params = []
        where = self._dialect.alive(deleted_too=query.include_deleted)
        if query.where is not None:
            where += f" AND {self._filter(query.where, params, positive=True)}"
        return where, params

    def _filter(self, where: Filter, params: Params, positive: bool) -> str:
        """Return the condition of a filter. `positive`: no NOT is around it, so it may be false instead of unknown."""
        match where:
            case And(of):
                parts = [self._filter(part, params, positive) for part in of]
                return "(" + " AND ".join(parts or [self._dialect.true]) + ")"
            case Or(of):
                parts = [self._filter(part, params, positive) for part in of]
                return "(" + " OR ".join(parts or [self._dialect.false]) + ")"
            case Not(part):
                return f"NOT {self._filter(part, params, positive=False)}"
        assert isinstance(where, Compare)
        return "(" + self._compare(where, params, positive) + ")"

    def _compare(self, condition: Compare, params: Params, positive: bool) -> str:
        dialect = self._dialect
        name, op, value = condition.field, condition.op, condition.value
        if op in ORDER_OPS:
            return dialect.compare(name, ORDER_OPS[op], value, params)
        if op in ("in", "not_in"):
            if not value:  # in nothing: false, and not in nothing: true, for null too
                return dialect.false if op == "in" else dialect.true
            return f"{'NOT ' if op == 'not_in' else ''}({dialect.one_of(name, value, params)})"
        if op == "is_null":
            return f"{dialect.column(name)} IS {'' if value else 'NOT '}NULL"
        if op == "exists":
            if name.startswith("meta."):
                return dialect.true if value else dialect.false
            return f"{'' if value else 'NOT '}{dialect.exists(name, params)}"
        if op == "starts_with":
            return self._starts_with(name, value, params)
        if op == "ends_with":
            return dialect.ends_with(name, value, params)
        assert op == "contains"
        if not name.startswith("meta.") and dialect.fields[name].is_list:
            return dialect.has_element(name, value, params, positive=positive)
        return dialect.contains(name, value, params)

    def _starts_with(self, name: str, value: str, params: Params) -> str:
        """Return the condition as a range, because an index serves ranges."""
        end = prefix_end(value)
        first = self._dialect.compare(name, ">=", value, params)
        return first if end is None else f"{first} AND {self._dialect.compare(name, '<', end, params)}"

    def _after(self, sort: tuple[Sort, ...], after: tuple[Key | None, ...], params: Params) -> str:
        """Return the condition for the rows after a cursor.

        For some i, a row is equal in the keys before i and comes after the cursor in key i. Null sorts below all
        values.
        """
        dialect = self._dialect
        alternatives: list[str] = []
        keys = list(zip([*sort, Sort("meta.resource_id")], after, strict=True))
        for at, (key, value) in enumerate(keys):
            col = dialect.column(key.field)
            if value is None and key.descending:
                continue
            equal = [dialect.same(before.field, found, params) for before, found in keys[:at]]
            if value is None:
                behind = f"{col} IS NOT NULL"
            elif key.descending:
                behind = f"({dialect.compare(key.field, '<', value, params)} OR {col} IS NULL)"
            else:
                behind = dialect.compare(key.field, ">", value, params)
            alternatives.append("(" + " AND ".join([*equal, behind]) + ")")
        condition = "(" + " OR ".join(alternatives) + ")"
        if sort and after[0] is not None and not sort[0].descending:
            # Implied by every alternative, and a range that an index on the first key serves.
            condition += f" AND {dialect.compare(sort[0].field, '>=', after[0], params)}"
        return condition


def quoted(identifier: str) -> str:
    """Return a quoted identifier."""
    return '"' + identifier.replace('"', '""') + '"'


def prefix_end(prefix: str) -> str | None:
    """Return the smallest string, by code point, above all that start with `prefix`, or None if there is none."""
    while prefix:
        last = ord(prefix[-1])
        if last < 0x10FFFF:
            following = last + 1
            return prefix[:-1] + chr(0xE000 if 0xD800 <= following <= 0xDFFF else following)
        prefix = prefix[:-1]
    return None
