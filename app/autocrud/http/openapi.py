"""The OpenAPI 3.1 document: the models, merged into the document that FastAPI makes for the other routes."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from typing import Any, NamedTuple

import msgspec

from ..query import META_FIELDS, SET_OPS, STATE_OPS, ops_of
from ..resource_manager.core import MAX_BATCH, ResourceManager
from . import batches, openapi_backups
from .direct_blobs import has_direct
from .openapi_blobs import blob_paths
from .openapi_direct import direct_paths, direct_schemas
from .openapi_parts import (
    CREATE_ONLY,
    CURSOR,
    CURSOR_PARAMETER,
    ETAG,
    FIND_DELETED,
    ID,
    IF_MATCH,
    IF_NONE_MATCH,
    INCLUDE_DELETED,
    KEY,
    LIMIT,
    LIST,
    MODE,
    REVISION,
    STATUS,
    array,
    close,
    closed,
    json_content,
    query_parameter,
    ref,
    responses_of,
    shared_schemas,
)
from .patching import JSON_PATCH, MERGE_PATCH
from .value_schemas import REF, Schema, bound, example, value_schema


class Description(NamedTuple):
    """The models that the document describes.

    Attributes:
        managers: The resource managers, by model name.
        prefix: The path under which the routes are mounted.
        authenticated: Whether requests need a bearer token.
    """

    managers: Mapping[str, ResourceManager[Any]]
    prefix: str
    authenticated: bool


def describe(description: Description, own: dict[str, Any]) -> dict[str, Any]:
    """Return the document of FastAPI, `own`, with the paths and schemas of the models added."""
    merged = copy.deepcopy(own)
    merged["openapi"] = "3.1.0"
    schemas = merged.setdefault("components", {}).setdefault("schemas", {})
    schemas.update(shared_schemas())
    prefix = description.prefix
    paths = {f"{prefix}/healthz": {"get": _healthz()}, f"{prefix}/readyz": {"get": _readyz(description)}}
    if description.authenticated:
        schemes = merged["components"].setdefault("securitySchemes", {})
        schemes["bearer"] = {"type": "http", "scheme": "bearer"}
    for name, manager in description.managers.items():
        model = _Model(name, manager, description)
        schemas.update(model.schemas())
        paths.update({f"{prefix}{path}": item for path, item in model.paths().items()})
    exclusive = [name for name, manager in description.managers.items() if manager.storage.exclusive]
    for path, item in openapi_backups.paths(exclusive).items():
        paths[f"{prefix}{path}"] = {verb: _signed_in(description, operation) for verb, operation in item.items()}
    merged.setdefault("paths", {}).update(paths)
    return merged


def _healthz() -> Schema:
    answer = closed({"status": {"type": "string", "const": "ok"}})
    return {
        "operationId": "healthz",
        "summary": "Check that the process is alive",
        "tags": ["service"],
        "responses": responses_of({200: json_content(answer, "the process is alive")}, 400, 500),
    }


def _signed_in(description: Description, operation: Schema) -> Schema:
    """Return the operation, with its security scheme and the errors 401 and 403 if callers must authenticate."""
    if not description.authenticated:
        return operation
    responses = responses_of({}, 401, 403) | operation["responses"]
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
        "summary": "Check that the stores answer, and list models that would not survive a crash",
        "tags": ["service"],
        "responses": {
            **responses_of({200: json_content(answer, "all stores answer")}, 400, 500),
            "503": json_content(answer, "at least one store does not answer"),
        },
    }
    return _signed_in(description, operation)


class _Model:
    """The paths and schemas of one model."""

    def __init__(self, name: str, manager: ResourceManager[Any], description: Description) -> None:
        self._description = description
        self.name, self.codec = name, manager.codec
        self.snake = name.replace("-", "_")
        self.title = "".join(part[:1].upper() + part[1:] for part in self.snake.split("_"))
        self.is_direct = self.codec.has_blobs and has_direct(manager)
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
        return close(self.components) | made | self._batch() | (direct_schemas() if self.is_direct else {})

    def _batch(self) -> dict[str, Schema]:
        """Return the schemas of a batch, with the data of this model in them."""
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
        changed: dict[int, Schema] = {200: json_content(resource, "the resource as it is now", ETAG)}
        created: dict[int, Schema] = {
            201: json_content(resource, "created", ETAG | {"Location": {"schema": {"type": "string"}}})
        }
        unchanged: dict[int, Schema] = {304: {"description": "the client has this state", "headers": ETAG}}
        create = (400, 409, 410, 413, 422, 500, 503)
        write = (404, 412, 428, *create)
        body = {"required": True, "content": {"application/json": {"schema": self.schema}}}
        reading = [ID, query_parameter("revision", REVISION), self._fields(), INCLUDE_DELETED, IF_NONE_MATCH]
        read = (400, 404, 410, 500, 503)
        patches: Schema = {
            MERGE_PATCH: {"schema": ref(f"{self.title}MergePatch")},
            "application/json": {"schema": ref(f"{self.title}MergePatch")},
            JSON_PATCH: {"schema": {"type": "array", "items": ref("JsonPatchOperation")}},
        }
        switch = {"required": True, "content": {"application/json": {"schema": ref("SwitchBody")}}}
        batch = {"required": True, "content": {"application/json": {"schema": ref(f"{self.title}Batch")}}}
        gone: dict[int, Schema] = {204: {"description": "deleted; it can be restored", "headers": ETAG}}
        page = {
            200: json_content(
                ref(f"{self.title}Page"),
                "a page",
                {"Link": {"schema": {"type": "string"}, "description": "next; left out if it would exceed 4 KB"}},
            )
        }
        blobs = blob_paths(base, self._op, direct=self.is_direct) if self.codec.has_blobs else {}
        return (
            blobs
            | (direct_paths(base, self._op) if self.is_direct else {})
            | {
                base: {
                    "get": self._op("list", [*self._search(), *self._filters()], page, 400, 500, 503),
                    "post": self._op("create", [STATUS, KEY], created, 415, *create, body=body),
                },
                f"{base}/count": {
                    "get": self._op(
                        "count",
                        [FIND_DELETED, *self._filters()],
                        {200: json_content(ref("Count"), "how many")},
                        400,
                        500,
                        503,
                    )
                },
                f"{base}/batch": {
                    "post": self._op(
                        "batch",
                        [KEY],
                        {200: json_content(ref(f"{self.title}Results"), "all operations were committed")},
                        *(415, *write),
                        body=batch,
                    )
                },
                one: {
                    "get": self._op("get", reading, {200: json_content(view, "the resource", ETAG)} | unchanged, *read),
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
                        {200: json_content({"anyOf": [self.schema, ref(f"{self.title}Part")]}, "the bare data", ETAG)}
                        | unchanged,
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
                        {202: json_content(ref("Purged"), "erased; `erased_by` says when the last trace is gone")},
                        *write,
                    )
                },
                f"{one}/revisions": {
                    "get": self._op(
                        "list_revisions_of",
                        [ID, LIMIT, CURSOR_PARAMETER, INCLUDE_DELETED],
                        {200: json_content(ref("RevisionPage"), "history, newest first")},
                        *read,
                    )
                },
                f"{one}/revisions/{{revision}}": {
                    "get": self._op(
                        "get_revision_of",
                        [ID, {"name": "revision", "in": "path", "required": True, "schema": REVISION}, INCLUDE_DELETED],
                        {200: json_content(ref(f"{self.title}Revision"), "one revision")},
                        *read,
                    )
                },
                f"{one}/diff": {
                    "get": self._op(
                        "diff",
                        [
                            ID,
                            {"name": "from", "in": "query", "required": True, "schema": REVISION},
                            query_parameter("to", REVISION, "default: the current revision"),
                            INCLUDE_DELETED,
                        ],
                        {
                            200: json_content(
                                {"type": "array", "items": ref("JsonPatchOperation")}, "JSON Patch", media=JSON_PATCH
                            )
                        },
                        *read,
                    )
                },
            }
        )

    def _op(
        self, verb: str, parameters: list[Any], good: Mapping[int, Schema], *errors: int, body: Schema | None = None
    ) -> Schema:
        operation = {
            "operationId": f"{verb}_{self.snake}",
            "summary": f"{verb.replace('_', ' ').capitalize()} {self.name}",
            "tags": [self.name],
            "parameters": parameters,
            "responses": responses_of(good, *sorted(set(errors))),
        }
        return _signed_in(self._description, operation | ({"requestBody": body} if body else {}))

    def _search(self) -> list[Schema]:
        sortable = [name for name, kind in self.codec.fields.items() if not kind.is_list]
        keys = [sign + key for key in [*sortable, *(f"meta.{name}" for name in META_FIELDS)] for sign in ("", "-")]
        return [
            query_parameter("sort", array({"type": "string", "enum": keys}, maxItems=8), "`-` for descending", **LIST),
            LIMIT,
            CURSOR_PARAMETER,
            self._fields(),
            query_parameter("data", {"type": "boolean", "default": True}, "false: metadata only"),
            FIND_DELETED,
        ]

    def _fields(self) -> Schema:
        names = sorted({*self.components[self.component]["properties"], *self.codec.fields})
        return query_parameter(
            "fields", array({"type": "string", "enum": names}), "return only these fields of the data", **LIST
        )

    def _filters(self) -> list[Schema]:
        parameters = []
        for name, kind in [*self.codec.fields.items(), *((f"meta.{name}", kind) for name, kind in META_FIELDS.items())]:
            value = value_schema(kind)
            for op in ops_of(kind):
                parameter = name if op == "eq" else f"{name}[{op}]"
                if op in STATE_OPS:
                    parameters.append(query_parameter(parameter, {"type": "boolean"}))
                elif op in SET_OPS:
                    parameters.append(query_parameter(parameter, array(value), **LIST))
                else:
                    parameters.append(query_parameter(parameter, value))
        return parameters

    def _bound_indexed_fields(self) -> None:
        """Add the bounds of indexed values, which the model does not have: 64 bits, no NUL."""
        properties = self.components[self.component]["properties"]
        for name, kind in self.codec.fields.items():
            if name in properties:
                bound(properties[name], kind)

    def _example(self) -> Any:
        return {
            name: example(schema, self.components)
            for name, schema in self.components[self.component]["properties"].items()
        }
