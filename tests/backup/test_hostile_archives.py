"""Archives that are truncated, damaged, hostile or of the future: each is refused with one sentence."""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import io
import itertools
import json
import os
import random
import re
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from backports import zstd

from app.autocrud.backup.archive_reader import verify
from app.autocrud.backup.compression import Compression
from app.autocrud.backup.errors import ArchiveTooLarge, BadArchive
from app.autocrud.backup.tar import encode_header, padding
from app.autocrud.errors import CrudError, InvalidData
from app.autocrud.resource_manager.basic import StoredKey

from .archives import Content, archived, blob, read_back, resource

Entry = tuple[str, bytes]


def content() -> Content:
    """Return a content with everything that an archive may hold."""
    row = blob(b"some bytes" * 100)
    resources = [
        resource("a", [{"x": 1}, {"x": 2}], blobs=[[row[0].key], []]),
        resource("b", [{"y": "z"}]),
    ]
    key = StoredKey(key="0" * 64, request="1" * 64, time=5, results=(None, resources[0][0]))
    return Content(resources=resources, keys=[key], blobs=[row])


@pytest.fixture
def path(tmp_path) -> Path:
    return tmp_path / "archive"


def refusal(path: Path, archive: bytes, **options: Any) -> str:
    """Return the sentence with which an archive is refused."""
    path.write_bytes(archive)
    before = set(Path("/proc/self/fd").iterdir())
    with pytest.raises(CrudError) as caught:
        verify(path, **options)
    assert isinstance(caught.value, (BadArchive, ArchiveTooLarge)), caught.value
    assert set(Path("/proc/self/fd").iterdir()) == before
    sentence = caught.value.detail
    assert "\n" not in sentence
    assert len(sentence) < 1000
    return sentence


def entries_of(archive: bytes) -> list[Entry]:
    """Return the entries of an archive, with their content."""
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        return [(member.name, tar.extractfile(member).read()) for member in tar]


def packed(entries: list[Entry], end: bytes = bytes(1024)) -> bytes:
    """Return an archive of these entries."""
    plain = [encode_header(name, len(text), 0) + text + bytes(padding(len(text))) for name, text in entries]
    return gzip.compress(b"".join(plain) + end, mtime=0)


def described(entries: list[Entry], **changes: Any) -> list[Entry]:
    """Return the entries with a manifest that has the right sizes and hashes of their parts.

    `changes` are those of the model in the manifest.
    """
    found = dict(entries)
    manifest = json.loads(found["manifest.json"])
    parts = [
        {"name": name, "size": len(text), "sha256": hashlib.sha256(text).hexdigest()}
        for name, text in entries
        if name.startswith("models/") and "/blobs/" not in name
    ]
    manifest["models"][0] |= {"parts": parts} | changes
    return [*(one for one in entries if one[0] != "manifest.json"), ("manifest.json", json.dumps(manifest).encode())]


def changed(entries: list[Entry], name: str, change: Callable[[bytes], bytes], **counts: Any) -> bytes:
    """Return an archive in which one entry was changed, with a manifest that says so."""
    return packed(described([(one, change(text) if one.endswith(name) else text) for one, text in entries], **counts))


def of_lines(change: Callable[[list[Any]], object]) -> Callable[[bytes], bytes]:
    """Return a function that changes the lines of a part."""

    def changed_lines(text: bytes) -> bytes:
        lines = [json.loads(line) for line in text.splitlines()]
        change(lines)
        return b"".join(json.dumps(line).encode() + b"\n" for line in lines)

    return changed_lines


async def test_the_helpers_make_an_archive_that_is_accepted(path):
    expected = content()
    entries = entries_of(await archived({"m": expected}))
    path.write_bytes(packed(described(entries)))
    assert read_back(path) == {"m": expected}
    path.write_bytes(packed(entries, bytes(10240)))  # programs fill up the last record
    assert read_back(path) == {"m": expected}


@pytest.mark.parametrize("compression", Compression)
async def test_every_truncated_archive_is_refused(path, compression):
    archive = await archived({"m": content()}, compression)
    for size in range(len(archive)):
        refusal(path, archive[:size])


@pytest.mark.parametrize("compression", Compression)
async def test_an_archive_with_a_flipped_bit_is_refused(path, compression):
    """Some bits of a header have no meaning, and no checksum covers them. They change nothing."""
    expected = content()
    archive = await archived({"m": expected}, compression)
    accepted = 0
    for bit in range(0, 8 * len(archive), 3):
        flipped = bytearray(archive)
        flipped[bit // 8] ^= 1 << bit % 8
        path.write_bytes(flipped)
        try:
            found = read_back(path)
        except (BadArchive, ArchiveTooLarge):
            continue
        assert found == {"m": expected}
        accepted += 1
    assert accepted < 0.02 * 8 / 3 * len(archive)


@pytest.mark.parametrize("compression", Compression)
async def test_damaged_archives_raise_no_other_error(path, compression):
    """Bytes are replaced, removed, inserted and repeated at random places."""
    archive = await archived({"m": content()}, compression)
    plain = gzip.decompress(archive) if compression is Compression.gzip else zstd.decompress(archive)
    compress = (lambda data: gzip.compress(data, mtime=0)) if compression is Compression.gzip else zstd.compress
    random.seed(20)
    for _ in range(1500):
        damaged = bytearray(random.choice([archive, plain]))
        is_plain = len(damaged) == len(plain)
        at, size = random.randrange(len(damaged)), random.choice([1, 2, 512, 1024])
        damaged[at : at + size] = random.choice(
            [b"", os.urandom(size), bytes(size), damaged[at : at + size] * 2, b"../", b"\xff" * size]
        )
        path.write_bytes(compress(bytes(damaged)) if is_plain else damaged)
        with contextlib.suppress(BadArchive, ArchiveTooLarge):
            read_back(path)


ESCAPES = [
    "../x",
    "/etc/passwd",
    "models/../../x",
    "models/m/../x",
    "models/m/resources-000001.ndjson/x",
    "x",
    "models/m",
]


@pytest.mark.parametrize("name", ESCAPES)
async def test_names_that_no_archive_has_are_refused(path, name):
    entries = entries_of(await archived({"m": content()}))
    for position in range(1, len(entries) + 1):
        refusal(path, packed([*entries[:position], (name, b"x"), *entries[position:]]))
    sentence = refusal(path, packed([entries[0], (name, b"x"), *entries[1:]]))
    if name.startswith("/"):
        assert f"the entry {name!r} has an absolute path: pack the files under the names" in sentence
    elif ".." in name:
        assert f"the entry {name!r} has a path with `..`: pack the files under the names" in sentence
    else:
        assert f"the entry {name!r}, which no archive" in sentence


@pytest.mark.parametrize("kind", [b"1", b"2", b"3", b"4", b"5", b"6", b"7", b"x", b"g", b"L", b"K", b"S", b"\0", b"N"])
async def test_entries_that_are_no_regular_files_are_refused(path, kind):
    header = bytearray(encode_header("models/m/resources-000001.ndjson", 0, 0))
    header[156:157] = kind
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    first = encode_header("format.json", 44, 0) + b'{"format":"crudstack-archive","version":1}  ' + bytes(468)
    assert re.search("regular files only: [a-z]+ ", refusal(path, gzip.compress(first + header + bytes(1024), mtime=0)))


@pytest.mark.parametrize("form", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
async def test_other_formats_of_tar_are_refused(path, form):
    """PAX headers may replace names and sizes; GNU tar has long names and sparse files."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w:gz", format=form) as tar:
        for name, text in entries_of(await archived({"m": content()})):
            info = tarfile.TarInfo(name)
            info.size, info.pax_headers = len(text), {"size": "5", "path": "models/m/other"}
            tar.addfile(info, io.BytesIO(text))
    plain = gzip.decompress(file.getvalue())
    refusal(path, gzip.compress(plain, mtime=0))


async def test_entries_that_stand_twice_lack_or_are_not_in_order_are_refused(path):
    entries = entries_of(await archived({"m": content()}))
    for position, entry in enumerate(entries[:-1]):
        refusal(path, packed([*entries[:position], entry, *entries[position:]]))
        refusal(path, packed([*entries[:position], *entries[position + 1 :]]))
        refusal(path, packed(described([*entries[:position], *entries[position + 1 :]])))
    for one, other in itertools.combinations(range(len(entries)), 2):
        swapped = entries.copy()
        swapped[one], swapped[other] = swapped[other], swapped[one]
        refusal(path, packed(swapped))


async def test_a_model_that_stands_twice_is_refused(path):
    entries = entries_of(await archived({"m": content(), "n": content()}))
    for name in ("m", "M"):
        renamed = [(one.replace("models/n/", f"models/{name}/"), text) for one, text in entries]
        assert "stands twice" in refusal(path, packed(renamed)) or name == "m"


LIES = [
    ("resources", 1),
    ("revisions", 4),
    ("keys", 0),
    ("blobs", 2),
    ("body_bytes", 1),
    ("blob_bytes", 0),
    ("name", "other"),
    ("absent", ["a"] * 100_001),
    ("unknown", 1),
    ("parts", []),
]


@pytest.mark.parametrize(("name", "value"), LIES)
async def test_a_manifest_that_lies_is_refused(path, name, value):
    assert "manifest" in refusal(path, packed(described(entries_of(await archived({"m": content()})), **{name: value})))


async def test_a_manifest_with_other_hashes_sizes_or_models_is_refused(path):
    entries = entries_of(await archived({"m": content()}))
    manifest = json.loads(entries[-1][1])
    for part in range(4):
        for change in ({"sha256": "0" * 64}, {"size": 1}, {"name": "models/m/keys-000009.ndjson"}):
            lying = json.loads(entries[-1][1])
            lying["models"][0]["parts"][part] |= change
            refusal(path, packed([*entries[:-1], ("manifest.json", json.dumps(lying).encode())]))
    lies = [
        {**manifest, "models": []},
        {**manifest, "models": manifest["models"] * 2},
        {**manifest, "version": 2},
        {},
        [],
    ]
    for lying in lies:
        assert "manifest" in refusal(path, packed([*entries[:-1], ("manifest.json", json.dumps(lying).encode())]))
    for text in (b"", b"{", b"\xff", b"[" * 100_000):
        assert "manifest" in refusal(path, packed([*entries[:-1], ("manifest.json", text)]))


async def test_archives_of_other_formats_and_versions_are_refused(path):
    entries = entries_of(await archived({"m": content()}))
    future = json.dumps({"format": "crudstack-archive", "version": 2, "more": []}).encode()
    assert "format version 2, this program knows 1" in refusal(path, packed([("format.json", future), *entries[1:]]))
    assert "use a newer program" in refusal(path, packed([("format.json", future), *entries[1:]]))
    for version in (0, -1):
        past = json.dumps({"format": "crudstack-archive", "version": version}).encode()
        said = f"format version {version}, this program knows 1: no program writes it, make another archive"
        assert said in refusal(path, packed([("format.json", past), *entries[1:]]))
    other = json.dumps({"format": "other", "version": 1}).encode()
    assert "'other'" in refusal(path, packed([("format.json", other), *entries[1:]]))
    for text in (b"", b"{}", b"1", b'{"format":1,"version":1}'):
        assert "format.json" in refusal(path, packed([("format.json", text), *entries[1:]]))
    assert "does not begin with format.json" in refusal(path, packed([("README", b"x")]))


LINES: list[tuple[str, Callable[[list[Any]], object]]] = [
    ("resources", lambda lines: lines[0]["resource"].update(resource_id="")),
    ("resources", lambda lines: lines[0]["resource"].update(resource_id="c")),
    ("resources", lambda lines: lines[0]["resource"].update(resource_id="a\0")),
    ("resources", lambda lines: lines[0]["resource"].update(version=0)),
    ("resources", lambda lines: lines[0]["resource"].update(version=10**18)),
    ("resources", lambda lines: lines[0]["resource"].update(nonce='0123456789abcde"')),
    ("resources", lambda lines: lines[0]["resource"].update(nonce="0123456789abcdef\n")),
    ("resources", lambda lines: lines[0]["resource"].update(revision=1)),
    ("resources", lambda lines: lines[0]["resource"].update(revision=3)),
    ("resources", lambda lines: lines[0]["resource"].update(total_revision_count=1)),
    ("resources", lambda lines: lines[0]["resource"].update(uid="3/other")),
    ("resources", lambda lines: lines[0]["resource"].update(status="other")),
    ("resources", lambda lines: lines[0]["resource"].update(encoding="other")),
    ("resources", lambda lines: lines[0]["resource"].update(data_hash="0" * 63)),
    ("resources", lambda lines: lines[0]["resource"].update(created_time="2026-01-01T00:00:00")),
    ("resources", lambda lines: lines[0]["resource"].update(created_time="2026-01-01T00:00:00+01:00")),
    ("resources", lambda lines: lines[0]["resource"].update(more=1)),
    ("resources", lambda lines: lines[0]["resource"].pop("version")),
    ("resources", lambda lines: lines[1]["revision"].update(resource_id="b")),
    ("resources", lambda lines: lines[1]["revision"].update(revision=2)),
    ("resources", lambda lines: lines[1]["revision"].update(parent=1)),
    ("resources", lambda lines: lines[1]["revision"].update(data_hash="0" * 64)),
    ("resources", lambda lines: lines[1]["revision"].update(blobs=["../x"])),
    ("resources", lambda lines: lines[1]["revision"].update(blobs=[f"{'0' * 64}/0-{'0' * 32}"])),
    ("resources", lambda lines: lines[1]["revision"].update(blobs=lines[1]["revision"]["blobs"] * 2)),
    ("resources", lambda lines: lines[1]["revision"].update(updated_by="\ud800")),
    ("resources", lambda lines: lines[1].pop("body")),
    ("resources", lambda lines: lines[1]["body"].update(offset=1)),
    ("resources", lambda lines: lines[1]["body"].update(size=10**15)),
    ("resources", lambda lines: lines[2]["body"].update(offset=0)),
    ("resources", lambda lines: lines[4]["body"].update(size=1)),
    ("resources", lambda lines: lines.pop(0)),
    ("resources", lambda lines: lines.pop(2)),
    ("resources", lambda lines: lines.reverse()),
    ("resources", lambda lines: lines.append({})),
    ("resources", lambda lines: lines.append({"resource": lines[0]["resource"], "revision": lines[1]["revision"]})),
    ("resources", lambda lines: lines.append([])),
    ("keys", lambda lines: lines[0].update(key="x")),
    ("keys", lambda lines: lines[1].update(key="2" * 64)),
    ("keys", lambda lines: lines[1].update(operation=0)),
    ("keys", lambda lines: lines[1].update(operations=1)),
    ("keys", lambda lines: [line.update(operations=10**9) for line in lines]),
    ("keys", lambda lines: lines[0].update(time=-1)),
    ("keys", lambda lines: lines.pop()),
    ("keys", lambda lines: lines.extend(lines.copy())),
    ("keys", lambda lines: lines[1]["result"].update(nonce="")),
    ("blobs", lambda lines: lines[0].update(size=1)),
    ("blobs", lambda lines: lines[0].update(size=6 << 30)),
    ("blobs", lambda lines: lines[0].update(owner="alice")),
    ("blobs", lambda lines: lines[0].update(key="../x")),
    ("blobs", lambda lines: lines.append(lines[0])),
    ("blobs", lambda lines: lines.clear()),
]


@pytest.mark.parametrize("number", range(len(LINES)))
async def test_lines_that_lie_are_refused(path, number):
    """The manifest describes the parts as they are, so the lines themselves show what is wrong."""
    part, change = LINES[number]
    entries = entries_of(await archived({"m": content()}))
    refusal(path, changed(entries, f"{part}-000001.ndjson", of_lines(change)))


@pytest.mark.parametrize("text", [b"", b"\n", b"{}", b"\n\n", b"{}\r\n", b"\xff\n", b"null\n", b'{"resource":\n'])
async def test_parts_that_are_no_lines_are_refused(path, text):
    entries = entries_of(await archived({"m": content()}))
    for part in ("resources", "keys", "blobs"):
        refusal(path, changed(entries, f"{part}-000001.ndjson", lambda _: text))


async def test_bodies_and_blobs_with_other_content_are_refused(path):
    entries = entries_of(await archived({"m": content()}))
    assert "hash" in refusal(path, changed(entries, "bodies-000001.bin", lambda text: text.replace(b"1", b"3")))
    refusal(path, changed(entries, "bodies-000001.bin", lambda text: text + b" "))
    key = next(name for name, _ in entries if "/blobs/" in name)
    assert "SHA-256" in refusal(path, changed(entries, key, lambda text: text[::-1]))
    refusal(path, changed(entries, key, lambda text: text + b"x"))
    assert "lacks" in refusal(path, changed(entries, key, lambda _: b""))  # an empty entry stands for a missing blob


async def test_data_after_the_end_is_refused(path):
    archive = await archived({"m": content()})
    entries = entries_of(archive)
    refusal(path, archive + b"x")
    refusal(path, archive + archive)
    refusal(path, archive + gzip.compress(b"x" * 512, mtime=0))
    refusal(path, packed(entries, bytes(1024) + b"x" * 512))
    refusal(path, packed(entries, bytes(512)))
    refusal(path, packed(entries, bytes(100_000 // 512 * 512)))
    refusal(path, packed([*entries, ("more", b"x")]))


def test_files_that_are_no_archives_are_refused(path, tmp_path):
    for text in (b"", b"\x1f", b"\x1f\x8b", b"PK\x03\x04", b"x" * 10_000, gzip.compress(b""), gzip.compress(b"x")):
        refusal(path, text)
    with pytest.raises(InvalidData):
        verify(tmp_path / "missing")
    with pytest.raises(InvalidData):
        verify(tmp_path)
    os.mkfifo(tmp_path / "pipe")


def bomb(size: int) -> bytes:
    """Return an archive whose only part has this many zeros."""
    deflate = zlib.compressobj(9, zlib.DEFLATED, 31)
    first = encode_header("format.json", 42, 0) + b'{"format":"crudstack-archive","version":1}'.ljust(512, b"\0")
    pieces = [deflate.compress(first + encode_header("models/m/resources-000001.ndjson", size, 0))]
    pieces += [deflate.compress(bytes(1 << 20)) for _ in range(size >> 20)]
    return b"".join([*pieces, deflate.flush()])


def test_bombs_are_refused(path):
    assert "expected at most 8388608" in refusal(path, bomb(100 << 20))
    assert "--max-bytes" in refusal(path, bomb(5 << 20), max_bytes=4 << 20)


def test_a_zstd_bomb_with_a_large_window_is_refused(path):
    options = {zstd.CompressionParameter.window_log: 27, zstd.CompressionParameter.enable_long_distance_matching: 1}
    compressor = zstd.ZstdCompressor(options=options)
    refusal(path, compressor.compress(bytes(1 << 20)) + compressor.flush())


async def test_total_size_is_limited(path):
    archive = await archived({"m": content()})
    size = len(gzip.decompress(archive))
    path.write_bytes(archive)
    verify(path, max_bytes=size).close()
    assert "--max-bytes" in refusal(path, archive, max_bytes=size - 1)


async def test_lines_and_parts_are_limited(path):
    entries = entries_of(await archived({"m": content()}))
    name = "resources-000001.ndjson"
    assert "metadata of at most 262144" in refusal(path, changed(entries, name, lambda text: b" " * 262_145 + text))
    assert "at most 8388608" in refusal(path, changed(entries, name, lambda text: text + b"\n" * (8 << 20)))
    big = {"x": "y" * (5 << 20)}
    expected = Content(resources=[resource("a", [big]), resource("b", [big])])
    one_part = entries_of(await archived({"m": expected}))
    lines = b"".join(text for entry, text in one_part if "resources" in entry).splitlines()
    size = len(one_part[2][1])
    second = json.loads(lines[3])
    second["body"]["offset"] = size
    lines[3] = json.dumps(second).encode()
    joined = [
        one_part[0],
        (one_part[1][0], b"\n".join(lines) + b"\n"),
        (one_part[2][0], one_part[2][1] + one_part[4][1]),
        one_part[-1],
    ]
    assert "at most 8388608" in refusal(path, packed(described(joined)))


async def test_the_number_of_parts_is_limited(path, monkeypatch):
    archive = await archived({"m": content()})
    monkeypatch.setattr("app.autocrud.backup.archive_reader.MAX_PARTS", 3)
    assert "more than 3 parts" in refusal(path, archive)


async def test_an_archive_that_changes_while_it_is_read_is_noticed(path):
    path.write_bytes(await archived({"m": content()}))
    with verify(path) as archive:
        path.write_bytes(await archived({"m": content()}))
        with pytest.raises(BadArchive):
            list(archive.resources("m"))
