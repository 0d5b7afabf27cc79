"""The SQL dialect of PostgreSQL, for queries on the tables of `schema`.

The keys of indexed fields are in one JSONB column, and each field has an index on an expression of that column. An
entry of a B-tree may have 2.7 KB at most, so the index of a text contains only its beginning. Each condition on the
whole text implies a condition on the beginning. Adding that condition lets PostgreSQL use the index.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from typing_extensions import override

from ....values import INT_MAX, INT_MIN, Key
from ..query_sql import Dialect, Params

PREFIX = 256
"""The number of characters of a text that are indexed."""

WIDENED = {"<": "<=", ">": ">=", "<=": "<=", ">=": ">=", "=": "="}
"""The comparison of beginnings that each comparison of texts implies."""

TIMES = ("meta.created_time", "meta.updated_time")


def literal(text: str) -> str:
    """Return a string literal for a statement. Percent signs are doubled, because they mark parameters."""
    return "'" + text.replace("'", "''").replace("%", "%%") + "'"


class PostgresDialect(Dialect):
    """The SQL of PostgreSQL."""

    mark: ClassVar[str] = "%s"
    true: ClassVar[str] = "TRUE"
    false: ClassVar[str] = "FALSE"

    @override
    def column(self, name: str) -> str:
        if name.startswith("meta."):
            bare = name.removeprefix("meta.")
            return {"resource_id": "id", "is_deleted": "is_deleted::int"}.get(bare, bare)
        kind = self.fields[name]
        key = f"(keys -> {literal(name)})"
        if kind.is_list:
            return key
        if kind.key_type is str:
            return f'((keys ->> {literal(name)}) COLLATE "C")'
        # Another version of the program may index this field as another kind. Its rows have no number here, and must
        # not make the index fail.
        number = f"{key}::double precision"
        if kind.key_type is int:
            number = f"CASE WHEN {key}::numeric BETWEEN {INT_MIN} AND {INT_MAX} THEN {key}::bigint END"
        return f"(CASE jsonb_typeof({key}) WHEN 'number' THEN {number} END)"

    def is_text(self, name: str) -> bool:
        """Return whether a canonical name is an indexed text that is no list."""
        return not name.startswith("meta.") and not self.fields[name].is_list and self.fields[name].key_type is str

    def prefix(self, name: str) -> str:
        """Return the expression for the beginning of a text, which is the part that is indexed."""
        return f'("left"(keys ->> {literal(name)}, {PREFIX}) COLLATE "C")'

    @override
    def value(self, name: str) -> str:
        if name in TIMES:
            return "(timestamptz 'epoch' + %s * interval '1 microsecond')"
        if not name.startswith("meta.") and not self.fields[name].is_list:
            kind = self.fields[name].key_type
            return f"%s::{'text' if kind is str else 'bigint' if kind is int else 'double precision'}"
        return "%s"

    @override
    def compare(self, name: str, op: str, value: Key, params: Params) -> str:
        whole = f"{self.column(name)} {op} {self.value(name)}"
        if op in WIDENED and self.is_text(name):
            params.extend((str(value)[:PREFIX], value))
            return f"({self.prefix(name)} {WIDENED[op]} %s::text AND {whole})"
        params.append(value)
        return whole

    @override
    def one_of(self, name: str, values: Sequence[Key], params: Params) -> str:
        whole = f"{self.column(name)} IN ({', '.join([self.value(name)] * len(values))})"
        if self.is_text(name):
            params.extend([str(value)[:PREFIX] for value in values])
            whole = f"{self.prefix(name)} IN ({', '.join(['%s::text'] * len(values))}) AND {whole}"
        params.extend(values)
        return whole

    @override
    def same(self, name: str, value: Key | None, params: Params) -> str:
        params.append(value)
        return f"{self.column(name)} IS NOT DISTINCT FROM {self.value(name)}"

    @override
    def exists(self, name: str, params: Params) -> str:
        params.append(name)
        return "(%s <> ALL(absent))"

    @override
    def ends_with(self, name: str, text: str, params: Params) -> str:
        params.extend((len(text), text))
        return f'"right"({self.column(name)}, %s) = %s'

    @override
    def contains(self, name: str, text: str, params: Params) -> str:
        params.append(text)
        return f"strpos({self.column(name)}, %s) > 0"

    @override
    def has_element(self, name: str, value: Key, params: Params, *, positive: bool) -> str:
        params.append(value)
        kind = self.fields[name].key_type
        type_ = "text" if kind is str else "bigint" if kind is int else "double precision"
        return f"{self.column(name)} @> to_jsonb(%s::{type_})"

    @override
    def alive(self, *, deleted_too: bool) -> str:
        return "is_deleted IN (FALSE, TRUE)" if deleted_too else "NOT is_deleted"

    @override
    def order(self, name: str, *, descending: bool) -> str:
        direction = "DESC NULLS LAST" if descending else "ASC NULLS FIRST"
        column = "is_deleted" if name == "meta.is_deleted" else self.column(name)
        whole = f"{column} {direction}"
        return f"{self.prefix(name)} {direction}, {whole}" if self.is_text(name) else whole
