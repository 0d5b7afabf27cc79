"""The routes of one resource: read, write, publish, switch, restore and purge."""

from __future__ import annotations

from typing import Any, Literal

import msgspec
from msgspec import Struct

from ..resource_manager.core import Resource
from ..resource_manager.model.codec import invalid_data, parse_json
from ..resource_manager.runtime.threads import heavy
from . import conditions, patching, searching
from .answers import etag, projected, resource_response
from .messages import BodyTooLarge, Request, Response, bad_parameter, parse_integer
from .model_context import ModelContext
from .options import (
    MAX_REVISION,
    check_id,
    check_revision,
    include_deleted_of,
    known_id,
    parse_mode,
    parse_status,
)
from .searching import read_filter_of

MAX_SWITCH = 1000
"""The largest body of a switch, in bytes."""


class SwitchBody(Struct, forbid_unknown_fields=True):
    """The body of `POST /{model}/{id}/switch`."""

    revision: int


_decode_switch = msgspec.json.Decoder(SwitchBody).decode
_encode = msgspec.json.Encoder().encode


class ResourceRoutes:
    """The handlers of `/{model}/{id}` and the paths of actions below it."""

    def __init__(self, context: ModelContext) -> None:
        self._context, self._manager = context, context.manager
        self._policy = context.policy

    async def get(self, request: Request) -> Response:
        """Handle `GET /{model}/{id}`."""
        options = request.options("revision", "fields", "include_deleted")
        resource, unchanged = await self._read(request, options)
        if unchanged is not None:
            return unchanged
        if "fields" in options:
            fields = searching.parse_fields(options["fields"], self._manager.codec)
            data = await heavy(len(resource.json), lambda: projected(resource.json, fields), resource.json)
            shown = Resource(self._manager.codec, resource.meta, data, resource.info)
            return resource_response(shown, 200)
        return resource_response(resource, 200)

    async def get_data(self, request: Request) -> Response:
        """Handle `GET /{model}/{id}/data`."""
        options = request.options("revision", "fields", "include_deleted")
        resource, unchanged = await self._read(request, options)
        if unchanged is not None:
            return unchanged
        body = resource.json
        if "fields" in options:
            whole, fields = body, searching.parse_fields(options["fields"], self._manager.codec)
            body = await heavy(len(whole), lambda: projected(whole, fields), whole)
        return Response(200, body, (etag(resource.meta),))

    async def _read(self, request: Request, options: dict[str, str]) -> tuple[Resource[Any], Response | None]:
        resource_id = known_id(request.rest[0])
        include_deleted = include_deleted_of(options)
        revision = parse_integer("revision", options["revision"], 1, MAX_REVISION) if "revision" in options else None
        if "fields" in options:
            searching.parse_fields(options["fields"], self._manager.codec)
        resource = await self._manager.get(
            resource_id, revision=revision, include_deleted=include_deleted, read_filter=read_filter_of(request.caller)
        )
        if conditions.not_modified(request, resource.meta.etag):
            return resource, Response(304, b"", (etag(resource.meta),))
        return resource, None

    async def put(self, request: Request) -> Response:
        """Handle `PUT /{model}/{id}`: an update, or a creation with `If-None-Match: *`."""
        creates = conditions.creates(request)
        await self._context.authorize(request, "create" if creates else "update")
        options = request.options("status", "mode")
        modify = parse_mode(options)
        status = parse_status(options)
        model_data = await self._context.model_data(request)
        if creates:
            if modify:
                raise bad_parameter(
                    "mode", "modify edits an existing draft, and this request creates a resource: leave out mode"
                )
            check_id(request.rest[0])
            created = await self._manager.create(
                model_data, resource_id=request.rest[0], status=status, by=request.caller
            )
            return resource_response(created, 201, ((b"location", request.path.encode("latin-1")),))
        resource_id, expect = self._context.target(request)
        if modify:
            changed = await self._manager.modify(resource_id, model_data, expect=expect, by=request.caller)
        else:
            changed = await self._manager.update(
                resource_id, model_data, expect=expect, status=status, by=request.caller
            )
        return resource_response(changed, 200)

    async def patch(self, request: Request) -> Response:
        """Handle `PATCH /{model}/{id}`."""
        options = request.options("status", "mode")
        mode: Literal["modify", "update"] = "modify" if parse_mode(options) else "update"
        status = parse_status(options)
        media = request.content_type(*patching.PATCH_TYPES)
        body = await request.json(*patching.PATCH_TYPES)
        patch = patching.patch_from_body(body, media)
        resource_id, expect = self._context.target(request)
        changed = await self._manager.patch(
            resource_id,
            patch.apply,
            size=patch.size,
            work=patch.work,
            max_bytes=self._policy.max_body,
            expect=expect,
            mode=mode,
            status=status,
            by=request.caller,
        )
        return resource_response(changed, 200)

    async def delete(self, request: Request) -> Response:
        """Handle `DELETE /{model}/{id}`."""
        request.options()
        resource_id, expect = self._context.target(request)
        meta = await self._manager.delete(resource_id, expect=expect, by=request.caller)
        return Response(204, b"", (etag(meta),))

    async def publish(self, request: Request) -> Response:
        """Handle `POST /{model}/{id}/publish`."""
        request.options()
        resource_id, expect = self._context.target(request)
        return resource_response(await self._manager.publish(resource_id, expect=expect, by=request.caller), 200)

    async def switch(self, request: Request) -> Response:
        """Handle `POST /{model}/{id}/switch`."""
        request.options()
        body = await request.body()
        if len(body) > MAX_SWITCH:
            raise BodyTooLarge(f'expected {{"revision": NUMBER}} of at most {MAX_SWITCH} bytes, got {len(body)}')
        parse_json(body)
        try:
            revision = _decode_switch(body).revision
        except msgspec.ValidationError as error:
            raise invalid_data(error) from None
        check_revision(revision)
        resource_id, expect = self._context.target(request)
        return resource_response(
            await self._manager.switch(resource_id, revision, expect=expect, by=request.caller), 200
        )

    async def restore(self, request: Request) -> Response:
        """Handle `POST /{model}/{id}/restore`."""
        request.options()
        resource_id, expect = self._context.target(request)
        return resource_response(await self._manager.restore(resource_id, expect=expect, by=request.caller), 200)

    async def purge(self, request: Request) -> Response:
        """Handle `POST /{model}/{id}/purge`."""
        request.options()
        resource_id, expect = self._context.target(request)
        erased_by = await self._manager.purge(resource_id, expect=expect, by=request.caller)
        return Response(202, _encode({"erased_by": erased_by}))
