"""What stands in the bucket below `{key}/`.

    HEAD                               replaced only by If-Match: the swap
    BORN                               the id of the store, written once
    seg/{ver}-{first}-{uuid}           records; immutable
    snap/{ver}-{seq}-{uuid}.sqlite     an ordinary SQLite file; immutable
    race/{uuid}                        written and deleted while conditions are raced

A name starts with the version of the HEAD that may be the first to refer to it. So a name whose version is not above HEAD's, and which HEAD
does not contain, can never be referred to again (I2). Nothing that another store keeps below this key has such a name in these two folders.
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
from ...records import Findings
from ..log_records import Op

FORMAT = 1
_NAME = re.compile(r"(?:seg/([0-9]{12,})-[0-9]{12,}-[0-9a-f]{32}|snap/([0-9]{12,})-[0-9]{12,}-[0-9a-f]{32}\.sqlite)")
MAX_PAST = 32
"""Versions whose nonces a HEAD names, about 12 bytes each: see fork."""


class LogRecord(NamedTuple):
    """One transaction: `ops` is a MessagePack list of Op. `time` is microseconds since 1970, never below the one before."""

    seq: int
    txid: bytes
    time: int
    ops: bytes

    @property
    def size(self) -> int:
        return len(self.ops) + 40


class Segment(NamedTuple):
    """An object that holds the records first to last."""

    key: str
    first: int
    last: int
    size: int


class Snapshot(NamedTuple):
    key: str
    seq: int
    size: int
    sha256: str


class Pending(NamedTuple):
    """A snapshot or a merged segment that is being made; `log_size`: all bytes that were ever logged when it began."""

    key: str
    ver: int
    log_size: int


class IndexSchema(Struct, frozen=True):
    """The sets of indexed fields that records were written under, by number as text, with their kinds; and the fields that are unique."""

    specs: dict[str, dict[str, str]] = {}
    unique: tuple[str, ...] = ()


class Head(Struct, frozen=True, kw_only=True):
    fmt: int = FORMAT
    store: str
    born: bool = False
    ver: int = 1
    seq: int = 0
    nonce: bytes = b""
    snap: Snapshot | None = None
    segs: tuple[Segment, ...] = ()
    tail: tuple[LogRecord, ...] = ()
    pend: tuple[Pending, ...] = ()
    sweep: int = 0
    logged: int = 0  # bytes of records, ever
    schema: IndexSchema = IndexSchema()
    imported: str | None = None  # ETag of the plain database that this store began with
    raced: tuple[str, ...] = ()  # the endpoints whose conditional writes were raced, the newest last
    findings: Findings = Findings()  # what was found when the model was indexed
    past: tuple[tuple[int, bytes], ...] = ()  # versions before this one with their nonces, the newest last
    others: dict[str, Any] = {}  # keys of later versions, kept as they are

    def next(self, **changes: Any) -> Head:
        """The HEAD that may replace this one: one version up, with bytes that no other has (I1, I7)."""
        past = (*self.past, (self.ver, self.nonce))[-MAX_PAST:]
        return replace(self, ver=self.ver + 1, past=past, nonce=os.urandom(8), **changes)

    def encode(self) -> bytes:
        known = {name: getattr(self, name) for name in _KNOWN}
        return _encode({**self.others, **known})

    @property
    def first_logged(self) -> int:
        """The first record that is in the log still; the one that comes next if there is none."""
        return min(
            [*(segment.first for segment in self.segs), *(record.seq for record in self.tail)], default=self.seq + 1
        )

    @property
    def log_size(self) -> int:
        """Bytes between the snapshot and here."""
        return sum(segment.size for segment in self.segs) + sum(record.size for record in self.tail)

    @property
    def keys(self) -> set[str]:
        """Every object that this HEAD refers to."""
        named = {segment.key for segment in self.segs} | {pending.key for pending in self.pend}
        return named if self.snap is None else named | {self.snap.key}


_KNOWN = tuple(name for name in Head.__struct_fields__ if name != "others")
_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder().decode
_records = msgspec.msgpack.Decoder(list[LogRecord]).decode


def decode_head(body: bytes) -> Head:
    """StoreDamaged for what is no HEAD, ConfigError for one of a later format."""
    try:
        raw = _decode(body)
        found = raw["fmt"]
        if found != FORMAT:
            raise ConfigError(
                f"the store in the bucket has format {found}, this program knows {FORMAT}: deploy a newer one"
            )
        others = {key: value for key, value in raw.items() if key not in _KNOWN}
        return replace(msgspec.convert(raw, Head), others=others)
    except (msgspec.MsgspecError, KeyError, TypeError, AttributeError) as error:
        raise StoreDamaged(f"HEAD cannot be read: {error}") from None


def encode_segment(records: Sequence[LogRecord]) -> bytes:
    return _encode(records)


def decode_segment(body: bytes) -> list[LogRecord]:
    try:
        return _records(body)
    except msgspec.MsgspecError as error:
        raise StoreDamaged(f"a segment cannot be read: {error}") from None


def segment_key(prefix: str, ver: int, first: int) -> str:
    return f"{prefix}seg/{ver:012d}-{first:012d}-{uuid4().hex}"


def snapshot_key(prefix: str, ver: int, seq: int) -> str:
    return f"{prefix}snap/{ver:012d}-{seq:012d}-{uuid4().hex}.sqlite"


def version_in(name: str) -> int | None:
    """The version in the name of a segment or snapshot, what follows the prefix; None for a name that is none of ours."""
    ours = _NAME.fullmatch(name)
    return None if ours is None else int(ours[1] or ours[2])


# Records


_op_list = msgspec.msgpack.Decoder(list[Op]).decode


def encode_ops(ops: Sequence[Op]) -> bytes:
    return _encode(ops)


def decode_ops(ops: bytes) -> list[Op]:
    return _op_list(ops)


def microseconds(now: dt.datetime) -> int:
    return int(now.timestamp() * 1_000_000)
