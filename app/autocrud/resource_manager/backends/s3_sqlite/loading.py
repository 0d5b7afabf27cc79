"""Loading of a whole model: its database is uploaded as a snapshot, and one swap of HEAD publishes it.

1. The announcement of a snapshot in `pend` of HEAD protects the object while it is uploaded, as for any snapshot (I2).
2. The database is stamped as the one at record `seq + 1`, with the transaction id of the load among the ids that it
   remembers, and is uploaded.
3. A swap makes it the snapshot of HEAD, and drops the log. The swap is made only from a HEAD whose copy has no
   resources, rows of blobs and keys, that still has the record number `seq`, the pin and the announcement.

- A copy at record `seq` lacks record `seq + 1`, which no log has. So it is rebuilt from the snapshot.
- The snapshot keeps the ids of the records before it, so that writers find the transactions that they are in doubt
  about, and forks are noticed (I3, I8).
- If the outcome of the swap is not known, the history is searched for the transaction id, as for a commit. All attempts
  of one load name the same snapshot as long as HEAD has the same ETag, so at most one of them takes effect.
- The log before the load may hold purged data, so it is dropped with the swap, and its objects are deleted.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import apsw

from ....errors import ConfigError, CrudError, HistoryForked, OutcomeUnknown, StoreDamaged, StoreUnavailable
from ..sqlite.errors import translated
from ..sqlite.loading import StagedModel, check_empty, check_pin, check_unique
from ..sqlite.tables import ResourceTables
from .committer import COMMIT_TIMEOUT_S, FIRST_PAUSE_S, LONGEST_PAUSE_S, S3Committer
from .copy_files import sha256_of
from .current_copy import in_executor
from .formats import format_of
from .head import Head, IndexSchema, Snapshot, snapshot_key
from .housekeeping import Housekeeping
from .local_copy import REMEMBERED_TXIDS, TABLES, HeadState, LocalCopy
from .replica import Replica

T = TypeVar("T")

log = logging.getLogger("crudstack.s3sqlite")

MAX_UPLOADS = 5
"""How often the database is uploaded, if records are written meanwhile that leave the model empty."""


class _Moved(Exception):
    """HEAD has another record number than the snapshot was made for, or the announcement is gone."""


class _Seen(NamedTuple):
    """The state of a copy, as a load sees it.

    published  whether the load is in the history
    recent     the ids of the newest records, by number
    """

    state: HeadState
    head: Head
    schema: IndexSchema
    published: bool
    recent: Sequence[tuple[int, bytes]] = ()


class HeadLoad:
    """Publishes one staged model.

    staged        checked and closed
    tables        new tables of the model, which make all indexes
    pin           the pin that the load holds
    """

    def __init__(
        self,
        replica: Replica,
        committer: S3Committer,
        housekeeping: Housekeeping,
        staged: StagedModel,
        tables: ResourceTables,
        pin: str,
    ) -> None:
        self._replica, self._committer, self._housekeeping = replica, committer, housekeeping
        self._staged, self._tables, self._pin = staged, tables, pin
        self._txid = os.urandom(16)
        self._base_seq: int | None = None  # the number of the newest record before the first PUT that carried the load
        self._replaced: set[str] = set()

    async def publish(self) -> None:
        """Publish the model. See `Loader.publish`. The caller runs it to completion."""
        fmt = await self._locally(self._complete)
        for _ in range(MAX_UPLOADS):
            seen = await self._replica.blocking(self._look)
            key = await self._housekeeping.announce(
                lambda head: snapshot_key(self._replica.prefix, head.ver + 1, head.seq + 1)
            )
            try:
                snapshot = await self._upload(key, seen)
                await self._swap(snapshot, fmt)
            except _Moved:
                await self._withdraw(key)
                continue
            except OutcomeUnknown:
                raise  # the swap may need the object
            except BaseException:
                await self._withdraw(key)
                raise
            await self._withdraw(key)
            return
        raise StoreUnavailable("other programs wrote to the model again and again; nothing was loaded, try again")

    async def _upload(self, key: str, seen: _Seen) -> Snapshot:
        """Upload the database at the record after the state that was seen."""
        path = self._staged.path
        await self._locally(lambda connection: self._stamp(connection, seen))
        await self._replica.objects.upload(key, path)
        sha256 = await in_executor(lambda: sha256_of(path))
        return Snapshot(key, seen.state.seq + 1, path.stat().st_size, sha256)

    async def _withdraw(self, key: str) -> None:
        """Remove the announcement, and the objects that HEAD does not refer to. A later collection removes the rest."""
        with contextlib.suppress(CrudError):
            await self._housekeeping.finish(key, self._replaced)

    async def _locally(self, work: Callable[[apsw.Connection], T]) -> T:
        """Work on the staged file in a thread."""

        def run() -> T:
            try:
                with contextlib.closing(apsw.Connection(str(self._staged.path))) as connection:
                    connection.pragma("journal_mode", "off")
                    connection.pragma("synchronous", "off")
                    return work(connection)
            except apsw.Error as error:
                raise translated(error, self._staged.path.parent) from error

        return await in_executor(run)

    def _complete(self, connection: apsw.Connection) -> int:
        """Make the tables and indexes of a copy. Return the format that HEAD must have."""
        connection.execute("BEGIN")
        self._tables.create(connection)
        self._tables.clear_stale_if_indexed(connection)
        connection.execute(TABLES)
        connection.execute("COMMIT")
        return format_of(connection)

    def _stamp(self, connection: apsw.Connection, seen: _Seen) -> None:
        """Make the file the database at the record after the state that was seen."""
        seq = seen.state.seq + 1
        connection.execute("BEGIN")
        connection.execute("UPDATE copy SET store = ?, seq = ?", (seen.state.store, seq))
        connection.execute("DELETE FROM recent")
        connection.executemany("INSERT INTO recent VALUES (?, ?)", [*seen.recent, (seq, self._txid)])
        connection.execute("COMMIT")
        check = connection.pragma("quick_check")
        if check != "ok":
            raise apsw.CorruptError(f"quick_check: {check}")

    def _look(self, copy: LocalCopy) -> _Seen:
        """Read the state of a copy. Raises ModelNotEmpty and PinLost, unless the load is in the history."""
        with copy.read_transaction() as connection:
            state, head = copy.state_and_head_of(connection)
            if connection.execute("SELECT 1 FROM recent WHERE txid = ?", (self._txid,)).get is not None:
                return _Seen(state, head, head.schema, published=True)
            if self._base_seq is not None and state.seq - self._base_seq >= REMEMBERED_TXIDS:
                raise OutcomeUnknown(
                    "too much was written meanwhile to tell whether the model was loaded; look before you try again"
                )
            check_empty(connection)
            check_pin(self._pin in head.pins)
            schema = copy.schema_of_writes(connection, head.schema)
            recent: list[Any] = connection.execute("SELECT seq, txid FROM recent ORDER BY seq").fetchall()
        return _Seen(state, head, schema, published=False, recent=recent)

    def _next(self, copy: LocalCopy, snapshot: Snapshot, fmt: int) -> tuple[HeadState, Head | None]:
        """Return the state of a copy, and the HEAD that publishes the model there; None if it is published."""
        seen = self._look(copy)
        if seen.published:
            return seen.state, None
        if seen.state.seq != snapshot.seq - 1 or not any(one.key == snapshot.key for one in seen.head.pend):
            raise _Moved
        declared = set(self._tables.spec.unique)
        if others := [name for name in seen.schema.unique if name not in declared]:
            with contextlib.closing(apsw.Connection(str(self._staged.path))) as connection:
                for name in others:
                    check_unique(connection, name)
        head = seen.head.next(
            born=True,
            seq=snapshot.seq,
            snap=snapshot,
            segs=(),
            tail=(),
            pend=(),  # what others announced is older than this snapshot
            schema=seen.schema,
            fmt=max(seen.head.fmt, fmt),
        )
        self._base_seq = seen.state.seq if self._base_seq is None else self._base_seq
        self._replaced = seen.head.keys - head.keys
        return seen.state, head

    async def _swap(self, snapshot: Snapshot, fmt: int) -> None:
        """Swap in the snapshot, or find out that this happened.

        Raises OutcomeUnknown if a PUT that carried it may have taken effect, or may still do so. Any other error says
        that none did, and none will: it was decided at a HEAD that is not the one that such a PUT named.
        """
        loop = asyncio.get_running_loop()
        deadline, pause = loop.time() + COMMIT_TIMEOUT_S, FIRST_PAUSE_S
        while True:
            try:
                await self._committer.edit_copy(lambda copy: self._next(copy, snapshot, fmt))
                return
            except (ConfigError, StoreDamaged, HistoryForked):
                if self._base_seq is None:
                    raise
                failed = True
            except StoreUnavailable as error:  # S3 or the copy cannot be used now
                if self._base_seq is None:
                    raise
                log.info("%s: the outcome of a load is looked for: %s", self._replica.head_key, error)
                failed = loop.time() + pause > deadline
            if failed:
                raise OutcomeUnknown(
                    "the object storage did not say whether the model was loaded; look before you try again"
                )
            await asyncio.sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE_S)
            with contextlib.suppress(StoreUnavailable):
                await self._replica.check()
