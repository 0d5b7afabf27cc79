"""Who asks the ResourceManager, under which Idempotency-Key, and within which bounds.

caller = Caller("alice", key=IdempotencyKey("order-17"))
await manager.create(Order(...), by=caller)
"""

from __future__ import annotations

import datetime as dt
import hashlib
from collections.abc import Sequence
from typing import NamedTuple

from ...values import datetime_key
from ..basic import IdempotentCommit, Write
from .access_filter import AccessFilter
from .operations import Operation, Purge
from .planning import ResourceState


class IdempotencyKey:
    """A name for one request to write, so that asking again after an unknown outcome does it once: the first answer comes again for a day.

    `request` says what is asked, as any text: the key with another one raises KeyReused. `replayed` tells afterwards whether the answer
    is that of an earlier request.
    """

    __slots__ = ("key", "replayed", "request")

    def __init__(self, key: str, request: str = "") -> None:
        self.key, self.request, self.replayed = key, request, False


class Caller(NamedTuple):
    """The name stands in created_by and updated_by; `key` makes a write happen once; without bounds everything is allowed."""

    name: str
    key: IdempotencyKey | None = None
    access_filter: AccessFilter | None = None

    def hashed_key(self) -> HashedKey | None:
        """The key for stores: with the caller in it, so that nobody meets another's."""
        if self.key is None:
            return None
        return HashedKey(_sha256(f"{len(self.name)}:{self.name}{self.key.key}"), _sha256(self.key.request))


class HashedKey(NamedTuple):
    key: str
    request: str

    def once(
        self,
        operations: Sequence[Operation],
        states: Sequence[ResourceState],
        writes: Sequence[Write],
        now: dt.datetime,
    ) -> IdempotentCommit:
        """What a commit carries: for each operation the change that it made, or what it found where it made none."""
        numbers = {id(write.change.meta): at for at, write in enumerate(writes)}
        results = tuple(
            None if isinstance(operation, Purge) else numbers.get(id(state.meta), state.meta)
            for operation, state in zip(operations, states, strict=True)
        )
        return IdempotentCommit(key=self.key, request=self.request, time=datetime_key(now), results=results)


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
