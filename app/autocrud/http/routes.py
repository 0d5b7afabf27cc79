"""What each path and method of one model does.

`ModelRoutes` is an ASGI application for everything below `/{model}`. One object answers all methods of a path, so a 405 can list them,
and its errors are problem details whatever it was mounted on.
"""

from __future__ import annotations

import functools
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Literal, NamedTuple

import msgspec
from msgspec import Struct
from msgspec.structs import replace

from ..access import ANONYMOUS, Action, Authorize, Forbidden, allowed
from ..errors import ConfigError, CrudError, NotEnoughTime
from ..query import Filter, Query
from ..resource_manager.basic import Page, RevisionInfo
from ..resource_manager.core import AccessFilter, Caller, Resource, ResourceManager
from ..resource_manager.engine.operations import ACTIONS, Expected
from ..resource_manager.model.codec import Document, invalid_data, parse_json
from ..resource_manager.runtime.deadline import STEP_BYTES, check_time
from ..resource_manager.runtime.threads import HEAVY_BYTES, heavy
from . import batches, conditions, patching, problems, searching
from .answers import (
    all_projected,
    batch_response,
    etag,
    how_many_fit,
    how_many_in_time,
    page_response,
    pairs_that_fit,
    projected,
    resource_response,
    without_data,
)
from .guard import PRINCIPAL, Authenticate, principal
from .json_diff import diff
from .messages import (
    BodyTooLarge,
    ClientGone,
    Receive,
    Request,
    Response,
    Scope,
    Send,
    UnsupportedMediaType,
    bad_parameter,
    integer,
    parse_parameters,
)
from .options import (
    MAX_REVISION,
    check_id,
    check_revision,
    idempotency_key,
    include_deleted_of,
    known_id,
    parse_mode,
    parse_status,
)
from .searching import narrowed, read_filter_of

Handler = Callable[[Request], Awaitable[Response]]


class Door(NamedTuple):
    """What a method of a path does, and the action that it needs to be allowed; None: it asks for itself."""

    action: Action | None
    handler: Handler


Doors = dict[str, Door]

_encode = msgspec.json.Encoder().encode


class SwitchBody(Struct, forbid_unknown_fields=True):
    revision: int


MAX_SWITCH = 1000
MAX_REMEMBERED = 1000
"""Bytes of a query string whose meaning is remembered."""
_decode_switch = msgspec.json.Decoder(SwitchBody).decode


class Policy(NamedTuple):
    """What holds for all routes of all models.

    authenticate, authorize  who asks, and what they may do; None: everybody, everything
    require_if_match         writes without If-Match are answered 428
    max_body                 bytes of a request
    fits                     whether an answer's body can be sent
    """

    authenticate: Authenticate | None
    authorize: Authorize | None
    require_if_match: bool
    max_body: int
    fits: Callable[[bytes], bool]


class ModelRoutes:
    def __init__(self, manager: ResourceManager[Any], policy: Policy) -> None:
        self._manager, self._policy = manager, policy
        self._require_if_match = policy.require_if_match
        self._collection: Doors = {"GET": Door("read", self._list), "POST": Door("create", self._create)}
        self._fixed: dict[str, Doors] = {
            "count": {"GET": Door("read", self._count)},
            "batch": {"POST": Door(None, self._batch)},
        }
        self._resource: Doors = {
            "GET": Door("read", self._get),
            "PUT": Door(None, self._put),
            "PATCH": Door("update", self._patch),
            "DELETE": Door("delete", self._delete),
        }
        self._below: dict[str, Doors] = {
            "data": {"GET": Door("read", self._get_data)},
            "publish": {"POST": Door("update", self._publish)},
            "switch": {"POST": Door("update", self._switch)},
            "restore": {"POST": Door("delete", self._restore)},
            "purge": {"POST": Door("purge", self._purge)},
            "revisions": {"GET": Door("read", self._revisions)},
            "diff": {"GET": Door("read", self._diff)},
        }
        self._revision: Doors = {"GET": Door("read", self._get_revision)}
        # What a query string means does not change, and clients ask for the same few lists again and again.
        self._parse_known = functools.lru_cache(maxsize=512)(self._parse_anew)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        rest = scope["path_params"].get("rest")
        request = Request(scope, receive, [] if rest is None else rest.split("/"), self._policy.max_body)
        method = scope["method"]
        try:
            response = self._sendable(await self._answer(request, method), method)
        except UnsupportedMediaType as error:
            accept = b"accept-patch" if method == "PATCH" else b"accept"
            types = ", ".join(patching.PATCH_TYPES) if method == "PATCH" else "application/json"
            response = problems.response(error, ((accept, types.encode()),))
        except CrudError as error:
            response = problems.response(error)
        except ClientGone:
            return
        except Exception as error:
            response = problems.unexpected(error, scope)
        finally:
            request.done()
        await response.send(send, head=method == "HEAD")

    async def _answer(self, request: Request, method: str) -> Response:
        if self._policy.authenticate is not None:
            who = await principal(self._policy.authenticate, request.scope, request.receive)
            request.by = Caller(who.name)
        template, doors = self._doors(request.rest)
        if doors is None:
            raise problems.NoSuchRoute(f"there is nothing at {request.path}")
        request.scope[problems.ROUTE] = f"/{self._manager.name}{template}"
        door = doors.get("GET" if method == "HEAD" else method)
        if door is None:
            methods = ", ".join([*doors, *(["HEAD"] if "GET" in doors else [])])
            error = problems.MethodNotAllowed(f"expected one of {methods}, got {method}")
            return problems.response(error, ((b"allow", methods.encode()),))
        if door.action is not None:
            await self._allow(request, door.action)
        if method in ("GET", "HEAD"):
            return await door.handler(request)
        key = await idempotency_key(request, method)
        if key is None:
            return await door.handler(request)
        request.by = request.by._replace(key=key)
        response = await door.handler(request)
        return (
            response._replace(headers=(*response.headers, (b"idempotency-replayed", b"true")))
            if key.replayed
            else response
        )

    def _doors(self, rest: list[str]) -> tuple[str, Doors | None]:
        """The template of a path below the model, and what is there."""
        match rest:
            case []:
                return "", self._collection
            case [name] if name in self._fixed:
                return f"/{name}", self._fixed[name]
            case [_]:
                return "/{id}", self._resource
            case [_, below]:
                return f"/{{id}}/{below}", self._below.get(below)
            case [_, "revisions", _]:
                return "/{id}/revisions/{n}", self._revision
        return "", None

    async def _allow(self, request: Request, *actions: Action) -> None:
        """Raise Forbidden unless the caller may do all of this to some resources. The access filter says to which."""
        if self._policy.authorize is None:
            return
        who = request.scope.get(PRINCIPAL, ANONYMOUS)
        found: dict[Action, Filter | None] = {}
        # Who changes a resource sees it in the answer, so changing takes reading; creating does not.
        needed = actions if set(actions) == {"create"} else ("read", *actions)
        for action in dict.fromkeys(needed):
            answer = await allowed(self._policy.authorize, who, action, self._manager.name)
            if answer is False:
                raise Forbidden(f"you may not {action} resources of this model")
            found[action] = None if answer is True else self._resolved(answer)
        request.by = request.by._replace(access_filter=AccessFilter(found.get("read"), found))

    def _resolved(self, where: Filter | bool) -> Filter | None:
        assert isinstance(where, Filter)
        try:
            return Query(where=where).resolve(self._manager.codec.fields).where
        except CrudError as error:
            raise ConfigError(
                f"authorize answered a filter that means nothing for {self._manager.name!r}: {error}"
            ) from None

    def _sendable(self, response: Response, method: str) -> Response:
        """The response, or what takes its place if it is too large to be sent, or to be made ready for that in time."""
        if len(response.body) >= HEAVY_BYTES and (method in ("GET", "HEAD") or response.brief is not None):
            try:
                check_time(len(response.body) // STEP_BYTES)
            except NotEnoughTime:
                if response.brief is None or method in ("GET", "HEAD"):
                    raise
                response = response._replace(body=response.brief)
        if self._policy.fits(response.body):
            return response
        if response.brief is not None and method not in ("GET", "HEAD"):  # what is written must be acknowledged
            return response._replace(body=response.brief)
        raise problems.ResponseTooLarge(
            f"the answer has {len(response.body)} bytes, too many to be sent; ask for less of it, by fields= where there is that"
        )

    async def _document(self, request: Request) -> Document[Any]:
        body = await request.json()
        if len(body) < HEAVY_BYTES:
            return self._manager.codec.parse(body)
        return await heavy(len(body), lambda: self._manager.codec.parse(body), body)

    # The collection

    async def _create(self, request: Request) -> Response:
        status = parse_status(request.options("status"))
        document = await self._document(request)
        created = await self._manager.create(document, status=status, by=request.by)
        location = f"{request.path}/{created.meta.resource_id}".encode("latin-1")
        return resource_response(created, 201, ((b"location", location),))

    def _parse_anew(self, raw: bytes) -> searching.Search:
        return searching.parse_search(parse_parameters(raw), self._manager.codec, self._manager.name)

    def _parse(self, raw: bytes) -> searching.Search:
        return self._parse_known(raw) if len(raw) <= MAX_REMEMBERED else self._parse_anew(raw)

    async def _list(self, request: Request) -> Response:
        search = self._parse(request.scope["query_string"])
        search = search._replace(query=narrowed(search.query, request.by))
        from_index = not search.data or (
            search.fields is not None and set(search.fields) <= set(self._manager.codec.fields)
        )
        items: list[bytes]
        found: Sequence[tuple[bytes, bytes]]
        query, shortened = search.query, False
        while True:
            if from_index:
                hits = await self._manager.find(query)
                next_, found = hits.next, [(hit.document, hit.shown) for hit in hits.items]
            else:
                page = await self._manager.search_json(query)
                next_, found = page.next, page.items
            if search.fields is not None:
                in_time = how_many_in_time(found, 1 if shortened else 2)
                if in_time < len(found):
                    query, shortened = replace(query, limit=in_time), True
                    continue
                items = await all_projected(found, search.fields)
            elif from_index:
                items = [b'{"meta":%b}' % meta for meta, _ in found]
            else:
                fitting = pairs_that_fit(found)
                if fitting < len(found):
                    query = replace(query, limit=fitting)  # large ones are not put together in vain
                    continue
                items = [b'{"meta":%b,"data":%b}' % pair for pair in found]
            fitting = how_many_fit([len(item) for item in items])
            if fitting == len(items):
                cursor = None if next_ is None else searching.encode_cursor(next_, search.cursor_scope)
                response = page_response(request, items, cursor)
                if self._policy.fits(response.body):
                    return response
                if len(items) <= 1:
                    return page_response(request, [without_data(meta, items[0]) for meta, _ in found], cursor)
                fitting = len(items) // 2
            query = replace(query, limit=fitting)  # again, for the cursor that stands after the last one that fits

    async def _count(self, request: Request) -> Response:
        query = searching.parse_count(request.parameters(), self._manager.codec)
        count = await self._manager.count(narrowed(query.resolve(self._manager.codec.fields), request.by))
        return Response(200, b'{"count":%d}' % count)

    async def _batch(self, request: Request) -> Response:
        request.options()
        body, codec = await request.json(), self._manager.codec
        operations = await heavy(
            len(body),
            lambda: batches.parse(
                body, codec, check_id, self._policy.max_body, require_if_match=self._require_if_match
            ),
            body,
        )
        await self._allow(request, *dict.fromkeys(ACTIONS[type(operation)] for operation in operations))
        try:
            results = await self._manager.batch(operations, by=request.by)
        except CrudError as error:
            if error.operation is None:
                raise
            error.faults = batches.in_data(error.faults)  # what planning finds wrong in a place, it finds in the data
            raise batches.located(error, error.operation) from None
        return batch_response(results)

    # One resource

    async def _get(self, request: Request) -> Response:
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

    async def _get_data(self, request: Request) -> Response:
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
        revision = integer("revision", options["revision"], 1, MAX_REVISION) if "revision" in options else None
        if "fields" in options:
            searching.parse_fields(options["fields"], self._manager.codec)
        resource = await self._manager.get(
            resource_id, revision=revision, include_deleted=include_deleted, read_filter=read_filter_of(request.by)
        )
        if conditions.not_modified(request, resource.meta):
            return resource, Response(304, b"", (etag(resource.meta),))
        return resource, None

    async def _put(self, request: Request) -> Response:
        creates = conditions.creates(request)
        await self._allow(request, "create" if creates else "update")
        options = request.options("status", "mode")
        modify = parse_mode(options)
        status = parse_status(options)
        document = await self._document(request)
        if creates:
            if modify:
                raise bad_parameter("mode", "what is not there cannot be modified")
            check_id(request.rest[0])
            created = await self._manager.create(document, resource_id=request.rest[0], status=status, by=request.by)
            return resource_response(created, 201, ((b"location", request.path.encode("latin-1")),))
        resource_id, expect = self._target(request)
        if modify:
            changed = await self._manager.modify(resource_id, document, expect=expect, by=request.by)
        else:
            changed = await self._manager.update(resource_id, document, expect=expect, status=status, by=request.by)
        return resource_response(changed, 200)

    async def _patch(self, request: Request) -> Response:
        options = request.options("status", "mode")
        mode: Literal["modify", "update"] = "modify" if parse_mode(options) else "update"
        status = parse_status(options)
        media = request.content_type(*patching.PATCH_TYPES)
        body = await request.json(*patching.PATCH_TYPES)
        patch = patching.given(body, media)
        resource_id, expect = self._target(request)
        changed = await self._manager.patch(
            resource_id,
            patch.apply,
            size=patch.size,
            work=patch.work,
            max_bytes=self._policy.max_body,
            expect=expect,
            mode=mode,
            status=status,
            by=request.by,
        )
        return resource_response(changed, 200)

    async def _delete(self, request: Request) -> Response:
        request.options()
        resource_id, expect = self._target(request)
        meta = await self._manager.delete(resource_id, expect=expect, by=request.by)
        return Response(204, b"", (etag(meta),))

    async def _publish(self, request: Request) -> Response:
        request.options()
        resource_id, expect = self._target(request)
        return resource_response(await self._manager.publish(resource_id, expect=expect, by=request.by), 200)

    async def _switch(self, request: Request) -> Response:
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
        resource_id, expect = self._target(request)
        return resource_response(await self._manager.switch(resource_id, revision, expect=expect, by=request.by), 200)

    async def _restore(self, request: Request) -> Response:
        request.options()
        resource_id, expect = self._target(request)
        return resource_response(await self._manager.restore(resource_id, expect=expect, by=request.by), 200)

    async def _purge(self, request: Request) -> Response:
        request.options()
        resource_id, expect = self._target(request)
        erased_by = await self._manager.purge(resource_id, expect=expect, by=request.by)
        return Response(202, _encode({"erased_by": erased_by}))

    def _target(self, request: Request) -> tuple[str, Expected | None]:
        """The resource that a write is about, and the states that it may be in."""
        resource_id = known_id(request.rest[0])
        states = conditions.expected(request, self._require_if_match)
        if states is None:
            return resource_id, None
        return resource_id, states[0] if len(states) == 1 else frozenset(states)

    # History

    async def _revisions(self, request: Request) -> Response:
        options = request.options("limit", "cursor", "include_deleted")
        resource_id = known_id(request.rest[0])
        limit = integer("limit", options["limit"], 1, 200) if "limit" in options else searching.DEFAULT_LIMIT
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
            read_filter=read_filter_of(request.by),
        )
        cursor = None if page.next is None else searching.encode_cursor((page.next,), scope)
        return page_response(request, [_encode(info) for info in page.items], cursor)

    async def _get_revision(self, request: Request) -> Response:
        options = request.options("include_deleted")
        resource_id, number = known_id(request.rest[0]), request.rest[2]
        if not (number.isascii() and number.isdigit() and len(number) < 11 and 1 <= int(number) <= MAX_REVISION):
            raise problems.NoSuchRoute(f"there is nothing at {request.path}")
        include_deleted = include_deleted_of(options)
        resource = await self._manager.get(
            resource_id, revision=int(number), include_deleted=include_deleted, read_filter=read_filter_of(request.by)
        )
        return Response(200, b'{"meta":%b,"data":%b}' % (_encode(resource.info), resource.json))

    async def _diff(self, request: Request) -> Response:
        options = request.options("from", "to", "include_deleted")
        resource_id = known_id(request.rest[0])
        if "from" not in options:
            raise bad_parameter("from", "expected the number of a revision; `to` defaults to the current one")
        include_deleted = include_deleted_of(options)
        bodies = []
        for name in ("from", "to"):
            revision = integer(name, options[name], 1, MAX_REVISION) if name in options else None
            found = await self._manager.get(
                resource_id, revision=revision, include_deleted=include_deleted, read_filter=read_filter_of(request.by)
            )
            bodies.append(found.json)
        old, new = bodies
        patch = await heavy(len(old) + len(new), lambda: _encode(diff(old, new)), old, new)
        return Response(200, patch, (), patching.JSON_PATCH.encode())
