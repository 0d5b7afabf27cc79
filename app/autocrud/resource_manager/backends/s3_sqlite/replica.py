"""A local copy that is kept up to date with HEAD.

Reads are linearizable. A conditional GET of HEAD names the ETag that was committed with the rows of the copy. If the
answer is 304, these rows are the newest. If the answer is a newer HEAD, the copy advances to it first. Several reads
may share one check only if all of them began before it was sent.

I8 *A HEAD is accepted only if it continues every HEAD that this process knows, or if they continue it.* Otherwise
history has forked, and this process stops serving the model: see fork. The copy advances only from the state that HEAD
was compared with.
"""

from __future__ import annotations

import asyncio
import logging
import weakref
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TypeVar

import apsw

from ....errors import ConfigError, HeadLost, StoreDamaged, StoreUnavailable
from ...runtime.disk_space import full, is_full
from ..s3.object_store import UNCHANGED, Object, ObjectStore, Stored
from ..sqlite.errors import translated
from ..sqlite.tables import ResourceTables
from .coalesced_checks import CoalescedChecks
from .copy_directory import CopyDirectory
from .copy_files import new_path, remove_database
from .creation import StoreCreation
from .current_copy import DAMAGED_FILE, CurrentCopy, in_executor
from .fork import contradicts, txids_of
from .fork_detector import Comparison, ForkDetector
from .head import Head, LogRecord, decode_head
from .local_copy import NO_HEAD, CopyBusy, HeadState, LocalCopy
from .log_reader import LogReader, ObjectMissing
from .race_check import race_conditional_writes

T = TypeVar("T")

log = logging.getLogger("crudstack.s3sqlite")

MAX_ROUNDS = 100
"""How often a step is repeated because HEAD or the copy changed meanwhile."""
MAX_CREATIONS = 5
MAX_RACED = 8
"""Endpoints that HEAD remembers as raced: one server may be reached by several names."""
SHORT_LOG = 256 * 1024
"""Bytes of records that an empty copy replays in place. Above that a new file is built, in a third of the time."""


class Replica:
    """The local copy of one store, and the operations that keep it up to date.

    Args:
        objects: The bucket.
        key: The key of the store. Its objects lie below `{key}/`.
        tables: The tables of the model.
        directory: The directory of the copy, which processes may share; None for a temporary one of this process.
    """

    def __init__(self, objects: ObjectStore, key: str, tables: ResourceTables, directory: Path | None) -> None:
        self.objects, self.key, self.prefix, self.tables = objects, key, f"{key}/", tables
        self.head_key = f"{key}/HEAD"
        self.unapplied_version = 0
        """The version of an own swap that the copy lacks, else 0. Until the copy has it, every read except `peek`
        checks HEAD first, whatever its consistency."""
        self._creation = StoreCreation(objects, key)
        self._log = LogReader(objects, self.head_key)
        self._forks = ForkDetector(objects, key, directory)
        self._current = CurrentCopy(tables, CopyDirectory(directory), self._forks, self.check)
        self._newest_seen = NO_HEAD
        """The newest HEAD that this process knew. It outlives a copy that is lost."""
        self._decoded: tuple[HeadState, Head | None] = (NO_HEAD, None)
        """A state of the copy with its HEAD, which need not be decoded again."""
        self._opened = False
        self._openings: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, asyncio.Lock] = weakref.WeakKeyDictionary()
        self._checks: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, CoalescedChecks] = (
            weakref.WeakKeyDictionary()
        )

    # Opening

    async def open(self) -> None:
        """Open or create the copy, bring it up to HEAD, and check that the storage honours conditional writes.

        Does nothing if the replica is open. Raises ConditionalWritesUnsupported, ConfigError, HeadLost, HistoryForked,
        StoreDamaged or StoreUnavailable.
        """
        self._forks.raise_if_forked()
        if self._opened:
            return
        loop = asyncio.get_running_loop()
        async with self._openings.setdefault(loop, asyncio.Lock()):
            if self._opened:
                return
            self._newest_seen = _newer(self._newest_seen, await self._current.open())
            await self.check()
            head = await self.head()
            await asyncio.gather(self._creation.probe(head.store), self._creation.refuse_changed_import(head))
            if self.objects.endpoint not in head.raced:
                await race_conditional_writes(self.objects, self.prefix)
                await self._record_race()
            self._opened = True

    async def close(self) -> None:
        """Close the copy. A private one is removed."""
        self._opened = False
        await self._current.close()

    # The copy

    @property
    def copy(self) -> LocalCopy:
        """The copy in use. Raises HistoryForked, or StoreUnavailable if the store is not open."""
        return self._current.get()

    @property
    def directory(self) -> Path:
        """The directory of the copy. It is created if it is missing."""
        return self._current.directory.path()

    async def blocking(self, work: Callable[[LocalCopy], T]) -> T:
        """Run work on the copy in a thread; see `CurrentCopy.blocking`."""
        return await self._current.blocking(work)

    async def read(self, work: Callable[[apsw.Connection], T], *, quick: bool = False) -> T:
        """Run a read on a connection of the copy; see `CurrentCopy.read`."""
        return await self._current.read(work, quick=quick)

    async def head(self) -> Head:
        """Return the HEAD that the copy is at. Sends no request."""
        _, head = await self.blocking(lambda copy: copy.state_and_head())
        return head

    # Checking

    async def check(self) -> None:
        """Make the copy as new as HEAD is at some moment after this call began.

        Creates HEAD if the store does not exist. Raises HeadLost if HEAD is missing or older than before,
        HistoryForked, ConfigError if HEAD cannot be created, or StoreUnavailable.
        """
        creations = 0
        for _ in range(MAX_ROUNDS):
            state = await self._current.state()
            known = _newer(state, self._newest_seen)  # the answer to a request that is sent now is at least as new
            if state.etag:
                got = await self.objects.get_if_changed(self.head_key, state.etag)
            else:
                got = await self.objects.get(self.head_key)
            if got is UNCHANGED:
                if state.ver < known.ver:
                    raise self._older_head_error(state.ver, known.ver)
                if self.unapplied_version:
                    # Another process advanced the shared copy, perhaps on another history than that of our own swap.
                    await self._compare_copy()
                self._note_applied(state.ver)
                return
            if got is None:
                creations += 1
                if creations > MAX_CREATIONS:
                    raise ConfigError(
                        f"{self.head_key} cannot be created: does the bucket exist, and may this program write to it?"
                    )
                await self._creation.create(self.directory, known.store)
            elif isinstance(got, Object) and await self.advance_to(got, known):
                return
        raise StoreUnavailable("HEAD kept changing; nothing was changed, try again")

    async def coalesced_check(self) -> None:
        """Do the same as `check`, in one request for all callers that wait for it."""
        loop = asyncio.get_running_loop()
        checks = self._checks.get(loop)
        if checks is None:
            checks = self._checks.setdefault(loop, CoalescedChecks(self.check))
        await checks.next()

    # Advancing

    async def advance_to(self, got: Object, known: HeadState = NO_HEAD, own_records: Sequence[LogRecord] = ()) -> bool:
        """Bring the copy up to a HEAD that was read. Return False if HEAD must be read again.

        If the disk is full, frees space and tries again.

        Args:
            got: The object HEAD.
            known: The newest HEAD that was known when the request was sent. An older answer raises HeadLost.
            own_records: The newest records up to this HEAD, if a swap of this process stored it. They are not read from
                S3, so a failure of S3 cannot hide an acknowledged commit from this copy.
        """
        return await self._current.directory.retry_with_space(partial(self._advance_to, got, known, own_records))

    async def _advance_to(self, got: Object, known: HeadState, own_records: Sequence[LogRecord]) -> bool:
        head = decode_head(got.body)
        compared = await self._compare(head)
        self._check_lineage(head, known)
        await self._creation.record_store_id(head)
        for again in range(MAX_ROUNDS):
            if again:
                compared = await self._compare(head)
            copy, state = compared.copy, compared.state
            if state.ver >= head.ver and state.store == head.store:
                if state.ver == head.ver and state.etag != got.etag:
                    await self._update_etag(copy, state, got.etag)
                self._forks.heads.add(head, instead=compared.known)
                self._note_applied(state.ver)
                return True
            try:
                # If the transaction ids must decide, the newest known record is read too.
                after = state.seq if compared.decided else max(state.seq - 1, 0)
                if own_records and own_records[0].seq == after + 1:
                    records: list[LogRecord] | None = list(own_records)
                else:
                    records = await self._log.records_after(head, after)
                if records is not None and not compared.decided and contradicts(compared.txids, txids_of(records)):
                    await self._forks.stop(head, compared)
                if records is None or (state.seq == 0 and sum(record.size for record in records) > SHORT_LOG):
                    await self._rebuild(head, got, compared, snapshot=records is None)
                    continue
            except ObjectMissing as missing:
                now = await self.objects.get(self.head_key)
                if now is not None and now.etag == got.etag:
                    raise StoreDamaged(f"{missing} is missing, although HEAD refers to it") from None
                return False
            if await self._apply(copy, state, records, head, got):
                self._forks.heads.add(head, records[-1] if records else None, instead=compared.known)
                self._note_applied(head.ver)
                reached = HeadState(head.store, head.seq, head.ver, got.etag)
                self._decoded, self._newest_seen = (reached, head), _newer(self._newest_seen, reached)
                return True
        raise StoreUnavailable("the local copy could not be brought up; try again")

    async def apply_own_swap(self, head: Head, records: Sequence[LogRecord], got: Object) -> None:
        """Bring the copy up to a HEAD that a swap of this process stored, with these new records.

        Remembers this HEAD even if the copy cannot be brought up, because every HEAD that is read later must continue
        it.
        """
        self._forks.heads.add(head, records[-1] if records else None)
        self._newest_seen = _newer(self._newest_seen, HeadState(head.store, head.seq, head.ver, got.etag))
        await self.advance_to(got, own_records=records)

    async def _compare(self, head: Head) -> Comparison:
        """Compare a HEAD that was read with those that this process knows. Raises HistoryForked."""
        copy = self.copy
        try:
            state = copy.state()
            decoded_state, current = self._decoded
            if state != decoded_state:
                state, current = copy.state_and_optional_head()
        except (*DAMAGED_FILE, StoreDamaged) as error:
            await self._current.replace_damaged(copy, error)
            copy = self.copy
            state, current = copy.state_and_optional_head()
        return await self._forks.compare(head, copy, state, current)

    async def _compare_copy(self) -> None:
        """Compare the HEAD of the copy with those that this process knows. Raises HistoryForked."""
        _, head = await self.blocking(lambda copy: copy.state_and_head())
        await self._compare(head)

    async def _update_etag(self, copy: LocalCopy, state: HeadState, etag: str) -> None:
        """Note another ETag of equal bytes. If that fails, the next check tries again."""
        try:
            await in_executor(lambda: copy.update_etag(state, etag))
        except (CopyBusy, apsw.Error) as error:
            log.warning("%s has a new ETag, which the local copy could not store: %s", self.head_key, error)

    def _note_applied(self, version: int) -> None:
        if version >= self.unapplied_version:
            self.unapplied_version = 0

    async def _apply(self, copy: LocalCopy, base: HeadState, records: list[LogRecord], head: Head, got: Object) -> bool:
        """Advance the copy from `base`. Return False if that must be tried again, on the copy that is in use then."""
        try:
            return await in_executor(lambda: copy.advance(base, records, head, got.etag, got.body))
        except CopyBusy:
            await self._current.use_private()
            return False
        except apsw.Error as error:
            if not isinstance(error, DAMAGED_FILE) or is_full(error, copy.path.parent):
                raise translated(error, copy.path.parent) from error
            await self._current.replace_damaged(copy, error)
            return False

    def _check_lineage(self, head: Head, known: HeadState) -> None:
        if known.store and known.store != head.store:
            raise HeadLost(
                f"{self.head_key} is of another store than the local copy: HEAD was replaced; if that was intended,"
                " remove the local copy"
            )
        if head.ver < known.ver or head.seq < known.seq:
            raise self._older_head_error(head.ver, known.ver)

    def _older_head_error(self, found: int, known: int) -> HeadLost:
        return HeadLost(
            f"{self.head_key} is at version {found}, and was at {known}: an old one was put back; if that was intended,"
            " remove the local copy"
        )

    async def _rebuild(self, head: Head, got: Object, compared: Comparison, *, snapshot: bool) -> None:
        """Build a new file from the snapshot, or from nothing, bring it up to HEAD, and use it from then on."""
        path, seq = new_path(self.directory), 0
        building: LocalCopy | None = None
        try:
            if snapshot:
                assert head.snap is not None
                seq = head.snap.seq
                await self._log.download_snapshot(head.snap, path)
            records = await self._log.records_after(head, seq)
            assert records is not None, "nothing is missing between a snapshot and its HEAD"
            building = await in_executor(lambda: LocalCopy(path, self.tables, building=True))
            await self._apply(building, building.state(), records, head, got)
            if not compared.decided:
                known, found = compared.txids, await in_executor(building.txids)
                if contradicts(known, found):
                    await self._forks.stop(head, compared)
                if known and known.keys().isdisjoint(found):
                    log.warning("%s: so much was written that a fork could not be noticed", self.head_key)
            await in_executor(building.finish_building)
            await in_executor(lambda: self._current.use_instead(building, compared.copy))
        except BaseException as error:
            if building is not None and not self._current.is_current(building):
                building.close()
            remove_database(path)
            if isinstance(error, (apsw.Error, OSError)) and is_full(error, path.parent):
                raise full(error, path.parent, head.snap.size if snapshot and head.snap else 0) from error
            raise

    # Other operations

    async def export(self, key: str) -> None:
        """Write a plain database to an object. Raises StoreUnavailable."""
        path = new_path(self.directory)
        try:
            await self.blocking(lambda copy: copy.export_to(path))
            await self.objects.upload(key, path)
        finally:
            await in_executor(lambda: path.unlink(missing_ok=True))

    async def _record_race(self) -> None:
        """Note in HEAD that this endpoint passed the race check, so that no later start of any instance repeats it.

        The outcome of the PUT does not matter, because HEAD is read again until it names the endpoint. A PUT that takes
        effect late changes nothing else.
        """
        endpoint = self.objects.endpoint
        for _ in range(MAX_ROUNDS):
            state, head = await self.blocking(lambda copy: copy.state_and_head())
            if endpoint in head.raced:
                return
            changed = head.next(raced=(*head.raced, endpoint)[-MAX_RACED:])
            body = changed.encode()
            outcome = await self.objects.put_if(self.head_key, body, state.etag)
            if isinstance(outcome, Stored):
                await self.apply_own_swap(changed, (), Object(body, outcome.etag))
            else:
                await self.check()
        raise StoreUnavailable("HEAD could not be changed; try again")


def _newer(one: HeadState, other: HeadState) -> HeadState:
    return max(one, other, key=lambda state: state.ver)
