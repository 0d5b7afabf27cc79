"""The part of the OpenAPI document for files that go straight to the object storage. Left out if a model has none."""

from __future__ import annotations

from collections.abc import Callable

import msgspec

from ..resource_manager.model.blob import Blob
from .openapi_parts import closed, json_content, query_parameter, ref
from .value_schemas import REF, Schema

TEXT: Schema = {"type": "string"}
TIME: Schema = {"type": "string", "format": "date-time"}
LOCATION: Schema = {"Location": {"schema": TEXT}}
UPLOAD = {
    "name": "upload_id",
    "in": "path",
    "required": True,
    "schema": {"type": "string", "pattern": "^[0-9a-f]{20}$", "minLength": 20, "maxLength": 20},
}
REDIRECT = query_parameter(
    "redirect",
    {"type": "string", "enum": ["url", "false"]},
    "url: the URL of the file as JSON; false: the bytes; default: a redirect to the URL",
)


def direct_schemas() -> dict[str, Schema]:
    """Return the schemas of the bodies."""
    _, schemas = msgspec.json.schema_components([Blob], ref_template=REF)
    announced = {**schemas[Blob.__name__]["properties"], "size": {"type": "integer", "minimum": 0}}
    return {
        "UploadAnnouncement": closed(announced, required=["size", "sha256"]),
        "DirectUpload": closed(
            {
                "id": TEXT,
                "method": {"type": "string", "enum": ["PUT"]},
                "url": TEXT | {"description": "where to send the file"},
                "headers": {
                    "type": "object",
                    "additionalProperties": TEXT,
                    "description": "headers that the request to the URL must have, besides Content-Length",
                },
                "expires": TIME,
                "complete": TEXT | {"description": "the path for the POST that completes the upload"},
            }
        ),
        "DirectUploadStatus": closed(
            {
                "status": {"type": "string", "enum": ["open", "processing", "complete"]},
                "blob": ref(Blob.__name__),
            },
            required=["status"],
        ),
        "FileUrl": closed({"url": TEXT, "expires": TIME}),
    }


def direct_paths(base: str, operation: Callable[..., Schema]) -> dict[str, Schema]:
    """Return the paths of uploads to the object storage.

    base       the path of the model
    operation  describes one operation: see `openapi`
    """
    announcement = {"required": True, "content": {"application/json": {"schema": ref("UploadAnnouncement")}}}
    begun = {201: json_content(ref("DirectUpload"), "where to send the file", LOCATION)}
    processing = {"status": {"type": "string", "enum": ["processing"]}}
    completed = {
        200: json_content(ref(Blob.__name__), "the reference, for the data of a resource"),
        202: json_content(closed(processing), "it takes longer; ask Location", LOCATION),
    }
    status = {200: json_content(ref("DirectUploadStatus"), "how far the upload is")}
    one = f"{base}/blobs/uploads/{{upload_id}}"
    return {
        f"{base}/blobs/uploads": {
            "post": operation(
                "begin_upload_of", [], begun, *(400, 409, 413, 415, 422, 429, 500, 503), body=announcement
            )
        },
        one: {"get": operation("get_upload_of", [UPLOAD], status, 400, 404, 409, 422, 500, 503)},
        f"{one}/complete": {"post": operation("complete_upload_of", [UPLOAD], completed, 400, 404, 409, 422, 500, 503)},
    }


def redirects() -> dict[int, Schema]:
    """Return the answers to a download, besides those that have the bytes."""
    return {
        200: json_content(ref("FileUrl"), "the URL, with redirect=url"),
        303: {"description": "the URL of the file at the object storage", "headers": LOCATION},
    }
