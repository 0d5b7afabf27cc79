"""The caller of a ResourceManager: a name, an Idempotency-Key, and the resources that it may read and change.

caller = Caller("alice", key=IdempotencyKey("order-17"))
await manager.create(Order(...), by=caller)
"""

from __future__ import annotations

import datetime as dt
import hashlib
from collections.abc import Sequence
from typing import NamedTuple

from ...values import datetime_key
from ..basic import IdempotentCommit
from .access_filter import AccessFilter
from .operations import Operation, Purge
from .state import ResourceState


class IdempotencyKey:
    """A name that a client gives to one write request, so that a retry after an unknown outcome does not write twice.

    For at least a day, a request with the same key gets the answer of the first one.

    key      chosen by the client; keys of different callers are different
    request  a text that identifies what is requested; the same key with another text raises KeyReused

    After the write, `replayed` is True if the answer is that of an earlier request.
    """

    __slots__ = ("key", "replayed", "request")

    def __init__(self, key: str, request: str = "") -> None:
        self.key, self.request, self.replayed = key, request, False


class Caller(NamedTuple):
    """The caller of a ResourceManager.

    name           stored in created_by and updated_by
    key            makes a write idempotent; None: a retry writes again
    access_filter  the resources that the caller may read and change; None: all
    """

    name: str
    key: IdempotencyKey | None = None
    access_filter: AccessFilter | None = None

    def hashed_key(self) -> HashedKey | None:
        """Return the key as stores keep it, or None if there is none. The hash covers the caller's name too."""
        if self.key is None:
            return None
        return HashedKey(_sha256(f"{len(self.name)}:{self.name}{self.key.key}"), _sha256(self.key.request))


class HashedKey(NamedTuple):
    """The SHA-256 of an IdempotencyKey and its caller, and the SHA-256 of its request."""

    key: str
    request: str

    def commit_of(
        self, operations: Sequence[Operation], states: Sequence[ResourceState], now: dt.datetime
    ) -> IdempotentCommit:
        """Return the record of this key that is stored with the commit of its operations.

        For each operation the record has the position of the planned write, the metadata that was found if the
        operation changes nothing, or None for a purge.
        """
        results = tuple(
            None if isinstance(operation, Purge) else state.meta if state.write is None else state.write
            for operation, state in zip(operations, states, strict=True)
        )
        return IdempotentCommit(key=self.key, request=self.request, time=datetime_key(now), results=results)


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
