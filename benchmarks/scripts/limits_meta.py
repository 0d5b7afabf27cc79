"""The limits of metadata: two statements in a transaction of PostgreSQL, a GET of Redis. See `limits`."""

from __future__ import annotations

import contextlib
import datetime as dt
import itertools
import os
from collections.abc import Awaitable, Callable, Sequence
from typing import NamedTuple

import msgspec
import redis.asyncio
from msgspec.structs import replace
from psycopg import AsyncConnection

from app.autocrud.errors import StoreUnavailable
from app.autocrud.resource_manager.backends.redis.script_arguments import digest
from app.autocrud.resource_manager.basic import Change, Encoding, ModelSpec, ResourceMeta, RevisionInfo, Version
from app.autocrud.resource_manager.contract.metadata_codec import encoder, meta_of
from app.autocrud.resource_manager.engine.operations import new_nonce
from app.autocrud.resource_manager.meta_store.fast_slow import FastSlowMetaStore
from app.autocrud.resource_manager.meta_store.postgres import PostgresMetaStore
from app.autocrud.resource_manager.meta_store.redis import RedisMetaStore
from app.autocrud.resource_manager.model.codec import Codec
from benchmarks.article import article
from benchmarks.scripts.limits import Pair, Side
from benchmarks.scripts.ours import Article

UPDATED = 200
"""How many resources the updates go around."""

_codec = Codec(Article, ["author", "views"])
_spec = ModelSpec("article", _codec.fields)
_encode = encoder(Encoding.json)
_numbers = itertools.count()


def changed(before: ResourceMeta | None) -> Change:
    """The change that creates an article, or updates it."""
    number, now = next(_numbers), dt.datetime.now(dt.UTC)
    revision = 1 if before is None else before.revision + 1
    uid = f"0/{number:032}"
    record = RevisionInfo(
        uid=uid,
        resource_id=f"{number:032}" if before is None else before.resource_id,
        revision=revision,
        parent=None if before is None else before.revision,
        schema_version=1,
        status="stable",
        data_hash="5" * 64,
        encoding=Encoding.json,
        created_time=now,
        updated_time=now,
        created_by="anonymous",
        updated_by="anonymous",
    )
    meta = ResourceMeta(
        **{name: getattr(record, name) for name in RevisionInfo.__struct_fields__ if name != "parent"},
        version=revision,
        nonce=new_nonce(),
        total_revision_count=revision,
        is_deleted=False,
    )
    if before is not None:
        meta = replace(meta, created_time=before.created_time)
    expect: Version | str = "absent" if before is None else Version(before.version, before.nonce)
    index = _codec.index(msgspec.convert(article(number), Article))
    return Change(meta=meta, record=record, index=index, expect=expect)  # type: ignore[arg-type]


def creates(times: int) -> Sequence[Change]:
    return [changed(None) for _ in range(times)]


class Updates:
    """Changes of a few resources in turn, each of the state that the one before leaves."""

    def __init__(self, metas: Sequence[ResourceMeta]) -> None:
        self._metas = list(metas)
        self._at = 0

    def __call__(self, times: int) -> Sequence[Change]:
        return [self._next() for _ in range(times)]

    def _next(self) -> Change:
        self._at = (self._at + 1) % len(self._metas)
        change = changed(self._metas[self._at])
        self._metas[self._at] = change.meta
        return change


INSERT = """INSERT INTO raw VALUES
  (%s, %s, %s, %s, %s, %s, %s, %s, %s, %s, %s, %s, %s, %s, %s, %s, %s::jsonb, %s::text[], 1)"""
UPDATE = """UPDATE raw SET version = %s, nonce = %s, revision = %s, total_revision_count = %s, updated_time = %s,
  updated_by = %s, uid = %s, doc = %s, shown = %s, keys = %s::jsonb WHERE id = %s AND version = %s AND nonce = %s"""
RECORD = 'INSERT INTO "raw:revisions" VALUES (%s, %s, %s, %s)'
AFTER = (
    "WITH written AS ({} RETURNING 1)"
    ' INSERT INTO "raw:revisions" SELECT %s::text, %s::bigint, %s::text, %s::bytea FROM written'
)
COUNTS = """SELECT (SELECT count(*) FROM raw) = (SELECT count(*) FROM ours)
  AND (SELECT count(*) FROM "raw:revisions") = (SELECT count(*) FROM "ours:revisions")"""


def statement(change: Change) -> tuple[str, tuple[object, ...]]:
    """Return the statement and parameters for the row of a resource, in a table with our columns and indexes."""
    meta, index = change.meta, change.index
    assert index is not None
    doc, keys = _encode(meta), msgspec.json.encode(index.keys).decode()
    if isinstance(change.expect, Version):
        values = (
            meta.version,
            meta.nonce,
            meta.revision,
            meta.total_revision_count,
            meta.updated_time,
            meta.updated_by,
        )
        return UPDATE, (*values, meta.uid, doc, index.shown, keys, meta.resource_id, *change.expect)
    state = (meta.version, meta.nonce, meta.revision, meta.total_revision_count, meta.schema_version, meta.status)
    times = (meta.is_deleted, meta.created_time, meta.updated_time, meta.created_by, meta.updated_by)
    rest = (meta.uid, meta.encoding.value, doc, index.shown, keys, list(index.missing))
    return INSERT, (meta.resource_id, *state, *times, *rest)


def record_of(change: Change) -> tuple[object, ...]:
    assert change.record is not None
    return change.record.resource_id, change.record.revision, change.record.uid, _encode(change.record)


class RawPostgres(NamedTuple):
    connection: AsyncConnection

    async def written(self, changes: Sequence[Change]) -> None:
        """As people write it: BEGIN, two statements and COMMIT, four round trips."""
        for change in changes:
            async with self.connection.transaction():
                await self._both(change)

    async def pipelined(self, changes: Sequence[Change]) -> None:
        """All four together, in fewer round trips."""
        for change in changes:
            async with self.connection.pipeline(), self.connection.transaction():
                await self._both(change)

    async def as_one(self, changes: Sequence[Change]) -> None:
        """Both in one statement, which is a transaction of its own: one round trip, and nothing is less."""
        for change in changes:
            text, values = statement(change)
            await self.connection.execute(AFTER.format(text).encode(), (*values, *record_of(change)))

    async def _both(self, change: Change) -> None:
        text, values = statement(change)
        await self.connection.execute(text.encode(), values)
        await self.connection.execute(RECORD.encode(), record_of(change))

    async def same(self) -> bool:
        row = await (await self.connection.execute(COUNTS.encode())).fetchone()
        return row is not None and bool(row[0])


async def pairs(stack: contextlib.AsyncExitStack) -> dict[str, Pair]:
    return await _postgres(stack) | await _redis(stack)


async def _postgres(stack: contextlib.AsyncExitStack) -> dict[str, Pair]:
    dsn = os.environ["CRUDSTACK_PG_DSN"]
    store, raw_schema = PostgresMetaStore(dsn, table_name="ours"), PostgresMetaStore(dsn, table_name="raw")
    for one in (store, raw_schema):
        one.bind(_spec)
        await one.health()
        stack.push_async_callback(one.close)
    connection = await AsyncConnection.connect(dsn, autocommit=True)
    stack.push_async_callback(connection.close)
    raw = RawPostgres(connection)

    async def commit(changes: Sequence[Change]) -> None:
        for change in changes:
            await store.commit([change])

    async def updates(call: Callable[[Sequence[Change]], Awaitable[None]]) -> Side:
        first = creates(UPDATED)
        await call(first)
        return Side(call, Updates([change.meta for change in first]))

    forms = {"transaction()": raw.written, "in one pipeline": raw.pipelined, "as one statement": raw.as_one}
    found = {}
    for name, form in forms.items():
        found[f"PostgreSQL create / {name}"] = Pair(Side(form, creates), Side(commit, creates), raw.same)
        found[f"PostgreSQL update / {name}"] = Pair(await updates(form), await updates(commit), raw.same)
    return found


async def _redis(stack: contextlib.AsyncExitStack) -> dict[str, Pair]:
    url, dsn = os.environ["CRUDSTACK_REDIS_URL"], os.environ["CRUDSTACK_PG_DSN"]
    fast = RedisMetaStore(url, "limits:fast:")
    both, alone = (
        FastSlowMetaStore(fast, PostgresMetaStore(dsn, table_name="slow")),
        RedisMetaStore(url, "limits:alone:"),
    )
    change = changed(None)
    rid, changes = change.meta.resource_id, Updates([change.meta])
    for store in (both, alone):
        store.bind(_spec)
        await store.commit([change])
        stack.push_async_callback(store.close)
    client = await stack.enter_async_context(redis.asyncio.Redis.from_url(url))

    async def hit(times: Sequence[int]) -> None:
        for _ in times:
            await both.get(rid)

    async def look(times: Sequence[int]) -> None:
        for _ in times:
            with contextlib.suppress(StoreUnavailable):  # a busy machine: Redis is given little time; `hits` finds it
                await both._leases.read(rid)

    async def got(times: Sequence[int]) -> None:
        for _ in times:
            await alone.get(rid)

    async def get_decoded(times: Sequence[int]) -> None:
        for _ in times:
            meta_of(await client.get("limits:raw"))

    async def get(times: Sequence[int]) -> None:
        for _ in times:
            await client.get("limits:raw")

    async def hget_decoded(times: Sequence[int]) -> None:
        for _ in times:
            meta_of(await client.hget(f"limits:alone:res:{digest(rid)}", "d"))

    async def written() -> None:
        """A hit counts for a lease; this begins one."""
        (new,) = changes(1)
        both._skip_until = float("-inf")
        await both.commit([new])
        await client.set("limits:raw", encoder(Encoding.msgpack)(new.meta))

    async def hits() -> bool:
        """Return whether Redis answered every time, with the same document."""
        read = await both._leases.read(rid)
        seal = both._seal or b""  # what says whose document it is
        same = isinstance(read, bytes) and meta_of(read[len(seal) :]) == meta_of(await client.get("limits:raw"))
        return same and both._skip_until == float("-inf")

    async def truths() -> bool:
        return await alone.get(rid) == meta_of(await client.hget(f"limits:alone:res:{digest(rid)}", "d"))

    return {
        "Redis hit / GET and decode": Pair(Side(get_decoded), Side(hit), hits, 1500, before=written),
        "Redis hit, not decoded / GET": Pair(Side(get), Side(look), hits, 1500, before=written),
        "Redis as the truth / HGET and decode": Pair(Side(hget_decoded), Side(got), truths, 1500),
    }
