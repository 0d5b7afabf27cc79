"""Error texts for settings that do not fit their type: what was found, what was expected, and a suggestion."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from msgspec import inspect

from .autocrud.secret import quoted


def settings_error(value: Any, type_: Any, at: str) -> str | None:
    """Return a sentence about the first wrong name or choice in a value, or None if all of them are right.

    `at` is the path of the value, for the sentence. Numbers and free texts are not checked and not shown, because they
    may be secret.
    """
    return _error_at(value, inspect.type_info(type_), at)


def meant(found: object, expected: Iterable[object]) -> str:
    """Return a suggestion, `; did you mean NAME?`, or "" if no expected name is similar."""
    import difflib

    names = {str(one).lower(): one for one in expected}
    near = difflib.get_close_matches(str(found).lower(), names, 1)
    return f"; did you mean {names[near[0]]}?" if near else ""


def _error_at(value: Any, info: inspect.Type, at: str) -> str | None:
    match info:
        case inspect.LiteralType(values=choices):
            return None if value in choices else _none_of(value, choices, at)
        case inspect.UnionType(types=types):
            return _error_of_union(value, types, at)
        case inspect.StructType(fields=fields, tag_field=tag) if isinstance(value, dict):
            return _error_of_object(value, {field.encode_name: field for field in fields}, tag, at)
        case inspect.DictType(value_type=inner) if isinstance(value, dict):
            return next(filter(None, (_error_at(one, inner, f"{at}.{_name(key)}") for key, one in value.items())), None)
    return None


def _error_of_union(value: Any, types: Iterable[inspect.Type], at: str) -> str | None:
    """Check a value against a union of choices, of one struct or of tagged structs; other members are ignored."""
    structs = [one for one in types if isinstance(one, inspect.StructType)]
    choices = [one for one in types if isinstance(one, inspect.LiteralType)]
    if isinstance(value, dict) and structs:
        tag = structs[0].tag_field
        if tag is None:
            return _error_at(value, structs[0], at)
        tags = [one.tag for one in structs]
        if tag not in value:
            return _lacks(at, tag, tags)
        if value[tag] not in tags:
            return _none_of(value[tag], tags, f"{at}.{tag}")
        return _error_at(value, structs[tags.index(value[tag])], at)
    return _error_at(value, choices[0], at) if isinstance(value, str) and choices else None


def _error_of_object(
    value: dict[str, Any], fields: Mapping[str, inspect.Field], tag: str | None, at: str
) -> str | None:
    known = [*fields] if tag is None else [tag, *fields]
    for key in value:
        if key not in known:
            return f"{at} has {found(key, known)}, which is unknown: expected {', '.join(known)}{meant(key, known)}"
    for name, field in fields.items():
        if name in value:
            if wrong := _error_at(value[name], field.type, f"{at}.{name}"):
                return wrong
        elif field.required:
            return _lacks(at, name, field.type.values if isinstance(field.type, inspect.LiteralType) else ())
    return None


def _none_of(value: object, choices: Iterable[object], at: str) -> str:
    return f"{at} is {found(value, choices)}: expected {_listed(choices)}{meant(value, choices)}"


def found(value: object, choices: Iterable[object]) -> str:
    """Return a value for an error message: unchanged if it resembles a choice, else masked if it may be a secret."""
    names = [str(one) for one in choices]
    short = isinstance(value, str) and len(value) <= max(map(len, names)) + 2 and re.fullmatch(r"[\w.-]+", value)
    return repr(value) if short and meant(value, names) else quoted(value)


def _name(key: object) -> str:
    return str(key) if quoted(key) == repr(key) else "..."


def _lacks(at: str, name: str, choices: Iterable[object]) -> str:
    return f"{at} has no {name!r}" + (f": expected {_listed(choices)}" if choices else "")


def _listed(choices: Iterable[object]) -> str:
    names = [str(one) for one in choices]
    return names[0] if len(names) == 1 else f"one of {', '.join(names)}"
