"""The blobs that the data of a write refers to: whether the caller may use them, and under which keys.

- G1 *Knowing a hash gives no access.* A reference is accepted only if the record that the write replaces names such a
  blob, if the caller uploaded one, or if a revision that the caller may read refers to one. Any other reference is
  refused with the error of a hash that no blob has.
- G2 *A record names exactly one key for each hash in its data.* Planning chooses it. The commit refuses a key whose row
  is gone meanwhile; then the write is planned again, because another row with the same hash may serve.
- G3 *Sizes are those of the store.* Each reference gets the size of the row, before the data is hashed and stored.
"""

from __future__ import annotations

from typing import Any, Generic, TypeVar

from ...errors import BlobGone, ResourceNotFound, StoreDamaged, Violation
from ..basic import BlobRow, IStorage, RevisionInfo, owner_of
from ..contract.blobs import Blobs
from ..model.blob_references import MAX_VIOLATIONS, BlobReference
from ..model.codec import Codec, ModelData
from ..runtime.deadline import check_time
from ..runtime.threads import heavy
from .access_filter import AccessFilter
from .state import ResourceState, StateReader

T = TypeVar("T")

MAX_USES = 100
"""Largest number of resources that refer to one blob and are looked at, until one is found that the caller may read."""
MAX_CHECKS = 1000
"""Largest number of resources that are read for all references of one write."""


class References(Generic[T]):
    """Chooses the keys of the blobs that data refers to."""

    def __init__(self, blobs: Blobs, storage: IStorage, codec: Codec[T], states: StateReader) -> None:
        self._blobs, self._storage, self._codec, self._states = blobs, storage, codec, states

    async def of(self, model_data: ModelData[T]) -> list[BlobReference]:
        """Return the references in data."""
        codec, data, json = self._codec, model_data.data, model_data.json
        return await heavy(len(json), lambda: codec.references(data), json)

    async def resolved(
        self,
        model_data: ModelData[T],
        references: list[BlobReference],
        replaced: RevisionInfo | None,
        *,
        by: str,
        access_filter: AccessFilter | None,
    ) -> tuple[ModelData[T], tuple[str, ...]]:
        """Return the data with the sizes of the store, and the keys of its blobs, ascending.

        references     the references in the data
        replaced       the record of the revision that the write replaces; None for a creation
        by             the name of the caller
        access_filter  the resources that the caller may read; None: all

        Raises BlobGone with the position of each reference that is refused.
        """
        sha256s = sorted({reference.blob.sha256 for reference in references})
        rows: dict[str, list[BlobRow]] = {sha256: [] for sha256 in sha256s}
        for row in await self._blobs.rows(sha256s):
            rows[row.sha256].append(row)
        named = frozenset(() if replaced is None else replaced.blobs)
        readable = _Readable(self._blobs, self._storage, self._states, access_filter)
        chosen: dict[str, BlobRow] = {}
        for sha256, candidates in rows.items():
            best = await _choose(candidates, named, owner_of(by), readable)
            if best is not None:
                chosen[sha256] = best
        if len(chosen) < len(rows):
            raise _gone([reference.pointer for reference in references if reference.blob.sha256 not in chosen])
        codec, sizes, json = self._codec, {sha256: row.size for sha256, row in chosen.items()}, model_data.json
        sized = await heavy(len(json), lambda: codec.with_sizes(model_data, sizes), json)
        return sized, tuple(sorted(row.key for row in chosen.values()))


async def _choose(rows: list[BlobRow], named: frozenset[str], owner: str, readable: _Readable) -> BlobRow | None:
    """Return the row that a reference uses, or None if the caller may use none of them (G1).

    Of the caller's own rows, the newest is chosen: if no record names it, a sweep removes it last.
    """
    for row in rows:
        if row.key in named:
            return row
    for row in reversed(rows):
        if row.owner == owner:
            return row
    for row in rows:
        if await readable.refers_to(row.key):
            return row
    return None


class _Readable:
    """The revisions that a caller may read. Looks at up to MAX_CHECKS resources."""

    def __init__(
        self, blobs: Blobs, storage: IStorage, states: StateReader, access_filter: AccessFilter | None
    ) -> None:
        self._blobs, self._storage, self._states = blobs, storage, states
        self._reads = access_filter is None or "read" in access_filter.change
        self._filter = None if access_filter is None else access_filter.change.get("read")
        self._left = MAX_CHECKS

    async def refers_to(self, key: str) -> bool:
        """Return whether one of these revisions refers to a blob. A deleted resource counts, because it can be read."""
        if not self._reads:
            return False
        uses = await self._blobs.uses(key, MAX_USES)
        if self._filter is None:
            return bool(uses)
        for use in uses:
            if self._left == 0:
                return False
            self._left -= 1
            check_time()
            try:
                state = ResourceState(await self._storage.get(use.resource_id))
                if await self._states.matches(self._filter, state):
                    return True
            except (ResourceNotFound, StoreDamaged):
                continue  # it was purged or changed meanwhile, or cannot be read
        return False


def _gone(pointers: list[str]) -> BlobGone:
    detail = "expected the SHA-256 of a file that you uploaded to this model, or that a resource you may read has"
    violations: Any = tuple(Violation(f"{pointer}/sha256", detail) for pointer in pointers[:MAX_VIOLATIONS])
    what, them = ("a file that does", "it") if len(pointers) == 1 else (f"{len(pointers)} files that do", "them")
    return BlobGone(f"the data refer to {what} not exist; upload {them} first", violations)
