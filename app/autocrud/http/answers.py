"""What answers are made of: a resource, a page."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec
from msgspec.structs import replace

from ..resource_manager.basic import MAX_READ, ResourceMeta
from ..resource_manager.core import Resource
from ..resource_manager.model.codec import canonical_json, project
from ..resource_manager.runtime.deadline import DEADLINE, operations
from ..resource_manager.runtime.threads import heavy
from . import problems
from .messages import Request, Response
from .problems import ResponseTooLarge

MAX_PAGE = 4 * 1024 * 1024
"""Bytes after which a page ends early, everywhere: an answer of AWS Lambda ends at 6 MB, and base64 takes a third more."""

MAX_LINK = 4096
"""Bytes of a Link header: a cursor carries the values that a list is sorted by, which may be long, and proxies refuse headers of 8 KB."""

_AROUND = len(b'{"meta":,"data":}')
_encode = msgspec.json.Encoder().encode


def how_many_fit(sizes: list[int]) -> int:
    """How many items of so many bytes make a page of MAX_PAGE bytes; at least one."""
    if sum(sizes) + len(sizes) <= MAX_PAGE:
        return len(sizes)
    total = 0
    for at, size in enumerate(sizes):
        total += size + 1
        if total > MAX_PAGE and at:
            return at
    return len(sizes)


def pairs_that_fit(found: Sequence[tuple[bytes, bytes]]) -> int:
    """How many pairs of metadata and data do."""
    return how_many_fit([len(meta) + len(data) + _AROUND for meta, data in found])


def how_many_in_time(found: Sequence[tuple[bytes, bytes]], parts: int) -> int:
    """Return how many documents can be worked on in a part of the time that is left, at least one; all if there is no deadline."""
    deadline = DEADLINE.get()
    if deadline is None:
        return len(found)
    left = deadline.affordable() // parts
    for at, (_, data) in enumerate(found):
        left -= operations(data)
        if left < 0:
            return max(1, at)
    return len(found)


def etag(meta: ResourceMeta) -> tuple[bytes, bytes]:
    return b"etag", meta.etag.encode()


def envelope(meta: bytes, data: bytes) -> bytes:
    return b'{"meta":%b,"data":%b}' % (meta, data)


def resource_response(resource: Resource[Any], status: int, headers: tuple[tuple[bytes, bytes], ...] = ()) -> Response:
    meta, info = resource.meta, resource.info
    if info is not None:  # the metadata tells of the revision that is shown; the ETag stays the resource's
        meta = replace(
            meta,
            revision=info.revision,
            uid=info.uid,
            status=info.status,
            data_hash=info.data_hash,
            encoding=info.encoding,
            schema_version=info.schema_version,
        )
    document = _encode(meta)
    return Response(status, envelope(document, resource.json), (etag(meta), *headers), brief=b'{"meta":%b}' % document)


def projected(data: bytes, fields: list[str]) -> bytes:
    return canonical_json(project(msgspec.json.decode(data), fields))


def without_data(meta: bytes, item: bytes) -> bytes:
    """Return an item of a list in place of one that no answer can hold: its metadata, and the problem."""
    error = ResponseTooLarge(
        f"this item has {len(item)} bytes, too many for one answer; ask for less of it by fields=, here or at the resource"
    )
    return b'{"meta":%b,"data":null,"error":%b}' % (meta, problems.response(error).body)


async def all_projected(found: Sequence[tuple[bytes, bytes]], fields: list[str]) -> list[bytes]:
    """Return the items of a list with these fields of their data."""
    size = min(sum(len(data) for _, data in found), MAX_READ)

    def work() -> list[bytes]:
        return [envelope(meta, projected(data, fields)) for meta, data in found]

    return await heavy(size, work, *(data for _, data in found))


def page_response(request: Request, items: list[bytes], cursor: str | None) -> Response:
    """A page, and the link to the next one (RFC 8288) unless that would be too long."""
    body = b'{"items":[%b],"next_cursor":%b}' % (
        b",".join(items),
        b"null" if cursor is None else b'"%b"' % cursor.encode(),
    )
    if cursor is None:
        return Response(200, body)
    kept = [part for part in request.scope["query_string"].split(b"&") if part and not part.startswith(b"cursor=")]
    query = b"&".join([*kept, b"cursor=" + cursor.encode()])
    link = b'<%b?%b>; rel="next"' % (request.path.encode("latin-1"), query)
    return Response(200, body, ((b"link", link),) if len(link) <= MAX_LINK else ())


def batch_response(results: Sequence[Resource[Any] | ResourceMeta | None]) -> Response:
    """What each operation left, in full or, where that would be more than a page, without the data."""
    shown, brief = [], []
    for result in results:
        if isinstance(result, Resource):
            shown.append(envelope(result.meta_json, result.json))
            brief.append(b'{"meta":%b}' % result.meta_json)
        else:  # deleted, or purged, of which nothing is told
            shown.append(b'{"meta":%b}' % _encode(result))
            brief.append(shown[-1])
    briefly = b'{"results":[%b]}' % b",".join(brief)
    if sum(map(len, shown)) > MAX_PAGE:
        return Response(200, briefly)
    return Response(200, b'{"results":[%b]}' % b",".join(shown), brief=briefly)
