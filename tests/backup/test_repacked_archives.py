"""Archives that ordinary tools packed: tar, gzip, and the modules of Python."""

from __future__ import annotations

import gzip
import io
import subprocess
import tarfile
import zlib
from collections.abc import Sequence
from pathlib import Path

import pytest

from app.autocrud.backup import plain_stream
from app.autocrud.backup.plain_stream import MAX_GZIP_HEADER

from .archives import Content, archived, read_back, resource
from .test_hostile_archives import Entry, content, entries_of, packed, refusal

FORMATS = {"ustar": tarfile.USTAR_FORMAT, "pax": tarfile.PAX_FORMAT, "gnu": tarfile.GNU_FORMAT}
FHCRC, FEXTRA, FNAME, FCOMMENT = 2, 4, 8, 16


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "archive"


def without_files() -> Content:
    """Return a content whose entries have names of at most 100 characters, which need no extension of a format."""
    return Content(resources=[resource("a", [{"x": 1}, {"x": 2}]), resource("b", [{"y": "z" * 1000}])])


def member(
    data: bytes,
    *,
    flags: int = 0,
    extra: bytes = b"",
    texts: Sequence[bytes] = (),
    time: int = 0,
    checksum: int | None = None,
) -> bytes:
    """Return a gzip member with this header.

    texts     the name and the comment, if the flags say that they are there
    checksum  that of the header; None: the right one
    """
    header = b"\x1f\x8b\x08" + bytes([flags]) + time.to_bytes(4, "little") + b"\x02\x03"
    if flags & FEXTRA:
        header += len(extra).to_bytes(2, "little") + extra
    header += b"".join(text + b"\0" for text in texts)
    if flags & FHCRC:
        right = zlib.crc32(header) & 0xFFFF
        header += (right if checksum is None else checksum).to_bytes(2, "little")
    return header + gzip.compress(data, mtime=0)[10:]


HEADERS = {
    "time": {"time": 1_700_000_000},
    "text": {"flags": 1},
    "name": {"flags": FNAME, "texts": [b"backup.tar"]},
    "comment": {"flags": FCOMMENT, "texts": [b"made by hand"]},
    "extra": {"flags": FEXTRA, "extra": b"AB\x02\0xy"},
    "checksum": {"flags": FHCRC},
    "all": {"flags": 31, "texts": [b"a" * 20_000, b"b" * 20_000], "extra": b"x" * 25_000, "time": 5},
}


@pytest.mark.parametrize("header", HEADERS.values(), ids=HEADERS)
@pytest.mark.parametrize("at_once", [plain_stream.READ, 7])
async def test_every_valid_gzip_header_is_read(path: Path, monkeypatch, header, at_once: int):
    monkeypatch.setattr(plain_stream, "READ", at_once)
    expected = content()
    plain = gzip.decompress(await archived({"m": expected}))
    path.write_bytes(member(plain[:1024], **header) + member(b"", **header) + member(plain[1024:], **header))
    assert read_back(path) == {"m": expected}


async def test_gzip_headers_that_are_cut_off_damaged_or_too_large_are_refused(path: Path):
    plain = gzip.decompress(await archived({"m": content()}))
    whole = member(plain, flags=31, texts=[b"name", b"comment"], extra=b"extra")
    for size in range(len(whole)):
        refusal(path, whole[:size])
    assert "header crc" in refusal(path, member(plain, flags=FHCRC, checksum=1))
    refusal(path, member(plain, flags=32))  # a flag that RFC 1952 reserves
    longest = MAX_GZIP_HEADER - 11
    path.write_bytes(member(plain, flags=FNAME, texts=[b"n" * longest]))
    read_back(path)
    for size in (longest + 1, 10 * MAX_GZIP_HEADER):
        sentence = refusal(path, member(plain, flags=FNAME, texts=[b"n" * size]))
        assert sentence == "the archive has a gzip header of more than 65536 bytes: compress it with gzip -n"


@pytest.mark.parametrize("form", FORMATS.values(), ids=FORMATS)
async def test_archives_of_the_module_tarfile_are_read(path: Path, form: int):
    expected = without_files()
    with tarfile.open(path, "w:gz", format=form) as tar:
        for name, text in entries_of(await archived({"m": expected})):
            info = tarfile.TarInfo(name)
            info.size, info.mtime, info.uname = len(text), 1_700_000_000, "someone"
            tar.addfile(info, io.BytesIO(text))
    assert path.read_bytes()[3:8] != bytes(5)  # a name and a time
    assert read_back(path) == {"m": expected}


async def unpacked(directory: Path, entries: Sequence[Entry]) -> list[str]:
    """Write the entries as files, and return their names."""
    for name, text in entries:
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_bytes(text)
    return [name for name, _ in entries]


def tar(directory: Path, *arguments: str) -> None:
    subprocess.run(["tar", *arguments], cwd=directory, check=True, capture_output=True)


@pytest.mark.parametrize("form", ["gnu", "ustar"])
async def test_archives_of_tar_and_gzip_are_read(path: Path, tmp_path: Path, form: str):
    """Names of files are longer than the 100 characters that GNU's format has place for; ustar divides them."""
    expected = without_files() if form == "gnu" else content()
    names = await unpacked(tmp_path / "files", entries_of(await archived({"m": expected})))
    tar(tmp_path / "files", f"--format={form}", "-czf", str(path), *names)
    assert read_back(path) == {"m": expected}
    tar(tmp_path / "files", f"--format={form}", "-cf", str(tmp_path / "f.tar"), *names)
    subprocess.run(["gzip", "f.tar"], cwd=tmp_path, check=True)
    assert (tmp_path / "f.tar.gz").read_bytes()[3] == FNAME
    assert read_back(tmp_path / "f.tar.gz") == {"m": expected}


async def test_the_sentence_about_an_archive_of_tar_names_what_is_wrong(path: Path, tmp_path: Path):
    def sentence(*arguments: str) -> str:
        tar(files, "--format=gnu", *arguments)
        return refusal(path, path.read_bytes())

    files = tmp_path / "files"
    names = await unpacked(files, entries_of(await archived({"m": content()})))
    new = ["-czf", str(path)]
    assert "is a long name of GNU tar, but" in (told := sentence(*new, *names))
    assert told.endswith("`tar --format=ustar`")
    tar(files, "--format=pax", *new, *names)
    assert "is an extended header (PAX), but" in refusal(path, path.read_bytes())
    assert "'models/' is a directory, but" in (told := sentence(*new, "format.json", "models"))
    assert "--no-recursion" in told
    assert "'./format.json' has a path with `.`: " in sentence(*new, *(f"./{name}" for name in names))
    (files / "link").symlink_to("/etc/passwd")
    assert "the entry 'link' is a symbolic link, but" in sentence(*new, "format.json", "link")
    (files / "hard").hardlink_to(files / names[1])
    assert "the entry 'hard' is a hard link, but" in sentence(*new, *names[:2], "hard")
    assert "'/" in (told := sentence("-P", *new, str(files / "format.json")))
    assert "has an absolute path" in told
    (files / "format.json").write_text('{"format":"crudstack-archive","version":2}')
    assert "format version 2, this program knows 1: use a newer program" in sentence(*new, *names)
    tar(files, "--format=v7", *new, *names[:3])
    assert "not one of a tar file in the format ustar: write" in refusal(path, path.read_bytes())


async def test_a_header_of_gnu_tar_has_no_prefix_and_no_sparse_fields(path: Path):
    entries = entries_of(await archived({"m": without_files()}))
    plain = bytearray(gzip.decompress(packed(entries)))
    plain[257:265] = b"ustar  \0"

    def with_checksum() -> bytes:
        plain[148:156] = b" " * 8
        plain[148:156] = b"%06o\0 " % sum(plain[:512])
        return gzip.compress(plain, mtime=0)

    plain[345:369] = b"14000000000\0" * 2  # times of the last read and change
    path.write_bytes(with_checksum())
    assert list(read_back(path)) == ["m"]
    plain[386] = ord("1")
    assert "is divided, sparse or of several volumes: write" in refusal(path, with_checksum())
