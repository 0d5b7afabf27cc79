"""From a resolved Query to SQL for the tables of `tables`.

Names go into quoted identifiers, values only into parameters. SQL's own logic is the three-valued one that Query promises;
where a form was chosen so that an index serves it, a comment says why it means the same.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import NamedTuple, cast

from ...query import And, Compare, Filter, Not, Or, Query, Sort
from ...values import Key, Kind

Params = list[Key | None]

ORDER_OPS = {"eq": "=", "ne": "<>", "lt": "<", "lte": "<=", "gt": ">", "gte": ">="}


class Statement(NamedTuple):
    sql: str
    params: Params


def quoted(identifier: str) -> str:
    return '"' + identifier.replace('"', '""') + '"'


def column(name: str) -> str:
    """The column of a canonical name."""
    if name.startswith("meta."):
        bare = name.removeprefix("meta.")
        return "id" if bare == "resource_id" else bare
    return quoted(index_column(name))


def index_column(name: str) -> str:
    """The unquoted column of an indexed field. SQLite folds the case of identifiers; `Name` and `name` stay apart."""
    return "f:" + re.sub("[A-Z^]", lambda letter: "^" + letter[0].lower(), name)


def search(query: Query, fields: Mapping[str, Kind]) -> Statement:
    """Rows of (doc, uid, encoding, shown, sort keys..., id), one more than the limit so that the end shows."""
    sort = cast("tuple[Sort, ...]", query.sort)
    columns = [column(key.field) for key in sort] + ["id"]
    where, params = _where(query, fields)
    if not sort and query.where is None:
        where = f"+{where}"  # the order by id comes from the index of ids; one that starts with is_deleted would have to be sorted
    if query.after is not None:
        where += f" AND {_after(sort, query.after, params)}"
    directions = ["DESC" if key.descending else "ASC" for key in sort] + ["ASC"]
    order = ", ".join(f"{key} {direction}" for key, direction in zip(columns, directions, strict=True))
    params.append(query.limit + 1)
    return Statement(
        f"SELECT doc, uid, encoding, shown, {', '.join(columns)} FROM resources WHERE {where} ORDER BY {order} LIMIT ?",
        params,
    )


def count(query: Query, fields: Mapping[str, Kind]) -> Statement:
    where, params = _where(query, fields)
    return Statement(f"SELECT count(*) FROM resources WHERE {where}", params)


def _where(query: Query, fields: Mapping[str, Kind]) -> tuple[str, Params]:
    params: Params = []
    # Every index starts with is_deleted: IN (0, 1) excludes nothing, and lets them serve queries for deleted ones too.
    where = "is_deleted IN (0, 1)" if query.include_deleted else "is_deleted = 0"
    if query.where is not None:
        where += f" AND {_filter(query.where, fields, params, positive=True)}"
    return where, params


def _filter(where: Filter, fields: Mapping[str, Kind], params: Params, positive: bool) -> str:
    """`positive`: no NOT around it, so unknown may as well be false."""
    match where:
        case And(of):
            return "(" + " AND ".join([_filter(part, fields, params, positive) for part in of] or ["1"]) + ")"
        case Or(of):
            return "(" + " OR ".join([_filter(part, fields, params, positive) for part in of] or ["0"]) + ")"
        case Not(part):
            return f"NOT {_filter(part, fields, params, positive=False)}"
    assert isinstance(where, Compare)
    return "(" + _compare(where, fields, params, positive) + ")"


def _compare(condition: Compare, fields: Mapping[str, Kind], params: Params, positive: bool) -> str:
    name, op, value = condition.field, condition.op, condition.value
    col = column(name)
    if op in ORDER_OPS:
        params.append(value)
        return f"{col} {ORDER_OPS[op]} ?"
    if op in ("in", "not_in"):
        if not value:  # in nothing: false, and not in nothing: true, for null too
            return "0" if op == "in" else "1"
        params.extend(value)
        return f"{col} {'IN' if op == 'in' else 'NOT IN'} ({', '.join('?' * len(value))})"
    if op == "is_null":
        return f"{col} IS NULL" if value else f"{col} IS NOT NULL"
    if op == "exists":
        if name.startswith("meta."):
            return "1" if value else "0"
        params.append(f"\n{name}\n")
        return f"instr(missing, ?) {'=' if value else '>'} 0"
    if op == "starts_with":
        end = prefix_end(value)
        params.append(value)
        if end is None:
            return f"{col} >= ?"
        params.append(end)
        return f"{col} >= ? AND {col} < ?"
    if op == "ends_with":
        if not value:
            return f"{col} = {col}"
        params.append(value)
        return f"substr({col}, {-len(value)}) = ?"
    assert op == "contains"
    if not name.startswith("meta.") and fields[name].is_list:
        params.extend((name, value))
        has = "rid IN (SELECT rid FROM list_values WHERE field = ? AND value = ?)"
        # A list that is null has no rows in list_values: `has` is false where SQL says unknown, the same unless negated.
        return has if positive else f"CASE WHEN {col} IS NULL THEN NULL ELSE {has} END"
    params.append(value)
    return f"instr({col}, ?) > 0"


def prefix_end(prefix: str) -> str | None:
    """The smallest string above all that start with `prefix`, by code point; None where there is none."""
    while prefix:
        last = ord(prefix[-1])
        if last < 0x10FFFF:
            following = last + 1
            return prefix[:-1] + chr(0xE000 if 0xD800 <= following <= 0xDFFF else following)
        prefix = prefix[:-1]
    return None


def _after(sort: tuple[Sort, ...], after: tuple[Key | None, ...], params: Params) -> str:
    """The rows behind a cursor: for some i, equal in the keys before i and behind in key i. Null sorts below everything."""
    alternatives: list[str] = []
    equal, equal_params = "", Params()
    for key, value in zip([*sort, Sort("meta.resource_id")], after, strict=True):
        col = column(key.field)
        behind: str | None
        if value is None:
            behind, behind_params = (None if key.descending else f"{col} IS NOT NULL"), Params()
        elif key.descending:
            behind, behind_params = f"({col} < ? OR {col} IS NULL)", [value]
        else:
            behind, behind_params = f"{col} > ?", [value]
        if behind is not None:
            alternatives.append(f"({equal}{behind})")
            params.extend((*equal_params, *behind_params))
        equal += f"{col} IS ? AND "
        equal_params.append(value)
    condition = "(" + " OR ".join(alternatives) + ")"
    if sort and after[0] is not None and not sort[0].descending:
        # Implied by every alternative, and a range that an index on the first key serves.
        condition += f" AND {column(sort[0].field)} >= ?"
        params.append(after[0])
    return condition
