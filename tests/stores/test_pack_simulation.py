"""Simulate three processes that import packs, and change, purge, sweep and export what they have imported.

They load archives into the empty model in one step, resume imports that were interrupted or take them back, update with
retention, edit drafts, purge, sweep, and export or read under a pin. Again and again, they empty the model by purges,
and load it again. `blob_simulation` has the failures. A PUT of a body or a pack may also take effect twice, the second
time much later. These rules hold:

- *No loss* (K1, M4). The body of each record can be read, with its bytes. So can each body of a moment that a pin
  protects, unless its resource was purged.
- *No orphan* (K2). After enough time and sweeps, each pack has exactly the bodies that records name, its length tells
  how many these are, and there are no other bodies. So nothing is left of a purged resource.
- A purge removes the bodies at once, if no request fails.
- No name of a body or pack is used twice.

`SIMULATIONS=1000 pytest tests/stores/test_pack_simulation.py` runs more seeds.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import io
import math
import os
import random
import re
from collections import Counter
from collections.abc import Coroutine, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import pytest
from msgspec import Struct
from msgspec.structs import replace
from typing_extensions import override

from app.autocrud import AutoCRUD
from app.autocrud.backup import exporting, pieces
from app.autocrud.backup.import_states import is_empty
from app.autocrud.backup.importing import import_all
from app.autocrud.errors import (
    ConfigError,
    CrudError,
    OutcomeUnknown,
    ResourceNotFound,
    RevisionNotFound,
    StoreDamaged,
)
from app.autocrud.resource_manager.backends.s3.memory_object_store import MemoryObjectStore
from app.autocrud.resource_manager.backends.s3_sqlite import housekeeping
from app.autocrud.resource_manager.basic import IStorage, RevisionInfo
from app.autocrud.resource_manager.core import ResourceManager, Retention
from app.autocrud.resource_manager.meta_store.sqlite3 import S3SqliteMetaStore
from app.autocrud.resource_manager.resource_store import packs
from app.autocrud.resource_manager.resource_store.s3 import S3ResourceStore
from app.autocrud.resource_manager.storage import sweeping
from app.autocrud.resource_manager.storage.simple_storage import SimpleStorage
from app.autocrud.resource_manager.storage_factory import IStorageFactory
from tests import virtual_time
from tests.backup import archives

from .blob_simulation import (
    BODIES,
    PIN_S,
    PROCESSES,
    ProcessBucket,
    Processes,
    RepeatingBucket,
    now,
    set_times,
)

SEEDS = range(int(os.environ.get("SIMULATIONS", "16")))
DURATION_S, LIFE_S = 80.0, 35.0
EMPTYING_S = 25.0
KEPT = 2
IDS = [f"{slot}{letter}" for slot in range(PROCESSES) for letter in "abcd"]
TOKEN = re.compile(rb"<[^<>]*>")


class Note(Struct):
    token: str
    more: str = ""


class Known(NamedTuple):
    """The last acknowledged state of a resource."""

    token: str
    is_draft: bool


ABSENT = Known("", is_draft=False)
"""The state of a resource that was purged, or never created."""


class Archive(NamedTuple):
    path: Path
    states: dict[str, Known]


class Stores(IStorageFactory):
    def __init__(self, objects: MemoryObjectStore) -> None:
        self.objects = objects

    @override
    def build(self, model_name: str) -> IStorage:
        meta_store = S3SqliteMetaStore("b", "meta", object_store=self.objects, sync_interval=None, tail_bytes=4096)
        return SimpleStorage(meta_store, S3ResourceStore("b", BODIES, object_store=self.objects))


def manager_of(objects: MemoryObjectStore) -> ResourceManager[Note]:
    return AutoCRUD(storage_factory=Stores(objects), clock=now).add_model(Note, retention=Retention(last=KEPT))


def time() -> float:
    return asyncio.get_running_loop().time()


class World(Processes):
    """The processes, and what is known about the resources.

    known      the last acknowledged states; None if a state is not known
    attempts   how many writes were tried, by resource
    writing    the processes that write resources now
    purged_at  until when a purge of a resource may have taken effect
    importing  the processes that import now, and the archives
    emptying   whether the resources are purged, so that the model can be loaded
    """

    sweep_pause_s = 0.2, 2.0

    def __init__(self, seed: int, root: Path) -> None:
        super().__init__(seed, DURATION_S, LIFE_S)
        self.root = root
        self.bucket.trouble /= 2  # an import takes many requests, and is to succeed now and then
        self.known: dict[str, Known | None] = dict.fromkeys(IDS, ABSENT)
        self.attempts: Counter[str] = Counter()
        self.writing: dict[str, ProcessBucket] = {}
        self.purged_at: dict[str, float] = dict.fromkeys(IDS, -math.inf)
        self.importing: list[tuple[ProcessBucket, Archive]] = []
        self.archives: dict[str, Archive] = {}
        self.emptying, self.loaded = False, asyncio.Event()

    @override
    def process_bucket(self) -> ProcessBucket:
        return RepeatingBucket(self.bucket)

    @override
    def work(self, objects: ProcessBucket, number: int) -> list[Coroutine[Any, Any, None]]:
        manager = manager_of(objects)
        work = [self.writer(objects, manager, rid) for rid in IDS if rid.startswith(f"{number}")]
        return [*work, self.slow_sweeper(manager), self.importer(objects, manager), self.reader(manager)]

    async def prepare(self) -> None:
        """Load the first archive, without failures."""
        objects = MemoryObjectStore()
        objects.objects, objects.modified = self.bucket.objects, self.bucket.modified
        archive = await self.new_archive()
        await import_all({"note": manager_of(objects)}, archive.path)
        self.known |= archive.states

    async def director(self) -> None:
        """Have the model emptied until it is loaded, again and again."""
        while True:
            self.emptying = False
            await asyncio.sleep(self.random.uniform(3, 10))
            self.emptying = True
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self.loaded.wait(), EMPTYING_S)
            self.loaded.clear()

    async def slow_sweeper(self, manager: ResourceManager[Note]) -> None:
        """Sweep in some processes more slowly than others load."""
        self.set_latency(self.random.choice([0.02, 0.1, 0.5]))
        await self.sweeper(manager)

    # Writes

    async def writer(self, objects: ProcessBucket, manager: ResourceManager[Note], rid: str) -> None:
        while True:
            await asyncio.sleep(self.random.expovariate(2 if self.emptying else 1))
            known = self.known[rid]
            try:
                await self.step(objects, manager, rid, known)
            except StoreDamaged as error:
                if known is not None:
                    raise AssertionError(f"a body is lost: {error}") from error
            except CrudError:
                pass

    async def step(self, objects: ProcessBucket, manager: ResourceManager[Note], rid: str, known: Known | None) -> None:
        kind = self.random.choice(
            ["purge", "purge", "purge", "purge", "write", "look"]
            if self.emptying
            else ["write", "write", "write", "read", "look", "publish", "purge"]
        )
        if kind == "purge" and known != ABSENT:
            await self.purge(objects, manager, rid)
        elif kind == "write":
            await self.write(objects, manager, rid, known)
        elif kind == "read" and known not in (None, ABSENT):
            assert (await manager.get(rid)).data.token == known.token
        elif kind == "publish" and known is not None and known.is_draft:
            with self.written(objects, rid, known._replace(is_draft=False)):
                await manager.publish(rid)
        elif kind == "look":
            await self.look(manager, self.random.choice(IDS))
        self.done[kind] += 1

    @contextlib.contextmanager
    def written(self, objects: ProcessBucket, rid: str, state: Known) -> Iterator[None]:
        """Note that a resource is written. If it is not known whether that happened, its state is unknown."""
        before, self.known[rid] = self.known[rid], None
        self.attempts[rid] += 1
        self.writing[rid], attempt, imports = objects, self.attempts[rid], self.running_imports()
        try:
            yield
        except (OutcomeUnknown, asyncio.CancelledError):
            raise
        except CrudError:
            self.known[rid] = before if self.attempts[rid] == attempt else None
            raise
        finally:
            if not objects.killed.is_set():
                del self.writing[rid]
        # An import may have created a resource after it was purged.
        may_be_back = state == ABSENT and (imports or self.attempts[rid] != attempt)
        self.known[rid] = None if may_be_back else state
        self.purged_at[rid] = min(self.purged_at[rid], time())

    async def write(
        self, objects: ProcessBucket, manager: ResourceManager[Note], rid: str, known: Known | None
    ) -> None:
        if self.emptying and known == ABSENT:
            return
        in_place = known is not None and known.is_draft and self.random.random() < 0.8
        status = "draft" if in_place else self.random.choice(["draft", "stable"])
        data = Note(self.new_token(rid))
        with self.written(objects, rid, Known(data.token, status == "draft")):
            if in_place:
                await manager.modify(rid, data)
            elif known == ABSENT:
                await manager.create(data, resource_id=rid, status=status)
            else:
                await manager.update(rid, data, status=status)

    def new_token(self, rid: str) -> str:
        self.number += 1
        return f"<{rid} {self.number}>"

    async def purge(self, objects: ProcessBucket, manager: ResourceManager[Note], rid: str) -> None:
        records = (await manager.storage.revisions(rid, limit=100)).items
        before, self.purged_at[rid] = self.purged_at[rid], math.inf
        try:
            with self.written(objects, rid, ABSENT):
                await manager.purge(rid)
        except (OutcomeUnknown, asyncio.CancelledError):
            raise
        except CrudError:
            self.purged_at[rid] = before
            raise
        if self.bucket.trouble == 0:
            assert not [record for record in records if self.bucket.has_body(record.uid)], "a purge left a body behind"

    # Imports

    async def importer(self, objects: ProcessBucket, manager: ResourceManager[Note]) -> None:
        while True:
            await asyncio.sleep(self.random.uniform(0.2, 2))
            self.set_latency(self.random.choice([0.02, 0.1, 0.5]))
            try:
                await self.import_step(objects, manager)
            except (StoreDamaged, ConfigError) as error:
                raise AssertionError(f"an import found a fault that is not there: {error}") from error
            except CrudError as error:
                self.done[f"failed import: {type(error).__name__}"] += 1

    async def import_step(self, objects: ProcessBucket, manager: ResourceManager[Note]) -> None:
        state = await manager.storage.import_journal.state()
        if state is not None:
            if self.random.random() < (0.02 if self.running_imports() else 0.5):
                await self.continue_import(objects, manager, self.archives[state.sha256])
        elif self.random.random() < (0.05 if self.running_imports() else 1) and (
            (self.emptying and await is_empty(manager.storage)) or self.random.random() < 0.02
        ):
            unused = [one for one in self.archives.values() if one not in self.running_imports()]
            is_new = not unused or self.random.random() < 0.7
            archive = await self.new_archive() if is_new else self.random.choice(unused)
            options = {"on_conflict": self.random.choice(["fail", "skip"]), "undo": self.random.random() < 0.5}
            self.done["import"] += 1
            await self.load(objects, manager, archive, is_new=is_new, **options)

    async def continue_import(self, objects: ProcessBucket, manager: ResourceManager[Note], archive: Archive) -> None:
        how = self.random.choice(["resume", "resume", "abort"])
        options = {"on_conflict": "skip"} if how == "resume" else {}
        await self.load(objects, manager, archive, is_new=False, **{how: True}, **options)
        self.done[how] += 1

    def running_imports(self) -> list[Archive]:
        return [archive for objects, archive in self.importing if not objects.killed.is_set()]

    async def load(
        self, objects: ProcessBucket, manager: ResourceManager[Note], archive: Archive, *, is_new: bool, **options: Any
    ) -> None:
        """Run an import. Afterwards, the states of what it has loaded in one step are known."""
        before = self.known.copy()
        for rid in archive.states:
            self.attempts[rid] += 1
            if before[rid] == ABSENT:
                self.known[rid] = None
            if options.get("abort") or options.get("undo"):
                self.purged_at[rid] = math.inf
        attempts = self.attempts.copy()
        written = {rid for rid, writing in self.writing.items() if not writing.killed.is_set()}
        self.importing.append(run := (objects, archive))
        try:
            result = await import_all({"note": manager}, archive.path, progress=self.hurry, **options)
        finally:
            if not objects.killed.is_set():
                self.importing.remove(run)
        if not options.get("abort"):
            self.loaded.set()
        if result.models["note"].in_one_step:
            self.done["in one step"] += 1
            for rid, state in archive.states.items():
                # Otherwise, a write that was under way may take effect after the load.
                is_alone = self.attempts[rid] == attempts[rid] and rid not in written
                if is_alone and (is_new or before[rid] is not None):
                    self.known[rid] = state
                    self.purged_at[rid] = min(self.purged_at[rid], time())

    def hurry(self, done: int, total: int | None, of: str) -> None:
        """Publish fast, after the bodies were stored slowly. So a sweep meets both states of the model."""
        if of == "note" and done == total:
            self.set_latency(0.02)

    async def new_archive(self) -> Archive:
        self.number += 1
        path = self.root / f"{self.number}.tar.gz"
        resources, states = [], {}
        for rid in self.random.sample(IDS, self.random.randint(4, len(IDS))):
            tokens = [self.new_token(rid) for _ in range(self.random.randint(1, KEPT + 1))]
            more = ["x" * self.random.choice([0, 0, 0, 20, 200]) for _ in tokens]
            datas = [{"token": token, "more": text} for token, text in zip(tokens, more, strict=True)]
            meta, revisions = archives.resource(rid, datas)
            states[rid] = Known(tokens[-1], is_draft=self.random.random() < 0.5)
            if states[rid].is_draft:
                record, body = revisions.pop()
                revisions.append((replace(record, status="draft"), body))
            resources.append((replace(meta, status=revisions[-1][0].status, created_time=now()), revisions))
        resources.sort(key=lambda one: one[0].resource_id)
        result = await archives.write(path, {"note": archives.Content(resources=resources)})
        archive = self.archives[result.sha256] = Archive(path, states)
        return archive

    # Reads

    async def reader(self, manager: ResourceManager[Note]) -> None:
        while True:
            await asyncio.sleep(self.random.uniform(0, 2))
            self.set_latency(self.random.choice([self.bucket.latency_s, 0.4, 1]))
            kind = self.random.choice([self.export, self.read_moment, self.read_moment])
            try:
                await kind(manager)
            except CrudError as error:
                if isinstance(error, StoreDamaged) or "in a store that keeps no pins" in str(error):
                    raise AssertionError(f"an export lacks something: {error}") from error

    async def look(self, manager: ResourceManager[Note], rid: str) -> None:
        """Read all revisions of a resource."""
        for record in (await manager.storage.revisions(rid, limit=100)).items:
            await asyncio.sleep(self.random.choice([0, 0.5]))
            try:
                check_body(record, await manager.storage.body(record.uid))
            except StoreDamaged:
                await manager.storage.catch_up()
                with contextlib.suppress(ResourceNotFound, RevisionNotFound):
                    present = await manager.storage.revision(rid, record.revision)
                    assert present.uid != record.uid, "a body is lost"

    async def read_moment(self, manager: ResourceManager[Note]) -> None:
        """Read a moment, and its bodies some time later."""
        await manager.open()
        began = time()
        async with manager.storage.snapshot() as moment:
            items = [item async for item in moment.items()]
            records = [item for item in items if isinstance(item, RevisionInfo)]
            await asyncio.sleep(self.random.uniform(0, 1.5 * PIN_S))
            bodies = await moment.bodies([record.uid for record in records])
        for record, body in zip(records, bodies, strict=True):
            if body is not None:
                check_body(record, body)
            else:
                assert self.purged_at[record.resource_id] >= began, "a moment lacks a body"
        self.done["moment"] += 1

    async def export(self, manager: ResourceManager[Note]) -> None:
        self.number += 1
        path, file = self.root / f"export{self.number}.tar.gz", io.BytesIO()  # a killed export closes no file
        known, attempts, began = self.known.copy(), self.attempts.copy(), time()
        await exporting.export_all({"note": manager}, file)
        path.write_bytes(file.getvalue())
        content = archives.read_back(path)["note"]
        assert all(self.purged_at[rid] >= began for rid in content.absent), "an export lacks a resource"
        current: dict[str, str] = {}
        for meta, revisions in content.resources:
            for record, body in revisions:
                if body is not None:
                    check_body(record, body)
                if record.revision == meta.revision and meta.resource_id not in content.absent:
                    current[meta.resource_id] = msgspec.json.decode(body, type=Note).token
        for rid, state in known.items():
            if state is not None and self.attempts[rid] == attempts[rid]:
                assert current.get(rid, "") == state.token, f"an export lacks a write {rid} {state} {current.get(rid)}"
        self.done["export"] += 1

    # The end

    @override
    async def check(self) -> None:
        self.bucket.calm()
        await asyncio.sleep(20 * PIN_S)  # late effects, and processes that were frozen
        objects = ProcessBucket(self.bucket)
        manager = manager_of(objects)
        while (state := await manager.storage.import_journal.state()) is not None:
            with contextlib.suppress(CrudError):
                await self.continue_import(objects, manager, self.archives[state.sha256])
        for _ in range(5):
            await asyncio.sleep(2 * PIN_S)
            await manager.maintain(60)
        records: list[RevisionInfo] = []
        async for meta in manager.storage.scan():
            records += (await manager.storage.revisions(meta.resource_id, limit=200)).items
        bodies = [await manager.storage.body(record.uid) for record in records]
        for record, body in zip(records, bodies, strict=True):
            check_body(record, body)
        self.bucket.check_bodies({record.uid for record in records})
        stored = b"".join(found.body for key, found in self.bucket.objects.items() if key.startswith(BODIES))
        assert sorted(TOKEN.findall(stored)) == sorted(token for body in bodies for token in TOKEN.findall(body))
        assert [key for key, count in self.bucket.requested.items() if count > 1] == [], "a name was used twice"
        for rid, known in self.known.items():
            if known == ABSENT:
                with pytest.raises(ResourceNotFound):
                    await manager.meta(rid)
            elif known is not None:
                assert (await manager.get(rid)).data.token == known.token


def check_body(record: RevisionInfo, body: bytes) -> None:
    assert hashlib.sha256(body).hexdigest() == record.data_hash, "a body has other bytes"


def simulate(seed: int, root: Path, monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Run the simulation of a seed, and return how often each step was done."""
    set_times(monkeypatch)
    monkeypatch.setattr(housekeeping, "LEAST_LOG", 20_000)
    monkeypatch.setattr(housekeeping, "ABANDONED", 40_000)
    monkeypatch.setattr(exporting, "PAGE_BODIES", 4)  # so an export needs many requests
    monkeypatch.setattr(pieces, "BATCH", 4)
    monkeypatch.setattr(packs, "random", random.Random(seed))
    monkeypatch.setattr(packs, "PACK_BYTES", random.Random(seed).choice([150, 400]))
    monkeypatch.setattr(packs, "BODY_BYTES", 100)
    monkeypatch.setattr(sweeping, "SWEEP_PAGE", 3)
    monkeypatch.setattr(sweeping, "PACKS_AT_ONCE", 2)

    async def main() -> Counter[str]:
        world = World(seed, root)
        await world.prepare()
        directing = asyncio.create_task(world.director())
        try:
            return await world.history()
        finally:
            directing.cancel()

    return virtual_time.run(main())


@pytest.mark.parametrize("seed", SEEDS)
def test_every_history_of_packs_loses_no_body_and_leaves_no_orphan(seed, tmp_path, monkeypatch):
    assert simulate(seed, tmp_path, monkeypatch)["write"]
