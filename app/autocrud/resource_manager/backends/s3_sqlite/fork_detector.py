"""Compare each HEAD that is read with what this process knows, and stop the model if history has forked.

The rules are in fork.
"""

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
from .fork_report import (
    LOGGED_MESSAGE,
    RECORDED_MESSAGE,
    ForkRecord,
    LostRecords,
    find_lost,
    fork_files,
    log_fork,
    record_fork,
    records_of_ids,
)
from .head import Head
from .local_copy import HeadState, LocalCopy

log = logging.getLogger("crudstack.s3sqlite")


class Comparison(NamedTuple):
    """The result of a comparison of a HEAD with the known HEADs, and with a copy at some state."""

    known: tuple[KnownHead, ...]
    copy: LocalCopy
    state: HeadState
    current: Head | None
    decided: bool
    """Whether the nonces decided. If they did not, the newest known record must be read again."""
    txids: Mapping[int, bytes]
    """The transaction ids of the records that this process knows, by number; empty if the nonces decided."""


class ForkDetector:
    """Knows the HEADs of one store in this process, and stops the model if history has forked.

    `directory` is the directory of the local copy, where a fork is recorded; None if it is a temporary one.
    """

    def __init__(self, objects: ObjectStore, key: str, directory: Path | None) -> None:
        self._objects, self._key, self._directory = objects, key, directory
        self.heads = KnownHeads()
        self._error = ""  # the text of HistoryForked, once history has forked

    def raise_if_forked(self) -> None:
        """Raise HistoryForked if history has forked."""
        if self._error:
            raise HistoryForked(self._error)

    def raise_if_recorded(self) -> None:
        """Raise HistoryForked if history has forked, or if a fork is recorded in the directory. Blocks."""
        if self._directory is not None and fork_files(self._directory):
            self._error = RECORDED_MESSAGE
        self.raise_if_forked()

    async def compare(self, head: Head, copy: LocalCopy, state: HeadState, current: Head | None) -> Comparison:
        """Compare a HEAD that was read with the HEADs that this process knows, and these with the HEAD of the copy.

        The latter is needed because a copy that processes share may be on another history than an own swap that the
        copy lacks. If the result is not `decided`, the caller must also compare the records from `state` on. Raises
        HistoryForked if history has forked.

        Args:
            head: The HEAD that was read.
            copy: The local copy.
            state: The state of the copy.
            current: The HEAD of that state; None if the copy has read none.
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
        """Stop serving the model in this process, and report the lost transactions. Raises HistoryForked."""
        if not self._error:
            # Set before anything is awaited, so that no read and no write succeeds from here on.
            self._error = LOGGED_MESSAGE if self._directory is None else RECORDED_MESSAGE
            await shielded(asyncio.ensure_future(self._report(found, compared)))
        raise HistoryForked(self._error)

    async def _report(self, found: Head, compared: Comparison) -> None:
        head_key = f"{self._key}/HEAD"
        heads = [one.head for one in compared.known]
        if compared.current is not None and compared.current not in heads:
            heads.append(compared.current)
        lost = LostRecords([], incomplete=True)
        try:
            recent = records_of_ids(await _txids_in(compared.copy) | _txids_of(compared.known))
            lost = await find_lost(self._objects, head_key, [*heads, found], recent, found)
            log_fork(head_key, heads, found, lost)
        except Exception:  # the fork must be recorded even if the report fails
            log.exception("%s: history-forked; the lost transactions could not be found", head_key)
        if self._directory is not None:
            directory, fork = self._directory, ForkRecord(key=self._key, store=found.store, lost=lost.records)
            try:
                await asyncio.get_running_loop().run_in_executor(None, lambda: record_fork(directory, fork))
            except OSError as error:
                log.error("%s: the fork cannot be recorded: %s", directory, error)
                self._error = LOGGED_MESSAGE


def _txids_of(known: Iterable[KnownHead]) -> dict[int, bytes]:
    return {one.head.seq: one.txid for one in known if one.txid is not None}


async def _txids_in(copy: LocalCopy) -> dict[int, bytes]:
    """Return the transaction ids that a copy remembers; none if it is damaged, which its next read will notice."""
    try:
        return await asyncio.get_running_loop().run_in_executor(None, copy.txids)
    except apsw.Error as error:
        log.warning("%s: its transaction ids cannot be read: %s", copy.path, error)
        return {}
