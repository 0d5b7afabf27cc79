"""The shape of a JSON text: how many values it holds and how deep they are nested, found before it is decoded.

A text of some megabytes can hold millions of objects. In memory the objects would take a hundred times the size of the
text, and a walk over them would take seconds. Some versions of Python decode a deeply nested text, others refuse it.

All steps here take linear time, and none holds the interpreter lock for long: counting runs in C, and strings are
removed one by one.
"""

from __future__ import annotations

import itertools
import re
from typing import NamedTuple

from ..runtime.threads import HEAVY_BYTES

MAX_DEPTH = 200
MAX_CONTAINERS = 100_000
"""Objects and lists together."""
MAX_NAMES = 250_000
"""Names in all objects together."""
MAX_VALUES = 1_000_000
"""Values of any kind."""
MAX_DIGITS = 400
"""Digits of a number in a text of HEAVY_BYTES or more, because decoding takes quadratic time. The largest float has
309 digits."""
MAX_STORED_DEPTH = 800
"""Deepest nesting of stored data. Python 3.11 decodes up to about 1,000 levels, fewer inside of nested calls of a
server."""
EXPECTED_SHAPE = (
    f"expected at most {MAX_VALUES} values, {MAX_NAMES} names and {MAX_CONTAINERS} objects and lists, nested at most"
    f" {MAX_DEPTH} deep, and numbers of at most {MAX_DIGITS} digits"
)

_STRING = re.compile(rb'"[^"]*"')
_NO_BRACKETS = bytes(code for code in range(256) if code not in b"[]{}")
_DIGITS = bytes(ord("0") if chr(code).isdigit() and code < 128 else ord(" ") for code in range(256))
_LONG = b"0" * (MAX_DIGITS + 1)
_STEPS = {**dict.fromkeys(b"[{", 1), **dict.fromkeys(b"]}", -1)}


class Shape(NamedTuple):
    """The counts of a JSON text. `values` may be too large by one for each empty container."""

    values: int
    names: int
    containers: int
    depth: int


def misshapen(body: bytes) -> str | None:
    """Return which limit a JSON text exceeds, as in "has 700000 names", or None.

    The result means nothing if the text is not JSON.
    """
    if len(body) <= 2 * MAX_DEPTH:
        return None
    # These are upper bounds, because strings may hold brackets, colons and commas too.
    opened = body.count(b"[") + body.count(b"{")
    may_be_long = len(body) >= HEAVY_BYTES and _has_long_number(body)
    few = opened <= MAX_DEPTH and body.count(b":") <= MAX_NAMES and opened + body.count(b",") < MAX_VALUES
    if few and not may_be_long:
        return None
    plain = _without_escapes(body)
    if plain.count(b'"') > 2 * (MAX_VALUES + MAX_NAMES):
        return f"has more than {MAX_VALUES + MAX_NAMES} strings"
    outside = _outside_of_strings(plain)
    values, names, containers = _counts(outside)
    if values > MAX_VALUES:
        return f"has {values} values"
    if names > MAX_NAMES:
        return f"has {names} names"
    if containers > MAX_CONTAINERS:
        return f"has {containers} objects and lists"
    if may_be_long and _has_long_number(outside):
        return f"has a number of more than {MAX_DIGITS} digits"
    depth = _depth(outside)
    return f"is nested {depth} deep" if depth > MAX_DEPTH else None


def shape(body: bytes) -> Shape:
    """Return the shape of a JSON text."""
    outside = _outside_of_strings(_without_escapes(body))
    return Shape(*_counts(outside), _depth(outside))


def excessive_depth(text: bytes) -> int | None:
    """Return how deep a JSON text is nested if that is deeper than MAX_STORED_DEPTH, or None."""
    if text.count(b"[") + text.count(b"{") <= MAX_STORED_DEPTH:
        return None
    depth = shape(text).depth
    return depth if depth > MAX_STORED_DEPTH else None


def weight(body: bytes) -> int:
    """Return about how many bytes a JSON text and its tree take in memory. Brackets and commas in strings count too."""
    return len(body) + 64 * (body.count(b"[") + body.count(b"{")) + 24 * body.count(b",")


def containers(body: bytes) -> int:
    """Return how many objects and lists a JSON text holds."""
    return _counts(_outside_of_strings(_without_escapes(body)))[2]


def strings(body: bytes) -> int:
    """Return how many strings a JSON text holds, names included."""
    return _without_escapes(body).count(b'"') // 2


def _outside_of_strings(plain: bytes) -> bytes:
    """Return the parts of a text without escapes that are outside of its strings."""
    pieces, at = [], 0
    for match in _STRING.finditer(plain):
        pieces.append(plain[at : match.start()])
        at = match.end()
    return b"".join([*pieces, plain[at:]])


def _has_long_number(text: bytes) -> bool:
    return _LONG in text.translate(_DIGITS)


def _counts(outside: bytes) -> tuple[int, int, int]:
    """Return the numbers of values, names and containers."""
    opened = outside.count(b"[") + outside.count(b"{")
    return opened + outside.count(b",") + 1, outside.count(b":"), opened


def _depth(outside: bytes) -> int:
    steps = map(_STEPS.__getitem__, outside.translate(None, _NO_BRACKETS))
    return max(itertools.accumulate(steps), default=0)


def _without_escapes(body: bytes) -> bytes:
    """Return the text without escaped backslashes and quotes, so that each quote begins or ends a string."""
    return body.replace(b"\\\\", b"").replace(b'\\"', b"") if b"\\" in body else body
