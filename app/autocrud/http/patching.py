"""The patch of a request, in one of two formats, as a function of a JSON tree."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from ..resource_manager.model.codec import parse_json
from ..resource_manager.runtime.deadline import MOST_PARTS, STEP_BYTES, operations
from .json_patch import MAX_MADE, MAX_OPERATIONS, invalid, json_patch

MERGE_PATCH = "application/merge-patch+json"
JSON_PATCH = "application/json-patch+json"
LEAST_OPERATION = len('{"op":"add","path":"","value":1}')
"""The size of the shortest operation that can change something, in bytes."""
STEP_WORK = 30
"""Operations for one step of a JSON Patch in a list of a million items (see `json_patch.ChunkedList`)."""
MAX_DOUBLINGS = 10
"""The largest number of copies that are counted: each may double the data, and so many are large work anyway."""
PATCH_TYPES = (MERGE_PATCH, "application/json", JSON_PATCH)


class PatchFunction(NamedTuple):
    """A patch, and its cost.

    Attributes:
        apply: Returns the new data for a JSON tree, which it may change.
        size: The approximate size of the work, in bytes, without the data.
        work: The largest number of operations, without those on the data.
    """

    apply: Callable[[Any], Any]
    size: int
    work: int


def patch_from_body(body: bytes, media: str) -> PatchFunction:
    """Return the patch in a request body.

    `apply` parses the body each time it is called. So waiting patches take no more memory than their bodies. `apply`
    raises InvalidData if the body is not a patch.
    """

    def apply(target: Any) -> Any:
        patch = parse_json(body)
        return (json_patch(patch) if media == JSON_PATCH else merge_patch(patch))(target)

    # Escapes may hide the word "copy", so a text with escapes counts as if it had many copies.
    copies = 0 if media != JSON_PATCH else MAX_DOUBLINGS if b"\\u" in body else body.count(b'"copy"')
    work = operations(body)
    if media == JSON_PATCH:
        count = len(body) // LEAST_OPERATION if b"\\u" in body else body.count(b'"op"')
        work += work_of_json_patch(min(MAX_OPERATIONS, count), copies)
    return PatchFunction(apply, _work(len(body), copies), work)


def json_patch_function(patch: Any, size: int, work: int) -> PatchFunction:
    """Return a JSON Patch as a function.

    `size` is the approximate size of the patch in bytes, `work` the largest number of operations on its text. Raises
    InvalidData if the patch is invalid.
    """
    apply = json_patch(patch)
    copies = sum(1 for operation in patch if operation["op"] == "copy")
    return PatchFunction(apply, _work(size, copies), work + work_of_json_patch(len(patch), copies))


def work_of_json_patch(count: int, copies: int) -> int:
    """Return the largest number of operations for the steps of a JSON Patch.

    Those on its text and on the data are not included.
    """
    return count * STEP_WORK + (MAX_MADE // STEP_BYTES + MOST_PARTS if copies else 0)


def _work(size: int, copies: int) -> int:
    """Return the size of the work in bytes. Each copy can double the data."""
    return size << min(copies, MAX_DOUBLINGS)


def merge_patch(patch: Any) -> Callable[[Any], Any]:
    """Return a JSON Merge Patch as a function. Raises InvalidData if the patch is not an object."""
    if not isinstance(patch, dict):
        raise invalid("a merge patch of a resource is a JSON object")
    return lambda target: _merge(target, patch)


def _merge(target: Any, patch: Any) -> Any:
    """Apply a merge patch as RFC 7396, section 2, says."""
    if not isinstance(patch, dict):
        return patch
    result = dict(target) if isinstance(target, dict) else {}
    for key, value in patch.items():
        if value is None:
            result.pop(key, None)
        else:
            result[key] = _merge(result.get(key), value)
    return result
