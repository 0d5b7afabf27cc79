"""The operations in the log records of S3-SQLite. `sqlite.replay` applies them to a local copy."""

from __future__ import annotations

from typing import Any

import msgspec
from msgspec import Struct
from msgspec.structs import asdict

from ..basic import BlobRow, Change, IndexEntry, ResourceMeta, RevisionInfo


class LoggedIndexEntry(Struct, frozen=True, array_like=True):
    """An index entry.

    spec  the number of the set of indexed fields for which the entry was made, as `IndexSchema.specs` lists it
    """

    spec: str
    keys: dict[str, Any]
    missing: tuple[str, ...]
    shown: bytes


class LoggedResults(Struct, frozen=True, array_like=True):
    """The results that are kept for an Idempotency-Key: see `IdempotentCommit`.

    A number in `results` is the position of an operation in the same log record.
    """

    request: str
    results: tuple[int | ResourceMeta | None, ...]


class LoggedBlob(Struct, frozen=True, array_like=True):
    """The row of a blob, without its key."""

    size: int
    owner: str


class LogOperation(Struct, frozen=True, omit_defaults=True, rename={"resource_id": "id"}):
    """One operation on a resource. It contains documents, not columns: each reader derives its own tables from them.

    The `kind` is one of:

    put    stores new metadata. `record` has the fields of the revision's record that differ from the metadata. If
           `index` is None, the index entry stays as it was
    index  stores a new index entry for the current state
    purge  removes the resource

    These are about no resource:

    once     the log record belongs to an Idempotency-Key, and the hash of the key is the id
    blob     stores the row of a blob. Its key is the id
    no-blob  removes the row of a blob. Its key is the id
    """

    kind: str
    resource_id: str
    meta: ResourceMeta | None = None
    record: dict[str, Any] | None = None
    index: LoggedIndexEntry | None = None
    drop: tuple[str, ...] = ()
    once: LoggedResults | None = None
    blob: LoggedBlob | None = None

    @property
    def is_about_a_resource(self) -> bool:
        """True if `resource_id` is the id of a resource."""
        return self.kind in ("put", "index", "purge")

    @property
    def blob_row(self) -> BlobRow | None:
        """The row that this operation stores, or None."""
        return None if self.blob is None else BlobRow(key=self.resource_id, size=self.blob.size, owner=self.blob.owner)


def _expected(meta: ResourceMeta) -> dict[str, Any]:
    """Return the fields of the revision record that the change to this metadata would make."""
    return asdict(RevisionInfo.of_change(meta, parent=meta.revision - 1 or None))


def log_operation(change: Change, meta: ResourceMeta, spec: str) -> LogOperation:
    """Return the operation for a change after which the metadata is `meta`. `spec` is the set of indexed fields."""
    if change.purge:
        return LogOperation("purge", meta.resource_id)
    record = None
    if change.record is not None:
        expected = _expected(meta)
        record = {name: value for name in expected if (value := getattr(change.record, name)) != expected[name]}
    return LogOperation("put", meta.resource_id, meta, record, logged_index_entry(change.index, spec), change.drop)


def log_blob(row: BlobRow) -> LogOperation:
    """Return the operation that stores the row of a blob."""
    return LogOperation("blob", row.key, blob=LoggedBlob(row.size, row.owner))


def log_no_blob(key: str) -> LogOperation:
    """Return the operation that removes the row of a blob."""
    return LogOperation("no-blob", key)


def logged_index_entry(entry: IndexEntry | None, spec: str) -> LoggedIndexEntry | None:
    """Return the index entry with the set of indexed fields for which it was made, or None if there is no entry."""
    return None if entry is None else LoggedIndexEntry(spec, entry.keys, entry.missing, entry.shown)


def revision_info_of(op: LogOperation) -> RevisionInfo | None:
    """Return the revision's record of an operation, or None if it has none."""
    if op.record is None or op.meta is None:
        return None
    return msgspec.convert({**_expected(op.meta), **op.record}, RevisionInfo)
