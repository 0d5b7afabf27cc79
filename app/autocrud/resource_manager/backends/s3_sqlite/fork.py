"""Notice a fork: the history in the bucket is not a continuation of what this process knows.

On a correct storage a history cannot fork, because each HEAD is derived from the one that it replaced. A storage whose
conditional PUT compares first and writes afterwards lets it fork: two writers derive different HEADs of the same version
from one HEAD, both are told that they succeeded, and one HEAD overwrites the other. The version number does not show
that. The nonces and the transaction ids do.

Invariant: *a HEAD that was read is accepted only if it continues every HEAD that this process knows, or if they continue
it.* This process knows the HEAD of its local copy, the HEADs that its own swaps stored, and those that it accepted.

- Each HEAD names the nonces of the versions before it (`Head.past`). Two HEADs that name different nonces for one
  version have different histories. If the newer one names the nonce of the older one, it continues the older one.
- Otherwise the nonces do not decide: more versions have passed than a HEAD names, or a program that does not write
  `past` swapped. Then the transaction ids decide. The log, or the snapshot, is read from the newest known record on. A
  record of a known number must have the known id. Equal ids mean equal histories up to there, because a transaction is
  attempted again only on a history that does not have it.

No false alarm: each HEAD that this process knows was the content of the object at some moment, so on a correct storage
all of them, and every HEAD that is read later, are of one line. A delayed answer brings an older HEAD of that line.

ETags decide nothing: a bucket that was copied or encrypted anew has other ETags for equal bytes.

Two things escape. A process that is gone, and whose local copy is gone or lacks its last swap, compares nothing. And if
more records have passed than copies remember, and the log was replaced by a snapshot, nothing is left to compare.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from .head import Head, LogRecord


class KnownHead(NamedTuple):
    """A HEAD, and the transaction id of its newest record if that is known."""

    head: Head
    txid: bytes | None


class KnownHeads:
    """The newest HEADs that this process stored or accepted, whatever its local copy has. Several only if they do not continue each other.

    Threads may share it.
    """

    def __init__(self) -> None:
        self._mutex = threading.Lock()
        self._known: tuple[KnownHead, ...] = ()

    def of(self, store: str) -> tuple[KnownHead, ...]:
        return tuple(one for one in self._known if one.head.store == store)

    def add(self, head: Head, newest: LogRecord | None = None, *, instead: Sequence[KnownHead] = ()) -> None:
        """Remember a HEAD in place of those that it continues. `newest`: its newest record; `instead`: HEADs that it was compared with."""
        newest = head.tail[-1] if head.tail else newest
        added = KnownHead(head, None if newest is None else newest.txid)
        with self._mutex:
            kept = [one for one in self._known if one not in instead or one.head.ver > head.ver]
            if any(one.head.ver >= head.ver and same_history(one.head, head) for one in kept):
                return
            self._known = (*(one for one in kept if not same_history(one.head, head)), added)


def same_history(one: Head, other: Head) -> bool | None:
    """Return whether the newer HEAD continues the history of the older one; None if their nonces do not decide."""
    older, newer = (one, other) if one.ver <= other.ver else (other, one)
    nonce = _nonce_of(newer, older.ver)
    if nonce is not None:
        return nonce == older.nonce
    named = dict(newer.past)
    return False if any(named.get(ver, nonce) != nonce for ver, nonce in older.past) else None


def _nonce_of(head: Head, version: int) -> bytes | None:
    """Return the nonce of this version in the history of a HEAD, if it names it."""
    if head.ver == version:
        return head.nonce
    return next((nonce for ver, nonce in reversed(head.past) if ver == version), None)


def has_fewer_records(known: Head, head: Head) -> bool:
    """Return whether a HEAD has a higher version and fewer records than a known one, which no continuation has."""
    return head.ver > known.ver and head.seq < known.seq


def txids_of(records: Iterable[LogRecord]) -> dict[int, bytes]:
    return {record.seq: record.txid for record in records}


def contradicts(known: Mapping[int, bytes], found: Mapping[int, bytes]) -> bool:
    """Return whether a record of a known number has another transaction id."""
    return any(found.get(seq, txid) != txid for seq, txid in known.items())
