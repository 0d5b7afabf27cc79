"""The swap: how transactions become the next HEAD. One committer for each event loop that writes; all of them are merely rivals.

A transaction is tried at the copy's state, its record is put into a HEAD' derived from exactly that HEAD, and HEAD' replaces it by If-Match.

Invariants:

- *Acknowledged is in S3* (I3): the answer follows the 200 of the swap, or the record that was found in the history.
- *No answer before the outcome is known.* After anything but a 200, HEAD is read again, and the transaction is looked for by its txid, which
  was drawn once. Absence is conclusive once HEAD's ETag is not the one that the PUT named, as long as no more records have passed than
  copies remember; otherwise OutcomeUnknown is the answer, and nothing is tried again.
- *A rejection is as true as a success*: it holds in the HEAD that was replaced by the batch it was part of, or a conditional GET confirms the
  HEAD it was decided at. While a PUT of our own that named this HEAD may still land, an empty HEAD' is swapped in instead: its 200 proves
  that the other never will.
- A batch is never cancelled half way; whoever stops waiting does not know the outcome.
"""

from __future__ import annotations

import asyncio
import datetime as dt
import logging
import os
from collections import deque
from collections.abc import Callable, Sequence

from ....errors import (
    ConfigError,
    CrudError,
    HistoryForked,
    OutcomeUnknown,
    StoreDamaged,
    StoreUnavailable,
    WriteContention,
)
from ...basic import ResourceMeta
from ...runtime.threads import shielded
from ..s3.object_store import UNCHANGED, Object, Stored
from .head import Head, LogRecord, Segment, encode_segment, microseconds, segment_key
from .local_copy import REMEMBERED_TXIDS, Trial, WriteRequest
from .replica import Replica

log = logging.getLogger("crudstack.s3sqlite")

COMMIT_TIMEOUT_S = 25.0
"""How long an answer is sought; API Gateway waits for 30 s."""
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.05, 1.0


class Transaction:
    __slots__ = ("base", "future", "seqs", "time", "txid", "uncertain", "work")

    def __init__(self, work: WriteRequest, loop: asyncio.AbstractEventLoop) -> None:
        self.work = work
        self.txid = os.urandom(16)
        self.time = microseconds(dt.datetime.now(dt.UTC))
        self.future: asyncio.Future[list[ResourceMeta]] = loop.create_future()
        self.base: int | None = None  # HEAD's seq before the first attempt that is in doubt
        self.uncertain = False  # whether a PUT that carried it may still land
        self.seqs: dict[int, list[ResourceMeta]] = {}  # what it leaves, by the number that an attempt gave it

    def answer(self, result: list[ResourceMeta] | BaseException) -> None:
        if self.future.done():  # whoever asked is gone
            return
        if isinstance(result, BaseException):
            self.future.set_exception(result)
        else:
            self.future.set_result(result)


HeadEdit = Callable[[Head], Head | None]
"""Returns the HEAD that replaces the given one, or None if nothing is to be done. It may be called again, for another HEAD."""


class S3Committer:
    def __init__(self, replica: Replica, *, tail_bytes: int, max_batch: int, linger_s: float) -> None:
        self._replica, self._objects = replica, replica.objects
        self._tail_bytes, self._max_batch, self._linger_s = tail_bytes, max_batch, linger_s
        self._loop = asyncio.get_running_loop()
        self._queue: deque[Transaction] = deque()
        self._running: asyncio.Task[None] | None = None
        self._turn = asyncio.Lock()
        self._unresolved = ""  # the ETag that a PUT without a known outcome named

    async def commit(self, work: WriteRequest) -> list[ResourceMeta]:
        """The metadata that the work left. VersionConflict, UniqueConflict, StaleGeneration, StoreUnavailable, WriteContention: not done, and
        never will be. OutcomeUnknown."""
        transaction = Transaction(work, self._loop)
        self._queue.append(transaction)
        if self._running is None:
            self._running = self._loop.create_task(self._run())
        return await shielded(transaction.future)

    async def idle(self) -> None:
        """Wait until nothing is on its way."""
        while self._running is not None:
            await asyncio.wait([self._running])

    async def _run(self) -> None:
        batch: list[Transaction] = []
        try:
            if self._linger_s:
                await asyncio.sleep(self._linger_s)
            while self._queue:
                async with self._turn:
                    batch = [self._queue.popleft() for _ in range(min(len(self._queue), self._max_batch))]
                    await self._settle(batch)
        except BaseException as error:  # nobody may wait for ever
            for transaction in (*batch, *self._queue):
                transaction.answer(_given_up(transaction, error))
            self._queue.clear()
            if not isinstance(error, CrudError):
                raise
        finally:
            self._running = None

    async def _settle(self, waiting: list[Transaction]) -> None:
        """Answer every one of them."""
        deadline = self._loop.time() + COMMIT_TIMEOUT_S
        pause = FIRST_PAUSE_S
        while waiting:
            try:
                settled = await self._swap(waiting)
            except (ConfigError, StoreDamaged, HistoryForked) as error:  # waiting does not help
                _answer_all(waiting, error)
                return
            except CrudError as error:
                # S3 or the copy cannot be used now; whose outcome is open waits for a better moment.
                if self._loop.time() + pause > deadline or not any(one.uncertain for one in waiting):
                    _answer_all(waiting, error)
                    return
                await asyncio.sleep(pause)
                pause = min(2 * pause, LONGEST_PAUSE_S)
                settled = False
            if settled:
                return
            waiting = [transaction for transaction in waiting if not transaction.future.done()]
            if self._loop.time() > deadline:
                _answer_all(
                    waiting,
                    WriteContention("other writers were faster again and again; nothing was changed, try again"),
                )
                return

    async def _swap(self, waiting: list[Transaction]) -> bool:
        """One attempt. True: all are answered. Whoever was found in the history meanwhile is answered too."""
        if self._replica.unapplied_version:
            # A swap at the copy's state must fail. If the copy cannot be brought up, a full disk for one, nothing was sent.
            await self._replica.check()
        if any(transaction.uncertain for transaction in waiting):
            await self._find_in_history(waiting)
            waiting = [transaction for transaction in waiting if not transaction.future.done()]
            if not waiting:
                return True
        works = [transaction.work for transaction in waiting]
        doubtful = [transaction.txid for transaction in waiting if transaction.uncertain]
        trial = await self._replica.blocking(lambda copy: copy.attempt(works, doubtful))
        if trial.found or any(
            one.uncertain and one.base is not None and trial.state.seq - one.base >= REMEMBERED_TXIDS for one in waiting
        ):
            return False  # the copy has moved since they were looked for: that comes first
        accepted = [(one, made) for one, made in zip(waiting, trial.attempts, strict=True) if made.ops]
        base, etag = trial.head, trial.state.etag
        if not accepted and self._unresolved != etag:
            found = await self._objects.get_if_changed(self._replica.head_key, etag)
            if found is UNCHANGED:
                _answer(waiting, trial)
                return True
            await self._replica.check()
            return False
        seq, time = base.seq, base.tail[-1].time if base.tail else 0
        records: list[LogRecord] = []
        for transaction, made in accepted:
            seq, time = seq + 1, max(time, transaction.time)
            records.append(LogRecord(seq, transaction.txid, time, made.ops))
            transaction.seqs[seq] = made.metas
        head = await self._with(base, trial, records)
        # From here on what we carry may land, until the outcome says otherwise.
        for transaction, _ in accepted:
            transaction.uncertain = True
            transaction.base = base.seq if transaction.base is None else transaction.base
        body = head.encode()
        outcome = await self._objects.put_if(self._replica.head_key, body, etag)
        if isinstance(outcome, Stored):
            self._unresolved = ""
            await self._advance(head, records, Object(body, outcome.etag))
            _answer(waiting, trial)
            return True
        # After a conflict too: it may be our own success, repeated by something on the way, and if HEAD has not moved it was none.
        self._unresolved = etag
        log.info("%s: version %d: %s", self._replica.head_key, head.ver, outcome)
        await self._find_in_history(waiting)
        return False

    async def _with(self, base: Head, trial: Trial, records: Sequence[LogRecord]) -> Head:
        """HEAD' with these records; what its tail has no room for is put into a segment first (I2)."""
        tail = [*base.tail, *records]
        cut = max((at + 1 for at, record in enumerate(tail) if record.size > self._tail_bytes // 4), default=0)
        if sum(record.size for record in tail[cut:]) > self._tail_bytes:
            room = self._tail_bytes // 2
            kept = len(tail)
            while kept > cut and room >= tail[kept - 1].size:
                kept -= 1
                room -= tail[kept].size
            cut = kept
        segments = base.segs
        if cut:
            spilled = tail[:cut]
            key = segment_key(self._replica.prefix, base.ver + 1, spilled[0].seq)  # a name of its own for each attempt
            segment = encode_segment(spilled)
            await self._objects.put(key, segment)
            segments = (*segments, Segment(key, spilled[0].seq, spilled[-1].seq, len(segment)))
        return base.next(
            born=True,
            seq=base.seq + len(records),
            segs=segments,
            tail=tuple(tail[cut:]),
            schema=trial.schema,
            logged=base.logged + sum(record.size for record in records),
        )

    async def _advance(self, head: Head, records: Sequence[LogRecord], got: Object) -> None:
        """Bring the copy up to our own swap. If it cannot be, the next read must: its ETag is still the old one.

        Raises HistoryForked if another process of this directory knows another HEAD of this version: perhaps the swap is lost, so it is
        not acknowledged.
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
        """Read HEAD, and answer those transactions that are in the history."""
        await self._replica.check()
        doubtful = [transaction for transaction in waiting if transaction.uncertain]
        txids = [transaction.txid for transaction in doubtful]
        state, found = await self._replica.blocking(lambda copy: copy.find_transactions(txids))
        if self._unresolved != state.etag:
            self._unresolved = ""  # what named another ETag can never land
        for transaction in doubtful:
            seq = found.get(transaction.txid)
            if seq is not None:
                transaction.answer(transaction.seqs.get(seq) or [])
            elif transaction.base is not None and state.seq - transaction.base >= REMEMBERED_TXIDS:
                transaction.answer(
                    OutcomeUnknown("so much was written meanwhile that nobody remembers; look before you try again")
                )
            elif not self._unresolved:
                transaction.uncertain, transaction.base = False, None

    async def edit(self, edit: HeadEdit) -> Head | None:
        """Swap in an edited HEAD; the HEAD that holds afterwards, None where the edit had nothing to do."""
        deadline = self._loop.time() + COMMIT_TIMEOUT_S
        async with self._turn:
            while self._loop.time() < deadline:
                state, base = await self._replica.blocking(lambda copy: copy.state_and_head())
                head = edit(base)
                if head is None:
                    return None
                body = head.encode()
                outcome = await self._objects.put_if(self._replica.head_key, body, state.etag)
                if isinstance(outcome, Stored):
                    self._unresolved = ""
                    await self._advance(head, (), Object(body, outcome.etag))
                    return head
                self._unresolved = state.etag
                await self._replica.check()
                now = await self._replica.blocking(lambda copy: copy.state())
                if now.etag != self._unresolved:
                    self._unresolved = ""
        raise StoreUnavailable("HEAD could not be changed; try again")


def _answer(waiting: Sequence[Transaction], trial: Trial) -> None:
    for transaction, made in zip(waiting, trial.attempts, strict=True):
        transaction.answer(made.metas if made.error is None else made.error)


def _answer_all(waiting: Sequence[Transaction], error: CrudError) -> None:
    for transaction in waiting:
        transaction.answer(_given_up(transaction, error))


def _given_up(transaction: Transaction, error: BaseException) -> CrudError:
    """What to say of a transaction that is not tried any more."""
    if transaction.uncertain:
        return OutcomeUnknown("the object storage did not say whether this was stored; look before you try again")
    if isinstance(error, CrudError):
        return error
    return StoreUnavailable("the write was stopped; nothing was changed")
