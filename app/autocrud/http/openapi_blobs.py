"""The part of the OpenAPI document for the routes of files."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..resource_manager.model.blob import OCTET_STREAM, Blob
from .blobs import INLINE
from .openapi_direct import REDIRECT, redirects
from .openapi_parts import (
    ID,
    IF_MATCH,
    IF_NONE_MATCH,
    INCLUDE_DELETED,
    REVISION,
    closed,
    header_parameter,
    json_content,
    query_parameter,
    ref,
)
from .value_schemas import Schema

BINARY: Schema = {"type": "string", "format": "binary"}
TEXT: Schema = {"schema": {"type": "string"}}
SHA256 = {
    "name": "sha256",
    "in": "path",
    "required": True,
    "schema": {"type": "string", "pattern": "^[0-9a-f]{64}$", "minLength": 64, "maxLength": 64},
}
DISPOSITION = header_parameter("Content-Disposition", 'the file name, as in `attachment; filename="sun.png"`')
DIGEST = header_parameter("Content-Digest", "the SHA-256 of the body, as in `sha-256=:BASE64:`, to compare it with")
RANGE = header_parameter("Range", "at most 16 ranges of bytes, as in `bytes=0-999`")
IF_RANGE = header_parameter("If-Range", "the ETag for which the range is meant; with another one, the whole is sent")
HEADERS: Schema = {
    "ETag": TEXT | {"description": "the SHA-256 of the content"},
    "Accept-Ranges": TEXT,
    "Content-Disposition": TEXT,
}


def blob_paths(base: str, operation: Callable[..., Schema], *, direct: bool) -> dict[str, Schema]:
    """Return the paths of the files of a model.

    base       the path of the model
    operation  describes one operation: see `openapi`
    direct     whether downloads are redirected to the object storage
    """
    form = closed({"file": BINARY})
    body = {
        "required": True,
        "description": "the bytes of the file, or a form with exactly one file",
        "content": {OCTET_STREAM: {"schema": BINARY}, "multipart/form-data": {"schema": form}},
    }
    reference = {201: json_content(ref(Blob.__name__), "the reference, for the data of a resource")}
    content: Schema = {media: {"schema": BINARY} for media in (OCTET_STREAM, *sorted(INLINE))}
    whole: dict[int, Schema] = {
        200: {"description": "the content", "content": content, "headers": HEADERS},
        206: {
            "description": "the ranges that were asked for",
            "content": content | {"multipart/byteranges": {"schema": BINARY}},
            "headers": HEADERS | {"Content-Range": TEXT},
        },
        304: {"description": "the client has this content", "headers": {"ETag": TEXT}},
    }
    reading: list[Any] = [ID, SHA256, query_parameter("revision", REVISION), INCLUDE_DELETED]
    reading += [IF_MATCH, IF_NONE_MATCH, RANGE, IF_RANGE]
    errors = [400, 404, 410, 412, 416, 500, 503]
    if direct:
        elsewhere = redirects()
        whole[200]["content"] = content | elsewhere[200]["content"]
        whole[303] = elsewhere[303]
        reading.append(REDIRECT)
        errors.append(413)
    return {
        f"{base}/blobs": {
            "post": operation(
                "upload_blob_of", [DISPOSITION, DIGEST], reference, 400, 413, 415, 422, 429, 500, 503, body=body
            )
        },
        f"{base}/{{id}}/blobs/{{sha256}}": {"get": operation("get_blob_of", reading, whole, *errors)},
    }
