"""The OpenAPI 3.1 description of the API, merged into what FastAPI says of the other routes."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from typing import Any, NamedTuple

import msgspec

from ..query import MAX_LIMIT, META_FIELDS, SET_OPS, STATE_OPS, ops_of
from ..resource_manager.basic import ResourceMeta, RevisionInfo
from ..resource_manager.core import MAX_BATCH, ResourceManager
from . import batches
from .options import ID_PATTERN, KEY_PATTERN, MAX_REVISION
from .patching import JSON_PATCH, MERGE_PATCH
from .resource import SwitchBody
from .searching import DEFAULT_LIMIT
from .value_schemas import REF, Schema, bound, example, value_schema


class Description(NamedTuple):
    managers: Mapping[str, ResourceManager[Any]]
    prefix: str
    authenticated: bool  # whether callers must sign in


def describe(description: Description, own: dict[str, Any]) -> dict[str, Any]:
    """FastAPI's description with the models' paths and schemas in it."""
    merged = copy.deepcopy(own)
    merged["openapi"] = "3.1.0"
    schemas = merged.setdefault("components", {}).setdefault("schemas", {})
    schemas.update(_shared())
    prefix = description.prefix
    paths = {f"{prefix}/healthz": {"get": _healthz()}, f"{prefix}/readyz": {"get": _readyz(description)}}
    if description.authenticated:
        schemes = merged["components"].setdefault("securitySchemes", {})
        schemes["bearer"] = {"type": "http", "scheme": "bearer"}
    for name, manager in description.managers.items():
        model = _Model(name, manager, description)
        schemas.update(model.schemas())
        paths.update({f"{prefix}{path}": item for path, item in model.paths().items()})
    merged.setdefault("paths", {}).update(paths)
    return merged


def ref(name: str) -> Schema:
    return {"$ref": REF.format(name=name)}


def closed(properties: Mapping[str, Schema], required: list[str] | None = None) -> Schema:
    return {
        "type": "object",
        "properties": dict(properties),
        "required": list(properties) if required is None else required,
        "additionalProperties": False,
    }


def _close(schemas: dict[str, Schema]) -> dict[str, Schema]:
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


def _shared() -> dict[str, Schema]:
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
    return _close(schemas)


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


def _healthz() -> Schema:
    answer = closed({"status": {"type": "string", "const": "ok"}})
    return {
        "operationId": "healthz",
        "summary": "Is the process alive",
        "tags": ["service"],
        "responses": _responses({200: _json(answer, "it is")}, 400, 500),
    }


def _signed_in(description: Description, operation: Schema) -> Schema:
    """The operation, and what it takes to be let in."""
    if not description.authenticated:
        return operation
    responses = _responses({}, 401, 403) | operation["responses"]
    return operation | {"security": [{"bearer": []}], "responses": dict(sorted(responses.items()))}


def _readyz(description: Description) -> Schema:
    texts = {"type": "array", "items": {"type": "string"}}
    model = closed({"status": {"type": "string"}, "durable": {"type": "boolean"}, "impairments": texts})
    answer = closed(
        {
            "status": {"type": "string", "enum": ["ready", "unavailable"]},
            "models": {"type": "object", "additionalProperties": model},
            "not_durable": texts,
        }
    )
    operation = {
        "operationId": "readyz",
        "summary": "Do the stores answer, and which would not survive a crash",
        "tags": ["service"],
        "responses": {
            **_responses({200: _json(answer, "they do")}, 400, 500),
            "503": _json(answer, "some do not"),
        },
    }
    return _signed_in(description, operation)


def _json(schema: Schema, description: str, headers: Schema | None = None, media: str = "application/json") -> Schema:
    response: Schema = {"description": description, "content": {media: {"schema": schema}}}
    return response | ({"headers": headers} if headers else {})


def _responses(good: Mapping[int, Schema], *errors: int) -> Schema:
    problem = {"application/problem+json": {"schema": ref("Problem")}}
    return {str(status): response for status, response in good.items()} | {
        str(status): {"description": ERRORS[status], "content": problem} for status in errors
    }


def _query(name: str, schema: Schema, description: str = "", **more: Any) -> Schema:
    parameter = {"name": name, "in": "query", "required": False, "schema": schema, **more}
    return parameter | ({"description": description} if description else {})


def _header(name: str, description: str) -> Schema:
    return {"name": name, "in": "header", "required": False, "schema": {"type": "string"}, "description": description}


REVISION: Schema = {"type": "integer", "minimum": 1, "maximum": MAX_REVISION}
BOOL: Schema = {"type": "boolean", "default": False}
INCLUDE_DELETED = _query("include_deleted", BOOL, "show deleted resources too")
FIND_DELETED = _query(
    "include_deleted", {"type": "boolean"}, "find deleted resources too; default: only if meta.is_deleted is asked for"
)
STATUS = _query("status", {"type": "string", "enum": ["draft", "stable"], "default": "stable"}, "of the new revision")
MODE = _query(
    "mode", {"type": "string", "enum": ["update", "modify"], "default": "update"}, "modify: edit the draft in place"
)
IF_MATCH = _header("If-Match", "the ETag of the state to change, or *")
KEY = _header("Idempotency-Key", "a name of this request, which then happens once: asking again gives the first answer")
KEY["schema"] = {"type": "string", "pattern": f"^{KEY_PATTERN}$", "minLength": 1, "maxLength": 255}
IF_NONE_MATCH = _header("If-None-Match", "ETags of states that the client has")
CREATE_ONLY = _header("If-None-Match", "`*`: create under this id, only if nothing has it")
LIMIT = _query("limit", {"type": "integer", "minimum": 1, "maximum": MAX_LIMIT, "default": DEFAULT_LIMIT})
CURSOR_PARAMETER = _query("cursor", {"type": "string"}, "the next_cursor of the page before")
LIST: Schema = {"style": "form", "explode": False}
ID = {
    "name": "id",
    "in": "path",
    "required": True,
    "schema": {"type": "string", "pattern": f"^{ID_PATTERN}$", "minLength": 1, "maxLength": 128},
}


class _Model:
    """The paths and schemas of one model."""

    def __init__(self, name: str, manager: ResourceManager[Any], description: Description) -> None:
        self._description = description
        self.name, self.codec = name, manager.codec
        self.snake = name.replace("-", "_")
        self.title = "".join(part[:1].upper() + part[1:] for part in self.snake.split("_"))
        (self.schema,), self.components = msgspec.json.schema_components([self.codec.model], ref_template=REF)
        self.component = self.schema["$ref"].rpartition("/")[2]
        self._bound_indexed_fields()

    def schemas(self) -> dict[str, Schema]:
        model, part = self.schema, ref(f"{self.title}Part")
        properties = self.components[self.component]["properties"]
        partial = {"anyOf": [model, part]}
        made = {
            f"{self.title}Part": closed({name: {} for name in properties}, required=[]),
            f"{self.title}Resource": closed({"meta": ref("ResourceMeta"), "data": model}),
            f"{self.title}View": closed({"meta": ref("ResourceMeta"), "data": partial}, required=["meta"]),
            f"{self.title}Revision": closed({"meta": ref("RevisionInfo"), "data": model}),
            f"{self.title}Item": closed(
                {
                    "meta": ref("ResourceMeta"),
                    "data": {"anyOf": [*partial["anyOf"], {"type": "null"}]},
                    "error": ref("Problem"),
                },
                required=["meta"],
            ),
            f"{self.title}Page": closed(
                {"items": {"type": "array", "items": ref(f"{self.title}Item")}, "next_cursor": CURSOR}
            ),
            f"{self.title}Result": closed(
                {"meta": {"anyOf": [ref("ResourceMeta"), {"type": "null"}]}, "data": model}, required=["meta"]
            ),
            f"{self.title}Results": closed({"results": {"type": "array", "items": ref(f"{self.title}Result")}}),
            f"{self.title}MergePatch": {"type": "object", "additionalProperties": True},
        }
        self.components[self.component].setdefault("examples", [self._example()])
        return _close(self.components) | made | self._batch()

    def _batch(self) -> dict[str, Schema]:
        """The operations of a batch, with this model's data in them."""
        _, schemas = msgspec.json.schema_components([batches.Batch], ref_template=REF)
        text = json.dumps(schemas)
        for name in schemas:
            text = text.replace(REF.format(name=name) + '"', REF.format(name=self.title + name) + '"')
        renamed: dict[str, Schema] = {self.title + name: schema for name, schema in json.loads(text).items()}
        for name, schema in renamed.items():
            schema["title"] = name
            if "data" in schema["properties"]:
                schema["properties"]["data"] = self.schema
            if "id" in schema["properties"] and "null" in str(schema["properties"]["id"]):
                schema["properties"]["id"] = {"anyOf": [ID["schema"], {"type": "null"}], "default": None}
            if "revision" in schema["properties"]:
                schema["properties"]["revision"] = REVISION
            if "patch" in schema["properties"]:
                operations = {"type": "array", "items": ref("JsonPatchOperation")}
                schema["properties"]["patch"] = {"anyOf": [ref(f"{self.title}MergePatch"), operations]}
            schema["additionalProperties"] = False
        renamed[f"{self.title}Batch"]["properties"]["operations"] |= {"minItems": 1, "maxItems": MAX_BATCH}
        return renamed

    def paths(self) -> dict[str, Schema]:
        base, one = f"/{self.name}", f"/{self.name}/{{id}}"
        resource, view = ref(f"{self.title}Resource"), ref(f"{self.title}View")
        changed: dict[int, Schema] = {200: _json(resource, "the resource as it is now", ETAG)}
        created: dict[int, Schema] = {
            201: _json(resource, "created", ETAG | {"Location": {"schema": {"type": "string"}}})
        }
        unchanged: dict[int, Schema] = {304: {"description": "the client has this state", "headers": ETAG}}
        create = (400, 409, 410, 413, 422, 500, 503)
        write = (404, 412, 428, *create)
        body = {"required": True, "content": {"application/json": {"schema": self.schema}}}
        reading = [ID, _query("revision", REVISION), self._fields(), INCLUDE_DELETED, IF_NONE_MATCH]
        read = (400, 404, 410, 500, 503)
        patches: Schema = {
            MERGE_PATCH: {"schema": ref(f"{self.title}MergePatch")},
            "application/json": {"schema": ref(f"{self.title}MergePatch")},
            JSON_PATCH: {"schema": {"type": "array", "items": ref("JsonPatchOperation")}},
        }
        switch = {"required": True, "content": {"application/json": {"schema": ref("SwitchBody")}}}
        batch = {"required": True, "content": {"application/json": {"schema": ref(f"{self.title}Batch")}}}
        gone: dict[int, Schema] = {204: {"description": "deleted; restore brings it back", "headers": ETAG}}
        page = {
            200: _json(
                ref(f"{self.title}Page"),
                "a page",
                {"Link": {"schema": {"type": "string"}, "description": "next; left out if it would exceed 4 KB"}},
            )
        }
        return {
            base: {
                "get": self._op("list", [*self._search(), *self._filters()], page, 400, 500, 503),
                "post": self._op("create", [STATUS, KEY], created, 415, *create, body=body),
            },
            f"{base}/count": {
                "get": self._op(
                    "count", [FIND_DELETED, *self._filters()], {200: _json(ref("Count"), "how many")}, 400, 500, 503
                )
            },
            f"{base}/batch": {
                "post": self._op(
                    "batch",
                    [KEY],
                    {200: _json(ref(f"{self.title}Results"), "all were done")},
                    *(415, *write),
                    body=batch,
                )
            },
            one: {
                "get": self._op("get", reading, {200: _json(view, "the resource", ETAG)} | unchanged, *read),
                "put": self._op(
                    "update",
                    [ID, STATUS, MODE, IF_MATCH, CREATE_ONLY, KEY],
                    changed | created,
                    *(415, *write),
                    body=body,
                ),
                "patch": self._op(
                    "patch",
                    [ID, STATUS, MODE, IF_MATCH, KEY],
                    changed,
                    *(415, *write),
                    body={"required": True, "content": patches},
                ),
                "delete": self._op("delete", [ID, IF_MATCH, KEY], gone, *write),
            },
            f"{one}/data": {
                "get": self._op(
                    "get_data_of",
                    reading,
                    {200: _json({"anyOf": [self.schema, ref(f"{self.title}Part")]}, "the bare data", ETAG)} | unchanged,
                    *read,
                )
            },
            f"{one}/publish": {"post": self._op("publish", [ID, IF_MATCH, KEY], changed, *write)},
            f"{one}/switch": {"post": self._op("switch", [ID, IF_MATCH, KEY], changed, 415, *write, body=switch)},
            f"{one}/restore": {"post": self._op("restore", [ID, IF_MATCH, KEY], changed, *write)},
            f"{one}/purge": {
                "post": self._op(
                    "purge",
                    [ID, IF_MATCH, KEY],
                    {202: _json(ref("Purged"), "erased; `erased_by` says when the last trace is gone")},
                    *write,
                )
            },
            f"{one}/revisions": {
                "get": self._op(
                    "list_revisions_of",
                    [ID, LIMIT, CURSOR_PARAMETER, INCLUDE_DELETED],
                    {200: _json(ref("RevisionPage"), "history, newest first")},
                    *read,
                )
            },
            f"{one}/revisions/{{revision}}": {
                "get": self._op(
                    "get_revision_of",
                    [ID, {"name": "revision", "in": "path", "required": True, "schema": REVISION}, INCLUDE_DELETED],
                    {200: _json(ref(f"{self.title}Revision"), "one revision")},
                    *read,
                )
            },
            f"{one}/diff": {
                "get": self._op(
                    "diff",
                    [
                        ID,
                        {"name": "from", "in": "query", "required": True, "schema": REVISION},
                        _query("to", REVISION, "default: the current revision"),
                        INCLUDE_DELETED,
                    ],
                    {200: _json({"type": "array", "items": ref("JsonPatchOperation")}, "JSON Patch", media=JSON_PATCH)},
                    *read,
                )
            },
        }

    def _op(
        self, verb: str, parameters: list[Any], good: Mapping[int, Schema], *errors: int, body: Schema | None = None
    ) -> Schema:
        operation = {
            "operationId": f"{verb}_{self.snake}",
            "summary": f"{verb.replace('_', ' ').capitalize()} {self.name}",
            "tags": [self.name],
            "parameters": parameters,
            "responses": _responses(good, *sorted(set(errors))),
        }
        return _signed_in(self._description, operation | ({"requestBody": body} if body else {}))

    def _search(self) -> list[Schema]:
        sortable = [name for name, kind in self.codec.fields.items() if not kind.is_list]
        keys = [sign + key for key in [*sortable, *(f"meta.{name}" for name in META_FIELDS)] for sign in ("", "-")]
        return [
            _query("sort", _array({"type": "string", "enum": keys}, maxItems=8), "`-` for descending", **LIST),
            LIMIT,
            CURSOR_PARAMETER,
            self._fields(),
            _query("data", {"type": "boolean", "default": True}, "false: metadata only"),
            FIND_DELETED,
        ]

    def _fields(self) -> Schema:
        names = sorted({*self.components[self.component]["properties"], *self.codec.fields})
        return _query("fields", _array({"type": "string", "enum": names}), "only these of the data", **LIST)

    def _filters(self) -> list[Schema]:
        parameters = []
        for name, kind in [*self.codec.fields.items(), *((f"meta.{name}", kind) for name, kind in META_FIELDS.items())]:
            value = value_schema(kind)
            for op in ops_of(kind):
                parameter = name if op == "eq" else f"{name}[{op}]"
                if op in STATE_OPS:
                    parameters.append(_query(parameter, {"type": "boolean"}))
                elif op in SET_OPS:
                    parameters.append(_query(parameter, _array(value), **LIST))
                else:
                    parameters.append(_query(parameter, value))
        return parameters

    def _bound_indexed_fields(self) -> None:
        """Indexed values have bounds that the model does not know: 64 bits, no NUL."""
        properties = self.components[self.component]["properties"]
        for name, kind in self.codec.fields.items():
            if name in properties:
                bound(properties[name], kind)

    def _example(self) -> Any:
        return {
            name: example(schema, self.components)
            for name, schema in self.components[self.component]["properties"].items()
        }


def _array(items: Schema, **more: Any) -> Schema:
    return {"type": "array", "items": items, "minItems": 1, **more}
