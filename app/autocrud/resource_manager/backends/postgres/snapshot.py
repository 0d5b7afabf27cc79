"""One moment of the tables of a model: a transaction at REPEATABLE READ, read with cursors of the server.

The transaction may last for hours. So it never touches `{t}:state` and `{t}:recent`: programs of other versions alter
these tables when they start, and would wait for its end with the lock of the schema, for which all commits then wait.
"""

from __future__ import annotations

import itertools
from collections.abc import AsyncIterator, Sequence
from typing import Any

from typing_extensions import override

from ....errors import StoreDamaged
from ...basic import BlobRow, ResourceMeta, RevisionInfo, StoredKey
from ...contract.metadata_codec import info_of, meta_of
from ...contract.snapshots import MetaSnapshot
from .pool import Connection, translating
from .schema import PostgresSchema

FETCH = 500
"""How many rows are read at a time. They have at most a few KB each."""


class PostgresSnapshot(MetaSnapshot):
    """The tables of one model in the transaction of a connection."""

    one_moment = True

    def __init__(self, connection: Connection, schema: PostgresSchema) -> None:
        self._connection, self._schema = connection, schema
        self._numbers = itertools.count(1)

    @override
    async def count(self) -> int:
        ((number,),) = await self._rows("SELECT count(*) FROM <main>")
        return int(number)

    @override
    async def items(self, after: str = "") -> AsyncIterator[ResourceMeta | RevisionInfo]:
        records = self._cursor("SELECT id, doc FROM <revisions> ORDER BY id, revision")
        next_ = await anext(records, None)
        async for id_, doc in self._cursor("SELECT id, doc FROM <main> ORDER BY id"):
            if id_ > after:
                yield meta_of(doc, id_)
            while next_ is not None and next_[0] <= id_:
                if next_[0] == id_ and id_ > after:
                    yield info_of(next_[1], id_)
                next_ = await anext(records, None)

    @override
    async def keys(self) -> AsyncIterator[StoredKey]:
        rows: list[tuple[Any, ...]] = []
        async for row in self._cursor("SELECT key, request, time, doc FROM <done> ORDER BY key, operation"):
            if rows and rows[0][0] != row[0]:
                yield _stored_key(rows)
                rows = []
            rows.append(row)
        if rows:
            yield _stored_key(rows)

    @override
    async def blob_rows(self, keys: Sequence[str]) -> list[BlobRow]:
        if not keys:
            return []
        found = await self._rows("SELECT key, size, owner FROM <blobs> WHERE key = ANY(%s)", (list(keys),))
        by_key = {key: BlobRow(key=key, size=size, owner=owner) for key, size, owner in found}
        if lost := [key for key in keys if key not in by_key]:
            raise StoreDamaged(f"the row of the blob {lost[0]} is missing from the database; restore it from a backup")
        return [by_key[key] for key in keys]

    async def _rows(self, statement: str, params: Sequence[Any] = ()) -> list[tuple[Any, ...]]:
        with translating():
            cursor = await self._connection.execute(self._schema.filled(statement), params, binary=True)
            return await cursor.fetchall()

    async def _cursor(self, query: str) -> AsyncIterator[tuple[Any, ...]]:
        """Yield the rows of a query, FETCH at a time."""
        name = f"export_{next(self._numbers)}"
        with translating():
            await self._connection.execute(self._schema.filled(f"DECLARE {name} NO SCROLL CURSOR FOR {query}"))
        while rows := await self._rows(f"FETCH {FETCH} FROM {name}"):
            for row in rows:
                yield row
        with translating():
            await self._connection.execute(f"CLOSE {name}".encode())


def _stored_key(rows: Sequence[tuple[Any, ...]]) -> StoredKey:
    """Return the results of one Idempotency-Key, from its rows in the order of the operations."""
    key, request, time, _ = rows[0]
    return StoredKey(
        key=key, request=request, time=time, results=tuple(None if row[3] is None else meta_of(row[3]) for row in rows)
    )
