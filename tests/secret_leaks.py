"""Searches texts and objects for secrets. A canary is a secret whose pieces of four characters occur nowhere else."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import types
from collections.abc import Iterator
from typing import Any
from urllib.parse import quote

from app.autocrud.secret import Secret

PIECE = 4
TOKEN = "Zq7Xv9Kw3Jp5Rt1Yb8Nc2Md6Fg4Hs0Lx"  # noqa: S105 - a canary


def pieces(canary: str) -> set[str]:
    """Return the pieces of a canary, plain and percent-encoded."""
    forms = (canary, quote(canary, safe=""))
    return {form[at : at + PIECE] for form in forms for at in range(len(form) - PIECE + 1)}


def leaks(text: str, *canaries: str) -> list[str]:
    """Return the pieces of these canaries that occur in the text."""
    return sorted(piece for canary in canaries for piece in pieces(canary) if piece in text)


def texts_of_error(error: BaseException) -> Iterator[str]:
    """Return the texts of an error, its causes and its contexts."""
    seen: set[int] = set()
    todo: list[BaseException | None] = [error]
    while todo:
        one = todo.pop()
        if one is not None and id(one) not in seen:
            seen.add(id(one))
            yield f"{one!r} {one} {one.args} {vars(one)}"
            todo += [one.__cause__, one.__context__]


def texts_of_objects(roots: list[Any]) -> Iterator[str]:
    """Return the texts of all objects that are reachable from these. The search does not go into a Secret."""
    seen: dict[int, Any] = {}
    todo = list(roots)
    while todo:
        one = todo.pop()
        if id(one) in seen or isinstance(one, type | types.ModuleType | types.BuiltinFunctionType | types.FrameType):
            continue
        seen[id(one)] = one
        try:
            yield f"{type(one).__name__} {one!r}"
            yield str(one)
        except Exception as error:  # objects of drivers raise errors of any type
            yield str(error)
        todo += _inside(one)
    assert len(seen) > 20


def _inside(one: Any) -> list[Any]:
    if isinstance(one, str | bytes | int | float | None | logging.Logger | Secret):
        return []
    found: list[Any] = []
    if isinstance(one, dict):
        found += [*one, *one.values()]
    elif isinstance(one, list | tuple | set | frozenset):
        found += one
    elif isinstance(one, functools.partial):
        found += [one.func, *one.args, *one.keywords.values()]
    elif isinstance(one, types.MethodType):
        found.append(one.__self__)
    elif isinstance(one, asyncio.Future) and one.done() and not one.cancelled():
        found.append(one.exception() or one.result())
    found += getattr(one, "__dict__", {}).values()
    names = [name for kind in type(one).__mro__ for name in _slots(kind)]
    for name in (*names, *getattr(one, "__struct_fields__", ())):
        with contextlib.suppress(Exception):  # an empty slot
            found.append(getattr(one, name))
    return found


def _slots(kind: type) -> tuple[str, ...]:
    slots = kind.__dict__.get("__slots__", ())
    return (slots,) if isinstance(slots, str) else tuple(slots)
