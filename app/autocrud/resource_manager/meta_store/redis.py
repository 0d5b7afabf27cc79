"""RedisMetaStore: a MetaStore in Redis (6.2 or later) or Valkey, without server modules.

    RedisMetaStore("rediss://:secret@cache.example.com:6380/0", prefix="article:")

A prefix belongs to one model. A commit is one script. `get`, `revision` and `done` read Redis. Searches read a copy in
the memory of this process, which every read updates to the newest transaction in one round trip (see `backends.redis`).

The server must keep its data, so `maxmemory-policy` must be `noeviction`. Whether data survive the end of the server
depends on `appendonly` and `appendfsync`, which a client cannot know; so this store is never `durable`. One server has
all keys: Redis Cluster is not supported. A primary that was replaced but still answers returns old data: the failover
must cut its connections, as Sentinel does.

Each acknowledged commit happened exactly once. The invariants hold within one history of the server. A replica that
takes over while it lags begins another history, without commits that Redis had acknowledged.

- T1 *A commit is sent at most once* under its txid, which is drawn for this commit. The script notes the txid in the
  step that commits.
- T2 *No answer before the outcome is known.* If an answer was lost, the txid is looked up over another connection. If
  it is not noted, the same step notes it as refused, and a refused commit changes nothing, whenever it arrives: after a
  delay in a dead connection, in a proxy or in the network. So from then on it is either committed, or never will be.
- T3 *A note is forgotten only when it no longer matters.* A commit carries the number of notes at the time when it was
  sent (`since`). Once as many notes as are kept have been added, the commit is refused, and a look-up gives no result.
  So as long as a commit can still happen, its note and its refusal are kept.
- T4 *A commit is for one store.* It carries the id of the store, which is drawn when the store is made. If the store
  was flushed since, the commit changes nothing. If a look-up finds another id, it raises OutcomeUnknown.
- T5 *A rejection is as reliable as a success*: a script that does not answer "ok" has written nothing.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import AsyncIterator, Callable, Sequence
from functools import partial
from typing import Any, ClassVar, TypeVar

import apsw
import msgspec
from typing_extensions import override

from ...errors import RevisionNotFound, StaleGeneration, VersionConflict
from ...query import Query
from ..backends.redis import read_scripts, scripts
from ..backends.redis.lease import Leases
from ..backends.redis.script_arguments import decode_record, digest, done_of, version_of
from ..basic import (
    AlreadyCommitted,
    Change,
    CommitResult,
    Findings,
    Hit,
    IdempotentCommit,
    Page,
    Reindex,
    ResourceMeta,
    RevisionInfo,
)
from ..contract.import_journal import forget_purged
from ..contract.metadata_codec import meta_of
from ..contract.protocols import FindingsKeeping, IndexMigration, MetaSweeping
from ..contract.store_errors import blob_gone, check_expectation, expectation_of, missing
from .redis_access import PAUSE_S
from .redis_blobs import RedisBlobRows
from .redis_imports import RedisImports
from .redis_loading import RedisLoading
from .redis_snapshots import RedisSnapshots
from .simple import SCAN_PAGE

T = TypeVar("T")

HIGHEST = 2**53


class RedisMetaStore(
    RedisBlobRows, RedisSnapshots, RedisImports, RedisLoading, IndexMigration, FindingsKeeping, MetaSweeping
):
    """A MetaStore in Redis or Valkey.

    redis_url  redis://, rediss:// (TLS) or unix://, with user and password, and the options of the driver
    prefix     the prefix of all keys, one for each model
    encoding   the encoding of metadata documents
    password   makes the password of each new connection, if passwords expire
    """

    remote: ClassVar[bool] = True

    def leases(self, lease_s: float) -> Leases:
        """Return a cache below this prefix, for `fast_slow`. It does not touch the data of this store."""
        return Leases(self._client, self._prefix, lease_s)

    def _key(self, resource_id: str) -> str:
        return f"{self._prefix}res:{digest(resource_id)}"

    # Reading

    @override
    async def get(self, resource_id: str) -> ResourceMeta:
        document = await self._call("HGET", self._key(resource_id), "d")
        if document is None:
            raise missing(resource_id)
        return meta_of(document, resource_id)

    @override
    async def revision(self, resource_id: str, revision: int) -> RevisionInfo:
        record = await self._call("HGET", self._key(resource_id), f"r{revision}")
        if record is None:
            raise RevisionNotFound(f"resource {resource_id!r} has no revision {revision}")
        return decode_record(record)

    @override
    async def revisions(self, resource_id: str, before: int | None = None, limit: int = 50) -> Page[RevisionInfo]:
        below = HIGHEST if before is None else max(-HIGHEST, min(before, HIGHEST))
        records = await self._run(read_scripts.REVISIONS, digest(resource_id), below, limit + 1)
        items = [decode_record(record) for record in records[:limit]]
        return Page(items, items[-1].revision if len(records) > limit else None)

    @override
    async def done(self, key: str, *, peek: bool = False) -> CommitResult | None:
        found = await self._run(read_scripts.DONE, key)
        return None if found is None else done_of(found)

    @override
    async def search(self, query: Query) -> Page[Hit]:
        return await self._read(lambda tables, db: tables.search(db, query))

    @override
    async def count(self, query: Query) -> int:
        return await self._read(lambda tables, db: tables.count(db, query))

    @override
    async def scan(self) -> AsyncIterator[ResourceMeta]:
        after = ""
        while page := await self._read(lambda tables, db, after=after: tables.scan(db, after, SCAN_PAGE)):
            for meta in page:
                yield meta
            after = page[-1].resource_id

    @override
    async def unreferenced(self, uids: Sequence[str]) -> list[str]:
        return await self._read(lambda tables, db: tables.unreferenced(db, uids))

    @override
    async def outdated(self, limit: int) -> list[ResourceMeta]:
        return await self._read(lambda tables, db: tables.outdated(db, limit))

    async def _read(self, work: Callable[..., T]) -> T:
        """Read the copy, as new as Redis is now."""
        copy = await self._replica.current()
        read: Callable[[apsw.Connection], T] = partial(work, copy.tables)
        return await copy.db.read(read)

    @override
    async def generation(self) -> int:
        return (await self._look()).generation

    @override
    async def health(self) -> None:
        await self._call("PING")

    # Writing

    @override
    async def commit(self, changes: Sequence[Change], once: IdempotentCommit | None = None) -> list[ResourceMeta]:
        if not changes and once is None:
            return []
        await forget_purged(self, changes)

        def arguments(unique: list[str]) -> list[Any]:
            return [*self._arguments.once(once, changes), *self._arguments.changes(changes, unique)]

        code, told = await self._transact(scripts.COMMIT, arguments)
        if code == b"ok":
            return [change.meta for change in changes]
        if code == b"done":
            raise AlreadyCommitted(done_of(told[0]))
        if code == b"stale":
            raise StaleGeneration("a body is older than the generations that may be committed")
        if code == b"gone":
            raise blob_gone(told[0].decode())
        position, found = told  # the remaining code is "conflict"; it names the first change that conflicts
        change = changes[position - 1]
        check_expectation(expectation_of(change), change.meta.resource_id, version_of(found))
        raise VersionConflict(f"resource {change.meta.resource_id!r} was changed by another writer")

    @override
    async def reindex(self, entries: Sequence[Reindex], *, share: bool = False) -> None:
        def arguments(unique: list[str]) -> list[Any]:
            return self._arguments.entries(entries, unique, share=share)

        await self._transact(scripts.REINDEX, arguments, adopts=False)

    @override
    async def findings(self) -> Findings:
        kept = await self._call("HGET", self._meta_key, "findings")
        if kept is None:  # an empty store needs no healing
            return Findings(healed=not (await self._look()).store)
        return msgspec.json.decode(kept, type=Findings)

    @override
    async def keep_findings(self, findings: Findings) -> None:
        if (await self._look()).store:
            await self._call("HSET", self._meta_key, "findings", msgspec.json.encode(findings))

    @override
    async def activate_unique_fields(self, *, force: bool = False) -> bool:
        known = await self._look()
        if added := self._added(known):
            if force:  # the owners of all values must be known before writers check them
                await self._run(scripts.PAUSE, PAUSE_S)
            if not await self._adopt(known, added):
                return False
        if await self._read(lambda tables, db: tables.stale(db)):
            copy = await self._replica.current()
            await copy.db.write(copy.tables.clear_stale_if_indexed)
        return True

    @override
    async def deactivate_unique_field(self, name: str) -> None:
        """Do nothing: if resources are outdated, a forced activation only pauses other writers, for PAUSE_S seconds."""

    @override
    async def advance_generation(self) -> int:
        # If the command is sent again, the generation advances twice, which is harmless.
        return int(await self._call("HINCRBY", self._meta_key, "generation", 1))

    # Maintenance

    @override
    async def purge_remnants(self, now: dt.datetime) -> dt.datetime:
        """Remove purged data from the copy of this process. Other processes do so at their next read.

        The purge itself removes the data from Redis (L3 in `backends.redis.scripts`), except the SHA-256 of the id in
        the log. The files of the server keep traces until the server writes them again.
        """
        await self._replica.current()
        return now
