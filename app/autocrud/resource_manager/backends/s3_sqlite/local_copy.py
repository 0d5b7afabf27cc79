"""The SQLite file that reads use: a cache of what is in the bucket, at the state of some HEAD.

Invariants:

- I4 *Replay is unconditional, deterministic and cannot fail.* It applies what was decided. The committer enforces
  unique fields by queries; no table has a unique index for them.
- I5 *store, seq, ver and ETag are committed in one transaction with the rows.* So if S3 answers 304 for the ETag that a
  connection read, the rows that this connection reads then or later are at least as new as that answer.
- A copy never goes back. A HEAD with a version below that of the copy changes nothing.

Several processes may share a file. Their writing transactions are short, never wait for the network, and take turns
under a file lock. If a process does not get the lock within LOCK_TIMEOUT_S, `CopyBusy` is raised and the process uses a
private copy. A file is never replaced: a new one gets a new name, and the file `current` is changed to name it.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, cast

import apsw
from msgspec.structs import replace

from ....errors import CrudError, StoreUnavailable
from ...basic import IdempotentCommit
from ...contract.store_errors import not_indexed, not_kept, shared
from ...runtime.files import lock_within
from ..sqlite import blob_tables
from ..sqlite.database import empty_log, keep_plans
from ..sqlite.errors import translated
from ..sqlite.replay import replay
from ..sqlite.snapshot import SqliteSnapshot, begin_reading
from ..sqlite.tables import ResourceTables
from .copy_files import remove_database
from .formats import format_without_packs, rename_copy_table
from .head import Head, IndexSchema, LogRecord, decode_head, decode_ops
from .write_requests import Attempt, WriteRequest, attempt

T = TypeVar("T")

log = logging.getLogger("crudstack.s3sqlite")

LOCK_TIMEOUT_S = 2.0
"""How long a writing transaction waits for the lock of the file."""
BUSY_MS = 2000
"""How long SQLite waits for a lock of its own."""
REMEMBERED_TXIDS = 8192
"""A copy remembers the transaction ids of so many newest records."""

TABLES = """
CREATE TABLE IF NOT EXISTS copy (
  one INTEGER PRIMARY KEY CHECK (one = 1), store TEXT, seq INTEGER, ver INTEGER, etag TEXT, head BLOB);
INSERT OR IGNORE INTO copy VALUES (1, '', 0, 0, '', x'');
CREATE TABLE IF NOT EXISTS recent (seq INTEGER PRIMARY KEY, txid BLOB NOT NULL);
CREATE INDEX IF NOT EXISTS recent_by_txid ON recent (txid);
CREATE TABLE IF NOT EXISTS purges (seq INTEGER PRIMARY KEY);
"""
"""`purges` holds the numbers of transactions that purged a resource, as long as the log holds earlier records, which
may contain the purged data."""


class CopyBusy(Exception):
    """Another process holds the lock of the file, perhaps because that process was stopped."""


class HeadState(NamedTuple):
    """Names the HEAD that a copy is at: store id, number of the newest record, version and ETag."""

    store: str
    seq: int
    ver: int
    etag: str


NO_HEAD = HeadState("", 0, 0, "")
"""The state of a copy that has read no HEAD yet."""


class Trial(NamedTuple):
    """Transactions that were tried one after the other at one state, and then rolled back.

    state     the state at which they were tried
    head      its HEAD
    changes   the fields of HEAD that the next one changes, apart from those of the log
    attempts  the result of each transaction
    """

    state: HeadState
    head: Head
    changes: dict[str, Any]
    attempts: list[Attempt]
    found: bool = False
    """Whether a transaction in doubt is in the history. If so, nothing was tried."""


class LocalCopy:
    """One SQLite file. All methods block, so callers run them in threads.

    With `building`, no other process knows the file yet. It then has no journal until `finish_building` is called,
    because an unfinished file is removed and not rolled back.
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
        """Close the idle connections and the lock file."""
        self._close_idle()
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    def finish_building(self) -> None:
        """Say that the file is complete. From now on processes may share it."""
        self._close_idle()
        self._building = False

    def _close_idle(self) -> None:
        while self._idle:
            self._idle.pop().close()

    def remove(self) -> None:
        """Delete the file. Connections that are still open can read it."""
        remove_database(self.path)

    # Reading

    def read(self, work: Callable[[apsw.Connection], T]) -> T:
        """Run work on a connection. Raises the errors of SQLite."""
        with self._connection() as connection:
            return work(connection)

    def read_without_waiting(self, work: Callable[[apsw.Connection], T]) -> T:
        """Run work on an idle connection. Raises apsw.BusyError if there is none, or if the work waits for a lock."""
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
            connection.close()  # its caches may be older than the file
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
            connection.pragma("synchronous", "normal")  # a cache: rows that a crash loses are fetched again
        connection.pragma("secure_delete", "on")
        connection.pragma("cache_size", -64 * 1024)  # KiB; a long replay must not spill into the log
        return connection

    def state(self) -> HeadState:
        """Return the HEAD that the copy is at."""
        return self.read(_state)

    def state_and_head(self) -> tuple[HeadState, Head]:
        """Return the state and its HEAD. Raises StoreUnavailable if the copy has read no HEAD yet."""
        state, head = self.state_and_optional_head()
        if head is None:
            raise _no_head()
        return state, head

    def state_and_optional_head(self) -> tuple[HeadState, Head | None]:
        """Return the state and its HEAD; None if the copy has read no HEAD yet."""
        row: Any = self.read(lambda db: db.execute("SELECT store, seq, ver, etag, head FROM copy").get)
        return HeadState(*row[:4]), decode_head(row[4]) if row[4] else None

    @contextlib.contextmanager
    def read_transaction(self) -> Iterator[apsw.Connection]:
        """Read one state of the copy."""
        with self._connection() as connection, _read_transaction(connection):
            yield connection

    @staticmethod
    def state_and_head_of(connection: apsw.Connection) -> tuple[HeadState, Head]:
        """Return what `state_and_head` does, in a read transaction."""
        body: Any = connection.execute("SELECT head FROM copy").get
        if not body:
            raise _no_head()
        return _state(connection), decode_head(body)

    def txids(self) -> dict[int, bytes]:
        """Return the transaction ids of the newest REMEMBERED_TXIDS records, by number."""
        return self.read(lambda db: dict(db.execute("SELECT seq, txid FROM recent")))

    def find_transactions(self, txids: Sequence[bytes]) -> tuple[HeadState, dict[bytes, int]]:
        """Return the state, and the numbers of the transactions that are in its history. Reads all at once."""

        def look(db: apsw.Connection) -> tuple[HeadState, dict[bytes, int]]:
            with _read_transaction(db):
                rows = [(txid, db.execute("SELECT seq FROM recent WHERE txid = ?", (txid,)).get) for txid in txids]
                return _state(db), {txid: seq for txid, seq in rows if seq is not None}

        return self.read(look)

    def snapshot(self) -> SqliteSnapshot:
        """Begin to read the present state of the copy. Raises StoreUnavailable if the copy has read no HEAD yet."""
        connection = self._connect()
        try:
            begin_reading(connection)
            if not _state(connection).store:
                raise _no_head()
        except BaseException:
            connection.close()
            raise
        return SqliteSnapshot(connection, partial(translated, directory=self.path.parent))

    # Writing

    @contextlib.contextmanager
    def _writing(self, *, keep: bool = True) -> Iterator[apsw.Connection]:
        """Run a transaction under the file lock. It is rolled back if it fails, or without `keep`."""
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

    def advance(self, base: HeadState, records: Sequence[LogRecord], head: Head, etag: str, body: bytes) -> bool:
        """Bring the copy from the state `base` to this HEAD, by replaying the records that the copy lacks.

        Return False if nothing was changed. Then another process has advanced the copy, so HEAD must be compared with
        it again, or `records` does not begin early enough.

        Args:
            base: The state that HEAD was compared with.
            records: Records up to this HEAD. Those that the copy has are skipped.
            head: The HEAD to advance to.
            etag: The ETag of HEAD.
            body: The bytes of HEAD.
        """
        with self._writing() as connection:
            state = _state(connection)
            if state != base:
                return False
            new = [record for record in records if record.seq > state.seq]
            if (new[0].seq if new else head.seq + 1) != state.seq + 1:
                return False
            for record in new:
                self._replay(connection, head.schema, record)
            connection.execute("DELETE FROM recent WHERE seq <= ?", (head.seq - REMEMBERED_TXIDS,))
            connection.execute("DELETE FROM purges WHERE seq < ?", (head.first_logged,))
            self.tables.set_generation(connection, head.sweep)
            if head.blob_epoch:
                blob_tables.set_epoch(connection, head.blob_epoch)
            connection.execute(
                "UPDATE copy SET store = ?, seq = ?, ver = ?, etag = ?, head = ?",
                (head.store, head.seq, head.ver, etag, body),
            )
        return True

    def update_etag(self, base: HeadState, etag: str) -> None:
        """Store another ETag of the HEAD `base`, which has equal bytes. Does nothing if the copy has advanced."""
        with self._writing() as connection:
            if _state(connection) == base:
                connection.execute("UPDATE copy SET etag = ?", (etag,))

    def _replay(self, connection: apsw.Connection, schema: IndexSchema, record: LogRecord) -> None:
        ops = decode_ops(record.ops)
        for op in ops:
            if op.kind == "once" and op.once is not None:
                once = IdempotentCommit(
                    key=op.resource_id, request=op.once.request, time=record.time, results=op.once.results
                )
                changed = [(one.resource_id, one.kind == "purge") for one in ops]
                self.tables.results.keep(connection, once, [one.meta for one in ops], changed)
            else:
                replay(self.tables, connection, op, schema.specs)
                if op.kind == "purge":
                    connection.execute("INSERT OR IGNORE INTO purges VALUES (?)", (record.seq,))
        connection.execute("INSERT OR REPLACE INTO recent VALUES (?, ?)", (record.seq, record.txid))

    def attempt(self, requests: Sequence[WriteRequest], in_doubt: Sequence[bytes] = ()) -> Trial:
        """Try transactions at the state of the copy, one after the other, and roll them all back.

        Each transaction sees the earlier ones that succeeded. A CrudError becomes the answer to its transaction.

        Args:
            requests: The transactions.
            in_doubt: The ids of transactions that may be committed already. If one of them is in the history, nothing
                is tried: a transaction that was committed must not be tried again, because it would conflict with
                itself. Both happen in one step, because another process may advance the copy at any moment.

        Raises ConfigError if the unique fields of this program cannot be enforced, and StoreUnavailable.
        """
        with self._writing(keep=False) as connection:
            state = _state(connection)
            for txid in in_doubt:
                if connection.execute("SELECT 1 FROM recent WHERE txid = ?", (txid,)).get is not None:
                    return Trial(state, Head(store=state.store), {}, [], found=True)
            body = connection.execute("SELECT head FROM copy").get
            if not body:
                raise _no_head()
            head = decode_head(body)
            with_unique = any(request.writes_resources for request in requests)
            if with_unique and self._added(head.schema) and self.tables.outdated(connection, 1):
                raise not_kept()
            schema, spec = self._schema(connection, head.schema, with_unique=with_unique)
            attempts = []
            for request in requests:
                connection.execute("SAVEPOINT attempt")
                try:
                    attempts.append(attempt(self.tables, connection, request, spec, schema.unique))
                except CrudError as error:
                    connection.execute("ROLLBACK TO attempt")
                    attempts.append(Attempt(b"", [], error))
                connection.execute("RELEASE attempt")
            changes: dict[str, Any] = {"schema": schema}
            if any(request.blobs is not None for request in requests):
                changes["blob_epoch"] = blob_tables.epoch(connection)
                changes["fmt"] = max(head.fmt, format_without_packs(connection))
        return Trial(state, head, changes, attempts)

    def schema_with_unique_fields(self, *, force: bool) -> tuple[HeadState, IndexSchema | None]:
        """Return the state, and the schema of HEAD with the unique fields of this program added.

        The schema is None if an index entry is outdated, unless `force` is given. Raises ConfigError if two resources
        share a value of such a field.
        """

        def look(db: apsw.Connection) -> tuple[HeadState, IndexSchema | None]:
            with _read_transaction(db):
                if not force and self.tables.outdated(db, 1):
                    return _state(db), None
                body: Any = db.execute("SELECT head FROM copy").get
                schema, _ = self._schema(db, decode_head(body).schema, with_unique=True)
                return _state(db), schema

        return self.read(look)

    def schema_without_unique_field(self, name: str) -> tuple[HeadState, IndexSchema | None]:
        """Return the state, and the schema of HEAD without a unique field.

        The schema is None if the field is not unique, or if every resource is indexed by it: then no two resources
        share a value, and the field stays unique.
        """

        def look(db: apsw.Connection) -> tuple[HeadState, IndexSchema | None]:
            with _read_transaction(db):
                body: Any = db.execute("SELECT head FROM copy").get
                schema = decode_head(body).schema
                if name not in schema.unique or not self.tables.lacks_field(db, name):
                    return _state(db), None
                return _state(db), replace(schema, unique=tuple(one for one in schema.unique if one != name))

        return self.read(look)

    def _schema(
        self, connection: apsw.Connection, schema: IndexSchema, *, with_unique: bool
    ) -> tuple[IndexSchema, str]:
        """Return the schema with the indexed fields of this program, and the number of their set.

        With `with_unique`, its unique fields are added too. Every writer enforces every unique field of the schema.
        Raises ConfigError if this program cannot.
        """
        kinds, specs = self.tables.kinds, dict(schema.specs)
        spec = next((number for number, fields in specs.items() if fields == kinds), None)
        if spec is None:
            spec = str(len(specs) + 1)
            specs[spec] = kinds
        added = self._added(schema) if with_unique else []
        for name in added:
            if self.tables.duplicated(connection, name):
                raise shared(self.tables.spec.name, name)
        for name in schema.unique:
            if name not in kinds:
                raise not_indexed(self.tables.spec.name, name)
        return IndexSchema(specs, (*schema.unique, *added)), spec

    def schema_of_writes(self, connection: apsw.Connection, schema: IndexSchema) -> IndexSchema:
        """Return the schema with the fields of this program, as a commit to this state changes it."""
        return self._schema(connection, schema, with_unique=True)[0]

    def _added(self, schema: IndexSchema) -> list[str]:
        return [name for name in self.tables.spec.unique if name not in schema.unique]

    def mark_up_to_date(self) -> None:
        """Note that all index entries are up to date, if they are."""
        with self._writing() as connection:
            self.tables.clear_stale_if_indexed(connection)

    def checkpoint(self) -> bool:
        """Empty the write-ahead log, so that no trace of purged data stays in it. Return False if a snapshot reads it.

        A later call empties it then.
        """
        with self._mutex, self._exclusive(), self._connection() as connection:
            return empty_log(connection, BUSY_MS)

    def copy_to(self, path: Path) -> int:
        """Write a compact copy of the database to a new file, and return the number of its newest record.

        Raises the errors of SQLite, among them apsw.CorruptError if the new file fails SQLite's quick_check.
        """
        with contextlib.closing(self._connect()) as connection:
            try:
                connection.execute("VACUUM INTO ?", (str(path),))
            except apsw.Error:
                remove_database(path)  # VACUUM INTO refuses a file that exists
                raise
        with contextlib.closing(apsw.Connection(str(path))) as copied:
            seq = cast("int", copied.execute("SELECT seq FROM copy").get)
            # The HEAD that names a snapshot tells version and ETag. secure_delete overwrites the old HEAD.
            copied.pragma("secure_delete", "on")
            copied.execute("UPDATE copy SET ver = 0, etag = '', head = x''")
            check = copied.pragma("quick_check")
            if check != "ok":
                raise apsw.CorruptError(f"quick_check: {check}")
        return seq

    def export_to(self, path: Path) -> None:
        """Write a plain database to a new file, as `copy_to` does."""
        self.copy_to(path)
        with contextlib.closing(apsw.Connection(str(path))) as exported:
            rename_copy_table(exported)


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


def _no_head() -> StoreUnavailable:
    return StoreUnavailable("the local copy is new; try again")
