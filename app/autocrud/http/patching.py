"""The two patch formats as functions of JSON trees."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from ..resource_manager.model.codec import parse_json
from ..resource_manager.runtime.deadline import MOST_PARTS, STEP_BYTES, operations
from .json_patch import MAX_MADE, MAX_OPERATIONS, invalid, json_patch

MERGE_PATCH = "application/merge-patch+json"
JSON_PATCH = "application/json-patch+json"
LEAST_OPERATION = len('{"op":"add","path":"","value":1}')
"""Bytes of the shortest operation that may do something."""
STEP_WORK = 30
"""Operations of one step of a JSON Patch in a list of a million items, which is in pieces (see `json_patch.ChunkedList`)."""
MAX_DOUBLINGS = 10
"""After so many copies the work counts as large, whatever is copied."""
PATCH_TYPES = (MERGE_PATCH, "application/json", JSON_PATCH)


class PatchFunction(NamedTuple):
    """`apply` makes new data of a JSON tree, which it may change. `size`: about how many bytes it works on, the data's aside.
    `work`: operations that it takes at most, those on the data aside."""

    apply: Callable[[Any], Any]
    size: int
    work: int


def patch_from_body(body: bytes, media: str) -> PatchFunction:
    """The patch in a request body.

    It is read each time it is applied, in the lane for heavy work: many that wait there take no more memory than their
    bodies. InvalidData is raised then if it is none.
    """

    def apply(target: Any) -> Any:
        patch = parse_json(body)
        return (json_patch(patch) if media == JSON_PATCH else merge_patch(patch))(target)

    # What is written in escapes is not looked for: it counts as many copies.
    copies = 0 if media != JSON_PATCH else MAX_DOUBLINGS if b"\\u" in body else body.count(b'"copy"')
    work = operations(body)
    if media == JSON_PATCH:
        count = len(body) // LEAST_OPERATION if b"\\u" in body else body.count(b'"op"')
        work += work_of_json_patch(min(MAX_OPERATIONS, count), copies)
    return PatchFunction(apply, _work(len(body), copies), work)


def json_patch_function(patch: Any, size: int, work: int) -> PatchFunction:
    """Return a JSON Patch of about `size` bytes, on which `work` operations are done at most. Raises InvalidData if it is none."""
    apply = json_patch(patch)
    copies = sum(1 for operation in patch if operation["op"] == "copy")
    return PatchFunction(apply, _work(size, copies), work + work_of_json_patch(len(patch), copies))


def work_of_json_patch(count: int, copies: int) -> int:
    """Return how many operations so many steps of a JSON Patch take at most, beside those on its text and on the data."""
    return count * STEP_WORK + (MAX_MADE // STEP_BYTES + MOST_PARTS if copies else 0)


def _work(size: int, copies: int) -> int:
    """Each copy may double the data."""
    return size << min(copies, MAX_DOUBLINGS)


def merge_patch(patch: Any) -> Callable[[Any], Any]:
    if not isinstance(patch, dict):
        raise invalid("a merge patch of a resource is a JSON object")
    return lambda target: _merge(target, patch)


def _merge(target: Any, patch: Any) -> Any:
    """RFC 7396, section 2."""
    if not isinstance(patch, dict):
        return patch
    result = dict(target) if isinstance(target, dict) else {}
    for key, value in patch.items():
        if value is None:
            result.pop(key, None)
        else:
            result[key] = _merge(result.get(key), value)
    return result
