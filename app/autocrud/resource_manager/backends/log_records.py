"""What happened, as the records of S3-SQLite tell it. `sqlite.replay` does it again in a copy."""

from __future__ import annotations

from typing import Any

import msgspec
from msgspec import Struct

from ..basic import Change, IndexEntry, ResourceMeta, RevisionInfo


class LoggedIndexEntry(Struct, frozen=True, array_like=True):
    """An index entry, and the number of the set of fields (in IndexSchema.specs) that it was made for."""

    spec: str
    keys: dict[str, Any]
    missing: tuple[str, ...]
    shown: bytes


class LoggedResults(Struct, frozen=True, array_like=True):
    """What is remembered of an Idempotency-Key: see `IdempotentCommit`. Numbers of changes are those of the ops of its record."""

    request: str
    results: tuple[int | ResourceMeta | None, ...]


class LogOperation(Struct, frozen=True, omit_defaults=True, rename={"resource_id": "id"}):
    """What happened to one resource. Documents, not columns: every reader derives its own tables from it.

    put    its new metadata; `record` is what a revision's record has that the metadata does not say; `index` None: as it was
    index  a new index entry for the state it is in
    purge  it is gone
    once   no resource: the record carries an Idempotency-Key, whose hash stands for the id
    """

    kind: str
    resource_id: str
    meta: ResourceMeta | None = None
    record: dict[str, Any] | None = None
    index: LoggedIndexEntry | None = None
    drop: tuple[str, ...] = ()
    once: LoggedResults | None = None


def _expected(meta: ResourceMeta) -> dict[str, Any]:
    """The record of a revision that was made by the change that left this metadata."""
    return {
        "uid": meta.uid,
        "resource_id": meta.resource_id,
        "revision": meta.revision,
        "parent": meta.revision - 1 or None,
        "schema_version": meta.schema_version,
        "status": meta.status,
        "data_hash": meta.data_hash,
        "encoding": meta.encoding,
        "created_time": meta.updated_time,
        "updated_time": meta.updated_time,
        "created_by": meta.updated_by,
        "updated_by": meta.updated_by,
    }


def log_operation(change: Change, meta: ResourceMeta, spec: str) -> LogOperation:
    """The op of a change that left `meta`."""
    if change.purge:
        return LogOperation("purge", meta.resource_id)
    record = None
    if change.record is not None:
        expected = _expected(meta)
        record = {name: value for name in expected if (value := getattr(change.record, name)) != expected[name]}
    return LogOperation("put", meta.resource_id, meta, record, logged_index_entry(change.index, spec), change.drop)


def logged_index_entry(entry: IndexEntry | None, spec: str) -> LoggedIndexEntry | None:
    return None if entry is None else LoggedIndexEntry(spec, entry.keys, entry.missing, entry.shown)


def revision_info_of(op: LogOperation) -> RevisionInfo | None:
    if op.record is None or op.meta is None:
        return None
    return msgspec.convert({**_expected(op.meta), **op.record}, RevisionInfo)
