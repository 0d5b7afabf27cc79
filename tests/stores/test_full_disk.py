"""Full disks, on file systems of a few megabytes: errors, eviction, remaining files, and recovery."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
from msgspec import Struct

from app import wiring
from app.autocrud import AutoCRUD
from app.autocrud.resource_manager.backends.s3.memory_object_store import MemoryObjectStore
from app.autocrud.resource_manager.backends.s3_sqlite import copy_files
from app.autocrud.resource_manager.core import ResourceManager
from app.autocrud.resource_manager.resource_store.cache import DiskCache
from app.autocrud.resource_manager.runtime import disk_space, temporary
from app.autocrud.resource_manager.runtime.disk_space import DiskFull
from app.autocrud.resource_manager.storage.stores_by_name import DIRECTORIES_BYTES
from app.autocrud.resource_manager.storage_factory import DiskStorageFactory, S3StorageFactory
from app.settings import load
from tests.small_disk import fill, small_disk

MB = 1024**2


class Note(Struct):
    text: str


def note(number: int) -> Note:
    return Note(f"{number}-" + "x" * 100_000)


def instance(objects: MemoryObjectStore, local_dir: Path | None = None) -> ResourceManager[Note]:
    factory = S3StorageFactory("double", object_store=objects, local_dir=local_dir, sync_interval=None)
    return AutoCRUD(storage_factory=factory).add_model(Note, indexed_fields=["text"])


@pytest.fixture
def disk(tmp_path, monkeypatch):
    with small_disk(tmp_path / "disk", 24) as directory:
        monkeypatch.setattr(tempfile, "tempdir", str(directory))
        monkeypatch.setattr(temporary, "_cleaned", set())
        yield directory


@pytest.fixture
def objects() -> MemoryObjectStore:
    return MemoryObjectStore()


def files(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.rglob("*") if path.is_file())


@pytest.mark.parametrize("shared", [False, True])
async def test_a_full_disk_is_called_one_and_works_again_when_there_is_room(objects, disk, caplog, shared):
    manager = instance(objects, disk / "copies" if shared else None)
    await manager.create(note(0), resource_id="note")
    filler = fill(disk)
    acknowledged, refused = 0, None
    for number in range(1, 200):
        try:
            await manager.update("note", note(number))
            acknowledged = number
        except DiskFull as error:
            refused = error
            break
    assert refused is not None
    assert (refused.type, refused.status) == ("store-unavailable", 503)
    assert "the disk is full" in refused.detail
    assert "of 24 MB are free" in refused.detail
    assert str(disk) not in refused.detail
    assert str(disk) in caplog.text
    filler.unlink()
    now = (await manager.get("note")).data
    assert int(now.text.partition("-")[0]) >= acknowledged
    await manager.update("note", note(1000))
    assert (await instance(objects).get("note")).data == note(1000)
    await manager.storage.close()


async def made_with_snapshot(objects: MemoryObjectStore) -> None:
    manager = instance(objects)
    for number in range(30):
        await manager.create(note(number), resource_id=f"note{number}")
    await manager.storage.maintain(30)
    assert any("/snap/" in key for key in objects.objects)
    await manager.storage.close()


@pytest.mark.parametrize("leave", [0, 100_000, 1_500_000, 3_300_000])
async def test_a_download_that_does_not_fit_leaves_nothing(objects, disk, leave):
    """`leave`: bytes for the directory, the file, half of the snapshot, or the snapshot without its index entries."""
    await made_with_snapshot(objects)
    filler = fill(disk, leave)
    manager = instance(objects)
    for _ in range(2):
        with pytest.raises(DiskFull, match="of 24 MB are free"):
            await manager.get("note1")
        copies = {name.partition(".")[0] for name in files(disk) if name.startswith("copy-")}
        assert len(copies) <= 1, "half a copy stays beside the empty one"
    filler.unlink()
    assert (await manager.get("note1")).data == note(1)
    assert await manager.count() == 30
    await manager.storage.close()


async def test_a_download_from_s3_is_told_from_a_failure_of_s3(ministack_s3, disk):
    objects = ministack_s3.object_store()
    (disk / "source").write_bytes(os.urandom(6 * MB))
    await objects.upload("full/source", disk / "source")
    (disk / "source").unlink()
    filler = fill(disk, 2 * MB)
    with pytest.raises(DiskFull, match=r"of 24 MB are free, and 6\.0 MB are needed"):
        await objects.download("full/source", disk / "target")
    filler.unlink()
    assert await objects.download("full/source", disk / "target")
    assert (disk / "target").stat().st_size == 6 * MB


async def test_a_full_disk_empties_caches_and_no_request_fails(objects, disk):
    cache = DiskCache(disk / "crudstack-cache", max_bytes=10 * MB)
    manager = instance(objects)
    await manager.create(note(0), resource_id="note")
    for number in range(80):
        await cache.put(f"{number}", os.urandom(100_000), 600)
    assert sum(path.stat().st_size for path in (disk / "crudstack-cache").glob("entries-*.sqlite")) > 7 * MB
    fill(disk)
    before = disk_space.space(disk).free
    assert before < 200_000
    for number in range(12):
        await manager.create(note(number), resource_id=f"note{number}")
    for number in range(12):
        assert (await manager.get(f"note{number}")).data == note(number)
    assert await cache.get("1") is None
    await cache.put("new", b"new", 600)  # what is free is for the copies
    assert await cache.get("new") is None
    await cache.close()
    await manager.storage.close()


async def test_copies_of_killed_processes_are_removed_before_a_request_fails(objects, disk):
    manager = instance(objects)
    await manager.create(note(0), resource_id="note")
    gone = disk / f"{temporary.PREFIX}{'0' * 16}"  # it was still alive when this process looked
    gone.mkdir()
    (gone / "copy").write_bytes(b"\0" * 4 * MB)
    fill(disk)
    for number in range(12):
        await manager.create(note(number), resource_id=f"note{number}")
    assert not gone.exists()
    await manager.storage.close()


async def test_copies_that_killed_processes_left_in_a_shared_directory_go_when_the_disk_is_full(objects, disk):
    manager = instance(objects, disk / "copies")
    await manager.create(note(0), resource_id="note")
    (directory,) = (disk / "copies").iterdir()
    left, young = directory / f"copy-{'0' * 32}.sqlite", directory / f"copy-{'1' * 32}.sqlite"
    left.write_bytes(b"\0" * 4 * MB)
    young.touch()
    os.utime(left, (time.time() - 120, time.time() - 120))
    fill(disk)
    for number in range(12):
        await manager.create(note(number), resource_id=f"note{number}")
    assert not left.exists()
    assert young.exists(), "another process may be making it"
    await manager.storage.close()


async def test_a_cache_that_starts_with_little_room_starts_empty(disk):
    cache = DiskCache(disk / "cache", max_bytes=4 * MB)
    for number in range(30):
        await cache.put(f"{number}", os.urandom(100_000), 600)
    await cache.put("old", b"old", 600)
    await cache.close()
    fill(disk, 5 * MB)
    cache = DiskCache(disk / "cache", max_bytes=4 * MB)
    assert await cache.get("old") is None
    assert sum(path.stat().st_size for path in (disk / "cache").glob("entries-*")) < MB
    await cache.put("new", b"new", 600)
    assert await cache.get("new") == b"new"
    await cache.close()


async def test_a_store_on_a_full_disk_says_so(disk):
    manager = AutoCRUD(storage_factory=DiskStorageFactory(disk / "data")).add_model(Note, indexed_fields=["text"])
    await manager.create(note(0), resource_id="note")
    filler = fill(disk)
    acknowledged = 0
    with pytest.raises(DiskFull, match="of 24 MB are free"):
        for number in range(1, 100):
            await manager.update("note", note(number))
            acknowledged = number
    filler.unlink()
    assert (await manager.get("note")).data == note(acknowledged)
    await manager.update("note", note(1000))
    await manager.storage.close()


# Which errors are those of a full disk


class SqliteError(Exception):
    def __init__(self, result: int) -> None:
        super().__init__("an error")
        self.result = result


@pytest.mark.parametrize(
    ("error", "free", "expected"),
    [
        (OSError(errno.ENOSPC, ""), 10**9, True),
        (OSError(errno.EDQUOT, ""), 10**9, True),
        (OSError(errno.EIO, ""), 0, False),
        (SqliteError(13), 10**9, True),
        (SqliteError(10), 0, True),
        (SqliteError(14), 0, True),
        (SqliteError(14), 10**9, False),
        (SqliteError(10), 10**9, False),
        (SqliteError(11), 0, False),
        (ValueError(), 0, False),
    ],
)
def test_errors_of_a_full_disk(error, free, expected, tmp_path, monkeypatch):
    monkeypatch.setattr(disk_space, "space", lambda _: disk_space.Space(10**9, free, inodes=True))
    assert disk_space.is_full(error, tmp_path) is expected


def test_current_is_switched_wholly_or_not(tmp_path, monkeypatch):
    copy_files.make_current(tmp_path / "copy-1.sqlite")

    def fails(self, _):
        self.touch()
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", fails)
        with pytest.raises(OSError, match="No space"):
            copy_files.make_current(tmp_path / "copy-2.sqlite")
    assert files(tmp_path) == ["current"]
    assert (tmp_path / "current").read_text() == "copy-1.sqlite"


# One bound for the caches of all models

S3 = {"CRUDSTACK_STORAGE": "cached-s3", "CRUDSTACK_BUCKET": "b", "CRUDSTACK_S3_ENDPOINT_URL": "http://127.0.0.1:9"}


def disk_caches(environment: dict[str, str], *models: str) -> list[DiskCache]:
    factory = wiring.storage_factory(load(S3 | environment), idle_work=False)
    caches = [cache for model in models for cache in factory.build(model).resource_store.caches]
    return [cache for cache in caches if isinstance(cache, DiskCache)]


async def test_all_models_share_one_bound_that_holds_in_blocks_too(disk):
    caches = disk_caches({}, "article", "user", "airport")
    assert len(caches) == 3
    bound = 24 * MB // 4
    for number in range(400):
        await caches[number % 3].put(f"{number}", os.urandom(33_000), 600)
    root = disk / "crudstack-cache"
    blocks = sum(4096 * -(-path.stat().st_size // 4096) if path.is_file() else 4096 for path in root.rglob("*"))
    assert bound / 2 < blocks <= bound
    assert await caches[0].get("399") is not None  # the models share the entries
    assert await caches[0].get("0") is None
    for cache in caches:
        await cache.close()


@pytest.mark.parametrize("text", ["0", "-1", "1.5", "x", "", "9" * 40, "\u0661"])
def test_the_size_of_the_cache_is_a_whole_number(text):
    if not text:
        assert load(S3 | {"CRUDSTACK_CACHE_MB": text}).local.cache_mb is None
        return
    with pytest.raises(ValueError, match=r"CRUDSTACK_CACHE_MB is .*expected a whole number of megabytes"):
        load(S3 | {"CRUDSTACK_CACHE_MB": text})


def test_the_size_of_the_cache_can_be_set_and_former_caches_go(tmp_path):
    given = {"CRUDSTACK_DATA_DIR": str(tmp_path), "CRUDSTACK_CACHE_MB": "11"}
    (cache,) = disk_caches(given, "article")
    assert cache.max_bytes == 11 * MB - DIRECTORIES_BYTES
    for model in ("user", "airport"):
        former = cache.cache_dir.with_name(model)
        (former / "life-1").mkdir(parents=True)
        (former / "life-1/cache.db").touch()
        (former / "lock").touch()
    own = cache.cache_dir.with_name("airport") / "entries-1.sqlite"  # a cache that another program uses
    own.touch()
    disk_caches(given, "article", "user", "airport")
    assert not cache.cache_dir.with_name("user").exists()
    assert {path.name for path in own.parent.iterdir()} == {"lock", own.name}


# Killed at any moment


def test_processes_that_are_killed_again_and_again_lose_nothing_and_fill_no_disk(ministack_s3, bucket, tmp_path):
    rng = random.Random(18)
    with small_disk(tmp_path / "disk", 64) as disk:
        environment = os.environ | {
            "TMPDIR": str(disk),
            "CRUDSTACK_STORAGE": "cached-s3",
            "CRUDSTACK_BUCKET": bucket,
            "CRUDSTACK_S3_ENDPOINT_URL": ministack_s3.url,
            "AWS_ACCESS_KEY_ID": ministack_s3.access_key_id,
            "AWS_SECRET_ACCESS_KEY": ministack_s3.secret_access_key,
        }
        environment.pop("CRUDSTACK_DATA_DIR", None)
        acknowledged: dict[str, str] = {}
        for round_ in range(10):
            command = [sys.executable, "-m", "tests.stores.small_disk_worker", json.dumps(acknowledged)]
            with subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
            ) as one:
                # One of three is killed while it opens and downloads.
                if round_ % 3 < 2 and one.stdout.readline() != "checked\n":
                    raise AssertionError(one.stderr.read())
                for _ in range(rng.randrange(1, 4) if round_ % 3 < 2 else 0):
                    line = one.stdout.readline()
                    assert line, one.stderr.read()
                    acknowledged.update([line.split()])
                time.sleep(rng.random())
                one.kill()
                for line in one.stdout:
                    if len(words := line.split()) == 2 and line.endswith("\n"):
                        acknowledged[words[0]] = words[1]
            directories = list(disk.glob(f"{temporary.PREFIX}*"))
            assert len(directories) <= 1, "copies of earlier processes stay"
            assert disk_space.space(disk).free > 16 * MB
        assert len(acknowledged) > 3
        with contextlib.suppress(FileNotFoundError):
            shutil.rmtree(disk / "crudstack-cache")
