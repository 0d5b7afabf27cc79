"""Principals and permissions.

    crud = AutoCRUD(
        authenticate=my_authentication,  # (request) -> Principal
        authorize=Permissions({
            "article": {
                "read": anyone,
                "create": role("writer"),
                "update": [own, role("editor")],
                "delete": role("editor"),
            },
            "*": {"*": role("admin")},
        }),
    )

`authorize` is any function of a principal, an action and the name of a model. It returns True, False, or a filter. A
filter restricts the principal to the resources that match it: searches and counts find only these, and every read and
write of a single resource is checked. A write is checked against the state that it replaces and the state that it
leaves. If the principal may not read a resource, requests for it are answered as if the id did not exist, and the
principal may not change it either.
"""

from __future__ import annotations

import inspect
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, ClassVar, Literal, get_args

from msgspec import Struct

from .errors import ConfigError, CrudError
from .query import Filter, Or, field

Action = Literal["read", "create", "update", "delete", "purge", "export", "import"]
"""`update` covers PUT, PATCH, publish and switch; `delete` covers restore too."""

ACTIONS: tuple[Action, ...] = get_args(Action)
EXPLICIT: frozenset[Action] = frozenset({"export", "import"})
"""Actions that no `*` allows: an export shows all fields, and an import writes what it is given as of any author."""


class Unauthenticated(CrudError):
    """The request has no valid credentials."""

    type, title, status = "unauthenticated", "Sign in first", 401
    challenge: ClassVar[str] = "Bearer"


class Forbidden(CrudError):
    """The principal may not do this."""

    type, title, status = "forbidden", "This is not allowed", 403


class Principal(Struct, frozen=True, kw_only=True):
    """The authenticated caller of a request.

    Attributes:
        name: Recorded in `created_by` and `updated_by`.
        roles: Roles for rules such as `role("editor")`.
        claims: Other facts from the authentication, for rules of your own.
    """

    name: str
    roles: frozenset[str] = frozenset()
    claims: Mapping[str, Any] = {}


ANONYMOUS = Principal(name="anonymous")

Decision = bool | Filter
Authorize = Callable[[Principal, Action, str], Decision | Awaitable[Decision]]
Rule = Callable[[Principal], Decision]


def anyone(_: Principal) -> Decision:
    """Allow every authenticated principal."""
    return True


def own(principal: Principal) -> Decision:
    """Allow the resources that the principal created."""
    return field("meta.created_by").eq(principal.name)


def role(*names: str) -> Rule:
    """Return a rule that allows principals with at least one of these roles."""
    wanted = frozenset(names)
    return lambda principal: not wanted.isdisjoint(principal.roles)


class Permissions:
    """A table of rules by model and action. Pass it as `authorize`.

        Permissions({
            "article": {"read": anyone, "update": [own, role("editor")], "*": role("admin")},
            "*": {"*": role("admin")},
        })

    The actions are read, create, update, delete, purge, export and import. The action `*` stands for all actions that a
    row does not name, the model `*` for all models without a row. A rule is a function of the principal that returns
    True, False or a filter. A list of rules allows everything that at least one of them allows. Actions without a rule
    are forbidden.

    No `*` allows export and import: an archive holds all fields of all resources, and an import writes resources of any
    author. Only a row of the model itself that names the action allows it, and only if a rule returns True.

    Raises ConfigError if a row names an unknown action, or the row `*` names export or import.
    """

    def __init__(self, table: Mapping[str, Mapping[str, Rule | Sequence[Rule]]]) -> None:
        for model, row in table.items():
            for action in row:
                if action not in (*ACTIONS, "*"):
                    raise ConfigError(
                        f"permissions of {model!r} name the action {action!r}; there are {', '.join(ACTIONS)} and *"
                    )
                if model == "*" and action in EXPLICIT:
                    raise ConfigError(
                        f"permissions of all models name the action {action!r}: name it in the row of each model that"
                        " may be exported or imported"
                    )
        self._table = {
            model: {action: tuple(rules) if isinstance(rules, Sequence) else (rules,) for action, rules in row.items()}
            for model, row in table.items()
        }

    @property
    def models(self) -> set[str]:
        """The models that have a row."""
        return set(self._table) - {"*"}

    def __call__(self, principal: Principal, action: Action, model: str) -> Decision:
        """Return whether the principal may do this: True, False, or a filter of the allowed resources."""
        if action in EXPLICIT:
            rules = self._table.get(model, {}).get(action, ())
        else:
            row = self._table.get(model, self._table.get("*", {}))
            rules = row.get(action, row.get("*", ()))
        filters: list[Filter] = []
        for rule in rules:
            decision = rule(principal)
            if isinstance(decision, Filter):
                filters.append(decision)
            elif decision is True:
                return True
        if not filters:
            return False
        return filters[0] if len(filters) == 1 else Or(tuple(filters))


async def decide(authorize: Authorize, principal: Principal, action: Action, model: str) -> Decision:
    """Return the decision of `authorize`, and await it if necessary.

    Raises TypeError if the result is not True, False or a filter; then the request is refused.
    """
    answer = authorize(principal, action, model)
    if inspect.isawaitable(answer):
        answer = await answer
    if not isinstance(answer, bool | Filter):
        raise TypeError(f"authorize returned {type(answer).__name__}; expected True, False or a filter")
    return answer
