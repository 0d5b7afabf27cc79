"""The routes of a resource's history: all revisions, one revision, and the difference between two revisions."""

from __future__ import annotations

import msgspec
from msgspec.structs import replace

from ..resource_manager.basic import Page, RevisionInfo
from ..resource_manager.runtime.threads import heavy
from . import json_diff, patching, problems, searching
from .answers import page_response
from .messages import Request, Response, bad_parameter, parse_integer
from .model_context import ModelContext
from .options import MAX_REVISION, include_deleted_of, known_id
from .searching import read_filter_of

_encode = msgspec.json.Encoder().encode


def encode_record(info: RevisionInfo | None) -> bytes:
    """Return the record of a revision as JSON, without the keys of its blobs. Only stores use the keys."""
    return _encode(replace(info, blobs=()) if info is not None and info.blobs else info)


class HistoryRoutes:
    """The handlers of `/{model}/{id}/revisions`, `/{model}/{id}/revisions/{n}` and `/{model}/{id}/diff`."""

    def __init__(self, context: ModelContext) -> None:
        self._context, self._manager = context, context.manager

    async def revisions(self, request: Request) -> Response:
        """Handle `GET /{model}/{id}/revisions`."""
        options = request.options("limit", "cursor", "include_deleted")
        resource_id = known_id(request.rest[0])
        limit = parse_integer("limit", options["limit"], 1, 200) if "limit" in options else searching.DEFAULT_LIMIT
        scope = searching.revisions_scope(self._manager.name, resource_id)
        before = None
        if "cursor" in options:
            (key,) = searching.decode_cursor(options["cursor"], scope, 1)
            if not isinstance(key, int):
                raise bad_parameter("cursor", "expected the next_cursor of an answer")
            before = key
        page: Page[RevisionInfo] = await self._manager.revisions(
            resource_id,
            before=before,
            limit=limit,
            include_deleted=include_deleted_of(options),
            read_filter=read_filter_of(request.caller),
        )
        cursor = None if page.next is None else searching.encode_cursor((page.next,), scope)
        return page_response(request, [encode_record(info) for info in page.items], cursor)

    async def get_revision(self, request: Request) -> Response:
        """Handle `GET /{model}/{id}/revisions/{n}`."""
        options = request.options("include_deleted")
        resource_id, number = known_id(request.rest[0]), request.rest[2]
        if not (number.isascii() and number.isdigit() and len(number) < 11 and 1 <= int(number) <= MAX_REVISION):
            raise problems.NoSuchRoute(f"there is nothing at {request.path}")
        include_deleted = include_deleted_of(options)
        resource = await self._manager.get(
            resource_id,
            revision=int(number),
            include_deleted=include_deleted,
            read_filter=read_filter_of(request.caller),
        )
        return Response(200, b'{"meta":%b,"data":%b}' % (encode_record(resource.info), resource.json))

    async def diff(self, request: Request) -> Response:
        """Handle `GET /{model}/{id}/diff`."""
        options = request.options("from", "to", "include_deleted")
        resource_id = known_id(request.rest[0])
        if "from" not in options:
            raise bad_parameter("from", "expected the number of a revision; `to` defaults to the current one")
        include_deleted = include_deleted_of(options)
        bodies = []
        for name in ("from", "to"):
            revision = parse_integer(name, options[name], 1, MAX_REVISION) if name in options else None
            found = await self._manager.get(
                resource_id,
                revision=revision,
                include_deleted=include_deleted,
                read_filter=read_filter_of(request.caller),
            )
            bodies.append(found.json)
        old, new = bodies
        patch = await heavy(len(old) + len(new), lambda: _encode(json_diff.diff(old, new)), old, new)
        return Response(200, patch, (), patching.JSON_PATCH.encode())
