"""The part of RedisMetaStore that reaches its keys: the connection, and transactions that happen once.

`meta_store.redis` has the invariants T1 to T5.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Hashable, Sequence
from functools import partial
from typing import Any, NamedTuple

import msgspec
from typing_extensions import override

from ...errors import OutcomeUnknown, StoreUnavailable
from ...secret import Secret
from ..backends.redis import scripts
from ..backends.redis.client import Password, ReplyLost, client_of
from ..backends.redis.script_arguments import TXID, ScriptArguments, digest, unique_key
from ..backends.redis.script_parts import FORMAT, Script
from ..backends.redis.search_replica import SearchReplica, damaged
from ..basic import Encoding, MetaStore, ModelSpec
from ..contract.blobs import BLOBS_MARKER
from ..contract.store_errors import not_indexed, not_kept, shared, taken, unknown_format
from ..runtime.threads import in_thread

LOG_ENTRIES, LOG_BYTES = 10_000, 16 * 1024 * 1024
"""The largest log: in records, and in bytes. A replica that is further behind reads all data."""
NOTES = 10_000
"""Number of transaction ids that Redis keeps."""
COMMIT_TIMEOUT_S = 25.0
"""Seconds after which a commit is not tried again. API Gateway waits for 30 s."""
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.05, 1.0
ATTEMPTS = 16
PAUSE_S = 5
"""Seconds for which commits wait at most while another program makes a field unique."""


class Known(NamedTuple):
    """The last known state of the store.

    store       the id of the store
    noted       how many txids it has noted
    text        its active unique fields, as it stores them
    generation  the generation of new bodies
    """

    store: bytes
    noted: int
    text: bytes
    generation: int

    @property
    def names(self) -> list[str]:
        """The names of the active unique fields, and the marker of a store with blobs."""
        return msgspec.json.decode(self.text, type=list[str])

    @property
    def unique(self) -> list[str]:
        """The names of the active unique fields."""
        return [name for name in self.names if name != BLOBS_MARKER]


class RedisAccess(MetaStore):
    """A MetaStore that has keys in Redis. RedisMetaStore documents the arguments."""

    def __init__(
        self,
        redis_url: str | Secret,
        prefix: str = "",
        encoding: Encoding | None = None,
        *,
        password: Password | None = None,
    ) -> None:
        self._client = client_of(redis_url, password)
        self._prefix, self._encoding = prefix, encoding
        self._meta_key = f"{prefix}meta"
        self.bind(ModelSpec("unbound"))

    @override
    def bind(self, spec: ModelSpec) -> None:
        self._spec = spec
        self._arguments = ScriptArguments(spec, self._encoding or Encoding.json)
        self._replica = SearchReplica(
            spec, self._encoding, self._run, partial(self._call, "HGETALL", f"{self._prefix}specs")
        )
        self._known: Known | None = None

    @property
    @override
    def location_key(self) -> Hashable:
        return "redis", self._client, self._prefix

    async def _call(self, *command: Any) -> Any:
        return await self._client.call(self, *command)

    async def _run(self, script: Script, *arguments: Any) -> Any:
        return await self._client.run(self, script, self._meta_key, *arguments)

    async def _transact(
        self, script: Script, arguments: Callable[[list[str]], list[Any]], *, adopts: bool = True
    ) -> tuple[bytes, list[Any]]:
        """Run a writing script exactly once, even if answers are lost. Return its code and its further answers.

        Raises UniqueConflict. `arguments` makes the arguments for the active unique fields. `adopts`: the unique fields
        of this program must be active.
        """
        loop = asyncio.get_running_loop()
        deadline = loop.time() + COMMIT_TIMEOUT_S
        for _ in range(ATTEMPTS):
            known = await self._ready(adopts)
            unique, txid, candidate = known.unique, os.urandom(TXID), os.urandom(8).hex()
            limits = (NOTES, LOG_ENTRIES, LOG_BYTES, known.text, len(unique))
            frame = (known.store, candidate, txid, known.noted, *limits, self._arguments.spec, self._arguments.fields)
            try:
                code, *told = await self._client.run_once(self, script, self._meta_key, *frame, *arguments(unique))
            except ReplyLost:
                if await self._happened((known.store, candidate, txid, known.noted, NOTES), deadline):
                    return b"ok", []
                if loop.time() > deadline:
                    break
                continue
            self._learn(told)
            self._check(code, told)
            if code == b"taken":
                raise taken(unique[told[4] - 1])
            if code == b"paused":
                await asyncio.sleep(2 * PAUSE_S / ATTEMPTS)
                continue
            if code not in (b"store", b"old", b"unique"):
                return code, told[4:]
            # The state of the store that this process knew was old. `_learn` has updated it.
        raise StoreUnavailable("Redis did not take this; nothing was changed, try again")

    async def _happened(self, transaction: tuple[Any, ...], deadline: float) -> bool:
        """Return whether a transaction with a lost reply happened. If not, it never will. Raises OutcomeUnknown."""
        loop, pause = asyncio.get_running_loop(), FIRST_PAUSE_S
        while True:
            try:
                code, *told = await self._run(scripts.LOOK, *transaction)
            except StoreUnavailable:
                if loop.time() + pause > deadline:
                    break
                await asyncio.sleep(pause)
                pause = min(2 * pause, LONGEST_PAUSE_S)
                continue
            self._learn(told)
            if code in (b"done", b"refused"):
                return bool(code == b"done")
            break
        raise OutcomeUnknown("Redis did not say whether this was stored; look before you try again")

    async def _look(self) -> Known:
        code, *told = await self._run(scripts.LOOK, "", "", "", 0, NOTES)
        self._check(code, told)
        return self._learn(told)

    def _check(self, code: bytes, told: Sequence[Any]) -> None:
        """Raise StoreDamaged or ConfigError if a script answered that it cannot use the store."""
        if code == b"damaged":
            raise damaged()
        if code == b"format":
            raise unknown_format(self._spec.name, int(told[-1]), FORMAT)

    def _learn(self, told: Sequence[Any]) -> Known:
        known = self._known = Known(told[0], told[1], told[2], told[3])
        return known

    async def _ready(self, adopts: bool) -> Known:
        """Return the known state of the store, after the unique fields of this program are active.

        They are active since `activate_unique_fields`, unless the store was emptied or restored. Raises ConfigError if
        this program does not index a field that must be unique.
        """
        known = self._known or await self._look()
        for _ in range(ATTEMPTS):
            unique = known.unique
            for name in unique:
                if name not in self._spec.fields:
                    raise not_indexed(self._spec.name, name)
            added = self._added(known)
            if not added or not adopts:
                return known
            await self._adopt(known, added)
            known = self._known or known
        raise not_kept()

    def _added(self, known: Known) -> list[str]:
        return [name for name in self._spec.unique if name not in known.unique]

    async def _adopt(self, known: Known, added: Sequence[str]) -> bool:
        """Make fields unique. Return False if a resource is outdated, or was written at the same time.

        Raises ConfigError if resources share a value.
        """
        copy = await self._replica.current()
        position, outdated, duplicated, values = await in_thread(partial(copy.values, added))
        if outdated:
            return False
        if duplicated:
            await self._call("HDEL", self._meta_key, "pause")
            raise shared(self._spec.name, duplicated[0])
        names = msgspec.json.encode(sorted([*known.names, *added]))
        held = [part for name, rid, value in values for part in (digest(rid), unique_key(name, value))]
        code, *told = await self._run(
            scripts.ADOPT, position.store, position.seq, known.text, names, len(values), *held
        )
        self._check(code, told)
        self._learn(told)
        return bool(code == b"ok")

    @override
    async def close(self) -> None:
        self._replica.drop()
        await self._client.close(self)
