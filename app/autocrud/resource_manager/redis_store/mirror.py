"""The copy in this process's memory that searches read: the tables of every other store in SQLite, kept up with the log in Redis.

Invariants:

- R1 *A read sees what was acknowledged before it began.* First Redis is asked, in one round trip that begins after the read did, for the log
  after the copy's position. Nobody shares a question that was already under way; those who come meanwhile share the next one.
- R2 *Replay is unconditional and cannot fail*: it applies what was decided. Applying entries again over rows that are newer ends, at the last
  entry, in the same rows; so a copy may be built page by page while others write: it starts at the position from before the first page.
- R3 *A position is a history.* It carries the txid of its last transaction. A store that was flushed, or a replica that had not yet received
  everything when it took over, does not know this txid at this number, and the copy is built anew.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import logging
import threading
import weakref
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import Any, NamedTuple, TypeVar

import apsw
import msgspec

from ...errors import StoreDamaged, StoreUnavailable
from ..basic import Change, Encoding, ModelSpec
from ..documents import meta_of
from ..sqlite import sql
from ..sqlite.database import MemoryDatabase
from ..sqlite.replay import entry_of, replay
from ..sqlite.tables import ResourceTables
from ..threads import in_thread, outlived
from .scripts import FOLLOW, PAGE
from .transaction import Entry, decode_indexed, decode_record

T = TypeVar("T")
Work = Callable[[apsw.Connection], T]

log = logging.getLogger("crudstack.redis")

PAGE_SIZE = 200
SHORT = 16
"""So many entries are applied at once where the copy is free; more of them in a thread."""
ATTEMPTS = 8


class Position(NamedTuple):
    """Where a copy is: the store's id, the number and the txid of the last transaction."""

    store: bytes
    seq: int
    head: bytes


UNBORN = Position(b"", 0, b"")


class Apart(Exception):
    """The log does not lead on from where the copy is."""


class Mirror:
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
        self._copy = self._new(UNBORN)
        self._building: concurrent.futures.Future[None] | None = None
        self._builder: asyncio.Task[None] | None = None  # held, or it might be collected while it runs
        self._specs: dict[str, dict[str, str]] = {}  # never change, so they are read when an unknown one is met
        self._turns: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, _Turns] = weakref.WeakKeyDictionary()

    def _new(self, position: Position) -> Copy:
        return Copy(ResourceTables(self._spec, self._encoding, lazy=True), position)

    def drop(self) -> None:
        """Give back the memory; the next read builds a new copy."""
        self._copy = self._new(UNBORN)

    async def read(self, work: Work[T]) -> T:
        """Read what is in the store now."""
        copy = await self.current()
        return await copy.db.read(work)

    async def current(self) -> Copy:
        """The copy, with everything in it that was committed before this was called."""
        loop = asyncio.get_running_loop()
        turns = self._turns.get(loop)
        if turns is None:
            turns = self._turns.setdefault(loop, _Turns(self._follow))
        return await turns.next()

    async def _follow(self) -> Copy:
        """Bring the copy up."""
        for _ in range(ATTEMPTS):
            copy = self._copy
            asked = copy.position
            code, *answer = await self._run(FOLLOW, *asked)
            if code == b"damaged":
                raise damaged()
            if code == b"same":
                return copy
            store, seq, head = answer[:3]
            if code == b"after":
                first = seq - len(answer[3]) + 1
                entries = [Entry(number, entry) for number, entry in enumerate(answer[3], first)]
                await self._learn({op.index.spec for entry in entries for op in entry.ops if op.index is not None})
                try:
                    await copy.advance(entries, Position(store, seq, head), self._specs)
                    return copy
                except Apart:
                    pass
            await self._rebuild(copy, Position(store, seq, head))
        raise StoreUnavailable("so much is written that reads cannot keep up; try again")

    async def _learn(self, wanted: set[str]) -> None:
        if wanted - self._specs.keys():
            flat = await self._read_specs()
            fields = zip(flat[::2], flat[1::2], strict=True)
            self._specs |= {number.decode(): msgspec.json.decode(kinds) for number, kinds in fields}

    # Building

    async def _rebuild(self, old: Copy, start: Position) -> None:
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
        await outlived(asyncio.wrap_future(building))

    async def _build_and_tell(self, start: Position, building: concurrent.futures.Future[None]) -> None:
        copy: Copy | None = None
        failure: BaseException | None = None
        try:
            copy = await self._build(start)
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

    async def _build(self, start: Position) -> Copy:
        log.info("%s: a copy is built, from transaction %d on", self._spec.name, start.seq)
        copy, cursor = self._new(start), b"0"
        while True:
            cursor, rows = await self._run(PAGE, cursor, PAGE_SIZE)
            page = [Row(row) for row in rows]
            await self._learn({row.index.spec for row in page if row.index is not None})
            await in_thread(partial(copy.fill, page, self._specs))
            if cursor == b"0":
                return copy


class _Turns:
    """Questions of one event loop: one is under way, and those who come meanwhile share the next."""

    def __init__(self, ask: Callable[[], Awaitable[Copy]]) -> None:
        self._ask = ask
        self._one = asyncio.Lock()
        self._next: asyncio.Task[Copy] | None = None

    async def next(self) -> Copy:
        if self._next is None and not self._one.locked():
            async with self._one:
                return await self._ask()
        if self._next is None or self._next.done():  # done: cancelled before it began
            self._next = asyncio.create_task(self._run())
        return await outlived(self._next)

    async def _run(self) -> Copy:
        async with self._one:
            self._next = None  # from here on the question is being sent
            return await self._ask()


class Row:
    """A resource as it stands in Redis."""

    def __init__(self, flat: Sequence[bytes]) -> None:
        fields = dict(zip(flat[::2], flat[1::2], strict=True))
        document, index = fields.get(b"d"), fields.get(b"i")
        self.meta = None if document is None else meta_of(document)
        self.index = None if index is None else decode_indexed(index)
        self.records = [decode_record(value) for name, value in fields.items() if name.startswith(b"r")]


class Copy:
    """Tables in memory, and where in the history they are. They never go back."""

    def __init__(self, tables: ResourceTables, position: Position) -> None:
        self.tables, self.position = tables, position
        self.db = MemoryDatabase(self._create)

    def _create(self, connection: apsw.Connection) -> None:
        connection.pragma("secure_delete", "on")
        self.tables.create(connection)

    async def advance(self, entries: Sequence[Entry], position: Position, specs: dict[str, dict[str, str]]) -> None:
        """Apply those entries that are new, up to `position`. Apart, if the others are not of this copy's history."""

        def work(connection: apsw.Connection) -> None:
            here = self.position
            for entry in entries:
                if entry.seq == here.seq and entry.txid != here.head:
                    raise Apart
                if entry.seq > here.seq:
                    for op in entry.ops:
                        replay(self.tables, connection, op, specs)
            if position.seq > here.seq:
                self.position = position

        if len(entries) <= SHORT:
            await self.db.write(work)
        else:
            await in_thread(lambda: self.db.run(work))

    def fill(self, rows: Sequence[Row], specs: dict[str, dict[str, str]]) -> None:
        def work(connection: apsw.Connection) -> None:
            for row in rows:
                if row.meta is None:
                    log.error("%s: a resource is gone from Redis, and nobody purged it", self.tables.spec.name)
                    continue
                entry, complete = (None, True) if row.index is None else entry_of(self.tables, row.index, specs)
                self.tables.follow(connection, [Change(meta=row.meta, record=None, index=entry, expect="any")])
                rid: Any = connection.execute("SELECT rid FROM resources WHERE id = ?", (row.meta.resource_id,)).get
                for record in row.records:
                    self.tables.put_record(connection, rid, record)
                if not complete:
                    self.tables.mark_outdated(connection, row.meta.resource_id)

        self.db.run(work)

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
