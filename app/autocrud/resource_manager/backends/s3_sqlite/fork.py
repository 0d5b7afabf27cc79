"""Notice a fork: the history in the bucket does not continue the history that this process knows.

On a correct storage a history cannot fork, because each HEAD is derived from the one that it replaced. Some storages
compare first and write afterwards. On these, two writers can both be told that they replaced the same HEAD, and one of
the two new HEADs overwrites the other. Both have the same version number, but other nonces and other transaction ids.

Invariant (I8): *A HEAD that was read is accepted only if it continues every HEAD that this process knows, or if they
continue it.* This process knows the HEAD of its local copy, the HEADs that its own swaps stored, and those that it
accepted.

- Each HEAD names the nonces of the versions before it (`Head.past`). If two HEADs name different nonces for one
  version, their histories differ. If the newer HEAD names the nonce of the older one, it continues the older one.
- Otherwise the nonces do not decide: more versions have passed than a HEAD names, or a program that does not write
  `past` has swapped. Then the transaction ids decide: the log, or the snapshot, is read from the newest known record
  on, and each record of a known number must have the known id.
- ETags decide nothing, because a bucket that was copied or encrypted again has other ETags for equal bytes.

docs/design/commit-on-s3.md explains why there are no false alarms, and which forks cannot be noticed.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from .head import Head, LogRecord


class KnownHead(NamedTuple):
    """A HEAD, and the transaction id of its newest record; None if that id is not known."""

    head: Head
    txid: bytes | None


class KnownHeads:
    """The newest HEADs that this process stored or accepted, even if its local copy lacks them.

    Holds several only if their nonces do not show that one continues the other. Safe to use from several threads.
    """

    def __init__(self) -> None:
        self._mutex = threading.Lock()
        self._known: tuple[KnownHead, ...] = ()

    def of(self, store: str) -> tuple[KnownHead, ...]:
        """Return the known HEADs of the store with this id."""
        return tuple(one for one in self._known if one.head.store == store)

    def add(self, head: Head, newest: LogRecord | None = None, *, instead: Sequence[KnownHead] = ()) -> None:
        """Remember a HEAD in place of those that it continues.

        Args:
            head: The HEAD that was stored or accepted.
            newest: Its newest record, if it is known and not in the tail of HEAD.
            instead: The HEADs that this one was compared with. Those with a lower version are dropped.
        """
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
    """Return whether a HEAD has a higher version but fewer records than a known HEAD, so does not continue it."""
    return head.ver > known.ver and head.seq < known.seq


def txids_of(records: Iterable[LogRecord]) -> dict[int, bytes]:
    """Return the transaction ids of records, by number."""
    return {record.seq: record.txid for record in records}


def contradicts(known: Mapping[int, bytes], found: Mapping[int, bytes]) -> bool:
    """Return whether a number has another transaction id in `found` than in `known`."""
    return any(found.get(seq, txid) != txid for seq, txid in known.items())
