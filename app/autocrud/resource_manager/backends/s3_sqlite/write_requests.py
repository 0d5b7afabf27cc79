"""A transaction on S3-SQLite: what is to be written, and the attempt to write it to the tables of a local copy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import apsw

from ....errors import CrudError
from ...basic import BlobRow, Change, IdempotentCommit, Reindex
from ..log_records import LoggedResults, LogOperation, log_blob, log_no_blob, log_operation, logged_index_entry
from ..sqlite import blob_tables
from ..sqlite.tables import ResourceTables
from .head import encode_ops


class AddBlob(NamedTuple):
    """Stores the row of a blob: see `BlobRows.add_blob`."""

    row: BlobRow
    quota: int | None


class RemoveBlobs(NamedTuple):
    """Removes the rows of blobs that no record names: see `BlobRows.remove_blobs`."""

    keys: Sequence[str]


class WriteRequest(NamedTuple):
    """One transaction: changes, perhaps under an Idempotency-Key, or index entries for stored resources, or blobs."""

    changes: Sequence[Change] = ()
    entries: Sequence[Reindex] = ()
    once: IdempotentCommit | None = None
    share: bool = False
    """Whether the index entries may share values of unique fields."""
    blobs: AddBlob | RemoveBlobs | None = None

    @property
    def writes_resources(self) -> bool:
        """True if this is a commit of changes."""
        return not self.entries and self.blobs is None


class Attempt(NamedTuple):
    """The result of a transaction that was tried.

    ops     the operations of its log record; empty if it changes nothing
    result  the metadata that changes leave, or the keys that RemoveBlobs found unused
    error   the error to answer; None if the transaction succeeds
    """

    ops: bytes
    result: list[Any]
    error: CrudError | None


def attempt(
    tables: ResourceTables, connection: apsw.Connection, request: WriteRequest, spec: str, unique: Sequence[str]
) -> Attempt:
    """Write a transaction to the tables, inside the caller's transaction. Raises the error to answer.

    spec    the number of the set of indexed fields of this program
    unique  the fields to keep unique
    """
    match request.blobs:
        case AddBlob(row, quota):
            added = blob_tables.add(connection, row, quota)
            return Attempt(encode_ops([log_blob(row)]) if added else b"", [], None)
        case RemoveBlobs(keys):
            epoch = blob_tables.epoch(connection)
            unused, removed = blob_tables.remove(connection, keys)
            # A record without operations commits the higher epoch, which HEAD itself holds.
            changed = removed or blob_tables.epoch(connection) > epoch
            return Attempt(encode_ops([log_no_blob(key) for key in removed]) if changed else b"", unused, None)
    if request.entries:
        reindexed = set(tables.reindex(connection, request.entries, () if request.share else unique))
        ops = [
            LogOperation("index", entry.resource_id, index=logged_index_entry(entry.entry, spec))
            for entry in request.entries
            if entry.resource_id in reindexed
        ]
        return Attempt(encode_ops(ops) if ops else b"", [], None)
    metas = tables.commit(connection, request.changes, unique, request.once)
    ops = [log_operation(change, meta, spec) for change, meta in zip(request.changes, metas, strict=True)]
    if request.once is not None:
        ops.append(
            LogOperation("once", request.once.key, once=LoggedResults(request.once.request, request.once.results))
        )
    return Attempt(encode_ops(ops), metas, None)
