r"""The operations of `POST /{model}/batch`.

{"operations": [
    {"op": "create", "data": {...}},
    {"op": "patch", "id": "7", "if_match": "\"3-...\"", "patch": {...}}
]}
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import msgspec
from msgspec import Raw, Struct

from ..errors import CrudError, InvalidData, Violation
from ..resource_manager.basic import Status, Version
from ..resource_manager.core import MAX_BATCH
from ..resource_manager.engine.operations import (
    Create,
    Delete,
    Modify,
    Operation,
    Patch,
    Publish,
    Purge,
    Restore,
    Switch,
    Update,
)
from ..resource_manager.model.codec import Codec, ModelData, invalid_data, parse_json
from ..resource_manager.runtime.deadline import operations
from .conditions import parse_version
from .json_patch import MAX_OPERATIONS
from .options import check_revision
from .patching import PatchFunction, json_patch_function, merge_patch
from .problems import PreconditionRequired


class _Operation(Struct, tag_field="op", forbid_unknown_fields=True, kw_only=True):
    pass


class CreateOperation(_Operation, tag="create"):
    """Create a resource. The id is generated if none is given."""

    data: Raw
    id: str | None = None
    status: Status = "stable"


class _OnExisting(_Operation, forbid_unknown_fields=True, kw_only=True):
    id: str
    if_match: str | None = None


class UpdateOperation(_OnExisting, tag="update"):
    """Add a revision with this data."""

    data: Raw
    status: Status = "stable"


class ModifyOperation(_OnExisting, tag="modify"):
    """Replace the data of the current draft."""

    data: Raw


class PatchOperation(_OnExisting, tag="patch"):
    """Apply a patch: a merge patch if it is an object, a JSON Patch if it is a list."""

    patch: dict[str, Any] | list[dict[str, Any]]
    mode: Literal["update", "modify"] = "update"
    status: Status = "stable"


class PublishOperation(_OnExisting, tag="publish"):
    """Make the current draft stable."""


class SwitchOperation(_OnExisting, tag="switch"):
    """Make an earlier revision the current one."""

    revision: int


class DeleteOperation(_OnExisting, tag="delete"):
    """Delete a resource; it can be restored."""


class RestoreOperation(_OnExisting, tag="restore"):
    """Restore a deleted resource."""


class PurgeOperation(_OnExisting, tag="purge"):
    """Erase a resource and its history."""


AnyOperation = (
    CreateOperation
    | UpdateOperation
    | ModifyOperation
    | PatchOperation
    | PublishOperation
    | SwitchOperation
    | DeleteOperation
    | RestoreOperation
    | PurgeOperation
)


class Batch(Struct, forbid_unknown_fields=True):
    """The body of `POST /{model}/batch`."""

    operations: list[AnyOperation]


_decode = msgspec.json.Decoder(Batch).decode


def parse(body: bytes, codec: Codec[Any], check_id: Any, max_body: int, *, require_if_match: bool) -> list[Operation]:
    """Return the operations of a request body. Raises InvalidData, or PreconditionRequired, with the failing operation.

    Args:
        body: The request body.
        codec: Parses the data of the model.
        check_id: A function that raises InvalidData if clients may not choose this id.
        max_body: The largest data that a patch may produce, in bytes.
        require_if_match: Whether each operation on an existing resource must have `if_match`.
    """
    parse_json(body)  # raises InvalidData for duplicate keys
    try:
        batch = _decode(body)
    except msgspec.ValidationError as error:
        raise invalid_data(error) from None
    if not 1 <= len(batch.operations) <= MAX_BATCH:
        detail = f"expected 1 to {MAX_BATCH} operations, got {len(batch.operations)}"
        raise InvalidData(detail, (Violation("/operations", detail),))
    patches = [given.patch for given in batch.operations if isinstance(given, PatchOperation)]
    steps = sum(len(patch) for patch in patches if isinstance(patch, list))
    if steps > MAX_OPERATIONS:
        detail = f"expected at most {MAX_OPERATIONS} operations of JSON Patch in a batch, got {steps}"
        raise InvalidData(detail, (Violation("/operations", detail),))
    # The size of each patch in the body is not known after decoding: each counts as an equal part.
    size, work = len(body) // len(batch.operations), operations(body)
    return [
        _parsed(at, given, codec, check_id, size, work, max_body, require_if_match)
        for at, given in enumerate(batch.operations)
    ]


def _parsed(
    at: int,
    given: AnyOperation,
    codec: Codec[Any],
    check_id: Any,
    size: int,
    work: int,
    max_body: int,
    require_if_match: bool,
) -> Operation:
    try:
        if isinstance(given, CreateOperation):
            if given.id is not None:
                check_id(given.id)
            return Create(_model_data(given.data, codec), given.id, given.status)
        if given.if_match is None and require_if_match:
            raise PreconditionRequired("send the ETag of the state that you want to change as if_match")
        return _on_existing(given, codec, size, work, max_body)
    except CrudError as error:
        raise located(error, at) from None


def _on_existing(given: Any, codec: Codec[Any], size: int, work: int, max_body: int) -> Operation:
    on: dict[str, Any] = {"resource_id": given.id, "expect": _expect(given.if_match)}
    match given:
        case UpdateOperation(data=data, status=status):
            return Update(**on, data=_model_data(data, codec), status=status)
        case ModifyOperation(data=data):
            return Modify(**on, data=_model_data(data, codec))
        case PatchOperation(patch=patch, mode=mode, status=status):
            if mode == "modify" and status != "stable":
                raise InvalidData("modify keeps the status", (Violation("/status", "modify keeps the status"),))
            is_merge = isinstance(patch, dict)
            how = PatchFunction(merge_patch(patch), size, work) if is_merge else json_patch_function(patch, size, work)
            return Patch(
                **on, apply=how.apply, size=how.size, work=how.work, max_bytes=max_body, mode=mode, status=status
            )
        case SwitchOperation(revision=revision):
            check_revision(revision)
            return Switch(**on, revision=revision)
        case PublishOperation():
            return Publish(**on)
        case DeleteOperation():
            return Delete(**on)
        case RestoreOperation():
            return Restore(**on)
        case _:
            assert isinstance(given, PurgeOperation)
            return Purge(**on)


def _model_data(data: Raw, codec: Codec[Any]) -> ModelData[Any]:
    try:
        return codec.parse(bytes(data))
    except InvalidData as error:
        error.violations = in_data(error.violations)
        raise


def in_data(violations: Sequence[Violation]) -> tuple[Violation, ...]:
    """Return violations with pointers into the data, as violations with pointers into the operation."""
    return tuple(Violation(f"/data{violation.pointer}", violation.detail) for violation in violations)


def _expect(etag: str | None) -> Version | None:
    return None if etag is None or etag == "*" else parse_version(etag)


def located(error: CrudError, at: int) -> CrudError:
    """Return the same error, with pointers that start at the body of the batch."""
    violations: Sequence[Violation] = error.violations or (Violation("", error.detail),)
    error.violations = tuple(
        Violation(f"/operations/{at}{violation.pointer}", violation.detail) for violation in violations
    )
    error.detail = f"operation {at}: {error.detail}"
    return error
