"""Export and import of large stores, beside `tar | gzip -6` of the same bytes. Each step is a process of its own.

    python -m benchmarks.archives --kind disk --resources 1000000 --blob-mb 10240 --dir /tmp/archives

It makes an archive with that many resources and with files of 1 MB each, imports it into an empty store, exports that
store, and imports the export into another empty store. For each step it prints the MB/s of the archive's content and
the peak of the memory. With `--kind s3-sqlite`, the address and the keys of an S3 server are taken from
`CRUDSTACK_S3_ENDPOINT_URL` and the AWS_ variables; the bucket `crudstack-bench` must exist.
"""

from __future__ import annotations

import argparse
import asyncio
import datetime as dt
import functools
import gzip
import hashlib
import json
import os
import random
import resource
import shutil
import subprocess
import sys
import time
import uuid
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import msgspec
from msgspec import Struct

from app.autocrud import AutoCRUD, Blob, Encoding
from app.autocrud.backup.archive_writer import ArchiveWriter
from app.autocrud.backup.exporting import export_all
from app.autocrud.backup.importing import import_all
from app.autocrud.resource_manager.basic import BlobRow, ResourceMeta, RevisionInfo
from app.autocrud.resource_manager.core import ResourceManager
from app.autocrud.resource_manager.records import owner_of
from app.autocrud.resource_manager.storage_factory import DiskStorageFactory, S3StorageFactory

NOW = dt.datetime(2026, 1, 1, tzinfo=dt.UTC)
MB = 1024 * 1024
BUCKET = "crudstack-bench"


class Article(Struct):
    title: str
    content: str
    author: str
    views: int = 0
    file: Blob | None = None


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.archives", description=__doc__)
    parser.add_argument("--kind", choices=("disk", "s3-sqlite"), default="disk")
    parser.add_argument("--resources", type=int, default=100_000)
    parser.add_argument("--blob-mb", type=int, default=1024, help="how many files of 1 MB")
    parser.add_argument("--random", type=float, default=0.5, help="the part of files that cannot be made smaller (0.5)")
    parser.add_argument("--dir", type=Path, required=True, help="a new directory for all data")
    parser.add_argument("--step", nargs="*", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.step:
        asyncio.run(_step(options, *options.step))
        return
    options.dir.mkdir(parents=True)
    _run(options, "make", "made.tar.gz")
    size = _plain_size(options.dir / "made.tar.gz")
    print(f"{options.resources} resources, {size / MB:.0f} MB, {options.kind}", flush=True)
    results = {}
    for name, step in (
        ("import", ("import", "made.tar.gz", "first")),
        ("export", ("export", "first", "out.tar.gz")),
        ("import of the export", ("import", "out.tar.gz", "second")),
    ):
        took, peak = _run(options, *step)
        results[name] = size / MB / took
        print(f"{name}: {took:.1f} s, {results[name]:.1f} MB/s, peak {peak} MB", flush=True)
        if name == "export":
            shutil.rmtree(options.dir / "first")  # the disk need not hold two stores
    unpacked = options.dir / "unpacked"
    unpacked.mkdir()
    subprocess.run(["tar", "-xzf", options.dir / "out.tar.gz", "-C", unpacked], check=True)
    start = time.perf_counter()
    with (options.dir / "peer.tar.gz").open("wb") as file:
        tar = subprocess.Popen(["tar", "-c", "."], cwd=unpacked, stdout=subprocess.PIPE)
        subprocess.run(["gzip", "-6"], stdin=tar.stdout, stdout=file, check=True)
        assert tar.wait() == 0
    peer = size / MB / (time.perf_counter() - start)
    print(
        f"tar | gzip -6: {peer:.1f} MB/s; export {results['export'] / peer:.2f}, import {results['import'] / peer:.2f}"
    )
    shutil.rmtree(options.dir)


def _run(options: argparse.Namespace, *step: str) -> tuple[float, int]:
    """Run a step in a process. Return its time in s, and its peak of memory in MB less that of an idle process."""
    names = ("kind", "resources", "blob_mb", "random", "dir")
    arguments = [f"--{name.replace('_', '-')}={getattr(options, name)}" for name in names]
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.archives", *arguments, "--step", *step], check=True, stdout=subprocess.PIPE
    )
    return tuple(json.loads(done.stdout.splitlines()[-1]))


async def _step(options: argparse.Namespace, name: str, *arguments: str) -> None:
    idle = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    paths = [options.dir / one for one in arguments]
    if name == "make":
        start = time.perf_counter()
        await _make(options, paths[0])
    else:
        archive, store = sorted(paths, key=lambda path: not path.name.endswith(".gz"))
        manager = _manager(options, store)
        await manager.open()  # the first time, this looks for 20 s whether SeaweedFS decides between writers
        start = time.perf_counter()
        if name == "export":
            await export_all({"article": manager}, archive)
        else:
            result = await import_all({"article": manager}, archive)
            assert result.models["article"].created == options.resources, result
        await manager.close()
    took = time.perf_counter() - start
    print(json.dumps([took, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - idle) // 1024]))


def _manager(options: argparse.Namespace, store: Path) -> ResourceManager[Article]:
    if options.kind == "disk":
        factory = DiskStorageFactory(store)
    else:
        url = os.environ["CRUDSTACK_S3_ENDPOINT_URL"]
        prefix = f"{options.dir.name}/{store.name}/{os.getppid()}/"
        factory = S3StorageFactory(BUCKET, endpoint_url=url, prefix=prefix, local_dir=str(store))
    return AutoCRUD(storage_factory=factory).add_model(Article, indexed_fields=["author", "views"])


async def _make(options: argparse.Namespace, target: Path) -> None:
    random_ = random.Random(0)
    words = [random_.randbytes(3).hex() for _ in range(4000)]
    blobs: dict[str, int] = {}
    keys = []
    for number in range(options.blob_mb):
        key = f"{hashlib.sha256(_content(options, number, words)).hexdigest()}/0-{uuid.UUID(int=number).hex}"
        blobs[key] = number
        keys.append(key)

    async def rows(asked: Sequence[str]) -> list[BlobRow]:
        return [BlobRow(key=key, size=MB, owner=owner_of("alice")) for key in asked]

    async def read(key: str) -> AsyncIterator[bytes]:
        content = _content(options, blobs[key], words)
        for start in range(0, MB, 256 * 1024):
            yield content[start : start + 256 * 1024]

    every = max(1, options.resources // max(1, options.blob_mb))
    async with ArchiveWriter(target, created=NOW) as writer:
        await writer.begin_model("article", fields={"author": "str", "views": "int"}, unique=(), schema_version=1)
        for number in range(options.resources):
            key = keys.pop() if number % every == 0 and keys else None
            meta, record, body = _article(number, key, random_, words)
            await writer.add_resource(meta)
            await writer.add_revision(record, body)
        await writer.add_blobs(rows, read)
        await writer.end_model(one_moment=True)
        await writer.close()


def _content(options: argparse.Namespace, number: int, words: Sequence[str]) -> bytes:
    own = random.Random(number)
    if number < options.random * options.blob_mb:
        return own.randbytes(MB)
    text = " ".join(own.choices(words, k=2000)).encode()
    return (b"%d " % number + text * (MB // len(text) + 1))[:MB]


def _article(
    number: int, key: str | None, random_: random.Random, words: Sequence[str]
) -> tuple[ResourceMeta, RevisionInfo, bytes]:
    resource_id = f"{number:012d}"
    author = f"author {number % 1000}"
    file = (
        None if key is None else Blob(sha256=key[:64], size=MB, content_type="application/octet-stream", name="a.bin")
    )
    article = Article(f"Title {number}", " ".join(random_.choices(words, k=40)), author, number % 997, file)
    body = msgspec.json.encode(article, order="deterministic")
    record = RevisionInfo(
        uid=f"3/{uuid.UUID(int=number)}",
        resource_id=resource_id,
        revision=1,
        parent=None,
        schema_version=1,
        status="stable",
        data_hash=hashlib.sha256(body).hexdigest(),
        encoding=Encoding.json,
        created_time=NOW,
        updated_time=NOW,
        created_by="alice",
        updated_by="alice",
        blobs=() if key is None else (key,),
    )
    meta = ResourceMeta(
        resource_id=resource_id,
        version=1,
        nonce=f"{number:016x}",
        total_revision_count=1,
        is_deleted=False,
        created_time=NOW,
        updated_time=NOW,
        created_by="alice",
        updated_by="alice",
        **record.meta_fields,
    )
    return meta, record, body


def _plain_size(archive: Path) -> int:
    with gzip.open(archive) as file:
        return sum(map(len, iter(functools.partial(file.read, MB), b"")))


if __name__ == "__main__":
    main()
