"""The two patch formats as functions of JSON trees."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from typing import Any

from ..errors import Fault, InvalidData, InvalidQuery, PatchConflict
from ..resource_manager.codec import canonical_json, parse_json
from .problems import shortened

MERGE_PATCH = "application/merge-patch+json"
JSON_PATCH = "application/json-patch+json"
MAX_COPIED = 6 * 1024 * 1024
"""Bytes of JSON that the `copy` operations of one patch may copy."""
MAX_QUOTED = 200
"""Characters of a value in an error."""
PATCH_TYPES = (MERGE_PATCH, "application/json", JSON_PATCH)


def parse(body: bytes, media: str) -> Callable[[Any], Any]:
    """The patch in a request body. InvalidData if it is none."""
    patch = parse_json(body)
    return json_patch(patch) if media == JSON_PATCH else merge_patch(patch)


def merge_patch(patch: Any) -> Callable[[Any], Any]:
    if not isinstance(patch, dict):
        raise _invalid("a merge patch of a resource is a JSON object")
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


def json_patch(operations: Any) -> Callable[[Any], Any]:
    from jsonpatch import InvalidJsonPatch, JsonPatch, JsonPatchException, JsonPointerException

    if not isinstance(operations, list) or not all(isinstance(operation, dict) for operation in operations):
        raise _invalid("a JSON Patch is a list of operations")
    try:
        JsonPatch(operations)
    except (InvalidJsonPatch, JsonPointerException, TypeError, AttributeError, KeyError) as error:
        raise _invalid(f"this is no JSON Patch: {error}") from None

    def apply(target: Any) -> Any:
        try:
            return _apply(operations, copy.deepcopy(target))
        except (InvalidData, PatchConflict):
            raise
        except InvalidJsonPatch as error:
            raise _invalid(f"this is no JSON Patch: {error}") from None
        except (JsonPatchException, JsonPointerException) as error:
            said = shortened(re.sub(r"<class '(\w+)'>", r"\1", str(error)))  # it may quote the data
            raise PatchConflict(f"the patch does not apply: {said}", (Fault("", said),)) from None
        except (TypeError, ValueError, LookupError, AttributeError) as error:
            # jsonpatch leaves some misuse to Python: an index on a scalar, for one
            raise PatchConflict(
                "the patch names a place that the data does not have", (Fault("", str(error)),)
            ) from None

    return apply


def _apply(operations: list[dict[str, Any]], target: Any) -> Any:
    """One operation after the other, so that what is copied can be counted: each copy may double the document."""
    from jsonpatch import JsonPatch, JsonPatchTestFailed
    from jsonpointer import JsonPointer

    left = MAX_COPIED
    for operation in operations:
        if operation["op"] == "copy":
            left -= len(canonical_json(JsonPointer(operation["from"]).resolve(target)))
            if left < 0:
                raise _invalid(f"the patch copies more than {MAX_COPIED} bytes")
        try:
            target = JsonPatch([operation]).apply(target, in_place=True)
        except JsonPatchTestFailed:
            raise _test_failed(operation, target) from None
    return target


def _test_failed(operation: dict[str, Any], target: Any) -> PatchConflict:
    """What stands there in place of what was tested."""
    from jsonpointer import JsonPointer, JsonPointerException

    path = operation["path"]
    try:
        found = f"the value at {path!r} is {_quoted(JsonPointer(path).resolve(target))}"
    except JsonPointerException:
        found = f"there is nothing at {path!r}"
    said = f"{found}; the test expects {_quoted(operation['value'])}"
    return PatchConflict(f"the patch does not apply: {said}", (Fault("", said),))


def _quoted(value: Any) -> str:
    text = canonical_json(value).decode()
    return text if len(text) <= MAX_QUOTED else f"{text[:MAX_QUOTED]}..."


def diff(old: Any, new: Any) -> list[dict[str, Any]]:
    """What leads from one JSON tree to another, as JSON Patch."""
    from jsonpatch import make_patch

    try:
        operations: list[dict[str, Any]] = make_patch(old, new).patch
    except RecursionError:
        raise InvalidQuery("the revisions are nested too deeply to be compared") from None
    return operations


def _invalid(detail: str) -> InvalidData:
    return InvalidData(detail, (Fault("", detail),))
