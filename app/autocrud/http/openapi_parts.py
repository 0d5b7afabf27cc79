"""The parts of the OpenAPI document that all models share: schemas, parameters, headers and error responses."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from ..query import MAX_LIMIT
from ..resource_manager.basic import ResourceMeta, RevisionInfo
from .options import ID_PATTERN, KEY_PATTERN, MAX_REVISION
from .resource import SwitchBody
from .searching import DEFAULT_LIMIT
from .value_schemas import REF, Schema

CURSOR: Schema = {"anyOf": [{"type": "string"}, {"type": "null"}]}
ERRORS = {
    400: "The query string or a condition is invalid",
    401: "The request has no valid credentials",
    403: "The caller may not do this",
    404: "There is no such resource, revision or route",
    409: "The state of the resource, or a unique value of another resource, conflicts with the request",
    410: "The resource is deleted",
    412: "The resource is not in the expected state",
    413: "The body, a file, or the indexed part of the data is too large",
    415: "The content type is not accepted",
    416: "None of the ranges lies in the content, or there are too many of them",
    422: "The body is invalid for the model, or refers to a file that does not exist",
    428: "If-Match is required",
    429: "The caller has too many uploads in progress",
    500: "The server failed",
    503: "The store is unavailable, stored data is damaged, or the outcome is unknown",
}
ETAG = {
    "ETag": {
        "schema": {"type": "string"},
        "description": "identifies the state of the resource, for If-Match and If-None-Match",
    }
}


def ref(name: str) -> Schema:
    """Return a reference to a schema."""
    return {"$ref": REF.format(name=name)}


def closed(properties: Mapping[str, Schema], required: list[str] | None = None) -> Schema:
    """Return the schema of an object without other properties. By default, all properties are required."""
    return {
        "type": "object",
        "properties": dict(properties),
        "required": list(properties) if required is None else required,
        "additionalProperties": False,
    }


def close(schemas: dict[str, Schema]) -> dict[str, Schema]:
    """Correct the schemas of msgspec, in place.

    The schemas of msgspec lack three facts: unknown fields are refused at every depth, a set in a request may repeat an
    element, and a decimal may be a number.
    """
    for schema in schemas.values():
        if "properties" in schema:
            schema.setdefault("additionalProperties", False)
        _correct(schema)
    return schemas


def _correct(schema: Any) -> None:
    if isinstance(schema, list):
        for part in schema:
            _correct(part)
    if isinstance(schema, dict):
        if schema.get("type") == "array":
            schema.pop("uniqueItems", None)
        if schema.get("format") == "decimal" and schema.get("type") == "string":
            schema["type"] = ["string", "number"]
        for part in schema.values():
            _correct(part)


def json_content(
    schema: Schema, description: str, headers: Schema | None = None, media: str = "application/json"
) -> Schema:
    """Return a response with a body."""
    response: Schema = {"description": description, "content": {media: {"schema": schema}}}
    return response | ({"headers": headers} if headers else {})


def responses_of(good: Mapping[int, Schema], *errors: int) -> Schema:
    """Return the responses of an operation: the good ones, and a problem for each error status."""
    problem = {"application/problem+json": {"schema": ref("Problem")}}
    return {str(status): response for status, response in good.items()} | {
        str(status): {"description": ERRORS[status], "content": problem} for status in errors
    }


def query_parameter(name: str, schema: Schema, description: str = "", **more: Any) -> Schema:
    """Return an optional parameter of the query string."""
    parameter = {"name": name, "in": "query", "required": False, "schema": schema, **more}
    return parameter | ({"description": description} if description else {})


def header_parameter(name: str, description: str) -> Schema:
    """Return an optional header."""
    return {"name": name, "in": "header", "required": False, "schema": {"type": "string"}, "description": description}


def array(items: Schema, **more: Any) -> Schema:
    """Return the schema of a list that is not empty."""
    return {"type": "array", "items": items, "minItems": 1, **more}


REVISION: Schema = {"type": "integer", "minimum": 1, "maximum": MAX_REVISION}
BOOL: Schema = {"type": "boolean", "default": False}
INCLUDE_DELETED = query_parameter("include_deleted", BOOL, "show deleted resources too")
FIND_DELETED = query_parameter(
    "include_deleted", {"type": "boolean"}, "find deleted resources too; default: only if a filter uses meta.is_deleted"
)
STATUS = query_parameter(
    "status", {"type": "string", "enum": ["draft", "stable"], "default": "stable"}, "the status of the new revision"
)
MODE = query_parameter(
    "mode", {"type": "string", "enum": ["update", "modify"], "default": "update"}, "modify: edit the draft in place"
)
IF_MATCH = header_parameter("If-Match", "the ETag of the state to change, or *")
KEY = header_parameter(
    "Idempotency-Key", "identifies the request, so that a repeated request changes nothing and gets the first response"
)
KEY["schema"] = {"type": "string", "pattern": f"^{KEY_PATTERN}$", "minLength": 1, "maxLength": 255}
IF_NONE_MATCH = header_parameter("If-None-Match", "ETags of states that the client has")
CREATE_ONLY = header_parameter("If-None-Match", "`*`: create a resource with this id, unless it exists")
LIMIT = query_parameter("limit", {"type": "integer", "minimum": 1, "maximum": MAX_LIMIT, "default": DEFAULT_LIMIT})
CURSOR_PARAMETER = query_parameter("cursor", {"type": "string"}, "the next_cursor of the previous page")
LIST: Schema = {"style": "form", "explode": False}
ID = {
    "name": "id",
    "in": "path",
    "required": True,
    "schema": {"type": "string", "pattern": f"^{ID_PATTERN}$", "minLength": 1, "maxLength": 128},
}


def shared_schemas() -> dict[str, Schema]:
    """Return the schemas that all models share."""
    _, schemas = msgspec.json.schema_components([ResourceMeta, RevisionInfo, SwitchBody], ref_template=REF)
    del schemas["RevisionInfo"]["properties"]["blobs"]  # history.encode_record leaves it out
    schemas["SwitchBody"]["properties"]["revision"] |= {"minimum": 1, "maximum": MAX_REVISION}
    schemas["Problem"] = closed(
        {
            "type": {"type": "string", "examples": ["urn:crudstack:not-found"]},
            "title": {"type": "string"},
            "status": {"type": "integer"},
            "detail": {"type": "string"},
            "errors": {"type": "array", "items": ref("Fault")},
        },
        required=["type", "title", "status", "detail"],
    )
    schemas["Fault"] = closed({"pointer": {"type": "string"}, "detail": {"type": "string"}})
    schemas["Count"] = closed({"count": {"type": "integer", "minimum": 0}})
    schemas["Purged"] = closed({"erased_by": {"type": "string", "format": "date-time"}})
    schemas["JsonPatchOperation"] = closed(
        {
            "op": {"type": "string", "enum": ["add", "remove", "replace", "move", "copy", "test"]},
            "path": {"type": "string"},
            "from": {"type": "string"},
            "value": {},
        },
        required=["op", "path"],
    )
    schemas["RevisionPage"] = closed({"items": {"type": "array", "items": ref("RevisionInfo")}, "next_cursor": CURSOR})
    return close(schemas)
