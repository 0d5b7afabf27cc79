"""Report which transactions a fork lost: in the log, and in the directory of the local copy for `crudstack s3-rescue`.

Everything here is best effort on purpose. The history has forked already, and the objects of either history may be
incomplete.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple
from uuid import uuid4

import apsw
import msgspec
from msgspec import Struct

from ....errors import CrudError, StoreDamaged
from ...runtime.temporary import ProcessDirectory
from ..s3.object_store import ObjectStore
from .copy_files import current_path
from .fork import txids_of
from .head import Head, LogRecord, Segment, decode_head, decode_ops, decode_segment

log = logging.getLogger("crudstack.s3sqlite")

CAUSE = (
    "the object storage lost acknowledged writes: its history does not continue what was acknowledged here, so this"
    " program has stopped serving this model"
)
RECORDED_MESSAGE = (
    f"{CAUSE}; run `crudstack s3-rescue FILE` on this machine, with the settings of this program, to write them to a"
    " file; to resume, stop this program, run `crudstack s3-rescue FILE --resume`, and start it on an object storage"
    " that decides between concurrent writers"
)
"""The text of HistoryForked if the fork is recorded in the directory of the local copy."""
LOGGED_MESSAGE = (
    f"{CAUSE}; its log names the lost transactions; to resume, move to an object storage that decides between"
    " concurrent writers, and start this program again: it then serves what the object storage holds"
)
"""The text of HistoryForked if the local copy has a temporary directory."""
LOGGED_AT_MOST = 100
PATTERN = "fork-*.json"


class ForkRecord(Struct, frozen=True, kw_only=True):
    """The content of a file that records a fork. A lost record has no `ops` if its log could not be read any more."""

    key: str
    store: str
    lost: list[LogRecord]


class LostRecords(NamedTuple):
    """The records that the bucket does not hold, by ascending number."""

    records: list[LogRecord]
    incomplete: bool
    """Whether a record could not be read, so that its content is unknown, or whether the bucket holds it."""


class _History:
    """The records of some HEADs, as far as their logs can be read."""

    def __init__(self) -> None:
        self.records: dict[bytes, LogRecord] = {}
        self.incomplete = False
        self._segments: set[Segment] = set()

    def add(self, head: Head, known: Sequence[Segment] = ()) -> None:
        """Add a HEAD. The segments in `known` need not be read."""
        self.records.update({record.txid: record for record in head.tail})
        self._segments.update(set(head.segs) - set(known))

    async def read(self, objects: ObjectStore, first: int = 0) -> None:
        """Read the segments whose last record is `first` or later."""
        for segment in sorted(self._segments):
            if segment.last >= first:
                try:
                    found = await objects.get(segment.key)
                    if found is None:
                        raise StoreDamaged("it is missing")
                    self.records.update({record.txid: record for record in decode_segment(found.body)})
                except CrudError as error:
                    self.incomplete = True
                    log.error("%s cannot be read, so its transactions are not compared: %s", segment.key, error)


async def find_lost(
    objects: ObjectStore, head_key: str, known_heads: Sequence[Head], more: Iterable[LogRecord], found: Head
) -> LostRecords:
    """Return the known records that the bucket does not hold. Ignores errors of S3 as far as possible.

    Reads HEAD again, because only the current HEAD tells which of the two histories the bucket keeps.

    Args:
        objects: The bucket.
        head_key: The key of HEAD.
        known_heads: The HEADs that this process knew.
        more: More known records. They have no `ops` if only their ids are known.
        found: The HEAD that contradicts the known ones. It is used if HEAD cannot be read again.
    """
    with contextlib.suppress(CrudError):
        now = await objects.get(head_key)
        found = found if now is None else decode_head(now.body)
    local_history, bucket_history = _History(), _History()
    for head in known_heads:
        if head.store == found.store:
            local_history.add(head, found.segs)
    bucket_history.add(found)
    await local_history.read(objects)
    known = dict(local_history.records)
    for record in more:
        if record.ops or record.txid not in known:
            known[record.txid] = record
    first = min((record.seq for record in known.values()), default=0)
    await bucket_history.read(objects, first)
    there = txids_of(bucket_history.records.values())
    if found.snap is not None and found.first_logged > first:
        there = await _snapshot_txids(objects, found.snap.key) | there
    txids = set(there.values())

    def is_lost(record: LogRecord) -> bool:
        # If the bucket no longer holds the id of this number, the record is not reported.
        return record.txid not in txids and (record.seq > found.seq or record.seq in there)

    records = sorted(filter(is_lost, known.values()), key=lambda record: record.seq)
    return LostRecords(
        records, local_history.incomplete or bucket_history.incomplete or any(not record.ops for record in records)
    )


def records_of_ids(txids: Mapping[int, bytes]) -> list[LogRecord]:
    """Return records without content, of which only the numbers and the transaction ids are known."""
    return [LogRecord(seq, txid, 0, b"") for seq, txid in txids.items()]


def read_copy(directory: Path) -> tuple[list[Head], list[LogRecord]]:
    """Return the HEAD of the local copy in a directory, and its newest records without `ops`. Blocks.

    Both are empty if there is no usable copy.
    """
    path = current_path(directory)
    if path is None:
        return [], []
    try:
        with contextlib.closing(apsw.Connection(str(path), flags=apsw.SQLITE_OPEN_READWRITE)) as connection:
            body = connection.execute("SELECT head FROM copy").get
            txids = dict(connection.execute("SELECT seq, txid FROM recent"))
        return [decode_head(body)] if body else [], records_of_ids(txids)
    except (apsw.Error, CrudError) as error:
        log.error("%s cannot be read: %s", path, error)
        return [], []


def forget_copy(directory: Path) -> None:
    """Remove the local copies and the records of forks in a directory. Blocks. Raises OSError.

    The records are removed last, because a process refuses to serve the model as long as one exists.
    """
    for pattern in ("current", "copy-*", "current-*", "fork-*.new", PATTERN):
        for path in directory.glob(pattern):
            path.unlink(missing_ok=True)


async def _snapshot_txids(objects: ObjectStore, key: str) -> dict[int, bytes]:
    with ProcessDirectory() as directory:
        path = directory.path / "snapshot.sqlite"
        try:
            if await objects.download(key, path):
                with contextlib.closing(apsw.Connection(str(path), flags=apsw.SQLITE_OPEN_READONLY)) as connection:
                    return dict(connection.execute("SELECT seq, txid FROM recent"))
            log.error("%s is missing, so its transactions are not compared", key)
        except (CrudError, apsw.Error) as error:
            log.error("%s cannot be read, so its transactions are not compared: %s", key, error)
    return {}


def log_fork(head_key: str, known_heads: Sequence[Head], found: Head, lost: LostRecords) -> None:
    """Log the versions, the ids of the lost transactions, and the ids of their resources."""
    known = ", ".join(f"{head.ver} ({head.nonce.hex()})" for head in known_heads)
    log.error(
        "%s: history-forked: HEAD is at version %d (%s), which does not continue version %s; acknowledged or attempted"
        " here, and not there: %d transactions%s",
        head_key,
        found.ver,
        found.nonce.hex(),
        known,
        len(lost.records),
        ", perhaps more" if lost.incomplete else "",
    )
    for record in lost.records[:LOGGED_AT_MOST]:
        ids = [op.resource_id for op in decode_ops(record.ops) if op.is_about_a_resource] if record.ops else "not known"
        log.error("%s: lost transaction %s, number %d, resources %s", head_key, record.txid.hex(), record.seq, ids)
    if len(lost.records) > LOGGED_AT_MOST:
        log.error("%s: %d more transactions are lost", head_key, len(lost.records) - LOGGED_AT_MOST)


# The record of a fork, in the directory of the local copy


def record_fork(directory: Path, fork: ForkRecord) -> None:
    """Record a fork in a file, and sync the file and the directory to disk. Blocks. Raises OSError."""
    name = f"fork-{uuid4().hex}"
    temporary = directory / f"{name}.new"
    with temporary.open("wb") as file:
        file.write(msgspec.json.encode(fork))
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(directory / f"{name}.json")
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def fork_files(directory: Path) -> list[Path]:
    """Return the files that `record_fork` wrote in this directory. Blocks."""
    return sorted(directory.glob(PATTERN))


def read_fork(path: Path) -> ForkRecord:
    """Return the content of a file that `record_fork` wrote. Blocks. Raises StoreDamaged if it cannot be read."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=ForkRecord)
    except (OSError, msgspec.MsgspecError) as error:
        raise StoreDamaged(f"{path.name}, which records a fork, cannot be read: {error}") from None
