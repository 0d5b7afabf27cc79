"""The routes of files: `POST /{model}/blobs` receives one, `GET /{model}/{id}/blobs/{sha256}` sends one."""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable

import msgspec

from ..errors import BlobTooLarge, DigestMismatch
from ..resource_manager.core import StoredBlob
from ..resource_manager.engine.blobs import check_reference
from ..resource_manager.model.blob import OCTET_STREAM, Blob, is_sha256
from ..resource_manager.runtime.threads import TURN
from . import conditions, multipart, problems
from .direct_blobs import check_sendable, redirected
from .header_values import announced_sha256, disposition, file_name, with_parameters
from .messages import Request, Response, UnsupportedMediaType, parse_integer
from .model_context import ModelContext
from .options import MAX_REVISION, include_deleted_of, known_id
from .ranges import RangeNotSatisfiable, parse_ranges
from .searching import read_filter_of
from .streaming import StreamedResponse
from .transfers import Transfer, transfers

INLINE = frozenset(
    {
        *("image/png", "image/jpeg", "image/gif", "image/webp", "image/avif", "image/bmp"),
        *("video/mp4", "video/webm", "video/ogg", "video/quicktime"),
        *("audio/mpeg", "audio/mp4", "audio/aac", "audio/ogg", "audio/webm", "audio/wav", "audio/flac"),
        "text/plain",
    }
)
"""Content types that browsers may show. They run no scripts. All other files are downloads without a type.

SVG images and PDF documents may have scripts, so they are not in it.
"""
SAFE_HEADERS = (
    (b"x-content-type-options", b"nosniff"),
    (b"content-security-policy", b"sandbox; default-src 'none'"),
)
CACHING = (
    (b"cache-control", b"private, immutable, max-age=31536000"),
    (b"vary", b"authorization"),  # in one browser, one caller may follow another
)
_encode = msgspec.json.Encoder().encode


class BlobRoutes:
    """The handlers of `/{model}/blobs` and `/{model}/{id}/blobs/{sha256}`."""

    def __init__(self, context: ModelContext) -> None:
        self._context, self._manager = context, context.manager

    # Upload

    async def upload(self, request: Request) -> Response:
        """Handle `POST /{model}/blobs`: the bytes of a file, or multipart/form-data with exactly one file."""
        await self._context.authorize_any(request, "create", "update")
        request.options()
        coding = request.header(b"content-encoding")
        if coding is not None and coding.strip().lower() != "identity":
            raise UnsupportedMediaType(f"expected a body without Content-Encoding, got {coding[:60]!r}")
        given = request.header(b"content-type") or OCTET_STREAM
        in_form = given.partition(";")[0].strip().lower() == "multipart/form-data"
        self._check_length(request, multipart.OVERHEAD if in_form else 0)
        if (turn := TURN.get()) is not None:
            turn.leave()  # for good: `transfers` limits uploads
        async with transfers().uploads.one(request.caller.name) as transfer:
            blob = await (self._upload_form if in_form else self._upload_raw)(request, given, transfer)
        return Response(201, _encode(blob))

    def _check_length(self, request: Request, overhead: int) -> None:
        """Raise BlobTooLarge, before the body is received, if it has more bytes than a file may have."""
        length, most = request.header(b"content-length"), self._manager.blob_limits.max_size
        if length is not None and length.isdecimal() and int(length) > most + overhead:
            raise BlobTooLarge(f"expected a file of at most {most} bytes, got a body of {length} bytes")

    async def _upload_raw(self, request: Request, content_type: str, transfer: Transfer) -> Blob:
        _, parameters = with_parameters("Content-Disposition", request.header(b"content-disposition") or "attachment")
        name = file_name("Content-Disposition", parameters) or ""
        return await self._manager.upload(
            request.stream(transfer.waits),
            name=name,
            content_type=content_type,
            sha256=announced_sha256(request),
            by=request.caller,
        )

    async def _upload_form(self, request: Request, content_type: str, transfer: Transfer) -> Blob:
        chunks = request.stream(transfer.waits)
        announced = announced_sha256(request)
        if announced is not None:  # it covers the whole body, with the boundaries
            chunks = _verified(chunks, announced)
        part = await multipart.file_part(content_type, chunks)
        check_reference(part.name, part.content_type, part.sha256)
        return await self._manager.upload(
            part.content, name=part.name, content_type=part.content_type, sha256=part.sha256, by=request.caller
        )

    # Download

    async def download(self, request: Request) -> Response | StreamedResponse:
        """Handle `GET /{model}/{id}/blobs/{sha256}`."""
        options = request.options("revision", "include_deleted", "redirect")
        resource_id, sha256 = known_id(request.rest[0]), request.rest[2]
        if not is_sha256(sha256):
            raise problems.NoSuchRoute(f"there is nothing at {request.path}")
        revision = parse_integer("revision", options["revision"], 1, MAX_REVISION) if "revision" in options else None
        include_deleted = include_deleted_of(options)

        async def find() -> StoredBlob:
            return await self._manager.blob(
                resource_id,
                sha256,
                revision=revision,
                include_deleted=include_deleted,
                read_filter=read_filter_of(request.caller),
            )

        stored = await find()
        tag = f'"{sha256}"'
        headers = ((b"etag", tag.encode()), *CACHING)
        conditions.check_match(request, tag)
        if conditions.not_modified(request, tag):
            return Response(304, b"", headers)
        described, mode = _described(stored.blob), options.get("redirect")
        if request.scope["method"] == "GET":
            elsewhere = await redirected(
                self._manager, stored.key, mode, content_type=_type_of(stored.blob), disposition=described[0][1]
            )
            if elsewhere is not None:
                return elsewhere
        response = _streamed(request, stored, (*headers, *described), tag, find)
        if isinstance(response, StreamedResponse) and request.scope["method"] == "GET":
            check_sendable(response.length, self._context.policy.fits)
        return response


async def _verified(chunks: AsyncIterator[bytes], expected: str) -> AsyncIterator[bytes]:
    """Yield chunks, and raise DigestMismatch at their end if their SHA-256 is not the expected one."""
    digest = hashlib.sha256()
    async for chunk in chunks:
        digest.update(chunk)
        yield chunk
    if digest.hexdigest() != expected:
        raise DigestMismatch(
            f"expected a body with the SHA-256 {expected}, got {digest.hexdigest()}; nothing was stored, send it again"
        )


def _described(blob: Blob) -> tuple[tuple[bytes, bytes], ...]:
    """Return the headers that say how a browser handles a file."""
    shown = blob.content_type.partition(";")[0].strip().lower() in INLINE
    return (
        (b"content-disposition", disposition("inline" if shown else "attachment", blob.name)),
        (b"accept-ranges", b"bytes"),
        *SAFE_HEADERS,
    )


def _type_of(blob: Blob) -> bytes:
    media = blob.content_type.partition(";")[0].strip().lower()
    return blob.content_type.encode() if media in INLINE else OCTET_STREAM.encode()


def _streamed(
    request: Request,
    stored: StoredBlob,
    headers: tuple[tuple[bytes, bytes], ...],
    tag: str,
    find: Callable[[], Awaitable[object]],
) -> Response | StreamedResponse:
    """Return the response with the content, or with the ranges of it that the request asks for."""
    size, media, ranges = stored.blob.size, _type_of(stored.blob), None
    if request.scope["method"] == "GET" and request.header(b"if-range") in (None, tag):
        try:
            ranges = parse_ranges(request.header(b"range"), size)
        except RangeNotSatisfiable as error:
            return problems.response(error, ((b"content-range", b"bytes */%d" % size),))
    of_type = (b"content-type", media)
    if ranges is None:
        return StreamedResponse(request, 200, (*headers, of_type), size, stored.read, find)
    if len(ranges) == 1:
        ((start, end),) = ranges
        located = (b"content-range", _content_range(start, end, size))
        return StreamedResponse(
            request, 206, (*headers, of_type, located), end - start, lambda: stored.read(start, end), find
        )
    boundary = secrets.token_hex(16).encode()
    heads = [
        b"\r\n--%b\r\ncontent-type: %b\r\ncontent-range: %b\r\n\r\n"
        % (boundary, media, _content_range(start, end, size))
        for start, end in ranges
    ]
    tail = b"\r\n--%b--\r\n" % boundary
    length = sum(map(len, heads)) + sum(end - start for start, end in ranges) + len(tail)

    async def parts() -> AsyncIterator[bytes]:
        for head, (start, end) in zip(heads, ranges, strict=True):
            yield head
            async for chunk in stored.read(start, end):
                yield chunk
        yield tail

    of_type = (b"content-type", b"multipart/byteranges; boundary=%b" % boundary)
    return StreamedResponse(request, 206, (*headers, of_type), length, parts, find)


def _content_range(start: int, end: int, size: int) -> bytes:
    return b"bytes %d-%d/%d" % (start, end - 1, size)
