"""The parts that all routes of a model share: the policy, access control, and the data and target of a write."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any, NamedTuple

from ..access import ANONYMOUS, Action, Authorize, Forbidden, decide
from ..errors import ConfigError, CrudError
from ..query import Filter, Query
from ..resource_manager.core import AccessFilter, ResourceManager
from ..resource_manager.engine.operations import Expected
from ..resource_manager.model.codec import ModelData
from ..resource_manager.runtime.threads import HEAVY_BYTES, heavy
from . import conditions
from .guard import PRINCIPAL, Authenticate
from .messages import Request, Response
from .options import known_id
from .streaming import StreamedResponse

AnyResponse = Response | StreamedResponse
Handler = Callable[[Request], Awaitable[AnyResponse]]


class Endpoint(NamedTuple):
    """One method of a path: its handler, and the action that the caller must be allowed.

    `action` is None if the handler checks access itself, because the action depends on the request. A handler that is
    not `keyed` ignores the Idempotency-Key, because the key would need the whole body in memory.
    """

    action: Action | None
    handler: Handler
    keyed: bool = True


Endpoints = dict[str, Endpoint]
"""The endpoints of one path, by method. GET serves HEAD too."""


class Policy(NamedTuple):
    """The settings that all routes of all models share.

    Attributes:
        authenticate: Returns the principal of a request. If None, every caller is anonymous.
        authorize: Decides what a principal may do. If None, everything is allowed.
        require_if_match: Whether writes without If-Match are answered with 428.
        max_body: The largest request body, in bytes.
        fits: Returns whether a response body is small enough to be sent.
    """

    authenticate: Authenticate | None
    authorize: Authorize | None
    require_if_match: bool
    max_body: int
    fits: Callable[[bytes], bool]


class ModelContext:
    """The manager and the policy of one model, and the steps that its handlers share."""

    def __init__(self, manager: ResourceManager[Any], policy: Policy) -> None:
        self.manager, self.policy = manager, policy

    async def authorize(self, request: Request, *actions: Action) -> None:
        """Check that the caller may perform all of these actions, and restrict the caller to the allowed resources.

        Raises Forbidden if the caller may not perform one of them on any resource. Raises ConfigError if `authorize`
        returned a filter that is invalid for the model.
        """
        if self.policy.authorize is None:
            return
        who = request.scope.get(PRINCIPAL, ANONYMOUS)
        found: dict[Action, Filter | None] = {}
        # The response to a change shows the resource, so a change needs the permission to read. A creation does not.
        needed = actions if set(actions) == {"create"} else ("read", *actions)
        for action in dict.fromkeys(needed):
            answer = await decide(self.policy.authorize, who, action, self.manager.name)
            if answer is False:
                raise Forbidden(f"you may not {action} resources of this model")
            found[action] = None if answer is True else self._resolved(answer)
        read_filter = found.get("read")
        if self.manager.codec.has_blobs and "read" not in found:
            # Data may refer to the files of resources that the caller may read.
            answer = await decide(self.policy.authorize, who, "read", self.manager.name)
            if answer is not False:
                found["read"] = None if answer is True else self._resolved(answer)
        request.caller = request.caller._replace(access_filter=AccessFilter(read_filter, found))

    async def authorize_any(self, request: Request, *actions: Action) -> None:
        """Raise Forbidden if the caller may perform none of these actions, on no resource."""
        if self.policy.authorize is None:
            return
        who = request.scope.get(PRINCIPAL, ANONYMOUS)
        for action in actions:
            if await decide(self.policy.authorize, who, action, self.manager.name) is not False:
                return
        raise Forbidden(f"you may not {' or '.join(actions)} resources of this model")

    def _resolved(self, where: Filter | bool) -> Filter | None:
        assert isinstance(where, Filter)
        try:
            return Query(where=where).resolve(self.manager.codec.fields).where
        except CrudError as error:
            raise ConfigError(
                f"authorize returned a filter that is invalid for {self.manager.name!r}: {error}"
            ) from None

    async def model_data(self, request: Request) -> ModelData[Any]:
        """Return the parsed body of a request. Raises InvalidData if it is invalid for the model."""
        body = await request.json()
        if len(body) < HEAVY_BYTES:
            return self.manager.codec.parse(body)
        return await heavy(len(body), lambda: self.manager.codec.parse(body), body)

    def target(self, request: Request) -> tuple[str, Expected | None]:
        """Return the id of the resource that a write changes, and the states that If-Match allows."""
        resource_id = known_id(request.rest[0])
        states = conditions.expected(request, self.policy.require_if_match)
        if states is None:
            return resource_id, None
        return resource_id, states[0] if len(states) == 1 else frozenset(states)
