"""Simulate several instances on one bucket, with all kinds of failures at once.

The simulation runs in virtual time, and a seed determines it. Each write has its own token. Some writes also have an
Idempotency-Key, and are repeated on another instance if the client got no answer. Afterwards, the history that a fresh
instance reads must keep these rules:

- Every acknowledged token is in it exactly once, no rejected token is in it, and every other token at most once.
- Revisions have no gaps.
- Of the writers that expected the same version, at most one succeeded.
- A read that began after an acknowledgement saw that write.
- Of the loads of a whole model, at most one succeeded, and only before every write.

`SIMULATIONS=1000 pytest tests/stores/test_s3_simulation.py` runs more seeds.
"""

from __future__ import annotations

import asyncio
import contextlib
import datetime as dt
import os
import random
import uuid
from collections import Counter
from pathlib import Path

import pytest
from msgspec import Struct

from app.autocrud import AutoCRUD
from app.autocrud.errors import (
    ConfigError,
    CrudError,
    HistoryForked,
    OutcomeUnknown,
    ResourceNotFound,
    StoreDamaged,
    StoreUnavailable,
)
from app.autocrud.resource_manager.backends.s3.memory_object_store import (
    DROPPED,
    FALSE_CONFLICT,
    LOST_ANSWER,
    Call,
    InjectedFault,
    MemoryObjectStore,
)
from app.autocrud.resource_manager.backends.s3_sqlite import head, housekeeping
from app.autocrud.resource_manager.basic import Encoding, IndexedField, IStorage, ResourceMeta, RevisionInfo
from app.autocrud.resource_manager.contract.loading import LoadedResource
from app.autocrud.resource_manager.core import Caller, IdempotencyKey
from app.autocrud.resource_manager.meta_store.sqlite3 import S3SqliteMetaStore
from app.autocrud.resource_manager.resource_store.s3 import S3ResourceStore
from app.autocrud.resource_manager.storage.simple_storage import SimpleStorage
from app.autocrud.resource_manager.storage_factory import IStorageFactory
from tests import virtual_time

SEEDS = range(int(os.environ.get("SIMULATIONS", "60")))
INSTANCES, WRITERS, STEPS = 3, 3, 14
RESOURCES = ("a", "b", "c")
# A write that was refused for one of these reasons must not have happened.
FAULTS = (DROPPED, LOST_ANSWER, FALSE_CONFLICT, InjectedFault("conflict", applied=True))


class Note(Struct):
    token: str
    name: str | None = None


class SmallTails(IStorageFactory):
    """Builds stores with small tails, so that segments, merges and snapshots are frequent."""

    def __init__(self, objects: MemoryObjectStore, local_dir: Path | None, sync_interval: float | None = 0.3) -> None:
        self.objects, self.local_dir, self.sync_interval = objects, local_dir, sync_interval

    def build(self, model_name: str) -> IStorage:
        meta_store = S3SqliteMetaStore(
            "double",
            "meta",
            object_store=self.objects,
            local_dir=self.local_dir,
            sync_interval=self.sync_interval,
            tail_bytes=1024,
        )
        return SimpleStorage(meta_store, S3ResourceStore("double", "data/", object_store=self.objects))


class World:
    def __init__(self, seed: int, root: Path, *, loads: bool = False) -> None:
        self.random = random.Random(seed)
        self.root = root
        self.loading, self.first_write = loads, self.random.uniform(0, 4)
        self.objects = MemoryObjectStore()
        self.objects.latency = lambda _: self.random.expovariate(1 / 0.02)
        self.trouble = self.random.choice([0.0, 0.02, 0.1, 0.3])
        self.acknowledged: dict[str, tuple[str, int]] = {}
        self.unknown: set[str] = set()
        self.refused: set[str] = set()
        self.winners: Counter[tuple[str, int, str]] = Counter()
        self.newest: Counter[str] = Counter()  # the highest version of a resource that was acknowledged
        self.made = 0
        self.again: list[tuple[str, Note]] = []  # writes with a key whose outcome no client knows
        self.heard_again = 0
        self.loads: dict[str, str] = {}  # the outcome of each load, by its token
        self.objects.fault = self.fault

    def fault(self, call: Call) -> InjectedFault | None:
        if call.op == "list" or self.random.random() >= self.trouble:
            return None
        if call.op == "put_if" and self.random.random() < 0.3:
            return InjectedFault(self.random.choice(["unknown", "conflict"]), late=self.random.expovariate(1 / 2.0))
        return self.random.choice(FAULTS)

    def manager(self):
        self.made += 1
        local = self.root / str(self.random.randrange(2)) if self.random.random() < 0.3 else None
        crud = AutoCRUD(storage_factory=SmallTails(self.objects, local))
        return crud.add_model(Note, indexed_fields=["token", IndexedField("name", unique=True)])

    async def instance(self, number: int) -> None:
        """Run some writers on one instance, and kill and restart it."""
        for life in range(2):
            manager = self.manager()
            tasks = [
                asyncio.create_task(self.writer(manager, f"{number}.{life}.{writer}")) for writer in range(WRITERS)
            ]
            tasks += [asyncio.create_task(self.loader(manager, f"{number}.{life}.load"))] if self.loading else []
            reader = asyncio.create_task(self.reader(manager))
            doomed = self.random.random() < 0.4
            if doomed and (number, life) != (0, 1):  # one instance stays that can finish opening
                await asyncio.sleep(self.random.uniform(0, 1.5))
                await self.kill(manager, tasks)
            await asyncio.gather(*tasks, return_exceptions=True)
            reader.cancel()
            await asyncio.wait([reader])
            for task in tasks:
                if not task.cancelled() and task.exception() is not None:
                    raise task.exception()

    async def reader(self, manager) -> None:
        """Advance the copy at random moments, between any two steps of the committer."""
        while True:
            await asyncio.sleep(self.random.expovariate(1 / 0.02))
            with contextlib.suppress(CrudError):
                await manager.count()

    async def loader(self, manager, token: str) -> None:
        """Load a model, and read what was loaded at once."""
        pin, storage = token.encode().hex(), manager.storage
        contents = loaded(manager, token, self.random)
        self.loads[token] = "refused"  # as long as it is not published
        try:
            await manager.open()
            await storage.meta_store.add_pin(pin)
            async with storage.loading.load(pin) as loader:
                for resource, record, body in contents:
                    await storage.resource_store.put(record.uid, record, body)
                    await loader.add([resource, record])
                await asyncio.sleep(self.random.choice([0, self.random.uniform(0, 0.5)]))
                self.loads[token] = "unknown"
                await loader.publish()
        except (StoreDamaged, ConfigError, HistoryForked):
            raise
        except OutcomeUnknown:
            return
        except CrudError:
            self.loads[token] = "refused"
            return
        self.loads[token] = "published"
        for rid in RESOURCES:
            self.newest[rid] = max(self.newest[rid], 1)
        with contextlib.suppress(StoreUnavailable):
            assert (await manager.meta("loaded")).version == 1
            await storage.meta_store.remove_pin(pin)

    async def kill(self, manager, tasks) -> None:
        """Stop an instance at once. Requests under way to S3 may still take effect."""
        store = manager.storage.meta_store
        loop_state = store._loop_state()
        for task in (loop_state.committer._running, loop_state._keeping, *tasks):
            if task is not None:
                task.cancel()
        await asyncio.sleep(0)

    async def writer(self, manager, name: str) -> None:
        if self.loading:
            await asyncio.sleep(self.first_write + self.random.expovariate(1))
        for step in range(STEPS):
            token = f"{name}.{step}"
            try:
                if self.again and self.random.random() < 0.5:
                    await self.ask_again(manager)
                await self.step(manager, token)
                if self.random.random() < 0.05:
                    await manager.maintain(10)
            except (
                StoreDamaged,
                ConfigError,
                HistoryForked,
            ):  # must not occur: nothing else changes the bucket
                raise
            except CrudError:
                pass
            await asyncio.sleep(self.random.uniform(0, 0.1))

    async def step(self, manager, token: str) -> None:
        rid = self.random.choice(RESOURCES)
        known = self.newest[rid]
        expect = None
        note = Note(token, self.random.choice([None, "x", "y"]))
        try:
            found = await manager.meta(rid)
        except ResourceNotFound:
            assert known == 0, f"{rid} was acknowledged and is not there"
            found = None
        else:
            assert found.version >= known, f"{rid}: read version {found.version} after {known} was acknowledged"
        by = Caller("writer", key=IdempotencyKey(token, rid) if self.random.random() < 0.5 else None)
        self.unknown.add(token)  # in doubt from here on, until the answer tells the outcome
        try:
            if found is None:
                done = await manager.create(note, resource_id=rid, by=by)
            else:
                if self.random.random() < 0.5:
                    current = await manager.get(rid)
                    expect = current.version
                done = await manager.update(rid, note, expect=expect, by=by)
        except (OutcomeUnknown, asyncio.CancelledError):
            if by.key is not None:
                self.again.append((rid, note))
            raise
        except CrudError:
            self.unknown.discard(token)
            self.refused.add(token)
            raise
        self.unknown.discard(token)
        self.acknowledge(manager, token, rid, done.meta.revision)
        self.newest[rid] = max(self.newest[rid], done.meta.version)
        if expect is not None:
            self.winners[rid, *expect] += 1

    def acknowledge(self, manager, token: str, rid: str, revision: int) -> None:
        self.acknowledged[token] = rid, revision

    async def ask_again(self, manager) -> None:
        """Repeat a request with the same key, like a client that got no answer.

        A rejection does not tell the outcome of the first request, which may still take effect.
        """
        rid, note = self.again.pop(self.random.randrange(len(self.again)))
        by = Caller("writer", key=IdempotencyKey(note.token, rid))
        try:
            done = await manager.update(rid, note, by=by)
        except BaseException:
            self.again.append((rid, note))
            raise
        self.heard_again += by.key.replayed
        self.unknown.discard(note.token)
        self.acknowledge(manager, note.token, rid, done.meta.revision)
        self.newest[rid] = max(self.newest[rid], done.meta.version)

    async def check(self) -> None:
        self.objects.fault = lambda _: None
        await asyncio.sleep(100)  # all late requests have taken effect
        reader = self.manager()
        tokens: Counter[str] = Counter()
        places: dict[str, tuple[str, int]] = {}
        for rid in RESOURCES:
            try:
                meta = await reader.meta(rid)
            except ResourceNotFound:
                continue
            numbers = [info.revision for info in (await reader.revisions(rid, limit=200)).items]
            assert numbers == list(range(meta.total_revision_count, 0, -1))
            assert meta.version >= self.newest[rid]
            for number in numbers:
                token = (await reader.get(rid, revision=number)).data.token
                tokens[token] += 1
                places[token] = rid, number
        assert not [token for token, count in tokens.items() if count > 1], "something happened twice"
        for token, place in self.acknowledged.items():
            assert places.get(token) == place, f"{token} was acknowledged as {place} and is {places.get(token)}"
        await self.check_loads(reader, tokens)
        assert not self.refused & tokens.keys(), "something was refused and happened"
        assert tokens.keys() <= self.acknowledged.keys() | self.unknown
        assert all(count == 1 for count in self.winners.values()), "two writers won one version"
        names = [hit.shown for hit in (await reader.find()).items if b'"name":"' in hit.shown]
        assert len({shown.partition(b'"name":')[2] for shown in names}) == len(names), "a unique value is shared"
        await reader.maintain(60)
        assert await self.manager().count() == await reader.count()

    async def check_loads(self, reader, tokens: Counter[str]) -> None:
        """Check the loads, and remove their tokens from those of the writes."""
        found = {token for token in self.loads if tokens[f"{token} a"]}
        assert len(found) <= 1, "two loads were published"
        assert {token for token, outcome in self.loads.items() if outcome == "published"} <= found
        assert not {token for token, outcome in self.loads.items() if outcome == "refused"} & found
        for token in found:
            for rid in RESOURCES:
                assert tokens.pop(f"{token} {rid}") == 1
            assert (await reader.get("loaded")).data.token == f"{token} loaded"
        if not found:
            with pytest.raises(ResourceNotFound):
                await reader.meta("loaded")


def loaded(manager, token: str, draw: random.Random) -> list[tuple[LoadedResource, RevisionInfo, bytes]]:
    """Return the contents of a load: the resources of the simulation, and one that only loads make."""
    found = []
    now = dt.datetime(2026, 1, 1, tzinfo=dt.UTC)
    for rid in sorted(("loaded", *RESOURCES)):
        data = manager.codec.accept(Note(f"{token} {rid}"))
        meta = ResourceMeta(
            resource_id=rid,
            version=1,
            nonce=f"{draw.getrandbits(64):016x}",
            revision=1,
            total_revision_count=1,
            schema_version=1,
            status="stable",
            is_deleted=False,
            uid=f"0/{uuid.UUID(int=draw.getrandbits(128))}",
            data_hash=data.hash,
            encoding=Encoding.json,
            created_time=now,
            updated_time=now,
            created_by="loader",
            updated_by="loader",
        )
        body = manager.codec.encode(data, Encoding.json)
        found.append((LoadedResource(meta, manager.codec.index(data.data)), RevisionInfo.of_change(meta, None), body))
    return found


def run(seed: int, tmp_path: Path, monkeypatch, **named) -> World:
    """Run the simulation of a seed."""
    monkeypatch.setattr(housekeeping, "LEAST_LOG", 20_000)
    monkeypatch.setattr(housekeeping, "ABANDONED", 8_000)
    monkeypatch.setattr(housekeeping, "FANOUT", 3)
    monkeypatch.setattr(
        head, "MAX_PAST", (1, 3, 32)[seed % 3]
    )  # if HEADs name few versions, records decide whether history has forked

    async def main() -> World:
        world = World(seed, tmp_path, **named)
        await asyncio.gather(*(world.instance(number) for number in range(INSTANCES)))
        await world.check()
        return world

    return virtual_time.run(main())


@pytest.mark.parametrize("seed", SEEDS)
def test_every_history_keeps_the_guarantees(seed, tmp_path, monkeypatch):
    assert run(seed, tmp_path, monkeypatch).acknowledged


@pytest.mark.parametrize("seed", SEEDS[::2])
def test_loads_race_with_commits_and_with_each_other(seed, tmp_path, monkeypatch):
    assert run(seed, tmp_path, monkeypatch, loads=True).acknowledged
