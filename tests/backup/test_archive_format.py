"""Archives that are written and read back: everything that was written is read, in constant memory."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import tarfile

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from app.autocrud import Encoding
from app.autocrud.backup import archive_format
from app.autocrud.backup.archive_reader import verify
from app.autocrud.backup.archive_writer import ArchiveWriter
from app.autocrud.backup.compression import Compression
from app.autocrud.backup.errors import BadArchive
from app.autocrud.errors import ConfigError, InvalidData, MetadataTooLarge, StoreDamaged
from app.autocrud.resource_manager.basic import StoredKey

from .archives import NOW, Content, archived, blob, contents, read_back, resource, write

MODELS = {
    "article": Content(
        resources=[resource("a", [{"x": 1}, {"x": 2}]), resource("b", ["ü" * 100], encoding=Encoding.msgpack)],
    ),
    "empty": Content(),
}


@pytest.mark.parametrize("compression", Compression)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(models=st.dictionaries(st.from_regex(r"[a-z][a-z0-9]{0,8}", fullmatch=True), contents(), max_size=3))
def test_an_archive_is_read_as_it_was_written(tmp_path, compression, models):
    path = tmp_path / "a.tar"
    path.write_bytes(asyncio.run(archived(models, compression)))
    assert read_back(path) == models


@pytest.mark.parametrize("compression", Compression)
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=contents(), part=st.integers(900, 4000), rows=st.integers(1, 2))
def test_small_parts_hold_the_same(tmp_path, compression, content, part, rows):
    """Resources, keys and blobs are divided among parts at every place."""
    path = tmp_path / "a.tar"
    with pytest.MonkeyPatch.context() as patch:
        for module in ("archive_writer", "entries"):
            patch.setattr(f"app.autocrud.backup.{module}.MAX_PART", part)
            patch.setattr(f"app.autocrud.backup.{module}.BLOB_ROWS", rows)
        path.write_bytes(asyncio.run(archived({"m": content, "n": content}, compression)))
        assert read_back(path) == {"m": content, "n": content}
    with verify(path) as archive:
        assert all(len(model.parts) >= 2 for model in archive.manifest.models if model.revisions)


async def test_an_archive_appears_complete_and_private(tmp_path):
    path = tmp_path / "a.tar.gz"
    async with ArchiveWriter(path, created=NOW) as writer:
        await writer.begin_model("m", fields={}, unique=(), schema_version=1)
        await writer.end_model(one_moment=True)
        assert not path.exists()
        assert [entry.stat().st_mode & 0o777 for entry in tmp_path.iterdir()] == [0o600]
        result = await writer.close()
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.tar.gz"]
    assert path.stat().st_mode & 0o777 == 0o600
    with verify(path, sha256=result.sha256.upper()) as archive:
        assert (archive.sha256, archive.size) == result


async def test_an_archive_that_is_not_closed_leaves_nothing(tmp_path):
    (tmp_path / "a.tar.gz").write_bytes(b"the last backup")
    with pytest.raises(RuntimeError):
        async with ArchiveWriter(tmp_path / "a.tar.gz", created=NOW) as writer:
            await writer.begin_model("m", fields={}, unique=(), schema_version=1)
            raise RuntimeError
    assert [entry.read_bytes() for entry in tmp_path.iterdir()] == [b"the last backup"]


async def test_tar_lists_the_entries(tmp_path):
    """Entries are regular, with the mode 0600 and no owner, and stand in the order of the page."""
    row = blob(os.urandom(70_000))
    content = Content(resources=[resource("a", ["x"], blobs=[[row[0].key]])], blobs=[row])
    content.keys = [StoredKey(key="0" * 64, request="1" * 64, time=5, results=(None, content.resources[0][0]))]
    await write(tmp_path / "a.tar.gz", {"article": content})
    with tarfile.open(tmp_path / "a.tar.gz") as tar:
        entries = tar.getmembers()
    assert [entry.name for entry in entries] == [
        "format.json",
        "models/article/resources-000001.ndjson",
        "models/article/bodies-000001.bin",
        "models/article/keys-000001.ndjson",
        "models/article/blobs-000001.ndjson",
        f"models/article/blobs/{row[0].key}",
        "manifest.json",
    ]
    assert {(entry.mode, entry.uid, entry.uname, entry.isfile()) for entry in entries} == {(0o600, 0, "", True)}
    listed = subprocess.run(["tar", "tzf", tmp_path / "a.tar.gz"], capture_output=True, text=True, check=True)
    assert listed.stdout.splitlines() == [entry.name for entry in entries]


async def test_resources_that_were_purged_meanwhile_are_left_out(tmp_path):
    gone = resource("b", ["x", "y"])
    gone[1][1] = (gone[1][1][0], None)
    lost_blob = blob(b"x" * 100)
    without_blob = resource("c", ["z"], blobs=[[lost_blob[0].key]])
    content = Content(
        resources=[resource("a", ["x"]), gone, without_blob, resource("d", ["x"])], absent=("b", "c", "e")
    )

    async def missing(_key):
        raise StoreDamaged("it is missing")
        yield b""

    async def rows(_keys):
        return [lost_blob[0]]

    async with ArchiveWriter(tmp_path / "a.tar.gz", created=NOW) as writer:
        await writer.begin_model("m", fields={}, unique=(), schema_version=1)
        for meta, revisions in content.resources:
            await writer.add_resource(meta)
            for record, body in revisions:
                await writer.add_revision(record, body)
        await writer.add_blobs(rows, missing)
        assert await writer.unresolved() == ["c"]
        for absent in [(), ("b",), ("c",)]:
            with pytest.raises(StoreDamaged):
                await writer.end_model(one_moment=False, absent=absent)
        await writer.end_model(one_moment=False, absent=content.absent)
        await writer.close()
    read = read_back(tmp_path / "a.tar.gz")["m"]
    assert [meta.resource_id for meta, _ in read.resources] == ["a", "d"]
    assert read.absent == ("b", "c", "e")


async def test_the_writer_refuses_what_no_reader_accepts(tmp_path):
    meta, revisions = resource("a", [{"x": 1}, {"x": 2}])
    (first, body), (second, _) = revisions
    wrong = [
        [(replace(first, resource_id="b"), body)],
        [(first, body), (first, body)],
        [(replace(first, revision=3, parent=None), body)],
        [(replace(first, parent=1), body)],
        [(first, body + b" ")],
        [(first, body), (replace(second, status="draft"), revisions[1][1])],
        [(first, body)],  # the current revision is missing
    ]
    for number, given_revisions in enumerate(wrong):
        content = Content(resources=[(meta, given_revisions), resource("b", ["x"])])
        with pytest.raises(StoreDamaged):
            await write(tmp_path / f"{number}.tar.gz", {"m": content})
    with pytest.raises(StoreDamaged):
        await write(tmp_path / "a.tar.gz", {"m": Content(resources=[resource("b", ["x"]), resource("a", ["x"])])})
    with pytest.raises(MetadataTooLarge):
        await write(tmp_path / "a.tar.gz", {"m": Content(resources=[resource("i" * 300_000, ["x"])])})
    with pytest.raises(ConfigError, match=r"\.tar\.gz or \.tar\.zst"):
        await write(tmp_path / "a.zip", {})
    with pytest.raises(InvalidData):
        await write(tmp_path / "missing" / "a.tar.gz", {})
    assert list(tmp_path.iterdir()) == []


async def test_another_archive_is_refused_by_its_hash(tmp_path):
    result = await write(tmp_path / "a.tar.gz", MODELS)
    verify(tmp_path / "a.tar.gz", sha256=result.sha256).close()
    with pytest.raises(BadArchive, match="it is another one"):
        verify(tmp_path / "a.tar.gz", sha256="0" * 64)


def test_sizes_of_the_limits():
    assert (archive_format.MAX_PART, archive_format.MAX_LINE, archive_format.MAX_BLOB) == (8 << 20, 256 << 10, 5 << 30)


MEMORY = """
import asyncio, hashlib, os, resource, sys, uuid, datetime as dt
from tests.backup.archives import *

def peak():
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1]) / 1024

async def main(path):
    sample = os.urandom(1 << 20)
    digest = hashlib.sha256()
    for _ in range(400): digest.update(sample)
    row = BlobRow(key=f"{digest.hexdigest()}/0-{uuid.uuid4().hex}", size=400 << 20, owner="0" * 64)
    async def rows(keys): return [row]
    async def read(key):
        for _ in range(400): yield sample
    before = peak()
    async with ArchiveWriter(path, created=NOW) as writer:
        await writer.begin_model("m", fields={}, unique=(), schema_version=1)
        text = {"x": os.urandom(2000).hex() * 10}
        meta, revisions = resource("a", [text], blobs=[[row.key]])
        count = 15_000  # of one resource, 600 MB
        await writer.add_resource(replace(meta, total_revision_count=count, revision=count))
        for number in range(1, count + 1):
            record, body = revisions[0]
            await writer.add_revision(replace(record, revision=number, parent=number - 1 or None), body)
        await writer.add_blobs(rows, read)
        await writer.end_model(one_moment=True)
        await writer.close()
    written = peak() - before
    with verify(path) as archive:
        items = sum(1 for _ in archive.resources("m"))
        size = sum(len(chunk) for _, chunks in archive.blobs("m") for chunk in chunks)
    print(items, size >> 20, round(written), round(peak() - before))

asyncio.run(main(Path(sys.argv[1])))
"""


@pytest.mark.slow
def test_a_gigabyte_takes_little_memory(tmp_path):
    """One resource has 600 MB of revisions, and one blob has 400 MB."""
    done = subprocess.run(
        [sys.executable, "-c", MEMORY, tmp_path / "a.tar.gz"], capture_output=True, text=True, check=True
    )
    items, size, written, read = map(int, done.stdout.split())
    assert (items, size) == (15_001, 400)
    assert written < 100
    assert read < 100
