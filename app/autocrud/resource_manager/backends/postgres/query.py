"""How PostgreSQL spells a query on the tables of `schema`.

The keys of indexed fields stand in one JSONB column, and each field has an index on an expression of it. Entries of a B-tree end at 2.7 KB, so
texts are indexed by what they begin with; a condition on the beginning, which every condition on the whole implies, lets the index serve.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from ....values import INT_MAX, INT_MIN, Key
from ..query_sql import Dialect, Params

PREFIX = 256
"""Characters of a text that are indexed."""

WIDENED = {"<": "<=", ">": ">=", "<=": "<=", ">=": ">=", "=": "="}
"""What a comparison of texts implies for their beginnings."""

TIMES = ("meta.created_time", "meta.updated_time")


def literal(text: str) -> str:
    """A string in a statement; percent signs are doubled, because they mark parameters."""
    return "'" + text.replace("'", "''").replace("%", "%%") + "'"


class PostgresDialect(Dialect):
    mark: ClassVar[str] = "%s"
    true: ClassVar[str] = "TRUE"
    false: ClassVar[str] = "FALSE"

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
        # Rows of a program that indexes the field as something else are there too: they have no number, and must not fail in an index.
        number = f"{key}::double precision"
        if kind.key_type is int:
            number = f"CASE WHEN {key}::numeric BETWEEN {INT_MIN} AND {INT_MAX} THEN {key}::bigint END"
        return f"(CASE jsonb_typeof({key}) WHEN 'number' THEN {number} END)"

    def is_text(self, name: str) -> bool:
        return not name.startswith("meta.") and not self.fields[name].is_list and self.fields[name].key_type is str

    def prefix(self, name: str) -> str:
        """The beginning of a text, which is what is indexed."""
        return f'("left"(keys ->> {literal(name)}, {PREFIX}) COLLATE "C")'

    def value(self, name: str) -> str:
        if name in TIMES:
            return "(timestamptz 'epoch' + %s * interval '1 microsecond')"
        if not name.startswith("meta.") and not self.fields[name].is_list:
            kind = self.fields[name].key_type
            return f"%s::{'text' if kind is str else 'bigint' if kind is int else 'double precision'}"
        return "%s"

    def compare(self, name: str, op: str, value: Key, params: Params) -> str:
        whole = f"{self.column(name)} {op} {self.value(name)}"
        if op in WIDENED and self.is_text(name):
            params.extend((str(value)[:PREFIX], value))
            return f"({self.prefix(name)} {WIDENED[op]} %s::text AND {whole})"
        params.append(value)
        return whole

    def one_of(self, name: str, values: Sequence[Key], params: Params) -> str:
        whole = f"{self.column(name)} IN ({', '.join([self.value(name)] * len(values))})"
        if self.is_text(name):
            params.extend([str(value)[:PREFIX] for value in values])
            whole = f"{self.prefix(name)} IN ({', '.join(['%s::text'] * len(values))}) AND {whole}"
        params.extend(values)
        return whole

    def same(self, name: str, value: Key | None, params: Params) -> str:
        params.append(value)
        return f"{self.column(name)} IS NOT DISTINCT FROM {self.value(name)}"

    def exists(self, name: str, params: Params) -> str:
        params.append(name)
        return "(%s <> ALL(absent))"

    def ends_with(self, name: str, text: str, params: Params) -> str:
        params.extend((len(text), text))
        return f'"right"({self.column(name)}, %s) = %s'

    def contains(self, name: str, text: str, params: Params) -> str:
        params.append(text)
        return f"strpos({self.column(name)}, %s) > 0"

    def has_element(self, name: str, value: Key, params: Params, *, positive: bool) -> str:
        params.append(value)
        kind = self.fields[name].key_type
        type_ = "text" if kind is str else "bigint" if kind is int else "double precision"
        return f"{self.column(name)} @> to_jsonb(%s::{type_})"

    def alive(self, *, deleted_too: bool) -> str:
        return "is_deleted IN (FALSE, TRUE)" if deleted_too else "NOT is_deleted"

    def order(self, name: str, *, descending: bool) -> str:
        direction = "DESC NULLS LAST" if descending else "ASC NULLS FIRST"
        column = "is_deleted" if name == "meta.is_deleted" else self.column(name)
        whole = f"{column} {direction}"
        return f"{self.prefix(name)} {direction}, {whole}" if self.is_text(name) else whole
