"""Checks that every store makes, and the errors that they raise."""

from __future__ import annotations

from ...errors import (
    BlobGone,
    BlobQuotaExceeded,
    ConfigError,
    InvalidData,
    LoadTooLarge,
    ModelNotEmpty,
    PinLost,
    ResourceNotFound,
    StaleGeneration,
    StoreDamaged,
    StoreUnavailable,
    UniqueConflict,
    VersionConflict,
    Violation,
)
from ..basic import BlobRow, Change, Expect, Version
from . import snapshots
from .limits import MAX_ID, MAX_NAME


class WriteTimedOut(StoreUnavailable):
    """A write waited too long for its turn and was not made. Further writes to the same store would wait as long."""


def storable_id(resource_id: str) -> str:
    """Return the id, if every store can hold it. Raises ValueError for NUL and unpaired surrogates."""
    if "\0" in resource_id:
        raise ValueError("an id cannot hold NUL characters")
    if not resource_id.isascii():
        try:
            resource_id.encode()
        except UnicodeEncodeError:
            raise ValueError("an id cannot hold unpaired surrogates") from None
    return resource_id


def check_new_id(resource_id: str) -> None:
    """Raise InvalidData if a storable id is too long for a new resource."""
    if len(resource_id) > MAX_ID // 4 and (size := len(resource_id.encode())) > MAX_ID:
        found = f"takes {size} bytes in UTF-8, expected at most {MAX_ID}"
        raise InvalidData(f"the id of a new resource {found}: choose a shorter one", (Violation("/id", found),))


def check_name(name: str) -> None:
    """Raise InvalidData unless every store can hold the name of a caller."""
    if not isinstance(name, str):
        raise InvalidData(f"the name of a caller is a {type(name).__name__}, expected a str")
    try:
        storable_id(name)
    except ValueError:
        raise InvalidData("the name of a caller holds NUL or an unpaired surrogate, expected text without") from None
    if len(name) > MAX_NAME // 4 and (size := len(name.encode())) > MAX_NAME:
        raise InvalidData(f"the name of a caller takes {size} bytes in UTF-8, expected at most {MAX_NAME}")


def storable_number(revision: int) -> int:
    """Return the closest revision number that every store can hold. No revision has a larger number."""
    return min(max(revision, 0), 2**62)


def missing(resource_id: str) -> ResourceNotFound:
    """Return the error for an id without a resource."""
    return ResourceNotFound(f"there is no resource {resource_id!r}")


def taken(name: str, *resource_ids: str) -> UniqueConflict:
    """Return the error for a unique value that two resources would have. `resource_ids`: their ids, if known."""
    detail = f"another resource has this {name!r}; deleted ones keep theirs until they are purged"
    conflict = UniqueConflict(detail, (Violation("/" + name.replace(".", "/"), detail),))
    conflict.field, conflict.resource_ids = name, frozenset(resource_ids)
    return conflict


def shared(model: str, name: str) -> ConfigError:
    """Return the error for a field that cannot become unique."""
    return ConfigError(
        f"model {model!r}: {name} was declared unique, but stored resources share a value; change one of them with the"
        " earlier program, or declare the field without unique=True"
    )


def not_indexed(model: str, name: str) -> ConfigError:
    """Return the error for a unique field that this program does not index."""
    return ConfigError(
        f"model {model!r}: {name} is unique in the store, but this program does not index it; index it, or stop the"
        " older program"
    )


def unknown_format(model: str, found: int, known: int) -> ConfigError:
    """Return the error for a store that a newer program wrote. `known`: the newest format that this program knows."""
    return ConfigError(
        f"model {model!r}: the store has format {found}, and this program knows formats up to {known}; start the newer"
        " program again, or restore a backup from before it"
    )


def not_kept() -> StoreUnavailable:
    """Return the error for unique fields that were activated and are no longer active.

    The store was emptied or restored after the program had called `activate_unique_fields`.
    """
    return StoreUnavailable(
        "unique fields are not kept unique here any more, was an old state restored? Start the program again"
    )


def expectation_of(change: Change) -> Expect:
    """Return the state that a change expects. Raises ConfigError if it is "any": a commit replaces a known state."""
    if change.expect == "any":
        raise ConfigError(
            f'the change of resource {change.meta.resource_id!r} expects "any", which only `apply_committed` accepts;'
            ' commit it with expect="absent" or with the Version that it replaces'
        )
    return change.expect


def check_expectation(expect: Expect, resource_id: str, found: Version | None) -> None:
    """Raise VersionConflict unless the version that was found is the expected one. `found`: None if there is none."""
    as_expected = found is None if expect == "absent" else found == expect
    if as_expected:
        return
    if found is None:
        state = f"does not exist; expected version {expect[0]}"
    elif expect == "absent":
        state = f"is at version {found.version}; expected it to be absent"
    elif expect.version < 1:
        state = (
            f"is at version {found.version}, and what was expected is no resource's ETag: those are"
            ' like "1-0123456789abcdef", without W/ before; read it again'
        )
    elif expect.version == found.version:
        state = (
            f"is at version {found.version}, but not in the expected state: the ETag is another resource's, or this"
            " one was purged and made again; read it again"
        )
    else:
        state = f"is at version {found.version}; expected version {expect.version}; read it again"
    raise VersionConflict(f"resource {resource_id!r} {state}")


def generation_of(uid: str) -> int:
    """Return the generation in which a uid was made. Raises StoreDamaged if it is no uid."""
    generation, slash, _ = uid.partition("/")
    if not slash or not generation.isdigit():
        raise StoreDamaged(f"{uid!r} is no uid")
    return int(generation)


def blob_gone(key: str) -> BlobGone:
    """Return the error for a key in a new record that has no row."""
    return BlobGone(f"there is no file with the SHA-256 {key.partition('/')[0]} any more: upload it again")


def model_not_empty(found: str) -> ModelNotEmpty:
    """Return the error for a model that has data. `found`: what it has."""
    return ModelNotEmpty(
        f"found {found} in the model, expected it to be empty; nothing was loaded: run the import again, which is"
        " done in batches then, or purge what the model has"
    )


def load_too_large(found: int, limit: int) -> LoadTooLarge:
    """Return the error for a load of too many resources and blobs."""
    return LoadTooLarge(
        f"{found} resources and files cannot be loaded in one step, at most {limit} can; nothing was changed"
    )


def pin_lost() -> PinLost:
    """Return the error for a pin that was dropped."""
    return PinLost(
        "found the pin of this export or import dropped, because it was not renewed for"
        f" {snapshots.PIN_LIFE_S:g} s; what it needs may be removed: start it again"
    )


def stale_upload(key: str) -> StaleGeneration:
    """Return the error for a new row whose content a sweep may have removed."""
    return StaleGeneration(f"the upload {key} is of an epoch that may be swept already")


def over_quota(row: BlobRow, taken: int, quota: int) -> BlobQuotaExceeded:
    """Return the error for an upload that the quota has no room for. `taken`: the size of all blobs of the model."""
    return BlobQuotaExceeded(
        f"the file takes {row.size} bytes, and the files of this model take {taken} of at most {quota} bytes: remove"
        " files that are not needed, or ask for a larger quota"
    )
