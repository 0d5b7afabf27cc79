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
    400: "The query string or a condition means nothing here",
    401: "Sign in first",
    403: "This is not allowed",
    404: "There is no such resource, revision or route",
    409: "The state, or a unique value of another resource, does not allow it",
    410: "The resource is deleted",
    412: "The resource is not in the expected state",
    413: "The body, or what is indexed of it, is too large",
    415: "This content type is not taken here",
    422: "The body does not fit",
    428: "If-Match is required",
    500: "The server failed",
    503: "The store is unavailable, stored data is damaged, or the outcome is unknown",
}
ETAG = {"ETag": {"schema": {"type": "string"}, "description": "the resource's state, for If-Match and If-None-Match"}}


def ref(name: str) -> Schema:
    return {"$ref": REF.format(name=name)}


def closed(properties: Mapping[str, Schema], required: list[str] | None = None) -> Schema:
    return {
        "type": "object",
        "properties": dict(properties),
        "required": list(properties) if required is None else required,
        "additionalProperties": False,
    }


def close(schemas: dict[str, Schema]) -> dict[str, Schema]:
    """What msgspec does not say of its types: unknown fields are refused at every depth, sets take an element twice, and decimals
    may be numbers."""
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
    response: Schema = {"description": description, "content": {media: {"schema": schema}}}
    return response | ({"headers": headers} if headers else {})


def responses_of(good: Mapping[int, Schema], *errors: int) -> Schema:
    problem = {"application/problem+json": {"schema": ref("Problem")}}
    return {str(status): response for status, response in good.items()} | {
        str(status): {"description": ERRORS[status], "content": problem} for status in errors
    }


def query_parameter(name: str, schema: Schema, description: str = "", **more: Any) -> Schema:
    parameter = {"name": name, "in": "query", "required": False, "schema": schema, **more}
    return parameter | ({"description": description} if description else {})


def header_parameter(name: str, description: str) -> Schema:
    return {"name": name, "in": "header", "required": False, "schema": {"type": "string"}, "description": description}


def array(items: Schema, **more: Any) -> Schema:
    return {"type": "array", "items": items, "minItems": 1, **more}


REVISION: Schema = {"type": "integer", "minimum": 1, "maximum": MAX_REVISION}
BOOL: Schema = {"type": "boolean", "default": False}
INCLUDE_DELETED = query_parameter("include_deleted", BOOL, "show deleted resources too")
FIND_DELETED = query_parameter(
    "include_deleted", {"type": "boolean"}, "find deleted resources too; default: only if meta.is_deleted is asked for"
)
STATUS = query_parameter(
    "status", {"type": "string", "enum": ["draft", "stable"], "default": "stable"}, "of the new revision"
)
MODE = query_parameter(
    "mode", {"type": "string", "enum": ["update", "modify"], "default": "update"}, "modify: edit the draft in place"
)
IF_MATCH = header_parameter("If-Match", "the ETag of the state to change, or *")
KEY = header_parameter(
    "Idempotency-Key", "a name of this request, which then happens once: asking again gives the first answer"
)
KEY["schema"] = {"type": "string", "pattern": f"^{KEY_PATTERN}$", "minLength": 1, "maxLength": 255}
IF_NONE_MATCH = header_parameter("If-None-Match", "ETags of states that the client has")
CREATE_ONLY = header_parameter("If-None-Match", "`*`: create under this id, only if nothing has it")
LIMIT = query_parameter("limit", {"type": "integer", "minimum": 1, "maximum": MAX_LIMIT, "default": DEFAULT_LIMIT})
CURSOR_PARAMETER = query_parameter("cursor", {"type": "string"}, "the next_cursor of the page before")
LIST: Schema = {"style": "form", "explode": False}
ID = {
    "name": "id",
    "in": "path",
    "required": True,
    "schema": {"type": "string", "pattern": f"^{ID_PATTERN}$", "minLength": 1, "maxLength": 128},
}


def shared_schemas() -> dict[str, Schema]:
    _, schemas = msgspec.json.schema_components([ResourceMeta, RevisionInfo, SwitchBody], ref_template=REF)
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
