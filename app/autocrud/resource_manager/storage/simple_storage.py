"""SimpleStorage: any MetaStore with any ResourceStore.

    SimpleStorage(MemoryMetaStore(), DiskResourceStore(rootdir="data/article"))

Invariants:

- M1 *A commit never names a body that is not there.* Bodies are put first; the commit follows when all are stored.
- M2 *A body that is swept cannot be committed.* A uid starts with the generation under which it was put. The sweep first advances
  the generation to g, then removes bodies older than g - 1 that no record names; the MetaStore refuses to commit those same uids
  in the step that commits, and the body is put again under a new one. No clock decides.
- M3 *Exactly one thing is the commit.* An authoritative MetaStore is. Where it is not (memory) and the ResourceStore keeps records
  (disk), the record is the commit, and the MetaStore follows the records in the order of their commits; it is rebuilt from them
  at start. One process owns such a root, so unique values can be decided in this process: a value is reserved before the record is
  written and released after the MetaStore has followed, hence every rival finds either the reservation or the holder. Where the
  ResourceStore has an index of its own beside the bodies (S3), that is the MetaStore, and authoritative.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import datetime as dt
import logging
import threading
import time
from collections.abc import AsyncIterator, Hashable, Sequence

from msgspec.structs import replace
from uuid_utils import uuid7

from ...errors import CrudError, OutcomeUnknown, StaleGeneration, StoreUnavailable
from ...query import Query
from ...values import Key
from ..basic import (
    AlreadyCommitted,
    Change,
    CommitResult,
    Encoding,
    Hit,
    IdempotentCommit,
    IndexOf,
    IStorage,
    MetaStore,
    ModelSpec,
    Page,
    ResourceMeta,
    ResourceStore,
    RevisionInfo,
    Write,
)
from ..contract.store_errors import WriteTimedOut, taken
from ..meta_store.simple import DiskMetaStore
from ..resource_store.simple import DiskResourceStore
from ..runtime.threads import shielded
from .disk_pair import DiskPair
from .reindexing import Reindexing

log = logging.getLogger("crudstack.storage")

REBUILD_PAGE = 200
SWEEP_PAGE = 1000
MAX_RENEWALS = 8
"""How often bodies are written again because a sweep was faster: each time needs a whole sweep."""


class SimpleStorage(IStorage):
    def __init__(self, meta_store: MetaStore, resource_store: ResourceStore) -> None:
        index = None if meta_store.authoritative else resource_store.index()
        self.meta_store = index or meta_store
        self.resource_store = resource_store
        self._indexed_there = index is not None
        self._pair: DiskPair | None = None
        if isinstance(meta_store, DiskMetaStore) and isinstance(resource_store, DiskResourceStore):
            self._pair = DiskPair(meta_store, resource_store)
        self._follows = not self.meta_store.authoritative and resource_store.keeps_records
        self._spec = ModelSpec("unbound")
        self._reindexing = Reindexing(self._spec, self.meta_store, resource_store)
        self._index: IndexOf | None = None
        self._generation = 0
        self._sweep_after = ""
        self._state = threading.Lock()  # guards the two below
        self._opening: concurrent.futures.Future[None] | None = None
        self._opener: asyncio.Task[None] | None = None  # held, or it might be collected while it runs
        self._reserved: dict[tuple[str, Key], list[str]] = {}  # who is about to take a value, once for each write

    @property
    def durable(self) -> bool:
        return self.resource_store.durable and (self.meta_store.durable or self._follows)

    @property
    def remote(self) -> bool:
        return self.durable and self.resource_store.remote and (self.meta_store.remote or self._follows)

    @property
    def encoding(self) -> Encoding:
        return self.resource_store.encoding or self._spec.encoding or Encoding.json

    def bind(self, spec: ModelSpec) -> None:
        self._spec = spec
        self._reindexing = Reindexing(spec, self.meta_store, self.resource_store)
        self.resource_store.bind(spec)  # first, because an index of its own lies where it lies
        self.meta_store.bind(spec)

    @property
    def places(self) -> list[Hashable]:
        return [place for store in (self.meta_store, self.resource_store) if (place := store.place) is not None]

    # Opening

    async def open(self, index: IndexOf) -> None:
        self._index = index
        with self._state:
            opening, mine = self._opening, self._opening is None
            if opening is None:
                opening = self._opening = concurrent.futures.Future()
        if mine:
            # A task of its own: whoever asked first may be cancelled, while others wait for the same.
            self._opener = asyncio.get_running_loop().create_task(self._open_and_tell(index, opening))
        await shielded(asyncio.wrap_future(opening))

    async def _open_and_tell(self, index: IndexOf, opening: concurrent.futures.Future[None]) -> None:
        try:
            await self._open(index)
        except BaseException as error:
            with self._state:
                self._opening = None  # the next one tries again
            if isinstance(error, asyncio.CancelledError):
                opening.set_exception(StoreUnavailable("the store was stopped while it was opened; try again"))
                raise
            opening.set_exception(error)
        else:
            opening.set_result(None)

    async def _open(self, index: IndexOf) -> None:
        if self._follows:
            self.resource_store.own()
            await self._rebuild()
        self._generation = await self.meta_store.generation()
        await self._reindexing.open(index)

    async def _rebuild(self) -> None:
        self.meta_store.bind(self._spec)  # empty again: another process may have owned the records since the last time
        batch: list[Change] = []
        async for change in self.resource_store.records():
            batch.append(change)
            if len(batch) >= REBUILD_PAGE:
                await asyncio.to_thread(self.meta_store.follow, batch)
                batch = []
        await asyncio.to_thread(self.meta_store.follow, batch)
        # Nobody else writes here, so what no record names was left by a crash.
        after = ""
        while uids := await self.resource_store.older_than(1, after, SWEEP_PAGE):
            await self.resource_store.delete(await self.meta_store.unreferenced(uids))
            after = uids[-1]

    # Reading

    def new_uid(self) -> str:
        return f"{self._generation}/{uuid7()}"

    async def get(self, resource_id: str) -> ResourceMeta:
        return await self.meta_store.get(resource_id)

    @property
    def verified(self) -> bool:
        return self.resource_store.verified

    async def drop_copies(self, uids: Sequence[str]) -> None:
        await self.resource_store.drop_copies(uids)

    @property
    def peeks(self) -> bool:
        return self.meta_store.peeks

    async def peek(self, resource_id: str) -> ResourceMeta:
        return await self.meta_store.peek(resource_id)

    async def catch_up(self) -> None:
        await self.meta_store.catch_up()

    async def bodies(self, uids: Sequence[str]) -> list[bytes]:
        return await self.resource_store.get_many(uids) if uids else []

    async def body(self, uid: str) -> bytes:
        return await self.resource_store.get(uid)

    async def get_with_body(self, resource_id: str) -> tuple[ResourceMeta, bytes]:
        if self._pair is not None:
            return await self._pair.get_with_body(resource_id)
        return await super().get_with_body(resource_id)

    async def search_with_bodies(self, query: Query) -> tuple[Page[Hit], list[bytes]]:
        if self._pair is not None:
            return await self._pair.search_with_bodies(query)
        return await super().search_with_bodies(query)

    async def revision(self, resource_id: str, revision: int) -> RevisionInfo:
        return await self.meta_store.revision(resource_id, revision)

    async def revisions(self, resource_id: str, before: int | None = None, limit: int = 50) -> Page[RevisionInfo]:
        return await self.meta_store.revisions(resource_id, before, limit)

    async def search(self, query: Query) -> Page[Hit]:
        return await self.meta_store.search(query)

    async def count(self, query: Query) -> int:
        return await self.meta_store.count(query)

    def scan(self) -> AsyncIterator[ResourceMeta]:
        return self.meta_store.scan()

    # Writing

    async def done(self, key: str, *, peek: bool = False) -> CommitResult | None:
        if self._follows:
            return await self.resource_store.done(key)
        done = await self.meta_store.done(key, peek=peek)
        if done is not None and self._indexed_there:  # it is answered from now, as after the commit itself
            await self.resource_store.committed()
        return done

    async def commit(self, writes: Sequence[Write], once: IdempotentCommit | None = None) -> list[ResourceMeta]:
        for _ in range(MAX_RENEWALS):
            try:
                committed = await self._commit(writes, once)
                break
            except StaleGeneration:
                await self._forget(_bodies_of(writes))
                self._generation = await self.meta_store.generation()
                writes = self._renewed(writes)
            except OutcomeUnknown:
                raise  # the bodies may be needed
            except WriteTimedOut:
                raise  # to remove them might take as long again
            except CrudError:
                await self._forget(_bodies_of(writes))
                raise
        else:
            await self._forget(_bodies_of(writes))
            raise StoreUnavailable(
                "bodies were swept faster than they could be written; nothing was changed, try again"
            )
        await self._forget([uid for write in writes for uid in write.change.drop])
        return committed

    async def _forget(self, uids: Sequence[str]) -> None:
        """Remove bodies that nothing names. What stays is found by the sweep, so failing is no error of the write."""
        if uids:
            try:
                await self.resource_store.delete(uids)
            except CrudError as error:
                log.warning("%s: %d bodies stay until the next sweep: %s", self._spec.name, len(uids), error)

    def _renewed(self, writes: Sequence[Write]) -> list[Write]:
        """The same writes with their bodies under new uids, wherever one of them names such a body: a later write of a batch may publish,
        delete or drop what an earlier one brings."""
        new = {uid: self.new_uid() for uid in _bodies_of(writes)}
        renewed = []
        for change, body in writes:
            record = change.record
            changed = replace(
                change,
                meta=replace(change.meta, uid=new.get(change.meta.uid, change.meta.uid)),
                record=None if record is None else replace(record, uid=new.get(record.uid, record.uid)),
                drop=tuple(new.get(uid, uid) for uid in change.drop),
            )
            renewed.append(Write(changed, body))
        return renewed

    async def _commit(self, writes: Sequence[Write], once: IdempotentCommit | None) -> list[ResourceMeta]:
        if self._follows:
            # Reservations must outlive the commit, so it goes on where the one who asked does not.
            return await asyncio.shield(asyncio.create_task(self._commit_records(writes, once)))
        if self._pair is not None:
            return await self._pair.commit(writes, once)
        puts = [
            self.resource_store.put(change.record.uid, change.record, body)
            for change, body in writes
            if change.record is not None and body is not None
        ]
        if len(puts) == 1:
            await puts[0]
        elif puts:
            await asyncio.gather(*puts)
        changes = [write.change for write in writes]
        if not self._indexed_there:
            return await self.meta_store.commit(changes, once)
        # Goes on where the one who asked does not: what was committed is told.
        return await shielded(asyncio.ensure_future(self._commit_and_tell(changes, once)))

    async def _commit_and_tell(self, changes: Sequence[Change], once: IdempotentCommit | None) -> list[ResourceMeta]:
        try:
            committed = await self.meta_store.commit(changes, once)
        except (AlreadyCommitted, OutcomeUnknown):  # whoever committed may have ended before it could tell
            await self.resource_store.committed()
            raise
        await self.resource_store.committed()
        return committed

    async def confirm(self, resource_ids: Sequence[str]) -> None:
        if self._indexed_there:
            await self.resource_store.committed()
        else:
            await self.meta_store.confirm(resource_ids)

    async def _commit_records(self, writes: Sequence[Write], once: IdempotentCommit | None) -> list[ResourceMeta]:
        changes = [write.change for write in writes]
        async with self._unique_values(changes):
            await self.resource_store.put_records(writes, self.meta_store.follow, once)
        return [change.meta for change in changes]

    @contextlib.asynccontextmanager
    async def _unique_values(self, changes: Sequence[Change]) -> AsyncIterator[None]:
        """Hold the unique values that the changes end with; UniqueConflict if another resource has or takes one."""
        final = {change.meta.resource_id: change for change in changes if change.purge or change.index is not None}
        wanted = [
            (name, key, resource_id)
            for resource_id, change in final.items()
            if not change.purge and change.index is not None
            for name in self._spec.unique
            if (key := change.index.keys.get(name)) is not None and not isinstance(key, list)
        ]
        held: list[tuple[tuple[str, Key], str]] = []
        try:
            with self._state:
                for name, key, resource_id in wanted:
                    takers = self._reserved.setdefault((name, key), [])
                    if any(taker != resource_id for taker in takers):
                        raise taken(name)
                    takers.append(resource_id)
                    held.append(((name, key), resource_id))
            for name, key, resource_id in wanted:
                holder = await self.meta_store.holder(name, key)
                if holder not in (None, resource_id) and holder not in final:  # else it gives the value up here
                    raise taken(name)
            yield
        finally:
            with self._state:
                for value, resource_id in held:
                    self._reserved[value].remove(resource_id)
                    if not self._reserved[value]:
                        del self._reserved[value]

    # Keeping house

    async def health(self) -> None:
        await self.meta_store.health()
        await self.resource_store.health()

    async def impairments(self) -> list[str]:
        stores = [*await self.meta_store.impairments(), *await self.resource_store.impairments()]
        return [*stores, *self._reindexing.degradations()]

    async def maintain(self, budget_s: float) -> None:
        """Index what an older program has written since, and sweep orphaned bodies; where the time ends, the next call goes on."""
        if self._follows:
            await self.resource_store.maintain(budget_s)
            return  # swept whenever it is opened
        deadline = time.monotonic() + budget_s
        assert self._index is not None, "it was opened"
        while time.monotonic() < deadline and await self._reindexing.step(self._index):
            pass
        await self._reindexing.look_again(self._index)
        await self.meta_store.maintain(max(0.0, deadline - time.monotonic()) / 2)
        await self.resource_store.maintain(max(0.0, deadline - time.monotonic()) / 2)
        if not self._sweep_after:
            self._generation = await self.meta_store.advance_generation()
        while time.monotonic() < deadline:
            uids = await self.resource_store.older_than(self._generation - 1, self._sweep_after, SWEEP_PAGE)
            if not uids:
                self._sweep_after = ""
                return
            await self.resource_store.delete(await self.meta_store.unreferenced(uids))
            self._sweep_after = uids[-1]

    async def erase(self, now: dt.datetime) -> dt.datetime:
        erased = [await self.meta_store.erase(now), await self.resource_store.erase(now)]
        return max(erased)

    async def close(self) -> None:
        with self._state:
            self._opening = None
        # An index of its own last: until it is closed the other one may still refresh it.
        stores = (
            (self.resource_store, self.meta_store) if self._indexed_there else (self.meta_store, self.resource_store)
        )
        for store in stores:
            await store.close()


def _bodies_of(writes: Sequence[Write]) -> list[str]:
    return [change.record.uid for change, body in writes if change.record is not None and body is not None]
