"""Computes the JSON Patch between two JSON documents, in time that is proportional to their size.

Each object and list has a fingerprint, which is a hash of the fingerprints of its values. Two values with equal
fingerprints are equal. In two lists, the items that occur
once in both and in the same order stay in place (patience diff); the items between them are compared one by one. A list
of which most has changed is replaced as a whole. So the patch may not be the shortest one, but it is always correct.
"""

from __future__ import annotations

import bisect
import hashlib
from collections import Counter
from collections.abc import Sequence
from typing import Any

import msgspec

from ..errors import InvalidQuery
from ..resource_manager.model.json_shape import EXPECTED_SHAPE, misshapen
from ..resource_manager.model.unknown_fields import escaped
from .json_patch import MAX_OPERATIONS

_encode = msgspec.json.Encoder(order="deterministic").encode
_decode = msgspec.json.decode


def diff(old: bytes, new: bytes) -> list[dict[str, Any]]:
    """Return the operations that turn `old` into `new`; both are JSON texts.

    Raises InvalidQuery if one of them is too large or too deep to be compared.
    """
    for body in (old, new):
        if (found := misshapen(body)) is not None:
            raise InvalidQuery(
                f"the revisions cannot be compared: one of them {found}; {EXPECTED_SHAPE}; read both instead"
            )
    return _Comparison().run(_decode(old), _decode(new))


class _Comparison:
    def __init__(self) -> None:
        self._prints: dict[int, bytes] = {}  # by id() of an object or list, which lives longer than this
        self._operations: list[dict[str, Any]] = []

    def run(self, old: Any, new: Any) -> list[dict[str, Any]]:
        self._compare(old, new, "")
        if len(self._operations) > MAX_OPERATIONS:  # a longer patch would be refused
            return [{"op": "replace", "path": "", "value": new}]
        return self._operations

    def _print(self, value: Any) -> bytes:
        """Return a fingerprint. Only equal values have equal fingerprints."""
        if not isinstance(value, dict | list):
            return _encode(value)
        found = self._prints.get(id(value))
        if found is None:
            flat: Any
            if isinstance(value, dict):
                flat = [(key, self._print(inner)) for key, inner in sorted(value.items())]
                flat.append(None)  # distinguishes an object from a list of pairs
            else:
                flat = [self._print(inner) for inner in value]
            found = self._prints[id(value)] = hashlib.sha256(msgspec.msgpack.encode(flat)).digest()
        return found

    def _compare(self, old: Any, new: Any, path: str) -> None:
        if self._print(old) == self._print(new):
            return
        if isinstance(old, dict) and isinstance(new, dict):
            self._compare_objects(old, new, path)
        elif isinstance(old, list) and isinstance(new, list):
            self._compare_lists(old, new, path)
        else:
            self._say("replace", path, new)

    def _compare_objects(self, old: dict[str, Any], new: dict[str, Any], path: str) -> None:
        for key in old:
            if key not in new:
                self._operations.append({"op": "remove", "path": f"{path}/{escaped(key)}"})
        for key, value in new.items():
            if key in old:
                self._compare(old[key], value, f"{path}/{escaped(key)}")
            else:
                self._say("add", f"{path}/{escaped(key)}", value)

    def _compare_lists(self, old: list[Any], new: list[Any], path: str) -> None:
        """Add operations from left to right. After each one, the lists are equal up to its position."""
        begun = len(self._operations)
        kept = _kept([self._print(item) for item in old], [self._print(item) for item in new])
        from_old = from_new = 0
        for to_old, to_new in (*kept, (len(old), len(new))):
            both = min(to_old - from_old, to_new - from_new)
            for at in range(both):
                self._compare(old[from_old + at], new[from_new + at], f"{path}/{from_new + at}")
            for _ in range(to_old - from_old - both):
                self._operations.append({"op": "remove", "path": f"{path}/{from_new + both}"})
            for at in range(from_new + both, to_new):
                self._say("add", f"{path}/{at}", new[at])
            from_old, from_new = to_old + 1, to_new + 1
        if len(self._operations) - begun > min(len(new) + FEW, MANY):
            del self._operations[begun:]
            self._say("replace", path, new)

    def _say(self, op: str, path: str, value: Any) -> None:
        self._operations.append({"op": op, "path": path, "value": value})


FEW, MANY = 20, MAX_OPERATIONS // 2
"""A list is replaced as a whole if it needs more than its new length plus FEW operations, or more than MANY."""


def _kept(old: Sequence[bytes], new: Sequence[bytes]) -> list[tuple[int, int]]:
    """Return the positions of equal items in both lists, as pairs in ascending order.

    These are the items of the common start and the common end, and items between that occur once in both lists.
    """
    start = 0
    while start < min(len(old), len(new)) and old[start] == new[start]:
        start += 1
    end = 0
    while end < min(len(old), len(new)) - start and old[-1 - end] == new[-1 - end]:
        end += 1
    inner_old, inner_new = old[start : len(old) - end], new[start : len(new) - end]
    in_old, in_new = Counter(inner_old), Counter(inner_new)
    places = {item: at for at, item in enumerate(inner_new) if in_new[item] == 1}
    pairs = [(at, places[item]) for at, item in enumerate(inner_old) if in_old[item] == 1 and item in places]
    return [
        *((at, at) for at in range(start)),
        *((start + one, start + other) for one, other in _rising(pairs)),
        *((len(old) - at, len(new) - at) for at in range(end, 0, -1)),
    ]


def _rising(pairs: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Return the longest subsequence of the pairs in which the second numbers ascend too, as the first ones do."""
    ends: list[int] = []  # for each length, the least second number that ends a subsequence of this length
    last: list[int] = []  # the index of the pair with this number
    previous: list[int | None] = []
    for at, (_, second) in enumerate(pairs):
        length = bisect.bisect_left(ends, second)
        previous.append(last[length - 1] if length else None)
        ends[length : length + 1] = [second]
        last[length : length + 1] = [at]
    found = []
    at_: int | None = last[-1] if last else None
    while at_ is not None:
        found.append(pairs[at_])
        at_ = previous[at_]
    return found[::-1]
