"""One moment of `ResourceTables` and of bodies: a connection of its own that stays in one read transaction.

SQLite keeps the pages of this moment: in WAL mode other connections read and write meanwhile. Memory use does not
depend on the number of resources, because cursors read the rows one after the other.
"""

from __future__ import annotations

import threading
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from itertools import groupby
from operator import itemgetter
from typing import Any, TypeVar

import apsw

from ....errors import CrudError, StoreDamaged
from ...basic import BlobRow, ResourceMeta, RevisionInfo, StoredKey
from ...contract import snapshots
from ...contract.metadata_codec import info_of, meta_of
from ...runtime.threads import in_thread
from . import blob_tables

T = TypeVar("T")

PAGE_ITEMS, PAGE_BYTES = 500, 1024 * 1024
"""A thread reads so many rows, or so many bytes of documents, before it returns them."""
CACHE_KIB = 4096


class SqliteSnapshot:
    """A MetaSnapshot, and a BodySnapshot if the database has a table `bodies`.

    connection  used by this object alone; a read transaction is open, or nothing else can write to the database
    translated  returns the error for an error of SQLite
    """

    one_moment = True

    def __init__(self, connection: apsw.Connection, translated: Callable[[apsw.Error], CrudError]) -> None:
        self._connection, self._translated = connection, translated
        self._lock = threading.Lock()  # a cancelled caller may leave a read in its thread when the snapshot is closed
        connection.pragma("cache_size", -CACHE_KIB)

    async def _run(self, work: Callable[[apsw.Connection], T]) -> T:
        def locked() -> T:
            with self._lock:
                try:
                    return work(self._connection)
                except apsw.Error as error:
                    raise self._translated(error) from error

        return await in_thread(locked)

    def close(self) -> None:
        """End the read transaction. Waits for a read that is under way."""
        with self._lock:
            self._connection.close(force=True)

    async def count(self) -> int:
        """Return how many resources there are, deleted ones too."""
        return int(await self._run(lambda db: db.execute("SELECT count(*) FROM resources").get))

    async def items(self, after: str = "") -> AsyncIterator[ResourceMeta | RevisionInfo]:
        """Yield each resource whose id follows `after`, ascending: its metadata, then its records."""
        async for item in self._pages(_items):
            if item.resource_id > after:
                yield item

    async def keys(self) -> AsyncIterator[StoredKey]:
        """Yield the results that are kept for Idempotency-Keys, by ascending key."""
        async for key in self._pages(_keys):
            yield key

    async def _pages(self, rows: Callable[[apsw.Connection], Iterator[tuple[T, int]]]) -> AsyncIterator[T]:
        iterator = await self._run(rows)
        while page := await self._run(lambda _: _next_page(iterator)):
            for item in page:
                yield item

    async def blob_rows(self, keys: Sequence[str]) -> list[BlobRow]:
        """Return the rows of these keys, in their order. Raises StoreDamaged if one is missing."""
        return await self._run(lambda db: [_blob_row(db, key) for key in keys])

    async def bodies(self, uids: Sequence[str]) -> list[bytes | None]:
        """Return the bodies of the first uids, in their order; None for each one that is missing.

        Stops after the first one with which the bodies take more than `snapshots.PAGE_BYTES`.
        """
        return await self._run(lambda db: _first_bodies(db, uids))


def begin_reading(connection: apsw.Connection) -> None:
    """Begin a read transaction now. A BEGIN alone would begin it at the first read."""
    connection.execute("BEGIN")
    connection.execute("SELECT generation FROM state").get  # noqa: B018


def _next_page(rows: Iterator[tuple[T, int]]) -> list[T]:
    page: list[T] = []
    size = 0
    for item, length in rows:
        page.append(item)
        size += length
        if len(page) >= PAGE_ITEMS or size >= PAGE_BYTES:
            break
    return page


def _items(connection: apsw.Connection) -> Iterator[tuple[ResourceMeta | RevisionInfo, int]]:
    resources: Any = connection.execute("SELECT rid, id, doc FROM resources ORDER BY id")
    for rid, resource_id, doc in resources:
        yield meta_of(doc, resource_id), len(doc)
        records: Any = connection.execute("SELECT doc FROM revisions WHERE rid = ? ORDER BY revision", (rid,))
        for (record,) in records:
            yield info_of(record, resource_id), len(record)


def _keys(connection: apsw.Connection) -> Iterator[tuple[StoredKey, int]]:
    rows: Any = connection.execute("SELECT key, request, time, doc FROM done ORDER BY key, operation")
    for (key, request, time), operations in groupby(rows, itemgetter(0, 1, 2)):
        docs = [doc for _, _, _, doc in operations]
        results = tuple(None if doc is None else meta_of(doc) for doc in docs)
        yield StoredKey(key=key, request=request, time=time, results=results), sum(len(doc or b"") for doc in docs)


def _blob_row(connection: apsw.Connection, key: str) -> BlobRow:
    row = blob_tables.row(connection, key)
    if row is None:
        raise StoreDamaged(f"the file {key} is missing, although a revision names it")
    return row


def _first_bodies(connection: apsw.Connection, uids: Sequence[str]) -> list[bytes | None]:
    bodies: list[bytes | None] = []
    size = 0
    for uid in uids:
        body: bytes | None = connection.execute("SELECT body FROM bodies WHERE uid = ?", (uid,)).get
        bodies.append(body)
        size += len(body or b"")
        if size > snapshots.PAGE_BYTES:
            break
    return bodies
