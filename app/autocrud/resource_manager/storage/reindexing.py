"""New index entries for resources whose entry was made for other indexed fields, or was lost.

Invariants:

- R1 *A failure to read removes nothing.* A body may be unreadable for now: the store is unavailable, the read times
  out, the body is cut off, or the caller cancels. Then no entry is made and the error is raised. The resource stays
  outdated, so the next attempt reads it again.
- R2 *A resource stays in the searches that found it.* If its body is lost, damaged or does not fit the model, its new
  entry takes each field from the body if it can be read there, and from the old entry if not. So the resource also
  keeps its unique values.
- R3 *No single resource prevents a model from opening.* R2 always makes an entry. `degradations` names such resources.
- R4 *Entries that earlier versions of this program dropped are made again.* Those versions treated each failed read as
  a lost body, and left an empty entry that counted as complete. The first open by this version makes all empty entries
  again from their bodies, and stores `Findings.healed`. If another resource has taken a unique value meanwhile, both
  resources keep it, every write of this value is refused, and `Findings.shared` names the resource that came back.
- R5 *No stored size is refused.* `limits` are for new data. Larger stored data is indexed whole, by every store alike,
  so that each search finds it and its unique values stay unique. Large entries go to the store in small groups, so
  that no transaction carries much more than CHUNK bytes.

`Findings` are kept in the store, so that they survive a restart. `maintain` looks again at the resources in them, and
drops the resources that are in order.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Collection, Sequence
from functools import reduce
from operator import and_
from typing import Any

from msgspec.structs import replace

from ...errors import ResourceNotFound, StoreDamaged, StoreUnavailable, UniqueConflict
from ...query import MAX_LIMIT, Query, field
from ..basic import Findings, IndexOf, MetaStore, ModelSpec, Reindex, ResourceMeta, ResourceStore, Version
from ..contract.protocols import FindingsKeeping, IndexMigration
from ..contract.store_errors import shared
from ..model.verification import is_sound

log = logging.getLogger("crudstack.storage")

PAGE = 200
MAX_ROUNDS = 50
"""How often the index is completed again because an older version of the program wrote meanwhile."""
NAMED = 10
"""How many ids of resources one sentence of `degradations` names."""
KEPT = 100
"""How many ids of each finding the store keeps. The log names all of them."""
CHUNK = 1024 * 1024
"""A transaction takes no more entries once their indexed fields have this many bytes as JSON."""
CONDITIONS = 8
"""Largest number of fields in the query for empty entries. The whole entry of each hit is then checked."""
EMPTY = b"{}"
SHARED = (
    "have a value of a unique field that another one has too, because an earlier program lost their index entries;"
    " writes of such a value are refused; the log names them: change or purge one of the two"
)


class Reindexing:
    """Makes the index entries of one model."""

    def __init__(
        self,
        spec: ModelSpec,
        meta_store: MetaStore,
        resource_store: ResourceStore,
        *,
        migration: IndexMigration,
        findings: FindingsKeeping | None,
    ) -> None:
        self._spec, self._meta_store, self._resource_store = spec, meta_store, resource_store
        self._migration, self._findings = migration, findings
        # Ids of resources, as ordered sets.
        self._lost: dict[str, None] = {}  # their bodies cannot be read
        self._shared: dict[str, None] = {}  # another resource has one of their unique values
        self._unfit: dict[str, None] = {}  # their data do not fit this model; the model of another program may differ

    async def open(self, index: IndexOf) -> None:
        """Make again every entry that was made for other indexed fields than those of the bound model.

        Raises StoreUnavailable if a body cannot be read now (R1), and ConfigError if a field cannot be unique because
        stored resources share a value.
        """
        found = await self._found()
        self._load(found)
        for attempt in range(MAX_ROUNDS):
            while outdated := await self._migration.outdated(PAGE):
                await self._reindex(outdated, index, share=not (found.healed or attempt))
            if await self._migration.activate_unique_fields():
                break
            if attempt:
                await self._migration.activate_unique_fields(force=True)
        else:
            raise StoreUnavailable("an older program writes so much that the index cannot be completed; stop it")
        if not found.healed:
            await self._heal(index)
        await self._keep(found)

    async def step(self, index: IndexOf) -> bool:
        """Index some resources that an older program has written since. Return False if there were none."""
        outdated = await self._migration.outdated(PAGE)
        if outdated:
            found = await self._found()
            await self._reindex(outdated, index)
            await self._keep(found)
        return bool(outdated)

    async def look_again(self, index: IndexOf) -> None:
        """Drop resources that are in order from the findings.

        A body may have come back, a shared value may have changed, or the resource may have been purged.
        """
        found = await self._found()
        self._load(found)
        for resource_id in [*self._lost, *self._shared]:
            try:
                meta = await self._meta_store.get(resource_id)
            except ResourceNotFound:
                self._lost.pop(resource_id, None)
                self._shared.pop(resource_id, None)
                continue
            entries = await self._entries([meta], index)
            if resource_id in self._lost or not entries:
                continue
            try:
                await self._migration.reindex(entries)
            except UniqueConflict:
                self._shared[resource_id] = None
            else:
                self._shared.pop(resource_id, None)
        await self._keep(found)

    def degradations(self) -> list[str]:
        """Return a sentence for each kind of problem that some resource has."""
        told = [
            (self._lost, f"have lost their data, and keep their former index entries: {_some(self._lost)}"),
            (self._shared, SHARED),
            (
                self._unfit,
                f"have data that do not fit the model, and are indexed by the fields that do: {_some(self._unfit)}",
            ),
        ]
        return [f"{len(ids)} resources {what}" for ids, what in told if ids]

    async def _found(self) -> Findings:
        return Findings(healed=True) if self._findings is None else await self._findings.findings()

    def _load(self, found: Findings) -> None:
        if new := [resource_id for resource_id in found.shared if resource_id not in self._shared]:
            log.warning("%s %s: another resource has a value of a unique field too", self._spec.name, ", ".join(new))
        self._lost |= dict.fromkeys(found.lost)
        self._shared |= dict.fromkeys(found.shared)

    async def _keep(self, found: Findings) -> None:
        """Store the findings if they differ from `found`, the stored ones."""
        now = Findings(healed=True, lost=tuple(self._lost)[:KEPT], shared=tuple(self._shared)[:KEPT])
        if now != found and self._findings is not None:
            await self._findings.keep_findings(now)

    async def _reindex(self, outdated: Sequence[ResourceMeta], index: IndexOf, *, share: bool = False) -> None:
        async for entries in self._chunks(outdated, index):
            try:
                await self._migration.reindex(entries)
            except UniqueConflict as error:
                if not share:
                    await self._migration.deactivate_unique_field(error.field)
                    raise shared(self._spec.name, error.field) from None
                await self._share(entries)

    async def _heal(self, index: IndexOf) -> None:
        """Make the entries again that earlier programs dropped (R4)."""
        if not self._spec.fields:
            return
        single = [name for name, kind in self._spec.fields.items() if not kind.is_list]
        where = reduce(and_, [field(name).exists(False) for name in single[:CONDITIONS]]) if single else None
        query = Query(where=where, limit=MAX_LIMIT, include_deleted=True).resolve(self._spec.fields)
        after, healed = None, 0
        while True:
            page = await self._meta_store.search(replace(query, after=after))
            emptied = [hit.meta for hit in page.items if hit.shown == EMPTY]
            async for chunk in self._chunks(emptied, index):
                # An entry without any field is right if its resource has none of the indexed fields.
                if entries := [entry for entry in chunk if entry.entry.shown != EMPTY]:
                    try:
                        await self._migration.reindex(entries)
                    except UniqueConflict:
                        await self._share(entries)
                    healed += len(entries)
            if (after := page.next) is None:
                break
        if healed:
            log.warning("%s: %d resources had lost their index entries, and are found again", self._spec.name, healed)

    async def _share(self, entries: Sequence[Reindex]) -> None:
        for entry in entries:
            try:
                await self._migration.reindex([entry])
            except UniqueConflict as error:
                await self._migration.reindex([entry], share=True)
                self._shared[entry.resource_id] = None
                log.error("%s %s: another resource has its %s too", self._spec.name, entry.resource_id, error.field)

    async def _entries(self, outdated: Sequence[ResourceMeta], index: IndexOf) -> list[Reindex]:
        """Return an entry for each resource that is still in the given state. Raises the error of a read (R1)."""
        return [entry async for chunk in self._chunks(outdated, index) for entry in chunk]

    async def _chunks(self, outdated: Sequence[ResourceMeta], index: IndexOf) -> AsyncIterator[list[Reindex]]:
        """Yield the entries of `_entries` in non-empty lists. Each list ends once it holds CHUNK bytes (R5)."""
        chunk: list[Reindex] = []
        size = 0
        for meta in outdated:
            entry = await self._entry(meta, index)
            if entry is not None:
                chunk.append(entry)
                size += len(entry.entry.shown)
            if size >= CHUNK:
                yield chunk
                chunk, size = [], 0
        if chunk:
            yield chunk

    async def _entry(self, meta: ResourceMeta, index: IndexOf) -> Reindex | None:
        body: bytes | None = None
        try:
            body = await self._resource_store.get(meta.uid)
            if self._resource_store.verified and not is_sound(meta, body):
                body = None  # written by another program or person: no search may find the resource by it
                raise StoreDamaged("its body is not what was stored")
            entry = index(body, meta.encoding)
        except StoreDamaged as error:
            if body is None and await self._has_changed(meta):
                return None  # a newer state has another body, and this one may have been removed
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

    def _note(self, ids: dict[str, None], meta: ResourceMeta, error: Exception) -> None:
        if meta.resource_id not in ids:
            log.error("%s %s keeps its index entry: %s", self._spec.name, meta.resource_id, error)
        ids[meta.resource_id] = None

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
        return page.items[0].shown if page.items else EMPTY


def _some(ids: Collection[str]) -> str:
    return ", ".join(list(ids)[:NAMED]) + (", ..." if len(ids) > NAMED else "")
