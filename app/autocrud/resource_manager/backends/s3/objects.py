"""The values that pass to and from an object store, and the counts of its requests."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from contextvars import ContextVar
from datetime import datetime
from types import MappingProxyType
from typing import Final, NamedTuple

REQUESTS: ContextVar[Counter[str] | None] = ContextVar("crudstack-requests", default=None)
"""Counts the S3 requests of the current task by method, if it is set. If commits share a swap, it counts for one of
them."""


CACHED: ContextVar[Counter[str] | None] = ContextVar("crudstack-cached", default=None)
"""Counts the `hits` and `misses` of the current task in caches of bodies, if it is set."""


def count(method: str) -> None:
    """Count a request of the current task in REQUESTS."""
    counter = REQUESTS.get()
    if counter is not None:
        counter[method] += 1


class Object(NamedTuple):
    """The body and the ETag of an object."""

    body: bytes
    etag: str


class Listed(NamedTuple):
    """An entry of a listing. `size` is in bytes, `modified` is the clock of the server."""

    key: str
    size: int
    modified: datetime


class Head(NamedTuple):
    """The properties of an object.

    size      in bytes
    modified  the clock of the server
    sha256    of the content, in hex; None if it was not asked for, or if the server does not know it
    """

    size: int
    etag: str
    modified: datetime
    sha256: str | None = None


class Signed(NamedTuple):
    """Parts of a request that a presigned URL fixes.

    query    parameters of the URL besides those of the signature, for example `response-content-type`
    headers  headers that the request must have, with these values
    """

    query: Mapping[str, str] = MappingProxyType({})
    headers: Mapping[str, str] = MappingProxyType({})


class Stored(NamedTuple):
    """The conditional PUT took effect. `version` is the id of the new version, if the bucket keeps versions."""

    etag: str
    version: str | None = None


class NotStored(NamedTuple):
    """The condition did not hold (409, 412), or there is no such object (404).

    If no client and no proxy repeated the request, nothing was stored.
    """


class Unknown(NamedTuple):
    """There was no answer, or one that does not tell the outcome. The body may be stored now or later."""

    reason: str


class Unchanged(NamedTuple):
    """The object still has the given ETag (304)."""


UNCHANGED: Final = Unchanged()
Outcome = Stored | NotStored | Unknown
