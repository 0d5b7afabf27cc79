"""The arguments of the stored function that commits: changes as JSON, and documents as bytes beside it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import msgspec

from ...basic import Change, IdempotentCommit, IndexEntry, Reindex, Version
from ...contract.idempotency import results_to_keep
from ...contract.store_errors import expectation_of, generation_of


class CommitArguments:
    """The parameters of the stored function that commits, for one commit or for new index entries.

    changes  the changes of the commit
    once     the Idempotency-Key of the commit and its results, or None
    spec     the number of the set of indexed fields
    encode   encodes metadata and records
    entries  new index entries
    share    whether an entry may have a unique value that another resource owns

    Raises ConfigError if a change expects "any".
    """

    def __init__(
        self,
        changes: Sequence[Change],
        once: IdempotentCommit | None,
        spec: int,
        encode: Callable[[Any], bytes],
        entries: Sequence[Reindex] = (),
        *,
        share: bool = False,
    ) -> None:
        self.changes, self.once = changes, once
        self._spec, self._encode, self._share = spec, encode, share
        self._docs: list[bytes] = []
        self._numbers: dict[int, int] = {}
        described = [self._change(change) for change in changes] + [self._entry(entry) for entry in entries]
        given = None if once is None else msgspec.json.encode(self._run_once(once)).decode()
        self.parameters = (msgspec.json.encode(described).decode(), self._docs, given)

    def _doc(self, document: bytes) -> int:
        self._docs.append(document)
        return len(self._docs)

    def _change(self, change: Change) -> dict[str, Any]:
        described: dict[str, Any] = {"id": change.meta.resource_id}
        expect = expectation_of(change)
        if isinstance(expect, Version):
            described |= {"version": expect.version, "nonce": expect.nonce}
        if change.purge:
            return described | {"purge": True}
        described["meta"] = change.meta
        described["doc"] = self._numbers[id(change)] = self._doc(self._encode(change.meta))
        if change.index is not None:
            described |= self._index(change.index)
        if change.drop:
            described["drop"] = change.drop
        if change.record is not None:
            record = change.record
            described |= {"record": record.revision, "uid": record.uid, "generation": generation_of(record.uid)}
            described["record_doc"] = self._doc(self._encode(record))
            if record.blobs:
                described["blobs"] = record.blobs
        return described

    def _index(self, index: IndexEntry) -> dict[str, Any]:
        keys = {name: key for name, key in index.keys.items() if key is not None}
        return {"keys": keys, "absent": index.missing, "spec": self._spec, "shown": self._doc(index.shown)}

    def _entry(self, entry: Reindex) -> dict[str, Any]:
        state = {"id": entry.resource_id, "version": entry.expect.version, "nonce": entry.expect.nonce}
        return state | self._index(entry.entry) | ({"share": True} if self._share else {})

    def _run_once(self, once: IdempotentCommit) -> dict[str, Any]:
        """Return the key with the documents of its results, and `{}` for each result that is not kept."""
        changed = [(change.meta.resource_id, change.purge) for change in self.changes]
        results: list[dict[str, Any]] = []
        for result in results_to_keep(once, changed):
            if result is None:
                results.append({})
            elif isinstance(result, int):
                change = self.changes[result]
                results.append({"id": change.meta.resource_id, "doc": self._numbers[id(change)]})
            else:
                results.append({"id": result.resource_id, "doc": self._doc(self._encode(result))})
        return {"key": once.key, "request": once.request, "time": once.time, "results": results}
