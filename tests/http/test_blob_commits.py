"""Commits that refer to files, while other requests remove them."""

from __future__ import annotations

import asyncio
import random

import pytest

from app.autocrud import AutoCRUD, Blob, ConfigError
from app.autocrud.errors import BlobGone, BlobNotFound, InvalidData, ResourceNotFound
from app.autocrud.resource_manager.core import Create, Update
from app.autocrud.resource_manager.meta_store.simple import MemoryMetaStore
from app.autocrud.resource_manager.resource_store.simple import MemoryResourceStore
from app.autocrud.resource_manager.storage.simple_storage import SimpleStorage
from app.autocrud.resource_manager.storage_factory import (
    DiskStorageFactory,
    IStorageFactory,
    MemoryDiskStorageFactory,
    MemoryStorageFactory,
)

from .albums import Album, sha256_of

CONTENT = b"content"


@pytest.fixture(params=["memory", "disk", "memory-disk"])
async def manager(request, tmp_path):
    factory = {
        "memory": MemoryStorageFactory,
        "disk": lambda: DiskStorageFactory(tmp_path),
        "memory-disk": lambda: MemoryDiskStorageFactory(tmp_path),
    }[request.param]()
    manager = AutoCRUD(factory).add_model(Album, indexed_fields=["title"])
    yield manager
    await manager.close()


async def rows(manager):
    return await manager.storage.blobs.rows([sha256_of(CONTENT)])


async def read(manager, resource_id: str, ref: Blob, **how) -> bytes:
    stored = await manager.blob(resource_id, ref.sha256, **how)
    return b"".join([chunk async for chunk in stored.read()])


def before_commit(manager, monkeypatch, act) -> list[int]:
    """Await `act` with the number of the attempt before each commit of the storage. Return the attempts."""
    commit, attempts = manager.storage.commit, []

    async def slow_commit(writes, once=None):
        attempts.append(len(attempts))
        await act(attempts[-1])
        return await commit(writes, once)

    monkeypatch.setattr(manager.storage, "commit", slow_commit)
    return attempts


async def test_another_upload_serves_if_a_row_is_gone_before_the_commit(manager, monkeypatch):
    ref = await manager.upload(CONTENT, by="alice")
    assert await manager.upload(CONTENT, by="alice") == ref
    older, newer = await rows(manager)

    async def remove(attempt: int) -> None:
        if attempt == 0:
            await manager.storage.blobs.release([newer.key])

    attempts = before_commit(manager, monkeypatch, remove)
    created = await manager.create(Album("x", ref), by="alice")
    assert attempts == [0, 1]
    record = await manager.storage.revision(created.meta.resource_id, 1)
    assert record.blobs == (older.key,)
    assert await read(manager, created.meta.resource_id, ref) == CONTENT


async def test_a_reference_that_is_kept_keeps_its_key(manager):
    """Other uploads of the same content do not matter, older or newer ones, of any caller."""
    refs = [await manager.upload(CONTENT, by=name) for name in ("alice", "bob", "alice")]
    keys = [row.key for row in await rows(manager)]
    for number, name in enumerate(("alice", "bob", "alice")):
        made = await manager.create(Album(f"{number}", refs[0]), resource_id=f"r{number}", by=name)
        assert (await manager.storage.revision(made.meta.resource_id, 1)).blobs == (keys[1 if name == "bob" else 2],)
    await manager.update("r1", Album("changed", refs[0]), by="alice")
    assert (await manager.storage.revision("r1", 2)).blobs == (keys[1],)
    await manager.update("r0", Album("changed", refs[0]), by="carol")
    assert (await manager.storage.revision("r0", 2)).blobs == (keys[2],)


async def test_a_commit_fails_if_no_row_is_left(manager, monkeypatch):
    ref = await manager.upload(CONTENT, by="alice")
    created = await manager.create(Album("x"), by="alice")

    async def remove(_: int) -> None:
        await manager.storage.blobs.release([row.key for row in await rows(manager)])

    before_commit(manager, monkeypatch, remove)
    for refused in (
        Create(Album("y", ref)),
        Update(resource_id=created.meta.resource_id, data=Album("y", ref)),
    ):
        await manager.upload(CONTENT, by="alice")
        with pytest.raises(BlobGone):
            await manager.batch([refused], by="alice")
    assert (await manager.get(created.meta.resource_id)).meta == created.meta
    assert await manager.count() == 1


async def test_a_purge_removes_files_that_no_other_resource_refers_to(manager):
    ref = await manager.upload(CONTENT, by="alice")
    own = await manager.upload(b"own", by="alice")
    first = await manager.create(Album("x", ref, [own]), by="alice")
    second = await manager.create(Album("y", ref), by="alice")
    await manager.purge(first.meta.resource_id)
    assert await read(manager, second.meta.resource_id, ref) == CONTENT
    assert await manager.storage.blobs.rows([own.sha256]) == []
    with pytest.raises(ResourceNotFound):
        await read(manager, first.meta.resource_id, ref)
    await manager.purge(second.meta.resource_id)
    assert await rows(manager) == []
    with pytest.raises(BlobGone):
        await manager.create(Album("z", ref), by="alice")


async def test_a_batch_may_move_a_file_from_a_resource_that_it_purges(manager):
    from app.autocrud.resource_manager.core import Purge

    ref = await manager.upload(CONTENT, by="alice")
    made = await manager.create(Album("x", ref), by="alice")
    _, moved = await manager.batch(
        [Purge(resource_id=made.meta.resource_id), Create(Album("y", ref), resource_id="new")], by="alice"
    )
    assert moved.data.cover == ref
    assert await read(manager, "new", ref) == CONTENT


async def test_uploads_references_and_purges_at_the_same_time_lose_no_file(manager):
    """Whatever is committed refers to files that can be read. The order is random, and the same in each run."""
    order = random.Random(7)
    contents = [b"one", b"two", b"three"]

    async def work(number: int) -> None:
        name = f"caller {number % 2}"
        for step in range(12):
            content = order.choice(contents)
            resource_id = f"r{order.randrange(4)}"
            await asyncio.sleep(0)
            try:
                if step % 4 == 3:
                    await manager.purge(resource_id)
                    continue
                ref = await manager.upload(content, by=name)
                album = Album(f"{number} {step}", ref, [ref])
                if await _exists(manager, resource_id):
                    await manager.update(resource_id, album, by=name)
                else:
                    await manager.create(album, resource_id=resource_id, by=name)
            except (ResourceNotFound, BlobGone):
                continue
            except Exception as error:
                if type(error).__name__ != "VersionConflict":
                    raise

    await asyncio.gather(*(work(number) for number in range(8)))
    async for meta in manager.storage.scan():
        for revision in range(1, meta.total_revision_count + 1):
            found = await manager.get(meta.resource_id, revision=revision)
            cover = found.data.cover
            assert cover is not None
            content = await read(manager, meta.resource_id, cover, revision=revision)
            assert (sha256_of(content), len(content)) == (cover.sha256, cover.size)


@pytest.mark.parametrize("status", ["stable", "draft"])
async def test_a_write_is_planned_again_if_its_resource_was_purged_and_created_meanwhile(manager, monkeypatch, status):
    ref = await manager.upload(CONTENT, by="alice")
    await manager.create(Album("1"), resource_id="r")
    await manager.update("r", Album("2"), status=status)
    revision, asked = manager.storage.revision, []

    async def late(resource_id: str, number: int):
        asked.append(number)
        if len(asked) == 1:
            await manager.purge("r")
            await manager.create(Album("other"), resource_id="r", status=status)
        return await revision(resource_id, number)

    monkeypatch.setattr(manager.storage, "revision", late)
    write = manager.update if status == "stable" else manager.modify
    written = await write("r", Album("3", ref), by="alice")
    assert asked == [2, 1] if status == "stable" else asked[:2] == [2, 1]
    assert written.meta.revision == (2 if status == "stable" else 1)
    assert await read(manager, "r", ref) == CONTENT


async def _exists(manager, resource_id: str) -> bool:
    try:
        await manager.meta(resource_id)
    except ResourceNotFound:
        return False
    return True


async def test_an_upload_whose_source_fails_stores_nothing(manager):
    async def broken():
        yield CONTENT
        raise RuntimeError("the source is gone")

    with pytest.raises(RuntimeError):
        await manager.upload(broken(), by="alice")
    assert await rows(manager) == []


@pytest.mark.parametrize("size", [0, 1, 262_143, 262_144, 1_000_000])
async def test_bytes_and_chunks_make_the_same_file(manager, size):
    content = random.Random(size).randbytes(size)

    async def chunks():
        for start in range(0, size, 100_001):
            yield content[start : start + 100_001]

    first = await manager.upload(content, name="a", content_type="image/png")
    second = await manager.upload(chunks(), name="a", content_type="image/png", sha256=sha256_of(content))
    assert first == second == Blob(sha256=sha256_of(content), size=size, content_type="image/png", name="a")
    made = await manager.create(Album("x", first))
    stored = await manager.blob(made.meta.resource_id, first.sha256)
    for start, end in ((0, None), (0, size), (size // 3, size // 2), (size, size)):
        assert b"".join([chunk async for chunk in stored.read(start, end)]) == content[start:end]


async def test_invalid_arguments_of_an_upload_are_named(manager):
    with pytest.raises(InvalidData) as refused:
        await manager.upload(b"", name="a/b", content_type="x", sha256="y")
    assert [violation.pointer for violation in refused.value.violations] == ["/name", "/content_type", "/sha256"]


async def test_a_file_is_found_by_its_record_if_the_model_lost_the_field(manager):
    """The stored data still shows the reference, so its reader may follow it; name and type are not known."""
    ref = await manager.upload(CONTENT, name="x.png", content_type="image/png")
    made = await manager.create(Album("x", ref))
    manager.codec.references = lambda _data: []
    stored = await manager.blob(made.meta.resource_id, ref.sha256)
    assert stored.blob == Blob(sha256=ref.sha256, size=len(CONTENT))
    for unknown in ("0" * 64, ref.sha256[:10], "", "x/y"):
        with pytest.raises(BlobNotFound):
            await manager.blob(made.meta.resource_id, unknown)


def test_a_model_with_files_needs_a_storage_that_has_them():
    class Bare(IStorageFactory):
        def build(self, model_name: str):
            return SimpleStorage(MemoryMetaStore(), MemoryResourceStore())

    with pytest.raises(
        ConfigError, match=r"the model 'album' has a field of type Blob, but SimpleStorage has no blobs"
    ):
        AutoCRUD(Bare()).add_model(Album)


@pytest.mark.parametrize("limits", [{"max_blob": 0}, {"max_blob": -1}, {"blob_quota": 0}, {"blob_quota": 1.5}])
def test_limits_that_are_none_are_refused(limits):
    (name,) = limits
    with pytest.raises(ConfigError, match=name):
        AutoCRUD(**limits)
    with pytest.raises(ConfigError, match=name):
        AutoCRUD().add_model(Album, **limits)
