"""Commit transactions: put their log records into the next HEAD, and swap it in by a conditional PUT.

Each event loop that writes has one committer. Committers are rivals, in one process as on different machines. A
transaction is tried at the state of the local copy. Its log record is put into a new HEAD that is derived from exactly
the HEAD of that state, and the new HEAD replaces that one by `If-Match` (the swap). Transactions that wait at the same
time share a swap (group commit).

Invariants:

- *An acknowledged transaction is in S3* (I3). It is answered after the swap returned 200, or after its record was found
  in the history.
- *A transaction is answered only when its outcome is known.* After any other response than 200, HEAD is read again, and
  the transaction is looked for by its id, which is drawn once. If the id is missing, the transaction is not committed,
  provided that HEAD has another ETag than the one that the PUT named, and that fewer records were written meanwhile
  than a copy remembers. Otherwise the answer is OutcomeUnknown, and the transaction is not tried again.
- *A rejection is as reliable as a success.* Either a swap replaced the HEAD that the rejection was decided at, or a
  conditional GET proves that this HEAD is still the newest. If an own PUT that named this HEAD may still take effect, a
  HEAD without new records is swapped in instead. Its 200 proves that the other PUT will fail.
- A batch is never cancelled half way. A caller that stops waiting does not learn the outcome.

The protocol is explained in docs/design/commit-on-s3.md.
"""

from __future__ import annotations

import asyncio
import datetime as dt
import logging
import os
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

from ....errors import (
    ConfigError,
    CrudError,
    HistoryForked,
    OutcomeUnknown,
    StoreDamaged,
    StoreUnavailable,
    WriteContention,
)
from ...runtime.threads import shielded
from ..s3.object_store import UNCHANGED, Object, Stored
from .head import Head, LogRecord, Segment, encode_segment, microseconds, segment_key
from .local_copy import REMEMBERED_TXIDS, HeadState, LocalCopy, Trial
from .replica import Replica
from .write_requests import WriteRequest

log = logging.getLogger("crudstack.s3sqlite")

COMMIT_TIMEOUT_S = 25.0
"""A transaction is tried for this long. API Gateway waits for 30 s."""
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.05, 1.0
"""Pauses between attempts while S3 cannot be used and an outcome is open."""


class Transaction:
    """One transaction that waits for its answer, on the event loop that asked."""

    __slots__ = ("base_seq", "future", "in_doubt", "request", "results_by_seq", "time", "txid")

    def __init__(self, request: WriteRequest, loop: asyncio.AbstractEventLoop) -> None:
        self.request = request
        self.txid = os.urandom(16)
        self.time = microseconds(dt.datetime.now(dt.UTC))
        self.future: asyncio.Future[list[Any]] = loop.create_future()
        self.in_doubt = False
        """Whether a PUT that carried this transaction may have taken effect, or may still do so."""
        self.base_seq: int | None = None
        """The number of the newest record before the first such PUT."""
        self.results_by_seq: dict[int, list[Any]] = {}
        """The result of the transaction, by the record number that an attempt gave it."""

    def answer(self, result: list[Any] | BaseException) -> None:
        """Answer the transaction, unless it was answered or its caller is gone."""
        if self.future.done():
            return
        if isinstance(result, BaseException):
            self.future.set_exception(result)
        else:
            self.future.set_result(result)


HeadEdit = Callable[[Head], Head | None]
"""Returns the HEAD that is to replace the given one, or None if there is nothing to do. It may be called again, for
another HEAD."""


class S3Committer:
    """Commits transactions to one store, from one event loop.

    Args:
        replica: The local copy of the store.
        tail_bytes: Bytes of the newest records that HEAD itself holds, at most.
        max_batch: Transactions that share a swap, at most.
        linger_s: Seconds that the first transaction of a batch waits for others.
    """

    def __init__(self, replica: Replica, *, tail_bytes: int, max_batch: int, linger_s: float) -> None:
        self._replica, self._objects = replica, replica.objects
        self._tail_bytes, self._max_batch, self._linger_s = tail_bytes, max_batch, linger_s
        self._loop = asyncio.get_running_loop()
        self._queue: deque[Transaction] = deque()
        self._running: asyncio.Task[None] | None = None
        self._swap_lock = asyncio.Lock()
        self._unresolved_etag = ""
        """The ETag that a PUT without a known outcome named in its `If-Match`."""

    async def commit(self, request: WriteRequest) -> list[Any]:
        """Commit a transaction, and return its result: see Attempt.

        Runs to completion even if the caller is cancelled. Raises OutcomeUnknown if the transaction may be committed or
        may be committed later. Any other error says that it is not and never will be: VersionConflict, UniqueConflict,
        StaleGeneration, WriteContention if other writers won every swap for COMMIT_TIMEOUT_S, StoreUnavailable, and the
        errors of `Replica.check`.
        """
        transaction = Transaction(request, self._loop)
        self._queue.append(transaction)
        if self._running is None:
            self._running = self._loop.create_task(self._run())
        return await shielded(transaction.future)

    async def idle(self) -> None:
        """Wait until no transaction is under way."""
        while self._running is not None:
            await asyncio.wait([self._running])

    async def _run(self) -> None:
        batch: list[Transaction] = []
        try:
            if self._linger_s:
                await asyncio.sleep(self._linger_s)
            while self._queue:
                async with self._swap_lock:
                    batch = [self._queue.popleft() for _ in range(min(len(self._queue), self._max_batch))]
                    await self._commit_batch(batch)
        except BaseException as error:  # every caller needs an answer
            for transaction in (*batch, *self._queue):
                transaction.answer(_final_error(transaction, error))
            self._queue.clear()
            if not isinstance(error, CrudError):
                raise
        finally:
            self._running = None

    async def _commit_batch(self, waiting: list[Transaction]) -> None:
        """Answer every one of these transactions."""
        deadline = self._loop.time() + COMMIT_TIMEOUT_S
        pause = FIRST_PAUSE_S
        while waiting:
            try:
                all_answered = await self._try_swap(waiting)
            except (ConfigError, StoreDamaged, HistoryForked) as error:  # waiting does not help
                _answer_all(waiting, error)
                return
            except CrudError as error:
                # S3 or the copy cannot be used now. Transactions in doubt wait until their outcome can be read.
                if self._loop.time() + pause > deadline or not any(one.in_doubt for one in waiting):
                    _answer_all(waiting, error)
                    return
                await asyncio.sleep(pause)
                pause = min(2 * pause, LONGEST_PAUSE_S)
                all_answered = False
            if all_answered:
                return
            waiting = [transaction for transaction in waiting if not transaction.future.done()]
            if self._loop.time() > deadline:
                _answer_all(
                    waiting,
                    WriteContention("other writers were faster again and again; nothing was changed, try again"),
                )
                return

    async def _try_swap(self, waiting: list[Transaction]) -> bool:
        """Make one attempt. Return True if all transactions are answered.

        Also answers transactions that are found in the history meanwhile.
        """
        if self._replica.unapplied_version:
            # A swap at the state of this copy would fail. If the copy cannot be brought up, for example because the
            # disk is full, nothing is sent.
            await self._replica.check()
        if any(transaction.in_doubt for transaction in waiting):
            await self._find_in_history(waiting)
            waiting = [transaction for transaction in waiting if not transaction.future.done()]
            if not waiting:
                return True
        requests = [transaction.request for transaction in waiting]
        in_doubt = [transaction.txid for transaction in waiting if transaction.in_doubt]
        trial = await self._replica.blocking(lambda copy: copy.attempt(requests, in_doubt))
        if trial.found or any(
            one.in_doubt and one.base_seq is not None and trial.state.seq - one.base_seq >= REMEMBERED_TXIDS
            for one in waiting
        ):
            return False  # the copy advanced after the transactions in doubt were looked for, so look again first
        accepted = [(one, attempt) for one, attempt in zip(waiting, trial.attempts, strict=True) if attempt.ops]
        base, etag = trial.head, trial.state.etag
        if not accepted and self._unresolved_etag != etag:
            found = await self._objects.get_if_changed(self._replica.head_key, etag)
            if found is UNCHANGED:
                _answer(waiting, trial)
                return True
            await self._replica.check()
            return False
        seq, time = base.seq, base.tail[-1].time if base.tail else 0
        records: list[LogRecord] = []
        for transaction, attempt in accepted:
            seq, time = seq + 1, max(time, transaction.time)
            records.append(LogRecord(seq, transaction.txid, time, attempt.ops))
            transaction.results_by_seq[seq] = attempt.result
        head = await self._next_head(base, trial, records)
        # From here on these transactions may be committed, until the outcome says otherwise.
        for transaction, _ in accepted:
            transaction.in_doubt = True
            transaction.base_seq = base.seq if transaction.base_seq is None else transaction.base_seq
        body = head.encode()
        outcome = await self._objects.put_if(self._replica.head_key, body, etag)
        if isinstance(outcome, Stored):
            self._unresolved_etag = ""
            await self._apply_swap(head, records, Object(body, outcome.etag))
            _answer(waiting, trial)
            return True
        # A conflict is in doubt too: a proxy may have repeated the PUT, so that our own success caused the conflict. If
        # HEAD has not changed, the PUT has not succeeded.
        self._unresolved_etag = etag
        log.info("%s: version %d: %s", self._replica.head_key, head.ver, outcome)
        await self._find_in_history(waiting)
        return False

    async def _next_head(self, base: Head, trial: Trial, records: Sequence[LogRecord]) -> Head:
        """Return the next HEAD with these records. Records that exceed its tail are put into a segment first (I2)."""
        tail = [*base.tail, *records]
        cut = max((index + 1 for index, record in enumerate(tail) if record.size > self._tail_bytes // 4), default=0)
        if sum(record.size for record in tail[cut:]) > self._tail_bytes:
            free = self._tail_bytes // 2
            kept = len(tail)
            while kept > cut and free >= tail[kept - 1].size:
                kept -= 1
                free -= tail[kept].size
            cut = kept
        segments = base.segs
        if cut:
            spilled = tail[:cut]
            key = segment_key(self._replica.prefix, base.ver + 1, spilled[0].seq)  # each attempt has another name
            segment = encode_segment(spilled)
            await self._objects.put(key, segment)
            segments = (*segments, Segment(key, spilled[0].seq, spilled[-1].seq, len(segment)))
        return base.next(
            born=True,
            seq=base.seq + len(records),
            segs=segments,
            tail=tuple(tail[cut:]),
            logged=base.logged + sum(record.size for record in records),
            **trial.changes,
        )

    async def _apply_swap(self, head: Head, records: Sequence[LogRecord], got: Object) -> None:
        """Bring the copy up to an own swap. If that fails, the next read does it, because the copy keeps the old ETag.

        Raises HistoryForked if another process of this directory knows another HEAD of this version. The swap may be
        lost then, so it is not acknowledged.
        """
        try:
            await self._replica.apply_own_swap(head, records, got)
        except HistoryForked:
            raise
        except CrudError as error:
            self._replica.unapplied_version = head.ver
            log.warning(
                "%s: version %d is stored, but the local copy is behind: %s", self._replica.head_key, head.ver, error
            )

    async def _find_in_history(self, waiting: Sequence[Transaction]) -> None:
        """Read HEAD, and answer the transactions that are in the history."""
        await self._replica.check()
        in_doubt = [transaction for transaction in waiting if transaction.in_doubt]
        txids = [transaction.txid for transaction in in_doubt]
        state, found = await self._replica.blocking(lambda copy: copy.find_transactions(txids))
        if self._unresolved_etag != state.etag:
            self._unresolved_etag = ""  # HEAD never has this ETag again, so that PUT can no longer take effect
        for transaction in in_doubt:
            seq = found.get(transaction.txid)
            if seq is not None:
                transaction.answer(transaction.results_by_seq.get(seq) or [])
            elif transaction.base_seq is not None and state.seq - transaction.base_seq >= REMEMBERED_TXIDS:
                transaction.answer(
                    OutcomeUnknown(
                        "too much was written meanwhile to tell whether this was stored; look before you try again"
                    )
                )
            elif not self._unresolved_etag:
                transaction.in_doubt, transaction.base_seq = False, None

    async def edit(self, edit: HeadEdit) -> Head | None:
        """Swap in an edited HEAD that has no new records, and return it; None if the edit returned None.

        Raises StoreUnavailable if no swap succeeded for COMMIT_TIMEOUT_S, and the errors of `Replica.check`.
        """

        def decide(copy: LocalCopy) -> tuple[HeadState, Head | None]:
            state, base = copy.state_and_head()
            return state, edit(base)

        return await self.edit_copy(decide)

    async def edit_copy(self, decide: Callable[[LocalCopy], tuple[HeadState, Head | None]]) -> Head | None:
        """Do the same as `edit`, with a function that returns the state of a copy and the HEAD that is to follow it.

        It runs in a thread, and is called again after each swap that failed or whose outcome is not known. It sees then
        what the swap may have done.
        """
        deadline = self._loop.time() + COMMIT_TIMEOUT_S
        async with self._swap_lock:
            while self._loop.time() < deadline:
                state, head = await self._replica.blocking(decide)
                if head is None:
                    return None
                body = head.encode()
                outcome = await self._objects.put_if(self._replica.head_key, body, state.etag)
                if isinstance(outcome, Stored):
                    self._unresolved_etag = ""
                    await self._apply_swap(head, (), Object(body, outcome.etag))
                    return head
                self._unresolved_etag = state.etag
                await self._replica.check()
                now = await self._replica.blocking(lambda copy: copy.state())
                if now.etag != self._unresolved_etag:
                    self._unresolved_etag = ""
        raise StoreUnavailable("HEAD could not be changed; try again")


def _answer(waiting: Sequence[Transaction], trial: Trial) -> None:
    for transaction, attempt in zip(waiting, trial.attempts, strict=True):
        transaction.answer(attempt.result if attempt.error is None else attempt.error)


def _answer_all(waiting: Sequence[Transaction], error: CrudError) -> None:
    for transaction in waiting:
        transaction.answer(_final_error(transaction, error))


def _final_error(transaction: Transaction, error: BaseException) -> CrudError:
    """Return the answer to a transaction that is not tried any more."""
    if transaction.in_doubt:
        return OutcomeUnknown("the object storage did not say whether this was stored; look before you try again")
    if isinstance(error, CrudError):
        return error
    return StoreUnavailable("the write was stopped; nothing was changed")
