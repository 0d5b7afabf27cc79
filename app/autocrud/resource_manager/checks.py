"""What every store checks, said once."""

from __future__ import annotations

from ..errors import Fault, ResourceNotFound, StoreDamaged, UniqueConflict, VersionConflict
from .basic import Expect, Version


def storable_id(resource_id: str) -> str:
    """The id, if every store can hold it; ValueError for NUL and unpaired surrogates."""
    if "\0" in resource_id:
        raise ValueError("an id cannot hold NUL characters")
    if not resource_id.isascii():
        try:
            resource_id.encode()
        except UnicodeEncodeError:
            raise ValueError("an id cannot hold unpaired surrogates") from None
    return resource_id


def missing(resource_id: str) -> ResourceNotFound:
    return ResourceNotFound(f"there is no resource {resource_id!r}")


def taken(name: str) -> UniqueConflict:
    detail = f"another resource has this {name!r}; deleted ones keep theirs until they are purged"
    return UniqueConflict(detail, (Fault("/" + name.replace(".", "/"), detail),))


def check_expectation(expect: Expect, resource_id: str, found: Version | None) -> None:
    """Raise VersionConflict unless what was found is what was expected."""
    if expect == "any" or (found is None if expect == "absent" else found == expect):
        return
    state = "does not exist" if found is None else f"is at version {found.version}"
    wanted = "it to be absent" if expect == "absent" else f"version {expect[0]}"
    raise VersionConflict(f"resource {resource_id!r} {state}; expected {wanted}")


def generation_of(uid: str) -> int:
    generation, slash, _ = uid.partition("/")
    if not slash or not generation.isdigit():
        raise StoreDamaged(f"{uid!r} is no uid")
    return int(generation)
