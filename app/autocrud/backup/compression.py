"""Compression of archives: gzip, and zstd with the extra `zstd`.

An archive is a sequence of gzip members or zstd frames. Tools decompress them as one stream. A writer begins a new one
where a reader may want to begin, so that a reader finds the blobs of a model without decompressing all before them.
"""

from __future__ import annotations

import enum
import sys
import zlib
from typing import TYPE_CHECKING, Any, Protocol

from ..errors import ConfigError
from ..resource_manager.runtime.drivers import driver
from .errors import BadArchive

if TYPE_CHECKING:
    from collections.abc import Mapping

GZIP_LEVEL, ZSTD_LEVEL = 6, 3
ZSTD_WINDOW_LOG = 23
"""zstd frames that need a larger window than 2 to the power of this, in bytes, are refused: a reader holds it."""
GZIP_MAGIC, ZSTD_MAGIC = b"\x1f\x8b", b"\x28\xb5\x2f\xfd"
GZIP_HEADER = 10
"""Bytes of a gzip header without extras. No frame of zstd has fewer."""
_FHCRC, _FEXTRA, _FNAME, _FCOMMENT = 2, 4, 8, 16
_DENSE = 0.95
"""If gzip makes a sample no smaller than this ratio, the data is stored as it is, ten times as fast."""


class Compression(enum.StrEnum):
    """How an archive is compressed."""

    gzip = "gzip"
    zstd = "zstd"

    @property
    def magic(self) -> bytes:
        """The bytes with which each member begins."""
        return GZIP_MAGIC if self is Compression.gzip else ZSTD_MAGIC

    @classmethod
    def of_name(cls, name: str) -> Compression:
        """Return the compression that the name of a file stands for. Raises ConfigError for any other name."""
        if name.endswith((".tar.gz", ".tgz")):
            return cls.gzip
        if name.endswith(".tar.zst"):
            return cls.zstd
        raise ConfigError(f"the archive is called {name!r}, expected a name that ends with .tar.gz or .tar.zst")


class Compressor(Protocol):
    """Compresses one archive."""

    def compress(self, data: bytes) -> bytes:
        """Return compressed bytes, perhaps those of earlier data. Blocks."""

    def restart(self, *, dense: bool = False) -> bytes:
        """End the member, and begin a new one with the next data. Return the end of the member.

        `dense`: the data that follow cannot be made smaller.
        """

    def finish(self) -> bytes:
        """End the last member, and return its end."""


class Decompressor(Protocol):
    """Decompresses one member."""

    @property
    def eof(self) -> bool:
        """Return whether the end of the member was reached, and its checksum was right."""

    @property
    def unused_data(self) -> bytes:
        """Return the bytes after the end of the member, of those that were given."""

    def decompress(self, data: bytes, most: int) -> bytes:
        """Return at most `most` bytes. Raises BadArchive if the data are damaged.

        If fewer bytes are returned, the data were used up.
        """


class GzipCompressor:
    """Compresses data to gzip members, which any gunzip reads one after the other."""

    def __init__(self) -> None:
        self._level, self._used = GZIP_LEVEL, False
        self._deflate = zlib.compressobj(self._level, zlib.DEFLATED, 31)

    def compress(self, data: bytes) -> bytes:
        """Return compressed bytes."""
        self._used = self._used or bool(data)
        return self._deflate.compress(data)

    def restart(self, *, dense: bool = False) -> bytes:
        """End the member, unless it is empty."""
        level = 0 if dense else GZIP_LEVEL
        end = self._deflate.flush() if self._used else b""
        if self._used or level != self._level:
            self._level, self._used = level, False
            self._deflate = zlib.compressobj(level, zlib.DEFLATED, 31)
        return end

    def finish(self) -> bytes:
        """End the last member."""
        return self._deflate.flush()


class GzipDecompressor:
    """Reads one gzip member."""

    def __init__(self) -> None:
        self._inflate = zlib.decompressobj(31)

    @property
    def eof(self) -> bool:
        """Return whether the end was reached."""
        return self._inflate.eof

    @property
    def unused_data(self) -> bytes:
        """Return the bytes after the end."""
        return self._inflate.unused_data

    def decompress(self, data: bytes, most: int) -> bytes:
        """Return at most `most` bytes."""
        try:
            return self._inflate.decompress(self._inflate.unconsumed_tail + data, most)
        except zlib.error as error:
            raise _damaged(error) from None


def gzip_header_size(start: bytes) -> int | None:
    """Return the size of the gzip header (RFC 1952) that these bytes begin with, or None if they end before it does.

    zlib checks what the header says. It skips names, comments and extra fields of any length.
    """
    if len(start) < GZIP_HEADER:
        return None
    flags, size = start[3], GZIP_HEADER
    if flags & _FEXTRA:
        size += 2 + int.from_bytes(start[size : size + 2], "little")
    for text in (_FNAME, _FCOMMENT):
        if flags & text:
            size = start.find(b"\0", size) + 1
            if not size:
                return None
    size += 2 if flags & _FHCRC else 0
    return size if size <= len(start) else None


class ZstdCompressor:
    """Writes zstd frames with checksums."""

    def __init__(self) -> None:
        self._zstd = _zstd()
        parameter = self._zstd.CompressionParameter
        options: Mapping[Any, int] = {parameter.compression_level: ZSTD_LEVEL, parameter.checksum_flag: 1}
        self._compressor, self._used = self._zstd.ZstdCompressor(options=options), False

    def compress(self, data: bytes) -> bytes:
        """Return compressed bytes."""
        self._used = self._used or bool(data)
        compressed: bytes = self._compressor.compress(data)
        return compressed

    def restart(self, *, dense: bool = False) -> bytes:
        """End the frame, unless it is empty. zstd is fast for data that cannot be made smaller."""
        if not self._used:
            return b""
        self._used = False
        return self.finish()

    def finish(self) -> bytes:
        """End the last frame. The compressor begins a new one with the next data."""
        end: bytes = self._compressor.flush(self._compressor.FLUSH_FRAME)
        return end


class ZstdDecompressor:
    """Reads one zstd frame."""

    def __init__(self) -> None:
        self._zstd = _zstd()
        window = self._zstd.DecompressionParameter.window_log_max
        self._decompressor = self._zstd.ZstdDecompressor(options={window: ZSTD_WINDOW_LOG})

    @property
    def eof(self) -> bool:
        """Return whether the end was reached."""
        return bool(self._decompressor.eof)

    @property
    def unused_data(self) -> bytes:
        """Return the bytes after the end."""
        unused: bytes = self._decompressor.unused_data
        return unused

    def decompress(self, data: bytes, most: int) -> bytes:
        """Return at most `most` bytes."""
        try:
            plain: bytes = self._decompressor.decompress(data, most)
        except self._zstd.ZstdError as error:
            raise _damaged(error) from None
        return plain


def compressor(compression: Compression) -> Compressor:
    """Return a compressor. Raises ConfigError if the extra `zstd` is needed and not installed."""
    return GzipCompressor() if compression is Compression.gzip else ZstdCompressor()


def decompressor(compression: Compression) -> Decompressor:
    """Return a decompressor of one member. Raises ConfigError if the extra `zstd` is needed and not installed."""
    return GzipDecompressor() if compression is Compression.gzip else ZstdDecompressor()


def compression_of(start: bytes) -> Compression:
    """Return the compression of a file that begins with these bytes. Raises BadArchive if it is no archive."""
    if start.startswith(GZIP_MAGIC):
        return Compression.gzip
    if start.startswith(ZSTD_MAGIC):
        return Compression.zstd
    if not start:
        raise BadArchive("the archive is empty: expected a file that `crudstack export` wrote")
    raise BadArchive("the file is no archive: expected a tar file that is compressed with gzip or zstd")


def is_dense(sample: bytes) -> bool:
    """Return whether data that begin with this sample cannot be made much smaller."""
    return len(zlib.compress(sample, 1)) > _DENSE * len(sample)


def _damaged(error: Exception) -> BadArchive:
    return BadArchive(f"the archive is damaged: {error}")


def _zstd() -> Any:
    with driver("zstd"):
        if sys.version_info >= (3, 14):
            from compression import zstd
        else:
            from backports import zstd
    return zstd
