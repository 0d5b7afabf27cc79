"""The SQLite file that reads are served from: a cache of what is in the bucket, at some HEAD.

Invariants:

- I4 *Replay is unconditional, deterministic and cannot fail*: it applies what was decided; unique values are a query of whoever
  decides, never an index of the tables.
- I5 *store, seq, ver and ETag commit with the rows.* So a 304 for the ETag that a connection reads is a promise about the rows that it
  reads then or later.
- A copy never goes back: what is older than its version changes nothing.

Several processes may share a file. Writing transactions, which are short and never wait for the network, take turns under a file lock; whoever
does not get it within two seconds raises `CopyBusy` and uses a copy of its own. A file is never replaced: a new one gets a new name, and
`current` is switched to it.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, cast
from uuid import uuid4

import apsw
from msgspec.structs import replace

from ....errors import CrudError, StoreUnavailable
from ...basic import Change, IdempotentCommit, Reindex, ResourceMeta
from ...contract.store_errors import not_indexed, not_kept, shared
from ...runtime.files import lock_within
from ..log_records import Op, Remembered, indexed, op_of
from ..sqlite.database import empty_log, keep_plans
from ..sqlite.replay import replay
from ..sqlite.tables import ResourceTables
from .head import Head, IndexSchema, LogRecord, decode_head, decode_ops, encode_ops

T = TypeVar("T")

log = logging.getLogger("crudstack.s3sqlite")

LOCK_TIMEOUT_S = 2.0
BUSY_MS = 2000
LEFTOVER_S = 24 * 3600.0
REMEMBERED_TXIDS = 8192
"""Records whose txids a copy remembers."""

TABLES = """
CREATE TABLE IF NOT EXISTS copy (
  one INTEGER PRIMARY KEY CHECK (one = 1), store TEXT, seq INTEGER, ver INTEGER, etag TEXT, head BLOB);
INSERT OR IGNORE INTO copy VALUES (1, '', 0, 0, '', x'');
CREATE TABLE IF NOT EXISTS recent (seq INTEGER PRIMARY KEY, txid BLOB NOT NULL);
CREATE INDEX IF NOT EXISTS recent_by_txid ON recent (txid);
CREATE TABLE IF NOT EXISTS purges (seq INTEGER PRIMARY KEY);
"""
"""`purges`: the transactions that purged something, as long as the log has those before them, which may tell of it."""


class CopyBusy(Exception):
    """Another process holds the file's lock, perhaps because it was stopped."""


class HeadState(NamedTuple):
    """Where a copy is. `etag` is empty before the first HEAD."""

    store: str
    seq: int
    ver: int
    etag: str


class Attempt(NamedTuple):
    """What became of a transaction when it was tried at the copy's state: `ops` and `metas`, or the `error` that it would be answered with."""

    ops: bytes
    metas: list[ResourceMeta]
    error: CrudError | None


class Trial(NamedTuple):
    """Transactions tried one after the other at one state. Nothing of it stays in the copy."""

    state: HeadState
    head: Head
    schema: IndexSchema
    attempts: list[Attempt]
    found: bool = False  # one of the doubtful is in the history already: then nothing was tried


class WriteRequest(NamedTuple):
    """What a transaction wants: changes, perhaps under a key, or index entries for states."""

    changes: Sequence[Change] = ()
    entries: Sequence[Reindex] = ()
    once: IdempotentCommit | None = None
    share: bool = False  # entries may share values of unique fields


class LocalCopy:
    """One file. Everything here blocks; it runs in threads.

    `building`: nobody else knows the file yet, so nothing is kept for a roll-back until `built` is called; a file that is not finished is
    thrown away.
    """

    def __init__(self, path: Path, tables: ResourceTables, *, building: bool = False) -> None:
        self.path, self.tables, self._building = path, tables, building
        self._mutex = threading.Lock()
        self._lock = os.open(path.parent / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        self._idle: list[apsw.Connection] = []
        try:
            with self._writing() as connection:
                connection.execute(TABLES)
                tables.create(connection)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        self._close_idle()
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    def finish_building(self) -> None:
        """The file is complete; from now on it may be shared."""
        self._close_idle()
        self._building = False

    def _close_idle(self) -> None:
        while self._idle:
            self._idle.pop().close()

    def remove(self) -> None:
        """Delete the file; connections that are still open go on reading it."""
        remove_database(self.path)

    # Reading

    def read(self, work: Callable[[apsw.Connection], T]) -> T:
        with self._connection() as connection:
            return work(connection)

    def read_without_waiting(self, work: Callable[[apsw.Connection], T]) -> T:
        """`read`, without waiting for anybody. apsw.BusyError: not now."""
        if not self._idle:
            raise apsw.BusyError
        with self._connection() as connection:
            connection.set_busy_timeout(0)
            try:
                return work(connection)
            finally:
                connection.set_busy_timeout(BUSY_MS)

    @contextlib.contextmanager
    def _connection(self) -> Iterator[apsw.Connection]:
        try:
            connection = self._idle.pop()
        except IndexError:
            connection = self._connect()
        try:
            yield connection
        except apsw.Error:
            connection.close()  # it may know less than the file
            raise
        else:
            self._idle.append(connection)

    def _connect(self) -> apsw.Connection:
        connection = apsw.Connection(str(self.path))
        keep_plans(connection)
        connection.set_busy_timeout(BUSY_MS)
        if self._building:
            connection.pragma("journal_mode", "off")
            connection.pragma("synchronous", "off")
        else:
            connection.pragma("journal_mode", "wal")
            connection.pragma("synchronous", "normal")  # a cache: what a crash takes is fetched again
        connection.pragma("secure_delete", "on")
        connection.pragma("cache_size", -64 * 1024)  # KiB; a long replay must not spill into the log
        return connection

    def state(self) -> HeadState:
        return self.read(_state)

    def state_and_head(self) -> tuple[HeadState, Head]:
        """Where the copy is, and the HEAD of that moment. StoreUnavailable before the first one."""
        state, head = self.state_and_optional_head()
        if head is None:
            raise StoreUnavailable("the local copy is new; try again")
        return state, head

    def state_and_optional_head(self) -> tuple[HeadState, Head | None]:
        """Return where the copy is, and the HEAD of that moment; None before the first one."""
        row: Any = self.read(lambda db: db.execute("SELECT store, seq, ver, etag, head FROM copy").get)
        return HeadState(*row[:4]), decode_head(row[4]) if row[4] else None

    def txids(self) -> dict[int, bytes]:
        """Return the transaction ids of the newest records, by number."""
        return self.read(lambda db: dict(db.execute("SELECT seq, txid FROM recent")))

    def find_transactions(self, txids: Sequence[bytes]) -> tuple[HeadState, dict[bytes, int]]:
        """Where the copy is, and those transactions that are in the history there, with their numbers: all of one moment."""

        def look(db: apsw.Connection) -> tuple[HeadState, dict[bytes, int]]:
            with _read_transaction(db):
                rows = [(txid, db.execute("SELECT seq FROM recent WHERE txid = ?", (txid,)).get) for txid in txids]
                return _state(db), {txid: seq for txid, seq in rows if seq is not None}

        return self.read(look)

    # Writing

    @contextlib.contextmanager
    def _writing(self, *, keep: bool = True) -> Iterator[apsw.Connection]:
        """A transaction under the file lock; rolled back if it fails, or if it is not to be kept."""
        with self._mutex, self._exclusive(), self._connection() as connection:
            connection.execute("BEGIN IMMEDIATE")
            try:
                yield connection
            except BaseException:
                _roll_back(connection)
                raise
            connection.execute("COMMIT" if keep else "ROLLBACK")

    @contextlib.contextmanager
    def _exclusive(self) -> Iterator[None]:
        if self._building:
            yield
            return
        try:
            lock_within(LOCK_TIMEOUT_S, self._lock, 0.001)
        except BlockingIOError:
            raise CopyBusy from None
        try:
            yield
        finally:
            fcntl.flock(self._lock, fcntl.LOCK_UN)

    def advance(self, at: HeadState, records: Sequence[LogRecord], head: Head, etag: str, body: bytes) -> bool:
        """Bring the copy from `at` to this HEAD, whose records above those of the copy are in `records`.

        Return False if nothing was changed: another process has advanced the copy, so HEAD must be compared with it again, or
        records are missing.
        """
        with self._writing() as connection:
            state = _state(connection)
            if state != at:
                return False
            new = [record for record in records if record.seq > state.seq]
            if (new[0].seq if new else head.seq + 1) != state.seq + 1:
                return False
            for record in new:
                self._replay(connection, head.schema, record)
            connection.execute("DELETE FROM recent WHERE seq <= ?", (head.seq - REMEMBERED_TXIDS,))
            connection.execute("DELETE FROM purges WHERE seq < ?", (head.first_logged,))
            self.tables.set_generation(connection, head.sweep)
            connection.execute(
                "UPDATE copy SET store = ?, seq = ?, ver = ?, etag = ?, head = ?",
                (head.store, head.seq, head.ver, etag, body),
            )
        return True

    def update_etag(self, at: HeadState, etag: str) -> None:
        """Note another ETag of the HEAD that the copy is at, unless the copy has moved. The bytes are equal, and so are the rows."""
        with self._writing() as connection:
            if _state(connection) == at:
                connection.execute("UPDATE copy SET etag = ?", (etag,))

    def _replay(self, connection: apsw.Connection, schema: IndexSchema, record: LogRecord) -> None:
        ops = decode_ops(record.ops)
        for op in ops:
            if op.kind == "once" and op.once is not None:
                once = IdempotentCommit(
                    key=op.resource_id, request=op.once.request, time=record.time, results=op.once.results
                )
                purged = {one.resource_id: at for at, one in enumerate(ops) if one.kind == "purge"}
                self.tables.remember(connection, once, [one.meta for one in ops], purged)
            else:
                replay(self.tables, connection, op, schema.specs)
                if op.kind == "purge":
                    connection.execute("INSERT OR IGNORE INTO purges VALUES (?)", (record.seq,))
        connection.execute("INSERT OR REPLACE INTO recent VALUES (?, ?)", (record.seq, record.txid))

    def attempt(self, works: Sequence[WriteRequest], doubtful: Sequence[bytes] = ()) -> Trial:
        """Try transactions at the state of the copy, each seeing those before it that succeeded. CrudErrors are their answers.

        `doubtful`: txids of those that may have happened. They are looked for in the same step, for the copy may have been brought up to
        them since somebody looked: what happened must not be tried again, and then be refused because of itself.
        """
        with self._writing(keep=False) as connection:
            state = _state(connection)
            for txid in doubtful:
                if connection.execute("SELECT 1 FROM recent WHERE txid = ?", (txid,)).get is not None:
                    return Trial(state, Head(store=state.store), IndexSchema(), [], found=True)
            body = connection.execute("SELECT head FROM copy").get
            if not body:
                raise StoreUnavailable("the local copy is new; try again")
            head = decode_head(body)
            adopts = not all(work.entries for work in works)
            if adopts and self._added(head.schema) and self.tables.outdated(connection, 1):
                raise not_kept()
            schema, spec = self._schema(connection, head.schema, adopts=adopts)
            attempts = []
            for work in works:
                connection.execute("SAVEPOINT attempt")
                try:
                    attempts.append(self._attempt(connection, work, spec, schema.unique))
                except CrudError as error:
                    connection.execute("ROLLBACK TO attempt")
                    attempts.append(Attempt(b"", [], error))
                connection.execute("RELEASE attempt")
        return Trial(state, head, schema, attempts)

    def _attempt(self, connection: apsw.Connection, work: WriteRequest, spec: str, unique: Sequence[str]) -> Attempt:
        if work.entries:
            done = set(self.tables.reindex(connection, work.entries, () if work.share else unique))
            ops = [
                Op("index", entry.resource_id, index=indexed(entry.entry, spec))
                for entry in work.entries
                if entry.resource_id in done
            ]
            return Attempt(encode_ops(ops) if ops else b"", [], None)
        metas = self.tables.commit(connection, work.changes, unique, work.once)
        ops = [op_of(change, meta, spec) for change, meta in zip(work.changes, metas, strict=True)]
        if work.once is not None:
            ops.append(Op("once", work.once.key, once=Remembered(work.once.request, work.once.results)))
        return Attempt(encode_ops(ops), metas, None)

    def schema_with_unique_fields(self, *, force: bool) -> tuple[HeadState, IndexSchema | None]:
        """Where the copy is, and the schema in which the unique fields of this program are kept unique; None if something is outdated, unless
        by `force`."""

        def look(db: apsw.Connection) -> tuple[HeadState, IndexSchema | None]:
            with _read_transaction(db):
                if not force and self.tables.outdated(db, 1):
                    return _state(db), None
                body: Any = db.execute("SELECT head FROM copy").get
                schema, _ = self._schema(db, decode_head(body).schema, adopts=True)
                return _state(db), schema

        return self.read(look)

    def schema_without_unique_field(self, name: str) -> tuple[HeadState, IndexSchema | None]:
        """Where the copy is, and the schema without a unique field that was forced, and never held; None if it was not."""

        def look(db: apsw.Connection) -> tuple[HeadState, IndexSchema | None]:
            with _read_transaction(db):
                body: Any = db.execute("SELECT head FROM copy").get
                schema = decode_head(body).schema
                if name not in schema.unique or not self.tables.lacks(db, name):
                    return _state(db), None
                return _state(db), replace(schema, unique=tuple(one for one in schema.unique if one != name))

        return self.read(look)

    def _schema(self, connection: apsw.Connection, schema: IndexSchema, *, adopts: bool) -> tuple[IndexSchema, str]:
        """The schema with the bound fields in it, and their number. `adopts`: and with the unique ones, for every writer keeps every unique
        field unique; ConfigError if it cannot."""
        kinds, specs = self.tables.kinds, dict(schema.specs)
        spec = next((number for number, fields in specs.items() if fields == kinds), None)
        if spec is None:
            spec = str(len(specs) + 1)
            specs[spec] = kinds
        added = self._added(schema) if adopts else []
        for name in added:
            if self.tables.duplicated(connection, name):
                raise shared(self.tables.spec.name, name)
        for name in schema.unique:
            if name not in kinds:
                raise not_indexed(self.tables.spec.name, name)
        return IndexSchema(specs, (*schema.unique, *added)), spec

    def _added(self, schema: IndexSchema) -> list[str]:
        return [name for name in self.tables.spec.unique if name not in schema.unique]

    def mark_up_to_date(self) -> None:
        """Note that no row is outdated, if so."""
        with self._writing() as connection:
            self.tables.settled(connection)

    def checkpoint(self) -> None:
        """Empty the write-ahead log, so that what was erased leaves no trace in it."""
        with self._mutex, self._exclusive(), self._connection() as connection:
            empty_log(connection)

    def copy_to(self, path: Path) -> int:
        """Write a compact copy of the file, and return its seq."""
        with contextlib.closing(self._connect()) as connection:
            try:
                connection.execute("VACUUM INTO ?", (str(path),))
            except apsw.Error:
                remove_database(path)  # it would not write to a file that is there
                raise
        with contextlib.closing(apsw.Connection(str(path))) as copied:
            seq = cast("int", copied.execute("SELECT seq FROM copy").get)
            # Where it was is no matter of whoever loads it: the HEAD that names it is. What HEAD held is overwritten.
            copied.pragma("secure_delete", "on")
            copied.execute("UPDATE copy SET ver = 0, etag = '', head = x''")
            check = copied.pragma("quick_check")
            if check != "ok":
                raise apsw.CorruptError(f"quick_check: {check}")
        return seq


def _state(connection: apsw.Connection) -> HeadState:
    row: Any = connection.execute("SELECT store, seq, ver, etag FROM copy").get
    return HeadState(*row)


@contextlib.contextmanager
def _read_transaction(connection: apsw.Connection) -> Iterator[None]:
    connection.execute("BEGIN")
    try:
        yield
    finally:
        connection.execute("COMMIT")


def _roll_back(connection: apsw.Connection) -> None:
    with contextlib.suppress(apsw.Error):  # some errors have rolled back already
        connection.execute("ROLLBACK")


# Files


def new_path(directory: Path) -> Path:
    return directory / f"copy-{uuid4().hex}.sqlite"


def current_path(directory: Path) -> Path | None:
    """The file that the processes of this directory use, if there is one."""
    try:
        path = directory / (directory / "current").read_text().strip()
    except (OSError, UnicodeDecodeError):
        return None
    return path if path.suffix == ".sqlite" and path.parent == directory and path.is_file() else None


def make_current(path: Path) -> None:
    temporary = path.parent / f"current-{uuid4().hex}"
    try:
        temporary.write_text(path.name)
        temporary.replace(path.parent / "current")
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def remove_database(path: Path) -> None:
    for suffix in ("", "-wal", "-shm", "-journal"):
        with contextlib.suppress(OSError):
            Path(f"{path}{suffix}").unlink()


def remove_leftovers(directory: Path, unused_s: float = LEFTOVER_S) -> None:
    """Remove files that processes left which were killed: those that nobody has written to for `unused_s`, and that are not the current one.

    A process that only reads such a file may finish. One that works on it longer than that finds it empty, and makes it again.
    """
    current = current_path(directory)
    for path in directory.glob("c*-*"):
        with contextlib.suppress(OSError):
            if not (current and path.name.startswith(current.name)) and path.stat().st_mtime < time.time() - unused_s:
                path.unlink()
