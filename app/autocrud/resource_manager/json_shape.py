"""How much a JSON text holds, found out before it is decoded.

A text of some megabytes can hold millions of objects, which take a hundred times its size in memory and seconds to walk
over, or lie so deep in each other that one version of Python reads it and the next one does not. All steps here are
linear, and none of them holds the interpreter lock for long: texts are counted by C, strings are left out one by one.
"""

from __future__ import annotations

import itertools
import re
from typing import NamedTuple

MAX_DEPTH = 200
MAX_CONTAINERS = 100_000
"""Objects and lists together."""
MAX_NAMES = 250_000
"""Names in all objects together."""
MAX_VALUES = 1_000_000
"""Values of any kind."""
EXPECTED_SHAPE = (
    f"expected at most {MAX_VALUES} values, {MAX_NAMES} names and {MAX_CONTAINERS} objects and lists, nested at most"
    f" {MAX_DEPTH} deep"
)

_STRING = re.compile(rb'"[^"]*"')
_NO_BRACKETS = bytes(code for code in range(256) if code not in b"[]{}")
_STEPS = {**dict.fromkeys(b"[{", 1), **dict.fromkeys(b"]}", -1)}


class Shape(NamedTuple):
    """How many there are in a JSON text. `values` may be one too many for each empty container."""

    values: int
    names: int
    containers: int
    depth: int

    @property
    def excess(self) -> str | None:
        """What there is too much of, as in "has 700000 names", or None."""
        if self.values > MAX_VALUES:
            return f"has {self.values} values"
        if self.names > MAX_NAMES:
            return f"has {self.names} names"
        if self.containers > MAX_CONTAINERS:
            return f"has {self.containers} objects and lists"
        return f"is nested {self.depth} deep" if self.depth > MAX_DEPTH else None


def misshapen(body: bytes) -> str | None:
    """Return the excess of a JSON text, or None. Texts that are no JSON may be anything."""
    if len(body) <= 2 * MAX_DEPTH:
        return None
    # Upper bounds: strings hold brackets, colons and commas too.
    opened = body.count(b"[") + body.count(b"{")
    if opened <= MAX_DEPTH and body.count(b":") <= MAX_NAMES and opened + body.count(b",") < MAX_VALUES:
        return None
    plain = _without_escapes(body)
    if plain.count(b'"') > 2 * (MAX_VALUES + MAX_NAMES):
        return f"has more than {MAX_VALUES + MAX_NAMES} strings"
    return _shape(plain).excess


def containers(body: bytes) -> int:
    """Return how many objects and lists a JSON text holds."""
    return _shape(_without_escapes(body)).containers


def strings(body: bytes) -> int:
    """Return how many strings a JSON text holds, names among them."""
    return _without_escapes(body).count(b'"') // 2


def _shape(plain: bytes) -> Shape:
    """Return the shape of a text without escapes."""
    pieces, at = [], 0
    for match in _STRING.finditer(plain):
        pieces.append(plain[at : match.start()])
        at = match.end()
    outside = b"".join([*pieces, plain[at:]])
    opened = outside.count(b"[") + outside.count(b"{")
    steps = map(_STEPS.__getitem__, outside.translate(None, _NO_BRACKETS))
    depth = max(itertools.accumulate(steps), default=0)
    return Shape(opened + outside.count(b",") + 1, outside.count(b":"), opened, depth)


def _without_escapes(body: bytes) -> bytes:
    """Return the text without escaped backslashes and quotes, so that each quote begins or ends a string."""
    return body.replace(b"\\\\", b"").replace(b'\\"', b"") if b"\\" in body else body
