"""Files that go straight to the object storage and come straight from it, by presigned URLs.

    POST /{model}/blobs/uploads                 announces a file, and returns the URL to send it to
    POST /{model}/blobs/uploads/{id}/complete   makes what was sent a file, and returns the reference
    GET  /{model}/blobs/uploads/{id}            tells how far that is
    GET  /{model}/{id}/blobs/{sha256}           redirects to a URL of the file: see `redirected`

A model whose files are not on S3 has no such uploads.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Annotated, Any

import msgspec
from msgspec import Meta, Struct

from ..errors import BlobTooLarge, CrudError, InvalidData, Violation
from ..resource_manager.contract.direct import Announced, CompletedUpload, DirectStorage, DirectTransfer
from ..resource_manager.core import ResourceManager
from ..resource_manager.engine.blobs import check_reference
from ..resource_manager.model.blob import OCTET_STREAM, Blob
from . import problems
from .messages import Request, Response, bad_parameter
from .model_context import ModelContext

WAIT_S = 20.0
"""Seconds for which a request to complete an upload waits. After that, the work goes on, and the answer is 202."""
NO_STORE = ((b"cache-control", b"no-store"),)
_encode = msgspec.json.Encoder().encode


ONE_ANSWER = 5 * 1024 * 1024
"""Bytes that are more than AWS Lambda can send in one answer."""


class FileTooLargeToSend(CrudError):
    """The server cannot send so many bytes in one answer."""

    type, title, status = "file-too-large-to-send", "The file is too large to be sent from here", 413


class UploadAnnouncement(Struct, forbid_unknown_fields=True):
    """The body of a request that begins an upload."""

    size: Annotated[int, Meta(ge=0)]
    sha256: str
    content_type: str = OCTET_STREAM
    name: str = ""


_decode = msgspec.json.Decoder(UploadAnnouncement).decode


class DirectBlobRoutes:
    """The handlers of `/{model}/blobs/uploads` and of the paths below."""

    def __init__(self, context: ModelContext) -> None:
        self._context, self._manager = context, context.manager
        self._running: dict[tuple[str, str], asyncio.Task[CompletedUpload]] = {}

    async def begin(self, request: Request) -> Response:
        """Handle `POST /{model}/blobs/uploads`."""
        await self._context.authorize_any(request, "create", "update")
        request.options()
        direct = await self._direct(request)
        try:
            asked = _decode(await request.body("application/json"))
        except msgspec.MsgspecError as error:
            raise InvalidData(f"the upload cannot be begun: {error}", (Violation("", str(error)),)) from None
        check_reference(asked.name, asked.content_type, asked.sha256)
        limits = self._manager.blob_limits
        if asked.size > limits.max_size:
            raise BlobTooLarge(f"expected a file of at most {limits.max_size} bytes, got one of {asked.size} bytes")
        announced = Announced(size=asked.size, sha256=asked.sha256, content_type=asked.content_type, name=asked.name)
        upload = await direct.begin(request.caller.name, announced, quota=limits.quota)
        location = f"{request.path}/{upload.id}"
        body = {
            "id": upload.id,
            "method": "PUT",
            "url": upload.url,
            "headers": upload.headers,
            "expires": upload.expires,
            "complete": f"{location}/complete",
        }
        return Response(201, _encode(body), ((b"location", location.encode("latin-1")), *NO_STORE))

    async def complete(self, request: Request) -> Response:
        """Handle `POST /{model}/blobs/uploads/{id}/complete`. May be repeated."""
        await self._context.authorize_any(request, "create", "update")
        request.options()
        direct = await self._direct(request)
        upload = request.rest[2]
        running = (request.caller.name, upload)
        task = self._running.get(running)
        if task is None or task.get_loop() is not asyncio.get_running_loop():
            task = asyncio.create_task(direct.complete(upload, request.caller.name))
            self._running[running] = task
        done, _ = await asyncio.wait({task}, timeout=WAIT_S)
        if not done:
            location = request.path.removesuffix("/complete").encode("latin-1")
            return Response(202, _encode({"status": "processing"}), ((b"location", location), (b"retry-after", b"2")))
        if self._running.get(running) is task:
            del self._running[running]
        return Response(200, _encode(_reference(task.result())))

    async def status(self, request: Request) -> Response:
        """Handle `GET /{model}/blobs/uploads/{id}`. If the completion has failed, this answers its error once."""
        await self._context.authorize_any(request, "create", "update")
        request.options()
        direct = await self._direct(request)
        running = (request.caller.name, request.rest[2])
        task = self._running.get(running)
        if task is not None and not task.done():
            return Response(200, _encode({"status": "processing"}), NO_STORE)
        if task is not None:
            del self._running[running]
            return Response(200, _encode({"status": "complete", "blob": _reference(task.result())}), NO_STORE)
        found = await direct.completed(request.rest[2], request.caller.name)
        body = {"status": "open"} if found is None else {"status": "complete", "blob": _reference(found)}
        return Response(200, _encode(body), NO_STORE)

    async def _direct(self, request: Request) -> DirectTransfer:
        """Return the direct transfers of the model. Raises NoSuchRoute if it has none."""
        direct = await direct_of(self._manager)
        if direct is None:
            raise problems.NoSuchRoute(
                f"there is nothing at {request.path}: the files of this model are not on S3; send the file itself, with"
                f" POST /{self._manager.name}/blobs"
            )
        return direct


def has_direct(manager: ResourceManager[Any]) -> bool:
    """Return whether a model has direct transfers. Opens no store."""
    storage = manager.storage
    return isinstance(storage, DirectStorage) and storage.direct is not None


async def direct_of(manager: ResourceManager[Any]) -> DirectTransfer | None:
    """Return the direct transfers of a model; None if it has none."""
    storage = manager.storage
    if not isinstance(storage, DirectStorage) or storage.direct is None:
        return None
    await manager.open()
    return storage.direct


async def redirected(
    manager: ResourceManager[Any], key: str, mode: str | None, *, content_type: bytes, disposition: bytes
) -> Response | None:
    """Return the answer that leads to the presigned URL of a file; None if the bytes are to be sent.

    mode          the parameter `redirect`: "url" answers the URL as JSON, for pages that send a token; "false" has the
                  bytes sent
    content_type  signed with the URL, as is the disposition

    Raises InvalidQuery if the parameter has another value, or if there is no URL.
    """
    if mode not in (None, "url", "false"):
        raise bad_parameter("redirect", f"expected url or false, got {mode[:60]!r}")
    direct = None if mode == "false" else await direct_of(manager)
    if direct is None:
        if mode == "url":
            raise bad_parameter("redirect", "the files of this model are not on S3, so they have no URLs of their own")
        return None
    found = await direct.download(
        key, content_type=content_type.decode("latin-1"), disposition=disposition.decode("latin-1")
    )
    if mode == "url":
        return Response(200, _encode({"url": found.url, "expires": found.expires}), NO_STORE)
    return Response(303, b"", ((b"location", found.url.encode()), *NO_STORE))


def check_sendable(size: int, fits: Callable[[bytes], bool]) -> None:
    """Raise FileTooLargeToSend if so many bytes cannot be sent. `fits` tells whether a body can be sent."""
    # Quotes are escaped in text, so these bytes take as much as a file of this size may take, in text and in base64.
    if not fits(b'"' * min(size, ONE_ANSWER)):
        raise FileTooLargeToSend(
            f"the answer would have {size} bytes, too many to be sent from here: leave out redirect=false, or ask for a"
            " range of the file"
        )


def _reference(upload: CompletedUpload) -> Blob:
    announced = upload.announced
    return Blob(sha256=announced.sha256, size=announced.size, content_type=announced.content_type, name=announced.name)
