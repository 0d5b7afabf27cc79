"""The operations on resources, as values. `planning` has the rules that they follow.

The methods of `ResourceManager` with the same names describe the operations; `ResourceManager.batch` takes several.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Generic, Literal, TypeVar

from msgspec import Struct

from ...access import Action
from ...errors import VersionConflict
from ..basic import ResourceMeta, Status, Version
from ..contract.store_errors import check_expectation
from ..model.codec import ModelData

T = TypeVar("T")


class Retention(Struct, frozen=True):
    """A rule for superseded revisions. The current revision is always kept.

    Give exactly one of these arguments, a positive number:

    last  keep this many of the newest revisions
    days  keep the revisions that are not older than this many days; may be a fraction
    """

    last: int | None = None
    days: float | None = None

    def __post_init__(self) -> None:
        if (self.last is None) == (self.days is None):
            raise ValueError("Retention takes exactly one of last and days")
        if (self.last or self.days or 0) <= 0:
            raise ValueError("Retention expects a positive number")


class Create(Struct, Generic[T], frozen=True):
    """Create a resource. Without an id it gets a new UUID."""

    data: T | ModelData[T]
    resource_id: str | None = None
    status: Status = "stable"


Expected = Version | frozenset[Version]
"""The version that a resource must have, or a set of versions of which it must have one."""


class OnExisting(Struct, frozen=True, kw_only=True):
    """An operation on an existing resource. If `expect` is given, the resource must have that version."""

    resource_id: str
    expect: Expected | None = None


class Update(OnExisting, Generic[T], frozen=True, kw_only=True):
    """Append a revision with new data."""

    data: T | ModelData[T]
    status: Status = "stable"


class Modify(OnExisting, Generic[T], frozen=True, kw_only=True):
    """Replace the data of a draft."""

    data: T | ModelData[T]


class Patch(OnExisting, frozen=True, kw_only=True):
    """Apply a function to the current data as a tree of JSON, then update or modify with its result.

    The function may change its argument.
    """

    apply: Callable[[Any], Any]
    size: int = 0
    """Bytes of the patch and of the data that it may add, as far as known; an estimate of the cost of applying it."""
    work: int | None = None
    """Steps to apply the patch, besides those on the data (`deadline.operations`). None: `size` is used."""
    max_bytes: int | None = None
    """Largest size of the new data as JSON, in bytes. Larger data is accepted only if the patch does not grow it.

    In a batch, the patches may together add at most as many bytes.
    """
    mode: Literal["update", "modify"] = "update"
    status: Status = "stable"


class Publish(OnExisting, frozen=True, kw_only=True):
    """Make the current revision stable."""


class Switch(OnExisting, frozen=True, kw_only=True):
    """Make an existing revision the current one."""

    revision: int


class Delete(OnExisting, frozen=True, kw_only=True):
    """Hide a resource."""


class Restore(OnExisting, frozen=True, kw_only=True):
    """Show a deleted resource again."""


class Purge(OnExisting, frozen=True, kw_only=True):
    """Erase a resource with all its revisions."""


class Expire(OnExisting, frozen=True, kw_only=True):
    """Remove the revisions that Retention no longer keeps, of a deleted resource too."""


Operation = Create[Any] | Update[Any] | Modify[Any] | Patch | Publish | Switch | Delete | Restore | Purge | Expire


ACTIONS: dict[type[Any], Action] = {
    Create: "create",
    **dict.fromkeys((Update, Modify, Patch, Publish, Switch), "update"),
    **dict.fromkeys((Delete, Restore), "delete"),
    Purge: "purge",
}
"""The action of access control that each operation needs. Callers cannot request Expire, so it needs none."""


def check_expected(expect: Expected, meta: ResourceMeta) -> None:
    """Raise VersionConflict unless the resource is in an expected state."""
    found = Version(meta.version, meta.nonce)
    if isinstance(expect, Version):
        check_expectation(expect, meta.resource_id, found)
    elif found not in expect:
        raise VersionConflict(
            f"resource {meta.resource_id!r} is at version {meta.version}, none of those that were expected;"
            " read it again"
        )
