"""The copy in this process's memory that searches read: the tables of every other store in SQLite, kept up with the log in Redis.

Invariants:

- R1 *A read sees what was acknowledged before it began.* First Redis is asked, in one round trip that begins after the read did, for the log
  after the copy's position. Nobody shares a question that was already under way; those who come meanwhile share the next one.
- R2 *What is in the copy is as it was at its position or later*: each document, index entry and record by itself. For whatever changed since is
  named in the log after the position, and set to what Redis has now. If a purge is named, all that the copy had of the resource goes first: what
  there is now was written after the last purge, so it is named too. So a copy may be built page by page while others write: it starts at the
  position from before the first page.
- R3 *A read sees one state*, that of the position. Answers are kept until one leaves nothing to come, and then applied in one step, never over a
  copy that is further already. Whatever changed again after an answer told it is told again by a later one.
- R4 *A position is a history.* It carries the txid of its last transaction. A store that was flushed, or a replica that had not yet received
  everything when it took over, does not know this txid at this number, and the copy is built anew. What was read when the store was further than
  the position is of the same history if that transaction is met on the way.
- R5 *Copies keep up.* Each answer may tell more than the one before, so one leaves nothing to come, however much is written. A copy that is being
  built follows after each page; so it loses the log only if more is written during one page than the log keeps.
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
from .script_arguments import decode_indexed, decode_record, digest
from .scripts import FOLLOW, PAGE

T = TypeVar("T")
Work = Callable[[apsw.Connection], T]

log = logging.getLogger("crudstack.redis")

PAGE_SIZE = 200
AT_ONCE = 500
"""So many changes and records the first answer tells, and so many more each of the next: some 5 ms of the server's time."""
SHORT = 16
"""So many resources are brought up at once where the copy is free; more of them in a thread."""
ATTEMPTS = 8


class Position(NamedTuple):
    """Where a copy is: the store's id, the number and the txid of the last transaction."""

    store: bytes
    seq: int
    head: bytes


EMPTY = Position(b"", 0, b"")


class RebuildNeeded(Exception):
    """The log does not lead on from where the copy is. `now`: where the store is."""

    def __init__(self, now: Position) -> None:
        super().__init__()
        self.now = now


class SearchReplica:
    def __init__(
        self,
        spec: ModelSpec,
        encoding: Encoding | None,
        run: Callable[..., Awaitable[Any]],
        specs: Callable[[], Awaitable[Sequence[bytes]]],
    ) -> None:
        """`run` runs a script with arguments; `specs` reads the hash of that name."""
        self._spec, self._encoding, self._run, self._read_specs = spec, encoding, run, specs
        self._state = threading.Lock()  # guards the two below
        self._copy = self._new(EMPTY)
        self._building: concurrent.futures.Future[None] | None = None
        self._builder: asyncio.Task[None] | None = None  # held, or it might be collected while it runs
        self._specs: dict[str, dict[str, str]] = {}  # never change, so they are read when an unknown one is met
        self._refreshes: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, _SharedRefresh] = (
            weakref.WeakKeyDictionary()
        )

    def _new(self, position: Position) -> ReplicaTables:
        return ReplicaTables(ResourceTables(self._spec, self._encoding, lazy=True), position)

    def drop(self) -> None:
        """Give back the memory; the next read builds a new copy."""
        self._copy = self._new(EMPTY)

    async def read(self, work: Work[T]) -> T:
        """Read what is in the store now."""
        copy = await self.current()
        return await copy.db.read(work)

    async def current(self) -> ReplicaTables:
        """The copy, with everything in it that was committed before this was called."""
        loop = asyncio.get_running_loop()
        refresh = self._refreshes.get(loop)
        if refresh is None:
            refresh = self._refreshes.setdefault(loop, _SharedRefresh(self._refreshed))
        return await refresh.next()

    async def _refreshed(self) -> ReplicaTables:
        """The copy, brought up."""
        for _ in range(ATTEMPTS):
            copy = self._copy
            try:
                await self._catch_up(copy)
                return copy
            except RebuildNeeded as needed:
                await self._rebuild(copy, needed.now)
        raise StoreUnavailable("so much is written that reads cannot keep up; try again")

    async def _catch_up(self, copy: ReplicaTables, seen: Position | None = None) -> None:
        """Apply what was written since. Apart. `seen`: where the store was when something was read that the copy has already."""
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
        """Replace the copy by one at the given position or later. Whoever comes meanwhile waits for the same, and then asks for itself."""
        with self._state:
            if self._copy is not old:
                return
            building, mine = self._building, self._building is None
            if building is None:
                building = self._building = concurrent.futures.Future()
        if mine:
            # A task of its own: whoever asked first may be cancelled, while others wait for the same.
            self._builder = asyncio.get_running_loop().create_task(self._build_and_tell(start, building))
        await shielded(asyncio.wrap_future(building))

    async def _build_and_tell(self, start: Position, building: concurrent.futures.Future[None]) -> None:
        copy: ReplicaTables | None = None
        failure: BaseException | None = None
        try:
            copy = await self._build(start)
        except RebuildNeeded:
            pass  # whoever waits asks again, and begins again from there
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
    """Questions of one event loop: one is under way, and those who come meanwhile share the next."""

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
            self._next = None  # from here on the question is being sent
            return await self._ask()


class RedisResource:
    """A resource as it stands in Redis, or as much of it as the log names: what is None is not there. `meta` None: there is no resource."""

    def __init__(self, flat: Sequence[Any], hash_: str = "", *, purged: bool = False) -> None:
        """`hash_`: of its id. `purged`: what was known of it is of an earlier life."""
        fields = dict(zip(flat[::2], flat[1::2], strict=True))
        document, index = fields.get(b"d"), fields.get(b"i")
        self.hash, self.purged = hash_, purged or document is None
        self.meta = None if document is None else meta_of(document)
        self.index = None if index is None else decode_indexed(index)
        records = {name: value for name, value in fields.items() if name.startswith(b"r")}
        self.records = [decode_record(value) for value in records.values() if value is not None]
        self.dropped = [int(name[1:]) for name, value in records.items() if value is None]


def _changed(told: Sequence[Any]) -> list[RedisResource]:
    """What FOLLOW told."""
    return [RedisResource(flat, hash_.decode(), purged=bool(purged)) for hash_, purged, *flat in told]


class ReplicaTables:
    """Tables in memory, and where in the history they are. They never go back."""

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
        """Apply what changed up to `position`, unless the copy is there already. `heads`: the txids of the transactions that led there. Apart, if
        the copy has gone on meanwhile, in another history."""

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
        def work(connection: apsw.Connection) -> None:
            for row in rows:
                if row.meta is None:
                    log.error("%s: a resource is gone from Redis, and nobody purged it", self.tables.spec.name)
                else:
                    self._put(connection, row, specs)

        self.db.run(work)

    def _put(self, connection: apsw.Connection, row: RedisResource, specs: dict[str, dict[str, str]]) -> None:
        if row.purged:
            # Made now, so that only those pay for it who purge.
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
        """Where the copy is; whether something is outdated; which of these fields resources share a value of; (name, id, value) for each value."""

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
    return StoreDamaged(
        "a part of the store is missing from Redis (did it evict keys? `maxmemory-policy` must be `noeviction`);"
        " restore it, or remove the rest"
    )
