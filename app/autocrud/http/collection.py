"""The routes of a model's collection: create, list, count and batch."""

from __future__ import annotations

import functools
from collections.abc import Sequence

from msgspec.structs import replace

from ..errors import CrudError
from ..resource_manager.engine.operations import ACTIONS
from ..resource_manager.runtime.threads import heavy
from . import batches, searching
from .answers import (
    all_projected,
    batch_response,
    how_many_fit,
    how_many_in_time,
    page_response,
    pairs_that_fit,
    resource_response,
    without_data,
)
from .messages import Request, Response, parse_parameters
from .model_context import ModelContext
from .options import check_id, parse_status
from .searching import narrowed

MAX_REMEMBERED = 1000
"""The longest query string, in bytes, whose parsed form is cached."""


class CollectionRoutes:
    """The handlers of `/{model}`, `/{model}/count` and `/{model}/batch`."""

    def __init__(self, context: ModelContext) -> None:
        self._context, self._manager = context, context.manager
        self._policy = context.policy
        # A query string always has the same parsed form, and clients repeat a few query strings.
        self._parse_known = functools.lru_cache(maxsize=512)(self._parse_anew)

    async def create(self, request: Request) -> Response:
        """Handle `POST /{model}`."""
        status = parse_status(request.options("status"))
        model_data = await self._context.model_data(request)
        created = await self._manager.create(model_data, status=status, by=request.caller)
        location = f"{request.path}/{created.meta.resource_id}".encode("latin-1")
        return resource_response(created, 201, ((b"location", location),))

    def _parse_anew(self, raw: bytes) -> searching.Search:
        return searching.parse_search(parse_parameters(raw), self._manager.codec, self._manager.name)

    def _parse(self, raw: bytes) -> searching.Search:
        return self._parse_known(raw) if len(raw) <= MAX_REMEMBERED else self._parse_anew(raw)

    async def list(self, request: Request) -> Response:
        """Handle `GET /{model}`.

        A page ends early if its items do not fit into a response, or cannot be processed in the remaining time. Then
        the search is repeated with a smaller limit, because the cursor must point behind the last item of the page.
        """
        search = self._parse(request.scope["query_string"])
        search = search._replace(query=narrowed(search.query, request.caller))
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
                    query = replace(query, limit=fitting)  # do not build a page that is too large
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
            query = replace(query, limit=fitting)  # search again for the cursor behind the last item that fits

    async def count(self, request: Request) -> Response:
        """Handle `GET /{model}/count`."""
        query = searching.parse_count(request.parameters(), self._manager.codec)
        count = await self._manager.count(narrowed(query.resolve(self._manager.codec.fields), request.caller))
        return Response(200, b'{"count":%d}' % count)

    async def batch(self, request: Request) -> Response:
        """Handle `POST /{model}/batch`."""
        request.options()
        body, codec = await request.json(), self._manager.codec
        operations = await heavy(
            len(body),
            lambda: batches.parse(
                body, codec, check_id, self._policy.max_body, require_if_match=self._policy.require_if_match
            ),
            body,
        )
        await self._context.authorize(request, *dict.fromkeys(ACTIONS[type(operation)] for operation in operations))
        try:
            results = await self._manager.batch(operations, by=request.caller)
        except CrudError as error:
            if error.operation is None:
                raise
            error.violations = batches.in_data(error.violations)  # planning reports pointers into the data
            raise batches.located(error, error.operation) from None
        return batch_response(results)
