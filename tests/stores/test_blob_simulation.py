"""Simulate three processes that use all that the product does with files, with all kinds of failures at once.

They upload content, through the server and directly, refer to it in resources, replace, delete and purge these, keep
two revisions of each, sweep, and export. `blob_simulation` has the failures. These rules hold:

- *No loss.* What an acknowledged reference or any record names can be read, with its bytes. An export that succeeds
  contains all bytes that its records refer to, and each write that was acknowledged before it began. It fails only if
  the bucket does, or if it was frozen for longer than its pin lives. An unused upload stays for KEEP_S.
- *No orphan.* After enough time and sweeps, the bucket has exactly the bodies and the content that records name, and
  the rows of these. A purge removes what only its resource named at once, if no request fails.
- *No key is used twice*, whether of content or of a body.

`SIMULATIONS=1000 pytest tests/stores/test_blob_simulation.py` runs more seeds.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import io
import os
from collections import Counter
from collections.abc import Coroutine
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import pytest
from msgspec import Struct

from app.autocrud import AutoCRUD, Blob
from app.autocrud.backup import exporting
from app.autocrud.errors import (
    BlobGone,
    CrudError,
    OutcomeUnknown,
    ResourceNotFound,
    StoreDamaged,
    VersionConflict,
)
from app.autocrud.resource_manager.backends.s3_sqlite import housekeeping
from app.autocrud.resource_manager.basic import BlobRow, IStorage, RevisionInfo
from app.autocrud.resource_manager.blob_store.s3 import S3BlobStore
from app.autocrud.resource_manager.contract.blobs import BlobUsage
from app.autocrud.resource_manager.contract.direct import RESERVED, Announced
from app.autocrud.resource_manager.core import ResourceManager, Retention
from app.autocrud.resource_manager.meta_store.sqlite3 import S3SqliteMetaStore
from app.autocrud.resource_manager.resource_store.s3 import S3ResourceStore
from app.autocrud.resource_manager.storage.simple_storage import SimpleStorage
from app.autocrud.resource_manager.storage_factory import IStorageFactory
from tests import virtual_time
from tests.backup.archives import read_back

from .blob_simulation import (
    BLOBS,
    BODIES,
    KEEP_S,
    PIN_S,
    STAGING_S,
    URL_S,
    ProcessBucket,
    Processes,
    now,
    set_times,
    slowness,
)

SEEDS = range(int(os.environ.get("SIMULATIONS", "16")))
DURATION_S, LIFE_S = 100.0, 45.0
CALLERS = ("alice", "bob")
COMMON = tuple(f"content {number}".encode() for number in range(3))
KEPT = 2


class Doc(Struct):
    token: str
    files: list[Blob] = []


class Written(NamedTuple):
    """The last acknowledged state of a resource. `token` is None if it was purged or never created."""

    token: str | None
    contents: tuple[bytes, ...] = ()
    is_draft: bool = False
    is_deleted: bool = False


class Offer(NamedTuple):
    """An upload that was acknowledged. It is kept for KEEP_S from `began` on."""

    content: bytes
    caller: str
    began: float

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.content).hexdigest()


class Stores(IStorageFactory):
    def __init__(self, objects: ProcessBucket) -> None:
        self.objects = objects

    def build(self, model_name: str) -> IStorage:
        meta_store = S3SqliteMetaStore("b", "meta", object_store=self.objects, sync_interval=None, tail_bytes=4096)
        return SimpleStorage(
            meta_store,
            S3ResourceStore("b", BODIES, object_store=self.objects),
            S3BlobStore("b", BLOBS, object_store=self.objects),
            keep_uploads_s=KEEP_S,
        )


def manager_of(objects: ProcessBucket) -> ResourceManager[Doc]:
    return AutoCRUD(storage_factory=Stores(objects), clock=now).add_model(Doc, retention=Retention(last=KEPT))


class World(Processes):
    def __init__(self, seed: int, root: Path) -> None:
        super().__init__(seed, DURATION_S, LIFE_S)
        self.root = root
        self.offers: list[Offer] = []
        self.purged: set[str] = set()  # hashes of content that a purge may have removed
        self.named: Counter[str] = Counter()  # how many writes named a hash
        self.written: dict[str, Written | None] = {}  # None: not known
        self.attempts: Counter[str] = Counter()  # how many writes were tried, by resource

    # Processes

    def work(self, objects: ProcessBucket, number: int) -> list[Coroutine[Any, Any, None]]:
        manager = manager_of(objects)
        work = [self.writer(manager, f"{number}"), self.writer(manager, f"{number}'"), self.sweeper(manager)]
        return work + ([self.exporter(manager)] if self.random.random() < 0.8 else [])

    async def writer(self, manager: ResourceManager[Doc], name: str) -> None:
        while True:
            await asyncio.sleep(self.random.expovariate(1 / 1.5))
            with contextlib.suppress(CrudError):
                await self.step(manager, f"{name}{self.random.randrange(2)}")

    async def step(self, manager: ResourceManager[Doc], rid: str) -> None:
        kind = self.random.choice(["upload", "upload", "direct", "write", "write", "write", "other", "purge", "read"])
        match kind, self.written.get(rid, Written(None)):
            case (("upload" | "direct"), _):
                await self.upload(manager, directly=kind == "direct")
            case "write", state if state is None or not state.is_deleted:
                await self.write(manager, rid, state)
            case "other", state if state is not None and state.token is not None:
                await self.change(manager, rid, state)
            case "purge", _:
                await self.purge(manager, rid)
            case "read", state if state is not None and state.token is not None and not state.is_deleted:
                await self.read(manager, rid, state)
        self.done[kind] += 1

    # Uploads

    async def upload(self, manager: ResourceManager[Doc], *, directly: bool) -> None:
        self.number += 1
        content = self.random.choice([*COMMON, f"unique {self.number}".encode(), f"unique {self.number}".encode()])
        offer = Offer(content, self.random.choice(CALLERS), asyncio.get_running_loop().time())
        if directly:
            await self.upload_directly(manager, offer)
        else:
            blob = await manager.upload(content, by=offer.caller)
            assert (blob.sha256, blob.size) == (offer.sha256, len(content))
        self.offers.append(offer)

    async def upload_directly(self, manager: ResourceManager[Doc], offer: Offer) -> None:
        direct = manager.storage.direct
        announced = Announced(size=len(offer.content), sha256=offer.sha256, content_type="text/plain", name="")
        begun = await direct.begin(offer.caller, announced)
        sent = self.random.choice([1, 1, 1, 0, 2])
        for _ in range(sent):
            await manager.storage.blob_store.object_store.use("PUT", begun.url, offer.content, begun.headers)
        for _ in range(self.random.choice([1, 1, 2])):
            completed = await direct.complete(begun.id, offer.caller)
            assert completed.row.sha256 == offer.sha256
        if self.random.random() < 0.3:
            await manager.storage.blob_store.object_store.use("PUT", begun.url, offer.content, begun.headers)

    # Writes

    @contextlib.contextmanager
    def writing(self, rid: str, *states: Written) -> Any:
        """Note that a resource is written. If it is not known whether that happened, its state is unknown."""
        before, self.written[rid] = self.written.get(rid, Written(None)), None
        self.attempts[rid] += 1
        try:
            yield
        except (OutcomeUnknown, asyncio.CancelledError):
            raise
        except CrudError:
            self.written[rid] = before
            raise
        self.written[rid] = states[-1]

    async def write(self, manager: ResourceManager[Doc], rid: str, state: Written | None) -> None:
        self.number += 1
        caller, token = self.random.choice(CALLERS), f"{rid} {self.number}"
        offers = [offer for offer in self.offers[-25:] if offer.caller == caller]
        chosen = self.random.sample(offers, min(len(offers), self.random.choice([0, 1, 1, 2])))
        kept = state.contents if state is not None and self.random.random() < 0.3 else ()
        contents = tuple(dict.fromkeys((*kept, *(offer.content for offer in chosen))))
        data = Doc(token, [Blob(sha256=hashlib.sha256(content).hexdigest()) for content in contents])
        in_place = state is not None and state.is_draft and self.random.random() < 0.8
        self.named.update(file.sha256 for file in data.files)
        status = "draft" if in_place else self.random.choice(["draft", "draft", "stable"])
        try:
            with self.writing(rid, Written(token, contents, status == "draft")):
                if state is None or state.token is None:
                    await manager.create(data, resource_id=rid, status=status, by=caller)
                elif in_place:
                    await manager.modify(rid, data, by=caller)
                else:
                    await manager.update(rid, data, status=status, by=caller)
        except VersionConflict:
            assert state is None, "another resource has this id"
            await self.purge(manager, rid)
        except BlobGone:
            age = [asyncio.get_running_loop().time() - offer.began for offer in chosen]
            is_young = all(one < KEEP_S for one in age) and not set(contents) - {offer.content for offer in chosen}
            assert not is_young or self.purged & {offer.sha256 for offer in chosen}, "an upload was removed early"

    async def change(self, manager: ResourceManager[Doc], rid: str, state: Written) -> None:
        if state.is_deleted:
            with self.writing(rid, state._replace(is_deleted=False)):
                await manager.restore(rid)
        elif state.is_draft and self.random.random() < 0.5:
            with self.writing(rid, state._replace(is_draft=False)):
                await manager.publish(rid)
        else:
            with self.writing(rid, state._replace(is_deleted=True)):
                await manager.delete(rid)

    async def purge(self, manager: ResourceManager[Doc], rid: str) -> None:
        records = (await manager.storage.revisions(rid, limit=100)).items
        keys = {key for record in records for key in record.blobs}
        self.purged |= {key.partition("/")[0] for key in keys}
        rows = manager.storage.meta_store
        only_here = {key for key in keys if [use.resource_id for use in await rows.blob_uses(key)] == [rid]}
        named = self.named.copy()
        with self.writing(rid, Written(None)):
            await manager.purge(rid)
        taken = {key for key in keys if self.named[key.partition("/")[0]] != named[key.partition("/")[0]]}
        if self.is_calm:
            for key in (only_here - taken) & self.bucket.content():
                assert await rows.blob_uses(key), "a purge left content behind"

    async def read(self, manager: ResourceManager[Doc], rid: str, state: Written) -> None:
        found = await manager.get(rid)
        assert found.data.token == state.token
        for content in state.contents:
            stored = await manager.blob(rid, hashlib.sha256(content).hexdigest())
            assert b"".join([chunk async for chunk in stored.read()]) == content

    # Exports

    async def exporter(self, manager: ResourceManager[Doc]) -> None:
        while True:
            await asyncio.sleep(self.random.uniform(0, 8))
            self.number += 1
            path, file = self.root / f"{self.number}.tar.gz", io.BytesIO()  # a killed export closes no file
            before, attempts = dict(self.written), self.attempts.copy()
            slowness.set(self.random.choice([1, 0.4 / self.bucket.latency_s, 1 / self.bucket.latency_s]))
            try:
                await exporting.export_all({"doc": manager}, file)
            except CrudError as error:
                if isinstance(error, StoreDamaged) or "in a store that keeps no pins" in str(error):
                    raise AssertionError(f"an export lacks something: {error}") from error
            else:
                unchanged = {rid: state for rid, state in before.items() if self.attempts[rid] == attempts[rid]}
                path.write_bytes(file.getvalue())
                self.check_archive(path, unchanged)
                self.done["export"] += 1

    def check_archive(self, path: Path, expected: dict[str, Written | None]) -> None:
        """Check that an archive has all that its records refer to, and these states of resources."""
        content = read_back(path)["doc"]
        blobs = {row.key: bytes_ for row, bytes_ in content.blobs}
        for row, found in content.blobs:
            assert hashlib.sha256(found).hexdigest() == row.sha256
        current: dict[str, str] = {}
        for meta, revisions in content.resources:
            for record, body in revisions:
                if meta.resource_id in content.absent:
                    continue
                data = msgspec.json.decode(body, type=Doc)
                assert sorted({file.sha256 for file in data.files}) == [key.partition("/")[0] for key in record.blobs]
                assert set(record.blobs) <= blobs.keys(), "an export lacks content"
                if record.revision == meta.revision:
                    current[meta.resource_id] = data.token
        for rid, state in expected.items():
            assert state is None or current.get(rid) == state.token, "an export lacks a write"

    # The end

    async def check(self) -> None:
        bucket = self.bucket
        bucket.calm()
        await asyncio.sleep(10 * PIN_S)  # late effects, and processes that were frozen
        manager = manager_of(ProcessBucket(bucket))
        for _ in range(5):
            await asyncio.sleep(KEEP_S + PIN_S + URL_S + STAGING_S)
            await manager.maintain(10)
        records: list[RevisionInfo] = []
        async for meta in manager.storage.scan():
            found = (await manager.storage.revisions(meta.resource_id, limit=200)).items
            assert len(found) <= KEPT + 1
            records += found
        named = {key for record in records for key in record.blobs}
        for record in records:
            data = msgspec.json.decode(await manager.storage.body(record.uid), type=Doc)
            assert sorted({file.sha256 for file in data.files}) == [key.partition("/")[0] for key in record.blobs]
        for key in named:
            found = b"".join([chunk async for chunk in manager.storage.blobs.read(key)])
            assert hashlib.sha256(found).hexdigest() == key.partition("/")[0], "content is lost"
        for rid, state in self.written.items():
            await self.check_resource(manager, rid, state)
        assert bucket.content() == named, "content is lost, or is an orphan"
        assert bucket.bodies() == {record.uid for record in records}, "a body is lost, or is an orphan"
        assert not bucket.staged()
        hashes = {hashlib.sha256(offer.content).hexdigest() for offer in self.offers}
        rows: list[BlobRow] = await manager.storage.meta_store.blobs([*hashes, RESERVED])
        assert {row.key for row in rows} == named
        assert await manager.storage.meta_store.blob_usage() == BlobUsage(len(rows), sum(row.size for row in rows))
        assert [key for key, count in bucket.requested.items() if count > 1] == [], "a key was used twice"

    async def check_resource(self, manager: ResourceManager[Doc], rid: str, state: Written | None) -> None:
        if state is None:
            return
        if state.token is None:
            with pytest.raises(ResourceNotFound):
                await manager.meta(rid)
        elif not state.is_deleted:
            await self.read(manager, rid, state)
        else:
            assert (await manager.get(rid, include_deleted=True)).data.token == state.token


def simulate(seed: int, root: Path, monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Run the simulation of a seed, and return how often each step was done."""
    set_times(monkeypatch)
    monkeypatch.setattr(housekeeping, "LEAST_LOG", 20_000)
    monkeypatch.setattr(housekeeping, "ABANDONED", 40_000)
    monkeypatch.setattr(exporting, "READ_AT_ONCE", 1)  # so an export needs many requests

    async def main() -> Counter[str]:
        return await World(seed, root).history()

    return virtual_time.run(main())


@pytest.mark.parametrize("seed", SEEDS)
def test_every_history_loses_no_file_and_leaves_no_orphan(seed, tmp_path, monkeypatch):
    assert simulate(seed, tmp_path, monkeypatch)["write"]
