"""The part of RedisMetaStore that loads whole models. `backends.redis.load_scripts` has the keys, and D1 to D4."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterable, Iterator, Sequence
from contextlib import asynccontextmanager
from typing import Any
from uuid import uuid4

from typing_extensions import override

from ...errors import CrudError, StoreUnavailable
from ..backends.redis import load_scripts
from ..backends.redis.script_arguments import digest
from ..backends.redis.script_parts import Script
from ..basic import BlobRow, RevisionInfo, StoredKey
from ..contract.loading import BulkLoading, LoadedResource, Loader
from ..contract.store_errors import blob_gone, load_too_large, model_not_empty, pin_lost, taken
from ..runtime.threads import shielded
from .redis_access import RedisAccess

MAX_KEYS = 100_000
"""The largest number of resources and blobs that one step publishes. It takes some 10 microseconds for each, in which
Redis serves no other request."""
CALL_ITEMS, CALL_BYTES = 500, 2 * 1024 * 1024
"""How many items, and how many bytes of them, one call stages at most. Larger items are staged alone."""
DISCARDED_AT_ONCE = 1000


class RedisLoading(RedisAccess, BulkLoading):
    """A MetaStore in Redis into which a whole model can be loaded."""

    @override
    @asynccontextmanager
    async def load(self, pin: str, *, size: int = 0) -> AsyncIterator[Loader]:
        if size > MAX_KEYS:
            raise load_too_large(size, MAX_KEYS)
        known = await self._ready(adopts=True)
        loader = RedisLoader(self, known.unique, pin)
        await loader.begin()
        try:
            yield loader
        finally:
            await shielded(asyncio.ensure_future(loader.discard()))


class RedisLoader(Loader):
    """A Loader that stages under keys of its own.

    unique  names of the unique fields that are active
    pin     the pin of the load
    """

    def __init__(self, store: RedisAccess, unique: Sequence[str], pin: str) -> None:
        self._store, self._unique, self._pin = store, unique, pin
        self._load = uuid4().hex
        self._conflict: str | None = None
        self._resources = self._keys = self._rows = self._size = self._tokens = 0
        self._named: set[str] = set()

    async def begin(self) -> None:
        """Begin the load. Raises ModelNotEmpty."""
        code, *told = await self._store._run(load_scripts.BEGIN, self._load, load_scripts.LIFE_S)
        self._check(code, told)

    def _check(self, code: bytes, told: Sequence[Any]) -> None:
        self._store._check(code, told)
        if code == b"full":
            raise model_not_empty(told[-1].decode())
        if code == b"gone":
            raise blob_gone(told[-1].decode())
        if code == b"pin":
            raise pin_lost()
        if code == b"lost":
            raise StoreUnavailable(
                f"what was loaded is gone from Redis (a load may take {load_scripts.LIFE_S // 3600} hours); nothing was"
                " changed, try again"
            )

    async def _stage(self, script: Script, parts: Iterable[list[Any]], *first: Any) -> None:
        for arguments in _calls(parts):
            code, *told = await self._store._run(script, self._load, *first, *arguments)
            self._check(code, told)
            if told and told[0]:
                self._conflict = self._unique[told[0] - 1]

    def _check_size(self) -> None:
        if self._resources + self._rows > MAX_KEYS:
            raise load_too_large(self._resources + self._rows, MAX_KEYS)

    @override
    async def add(self, items: Sequence[LoadedResource | RevisionInfo]) -> None:
        self._resources += sum(isinstance(item, LoadedResource) for item in items)
        self._check_size()
        await self._stage(load_scripts.ADD, map(self._item, items), len(self._unique))

    def _item(self, item: LoadedResource | RevisionInfo) -> list[Any]:
        if isinstance(item, LoadedResource):
            state, document, index, *tokens = self._store._arguments.loaded(item.meta, item.entry, self._unique)
            self._tokens += sum(token != "" for token in tokens)
            return ["m", digest(item.meta.resource_id), state, document, index, *tokens]
        self._named.update(item.blobs)
        record = self._store._arguments.record(item)
        return ["r", digest(item.resource_id), item.resource_id, *record, len(item.blobs), *item.blobs]

    @override
    async def add_blobs(self, rows: Sequence[BlobRow]) -> None:
        self._rows += len(rows)
        self._size += sum(row.size for row in rows)
        self._check_size()
        await self._stage(load_scripts.ADD_BLOBS, ([f"{row.key} {row.size} {row.owner}"] for row in rows))

    @override
    async def add_keys(self, keys: Sequence[StoredKey]) -> None:
        self._keys += len(keys)
        await self._stage(load_scripts.ADD_KEYS, map(self._store._arguments.stored_key, keys))

    @override
    async def publish(self) -> None:
        await shielded(asyncio.ensure_future(self._publish()))

    async def _publish(self) -> None:
        if self._conflict is not None:
            raise taken(self._conflict)
        counts = (self._resources, self._tokens, self._keys, self._rows, len(self._named))

        def arguments(unique: list[str]) -> list[Any]:
            if unique != self._unique:
                raise StoreUnavailable(
                    "another program has made a field unique while the model was loaded; nothing was changed, try again"
                )
            return [self._load, self._pin, self._size, *counts]

        code, told = await self._store._transact(load_scripts.PUBLISH, arguments)
        self._check(code, told)

    async def discard(self) -> None:
        """End the load. What is left after a failure expires."""
        with contextlib.suppress(CrudError):
            while await self._store._run(load_scripts.DISCARD, self._load, DISCARDED_AT_ONCE):
                pass


def _calls(parts: Iterable[list[Any]]) -> Iterator[list[Any]]:
    """Yield the arguments of calls."""
    arguments: list[Any] = []
    count = size = 0
    for part in parts:
        part_size = sum(len(one) if isinstance(one, (bytes, str)) else 8 for one in part)
        if arguments and (count >= CALL_ITEMS or size + part_size > CALL_BYTES):
            yield arguments
            arguments, count, size = [], 0, 0
        arguments += part
        count, size = count + 1, size + part_size
    if arguments:
        yield arguments
