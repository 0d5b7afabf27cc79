"""Ranges of a response (RFC 9110, section 14)."""

from __future__ import annotations

import re

from ..errors import CrudError

MAX_RANGES = 16
_SPEC = re.compile(r"[ \t]*(?:([0-9]+)-([0-9]*)|-([0-9]+))[ \t]*")
_MOST = 10**19
"""Larger than any content. Larger numbers are taken for this one, because Python refuses to read very long ones."""


class RangeNotSatisfiable(CrudError):
    """No requested range lies in the content, or there are too many ranges."""

    type, title, status = "range-not-satisfiable", "These ranges cannot be sent", 416


def parse_ranges(header: str | None, size: int) -> list[tuple[int, int]] | None:
    """Return the ranges of a request, as pairs of the first byte and the byte after the last, or None for the whole.

    size  of the content, in bytes

    A header that is not valid, or has another unit, is ignored. Ranges that overlap or touch each other are joined, and
    the ranges are then in ascending order. Raises RangeNotSatisfiable if no range lies in the content, or if there are
    more than MAX_RANGES.
    """
    if header is None or size == 0:
        return None
    unit, equals, specs = header.partition("=")
    if not equals or unit.strip().lower() != "bytes":
        return None
    found: list[tuple[int, int]] = []
    listed = [spec for spec in specs.split(",") if spec.strip(" \t")]  # RFC 9110, 5.6.1: empty elements are ignored
    if not listed:
        return None
    for spec in listed:
        match = _SPEC.fullmatch(spec)
        if match is None:
            return None
        first, last, suffix = match.groups()
        if suffix is not None:
            start, end = max(0, size - _number(suffix)), size
        else:
            start, end = _number(first), size if not last else min(size, _number(last) + 1)
            if last and _number(last) < start:
                return None
        if start < end:
            found.append((start, end))
    if len(listed) > MAX_RANGES:
        raise RangeNotSatisfiable(f"expected at most {MAX_RANGES} ranges, got {len(listed)}")
    if not found:
        raise RangeNotSatisfiable(f"expected a range of the {size} bytes of the content, got {header[:100]!r}")
    return _joined(found)


def _number(digits: str) -> int:
    digits = digits.lstrip("0")
    return int(digits or "0") if len(digits) < len(str(_MOST)) else _MOST


def _joined(ranges: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Return ranges that do not overlap: the given ones, or else joined ones in ascending order."""
    joined: list[tuple[int, int]] = []
    for start, end in sorted(ranges):
        if joined and start <= joined[-1][1]:
            joined[-1] = joined[-1][0], max(end, joined[-1][1])
        else:
            joined.append((start, end))
    return ranges if len(joined) == len(ranges) else joined
