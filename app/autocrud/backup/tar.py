"""Headers of tar files: regular entries only, no links, no extensions.

An archive is written in the format ustar of POSIX. The format of GNU tar, which many programs write, is read too: its
regular entries differ by the magic only. The module `tarfile` reads more formats, among them hostile ones.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from .errors import BadArchive

BLOCK = 512
MAX_SIZE = 8**11 - 1
_ZERO = b"0000000\0"
_MAGIC = b"ustar\x0000"
_GNU_MAGIC = b"ustar  \0"
_SIZE = re.compile(rb"[0-7]{11}[\0 ]")
_CHECKSUM = re.compile(rb"[0-7]{6}[\0 ]{2}")
_FORMAT = "write the tar file in the format ustar, for example with `tar --format=ustar`"
_FILES = "pack the files alone, for example with `tar --no-recursion`"
_CONTENT = "pack the file itself"
_OTHER = "remove it from the archive"
_TYPES = {
    b"1": ("a hard link", _CONTENT),
    b"2": ("a symbolic link", _CONTENT),
    b"3": ("a device", _OTHER),
    b"4": ("a device", _OTHER),
    b"5": ("a directory", _FILES),
    b"6": ("a pipe", _OTHER),
    b"x": ("an extended header (PAX)", _FORMAT),
    b"g": ("an extended header (PAX)", _FORMAT),
    b"L": ("a long name of GNU tar", _FORMAT),
    b"K": ("a long link of GNU tar", _FORMAT),
    b"S": ("a sparse file", "pack it without `--sparse`"),
}


class Header(NamedTuple):
    """The header of a regular entry. `size` is in bytes."""

    name: str
    size: int


def padding(size: int) -> int:
    """Return how many zero bytes follow an entry of this size."""
    return -size % BLOCK


def encode_header(name: str, size: int, time: int) -> bytes:
    """Return the header of an entry with the mode 0600 and no owner. `time`: seconds since 1970.

    Raises ValueError if the name or the size does not fit into the format.
    """
    raw = name.encode("ascii")
    prefix = b""
    if len(raw) > 100:
        cut = raw.rfind(b"/", 0, 156)
        prefix, raw = raw[:cut], raw[cut + 1 :]
        if cut < 0 or len(raw) > 100:
            raise ValueError(f"{name!r} is too long for a tar file")
    if not 0 <= size <= MAX_SIZE:
        raise ValueError(f"{name!r} has {size} bytes, which is too much for a tar file")
    fields = (
        raw.ljust(100, b"\0"),
        b"0000600\0",
        _ZERO * 2,
        b"%011o\0" % size,
        b"%011o\0" % time,
        b" " * 8,
        b"0".ljust(101, b"\0"),
        _MAGIC.ljust(72, b"\0"),
        _ZERO * 2,
        prefix.ljust(155, b"\0"),
        b"\0" * 12,
    )
    block = b"".join(fields)
    return block[:148] + b"%06o\0 " % sum(block) + block[156:]


def decode_header(block: bytes) -> Header | None:
    """Return the header of a regular file in a block of 512 bytes, or None for a block of zeros.

    Raises BadArchive for any other header, and if the name is an absolute path or has a part `.` or `..`.
    """
    if not any(block):
        return None
    magic = block[257:265]
    if magic not in (_MAGIC, _GNU_MAGIC):
        raise BadArchive(f"the archive holds a header that is not one of a tar file in the format ustar: {_FORMAT}")
    if not _CHECKSUM.fullmatch(block[148:156]) or int(block[148:154], 8) != (
        sum(block) - sum(block[148:156]) + 8 * ord(" ")
    ):
        raise BadArchive("the header of an entry is damaged: its checksum is wrong")
    name = _text(block[:100])
    if magic == _MAGIC and (prefix := _text(block[345:500])):
        name = f"{prefix}/{name}"
    if block[156:157] != b"0":
        found, advice = _TYPES.get(block[156:157], (f"an entry of the type {block[156:157]!r}", _OTHER))
        raise BadArchive(f"the entry {name!r} is {found}, but an archive holds regular files only: {advice}")
    if any(block[157:257]):
        raise BadArchive(f"the entry {name!r} names a link, but an archive holds regular files only: {_CONTENT}")
    if magic == _GNU_MAGIC and any(block[369:]):  # before them are times, which `tar --listed-incremental` writes
        raise BadArchive(f"the entry {name!r} is divided, sparse or of several volumes: {_FORMAT}")
    if not _SIZE.fullmatch(block[124:136]):
        raise BadArchive(f"the size of the entry {name!r} cannot be read: expected 11 octal digits; {_FORMAT}")
    _check_path(name)
    return Header(name, int(block[124:135], 8))


def _check_path(name: str) -> None:
    parts = name.split("/")
    if name.startswith("/"):
        found = "an absolute path"
    elif ".." in parts:
        found = "a path with `..`"
    elif "." in parts:
        found = "a path with `.`"
    else:
        return
    raise BadArchive(f"the entry {name!r} has {found}: pack the files under the names that the export gave them")


def _text(field: bytes) -> str:
    text, _, rest = field.partition(b"\0")
    try:
        if not any(rest):
            return text.decode("ascii")
    except UnicodeDecodeError:
        pass
    raise BadArchive(f"the archive holds an entry with the name {field!r}, which no archive of this program has")
