"""New index entries for resources whose index was made for other fields, or was lost.

Invariants:

- R1 *A failure to read removes nothing.* If a body cannot be read now (the store is unavailable, a time-out, a body that
  is cut off, cancellation), no entry is made, the error is raised, and the resource stays outdated: the next try reads
  it again.
- R2 *A resource keeps what it was found by.* If its body is lost or damaged, or does not fit the model, its entry is made
  of the data that can be read of the body, and else of the values in its old entry, field by field. So it stays in every
  search whose field it has, and holds its unique values.
- R3 *One resource keeps no model from opening.* R2 always makes an entry. Such resources are named in `degradations`.
- R4 *What earlier programs dropped comes back.* They took any failure to read for a lost body, and left an entry with
  nothing in it, which counted as made. Once in the life of a store all such entries are made again from their bodies;
  `Findings.healed` in the store says that it was done. Its value of a unique field may have been given to another
  resource since. Then both keep it, nobody may write it any more, and `Findings.shared` names the one that came back.

- R5 *No size is refused.* `limits` are for new data. Stored data that is larger is indexed whole, by every store alike, so
  that it is found by everything, and its values of unique fields are unique. Large entries go to the store a few at a
  time, so that no transaction carries much more than CHUNK.

`Findings` stay in the store, so that a restart does not forget what it has to say. `maintain` looks again at the
resources in them, and drops those that are in order.
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
from ..contract.store_errors import shared
from ..model.verification import is_sound

log = logging.getLogger("crudstack.storage")

PAGE = 200
MAX_ROUNDS = 50
"""How often the index is completed again because an older program was faster."""
NAMED = 10
"""How many ids of resources a sentence names."""
KEPT = 100
"""How many ids of each kind the store keeps. All are in the log."""
CHUNK = 1024 * 1024
"""Bytes of indexed fields, as JSON, that are enough for one transaction."""
CONDITIONS = 8
"""Fields that an empty entry is searched by; whether it is empty is seen when it is found."""
EMPTY = b"{}"
SHARED = (
    "have a value of a unique field that another one has too, as an earlier program had lost their index entries; nobody"
    " can write such a value; the log names them: change or purge one of the two"
)


class Reindexing:
    """Makes the entries of one model."""

    def __init__(self, spec: ModelSpec, meta_store: MetaStore, resource_store: ResourceStore) -> None:
        self._spec, self._meta_store, self._resource_store = spec, meta_store, resource_store
        self._lost: dict[str, None] = {}  # ids of resources whose bodies cannot be read
        self._shared: dict[str, None] = {}  # ids of resources with a unique value that another one has
        self._unfit: dict[
            str, None
        ] = {}  # ids of resources whose data do not fit the model; another program may differ

    async def open(self, index: IndexOf) -> None:
        """Bring every entry up to the bound fields. Raises StoreUnavailable (R1), ConfigError."""
        found = await self._meta_store.findings()
        self._load(found)
        for attempt in range(MAX_ROUNDS):
            while outdated := await self._meta_store.outdated(PAGE):
                await self._reindex(outdated, index, share=not (found.healed or attempt))
            if await self._meta_store.indexed():
                break
            if attempt:
                await self._meta_store.indexed(force=True)
        else:
            raise StoreUnavailable("an older program writes so much that the index cannot be completed; stop it")
        if not found.healed:
            await self._heal(index)
        await self._keep(found)

    async def step(self, index: IndexOf) -> bool:
        """Index some of what an older program has written since. False: there was nothing."""
        outdated = await self._meta_store.outdated(PAGE)
        if outdated:
            found = await self._meta_store.findings()
            await self._reindex(outdated, index)
            await self._keep(found)
        return bool(outdated)

    async def look_again(self, index: IndexOf) -> None:
        """Drop from the findings what is in order by now: a body came back, a value was changed, a resource is gone."""
        found = await self._meta_store.findings()
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
                await self._meta_store.reindex(entries)
            except UniqueConflict:
                self._shared[resource_id] = None
            else:
                self._shared.pop(resource_id, None)
        await self._keep(found)

    def degradations(self) -> list[str]:
        """Return a sentence for each kind of resource that is not as it should be."""
        told = [
            (self._lost, f"have lost their data, and are found by what they were found by before: {_some(self._lost)}"),
            (self._shared, SHARED),
            (
                self._unfit,
                f"have data that do not fit the model, and are indexed as far as they do: {_some(self._unfit)}",
            ),
        ]
        return [f"{len(ids)} resources {what}" for ids, what in told if ids]

    def _load(self, found: Findings) -> None:
        if new := [resource_id for resource_id in found.shared if resource_id not in self._shared]:
            log.warning("%s %s: another resource has a value of a unique field too", self._spec.name, ", ".join(new))
        self._lost |= dict.fromkeys(found.lost)
        self._shared |= dict.fromkeys(found.shared)

    async def _keep(self, found: Findings) -> None:
        """Store what was found, if it is not stored. `found`: what is stored."""
        now = Findings(healed=True, lost=tuple(self._lost)[:KEPT], shared=tuple(self._shared)[:KEPT])
        if now != found:
            await self._meta_store.keep_findings(now)

    async def _reindex(self, outdated: Sequence[ResourceMeta], index: IndexOf, *, share: bool = False) -> None:
        async for entries in self._chunks(outdated, index):
            try:
                await self._meta_store.reindex(entries)
            except UniqueConflict as error:
                if not share:
                    await self._meta_store.give_up(error.field)
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
                # Others had nothing to be found by.
                if entries := [entry for entry in chunk if entry.entry.shown != EMPTY]:
                    try:
                        await self._meta_store.reindex(entries)
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
                await self._meta_store.reindex([entry])
            except UniqueConflict as error:
                await self._meta_store.reindex([entry], share=True)
                self._shared[entry.resource_id] = None
                log.error("%s %s: another resource has its %s too", self._spec.name, entry.resource_id, error.field)

    async def _entries(self, outdated: Sequence[ResourceMeta], index: IndexOf) -> list[Reindex]:
        """Return an entry for each resource that is still in the given state. Raises StoreUnavailable (R1)."""
        return [entry async for chunk in self._chunks(outdated, index) for entry in chunk]

    async def _chunks(self, outdated: Sequence[ResourceMeta], index: IndexOf) -> AsyncIterator[list[Reindex]]:
        """Yield the entries of `_entries`, none in vain, in lists that end once they hold CHUNK bytes (R5)."""
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
                body = None  # nobody may be found by what somebody else wrote there
                raise StoreDamaged("its body is not what was stored")
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
