"""HEAD, log records, segments and snapshots: the objects of a store, below `{key}/` in the bucket.

    HEAD                               names the current state; replaced only by If-Match: the swap
    BORN                               the id of the store; written once
    seg/{ver}-{first}-{uuid}           a segment: older log records; immutable
    snap/{ver}-{seq}-{uuid}.sqlite     a snapshot: an ordinary SQLite file; immutable
    race/{uuid}                        written and deleted during the race check
    import/{name}                      an entry of the journal of an import; the state of the import is in HEAD
    pin/{pin}                          shows when a pin was renewed last: see pins

The name of a segment or snapshot starts with the version of the first HEAD that can refer to it. So if that version is
not above the version of HEAD, and HEAD does not refer to the object, no HEAD will ever refer to it (I2). Another store
that keeps its objects below the same key has no such names in these two folders.
"""

from __future__ import annotations

import datetime as dt
import os
import re
from collections.abc import Sequence
from typing import Any, NamedTuple
from uuid import uuid4

import msgspec
from msgspec import Struct
from msgspec.structs import replace

from ....errors import ConfigError, StoreDamaged
from ...basic import Findings
from ..log_records import LogOperation

FORMAT = 1
FORMAT_WITH_BLOBS = 2
"""The format from the first row of a blob on. Programs that would lose references to blobs do not know it (F5)."""
FORMAT_WITH_PACKS = 3
"""The format from the first record on that names a body in a pack: see `contract.packs`. There may be blobs too."""
FORMATS = (FORMAT, FORMAT_WITH_BLOBS, FORMAT_WITH_PACKS)
_NAME = re.compile(r"(?:seg/([0-9]{12,})-[0-9]{12,}-[0-9a-f]{32}|snap/([0-9]{12,})-[0-9]{12,}-[0-9a-f]{32}\.sqlite)")
PIN_FOLDER = "pin/"
MAX_PAST = 32
"""A HEAD names the nonces of so many versions before it, about 12 bytes each: see fork."""


class LogRecord(NamedTuple):
    """One transaction in the log.

    `ops` is a MessagePack list of operations. `time` is in microseconds since 1970 and never decreases.
    """

    seq: int
    txid: bytes
    time: int
    ops: bytes

    @property
    def size(self) -> int:
        """The bytes of this record in a log, about."""
        return len(self.ops) + 40


class Segment(NamedTuple):
    """An object that holds the records from `first` to `last`. `size` is in bytes."""

    key: str
    first: int
    last: int
    size: int


class Snapshot(NamedTuple):
    """An object that holds the database at record `seq`. `size` is in bytes."""

    key: str
    seq: int
    size: int
    sha256: str


class Pending(NamedTuple):
    """Announces a snapshot or a merged segment that is being made.

    `ver` is the version of the HEAD that announced it, and `log_size` is `Head.logged` at that time.
    """

    key: str
    ver: int
    log_size: int


class IndexSchema(Struct, frozen=True):
    """The indexed fields of all programs that write to the store.

    `specs` maps the number of each set of fields, as text, to the fields and their kinds. A log record names the set
    that it was written with. `unique` are the fields that every writer enforces as unique.
    """

    specs: dict[str, dict[str, str]] = {}
    unique: tuple[str, ...] = ()


class Head(Struct, frozen=True, kw_only=True):
    """The content of the object HEAD: the whole state of the store, as references and as the newest records."""

    fmt: int = FORMAT
    store: str
    born: bool = False  # whether BORN is known to name this store
    ver: int = 1
    seq: int = 0
    nonce: bytes = b""  # random, so that no two HEADs have equal bytes
    snap: Snapshot | None = None
    segs: tuple[Segment, ...] = ()
    tail: tuple[LogRecord, ...] = ()  # the newest records
    pend: tuple[Pending, ...] = ()
    sweep: int = 0  # the generation of the last sweep of bodies
    logged: int = 0  # bytes of all records that were ever written
    schema: IndexSchema = IndexSchema()
    imported: str | None = None  # ETag of the plain database that this store was created from
    raced: tuple[str, ...] = ()  # the endpoints that passed the race check, the newest last
    findings: Findings = Findings()  # what was found when the model was indexed
    blob_epoch: int = 0  # see `contract.blobs`, F2. Left out if it is 0
    pins: tuple[str, ...] = ()  # while there are any, no bodies and blobs are removed. Left out if there are none
    importing: bytes = b""  # the state of an import: see `contract.import_journal`. Left out if it is empty
    past: tuple[tuple[int, bytes], ...] = ()  # earlier versions with their nonces, the newest last
    others: dict[str, Any] = {}  # keys that later programs wrote, kept as they are

    def next(self, **changes: Any) -> Head:
        """Return a HEAD with these changes, the next version and a new nonce. It may replace this one (I1, I7)."""
        past = (*self.past, (self.ver, self.nonce))[-MAX_PAST:]
        return replace(self, ver=self.ver + 1, past=past, nonce=os.urandom(8), **changes)

    def encode(self) -> bytes:
        """Return the bytes of the object HEAD."""
        known = {name: getattr(self, name) for name in _KNOWN}
        for name in ("blob_epoch", "pins", "importing"):
            if not known[name]:
                del known[name]
        return _encode({**self.others, **known})

    @property
    def first_logged(self) -> int:
        """The number of the first record that the log still holds; that of the next record if it holds none."""
        return min(
            [*(segment.first for segment in self.segs), *(record.seq for record in self.tail)], default=self.seq + 1
        )

    @property
    def log_size(self) -> int:
        """Bytes of all records that the log holds."""
        return sum(segment.size for segment in self.segs) + sum(record.size for record in self.tail)

    @property
    def keys(self) -> set[str]:
        """The keys of all objects that this HEAD refers to."""
        named = {segment.key for segment in self.segs} | {pending.key for pending in self.pend}
        return named if self.snap is None else named | {self.snap.key}


_KNOWN = tuple(name for name in Head.__struct_fields__ if name != "others")
_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder().decode
_records = msgspec.msgpack.Decoder(list[LogRecord]).decode


def decode_head(body: bytes) -> Head:
    """Return the HEAD in these bytes.

    Raises StoreDamaged if they are no HEAD, and ConfigError if this program does not know its format.
    """
    try:
        raw = _decode(body)
        found = raw["fmt"]
        if found not in FORMATS:
            raise ConfigError(
                f"the store in the bucket has format {found}, this program knows {', '.join(map(str, FORMATS))}:"
                " deploy a newer one"
            )
        others = {key: value for key, value in raw.items() if key not in _KNOWN}
        return replace(msgspec.convert(raw, Head), others=others)
    except (msgspec.MsgspecError, KeyError, TypeError, AttributeError) as error:
        raise StoreDamaged(f"HEAD cannot be read: {error}") from None


def encode_segment(records: Sequence[LogRecord]) -> bytes:
    """Return the bytes of a segment."""
    return _encode(records)


def decode_segment(body: bytes) -> list[LogRecord]:
    """Return the records of a segment. Raises StoreDamaged if its bytes cannot be read."""
    try:
        return _records(body)
    except msgspec.MsgspecError as error:
        raise StoreDamaged(f"a segment cannot be read: {error}") from None


def segment_key(prefix: str, ver: int, first: int) -> str:
    """Return a new key for a segment that begins with record `first`, and that HEADs from version `ver` on may name."""
    return f"{prefix}seg/{ver:012d}-{first:012d}-{uuid4().hex}"


def snapshot_key(prefix: str, ver: int, seq: int) -> str:
    """Return a new key for a snapshot at record `seq` that HEADs from version `ver` on may name."""
    return f"{prefix}snap/{ver:012d}-{seq:012d}-{uuid4().hex}.sqlite"


def version_in(name: str) -> int | None:
    """Return the version in the name of a segment or snapshot; None for any other name.

    `name` is the part of the key after the prefix of the store.
    """
    match = _NAME.fullmatch(name)
    return None if match is None else int(match[1] or match[2])


_op_list = msgspec.msgpack.Decoder(list[LogOperation]).decode


def encode_ops(ops: Sequence[LogOperation]) -> bytes:
    """Return the bytes of the operations of one record."""
    return _encode(ops)


def decode_ops(ops: bytes) -> list[LogOperation]:
    """Return the operations of one record. Raises msgspec.MsgspecError if the bytes cannot be read."""
    return _op_list(ops)


def microseconds(now: dt.datetime) -> int:
    """Return a time as microseconds since 1970."""
    return int(now.timestamp() * 1_000_000)
