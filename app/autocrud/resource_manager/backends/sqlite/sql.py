"""The SQL dialect of SQLite, for queries on the tables of `tables`."""

from __future__ import annotations

import re
from typing import ClassVar

from typing_extensions import override

from ....values import Key
from ..query_sql import Dialect, Params, SqlBuilder, quoted


def column(name: str) -> str:
    """Return the column of a canonical name, quoted if it needs to be."""
    if name.startswith("meta."):
        bare = name.removeprefix("meta.")
        return "id" if bare == "resource_id" else bare
    return quoted(index_column(name))


def index_column(name: str) -> str:
    """Return the unquoted column of an indexed field.

    SQLite ignores the case of identifiers, so capital letters are escaped: `Name` and `name` are different columns.
    """
    return "f:" + re.sub("[A-Z^]", lambda letter: "^" + letter[0].lower(), name)


class SqliteBuilder(SqlBuilder):
    """Builds statements for SQLite."""

    @override
    def from_ids(self, where: str) -> str:
        return (
            f"+{where}"  # use the index of ids; rows from an index that starts with is_deleted would have to be sorted
        )


class SqliteDialect(Dialect):
    """The SQL of SQLite."""

    mark: ClassVar[str] = "?"
    true: ClassVar[str] = "1"
    false: ClassVar[str] = "0"

    @override
    def column(self, name: str) -> str:
        return column(name)

    @override
    def same(self, name: str, value: Key | None, params: Params) -> str:
        params.append(value)
        return f"{column(name)} IS ?"

    @override
    def exists(self, name: str, params: Params) -> str:
        params.append(f"\n{name}\n")
        return "(instr(missing, ?) = 0)"

    @override
    def ends_with(self, name: str, text: str, params: Params) -> str:
        if not text:
            return f"{column(name)} = {column(name)}"
        params.append(text)
        return f"substr({column(name)}, {-len(text)}) = ?"

    @override
    def contains(self, name: str, text: str, params: Params) -> str:
        params.append(text)
        return f"instr({column(name)}, ?) > 0"

    @override
    def has_element(self, name: str, value: Key, params: Params, *, positive: bool) -> str:
        params.extend((name, value))
        has = "rid IN (SELECT rid FROM list_values WHERE field = ? AND value = ?)"
        # A list that is null has no rows in list_values: `has` is false, while SQL says unknown. Only NOT shows this.
        return has if positive else f"CASE WHEN {column(name)} IS NULL THEN NULL ELSE {has} END"

    @override
    def alive(self, *, deleted_too: bool) -> str:
        # Every index starts with is_deleted. IN (0, 1) excludes nothing, but lets the indexes serve these queries too.
        return "is_deleted IN (0, 1)" if deleted_too else "is_deleted = 0"

    @override
    def order(self, name: str, *, descending: bool) -> str:
        return f"{column(name)} {'DESC' if descending else 'ASC'}"
