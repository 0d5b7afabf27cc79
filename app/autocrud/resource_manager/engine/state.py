"""The state of a resource while it is read or planned: its metadata and, once read, its data."""

from __future__ import annotations

from typing import Any

from msgspec import Struct

from ...errors import CrudError, ResourceDeleted
from ...query import Filter
from ..basic import IStorage, ResourceMeta
from ..model.codec import Codec
from ..model.verification import Verifier
from .access_filter import matches


class ResourceState(Struct):
    """A resource as it is stored, or as planned operations leave it.

    meta   its metadata
    json   its current data, None until it is read
    write  the position of the planned write that leaves this state, None if no write does
    """

    meta: ResourceMeta
    json: bytes | None = None
    write: int | None = None


class StateReader:
    """Reads the data of states, and compares states with filters."""

    def __init__(self, storage: IStorage, codec: Codec[Any]) -> None:
        self._storage, self._codec = storage, codec
        self.verifier = Verifier(codec, verified=storage.verified)

    async def json(self, state: ResourceState) -> bytes:
        """Return the data of a state, and keep it in the state.

        Raises StoreDamaged if the body is missing or is not the one that was stored.
        """
        if state.json is None:
            body = await self._storage.body(state.meta.uid)
            state.json = await self.verifier.read(state.meta, body)
        return state.json

    async def matches(self, where: Filter | None, state: ResourceState) -> bool:
        """Return whether a resolved filter finds a resource in this state. None finds every resource.

        Reads the data only if the filter names a field of the data. Raises StoreDamaged if it cannot be read.
        """
        return await matches(where, state.meta, lambda: self.json(state), self._codec)


def deleted(resource_id: str) -> CrudError:
    """Return the error for a resource that is deleted."""
    return ResourceDeleted(f"resource {resource_id!r} is deleted; restore it first")
