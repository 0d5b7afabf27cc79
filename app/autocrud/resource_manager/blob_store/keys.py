"""Keys of blobs, and the errors of reading them, as all BlobStores of this package need them."""

from __future__ import annotations

from ...errors import StoreDamaged
from ..basic import BLOB_KEY


def key_of(sha256: str, uid: str) -> str:
    """Return the key of a new blob. Raises ValueError if the uid is none of a blob."""
    key = f"{sha256}/{uid}"
    if BLOB_KEY.fullmatch(key) is None:
        raise ValueError(f"{uid!r} is no uid of a blob: expected an epoch, a dash and 32 hex digits")
    return key


def stop_of(key: str, size: int, start: int, end: int | None) -> int:
    """Return the position where the reading of a blob of `size` bytes ends. Raises StoreDamaged if it is too short."""
    if end is None:
        return size
    if start < end and size < end:
        raise too_short(key, size, end)
    return end


def missing(key: str) -> StoreDamaged:
    """Return the error of a read of a blob that is not there."""
    return StoreDamaged(f"the blob {key} is missing")


def too_short(key: str, size: int, end: int) -> StoreDamaged:
    """Return the error of a read of a blob that ends too early."""
    return StoreDamaged(f"the blob {key} has {size} bytes, expected at least {end}")
