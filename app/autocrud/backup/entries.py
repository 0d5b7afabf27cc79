"""The entries of an archive, in their order, and the items in its parts. Used to verify an archive, and to read it.

E1 *An item is returned only after its part was compared with the manifest*, if the manifest is known, or else after
everything that the part itself shows was checked: the order, the spans of the bodies, their hashes.
"""

from __future__ import annotations

import datetime as dt
import hashlib
import itertools
import re
from collections.abc import Callable, Iterator
from typing import TypeVar

import msgspec

from ..resource_manager.basic import ResourceMeta, RevisionInfo, StoredKey
from ..resource_manager.contract.store_errors import storable_id
from .archive_format import (
    BLOB_ROWS,
    MAX_ABSENT,
    MAX_BODY,
    MAX_LINE,
    MAX_PART,
    MODEL,
    ArchivedMeta,
    ArchivedRevision,
    BlobLine,
    BodySpan,
    KeyLine,
    Part,
    ResourceLine,
    check_revision,
    decode_json,
    is_json,
    plain_meta,
    plain_revision,
)
from .errors import ArchiveTooLarge, BadArchive
from .plain_stream import PlainStream
from .tar import BLOCK, Header, decode_header, padding

T = TypeVar("T")

Item = ResourceMeta | tuple[RevisionInfo, bytes | None]
"""The metadata of a resource, or the record of one of its revisions with its body."""

MAX_END = 64 * 1024
"""How many zero bytes may follow the last entry: programs fill up the last record of a tar file."""
_NAME = re.compile(
    rf"models/({MODEL.pattern})/"
    r"(?:(resources|keys|blobs)-([0-9]{6,9})\.ndjson|(bodies)-([0-9]{6,9})\.bin"
    r"|blobs/([0-9a-f]{64}/[0-9]{1,18}-[0-9a-f]{32}))"
)
MAX_OPERATIONS = 10_000
"""Largest number of results of a key."""
_resource_line = msgspec.json.Decoder(ResourceLine).decode
_key_line = msgspec.json.Decoder(KeyLine).decode
_blob_line = msgspec.json.Decoder(BlobLine).decode


class Name:
    """The parts of the name of an entry: the model, the kind (resources, bodies, keys, blobs or blob), the rest.

    Raises BadArchive if no archive has an entry with this name.
    """

    __slots__ = ("blob", "kind", "model", "number")

    def __init__(self, name: str) -> None:
        found = _NAME.fullmatch(name)
        if found is None:
            raise BadArchive(f"the archive holds the entry {name!r}, which no archive of this format has: remove it")
        self.model = found[1]
        self.kind = found[2] or found[4] or "blob"
        self.number = int(found[3] or found[5] or 0)
        self.blob = found[6] or ""


class Entries:
    """The entries of a decompressed archive."""

    def __init__(self, stream: PlainStream) -> None:
        self.stream = stream

    def next(self) -> Header | None:
        """Return the next header, whose content must then be read to its end; None after the last entry.

        Raises BadArchive if anything but zeros follows the last entry.
        """
        header = decode_header(self.stream.read(BLOCK))
        if header is not None:
            return header
        zeros = BLOCK
        while not self.stream.is_at_end():
            if any(self.stream.read(BLOCK)):
                raise BadArchive("the archive holds data after its end")
            zeros += BLOCK
            if zeros > MAX_END:
                raise BadArchive("the archive holds too many zeros after its end")
        if zeros < 2 * BLOCK:
            raise BadArchive("the archive is truncated: its end is missing")
        return None

    def chunks(self, header: Header) -> Iterator[bytes]:
        """Yield the content of an entry in pieces."""
        yield from self.stream.chunks(header.size)
        if any(self.stream.read(padding(header.size))):
            raise BadArchive(f"the entry {header.name!r} is followed by other data")

    def content(self, header: Header, most: int) -> bytes:
        """Return the content of an entry. Raises ArchiveTooLarge if it is larger than `most` bytes."""
        if header.size > most:
            raise ArchiveTooLarge(
                f"the entry {header.name!r} of the archive has {header.size} bytes, expected at most {most}"
            )
        return b"".join(self.chunks(header))

    def part(self, header: Header, most: int = MAX_PART) -> tuple[bytes, Part]:
        """Return the content of a part, and the part as the manifest describes it."""
        content = self.content(header, most)
        return content, Part(header.name, header.size, hashlib.sha256(content).hexdigest())

    def bodies(self, header: Header) -> tuple[bytes, Part]:
        """Return the content of a part of bodies."""
        return self.part(header, MAX_BODY)


def lines_of(content: bytes, name: str, decode: Callable[[bytes], T]) -> Iterator[T]:
    """Yield the decoded lines of a part. Raises BadArchive, or ArchiveTooLarge if a line is too long."""
    if not content.endswith(b"\n"):
        raise BadArchive(f"the part {name!r} is empty, or its last line has no end")
    start = 0
    for number in itertools.count(1):
        end = content.index(b"\n", start)
        if end - start > MAX_LINE:
            raise ArchiveTooLarge(
                f"line {number} of {name!r} has {end - start} bytes, expected metadata of at most {MAX_LINE}"
            )
        yield decode_json(content[start:end], decode, f"line {number} of {name!r}")
        start = end + 1
        if start == len(content):
            return


class ResourceItems:
    """Checks the parts of the resources of one model, one after the other, and returns what they hold.

    `bodiless` are the ids of resources that have a revision without a body.
    """

    def __init__(self) -> None:
        self.resources = self.revisions = self.body_bytes = 0
        self.bodiless: set[str] = set()
        self.meta: ResourceMeta | None = None
        """The metadata of the last resource."""
        self._previous = 0
        self._has_current = True
        self._offset = 0  # of the next body in its part

    def items(self, content: bytes, name: str, bodies: bytes) -> Iterator[Item]:
        """Yield the items of a part with lines and its part with bodies. Raises BadArchive or ArchiveTooLarge."""
        self._offset = 0
        for number, line in enumerate(lines_of(content, name, _resource_line), 1):
            where = f"line {number} of {name!r}"
            if line.resource is not None and line.revision is None and line.body is None:
                yield self._resource(line.resource)
            elif line.revision is not None and line.resource is None:
                body = None if line.body is None else self._body(line.body, bodies, where)
                yield self._revision(line.revision, body, where), body
            else:
                raise BadArchive(f"{where} is not metadata, and not a revision")
        if self._offset != len(bodies):
            raise BadArchive(f"the bodies of {name!r} take {self._offset} bytes, but their part has {len(bodies)}")
        self.body_bytes += len(bodies)

    def end(self) -> None:
        """Check that the last resource is complete."""
        if self.meta is not None and not self._has_current:
            raise BadArchive(f"resource {self.meta.resource_id!r} lacks its current revision, {self.meta.revision}")

    def _body(self, span: BodySpan, bodies: bytes, where: str) -> bytes:
        if span.offset != self._offset or span.size > len(bodies) - self._offset:
            raise BadArchive(f"the body of {where} does not begin where the one before it ends, or is cut off")
        if len(bodies) > MAX_PART and span.size != len(bodies):
            raise ArchiveTooLarge(
                f"the bodies of {where} and others take {len(bodies)} bytes, expected at most {MAX_PART}"
            )
        self._offset += span.size
        return bodies[span.offset : self._offset]

    def _resource(self, line: ArchivedMeta) -> ResourceMeta:
        self.end()
        meta = checked_meta(line)
        if self.meta is not None and meta.resource_id <= self.meta.resource_id:
            raise BadArchive(
                f"resource {meta.resource_id!r} follows {self.meta.resource_id!r}, but each id stands once and ids"
                " are in ascending order"
            )
        self.meta, self._previous, self._has_current = meta, 0, False
        self.resources += 1
        return meta

    def _revision(self, line: ArchivedRevision, body: bytes | None, where: str) -> RevisionInfo:
        meta = self.meta
        if meta is None:
            raise BadArchive(f"{where} is a revision without a resource before it")
        record = plain_revision(line)
        wrong = (
            check_revision(meta, record, self._previous)
            or _wrong_times(record.created_time, record.updated_time)
            or _wrong_blobs(record)
        )
        if wrong:
            raise BadArchive(f"revision {record.revision} of resource {meta.resource_id!r} is wrong: {wrong}")
        self._previous = record.revision
        self._has_current = self._has_current or record.revision == meta.revision
        self.revisions += 1
        if body is None:
            self.bodiless.add(meta.resource_id)
            if len(self.bodiless) > MAX_ABSENT:
                raise BadArchive(f"over {MAX_ABSENT} resources of the archive lack a body")
        elif is_json(record.encoding) and hashlib.sha256(body).hexdigest() != record.data_hash:
            raise BadArchive(
                f"the body of revision {record.revision} of resource {meta.resource_id!r} has another hash than its"
                " record says"
            )
        return record


def checked_meta(line: ArchivedMeta) -> ResourceMeta:
    """Return the metadata of a line. Raises BadArchive if they are wrong, or if no store can hold them."""
    wrong = (
        _wrong_names(line.resource_id, line.uid)
        or _wrong_times(line.created_time, line.updated_time)
        or ("" if line.revision <= line.total_revision_count else "its current revision is above the count of them")
    )
    if wrong:
        raise BadArchive(f"the metadata of resource {line.resource_id!r} are wrong: {wrong}")
    return plain_meta(line)


def _wrong_names(*names: str) -> str:
    try:
        for name in names:
            storable_id(name)
    except ValueError as error:
        return str(error)
    return ""


def _wrong_times(*times: dt.datetime) -> str:
    return "its times are not in UTC" if any(time.utcoffset() for time in times) else ""


def _wrong_blobs(record: RevisionInfo) -> str:
    ascending = all(one < other for one, other in zip(record.blobs, record.blobs[1:], strict=False))
    return "" if ascending else "its blobs are not in ascending order"


class KeyItems:
    """Checks the parts of the Idempotency-Keys of one model, one after the other, and returns the keys."""

    def __init__(self) -> None:
        self.keys = self._size = 0
        self._lines: list[KeyLine] = []
        self._before = ""

    def items(self, content: bytes, name: str) -> Iterator[StoredKey]:
        """Yield the keys that are complete with this part. Raises BadArchive or ArchiveTooLarge."""
        for line in lines_of(content, name, _key_line):
            first = self._lines[0] if self._lines else line
            if line.operation != len(self._lines) or (line.key, line.request, line.time, line.operations) != (
                first.key,
                first.request,
                first.time,
                first.operations,
            ):
                raise BadArchive(f"the results of the key {first.key!r} are not complete, or not in order")
            if line.operation == 0 and line.key <= self._before:
                raise BadArchive(f"the key {line.key!r} stands twice, or keys are not in ascending order")
            if not 0 < line.operations <= MAX_OPERATIONS:
                raise BadArchive(f"the key {line.key!r} has {line.operations} results, expected 1 to {MAX_OPERATIONS}")
            self._lines.append(line)
            self._size += 0 if line.result is None else len(line.result.resource_id + line.result.uid)
            if self._size > MAX_PART:
                raise ArchiveTooLarge(f"the results of the key {line.key!r} take more than {MAX_PART} bytes")
            if len(self._lines) == line.operations:
                self._before, self.keys = line.key, self.keys + 1
                results = tuple(None if one.result is None else checked_meta(one.result) for one in self._lines)
                self._lines, self._size = [], 0
                yield StoredKey(key=line.key, request=line.request, time=line.time, results=results)

    def end(self) -> None:
        """Check that the last key is complete."""
        if self._lines:
            raise BadArchive(f"the results of the key {self._lines[0].key!r} are not complete")


class BlobItems:
    """Checks the parts with the rows of the blobs of one model, one after the other, and returns the rows."""

    def __init__(self) -> None:
        self.blobs = self.blob_bytes = 0
        self._before = ""

    def rows(self, content: bytes, name: str) -> list[BlobLine]:
        """Return the rows of a part. Raises BadArchive or ArchiveTooLarge."""
        lines = list(lines_of(content, name, _blob_line))
        if len(lines) > BLOB_ROWS:
            raise BadArchive(f"the part {name!r} has {len(lines)} lines, expected at most {BLOB_ROWS}")
        for line in lines:
            if line.key <= self._before:
                raise BadArchive(f"the blob {line.key!r} stands twice, or blobs are not in ascending order")
            self._before = line.key
            self.blobs += 1
            self.blob_bytes += line.size
        return lines
