"""The table `done`: the results of commits with an Idempotency-Key, with a row for each operation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import apsw

from ...basic import KEEP_KEYS_US, CommitResult, IdempotentCommit, ResourceMeta, StoredKey
from ...contract.idempotency import results_to_keep
from ...contract.metadata_codec import meta_of


class ResultsTable:
    """The results of commits. `encode` makes the documents of the metadata."""

    def __init__(self, encode: Callable[[Any], bytes]) -> None:
        self._encode = encode

    def read(self, connection: apsw.Connection, key: str) -> CommitResult | None:
        """Return the result of the commit with this Idempotency-Key, or None if there was no such commit."""
        rows = connection.execute("SELECT request, doc FROM done WHERE key = ? ORDER BY operation", (key,)).fetchall()
        if not rows:
            return None
        return CommitResult(cast("str", rows[0][0]), [None if doc is None else meta_of(doc) for _, doc in rows])

    def keep(
        self,
        connection: apsw.Connection,
        once: IdempotentCommit,
        left: Sequence[ResourceMeta | None],
        changed: Sequence[tuple[str, bool]],
    ) -> None:
        """Store the results of a commit under its Idempotency-Key. The caller is in a transaction.

        left     the metadata after each change of the commit
        changed  for each change the id of its resource, and whether it is a purge
        """
        connection.execute("DELETE FROM done WHERE time < ?", (once.time - KEEP_KEYS_US,))
        for operation, result in enumerate(results_to_keep(once, changed)):
            meta = left[result] if isinstance(result, int) else result
            kept = (None, None) if meta is None else (meta.resource_id, self._encode(meta))
            connection.execute(
                "INSERT OR REPLACE INTO done VALUES (?, ?, ?, ?, ?, ?)",
                (once.key, operation, once.request, once.time, *kept),
            )

    def put(self, connection: apsw.Connection, key: StoredKey) -> None:
        """Store the results of a key as they are. The caller is in a transaction."""
        for operation, meta in enumerate(key.results):
            kept = (None, None) if meta is None else (meta.resource_id, self._encode(meta))
            connection.execute(
                "INSERT INTO done VALUES (?, ?, ?, ?, ?, ?)", (key.key, operation, key.request, key.time, *kept)
            )

    def forget(self, connection: apsw.Connection, resource_id: str) -> None:
        """Remove the metadata of a purged resource from all results."""
        connection.execute("UPDATE done SET id = NULL, doc = NULL WHERE id = ?", (resource_id,))
