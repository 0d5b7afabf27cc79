"""A local copy that is kept up with HEAD.

Reads are strong: a conditional GET of HEAD, with the ETag that the copy's rows were committed with, proves that these rows are the newest; if it
brings a newer HEAD, the copy catches up first. A check may be shared only by reads that began before it was sent.

I8 *a HEAD is accepted only if it continues the history of every HEAD that this process knows*, or is continued by it; else history has
forked, and this process stops: see fork. The copy is advanced only from the state that HEAD was compared with.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
import threading
import weakref
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TypeVar

import apsw

from ....errors import ConfigError, HeadLost, StoreDamaged, StoreUnavailable
from ...runtime.disk_space import full, is_full
from ...runtime.threads import in_thread
from ..s3.object_store import UNCHANGED, Object, ObjectStore, Stored
from ..sqlite.errors import translated
from ..sqlite.tables import ResourceTables
from .coalesced_checks import CoalescedChecks
from .copy_directory import CopyDirectory
from .creation import StoreCreation
from .fork import contradicts, txids_of
from .fork_detector import Comparison, ForkDetector
from .head import Head, LogRecord, Snapshot, decode_head, decode_segment
from .local_copy import (
    CopyBusy,
    HeadState,
    LocalCopy,
    current_path,
    make_current,
    new_path,
    remove_database,
    remove_leftovers,
)
from .race_check import race_conditional_writes

T = TypeVar("T")

log = logging.getLogger("crudstack.s3sqlite")

NO_HEAD = HeadState("", 0, 0, "")
MAX_ROUNDS = 100
MAX_CREATIONS = 5
MAX_RACED = 8
"""Endpoints that HEAD remembers as raced: one server may be reached by several names."""
SHORT_LOG = 256 * 1024
"""Bytes of records that an empty copy replays where others may look on; for more a new file is made, in a third of the time."""
DAMAGED_FILE = (apsw.CorruptError, apsw.NotADBError, apsw.CantOpenError, apsw.SQLError)
"""What SQLite says of a file that is damaged, or of which too much is gone."""


class _ObjectMissing(Exception):
    """An object that a HEAD refers to is not there: that HEAD is old, or the store is damaged."""


class Replica:
    """`prefix` ends with a slash. `directory`: where the copy lies, None for a temporary one of this process."""

    def __init__(self, objects: ObjectStore, key: str, tables: ResourceTables, directory: Path | None) -> None:
        self.objects, self.key, self.prefix, self.tables = objects, key, f"{key}/", tables
        self.head_key = f"{key}/HEAD"
        self._creation = StoreCreation(objects, key)
        self._place = CopyDirectory(directory)
        self._mutex = threading.Lock()
        self._copy: LocalCopy | None = None
        self._seen = NO_HEAD  # the newest HEAD that this process knew, should its copy be lost
        self._at: tuple[HeadState, Head | None] = (
            NO_HEAD,
            None,
        )  # a state of the copy with its HEAD, which need not be decoded again
        self._forks = ForkDetector(objects, key, directory)
        self.unapplied_version = 0  # the version of an own swap that the copy lacks: no read, of whatever consistency, before it has caught up
        self._opened = False
        self._openings: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, asyncio.Lock] = weakref.WeakKeyDictionary()
        self._checks: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, CoalescedChecks] = (
            weakref.WeakKeyDictionary()
        )

    # Opening

    async def open(self) -> None:
        """Open or make the copy, bring it up, and see that the storage honours conditions."""
        self._forks.refuse()
        if self._opened:
            return
        loop = asyncio.get_running_loop()
        async with self._openings.setdefault(loop, asyncio.Lock()):
            if self._opened:
                return
            await self._place.with_room(lambda: self._blocking(self._open_copy))
            if self._place.given is not None:
                await self._blocking(lambda: remove_leftovers(self.directory))
            await self.check()
            head = await self.head()
            await asyncio.gather(self._creation.probe(head.store), self._creation.refuse_old_writers(head))
            if self.objects.endpoint not in head.raced:
                await race_conditional_writes(self.objects, self.prefix)
                await self._record_race()
            self._opened = True

    async def close(self) -> None:
        self._opened = False
        copy, self._copy = self._copy, None
        if copy is not None:
            await self._blocking(copy.close)
        await self._blocking(self._place.remove_own)

    @property
    def copy(self) -> LocalCopy:
        self._forks.refuse()
        if self._copy is None:
            raise StoreUnavailable("the store is not open")
        return self._copy

    async def head(self) -> Head:
        """HEAD as the copy knows it."""
        _, head = await self.blocking(lambda copy: copy.state_and_head())
        return head

    @property
    def directory(self) -> Path:
        return self._place.made()

    def _open_copy(self) -> None:
        with self._mutex, self._place.errors():
            if self._copy is not None:
                return
            try:
                self._forks.refuse_recorded()
                path = current_path(self.directory)
                if path is not None:
                    try:
                        self._copy = LocalCopy(path, self.tables)
                        self._seen = _newer(self._seen, self._copy.state())
                    except apsw.Error as error:
                        if is_full(error, path.parent):
                            raise
                        log.warning("%s cannot be used and is made again: %s", path, error)
                    else:
                        return
                self._switch(self._empty_copy())
            except CopyBusy:
                self._use_private_copy()

    def _switch(self, copy: LocalCopy) -> None:
        """Use another file from now on. Whoever reads the old one may finish."""
        try:
            make_current(copy.path)
        except OSError:
            copy.close()
            copy.remove()
            raise
        old, self._copy = self._copy, copy
        if old is not None:
            old.remove()

    def _use_private_copy(self) -> None:
        """Leave the shared directory to whoever holds its lock."""
        log.warning("%s: the lock cannot be had; this process makes a copy of its own", self._place.given)
        self._copy = self._empty_copy(self._place.own())

    def _empty_copy(self, directory: Path | None = None) -> LocalCopy:
        path = new_path(directory or self.directory)
        try:
            return LocalCopy(path, self.tables)
        except BaseException:
            remove_database(path)
            raise

    def _replace(self, lost: LocalCopy) -> None:
        """Begin with an empty copy, unless somebody has already."""
        with self._mutex, self._place.errors():
            if self._copy is lost:
                try:
                    self._switch(self._empty_copy())
                except CopyBusy:
                    self._use_private_copy()

    # Running things on the copy

    async def _blocking(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(None, work)

    async def blocking(self, work: Callable[[LocalCopy], T]) -> T:
        """Run something on the copy in a thread; a copy that is torn, or whose lock cannot be had, is replaced."""
        return await self._place.with_room(lambda: self._on_copy(work, self._blocking))

    async def read(self, work: Callable[[apsw.Connection], T], *, quick: bool = False) -> T:
        """`quick` promises microseconds: then it runs here, if that is possible without waiting. A trip to a thread takes four times as long."""
        if quick:
            with contextlib.suppress(apsw.Error):  # a thread waits for it, or finds out
                return self.copy.read_without_waiting(work)
        return await self._place.with_room(lambda: self._on_copy(lambda copy: copy.read(work), in_thread))

    async def _on_copy(self, work: Callable[[LocalCopy], T], run: Callable[..., object]) -> T:
        for last in (False, False, True):
            copy = self.copy
            try:
                result: T = await run(lambda copy=copy: work(copy))  # type: ignore[misc]
                return result
            except CopyBusy:
                if last:
                    raise StoreUnavailable("the local copy is locked; nothing was changed") from None
                await self._blocking(lambda: self._mutexed(self._use_private_copy))
            except apsw.Error as error:
                if last or not isinstance(error, DAMAGED_FILE) or is_full(error, copy.path.parent):
                    raise translated(error, copy.path.parent) from error
                log.warning("%s is torn and is made again: %s", copy.path, error)
                await self._blocking(lambda copy=copy: self._replace(copy))  # type: ignore[misc]
            await self.check()
        raise AssertionError("unreachable")

    async def _state(self) -> HeadState:
        """Where the copy is; a torn one is replaced by an empty one, which is nowhere. One row, which no writer keeps a reader from: read
        here, for a trip to a thread costs ten times as much."""
        copy = self.copy
        try:
            return copy.state()
        except DAMAGED_FILE as error:
            log.warning("%s is torn and is made again: %s", copy.path, error)
            await self._blocking(lambda: self._replace(copy))
            return self.copy.state()

    def _mutexed(self, work: Callable[[], None]) -> None:
        with self._mutex, self._place.errors():
            work()

    # Checking

    async def check(self) -> None:
        """Make the copy as new as HEAD is at some moment after this call began."""
        creations = 0
        for _ in range(MAX_ROUNDS):
            state = await self._state()
            known = _newer(state, self._seen)  # what may be expected of an answer to what is asked now
            if state.etag:
                got = await self.objects.get_if_changed(self.head_key, state.etag)
            else:
                got = await self.objects.get(self.head_key)
            if got is UNCHANGED:
                if state.ver < known.ver:
                    raise self._put_back(state.ver, known.ver)
                if self.unapplied_version:
                    # Another process brought the copy there, perhaps on another history than that of our swap.
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
        """`check`, shared with others who wait for the same."""
        loop = asyncio.get_running_loop()
        checks = self._checks.get(loop)
        if checks is None:
            checks = self._checks.setdefault(loop, CoalescedChecks(self.check))
        await checks.next()

    async def advance_to(self, got: Object, known: HeadState = NO_HEAD, own: Sequence[LogRecord] = ()) -> bool:
        """`_advance_to`; if the disk is full, again with room that was made."""
        return await self._place.with_room(partial(self._advance_to, got, known, own))

    async def _advance_to(self, got: Object, known: HeadState, own: Sequence[LogRecord]) -> bool:
        """Bring the copy to a HEAD that was asked for when `known` was known. False: get HEAD again.

        `own`: the newest records up to this HEAD, if it is a swap of this process. They need not be read then, so that no failure of
        the storage keeps the copy from knowing what is acknowledged.
        """
        head = decode_head(got.body)
        compared = await self._compared(head)
        self._check_lineage(head, known)
        await self._creation.confirm(head)
        for again in range(MAX_ROUNDS):
            if again:
                compared = await self._compared(head)
            copy, state = compared.copy, compared.state
            if state.ver >= head.ver and state.store == head.store:
                if state.ver == head.ver and state.etag != got.etag:
                    await self._rename(copy, state, got.etag)
                self._forks.heads.add(head, instead=compared.known)
                self._note_applied(state.ver)
                return True
            try:
                # The newest known record too, if its id must be compared.
                start = state if compared.decided else state._replace(seq=max(state.seq - 1, 0))
                if own and own[0].seq == start.seq + 1:
                    records: list[LogRecord] | None = list(own)
                else:
                    records = await self._missing(head, start)
                if records is not None and not compared.decided and contradicts(compared.txids, txids_of(records)):
                    await self._forks.stop(head, compared)
                if records is None or (state.seq == 0 and sum(record.size for record in records) > SHORT_LOG):
                    await self._build(head, got, compared, snapshot=records is None)
                    continue
            except _ObjectMissing as gone:
                now = await self.objects.get(self.head_key)
                if now is not None and now.etag == got.etag:
                    raise StoreDamaged(f"{gone} is missing, although HEAD refers to it") from None
                return False
            if await self._advance(copy, state, records, head, got):
                self._forks.heads.add(head, records[-1] if records else None, instead=compared.known)
                self._note_applied(head.ver)
                reached = HeadState(head.store, head.seq, head.ver, got.etag)
                self._at, self._seen = (reached, head), _newer(self._seen, reached)
                return True
        raise StoreUnavailable("the local copy could not be brought up; try again")

    async def apply_own_swap(self, head: Head, records: Sequence[LogRecord], got: Object) -> None:
        """Bring the copy to a HEAD that a swap of this process stored, with these new records.

        It is remembered even if the copy cannot be brought up: what is read later must continue it.
        """
        self._forks.heads.add(head, records[-1] if records else None)
        self._seen = _newer(self._seen, HeadState(head.store, head.seq, head.ver, got.etag))
        await self.advance_to(got, own=records)

    async def _compared(self, head: Head) -> Comparison:
        """Compare a HEAD that was read with those that this process knows. Raises HistoryForked."""
        copy = self.copy
        try:
            state = copy.state()
            at, current = self._at
            if state != at:
                state, current = copy.state_and_optional_head()
        except (*DAMAGED_FILE, StoreDamaged) as error:
            log.warning("%s is torn and is made again: %s", copy.path, error)
            await self._blocking(lambda: self._replace(copy))
            copy = self.copy
            state, current = copy.state_and_optional_head()
        return await self._forks.compare(head, copy, state, current)

    async def _compare_copy(self) -> None:
        """Compare the HEAD of the copy with those that this process knows. Raises HistoryForked."""
        _, head = await self.blocking(lambda copy: copy.state_and_head())
        await self._compared(head)

    async def _rename(self, copy: LocalCopy, at: HeadState, etag: str) -> None:
        """Take another ETag of equal bytes. If that fails, the next check tries again."""
        try:
            await self._blocking(lambda: copy.update_etag(at, etag))
        except (CopyBusy, apsw.Error) as error:
            log.warning("%s: its ETag has changed, which the local copy could not note: %s", self.head_key, error)

    def _note_applied(self, version: int) -> None:
        """Note that the copy has reached a version."""
        if version >= self.unapplied_version:
            self.unapplied_version = 0

    async def _advance(self, copy: LocalCopy, at: HeadState, records: list[LogRecord], head: Head, got: Object) -> bool:
        try:
            return await self._blocking(lambda: copy.advance(at, records, head, got.etag, got.body))
        except CopyBusy:
            await self._blocking(lambda: self._mutexed(self._use_private_copy))
            return False
        except apsw.Error as error:
            if not isinstance(error, DAMAGED_FILE) or is_full(error, copy.path.parent):
                raise translated(error, copy.path.parent) from error
            log.warning("%s is torn and is made again: %s", copy.path, error)
            await self._blocking(lambda: self._replace(copy))
            return False

    def _check_lineage(self, head: Head, known: HeadState) -> None:
        if known.store and known.store != head.store:
            raise HeadLost(
                f"{self.head_key} is of another store than the local copy: somebody replaced it; if that was meant, remove the local copy"
            )
        if head.ver < known.ver or head.seq < known.seq:
            raise self._put_back(head.ver, known.ver)

    def _put_back(self, found: int, known: int) -> HeadLost:
        return HeadLost(
            f"{self.head_key} is at version {found}, and was at {known}: somebody put an old one back;"
            " if that was meant, remove the local copy"
        )

    async def _missing(self, head: Head, state: HeadState) -> list[LogRecord] | None:
        """The records between the copy and HEAD; None if a snapshot is needed, or is less to read."""
        first = head.tail[0].seq if head.tail else head.seq + 1
        if state.seq + 1 >= first:
            return list(head.tail)
        segments = [segment for segment in head.segs if segment.last > state.seq]
        snapshot_helps = head.snap is not None and head.snap.seq > state.seq
        if not segments or segments[0].first > state.seq + 1:
            if snapshot_helps:
                return None
            raise StoreDamaged(f"{self.head_key} lacks the records after {state.seq}")
        if head.snap is not None and snapshot_helps and sum(segment.size for segment in segments) > head.snap.size:
            return None
        got = await asyncio.gather(*(self.objects.get(segment.key) for segment in segments))
        records: list[LogRecord] = []
        for segment, one in zip(segments, got, strict=True):
            if one is None:
                raise _ObjectMissing(segment.key)
            records += decode_segment(one.body)
        return [*records, *head.tail]

    async def _build(self, head: Head, got: Object, compared: Comparison, *, snapshot: bool) -> None:
        """Make a new file, from the snapshot or from nothing, bring it up to HEAD, and use it from then on."""
        path, seq = new_path(self.directory), 0
        building: LocalCopy | None = None
        try:
            if snapshot:
                assert head.snap is not None
                seq = head.snap.seq
                await self._download(head.snap, path)
            records = await self._missing(head, HeadState(head.store, seq, 0, ""))
            assert records is not None, "nothing is missing between a snapshot and its HEAD"
            building = await self._blocking(lambda: LocalCopy(path, self.tables, building=True))
            await self._advance(building, building.state(), records, head, got)
            if not compared.decided:
                known, found = compared.txids, await self._blocking(building.txids)
                if contradicts(known, found):
                    await self._forks.stop(head, compared)
                if known and known.keys().isdisjoint(found):
                    log.warning("%s: so much was written that a fork could not be noticed", self.head_key)
            await self._blocking(building.finish_building)
            await self._blocking(lambda: self._use(building, compared.copy))
        except BaseException as error:
            if building is not None and self._copy is not building:
                building.close()
            remove_database(path)
            if isinstance(error, (apsw.Error, OSError)) and is_full(error, path.parent):
                raise full(error, path.parent, head.snap.size if snapshot and head.snap else 0) from error
            raise

    async def _download(self, snapshot: Snapshot, path: Path) -> None:
        if not await self.objects.download(snapshot.key, path):
            raise _ObjectMissing(snapshot.key)
        if await self._blocking(lambda: sha256_of(path)) != snapshot.sha256:
            raise StoreDamaged(f"{snapshot.key} is not what was uploaded")

    def _use(self, loaded: LocalCopy, old: LocalCopy) -> None:
        with self._mutex:
            if self._copy is old:
                self._switch(loaded)
            else:
                loaded.close()
                loaded.remove()

    async def export(self, key: str) -> None:
        """Write a compact copy to an object."""
        path = new_path(self.directory)
        try:
            await self.blocking(lambda copy: copy.copy_to(path))
            await self.objects.upload(key, path)
        finally:
            await self._blocking(lambda: path.unlink(missing_ok=True))

    # Races

    async def _record_race(self) -> None:
        """Note in HEAD that this endpoint passed the race, so that no later start of any instance pays for one.

        The outcome of the PUT does not matter: HEAD is read again until it names the endpoint. A PUT that lands late changes nothing else.
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


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
