"""Who asks, and what they may do.

    crud = AutoCRUD(
        authenticate=my_sign_in,  # (request) -> Principal
        authorize=Permissions({
            "article": {"read": anyone, "create": role("writer"), "update": [own, role("editor")], "delete": role("editor")},
            "*": {"*": role("admin")},
        }),
    )

`authorize` is any function of a principal, an action and a model's name. It answers True, False, or a filter: then only the resources
that the filter finds are there for this principal. Searches and counts are narrowed by it, and every single read and write is checked
against it, by the state that the write replaces. What may not be read is not there: the answer is that for an id that nobody has.
Who may not read a resource may not change it either.
"""

from __future__ import annotations

import inspect
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, ClassVar, Literal, get_args

from msgspec import Struct

from .errors import ConfigError, CrudError
from .query import Filter, Or, field

Action = Literal["read", "create", "update", "delete", "purge"]
"""update: PUT, PATCH, publish and switch; delete: restore too."""

ACTIONS: tuple[Action, ...] = get_args(Action)


class Unauthenticated(CrudError):
    """Nobody knows who asks."""

    type, title, status = "unauthenticated", "Sign in first", 401
    challenge: ClassVar[str] = "Bearer"


class Forbidden(CrudError):
    """Whoever asks may not do this."""

    type, title, status = "forbidden", "This is not allowed", 403


class Principal(Struct, frozen=True, kw_only=True):
    """Who asks. `name` stands in created_by and updated_by; `claims` is whatever else the sign-in says of them."""

    name: str
    roles: frozenset[str] = frozenset()
    claims: Mapping[str, Any] = {}


ANONYMOUS = Principal(name="anonymous")

Decision = bool | Filter
Authorize = Callable[[Principal, Action, str], Decision | Awaitable[Decision]]
Rule = Callable[[Principal], Decision]


def anyone(_: Principal) -> Decision:
    """Everybody who is let in at all."""
    return True


def own(principal: Principal) -> Decision:
    """The resources that the principal created."""
    return field("meta.created_by").eq(principal.name)


def role(*names: str) -> Rule:
    """Principals that have one of these roles."""
    wanted = frozenset(names)
    return lambda principal: not wanted.isdisjoint(principal.roles)


class Permissions:
    """A table of rules by model and action; `*` stands for every other one. A model's own row replaces that of `*`. Several rules allow what
    any of them allows; what has no rule is forbidden."""

    def __init__(self, table: Mapping[str, Mapping[str, Rule | Sequence[Rule]]]) -> None:
        for model, row in table.items():
            for action in row:
                if action not in (*ACTIONS, "*"):
                    raise ConfigError(
                        f"permissions of {model!r} name the action {action!r}; there are {', '.join(ACTIONS)} and *"
                    )
        self._table = {
            model: {action: tuple(rules) if isinstance(rules, Sequence) else (rules,) for action, rules in row.items()}
            for model, row in table.items()
        }

    @property
    def models(self) -> set[str]:
        """The models that it names."""
        return set(self._table) - {"*"}

    def __call__(self, principal: Principal, action: Action, model: str) -> Decision:
        row = self._table.get(model, self._table.get("*", {}))
        filters: list[Filter] = []
        for rule in row.get(action, row.get("*", ())):
            decision = rule(principal)
            if isinstance(decision, Filter):
                filters.append(decision)
            elif decision is True:
                return True
        if not filters:
            return False
        return filters[0] if len(filters) == 1 else Or(tuple(filters))


async def decide(authorize: Authorize, principal: Principal, action: Action, model: str) -> Decision:
    """What `authorize` answers. Anything but True, False or a filter is a defect of it, and lets nobody in."""
    answer = authorize(principal, action, model)
    if inspect.isawaitable(answer):
        answer = await answer
    if not isinstance(answer, bool | Filter):
        raise TypeError(f"authorize answered {type(answer).__name__}; expected True, False or a filter")
    return answer
