"""A MetaStore of dicts."""

from __future__ import annotations

import asyncio
import heapq
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from typing import Any, ClassVar, TypeVar, cast

from msgspec import Struct
from msgspec.structs import replace
from typing_extensions import override

from app.autocrud.errors import RevisionNotFound, StaleGeneration, UniqueConflict
from app.autocrud.query import META_FIELDS, Query, Sort, truth
from app.autocrud.resource_manager.basic import (
    KEEP_KEYS_US,
    AlreadyCommitted,
    Change,
    CommitResult,
    Hit,
    IdempotentCommit,
    IndexEntry,
    MetaStore,
    ModelSpec,
    Page,
    Reindex,
    ResourceMeta,
    RevisionInfo,
    Version,
)
from app.autocrud.resource_manager.contract.idempotency import results_to_keep
from app.autocrud.resource_manager.contract.protocols import IndexMigration, MetaSweeping, RecordReplay
from app.autocrud.resource_manager.contract.store_errors import (
    check_expectation,
    expectation_of,
    generation_of,
    missing,
    not_indexed,
    shared,
    storable_id,
    taken,
)
from app.autocrud.values import Key

T = TypeVar("T")


class Row(Struct, frozen=True):
    """A resource.

    meta     its metadata
    records  its records by number of revision
    entry    its index entry
    kinds    the indexed fields for which the entry was made, with the names of their kinds
    """

    meta: ResourceMeta
    records: dict[int, RevisionInfo]
    entry: IndexEntry
    kinds: dict[str, str]

    @property
    def version(self) -> Version:
        return Version(self.meta.version, self.meta.nonce)


class Kept(Struct, frozen=True):
    """The results of a commit that carried an Idempotency-Key."""

    request: str
    time: int
    results: list[ResourceMeta | None]

    @property
    def done(self) -> CommitResult:
        return CommitResult(self.request, list(self.results))


class State(Struct):
    """All data of a model. A state that readers can see never changes."""

    rows: dict[str, Row] = {}
    done: dict[str, Kept] = {}
    generation: int = 0
    unique: set[str] = set()

    def copy(self) -> State:
        return State(dict(self.rows), dict(self.done), self.generation, set(self.unique))


class DictMetaStore(MetaStore, IndexMigration, MetaSweeping, RecordReplay):
    """Metadata, records and index in this process's memory.

    Above a ResourceStore that keeps records, it applies the records, and is filled from them at each start.

    Each commit changes a copy of the state, and then replaces the state by the copy in one step. So a commit happens as
    a whole or not at all, and readers need no lock.
    """

    authoritative: ClassVar[bool] = False

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.bind(ModelSpec("unbound"))

    @override
    def bind(self, spec: ModelSpec) -> None:
        self._spec = spec
        self._kinds = {name: kind.name for name, kind in spec.fields.items()}
        self._state = State()

    # FileMetaStore overrides these three methods

    async def _now(self) -> State:
        return self._state

    async def _write(self, work: Callable[[State], T]) -> T:
        return self._replace(work)

    def _replace(self, work: Callable[[State], T]) -> T:
        """Change a copy of the state, and put it in place of the state unless `work` raises."""
        with self._lock:
            state = self._state.copy()
            result = work(state)
            self._state = state
            return result

    # Writing

    @override
    async def commit(self, changes: Sequence[Change], once: IdempotentCommit | None = None) -> list[ResourceMeta]:
        def work(state: State) -> list[ResourceMeta]:
            if once is not None and (kept := state.done.get(once.key)) is not None:
                raise AlreadyCommitted(kept.done)
            committed = [self._apply(state, change) for change in changes]
            self._check_unique(state)
            if once is not None:
                self._remember(state, once, changes, committed)
            return committed

        return await self._write(work)

    def _apply(self, state: State, change: Change, *, decided: bool = False) -> ResourceMeta:
        meta, record = change.meta, change.record
        row = state.rows.get(storable_id(meta.resource_id))
        if not decided:
            check_expectation(expectation_of(change), meta.resource_id, None if row is None else row.version)
            if record is not None and generation_of(record.uid) < state.generation - 1:
                check_kept(row, record.uid)
        if change.purge:
            state.rows.pop(meta.resource_id, None)
            for key, kept in state.done.items():  # that they were used stays known, what they left does not
                left = [one if one is None or one.resource_id != meta.resource_id else None for one in kept.results]
                state.done[key] = replace(kept, results=left)
            return meta
        records = {} if row is None else {n: kept for n, kept in row.records.items() if kept.uid not in change.drop}
        if record is not None:
            records[record.revision] = record
        if change.index is not None:
            entry, kinds = change.index, self._kinds
        elif row is not None:
            entry, kinds = row.entry, row.kinds
        else:
            entry, kinds = IndexEntry({}, (), b"{}"), {}  # made for no fields, so `outdated` will name it
        state.rows[meta.resource_id] = Row(meta, records, entry, kinds)
        return meta

    def _check_unique(self, state: State) -> None:
        """Raise UniqueConflict if two rows share a value of a field that every program keeps unique."""
        for name in state.unique:
            if name not in self._kinds:
                raise not_indexed(self._spec.name, name)
            seen: set[Any] = set()
            for row in state.rows.values():
                key = row.entry.keys.get(name)
                if key is not None and key in seen:
                    raise taken(name)
                seen.add(key)

    def _remember(
        self, state: State, once: IdempotentCommit, changes: Sequence[Change], committed: Sequence[ResourceMeta]
    ) -> None:
        results = [
            committed[result] if isinstance(result, int) else result
            for result in results_to_keep(once, [(change.meta.resource_id, change.purge) for change in changes])
        ]
        state.done = {key: kept for key, kept in state.done.items() if kept.time >= once.time - KEEP_KEYS_US}
        state.done[once.key] = Kept(once.request, once.time, results)

    # Reading

    @override
    async def done(self, key: str, *, peek: bool = False) -> CommitResult | None:
        kept = (await self._now()).done.get(key)
        return None if kept is None else kept.done

    @override
    async def get(self, resource_id: str) -> ResourceMeta:
        row = (await self._now()).rows.get(resource_id)
        if row is None:
            raise missing(resource_id)
        return row.meta

    @override
    async def revision(self, resource_id: str, revision: int) -> RevisionInfo:
        row = (await self._now()).rows.get(resource_id)
        if row is None or revision not in row.records:
            raise RevisionNotFound(f"resource {resource_id!r} has no revision {revision}")
        return row.records[revision]

    @override
    async def revisions(self, resource_id: str, before: int | None = None, limit: int = 50) -> Page[RevisionInfo]:
        row = (await self._now()).rows.get(resource_id)
        records = {} if row is None else row.records
        numbers = sorted((number for number in records if before is None or number < before), reverse=True)
        items = [records[number] for number in numbers[:limit]]
        return Page(items, items[-1].revision if len(numbers) > limit else None)

    @override
    async def search(self, query: Query) -> Page[Hit]:
        return await asyncio.to_thread(
            self._page, await self._now(), query
        )  # in a thread, because a scan would delay all other requests

    @override
    async def count(self, query: Query) -> int:
        state = await self._now()
        return await asyncio.to_thread(lambda: sum(1 for _ in self._found(state, query)))

    def _found(self, state: State, query: Query) -> Iterator[tuple[Row, dict[str, Any]]]:
        """Yield each row that the query finds, with its keys by canonical name."""
        for row in state.rows.values():
            if row.meta.is_deleted and not query.include_deleted:
                continue
            meta = {f"meta.{name}": kind.key(getattr(row.meta, name)) for name, kind in META_FIELDS.items()}
            keys = dict.fromkeys(self._spec.fields) | row.entry.keys | meta
            if query.where is None or truth(query.where, keys, row.entry.missing):
                yield row, keys

    def _page(self, state: State, query: Query) -> Page[Hit]:
        sort = cast("tuple[Sort, ...]", query.sort)  # the query is resolved
        names = [*(key.field for key in sort), "meta.resource_id"]
        found = [(tuple(keys[name] for name in names), row) for row, keys in self._found(state, query)]
        if query.after is not None:
            last = place(sort, query.after)
            found = [one for one in found if last < place(sort, one[0])]
        page = heapq.nsmallest(query.limit, found, key=lambda one: place(sort, one[0]))
        next_ = page[-1][0] if len(found) > query.limit else None
        return Page([Hit.of(row.meta, row.entry.shown) for _, row in page], next_)

    @override
    async def scan(self) -> AsyncIterator[ResourceMeta]:
        state = await self._now()
        for resource_id in sorted(state.rows):
            yield state.rows[resource_id].meta

    # Sweeping bodies

    @override
    async def generation(self) -> int:
        return (await self._now()).generation

    @override
    async def advance_generation(self) -> int:
        def work(state: State) -> int:
            state.generation += 1
            return state.generation

        return await self._write(work)

    @override
    async def unreferenced(self, uids: Sequence[str]) -> list[str]:
        state = await self._now()

        def work() -> list[str]:
            named = {record.uid for row in state.rows.values() for record in row.records.values()}
            return [uid for uid in uids if uid not in named]

        return await asyncio.to_thread(work)

    # Changes of the indexed fields

    @override
    async def outdated(self, limit: int) -> list[ResourceMeta]:
        rows = (await self._now()).rows.values()
        return [row.meta for row in rows if not self._kinds.items() <= row.kinds.items()][:limit]

    @override
    async def reindex(self, entries: Sequence[Reindex], *, share: bool = False) -> None:
        def work(state: State) -> None:
            for resource_id, expect, entry in entries:
                row = state.rows.get(resource_id)
                if row is not None and row.version == expect:
                    state.rows[resource_id] = replace(row, entry=entry, kinds=self._kinds)
            self._check_unique(state)

        await self._write(work)

    @override
    async def activate_unique_fields(self, *, force: bool = False) -> bool:
        def work(state: State) -> bool:
            added = set(self._spec.unique) - state.unique
            if added and not force and any(not added <= row.kinds.keys() for row in state.rows.values()):
                return False
            state.unique |= added
            try:
                self._check_unique(state)
            except UniqueConflict:
                raise shared(self._spec.name, ", ".join(added)) from None
            return True

        return set(self._spec.unique) <= (await self._now()).unique or await self._write(work)

    @override
    async def deactivate_unique_field(self, name: str) -> None:
        def work(state: State) -> None:
            if any(name not in row.kinds for row in state.rows.values()):
                state.unique.discard(name)

        await self._write(work)

    # Above a ResourceStore that keeps records

    @override
    def apply_committed(self, changes: Sequence[Change]) -> None:
        self._replace(lambda state: [self._apply(state, change, decided=True) for change in changes])

    @override
    async def owner_of(self, name: str, key: Key) -> str | None:
        rows = (await self._now()).rows.values()
        return next((row.meta.resource_id for row in rows if row.entry.keys.get(name) == key), None)


def check_kept(row: Row | None, uid: str) -> None:
    """Raise StaleGeneration for an old body that no record names, because a sweep may have removed it.

    Publishing a draft keeps its old body, which a record names.
    """
    if row is None or all(record.uid != uid for record in row.records.values()):
        raise StaleGeneration(f"{uid} is of a generation that may be swept already")


def place(sort: Sequence[Sort], cursor: Sequence[Key | None]) -> list[Any]:
    """Return a key that sorts rows as the query says. `cursor`: the sort keys of a row, then its id."""
    ranks = [(key is not None, key) for key in cursor]  # null comes first
    return [Descending(rank) if key.descending else rank for key, rank in zip(sort, ranks, strict=False)] + ranks[-1:]


class Descending(tuple[Any, ...]):  # noqa: SLOT001 - a tuple needs no more
    """A tuple that sorts the other way round."""

    def __lt__(self, other: tuple[Any, ...]) -> bool:
        return tuple.__gt__(self, other)
