"""The routes of one model, as one ASGI application for everything below `/{model}`.

One object answers all methods of a path. So a 405 can list the allowed methods, and all errors are problem details,
on any framework.
"""

from __future__ import annotations

from typing import Any

from ..errors import CrudError, NotEnoughTime
from ..resource_manager.core import Caller, ResourceManager
from ..resource_manager.runtime.deadline import STEP_BYTES, check_time
from ..resource_manager.runtime.threads import HEAVY_BYTES
from . import patching, problems
from .blobs import BlobRoutes
from .collection import CollectionRoutes
from .direct_blobs import DirectBlobRoutes
from .guard import principal
from .history import HistoryRoutes
from .messages import ClientGone, Receive, Request, Response, Scope, Send, UnsupportedMediaType
from .model_context import AnyResponse, Endpoint, Endpoints, ModelContext, Policy
from .options import idempotency_key
from .resource import ResourceRoutes
from .streaming import StreamedResponse


class ModelRoutes:
    """The ASGI application of one model. It finds the endpoint of a request, checks access, and sends the response."""

    def __init__(self, manager: ResourceManager[Any], policy: Policy) -> None:
        self._manager, self._policy = manager, policy
        self._context = context = ModelContext(manager, policy)
        collection, resource, history = CollectionRoutes(context), ResourceRoutes(context), HistoryRoutes(context)
        self._collection: Endpoints = {
            "GET": Endpoint("read", collection.list),
            "POST": Endpoint("create", collection.create),
        }
        self._fixed: dict[str, Endpoints] = {
            "count": {"GET": Endpoint("read", collection.count)},
            "batch": {"POST": Endpoint(None, collection.batch)},
        }
        self._resource: Endpoints = {
            "GET": Endpoint("read", resource.get),
            "PUT": Endpoint(None, resource.put),
            "PATCH": Endpoint("update", resource.patch),
            "DELETE": Endpoint("delete", resource.delete),
        }
        self._below: dict[str, Endpoints] = {
            "data": {"GET": Endpoint("read", resource.get_data)},
            "publish": {"POST": Endpoint("update", resource.publish)},
            "switch": {"POST": Endpoint("update", resource.switch)},
            "restore": {"POST": Endpoint("delete", resource.restore)},
            "purge": {"POST": Endpoint("purge", resource.purge)},
            "revisions": {"GET": Endpoint("read", history.revisions)},
            "diff": {"GET": Endpoint("read", history.diff)},
        }
        self._revision: Endpoints = {"GET": Endpoint("read", history.get_revision)}
        self._blobs: Endpoints | None = None
        self._blob: Endpoints | None = None
        self._uploads: dict[int, Endpoints] = {}
        if manager.codec.has_blobs:
            blobs = BlobRoutes(context)
            # A resource whose id is "blobs" keeps its methods: a resource has no POST.
            self._blobs = {**self._resource, "POST": Endpoint(None, blobs.upload, keyed=False)}
            self._blob = {"GET": Endpoint("read", blobs.download)}
            direct = DirectBlobRoutes(context)
            self._uploads = {
                2: {"POST": Endpoint(None, direct.begin, keyed=False)},
                3: {"GET": Endpoint(None, direct.status)},
                4: {"POST": Endpoint(None, direct.complete, keyed=False)},
            }

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request to `/{model}` or a path below it."""
        rest = scope["path_params"].get("rest")
        request = Request(scope, receive, [] if rest is None else rest.split("/"), self._policy.max_body)
        method = scope["method"]
        response: AnyResponse
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
            request.release()
        await response.send(send, head=method == "HEAD")

    async def _answer(self, request: Request, method: str) -> AnyResponse:
        if self._policy.authenticate is not None:
            who = await principal(self._policy.authenticate, request.scope, request.receive)
            request.caller = Caller(who.name)
        template, endpoints = self._endpoints(request.rest, method)
        if endpoints is None:
            raise problems.NoSuchRoute(f"there is nothing at {request.path}")
        request.scope[problems.ROUTE] = f"/{self._manager.name}{template}"
        endpoint = endpoints.get("GET" if method == "HEAD" else method)
        if endpoint is None:
            methods = ", ".join([*endpoints, *(["HEAD"] if "GET" in endpoints else [])])
            error = problems.MethodNotAllowed(f"expected one of {methods}, got {method}")
            return problems.response(error, ((b"allow", methods.encode()),))
        if endpoint.action is not None:
            await self._context.authorize(request, endpoint.action)
        if method in ("GET", "HEAD") or not endpoint.keyed:
            return await endpoint.handler(request)
        key = await idempotency_key(request, method)
        if key is None:
            return await endpoint.handler(request)
        request.caller = request.caller._replace(key=key)
        response = await endpoint.handler(request)
        if key.replayed and isinstance(response, Response):
            return response._replace(headers=(*response.headers, (b"idempotency-replayed", b"true")))
        return response

    def _endpoints(self, rest: list[str], method: str) -> tuple[str, Endpoints | None]:
        """Return the template of a path below the model, and its endpoints by method, or None if there is no route."""
        match rest:
            case []:
                return "", self._collection
            case [name] if name in self._fixed:
                return f"/{name}", self._fixed[name]
            case ["blobs"] if self._blobs is not None:
                return "/blobs" if method == "POST" else "/{id}", self._blobs
            case ["blobs", "uploads", *below] if self._uploads and below[1:] in ([], ["complete"]):
                template = ("/blobs/uploads", "/blobs/uploads/{id}", "/blobs/uploads/{id}/complete")[len(below)]
                return template, self._uploads[len(rest)]
            case [_]:
                return "/{id}", self._resource
            case [_, below]:
                return f"/{{id}}/{below}", self._below.get(below)
            case [_, "revisions", _]:
                return "/{id}/revisions/{n}", self._revision
            case [_, "blobs", _]:
                return "/{id}/blobs/{sha256}", self._blob
        return "", None

    def _sendable(self, response: AnyResponse, method: str) -> AnyResponse:
        """Return the response, or a shorter one if it is too large to be sent, or to be prepared in the remaining time.

        Raises ResponseTooLarge or NotEnoughTime if the response to a read is too large.
        """
        if isinstance(response, StreamedResponse):
            return response
        if len(response.body) >= HEAVY_BYTES and (method in ("GET", "HEAD") or response.brief is not None):
            try:
                check_time(len(response.body) // STEP_BYTES)
            except NotEnoughTime:
                if response.brief is None or method in ("GET", "HEAD"):
                    raise
                response = response._replace(body=response.brief)
        if self._policy.fits(response.body):
            return response
        if response.brief is not None and method not in ("GET", "HEAD"):  # a committed write must be acknowledged
            return response._replace(body=response.brief)
        raise problems.ResponseTooLarge(
            f"the answer has {len(response.body)} bytes, too many to be sent; "
            " ask for less of it, for example by fields="
        )
