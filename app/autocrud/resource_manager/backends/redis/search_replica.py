"""The replica in the memory of this process that searches read: SQLite tables that follow the log in Redis.

Invariants:

- R1 *A read sees each commit that was acknowledged before the read began.* The read first asks Redis for the log after
  the position of the replica, in one round trip. No read shares a request that was already sent. Reads that begin while
  a request is running share the next one.
- R2 *Each document, index entry and record is as it was at the position or later.* The log after the position names
  each later change, and the replica then stores what Redis has now. If the log names a purge, the replica first removes
  everything it has of the resource: the present data were written after the last purge, so the log names them too. So a
  replica can be built page by page while others write. It starts at the position from before the first page.
- R3 *A read sees one state*, that of the position. Replies are collected until one is the last, and then applied in one
  step, but never to a replica that is already newer. A change that happens after a reply is in a later reply.
- R4 *A position identifies a history.* It contains the txid of its last transaction. A store that was flushed does not
  have this txid at this number, and neither has a Redis replica that took over before it received everything. Then the
  replica is rebuilt. A page that was read when the store was newer than the position belongs to the same history if the
  log leads to that transaction.
- R5 *A replica catches up.* Each reply may contain more than the one before, so a last one comes however much is
  written. While a replica is built, it catches up after each page. So it falls out of the log only if more is written
  during one page than the log keeps.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import logging
import threading
import weakref
from collections.abc import Awaitable, Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple, TypeVar

import apsw
import msgspec

from ....errors import StoreDamaged, StoreUnavailable
from ...basic import Change, Encoding, ModelSpec
from ...contract.metadata_codec import meta_of
from ...runtime.threads import in_thread, shielded
from ..sqlite import sql
from ..sqlite.database import MemoryDatabase
from ..sqlite.replay import entry_of
from ..sqlite.tables import ResourceTables
from .read_scripts import FOLLOW, PAGE
from .script_arguments import decode_indexed, decode_record, digest

T = TypeVar("T")
Work = Callable[[apsw.Connection], T]

log = logging.getLogger("crudstack.redis")

PAGE_SIZE = 200
AT_ONCE = 500
"""Changes and records in the first reply, and how many more each later reply may have. They take 5 ms of the server."""
SHORT = 16
"""The largest number of resources that are updated in the event loop. More are updated in a thread."""
ATTEMPTS = 8


class Position(NamedTuple):
    """The position of a replica in a history: the id of the store, and number and txid of the last transaction."""

    store: bytes
    seq: int
    head: bytes


EMPTY = Position(b"", 0, b"")


class RebuildNeeded(Exception):
    """The log does not continue from the position of the replica. `now` is the position of the store."""

    def __init__(self, now: Position) -> None:
        super().__init__()
        self.now = now


class SearchReplica:
    """The tables that searches read, and the reads of the log that keep them current.

    run    runs a script with arguments
    specs  reads the hash `specs`, the sets of indexed fields
    """

    def __init__(
        self,
        spec: ModelSpec,
        encoding: Encoding | None,
        run: Callable[..., Awaitable[Any]],
        specs: Callable[[], Awaitable[Sequence[bytes]]],
    ) -> None:

        self._spec, self._encoding, self._run, self._read_specs = spec, encoding, run, specs
        self._state = threading.Lock()  # guards the two below
        self._copy = self._new(EMPTY)
        self._building: concurrent.futures.Future[None] | None = None
        self._builder: asyncio.Task[None] | None = None  # a reference, or it might be collected while it runs
        self._specs: dict[str, dict[str, str]] = {}  # they never change, so only an unknown one is read
        self._refreshes: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, _SharedRefresh] = (
            weakref.WeakKeyDictionary()
        )

    def _new(self, position: Position) -> ReplicaTables:
        return ReplicaTables(ResourceTables(self._spec, self._encoding, lazy=True), position)

    def drop(self) -> None:
        """Free the memory. The next read builds new tables."""
        self._copy = self._new(EMPTY)

    async def read(self, work: Work[T]) -> T:
        """Run `work` on the tables, with every commit that was acknowledged before this call, and return its result."""
        copy = await self.current()
        return await copy.db.read(work)

    async def current(self) -> ReplicaTables:
        """Return the tables, with every commit that was acknowledged before this call. Raises StoreUnavailable."""
        loop = asyncio.get_running_loop()
        refresh = self._refreshes.get(loop)
        if refresh is None:
            refresh = self._refreshes.setdefault(loop, _SharedRefresh(self._refreshed))
        return await refresh.next()

    async def _refreshed(self) -> ReplicaTables:
        """Return the tables after they caught up with the log."""
        for _ in range(ATTEMPTS):
            copy = self._copy
            try:
                await self._catch_up(copy)
                return copy
            except RebuildNeeded as needed:
                await self._rebuild(copy, needed.now)
        raise StoreUnavailable("so much is written that reads cannot keep up; try again")

    async def _catch_up(self, copy: ReplicaTables, seen: Position | None = None) -> None:
        """Apply all later transactions.

        seen  the position of the store when a page was read that the tables already contain

        Raises RebuildNeeded if the log does not continue from the position.
        """
        asked = position = copy.position
        heads, rows, limit = {position.seq: position.head}, list[RedisResource](), AT_ONCE
        met = [] if seen is None else [seen]
        while True:
            code, *told = await self._run(FOLLOW, *position, limit)
            if code == b"damaged":
                raise damaged()
            now = Position(*told[:3])
            if code == b"apart":
                raise RebuildNeeded(now)
            if code == b"after":
                txids, changed = told[3:]
                heads |= enumerate(txids, position.seq + 1)
                rows += _changed(changed) if len(changed) <= SHORT else await in_thread(partial(_changed, changed))
                position, limit = now._replace(seq=position.seq + len(txids), head=txids[-1]), limit + AT_ONCE
                met.append(now)
            if position == now:
                break
        if any(heads.get(one.seq) != one.head for one in met):
            raise RebuildNeeded(now)
        if position != asked:
            await self._learn({row.index.spec for row in rows if row.index is not None})
            await copy.advance(rows, position, heads, self._specs)

    async def _learn(self, wanted: set[str]) -> None:
        if wanted - self._specs.keys():
            flat = await self._read_specs()
            fields = zip(flat[::2], flat[1::2], strict=True)
            self._specs |= {number.decode(): msgspec.json.decode(kinds) for number, kinds in fields}

    # Building

    async def _rebuild(self, old: ReplicaTables, start: Position) -> None:
        """Replace the tables by new ones at the given position or later. Concurrent callers share the result."""
        with self._state:
            if self._copy is not old:
                return
            building, mine = self._building, self._building is None
            if building is None:
                building = self._building = concurrent.futures.Future()
        if mine:
            # A task of its own, because the first caller may be cancelled while others wait for the result.
            self._builder = asyncio.get_running_loop().create_task(self._build_and_tell(start, building))
        await shielded(asyncio.wrap_future(building))

    async def _build_and_tell(self, start: Position, building: concurrent.futures.Future[None]) -> None:
        copy: ReplicaTables | None = None
        failure: BaseException | None = None
        try:
            copy = await self._build(start)
        except RebuildNeeded:
            pass  # the callers check again, and start another build from the new position
        except asyncio.CancelledError:
            failure = StoreUnavailable("the copy was being built when its event loop ended; try again")
            raise
        except BaseException as error:
            failure = error
        finally:
            with self._state:
                self._building = None
                if copy is not None:
                    self._copy = copy
            if failure is None:
                building.set_result(None)
            else:
                building.set_exception(failure)

    async def _build(self, start: Position) -> ReplicaTables:
        log.info("%s: a copy is built, from transaction %d on", self._spec.name, start.seq)
        copy, cursor = self._new(start), b"0"
        while True:
            cursor, seq, head, rows = await self._run(PAGE, cursor, PAGE_SIZE)
            page: list[RedisResource] = await in_thread(partial(list, map(RedisResource, rows)))
            await self._learn({row.index.spec for row in page if row.index is not None})
            await in_thread(partial(copy.fill, page, self._specs))
            await self._catch_up(copy, start._replace(seq=seq, head=head))
            if cursor == b"0":
                return copy


class _SharedRefresh:
    """The requests of one event loop: one runs, and callers that come meanwhile share the next."""

    def __init__(self, ask: Callable[[], Awaitable[ReplicaTables]]) -> None:
        self._ask = ask
        self._one = asyncio.Lock()
        self._next: asyncio.Task[ReplicaTables] | None = None

    async def next(self) -> ReplicaTables:
        if self._next is None and not self._one.locked():
            async with self._one:
                return await self._ask()
        if self._next is None or self._next.done():  # done: cancelled before it began
            self._next = asyncio.create_task(self._run())
        return await shielded(self._next)

    async def _run(self) -> ReplicaTables:
        async with self._one:
            self._next = None  # from here on the request is being sent, so later callers need another one
            return await self._ask()


class RedisResource:
    """A resource in Redis, or the parts of it that the log names.

    flat    names and values of the parts, in turn. A value is None if the part does not exist
    hash_   the hash of the resource's id
    purged  whether a purge removed the earlier parts

    `meta` is None if the resource does not exist.
    """

    def __init__(self, flat: Sequence[Any], hash_: str = "", *, purged: bool = False) -> None:

        fields = dict(zip(flat[::2], flat[1::2], strict=True))
        document, index = fields.get(b"d"), fields.get(b"i")
        self.hash, self.purged = hash_, purged or document is None
        self.meta = None if document is None else meta_of(document)
        self.index = None if index is None else decode_indexed(index)
        records = {name: value for name, value in fields.items() if name.startswith(b"r")}
        self.records = [decode_record(value) for value in records.values() if value is not None]
        self.dropped = [int(name[1:]) for name, value in records.items() if value is None]


def _changed(told: Sequence[Any]) -> list[RedisResource]:
    """Return the resources in a reply of FOLLOW."""
    return [RedisResource(flat, hash_.decode(), purged=bool(purged)) for hash_, purged, *flat in told]


class ReplicaTables:
    """Tables in memory, and their position in the history. They never go back to an earlier position."""

    def __init__(self, tables: ResourceTables, position: Position) -> None:
        self.tables, self.position = tables, position
        self.db = MemoryDatabase(self._create)

    def _create(self, connection: apsw.Connection) -> None:
        connection.pragma("secure_delete", "on")
        function: Any = digest
        connection.create_scalar_function("digest", function, 1, deterministic=True)
        self.tables.create(connection)

    async def advance(
        self,
        rows: Sequence[RedisResource],
        position: Position,
        heads: Mapping[int, bytes],
        specs: dict[str, dict[str, str]],
    ) -> None:
        """Apply the changes up to `position`, unless the tables are already there.

        heads  the txids of the transactions up to `position`, by number

        Raises RebuildNeeded if another call has advanced the tables in another history.
        """

        def work(connection: apsw.Connection) -> None:
            here = self.position
            if heads.get(here.seq, here.head) != here.head:
                raise RebuildNeeded(position)
            if position.seq > here.seq:
                for row in rows:
                    self._put(connection, row, specs)
                self.position = position

        if len(rows) <= SHORT:
            await self.db.write(work)
        else:
            await in_thread(lambda: self.db.run(work))

    def fill(self, rows: Sequence[RedisResource], specs: dict[str, dict[str, str]]) -> None:
        """Store a page of resources while the tables are built. Blocks."""

        def work(connection: apsw.Connection) -> None:
            for row in rows:
                if row.meta is None:
                    log.error("%s: a resource is gone from Redis without a purge", self.tables.spec.name)
                else:
                    self._put(connection, row, specs)

        self.db.run(work)

    def _put(self, connection: apsw.Connection, row: RedisResource, specs: dict[str, dict[str, str]]) -> None:
        if row.purged:
            # Made only now, so that stores without purges do not pay for it.
            connection.execute("CREATE INDEX IF NOT EXISTS by_digest ON resources (digest(id))")
            known: Any = connection.execute("SELECT id FROM resources WHERE digest(id) = ?", (row.hash,)).get
            if known is not None:
                self.tables.purge(connection, known)
        if row.meta is None:
            return
        entry, complete = (None, True) if row.index is None else entry_of(self.tables, row.index, specs)
        self.tables.apply_committed(connection, [Change(meta=row.meta, record=None, index=entry, expect="any")])
        rid: Any = connection.execute("SELECT rid FROM resources WHERE id = ?", (row.meta.resource_id,)).get
        for record in row.records:
            self.tables.put_record(connection, rid, record)
        for number in row.dropped:
            connection.execute("DELETE FROM revisions WHERE rid = ? AND revision = ?", (rid, number))
        if not complete:
            self.tables.mark_outdated(connection, row.meta.resource_id)

    def values(self, names: Sequence[str]) -> tuple[Position, bool, list[str], list[tuple[str, str, Any]]]:
        """Return the values of these fields, for their activation as unique fields. Blocks.

        Returns the position; whether a row is outdated; those fields of which two resources share a value; and
        (name, id, value) for each value.
        """

        def work(connection: apsw.Connection) -> tuple[Position, bool, list[str], list[tuple[str, str, Any]]]:
            found: list[tuple[str, str, Any]] = []
            for name in names:
                column = sql.column(name)
                rows: list[Any] = connection.execute(
                    f"SELECT id, {column} FROM resources WHERE {column} IS NOT NULL"
                ).fetchall()
                found += [(name, resource_id, value) for resource_id, value in rows]
            outdated = bool(self.tables.outdated(connection, 1))
            return self.position, outdated, [name for name in names if self.tables.duplicated(connection, name)], found

        return self.db.run(work)


def damaged() -> StoreDamaged:
    """Return the error for a store of which Redis lost a part."""
    return StoreDamaged(
        "a part of the store is missing from Redis (did it evict keys? `maxmemory-policy` must be `noeviction`);"
        " restore it, or remove the rest"
    )
