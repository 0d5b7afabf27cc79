"""Compare each HEAD that is read with what this process knows, and stop the model if history has forked. The rules are in fork."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple, NoReturn

import apsw

from ....errors import HistoryForked
from ...runtime.threads import shielded
from ..s3.object_store import ObjectStore
from .fork import KnownHead, KnownHeads, contradicts, has_fewer_records, same_history, txids_of
from .fork_report import LOGGED, RECORDED, Fork, LostRecords, find_lost, fork_files, ids_alone, log_fork, record_fork
from .head import Head
from .local_copy import HeadState, LocalCopy

log = logging.getLogger("crudstack.s3sqlite")


class Comparison(NamedTuple):
    """What a HEAD was compared with: the HEADs that this process knew, and the copy with its state and its HEAD then."""

    known: tuple[KnownHead, ...]
    copy: LocalCopy
    state: HeadState
    current: Head | None
    decided: bool
    """Whether the nonces decided. If not, the newest known record must be read again."""
    txids: Mapping[int, bytes]
    """The transaction ids of the records that this process knows, by number; empty if the nonces decided."""


class ForkDetector:
    """`directory`: the data directory, where a fork is recorded; None if there is none."""

    def __init__(self, objects: ObjectStore, key: str, directory: Path | None) -> None:
        self._objects, self._key, self._directory = objects, key, directory
        self.heads = KnownHeads()
        self._error = ""  # of every call since history forked

    def refuse(self) -> None:
        """Raise HistoryForked if history has forked."""
        if self._error:
            raise HistoryForked(self._error)

    def refuse_recorded(self) -> None:
        """Raise HistoryForked if a fork is recorded in the data directory. Blocks."""
        if self._directory is not None and fork_files(self._directory):
            self._error = RECORDED
        self.refuse()

    async def compare(self, head: Head, copy: LocalCopy, state: HeadState, current: Head | None) -> Comparison:
        """Compare a HEAD that was read with those that this process knows, and these with `current`, the HEAD of the copy.

        A copy that processes share may be on another history than a swap of this process that it lacks.
        Raises HistoryForked. If the result is not `decided`, the caller compares the records from `state` on too.
        """
        known = self.heads.of(head.store)
        heads = [one.head for one in known]
        if current is not None and current.store == head.store:
            heads.append(current)
        answers = [same_history(one, head) for one in heads]
        answers += [same_history(one.head, heads[-1]) for one in known]
        compared = Comparison(known, copy, state, current, None not in answers, {})
        if False in answers or any(has_fewer_records(one, head) for one in heads):
            await self.stop(head, compared)
        if not compared.decided:
            in_copy = await _txids_in(copy)
            compared = compared._replace(txids=in_copy | _txids_of(known))
            if contradicts(in_copy, compared.txids) or contradicts(compared.txids, txids_of(head.tail)):
                await self.stop(head, compared)
        return compared

    async def stop(self, found: Head, compared: Comparison) -> NoReturn:
        """Stop the model in this process, and tell what is lost. Raises HistoryForked."""
        if not self._error:
            # Before anything is awaited: no read and no write from here on.
            self._error = LOGGED if self._directory is None else RECORDED
            await shielded(asyncio.ensure_future(self._report(found, compared)))
        raise HistoryForked(self._error)

    async def _report(self, found: Head, compared: Comparison) -> None:
        head_key = f"{self._key}/HEAD"
        heads = [one.head for one in compared.known]
        if compared.current is not None and compared.current not in heads:
            heads.append(compared.current)
        lost = LostRecords([], incomplete=True)
        try:
            recent = ids_alone(await _txids_in(compared.copy) | _txids_of(compared.known))
            lost = await find_lost(self._objects, head_key, [*heads, found], recent, found)
            log_fork(head_key, heads, found, lost)
        except Exception:  # the fork is recorded whatever else fails
            log.exception("%s: history-forked; the lost transactions could not be found", head_key)
        if self._directory is not None:
            directory, fork = self._directory, Fork(key=self._key, store=found.store, lost=lost.records)
            try:
                await asyncio.get_running_loop().run_in_executor(None, lambda: record_fork(directory, fork))
            except OSError as error:
                log.error("%s: the fork cannot be recorded: %s", directory, error)
                self._error = LOGGED


def _txids_of(known: Iterable[KnownHead]) -> dict[int, bytes]:
    return {one.head.seq: one.txid for one in known if one.txid is not None}


async def _txids_in(copy: LocalCopy) -> dict[int, bytes]:
    """Return the transaction ids that a copy remembers; none if it is torn, which the next read of it finds."""
    try:
        return await asyncio.get_running_loop().run_in_executor(None, copy.txids)
    except apsw.Error as error:
        log.warning("%s: its transaction ids cannot be read: %s", copy.path, error)
        return {}
