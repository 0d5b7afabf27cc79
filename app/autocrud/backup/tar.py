"""Headers of tar files in the format ustar of POSIX, and nothing else: regular entries, no links, no extensions.

The module `tarfile` reads many formats, among them hostile ones. An archive needs one.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from .errors import BadArchive

BLOCK = 512
MAX_SIZE = 8**11 - 1
_ZERO = b"0000000\0"
_MAGIC = b"ustar\x0000"
_SIZE = re.compile(rb"[0-7]{11}[\0 ]")
_CHECKSUM = re.compile(rb"[0-7]{6}[\0 ]{2}")
_TYPES = {
    b"1": "a hard link",
    b"2": "a symbolic link",
    b"3": "a device",
    b"4": "a device",
    b"5": "a directory",
    b"6": "a pipe",
    b"x": "an extended header (PAX)",
    b"g": "an extended header (PAX)",
    b"L": "a long name of GNU tar",
    b"K": "a long link of GNU tar",
    b"S": "a sparse file",
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
    """Return the header in a block of 512 bytes, or None for a block of zeros. Raises BadArchive for any other."""
    if not any(block):
        return None
    if block[257:265] != _MAGIC:
        raise BadArchive("the archive holds a header that is not one of a tar file in the format ustar")
    if not _CHECKSUM.fullmatch(block[148:156]) or int(block[148:154], 8) != (
        sum(block) - sum(block[148:156]) + 8 * ord(" ")
    ):
        raise BadArchive("the header of an entry is damaged: its checksum is wrong")
    name = _text(block[:100])
    if prefix := _text(block[345:500]):
        name = f"{prefix}/{name}"
    if block[156:157] != b"0":
        found = _TYPES.get(block[156:157], f"an entry of the type {block[156:157]!r}")
        raise BadArchive(f"the entry {name!r} is {found}, but an archive holds regular files only")
    if any(block[157:257]):
        raise BadArchive(f"the entry {name!r} names a link, but an archive holds regular files only")
    if not _SIZE.fullmatch(block[124:136]):
        raise BadArchive(f"the size of the entry {name!r} cannot be read")
    return Header(name, int(block[124:135], 8))


def _text(field: bytes) -> str:
    text, _, rest = field.partition(b"\0")
    try:
        if not any(rest):
            return text.decode("ascii")
    except UnicodeDecodeError:
        pass
    raise BadArchive(f"the archive holds an entry with the name {field!r}, which no archive of this program has")
