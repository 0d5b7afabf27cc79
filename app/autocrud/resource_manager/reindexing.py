"""New index entries for resources whose index was made for other fields.

Invariants:

- R1 *A failure to read removes nothing.* If a body cannot be read now (the store is unavailable, a time-out, a body that
  is cut off, cancellation), no entry is made, the error is raised, and the resource stays outdated: the next try reads
  it again.
- R2 *A resource keeps what it was found by.* If its body is lost or damaged, or does not fit the model, its entry is made
  of the data that can be read of the body, and else of the values in its old entry, field by field. So it stays in every
  search whose field it has, and holds its unique values.
- R3 *One resource keeps no model from opening.* R2 always makes an entry. Such resources are named in `degradations`.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from ..errors import ResourceNotFound, StoreDamaged
from ..query import Query, field
from .basic import IndexOf, MetaStore, Reindex, ResourceMeta, ResourceStore, Version

log = logging.getLogger("crudstack.storage")

NAMED = 10
"""How many ids of resources a sentence names."""


class Reindexing:
    """Makes the entries of one model. `name`: of the model."""

    def __init__(self, name: str, meta_store: MetaStore, resource_store: ResourceStore) -> None:
        self._name, self._meta_store, self._resource_store = name, meta_store, resource_store
        self._lost: dict[str, str] = {}  # ids of resources whose bodies cannot be read
        self._unfit: dict[str, str] = {}  # ids of resources whose data do not fit the model

    async def entries(self, outdated: Sequence[ResourceMeta], index: IndexOf) -> list[Reindex]:
        """Return an entry for each resource that is still in the given state. Raises StoreUnavailable (R1)."""
        found = [await self._entry(meta, index) for meta in outdated]
        return [entry for entry in found if entry is not None]

    def degradations(self) -> list[str]:
        """Return a sentence for each kind of resource that kept its old entry."""
        return [
            *self._sentence(self._lost, "have lost their data, and are found by what they were found by before"),
            *self._sentence(self._unfit, "have data that do not fit the model, and are indexed as far as they do"),
        ]

    def _sentence(self, ids: dict[str, str], what: str) -> list[str]:
        if not ids:
            return []
        named = ", ".join(list(ids)[:NAMED]) + (", ..." if len(ids) > NAMED else "")
        return [f"{len(ids)} resources {what}: {named}"]

    async def _entry(self, meta: ResourceMeta, index: IndexOf) -> Reindex | None:
        body: bytes | None = None
        try:
            body = await self._resource_store.get(meta.uid)
            entry = index(body, meta.encoding)
        except StoreDamaged as error:
            if body is None and await self._has_changed(meta):
                return None  # its former body may be gone
            self._note(self._lost, meta, error)
        except Exception as error:
            if body is None:
                raise  # R1
            self._note(self._unfit, meta, error)
        else:
            self._lost.pop(meta.resource_id, None)
            self._unfit.pop(meta.resource_id, None)
            return Reindex(meta.resource_id, Version(meta.version, meta.nonce), entry)
        kept = index.kept(body, meta.encoding, await self._shown(meta))
        return Reindex(meta.resource_id, Version(meta.version, meta.nonce), kept)

    def _note(self, ids: dict[str, str], meta: ResourceMeta, error: Exception) -> None:
        log.error("%s %s keeps its index entry: %s", self._name, meta.resource_id, error)
        ids[meta.resource_id] = type(error).__name__

    async def _has_changed(self, meta: ResourceMeta) -> bool:
        try:
            now = await self._meta_store.get(meta.resource_id)
        except ResourceNotFound:
            return True
        return (now.version, now.nonce) != (meta.version, meta.nonce)

    async def _shown(self, meta: ResourceMeta) -> bytes:
        """Return the indexed fields of the resource's present entry, as JSON."""
        where: Any = field("meta.resource_id").eq(meta.resource_id)
        page = await self._meta_store.search(Query(where=where, limit=1, include_deleted=True).resolve({}))
        return page.items[0].shown if page.items else b"{}"
