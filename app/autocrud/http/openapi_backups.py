"""The part of the OpenAPI document about `/export` and `/import`. It is left out if no model can use them."""

from __future__ import annotations

from collections.abc import Collection

from .backups import ARCHIVE_TYPES, FORMATS, MOST_BYTES
from .openapi_parts import BOOL, json_content, query_parameter, responses_of
from .value_schemas import Schema

_BINARY: Schema = {"type": "string", "format": "binary"}


def paths(models: Collection[str]) -> dict[str, dict[str, Schema]]:
    """Return the paths. `models` are those that only the server can read."""
    if not models:
        return {}
    names = {"type": "array", "items": {"type": "string", "enum": list(models)}}
    model = query_parameter("model", names, "the models; default: all", style="form", explode=True)
    export = {
        "operationId": "export",
        "summary": "Export models that only this server can read, as one archive",
        "tags": ["service"],
        "parameters": [
            model,
            query_parameter("format", {"type": "string", "enum": list(FORMATS), "default": "tar.gz"}),
            query_parameter("per_resource", BOOL, "each resource as at some moment, not all as at the same one"),
        ],
        "responses": responses_of(
            {
                200: {
                    "description": "the archive; if the transfer is cut off, it is not complete",
                    "content": {kind.decode(): {"schema": _BINARY} for kind in FORMATS.values()},
                }
            },
            *(400, 403, 409, 500, 503),
        ),
    }
    import_ = {
        "operationId": "import",
        "summary": "Import an archive into models that only this server can read",
        "tags": ["service"],
        "parameters": [
            model,
            query_parameter(
                "on_conflict",
                {"type": "string", "enum": ["fail", "skip", "replace"], "default": "fail"},
                "if a model has a resource of the archive already: refuse the import, keep it, or replace it",
            ),
            query_parameter("sha256", {"type": "string", "pattern": "^[0-9a-f]{64}$"}, "of the archive"),
            query_parameter(
                "max_bytes",
                {"type": "integer", "minimum": 1, "maximum": MOST_BYTES},
                "of the decompressed archive",
            ),
            query_parameter("check", BOOL, "change nothing: verify the archive, and tell what does not fit the models"),
            query_parameter("resume", BOOL, "continue an import of the same archive that is not finished"),
            query_parameter("abort", BOOL, "take back an import of the same archive that is not finished"),
        ],
        "requestBody": {
            "required": True,
            "content": {kind: {"schema": _BINARY} for kind in ARCHIVE_TYPES},
        },
        "responses": responses_of(
            {200: json_content({"type": "object"}, "what was imported, by model")},
            *(400, 403, 404, 409, 413, 415, 422, 500, 503),
        ),
    }
    return {"/export": {"get": export}, "/import": {"post": import_}}
