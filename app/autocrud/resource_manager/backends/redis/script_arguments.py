"""Encodes changes as arguments of a script, and decodes the documents that Redis returns."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import msgspec

from ....values import Key
from ...basic import (
    KEEP_KEYS_US,
    BlobRow,
    Change,
    CommitResult,
    Encoding,
    IdempotentCommit,
    IndexEntry,
    ModelSpec,
    Reindex,
    ResourceMeta,
    RevisionInfo,
    StoredKey,
    Version,
)
from ...contract.idempotency import results_to_keep
from ...contract.metadata_codec import encoder, info_of, meta_of
from ...contract.store_errors import expectation_of, generation_of, storable_id
from ..log_records import LoggedIndexEntry, logged_index_entry

TXID = 16

_pack = msgspec.msgpack.Encoder().encode
decode_indexed = msgspec.msgpack.Decoder(LoggedIndexEntry).decode


def digest(resource_id: str) -> str:
    """Return the SHA-256 of an id, in hex, which stands for the id in keys."""
    return hashlib.sha256(storable_id(resource_id).encode()).hexdigest()


def decode_record(record: bytes) -> RevisionInfo:
    """Return the record of a revision. Redis has it after the length of its uid, ":" and the uid."""
    size, _, rest = record.partition(b":")
    return info_of(rest[int(size) :])


def done_of(told: Sequence[Any]) -> CommitResult:
    """Return the results of a commit, from what `RESULTS` in `script_parts` returns."""
    header, *left = told
    _, _, request = header.split(b" ", 2)
    return CommitResult(request.decode(), [None if document is None else meta_of(document) for document in left])


def time_of(told: Sequence[Any]) -> int:
    """Return the time of such a commit."""
    return int(told[0].partition(b" ")[0])


def row_of(text: bytes) -> BlobRow:
    """Return the row of a blob, as Redis stores it."""
    key, size, owner = text.decode().split(" ")
    return BlobRow(key=key, size=int(size), owner=owner)


def version_text(version: Version) -> str:
    """Return a version and its nonce as Redis stores them."""
    return f"{version.version} {version.nonce}"


def version_of(text: bytes) -> Version | None:
    """Return the version that `version_text` encoded, or None if the text is empty."""
    version, _, nonce = text.decode().partition(" ")
    return Version(int(version), nonce) if text else None


def unique_key(name: str, key: Key) -> str:
    """Return the field of the hash `unique` for a value of a unique field. Equal numbers have the same."""
    if isinstance(key, str):
        return f"{len(name)}:{name}s{key}"
    return f"{len(name)}:{name}n{int(key) if key == int(key) else key!r}"


class ScriptArguments:
    """Makes the arguments of the scripts for one model and encoding."""

    def __init__(self, spec: ModelSpec, encoding: Encoding) -> None:
        kinds = {name: spec.fields[name].name for name in sorted(spec.fields)}
        self.fields = msgspec.json.encode(kinds)
        self.spec = hashlib.sha256(self.fields).hexdigest()[:16]
        self._encode = encoder(encoding)

    def changes(self, changes: Sequence[Change], unique: Sequence[str]) -> list[Any]:
        """Return the arguments of COMMIT about the changes. Raises ConfigError if one expects "any"."""
        arguments: list[Any] = [len(changes)]
        for change in changes:
            meta, record, expect = change.meta, change.record, expectation_of(change)
            arguments += [digest(meta.resource_id), meta.resource_id]
            arguments.append("" if isinstance(expect, str) else version_text(expect))
            arguments += (
                ["", b""] if change.purge else [version_text(Version(meta.version, meta.nonce)), self._encode(meta)]
            )
            arguments.append("" if record is None else generation_of(record.uid))
            arguments += ["0"] if change.index is None else ["1", *self._index(change.index, unique)]
            arguments += ["0"] if record is None else ["1", *self.record(record)]
            blobs = () if record is None or change.purge else record.blobs
            arguments += [len(change.drop), *change.drop, len(blobs), *blobs]
        return arguments

    def once(self, once: IdempotentCommit | None, changes: Sequence[Change]) -> list[Any]:
        """Return the arguments of COMMIT about an Idempotency-Key. Results from before a purge are not kept."""
        if once is None:
            return ["0"]
        arguments: list[Any] = ["1", once.key, once.request, once.time, once.time - KEEP_KEYS_US, len(once.results)]
        for result in results_to_keep(once, [(change.meta.resource_id, change.purge) for change in changes]):
            meta = changes[result].meta if isinstance(result, int) else result
            arguments += ["", b""] if meta is None else [digest(meta.resource_id), self._encode(meta)]
        return arguments

    def entries(self, entries: Sequence[Reindex], unique: Sequence[str], *, share: bool) -> list[Any]:
        """Return the arguments of REINDEX."""
        arguments: list[Any] = ["1" if share else "0", len(entries)]
        for resource_id, expect, entry in entries:
            index, *tokens = self._index(entry, unique)
            arguments += [digest(resource_id), version_text(expect), index, *tokens]
        return arguments

    def loaded(self, meta: ResourceMeta, entry: IndexEntry, unique: Sequence[str]) -> list[Any]:
        """Return the state, the document, the index entry and the unique values of a resource that is loaded."""
        return [version_text(Version(meta.version, meta.nonce)), self._encode(meta), *self._index(entry, unique)]

    def record(self, record: RevisionInfo) -> list[Any]:
        """Return the number, the uid and the document of a revision."""
        return [record.revision, record.uid, self._encode(record)]

    def stored_key(self, key: StoredKey) -> list[Any]:
        """Return the arguments about the results of an Idempotency-Key that is loaded."""
        arguments: list[Any] = [key.key, key.request, key.time, len(key.results)]
        for meta in key.results:
            arguments += ["", b""] if meta is None else [digest(meta.resource_id), self._encode(meta)]
        return arguments

    def _index(self, entry: IndexEntry, unique: Sequence[str]) -> list[Any]:
        keys = [entry.keys.get(name) for name in unique]
        tokens = [
            "" if key is None or isinstance(key, list) else unique_key(name, key)
            for name, key in zip(unique, keys, strict=True)
        ]
        return [_pack(logged_index_entry(entry, self.spec)), *tokens]
