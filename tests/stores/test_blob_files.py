"""Files of blobs on this machine: killed processes, full disks, foreign files, dates, and use of memory."""

from __future__ import annotations

import asyncio
import datetime as dt
import errno
import hashlib
import os
import random
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest import mock

import pytest

from app.autocrud.errors import StoreDamaged, StoreUnavailable
from app.autocrud.resource_manager.backends.s3.memory_object_store import DROPPED, MemoryObjectStore
from app.autocrud.resource_manager.blob_store.s3 import S3BlobStore
from app.autocrud.resource_manager.blob_store.simple import ABANDONED_AFTER_S, INCOMING, DiskBlobStore
from app.autocrud.resource_manager.blob_store.spool import COLLECTED, Spool
from app.autocrud.resource_manager.runtime.disk_space import DiskFull
from app.autocrud.testing.blob_stores import content_of, new_uid, stored
from tests.small_disk import fill, small_disk

MB = 1024**2


def start(*arguments: str, temp: Path | None = None) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "tests.stores.blob_worker", *arguments]
    environment = os.environ | ({} if temp is None else {"TEST_TEMP": str(temp)})
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)


def files(root: Path) -> set[str]:
    return {str(path.relative_to(root)) for path in root.rglob("*") if path.is_file()}


async def test_the_empty_directory_of_a_killed_upload_is_removed(tmp_path):
    (tmp_path / "ab" / ("ab" + "0" * 62)).mkdir(parents=True)
    assert await DiskBlobStore(tmp_path).older_than(0) == []
    assert list(tmp_path.glob("??/*")) == []


@pytest.mark.slow
def test_killed_processes_leave_complete_blobs_only(tmp_path):
    """Three processes share the directory. Each one is killed at a random moment, several times."""
    rng, said = random.Random(20), []
    for round_ in range(4):
        processes = [start("upload", str(tmp_path), f"{round_} {number}") for number in range(3)]
        for process in processes:
            assert process.stdout.readline().startswith("stored")  # it has started
        for process in processes:
            time.sleep(rng.uniform(0.05, 0.3))
            process.kill()
        for process in processes:
            lines = process.stdout.read().split("\n")  # communicate() would lose what readline() has buffered
            process.communicate()
            said += lines[: -1 if lines[-1] else None]
    words = [line.split(" ") for line in said if line]
    acknowledged = {key for word, key in words if word == "stored"}
    deleted = {key for word, key in words if word == "deleted"}
    perhaps = {key for word, key in words if word == "deletes"}
    assert len(acknowledged) > 50

    async def check() -> None:
        store = DiskBlobStore(tmp_path)
        found = await store.older_than(0, limit=10**6)
        assert acknowledged - perhaps <= set(found)
        assert not deleted & set(found)
        for key in found:
            assert hashlib.sha256(await content_of(store, key)).hexdigest() == key.partition("/")[0]
        await store.delete(found)
        assert {name.partition("/")[0] for name in files(tmp_path)} <= {INCOMING}
        assert {path.name for path in tmp_path.glob("??/*")} == set(), "empty directories stay"

    asyncio.run(check())


async def test_an_abandoned_upload_is_removed_after_a_day(tmp_path):
    process = start("hang", str(tmp_path))
    file = Path(process.stdout.readline().strip())
    process.send_signal(signal.SIGKILL)
    process.communicate()
    store = DiskBlobStore(tmp_path)
    await store.maintain(10)
    assert file.exists()
    assert await store.older_than(0) == []
    written = file.stat().st_mtime
    os.utime(file, (written, written - ABANDONED_AFTER_S - 60))
    kept = await stored(store, b"kept")
    await store.maintain(10)
    assert files(tmp_path) == {f"{kept[:2]}/{kept}"}


async def test_the_file_of_a_slow_upload_is_kept(tmp_path):
    store = DiskBlobStore(tmp_path)
    async with store.receive() as writer:
        await writer.write(bytes(MB))
        (file,) = (tmp_path / INCOMING).iterdir()
        os.utime(file, (0, 0))
        await writer.write(bytes(MB))
        await store.maintain(10)
        assert file.exists()


async def test_an_upload_whose_file_was_removed_is_still_stored(tmp_path):
    """Its process was suspended for more than a day, for example."""
    store = DiskBlobStore(tmp_path)
    async with store.receive() as writer:
        await writer.write(b"1" * MB)
        (file,) = (tmp_path / INCOMING).iterdir()
        os.utime(file, (0, 0))
        await store.maintain(10)
        assert not file.exists()
        await writer.write(b"2" * MB)
        key = await writer.store(new_uid())
    assert await content_of(store, key) == b"1" * MB + b"2" * MB
    assert files(tmp_path) == {f"{key[:2]}/{key}"}


@pytest.mark.parametrize("links", [True, False])
async def test_an_upload_that_is_stored_twice_is_two_files(tmp_path, links, monkeypatch):
    if not links:
        monkeypatch.setattr(Path, "hardlink_to", mock.Mock(side_effect=OSError(errno.EPERM, "no links here")))
    store = DiskBlobStore(tmp_path)
    async with store.receive() as writer:
        await writer.write(bytes(MB))
        keys = [await writer.store(new_uid(number)) for number in range(3)]
    assert files(tmp_path) == {f"{key[:2]}/{key}" for key in keys}
    await store.delete(keys[:2])
    assert await content_of(store, keys[2]) == bytes(MB)


async def test_content_and_directories_are_synced_before_the_acknowledgement(tmp_path, monkeypatch):
    steps = []
    fsync, rename = os.fsync, Path.rename

    def noted_fsync(handle: int) -> None:
        fsync(handle)
        steps.append(("sync", Path(f"/proc/self/fd/{handle}").readlink()))

    def noted_rename(path: Path, target: Path) -> Path:
        steps.append(("rename", path, target))
        return rename(path, target)

    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(Path, "rename", noted_rename)
    root = tmp_path / "new" / "blobs"
    key = await stored(DiskBlobStore(root), b"content")
    (at,) = (at for at, step in enumerate(steps) if step[0] == "rename")
    _, path, target = steps[at]
    assert target == root / key[:2] / key
    assert steps[at - 1] == ("sync", path)
    assert {step[1] for step in steps[:at]} >= {tmp_path, root.parent, root}
    assert {step[1] for step in steps[at + 1 :]} == {target.parent, target.parent.parent, root}


async def test_a_directory_that_others_remove_meanwhile_is_made_again(tmp_path, monkeypatch):
    """Deletions of the last blob of a hash remove its directory, at any moment."""
    mkdir, times = Path.mkdir, iter(range(3))

    def mkdir_and_remove(path: Path, *arguments: object, **named: object) -> None:
        mkdir(path, *arguments, **named)
        if len(path.name) == 64 and next(times, None) is not None:
            path.rmdir()

    monkeypatch.setattr(Path, "mkdir", mkdir_and_remove)
    store = DiskBlobStore(tmp_path)
    assert await content_of(store, await stored(store, b"content")) == b"content"
    assert next(times, None) is None


async def test_foreign_files_are_ignored(tmp_path):
    store = DiskBlobStore(tmp_path)
    key = await stored(store, b"content")
    directory = tmp_path / key[:2]
    uid = "0-" + "a" * 32
    foreign = [
        tmp_path / "README",
        directory / "README",
        directory / key[:64] / "README",
        tmp_path / "zz" / ("f" * 64) / uid,
    ]
    foreign += [directory / ("0" * 64 if key[:2] != "00" else "1" * 64) / uid, tmp_path / "bodies.sqlite"]
    for path in foreign:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"precious")
        os.utime(path, (0, 0))
    assert await store.older_than(0) == [key]
    await store.delete([key])
    await store.maintain(10)
    assert {path.read_bytes() for path in foreign} == {b"precious"}


async def test_nothing_is_created_for_a_model_without_blobs(tmp_path):
    store = DiskBlobStore(tmp_path / "model" / "blobs")
    await store.health()
    await store.maintain(10)
    assert await store.older_than(0) == []
    await store.delete([f"{'0' * 64}/{new_uid()}"])
    assert list(tmp_path.iterdir()) == []


async def test_a_directory_that_cannot_be_used(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    store = DiskBlobStore(tmp_path / "file")
    with pytest.raises(StoreUnavailable):
        await stored(store, b"content")
    with pytest.raises(StoreUnavailable):
        await store.health()
    with pytest.raises((StoreDamaged, StoreUnavailable)):
        await content_of(store, f"{'0' * 64}/{new_uid()}")


async def test_a_file_that_was_cut_is_damage(tmp_path):
    store = DiskBlobStore(tmp_path)
    key = await stored(store, bytes(MB))
    os.truncate(tmp_path / key[:2] / key, MB - 1)
    assert len(await content_of(store, key, 0, MB - 1)) == MB - 1
    with pytest.raises(StoreDamaged, match=f"has {MB - 1} bytes, expected at least {MB}"):
        await content_of(store, key, 0, MB)


@pytest.mark.parametrize("kind", ["disk", "s3"])
async def test_a_full_disk_is_reported_and_leaves_nothing(tmp_path, kind, monkeypatch):
    with small_disk(tmp_path / "disk", 8) as disk:
        monkeypatch.setattr("tempfile.tempdir", str(disk))
        store = DiskBlobStore(disk / "blobs")
        if kind == "s3":
            store = S3BlobStore("double", "p/", object_store=MemoryObjectStore())
        kept = await stored(store, bytes(100_000))
        filler = fill(disk, leave=2 * MB)
        before = files(disk)
        async with store.receive() as writer:
            with pytest.raises(DiskFull, match="of 8 MB are free"):
                for _ in range(20):
                    await writer.write(bytes(300_000))
            with pytest.raises(StoreUnavailable):
                await writer.write(bytes(300_000))
            with pytest.raises(StoreUnavailable):
                await writer.store(new_uid())
        assert files(disk) == before
        filler.unlink()
        key = await stored(store, bytes(3 * MB))
        assert sorted(await store.older_than(0)) == sorted([kept, key])
        await store.close()


async def test_a_store_on_s3_writes_its_marker_only_beside_blobs():
    objects = MemoryObjectStore()
    store = S3BlobStore("double", "p/", object_store=objects)
    await objects.put("p/readme", b"")
    assert await store.older_than(0) == []
    assert objects.requests["put"] == 1
    key = await stored(store, b"content")
    assert await store.older_than(0) == [key]
    assert set(objects.objects) == {"p/readme", "p/now", f"p/{key}"}


async def test_the_date_of_the_store_decides_on_s3():
    """The clock of this machine is not asked: that of the server is a year ahead."""
    objects, when = MemoryObjectStore(), [dt.datetime.now(dt.UTC) + dt.timedelta(days=365)]
    objects.clock = lambda: when[0]
    store = S3BlobStore("double", "p/", object_store=objects)
    key = await stored(store, b"content")
    when[0] += dt.timedelta(seconds=59)
    assert await store.older_than(60) == []
    when[0] += dt.timedelta(seconds=2)
    assert await store.older_than(60) == [key]


async def test_keys_of_other_stores_are_never_blobs():
    objects = MemoryObjectStore()
    store = S3BlobStore("double", "m/blobs/", object_store=objects)
    key = await stored(store, b"content")
    others = [
        f"m/blobs/x{key}", f"m/blobs/x/{key}", f"m/blobs/{key}/0", f"m/blobs/0/{key}", f"m/{key}", f"m/blobs{key}",
        "m/blobs/0/01890000-0000-7000-8000-000000000000", f"m/blobs/{key[:64]}/0/{key[-32:]}", "m/blobs/index.sqlite/x",
    ]  # fmt: skip
    for other in others:
        await objects.put(other, b"precious")
    assert await store.older_than(0) == [key]
    await store.delete([key, *others, *(other.removeprefix("m/blobs/") for other in others)])
    assert set(objects.objects) == {*others, "m/blobs/now"}


async def test_a_failing_bucket_is_reported():
    objects = MemoryObjectStore()
    store = S3BlobStore("double", "p/", object_store=objects)
    key = await stored(store, b"content")
    objects.fault = lambda _: DROPPED
    for work in (stored(store, b"1"), content_of(store, key), store.delete([key]), store.older_than(0), store.health()):
        with pytest.raises(StoreUnavailable):
            await work
    objects.stream_chunk = 3
    stream = store.read(key)
    objects.fault = lambda _: None
    assert await anext(stream) == b"con"
    objects.fault = lambda _: DROPPED
    with pytest.raises(StoreUnavailable):
        await anext(stream)


def test_the_temporary_files_of_a_killed_process_are_removed(tmp_path):
    process = start("hang", "s3", temp=tmp_path)
    file = Path(process.stdout.readline().strip())
    assert tmp_path in file.parents
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert file.exists()
    again = start("hang", "s3", temp=tmp_path)
    again.stdout.readline()
    assert not file.exists()
    again.communicate("")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.usefixtures("seaweed_s3")
@pytest.mark.parametrize("kind", ["disk", "s3"])
def test_memory_does_not_depend_on_the_size(tmp_path, kind):
    process = start("memory", str(tmp_path) if kind == "disk" else "s3:memory/", "300", temp=tmp_path)
    grown_mb = float(process.communicate()[0])
    assert process.returncode == 0
    assert grown_mb < (60 if kind == "disk" else 100)  # S3 takes several parts of 8 MB at once, whatever the size


async def test_an_upload_whose_caller_is_cancelled_again_closes_and_removes_its_file(tmp_path):
    """The call waits for a thread when it is cancelled."""
    spool = Spool(lambda: tmp_path / "file")
    await spool.write(b"x" * COLLECTED)
    assert (tmp_path / "file").exists()
    busy = threading.Event()
    with ThreadPoolExecutor(1) as threads:
        asyncio.get_running_loop().set_default_executor(threads)
        threads.submit(busy.wait)
        closing = asyncio.create_task(spool.close())
        await asyncio.sleep(0.01)
        closing.cancel()
        with pytest.raises(asyncio.CancelledError):
            await closing
        busy.set()
    assert not (tmp_path / "file").exists()
