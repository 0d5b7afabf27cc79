"""From a resolved Query to SQL: one builder, so that a query means the same in every SQL store; a `Dialect` says how its database spells it.

Names go into quoted identifiers, values only into parameters. SQL's own logic is the three-valued one that Query promises;
where a form was chosen so that an index serves it, a comment says why it means the same.
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
    sql: str
    params: Params


class Dialect(ABC):
    """How one database spells what all of them mean. Parameters are positional and stand in the order of `params`."""

    mark: ClassVar[str]
    true: ClassVar[str]
    false: ClassVar[str]

    def __init__(self, fields: Mapping[str, FieldKind]) -> None:
        self.fields = fields

    @abstractmethod
    def column(self, name: str) -> str:
        """The key of a canonical name: NULL for null and missing."""

    def value(self, name: str) -> str:
        """A parameter that is compared with the column."""
        return self.mark

    def compare(self, name: str, op: str, value: Key, params: Params) -> str:
        """`op` is one of SQL's comparisons."""
        params.append(value)
        return f"{self.column(name)} {op} {self.value(name)}"

    def one_of(self, name: str, values: Sequence[Key], params: Params) -> str:
        params.extend(values)
        return f"{self.column(name)} IN ({', '.join([self.value(name)] * len(values))})"

    @abstractmethod
    def same(self, name: str, value: Key | None, params: Params) -> str:
        """Equality in which null equals null."""

    @abstractmethod
    def exists(self, name: str, params: Params) -> str:
        """Whether an indexed field is there, null included."""

    @abstractmethod
    def ends_with(self, name: str, text: str, params: Params) -> str: ...

    @abstractmethod
    def contains(self, name: str, text: str, params: Params) -> str: ...

    @abstractmethod
    def has_element(self, name: str, value: Key, params: Params, *, positive: bool) -> str:
        """Whether a list has an element. `positive`: unknown may as well be false."""

    @abstractmethod
    def alive(self, *, deleted_too: bool) -> str:
        """The condition on is_deleted that every query starts with, in a form that keeps the indexes useful."""

    @abstractmethod
    def order(self, name: str, *, descending: bool) -> str:
        """Null first ascending, last descending."""


class SqlBuilder:
    def __init__(self, dialect: Dialect, table: str) -> None:
        self._dialect, self._table = dialect, table

    def search(self, query: Query) -> Statement:
        """Rows of (doc, uid, encoding, shown, sort keys..., id), one more than the limit so that the end shows."""
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
        """The condition of a search for everything in the order of ids."""
        return where

    def count(self, query: Query) -> Statement:
        where, params = self._where(query)
        return Statement(f"SELECT count(*) FROM {self._table} WHERE {where}", params)

    def _where(self, query: Query) -> tuple[str, Params]:
        params: Params = []
        where = self._dialect.alive(deleted_too=query.include_deleted)
        if query.where is not None:
            where += f" AND {self._filter(query.where, params, positive=True)}"
        return where, params

    def _filter(self, where: Filter, params: Params, positive: bool) -> str:
        """`positive`: no NOT around it, so unknown may as well be false."""
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
        """As a range, which an index serves."""
        end = prefix_end(value)
        first = self._dialect.compare(name, ">=", value, params)
        return first if end is None else f"{first} AND {self._dialect.compare(name, '<', end, params)}"

    def _after(self, sort: tuple[Sort, ...], after: tuple[Key | None, ...], params: Params) -> str:
        """The rows behind a cursor: for some i, equal in the keys before i and behind in key i. Null sorts below everything."""
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
    return '"' + identifier.replace('"', '""') + '"'


def prefix_end(prefix: str) -> str | None:
    """The smallest string above all that start with `prefix`, by code point; None where there is none."""
    while prefix:
        last = ord(prefix[-1])
        if last < 0x10FFFF:
            following = last + 1
            return prefix[:-1] + chr(0xE000 if 0xD800 <= following <= 0xDFFF else following)
        prefix = prefix[:-1]
    return None
