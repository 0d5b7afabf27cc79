"""Parses query strings to queries, and encodes cursors.

    ?author=alice&views[gte]=10&tags[contains]=x&state[in]=a,b&meta.created_time[gte]=2026-01-01T00:00:00Z
    &sort=-views,author&limit=20

A comma or a backslash inside a value of `[in]` is written with a backslash before it. `[in]`, `[not_in]`, `sort` and
`fields` may also be repeated, because many clients send lists in this way.
"""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, get_args

import msgspec
from msgspec.structs import replace

from ..query import (
    MAX_LIMIT,
    MAX_VALUES,
    SET_OPS,
    STATE_OPS,
    And,
    Compare,
    Cursor,
    Filter,
    Op,
    Query,
    Sort,
    invalid,
    resolve_compare,
    resolve_name,
    resolve_sort,
)
from ..resource_manager.engine.caller import Caller
from ..resource_manager.model.codec import Codec
from ..values import INT_MAX, INT_MIN, Key
from .messages import bad_parameter, parse_flag, parse_integer

LIST_PARAMETERS = ("sort", "limit", "cursor", "fields", "data", "include_deleted")
COUNT_PARAMETERS = ("include_deleted",)
LIST_VALUED = ("sort", "fields")
OPS = frozenset(get_args(Op))
DEFAULT_LIMIT = 50
MAX_SORT_KEYS = 8
MAX_FIELDS = 100

_CONDITION = re.compile(r"(?P<name>[^\[\]]+)(\[(?P<op>[a-z_]+)\])?")
_PARTS = re.compile(r"((?:[^\\,]|\\.)*)(?:,|$)", re.DOTALL)


class Search(NamedTuple):
    """The parameters of a list.

    `fields` are the fields of the data to return, or None for all. `data` is False if only metadata is returned.
    """

    query: Query
    fields: list[str] | None
    data: bool
    cursor_scope: bytes  # identifies the list, so that the cursor of another list is refused


def parse_search(given: list[tuple[str, str]], codec: Codec[Any], model: str) -> Search:
    """Return the search of a list. Raises InvalidQuery if a parameter is unknown or invalid."""
    parameters = _distinct(given)
    conditions = _conditions(parameters, codec, LIST_PARAMETERS)
    sort = _sort(parameters.get("sort"), codec)
    limit = parse_integer("limit", parameters["limit"], 1, MAX_LIMIT) if "limit" in parameters else DEFAULT_LIMIT
    include_deleted = _include_deleted(parameters, conditions)
    data = parse_flag("data", parameters["data"]) if "data" in parameters else True
    fields = parse_fields(parameters["fields"], codec) if "fields" in parameters else None
    if fields is not None and not data:
        raise bad_parameter("fields", "data=false returns no data, so fields has no effect: leave out one of them")
    scope = _scope(model, sort, conditions, include_deleted)
    after = decode_cursor(parameters["cursor"], scope, len(sort) + 1) if "cursor" in parameters else None
    query = Query(where=_all(conditions), sort=sort, limit=limit, after=after, include_deleted=include_deleted)
    return Search(query.resolve(codec.fields), fields, data, scope)


def parse_count(given: list[tuple[str, str]], codec: Codec[Any]) -> Query:
    """Return the query of a count, not yet resolved. Raises InvalidQuery if a parameter is unknown or invalid."""
    parameters = _distinct(given)
    conditions = _conditions(parameters, codec, COUNT_PARAMETERS)
    return Query(where=_all(conditions), include_deleted=_include_deleted(parameters, conditions))


def _include_deleted(parameters: dict[str, str], conditions: list[Compare]) -> bool:
    """Return whether deleted resources are found. By default, they are found if a filter uses `meta.is_deleted`."""
    if "include_deleted" in parameters:
        return parse_flag("include_deleted", parameters["include_deleted"])
    return any(condition.field == "meta.is_deleted" for condition in conditions)


def parse_fields(text: str, codec: Codec[Any]) -> list[str]:
    """Return the paths of `fields=a,b.c`. Raises InvalidQuery if the model does not have one of them."""
    paths = list(dict.fromkeys(text.split(",")))
    if len(paths) > MAX_FIELDS:
        raise bad_parameter("fields", f"expected at most {MAX_FIELDS} fields, got {len(paths)}")
    for path in paths:
        if not codec.has_path(path):
            raise bad_parameter("fields", f"the model has no field {path[:100]!r}")
    return paths


def _distinct(given: list[tuple[str, str]]) -> dict[str, str]:
    found: dict[str, str] = {}
    for name, value in given:
        if name not in found:
            found[name] = value
        elif name in LIST_VALUED or name.endswith(("[in]", "[not_in]")):
            found[name] += f",{value}"
        else:
            raise bad_parameter(name, "given twice; for several values use [in], for a range [gte] and [lt]")
    return found


def _conditions(parameters: dict[str, str], codec: Codec[Any], known: tuple[str, ...]) -> list[Compare]:
    conditions: list[Compare] = []
    for parameter, text in parameters.items():
        if parameter in known:
            continue
        match = _CONDITION.fullmatch(parameter)
        name = match["name"] if match else parameter
        if match is None or (name not in codec.fields and not name.startswith("meta.")):
            indexed = ", ".join(sorted(codec.fields)) or "none"
            detail = f"unknown parameter; expected {', '.join(known)}, or an indexed field ({indexed}) or one of meta"
            raise bad_parameter(parameter, detail)
        op = match["op"] or "eq"
        if op not in OPS:
            raise bad_parameter(parameter, f"unknown operator {op!r}; expected one of {', '.join(sorted(OPS))}")
        name, kind = resolve_name(name, codec.fields, parameter)
        try:
            value = _value(op, text, kind.parse)
        except ValueError as error:
            raise invalid(parameter, str(error)) from None
        condition = Compare(name, op, value)  # type: ignore[arg-type] # an Op, as checked above
        resolve_compare(condition, codec.fields, parameter)
        conditions.append(condition)
    return conditions


def _value(op: str, text: str, parse: Callable[[str], Any]) -> Any:
    if op in STATE_OPS:
        if text not in ("true", "false"):
            raise ValueError(f"expected true or false, got {text[:60]!r}")
        return text == "true"
    if op in SET_OPS:
        return tuple(parse(part) for part in split(text))
    return parse(text)


def split(text: str) -> list[str]:
    """Return the values of a comma-separated list. A backslash makes the next character a part of the value."""
    parts, at = [], 0
    while True:
        match = _PARTS.match(text, at)
        if match is None:
            raise ValueError("expected a character after the backslash")
        parts.append(re.sub(r"\\(.)", r"\1", match[1], flags=re.DOTALL))
        if len(parts) > MAX_VALUES:
            raise ValueError(f"expected at most {MAX_VALUES} values")
        if not match[0].endswith(",") or match.end(1) == match.end():
            return parts
        at = match.end()


def _sort(text: str | None, codec: Codec[Any]) -> tuple[Sort, ...]:
    if text is None:
        return ()
    parts = text.split(",")
    if len(parts) > MAX_SORT_KEYS:
        raise invalid("sort", f"expected at most {MAX_SORT_KEYS} keys, got {len(parts)}")
    return tuple(resolve_sort(Sort.of(part), codec.fields) for part in parts)


def _all(conditions: Sequence[Filter]) -> Filter | None:
    return None if not conditions else conditions[0] if len(conditions) == 1 else And(tuple(conditions))


def _scope(*parts: Any) -> bytes:
    return hashlib.sha256(repr(parts).encode("utf-8", "backslashreplace")).digest()[:9]


def revisions_scope(model: str, resource_id: str) -> bytes:
    """Return the scope of cursors for a resource's revisions."""
    return _scope(model, "revisions", resource_id)


def encode_cursor(cursor: Cursor, scope: bytes) -> str:
    """Return a cursor as a text. `scope` identifies the list that the cursor belongs to."""
    return base64.urlsafe_b64encode(scope + msgspec.msgpack.encode(cursor)).decode().rstrip("=")


def decode_cursor(text: str, scope: bytes, length: int) -> Cursor:
    """Return the cursor that `encode_cursor` encoded.

    Raises InvalidQuery for any other text, and for the cursor of another list.
    """
    try:
        raw = base64.b64decode(text + "=" * (-len(text) % 4), altchars=b"-_", validate=True)
        cursor = msgspec.msgpack.decode(raw[len(scope) :], type=list[Key | None])
    except (ValueError, msgspec.DecodeError):
        raise invalid("cursor", "expected the next_cursor of a response") from None
    if raw[: len(scope)] != scope or len(cursor) != length:
        raise invalid("cursor", "this cursor belongs to another model, filter or sort order")
    if any(isinstance(key, int) and not INT_MIN <= key <= INT_MAX for key in cursor):
        raise invalid("cursor", "expected the next_cursor of an answer")
    return tuple(cursor)


def read_filter_of(by: Caller) -> Filter | None:
    """Return the filter of the resources that a caller may read, or None if the caller may read all of them."""
    return None if by.access_filter is None else by.access_filter.read


def narrowed(query: Query, by: Caller) -> Query:
    """Return a resolved query that finds only resources that the caller may read."""
    read_filter = read_filter_of(by)
    if read_filter is None:
        return query
    return replace(query, where=read_filter if query.where is None else And((query.where, read_filter)))
