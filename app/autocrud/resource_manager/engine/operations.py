"""What can be done to resources, as values. `planning` says what each of them makes of a resource."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Generic, Literal, TypeVar

from msgspec import Struct

from ...access import Action
from ..basic import Status, Version
from ..model.codec import Document

T = TypeVar("T")


class Retention(Struct, frozen=True):
    """How long superseded revisions are kept: the `last` N, or those of the last `days`. The current one always stays."""

    last: int | None = None
    days: float | None = None

    def __post_init__(self) -> None:
        if (self.last is None) == (self.days is None):
            raise ValueError("Retention takes exactly one of last and days")
        if (self.last or self.days or 0) <= 0:
            raise ValueError("Retention expects a positive number")


class Create(Struct, Generic[T], frozen=True):
    data: T | Document[T]
    resource_id: str | None = None
    status: Status = "stable"


Expected = Version | frozenset[Version]


class OnExisting(Struct, frozen=True, kw_only=True):
    """An operation on a resource that exists; `expect` is the state it must be in, or those it may be in, if the caller says."""

    resource_id: str
    expect: Expected | None = None


class Update(OnExisting, Generic[T], frozen=True, kw_only=True):
    data: T | Document[T]
    status: Status = "stable"


class Modify(OnExisting, Generic[T], frozen=True, kw_only=True):
    data: T | Document[T]


class Patch(OnExisting, frozen=True, kw_only=True):
    """Apply a function of JSON trees to the current data, then update or modify. The function may change its argument."""

    apply: Callable[[Any], Any]
    size: int = 0
    """Bytes of the patch, and of what it may make, as far as that is known: what applying it costs."""
    work: int | None = None
    """Operations that it takes beside those on the data (`deadline.operations`); None if nobody has counted: `size` then."""
    max_bytes: int | None = None
    """Of the data in JSON that it may make: larger data is taken only if it was larger before."""
    mode: Literal["update", "modify"] = "update"
    status: Status = "stable"


class Publish(OnExisting, frozen=True, kw_only=True):
    pass


class Switch(OnExisting, frozen=True, kw_only=True):
    revision: int


class Delete(OnExisting, frozen=True, kw_only=True):
    pass


class Restore(OnExisting, frozen=True, kw_only=True):
    pass


class Purge(OnExisting, frozen=True, kw_only=True):
    pass


class Expire(OnExisting, frozen=True, kw_only=True):
    """Remove the revisions whose time is over; on deleted resources too."""


Operation = Create[Any] | Update[Any] | Modify[Any] | Patch | Publish | Switch | Delete | Restore | Purge | Expire


ACTIONS: dict[type[Any], Action] = {
    Create: "create",
    **dict.fromkeys((Update, Modify, Patch, Publish, Switch), "update"),
    **dict.fromkeys((Delete, Restore), "delete"),
    Purge: "purge",
}
"""What an operation is a case of, for those who say what is allowed."""
