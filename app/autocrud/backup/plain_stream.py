"""The decompressed bytes of an archive, in constant memory and with a limit.

P1 *Each member must be complete.* Its checksum was compared before the next one begins, and before the end is reported.
P2 *Nothing is skipped.* A member follows the one before it immediately, and nothing follows the last one.
"""

from __future__ import annotations

import hashlib
import os
from collections import deque
from collections.abc import Callable, Iterator
from typing import NamedTuple

from .compression import GZIP_HEADER, Compression, Decompressor, compression_of, decompressor, gzip_header_size
from .errors import ArchiveTooLarge, BadArchive
from .option_names import option_names

READ = 256 * 1024
CHUNK = 1024 * 1024
"""Largest number of bytes that are decompressed at a time."""
MAX_GZIP_HEADER = 64 * 1024
"""Largest size of a gzip header with its name, comment and extra field. Ordinary programs write less than 1 KB."""


class Start(NamedTuple):
    """The start of a member: its position among the plain bytes, and its offset in the file."""

    position: int
    offset: int


class PlainStream:
    """Reads one archive. Blocks.

    handle     descriptor of the archive; its position is not used, and does not change
    max_bytes  how many bytes may be decompressed
    offset     where to begin in the file
    read       called with the bytes that were read from the file
    """

    def __init__(
        self, handle: int, max_bytes: int, offset: int = 0, read: Callable[[bytes], None] | None = None
    ) -> None:
        self._handle, self._max_bytes, self._read = handle, max_bytes, read
        self._offset = self._end = offset  # of the first byte that no decompressor has, and of the next byte to read
        self._compression = compression_of(os.pread(handle, GZIP_HEADER, offset))
        self._raw = b""
        self._member: Decompressor | None = None
        self._pending = False  # whether the member may have more output without more input
        self._plain, self._used = b"", 0
        self._produced = 0
        self._starts: deque[Start] = deque()

    @property
    def position(self) -> int:
        """The number of plain bytes that were read."""
        return self._produced - (len(self._plain) - self._used)

    def start(self) -> Start:
        """Return the start of the member that has the next byte, or of an earlier one if there is no next byte."""
        if self._used == len(self._plain):
            self._fill()
        self._drop_starts()
        return self._starts[0]

    def _drop_starts(self) -> None:
        while len(self._starts) > 1 and self._starts[1].position <= self.position:
            self._starts.popleft()

    def skip(self, size: int) -> None:
        """Read `size` bytes, and drop them."""
        for _ in self.chunks(size):
            pass

    def read(self, size: int) -> bytes:
        """Return exactly `size` bytes. Raises BadArchive if there are fewer."""
        pieces = list(self.chunks(size))
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def chunks(self, size: int) -> Iterator[bytes]:
        """Yield exactly `size` bytes, in pieces. Raises BadArchive if there are fewer."""
        while size:
            if self._used == len(self._plain) and not self._fill():
                raise BadArchive("the archive is truncated: its end is missing")
            piece = self._plain[self._used : self._used + size]
            self._used += len(piece)
            size -= len(piece)
            yield piece

    def is_at_end(self) -> bool:
        """Return whether all bytes were read, and nothing follows them."""
        return self._used == len(self._plain) and not self._fill()

    def _fill(self) -> bool:
        """Decompress the next bytes. Return False at the end of the archive."""
        while True:
            if self._member is None and not self._begin():
                return False
            member = self._member
            assert member is not None, "`_begin` sets it"
            raw = b"" if self._pending else self._next_raw()
            if not raw and not self._pending:
                raise BadArchive("the archive is truncated: its end is missing")
            plain = member.decompress(raw, CHUNK)
            self._pending = len(plain) == CHUNK
            if member.eof:
                self._raw, self._member, self._pending = member.unused_data, None, False
                self._offset -= len(self._raw)
            if plain:
                self._produced += len(plain)
                if self._produced > self._max_bytes:
                    raise ArchiveTooLarge(
                        f"the archive has more than {self._max_bytes} bytes when it is decompressed; if it is yours,"
                        f" raise the limit ({option_names().max_bytes})"
                    )
                self._plain, self._used = plain, 0
                return True

    def _begin(self) -> bool:
        """Begin the next member. Return False at the end of the file."""
        self._read_until(GZIP_HEADER)
        if not self._raw:
            return False
        if len(self._raw) < GZIP_HEADER or not self._raw.startswith(self._compression.magic):
            raise BadArchive("the archive is followed by other data, or damaged between two members")
        if self._compression is Compression.gzip:
            self._check_gzip_header()
        self._starts.append(Start(self._produced, self._offset))
        self._drop_starts()
        self._member = decompressor(self._compression)
        return True

    def _check_gzip_header(self) -> None:
        """Raise BadArchive if the gzip header that begins here is too large, or cut off."""
        if gzip_header_size(self._raw[:MAX_GZIP_HEADER]) is None:
            self._read_until(MAX_GZIP_HEADER)
            if gzip_header_size(self._raw[:MAX_GZIP_HEADER]) is None:
                if len(self._raw) < MAX_GZIP_HEADER:
                    raise BadArchive("the archive is truncated: its end is missing")
                raise BadArchive(
                    f"the archive has a gzip header of more than {MAX_GZIP_HEADER} bytes: compress it with gzip -n"
                )

    def _read_until(self, size: int) -> None:
        """Read from the file until `size` bytes wait for a decompressor, or until its end."""
        while len(self._raw) < size and (more := self._from_file()):
            self._raw += more

    def _next_raw(self) -> bytes:
        raw, self._raw = self._raw or self._from_file(), b""
        self._offset += len(raw)
        return raw

    def _from_file(self) -> bytes:
        raw = os.pread(self._handle, READ, self._end)
        self._end += len(raw)
        if self._read is not None:
            self._read(raw)
        return raw


class FileHash:
    """The SHA-256 of a file while it is read, and a report of the progress."""

    def __init__(self, report: Callable[[int], None]) -> None:
        self._hash, self.size, self._report = hashlib.sha256(), 0, report

    def __call__(self, raw: bytes) -> None:
        """Take the next bytes of the file into the hash, and report how many there were so far."""
        self._hash.update(raw)
        self.size += len(raw)
        self._report(self.size)

    def hexdigest(self) -> str:
        """Return the SHA-256 of the bytes so far, in hex."""
        return self._hash.hexdigest()
