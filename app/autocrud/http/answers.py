"""Responses with resources, and pages of resources."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec
from msgspec.structs import replace

from ..resource_manager.basic import MAX_READ, ResourceMeta
from ..resource_manager.core import Resource
from ..resource_manager.model.codec import canonical_json
from ..resource_manager.model.fields import project
from ..resource_manager.runtime.deadline import DEADLINE, operations
from ..resource_manager.runtime.threads import heavy
from . import problems
from .messages import Request, Response
from .problems import ResponseTooLarge

MAX_PAGE = 4 * 1024 * 1024
"""The size of a page, in bytes, after which it ends early, on every server.

A response of AWS Lambda is limited to 6 MB, and base64 adds a third.
"""

MAX_LINK = 4096
"""The largest Link header, in bytes.

A cursor has the values of the sort fields, which may be long, and proxies refuse headers of 8 KB.
"""

_AROUND = len(b'{"meta":,"data":}')
_encode = msgspec.json.Encoder().encode


def how_many_fit(sizes: list[int]) -> int:
    """Return how many items of these sizes, in bytes, fit into a page of MAX_PAGE bytes; at least one."""
    if sum(sizes) + len(sizes) <= MAX_PAGE:
        return len(sizes)
    total = 0
    for at, size in enumerate(sizes):
        total += size + 1
        if total > MAX_PAGE and at:
            return at
    return len(sizes)


def pairs_that_fit(found: Sequence[tuple[bytes, bytes]]) -> int:
    """Return how many pairs of metadata and data fit into a page of MAX_PAGE bytes; at least one."""
    return how_many_fit([len(meta) + len(data) + _AROUND for meta, data in found])


def how_many_in_time(found: Sequence[tuple[bytes, bytes]], parts: int) -> int:
    """Return how many documents can be processed in one of `parts` equal parts of the remaining time; at least one.

    Returns all if the request has no deadline.
    """
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
    """Return the ETag header of a resource."""
    return b"etag", meta.etag.encode()


def envelope(meta: bytes, data: bytes) -> bytes:
    """Return the JSON object of encoded metadata and data."""
    return b'{"meta":%b,"data":%b}' % (meta, data)


def resource_response(resource: Resource[Any], status: int, headers: tuple[tuple[bytes, bytes], ...] = ()) -> Response:
    """Return the response for one resource. The ETag is that of the resource, also if an older revision is shown."""
    meta, info = resource.meta, resource.info
    if info is not None:  # show the metadata of this revision; the ETag remains that of the resource
        meta = replace(meta, **info.meta_fields)
    document = _encode(meta)
    return Response(status, envelope(document, resource.json), (etag(meta), *headers), brief=b'{"meta":%b}' % document)


def projected(data: bytes, fields: list[str]) -> bytes:
    """Return these fields of encoded data."""
    return canonical_json(project(msgspec.json.decode(data), fields))


def without_data(meta: bytes, item: bytes) -> bytes:
    """Return an item of a list without its data, for an item that is too large for any response.

    The item has the metadata, and the problem as `error`.
    """
    error = ResponseTooLarge(
        f"this item has {len(item)} bytes, too many for one response;"
        " select fields of it with fields=, here or at the resource"
    )
    return b'{"meta":%b,"data":null,"error":%b}' % (meta, problems.response(error).body)


async def all_projected(found: Sequence[tuple[bytes, bytes]], fields: list[str]) -> list[bytes]:
    """Return the items of a list, with only these fields of their data."""
    size = min(sum(len(data) for _, data in found), MAX_READ)

    def work() -> list[bytes]:
        return [envelope(meta, projected(data, fields)) for meta, data in found]

    return await heavy(size, work, *(data for _, data in found))


def page_response(request: Request, items: list[bytes], cursor: str | None) -> Response:
    """Return the response for a page.

    It has a link to the next page (RFC 8288), unless the link would exceed MAX_LINK bytes.
    """
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
    """Return the response for a batch, with the result of each operation.

    If the results exceed a page, the response leaves out the data.
    """
    shown, brief = [], []
    for result in results:
        if isinstance(result, Resource):
            shown.append(envelope(result.meta_json, result.json))
            brief.append(b'{"meta":%b}' % result.meta_json)
        else:  # a deleted resource, or None for a purged one
            shown.append(b'{"meta":%b}' % _encode(result))
            brief.append(shown[-1])
    briefly = b'{"results":[%b]}' % b",".join(brief)
    if sum(map(len, shown)) > MAX_PAGE:
        return Response(200, briefly)
    return Response(200, b'{"results":[%b]}' % b",".join(shown), brief=briefly)
