"""FastSlowMetaStore: the conformance suite on real servers, its protocol on virtual time, and four processes while everything goes wrong."""

from __future__ import annotations

import asyncio
import contextlib
import datetime as dt
import hashlib
import json
import math
import os
import random
import re
import sys
import types
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import psycopg
import pytest
import redis
from msgspec.structs import replace

from app.autocrud import Encoding
from app.autocrud.errors import (
    ConfigError,
    CrudError,
    OutcomeUnknown,
    ResourceNotFound,
    StoreUnavailable,
    VersionConflict,
)
from app.autocrud.resource_manager.backends.redis import lease
from app.autocrud.resource_manager.backends.redis.client import ReplyLost
from app.autocrud.resource_manager.backends.redis.lease import Lease, Leases
from app.autocrud.resource_manager.backends.redis.scripts import Script
from app.autocrud.resource_manager.basic import (
    AlreadyCommitted,
    Change,
    CommitResult,
    Findings,
    IdempotentCommit,
    IStorage,
    ResourceMeta,
)
from app.autocrud.resource_manager.core import SimpleStorage
from app.autocrud.resource_manager.meta_store import fast_slow
from app.autocrud.resource_manager.meta_store.fast_slow import FastSlowMetaStore, Fence
from app.autocrud.resource_manager.meta_store.postgres import PostgresMetaStore
from app.autocrud.resource_manager.meta_store.redis import RedisMetaStore
from app.autocrud.resource_manager.meta_store.simple import MemoryMetaStore
from app.autocrud.resource_manager.resource_store.simple import DiskResourceStore
from app.autocrud.resource_manager.storage_factory import IStorageFactory
from tests import virtual_time
from tests.conformance import SharedConformance
from tests.stores import fast_slow_worker as worker
from tests.tcp_proxy import TcpProxy
from tests.valkey import Valkey


class RedisPg(IStorageFactory):
    def __init__(self, root: Path) -> None:
        self.root = root

    def build(self, model_name: str) -> IStorage:
        meta_store = FastSlowMetaStore(
            RedisMetaStore(os.environ["TEST_VALKEY"], prefix=f"{self.root.name}:{model_name}:"),
            PostgresMetaStore(
                os.environ["TEST_POSTGRES"], table_name=f"{self.root.name}/meta_{model_name}", max_size=4
            ),
            lease_s=0.2,
        )
        return SimpleStorage(meta_store, DiskResourceStore(self.root / model_name))


@pytest.mark.usefixtures("valkey", "postgres")
class TestFastSlow(SharedConformance):
    def make(self, root: Path) -> IStorageFactory:
        return RedisPg(root)


# The protocol, on virtual time
#
# Several processes, the real scripts on a real server, and everything else made up: clocks, lives, networks, and a slow store that takes its time.
# One seed is one history. A read that begins after an acknowledgement must see what was acknowledged, or something later.


class Died(Exception):
    """A process ended."""


class Server:
    """A Redis of the simulation: a database of the real one, with a life and a clock that are made up."""

    def __init__(self, world: World, number: int) -> None:
        self.world = world
        self.data = redis.Redis.from_url(world.url.rpartition("/")[0] + f"/{number}")
        self.data.flushdb()
        self.paused_until = 0.0
        self.offset = world.random.choice(
            [0, world.random.uniform(-1e6, 1e6)]
        )  # its clock may be wrong, and runs all the same
        self.begin()

    def begin(self) -> None:
        """Another life."""
        self.server_epoch = [f"{self.world.random.getrandbits(159) + 1:040x}" for _ in range(2)]

    def run(self, script: Script, key: str, *arguments):
        """Run it with a clock and a life of ours, which it finds among its keys."""
        text = self.world.texts.get(script.text)
        if text is None:
            text = script.text.replace("told(said, 'run_id')", "KEYS[2]")
            text = text.replace("told(said, 'master_replid')", "KEYS[3]")
            text = text.replace("redis.call('TIME')", "{KEYS[4], KEYS[5]}")
            text = re.sub(r"'PX', [a-z()]+\)", "'PX', 3600000)", text)  # what ends an entry is what it says
            assert text.count("KEYS[") == 5
            assert text.count("3600000") == 2
            text = self.world.texts[script.text] = self.data.register_script(self.world.mutate(text))
        now = 1_700_000_000 + self.world.now() + self.offset
        return text([key, *self.server_epoch, int(now), int(now % 1 * 1e6)], arguments, client=self.data)

    def copy(self) -> dict[bytes, bytes]:
        return {key: self.data.get(key) for key in self.data.keys("*")}

    def restore(self, copy: dict[bytes, bytes]) -> None:
        self.data.flushdb()
        for key, value in copy.items():
            self.data.set(key, value)


class Network:
    """A process's way to the servers: commands are slow, get lost, are held up and arrive late."""

    db = 0

    def __init__(self, world: World) -> None:
        self.world, self.server, self.cut = world, world.servers[0], False

    async def run_within(self, user, script, key, *arguments, limit_s):
        world, server = self.world, self.server
        if self.cut:
            await asyncio.sleep(world.random.choice([0.0, limit_s]))
            raise StoreUnavailable("cut")
        answer = asyncio.get_running_loop().create_future()
        fate = world.random.random() if world.random.random() < world.trouble else 1.0
        if fate > 0.2:
            late = world.random.uniform(0, 8) if fate < 0.7 else 0.0
            world.spawn(self._deliver(server, late, answer, script, key, arguments))
        if fate < 0.4:  # the connection ends, with the command or without
            await asyncio.sleep(world.random.expovariate(100))
            raise ReplyLost
        try:
            async with asyncio.timeout(limit_s):
                return await asyncio.shield(answer)
        except TimeoutError:
            raise StoreUnavailable("no answer") from None

    async def _deliver(self, server, late, answer, script, key, arguments) -> None:
        await asyncio.sleep(self.world.random.expovariate(200) + late)
        while self.world.now() < server.paused_until:
            await asyncio.sleep(server.paused_until - self.world.now() + 0.001 * self.world.random.random())
        result = server.run(script, key, *arguments)
        await asyncio.sleep(self.world.random.expovariate(200))
        answer.set_result(result)

    async def close(self, user) -> None:
        return None


class SimulatedFast(MemoryMetaStore):
    """`leases` is all that is asked of it."""

    def __init__(self, network: Network) -> None:
        super().__init__()
        self.network = network

    def leases(self, lease_s: float) -> Leases:
        leases = LEASE_MUTANTS.get(self.network.world.mutant or "", Leases)(self.network, "", lease_s)
        read = leases.read

        async def counted(resource_id):
            found = await read(resource_id)
            self.network.world.hits += isinstance(found, bytes)
            return found

        leases.read = counted
        return leases


class SimulatedSlow(MemoryMetaStore):
    """The truth, in no time at some moment of each call. A resource's version counts its changes, purges too."""

    authoritative = True

    def __init__(self, world: World, *, fails: bool = True) -> None:
        super().__init__()
        self.world, self.fails = world, fails
        self.history: dict[str, list[ResourceMeta | None]] = {rid: [None] for rid in RESOURCES}
        self.keys: dict[str, CommitResult] = {}
        self.left: dict[str, dict[str, int]] = {}  # the versions that a key left
        self.server_epoch, self.lease_s, self.since = None, 0.0, 0.0
        self.stalled = 0.0
        self.kept = Findings()

    async def findings(self):
        return self.kept

    async def keep_findings(self, findings):
        self.kept = findings

    async def pause(self) -> None:
        slow = self.world.random.random() < self.world.trouble / 3
        await asyncio.sleep(self.world.random.uniform(0, 3) if slow else self.world.random.expovariate(50))

    async def get(self, resource_id):
        _, meta = await self.get_fenced(resource_id)
        if meta is None:
            raise ResourceNotFound(resource_id)
        return meta

    async def get_fenced(self, resource_id):
        await self.pause()
        found = self._fence(), self.history[resource_id][-1]
        await self.pause()
        return found

    async def fence(self):
        await self.pause()
        return self._fence()

    def _fence(self) -> Fence:
        return Fence(self.server_epoch, self.lease_s, self.world.now() - self.since if self.since < math.inf else -1)

    async def adopt(self, server_epoch, lease_s, min_age_s):
        began = self.world.now()
        await asyncio.sleep(self.stalled or self.world.random.expovariate(50))  # it is seen later than it is changed
        aged = self.since <= began - min_age_s
        if self.server_epoch is None or ((self.server_epoch != server_epoch or self.lease_s < lease_s) and aged):
            since = began if self.world.mutant == "an age that begins too early" else math.inf
            self.since = -math.inf if self.server_epoch is None else since
            self.server_epoch, self.lease_s = server_epoch, max(self.lease_s, lease_s)
        await self.pause()
        now = self.world.now()
        await self.pause()
        if self.since == math.inf:
            self.since = now
        return await self.fence()

    async def done(self, key, *, peek=False):
        await self.pause()
        return self.keys.get(key)

    async def commit(self, changes, once=None):
        await self.pause()
        fate = self.world.random.random() if self.fails else 1.0
        if once.key in self.keys:
            raise AlreadyCommitted(self.keys[once.key])
        if fate < 0.05:
            raise VersionConflict("somebody else")
        if fate < 0.1:
            self.world.spawn(self._later(changes))
            raise OutcomeUnknown("perhaps")
        committed = self._apply(changes)
        self.keys[once.key] = CommitResult("", [None if change.purge else change.meta for change in committed])
        self.left[once.key] = {change.meta.resource_id: change.meta.version for change in committed}
        if self.world.random.random() < self.world.trouble / 2:
            raise Died
        await self.pause()
        return [change.meta for change in committed]

    def _apply(self, changes):
        committed = []
        for change in changes:
            states = self.history[change.meta.resource_id]
            meta = replace(change.meta, version=len(states))
            states.append(None if change.purge else meta)
            committed.append(replace(change, meta=meta))
        return committed

    async def _later(self, changes) -> None:
        await asyncio.sleep(self.world.random.uniform(0, 12))
        self._apply(changes)


SEEDS = range(int(os.environ.get("SIMULATIONS", "30")))
RESOURCES = ("a", "b")
META = ResourceMeta(
    resource_id="",
    version=0,
    nonce="",
    revision=1,
    total_revision_count=1,
    schema_version=1,
    status="stable",
    is_deleted=False,
    uid="0/x",
    data_hash="",
    encoding=Encoding.json,
    created_time=dt.datetime(2026, 1, 1, tzinfo=dt.UTC),
    updated_time=dt.datetime(2026, 1, 1, tzinfo=dt.UTC),
    created_by="",
    updated_by="",
)


class World:
    """One history. `stale` tells of the reads that should not have been."""

    def __init__(self, seed: int, url: str, mutant: str | None = None) -> None:
        self.random, self.url, self.mutant = random.Random(seed), url, mutant
        self.texts = {}
        self.replaced = LUA_MUTANTS.get(mutant or "", ("", ""))
        self.trouble = self.random.choice([0.0, 0.05, 0.2, 0.4])
        self.servers = [Server(self, number) for number in (1, 2)]
        self.acknowledged = dict.fromkeys(RESOURCES, 0)
        self.stale: list[str] = []
        self.hits = self.reads = 0
        self.tasks: set[asyncio.Task[None]] = set()
        self.forgotten: list[str] = []  # keys of writers who died

    def now(self) -> float:
        return asyncio.get_running_loop().time() if asyncio._get_running_loop() else 0.0

    def mutate(self, text: str) -> str:
        return text.replace(*self.replaced) if self.replaced[0] else text

    def spawn(self, work) -> None:
        task = asyncio.ensure_future(work)
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)

    async def run(self) -> None:
        self.slow = SimulatedSlow(self)
        networks = [Network(self) for _ in range(3)]
        kind = MUTANTS.get(self.mutant or "", FastSlowMetaStore)
        leases = (2.0, 2.0, 6.0) if self.random.random() < 0.3 else (2.0, 2.0, 2.0)
        stores = [
            kind(SimulatedFast(network), self.slow, lease_s=lease)
            for network, lease in zip(networks, leases, strict=True)
        ]
        async with asyncio.TaskGroup() as group:
            for name, store in enumerate(stores):
                group.create_task(self.write(name, store))
                for _ in range(2):
                    group.create_task(self.read(store))
            group.create_task(self.disturb(networks))
        await asyncio.gather(*self.tasks)
        self.close()

    def close(self) -> None:
        for server in self.servers:
            server.data.close()

    async def read(self, store) -> None:
        for _ in range(60):
            await asyncio.sleep(self.random.expovariate(3))
            rid = self.random.choice(RESOURCES)
            least = self.acknowledged[rid]
            try:
                version = (await store.get(rid)).version
            except ResourceNotFound:
                version = max(at for at, state in enumerate(self.slow.history[rid]) if state is None)
            self.reads += 1
            if version < least:
                self.stale.append(f"{self.now():.3f}: {rid} at {version}, {least} was acknowledged")

    async def write(self, name: int, store) -> None:
        for number in range(12):
            await asyncio.sleep(self.random.expovariate(0.7))
            if self.forgotten and self.random.random() < 0.7:
                key = self.forgotten.pop()
                with contextlib.suppress(AlreadyCommitted):  # what was done is told, by a look-up or by the commit
                    if self.random.random() < 0.5:
                        await store.done(key)
                    else:
                        changes = [_change(rid, purge=False) for rid in self.slow.left[key]]
                        await store.commit(changes, IdempotentCommit(key=key, request="", time=0, results=()))
                self.acknowledge(key)
                continue
            if self.random.random() < 0.2:
                await self.write_nothing(store)
                continue
            chosen = self.random.sample(RESOURCES, self.random.choice([1, 1, 2]))
            changes = [_change(rid, purge=self.random.random() < 0.15) for rid in chosen]
            key = f"{name} {number}"
            try:
                await store.commit(changes, IdempotentCommit(key=key, request="", time=0, results=()))
            except Died:
                self.forgotten.append(key)
            except CrudError:
                continue
            else:
                self.acknowledge(key)

    async def write_nothing(self, store) -> None:
        """What is found there is what was to be written."""
        rid = self.random.choice(RESOURCES)
        with contextlib.suppress(ResourceNotFound):
            version = (await store.get(rid)).version
            await store.confirm([rid])
            self.acknowledged[rid] = max(self.acknowledged[rid], version)

    def acknowledge(self, key: str) -> None:
        for rid, version in self.slow.left[key].items():
            self.acknowledged[rid] = max(self.acknowledged[rid], version)

    async def disturb(self, networks: list[Network]) -> None:
        kinds = self.random.choice(
            [
                ["flush", "restart", "restore", "pause", "cut", "join", "fail over", "split"],
                ["fail over", "split", "split"],
                ["restore", "pause", "cut", "join"],
            ]
        )
        for _ in range(14):
            await asyncio.sleep(self.random.expovariate(0.6))
            server, network = self.random.choice(self.servers), self.random.choice(networks)
            copy = server.copy()
            other = self.servers[1 - self.servers.index(server)]
            match self.random.choice(kinds):
                case "flush":
                    server.data.flushdb()
                case "restart":
                    server.restore({})
                    server.begin()
                case "restore":
                    await asyncio.sleep(self.random.uniform(0, 1.5))
                    server.restore(copy)
                    server.begin()
                case "pause":
                    server.paused_until = self.now() + self.random.uniform(0, 6)
                case "cut":
                    network.cut = True
                case "join":
                    for one in networks:
                        one.cut = False
                case "fail over":  # to a replica that lags; some processes go on with the old one
                    await asyncio.sleep(self.random.uniform(0, 1.5))
                    other.restore(copy)
                    other.begin()
                    for one in networks:
                        one.server = other if self.random.random() < 0.7 else server
                case "split":
                    network.server = other


def _change(rid: str, purge: bool) -> Change:
    return Change(meta=replace(META, resource_id=rid), record=None, index=None, expect="any", purge=purge)


class NeitherSettlesNorWaits(FastSlowMetaStore):
    async def _end_write(self, left, lease, *, wait=False):
        return None


class DoesNotWait(FastSlowMetaStore):
    async def _end_write(self, left, lease, *, wait=False):
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(0.7):
                await super()._end_write(left, lease)


class StoresInAnyLife(FastSlowMetaStore):
    def _in_use(self, server_epoch, fence):
        return True


class StoresInNewLives(FastSlowMetaStore):
    """A writer stores in a life that is in use now, but was not when it committed."""

    async def _end_write(self, left, lease, *, wait=False):
        self._settling = True
        await super()._end_write(left, lease, wait=wait)

    def _proven(self, server_epoch, fence):
        settling, self._settling = self._settling, False
        return self._in_use(server_epoch, fence) if settling else super()._proven(server_epoch, fence)


class TrustsNewLives(FastSlowMetaStore):
    def _proven(self, server_epoch, fence):
        return fence.server_epoch == server_epoch


class TrustsAnyLife(FastSlowMetaStore):
    def _proven(self, server_epoch, fence):
        return True


class ConfirmsNothing(FastSlowMetaStore):
    async def confirm(self, resource_ids):
        return None


class ForgetsWhatKeysLeft(FastSlowMetaStore):
    async def _end_write_of_key(self, done, resource_ids=()):
        return None


class MindsItsOwnLease(FastSlowMetaStore):
    def _seen(self, fence):
        return super()._seen(fence._replace(lease_s=self._lease_s))


MUTANTS = {
    kind.__name__: kind
    for kind in (
        NeitherSettlesNorWaits,
        DoesNotWait,
        StoresInAnyLife,
        TrustsNewLives,
        TrustsAnyLife,
        ForgetsWhatKeysLeft,
        ConfirmsNothing,
        MindsItsOwnLease,
    )
}
LUA_MUTANTS = {
    "another life counts": ("string.sub(text, 14, 93) ~= life", "false"),
    "a document has a lease of its own": (
        "string.sub(token, 1, 93) .. document",
        "string.format('%013.0f', now + lease) .. life .. document",
    ),
    "anybody's token will do": ("string.sub(token, 94) == nonce", "true"),
    "settling leaves tokens": (
        "local token = held(hash, nonce)\n  redis.call('DEL', F .. 'v:' .. hash, F .. 't:' .. hash)",
        "local token = held(hash, nonce)\n  redis.call('DEL', F .. 'v:' .. hash)",
    ),
    "settling leaves documents": (
        "redis.call('DEL', F .. 'v:' .. hash, F .. 't:' .. hash)",
        "redis.call('DEL', F .. 't:' .. hash)",
    ),
}


class TellsOneNonceTwice(Leases):
    """Every command of a process has the same nonce."""

    async def _send(self, script, arguments, *, retry=True):
        _, answer = await super()._send(script, lambda _: arguments(b"n" * 12), retry=retry)
        return b"n" * 12, answer


class TrustsUnheardMarks(Leases):
    """A writer settles with the token that it asked for, whether it was granted or not."""

    asked = b""

    async def _send(self, script, arguments, *, retry=True):
        def noted(nonce):
            self.asked = nonce
            return arguments(nonce)

        return await super()._send(script, noted, retry=retry)

    async def begin_write(self, resource_ids):
        try:
            return await super().begin_write(resource_ids)
        except StoreUnavailable:
            return Lease("".join(self._client.server.server_epoch) + "/" + self._location, self.asked)


LEASE_MUTANTS = {kind.__name__: kind for kind in (TellsOneNonceTwice, TrustsUnheardMarks)}
RARE = {"a document has a lease of its own", "TrustsUnheardMarks"}  # tested below


def on_virtual_time(work):
    with pytest.MonkeyPatch.context() as patch, asyncio.Runner(loop_factory=virtual_time.VirtualTimeLoop) as runner:
        patch.setattr(fast_slow, "time", types.SimpleNamespace(monotonic=runner.get_loop().time))
        return runner.run(work)


def simulate(seed: int, url: str, mutant: str | None = None) -> World:
    world = World(seed, url, mutant)
    on_virtual_time(world.run())
    return world


def test_whoever_reads_after_an_acknowledgement_sees_it(valkey):
    hits = 0
    for seed in SEEDS:
        world = simulate(seed, valkey)
        assert not world.stale, f"seed {seed}: {world.stale}"
        hits += world.hits
    assert hits > 20 * len(SEEDS)


@pytest.mark.parametrize("mutant", sorted({*MUTANTS, *LUA_MUTANTS, *LEASE_MUTANTS} - RARE))
def test_without_one_of_its_guards_it_is_stale(valkey, mutant):
    assert any(simulate(seed, valkey, mutant).stale for seed in range(400))


# What is too rare to be met by chance


def _two(
    url: str, *, kind: type[FastSlowMetaStore] = FastSlowMetaStore, mutant: str | None = None, apart: bool = False
):
    """Two processes, which use two servers if they are `apart`."""
    world = World(1, url, mutant)
    world.trouble = 0.0
    world.slow = slow = SimulatedSlow(world, fails=False)
    networks = [Network(world), Network(world)]
    networks[1].server = world.servers[1 if apart else 0]
    stores = [kind(SimulatedFast(network), slow) for network in networks]
    for store in stores:
        store._seal = b""  # they know the slow store
    return world, slow, stores


def _server_epoch(store) -> str:
    leases = store._leases
    return "".join(leases._client.server.server_epoch) + "/" + leases._location


async def _put(store, rid: str = "a") -> int:
    (meta,) = await store.commit(
        [_change(rid, purge=False)], IdempotentCommit(key=f"{os.urandom(8)}", request="", time=0, results=())
    )
    return meta.version


@pytest.mark.parametrize("kind", [FastSlowMetaStore, StoresInNewLives])
def test_a_writer_stores_nothing_in_a_life_that_came_into_use_after_its_commit(valkey, kind):
    async def history() -> tuple[int, int]:
        world, slow, (first, second) = _two(valkey, kind=kind, apart=True)
        await _put(first)
        await asyncio.sleep(10)
        settles = asyncio.Event()

        async def fence():
            await settles.wait()
            return await slow.fence()

        second._fences = types.SimpleNamespace(fence=fence, get_fenced=slow.get_fenced, adopt=slow.adopt)
        late = asyncio.create_task(_put(second))
        while slow.history["a"][-1].version != 2:
            await asyncio.sleep(0.01)
        acknowledged = await _put(first)
        await slow.adopt(_server_epoch(second), 2.0, 0)
        settles.set()
        await asyncio.sleep(0.5)
        seen = (await second.get("a")).version
        await late
        world.close()
        return acknowledged, seen

    acknowledged, seen = on_virtual_time(history())
    assert (seen < acknowledged) == (kind is StoresInNewLives)


@pytest.mark.parametrize("mutant", [None, "an age that begins too early"])
def test_the_age_of_a_life_begins_when_it_is_seen(valkey, mutant):
    async def history() -> tuple[int, int]:
        world, slow, (first, second) = _two(valkey, mutant=mutant, apart=True)
        await _put(first)
        await asyncio.sleep(10)
        slow.stalled = 5.0  # the database is slow to commit
        adoption = asyncio.create_task(slow.adopt(_server_epoch(second), 2.0, 0))
        await asyncio.sleep(4.9)
        await first.get("a")
        while slow.server_epoch != _server_epoch(second):
            await asyncio.sleep(0.01)
        slow.stalled = 0.0
        acknowledged = await _put(second)
        seen = (await first.get("a")).version
        await adoption
        world.close()
        return acknowledged, seen

    acknowledged, seen = on_virtual_time(history())
    assert (seen < acknowledged) == (mutant is not None)


@pytest.mark.parametrize("mutant", [None, "a document has a lease of its own"])
def test_a_document_ends_with_the_token_that_it_was_stored_upon(valkey, mutant):
    async def history() -> tuple[int, int]:
        world, slow, (reader, writer) = _two(valkey, mutant=mutant)
        await _put(writer)
        await asyncio.sleep(10)

        async def get_fenced(resource_id):
            found = await slow.get_fenced(resource_id)
            await asyncio.sleep(1.8)
            return found

        reader._fences = types.SimpleNamespace(get_fenced=get_fenced)
        filling = asyncio.create_task(reader.get("a"))
        await asyncio.sleep(0.2)
        writer._leases._client.cut = True
        acknowledged = await _put(writer)
        assert (await filling).version < acknowledged
        seen = (await reader.get("a")).version
        world.close()
        return acknowledged, seen

    acknowledged, seen = on_virtual_time(history())
    assert (seen < acknowledged) == (mutant is not None)


@pytest.mark.parametrize("mutant", [None, "TrustsUnheardMarks"])
def test_commands_that_arrive_when_all_is_over_store_nothing(valkey, mutant):
    async def history() -> tuple[int, int]:
        world, _, (first, second) = _two(valkey, mutant=mutant)
        await _put(second)
        held = []

        async def hold(_user, *command, **_limit):
            held.append(command)
            raise StoreUnavailable("no answer")

        first._leases._client.run_within = hold
        await _put(first)
        acknowledged = await _put(second)
        for command in held:  # a mark, and what was to settle it
            world.servers[0].run(*command)
        seen = (await second.get("a")).version
        world.close()
        assert len(held) == 2
        return acknowledged, seen

    acknowledged, seen = on_virtual_time(history())
    assert (seen < acknowledged) == (mutant is not None)


# Real processes, while everything goes wrong


class Way(TcpProxy):
    """A process's way to Redis, which leads where a test says."""

    def __init__(self, server: Valkey) -> None:
        super().__init__(server.url)
        self.server = server

    def redis_url(self) -> str:
        return self.server.url.replace(f":{self.server.port}/", f":{urlsplit(self.url).port}/")

    def lead_to_server(self, server: Valkey | None) -> None:
        self._to = ("127.0.0.1", 1 if server is None else server.port)
        self.cut()


class Processes:
    """Workers; `until` waits for what they say."""

    def __init__(self, tmp_path: Path, server: Valkey, dsn: str, lease_s: float, *, broken: bool = False) -> None:
        self.register = tmp_path / "register"
        self.register.write_bytes(bytes(worker.Register.SIZE))
        self.server, self.dsn, self.name, self.lease_s, self.broken = server, dsn, tmp_path.name, lease_s, broken
        self.stale: list[str] = []
        self.counts = [Counter() for _ in range(worker.PROCESSES)]
        self.news = asyncio.Condition()
        self.stack = contextlib.ExitStack()

    async def __aenter__(self):
        store = worker.store_of(self.server.url, self.dsn, self.name, self.lease_s)
        for at in range(worker.RESOURCES):
            await store.commit([worker.change_of(f"shared-{at}")])
        await store.close()
        self.ways = [self.stack.enter_context(Way(self.server)) for _ in self.counts]
        self.started = [
            await asyncio.create_subprocess_exec(
                sys.executable,
                "-m",
                "tests.stores.fast_slow_worker",
                json.dumps([at, way.redis_url(), self.dsn, self.name, self.lease_s, str(self.register), self.broken]),
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
            )
            for at, way in enumerate(self.ways)
        ]
        self.listeners = [asyncio.create_task(self.listen(at)) for at in range(len(self.started))]
        return self

    async def listen(self, at: int) -> None:
        async for line in self.started[at].stdout:
            said = json.loads(line)
            async with self.news:
                self.counts[at][said["what"]] += 1
                if "hits" in said:
                    self.counts[at]["hits"] = said["hits"]
                if said["what"] == "stale":
                    self.stale.append(f"process {at}: {said['was']}")
                self.news.notify_all()
        async with self.news:
            self.counts[at]["gone"] += 1
            self.news.notify_all()

    async def until(self, reached) -> None:
        async with asyncio.timeout(60), self.news:
            await self.news.wait_for(lambda: reached() or any(count["gone"] for count in self.counts))
        assert reached()

    async def go_on(self, **more: int) -> None:
        """Until each has done so much more."""
        least = [Counter({what: count[what] + number for what, number in more.items()}) for count in self.counts]
        await self.until(lambda: all(count >= goal for count, goal in zip(self.counts, least, strict=True)))

    async def __aexit__(self, *error) -> None:
        for process in self.started:
            if error[0] is None:
                process.stdin.close()
            else:
                process.kill()
        await asyncio.gather(*(process.wait() for process in self.started), *self.listeners)
        self.stack.close()


WORK = {"read": 1, "written": 1, "purged": 1}


@pytest.fixture
def servers(tmp_path) -> Iterator[list[Valkey]]:
    started = []
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
        started.append(Valkey(tmp_path / name))
        started[-1].start()
    yield started
    for server in started:
        server.stop()


async def test_four_processes_while_everything_goes_wrong(postgres, servers, tmp_path):
    one, other = servers
    async with Processes(tmp_path, one, postgres, 0.6) as processes:
        ways = processes.ways

        async def recovered() -> None:
            await processes.go_on(hits=20, **WORK)
            assert not processes.stale

        one.stop()  # SIGKILL
        await processes.go_on(**WORK)
        one.start()
        await recovered()
        with one.client() as client:
            for _ in range(5):
                client.flushall()
                await processes.go_on(**WORK)
        one.pause()
        await processes.go_on(**WORK)
        one.resume()
        await recovered()
        for way in (ways[0], ways[1]):  # cut off alone: what it writes the others must see, what they write it must see
            way.lead_to_server(None)
            await processes.go_on(**WORK)
            way.lead_to_server(one)
            await recovered()
        ways[2].hold()  # what it asks is done, and it hears nothing
        await processes.go_on(**WORK)
        ways[2].release()
        await recovered()
        for _ in range(2):
            dump = one.dump()
            await processes.go_on(written=1)
            one.restore(dump)
            await recovered()
        with TcpProxy(one.url) as replication:
            other.follow(one, urlsplit(replication.url).port)
            await processes.go_on(hits=20)
            replication.hold()
            await processes.go_on(written=1)
            one.stop()
            other.promote()
            for way in ways:
                way.lead_to_server(other)
            await recovered()
        one.start()
        with TcpProxy(other.url) as replication:
            one.follow(other, urlsplit(replication.url).port)
            await processes.go_on(hits=20)
            replication.hold()
            await processes.go_on(written=1)
            one.promote()
            for way in ways[1:]:
                way.lead_to_server(one)
            for _ in range(2):
                await processes.go_on(**WORK)  # the first one goes on with the old primary, which is alive
            ways[0].lead_to_server(one)
            await recovered()
    assert not processes.stale


async def test_the_processes_notice_what_is_stale(postgres, servers, tmp_path):
    async with Processes(tmp_path, servers[0], postgres, 5.0, broken=True) as processes:
        await processes.until(lambda: processes.stale)


# The same, one step at a time


@pytest.fixture
async def stores(postgres, tmp_path):
    """Makes stores that are one, as several processes have them."""
    made = []

    def make(server: Valkey | Way, lease_s: float, kind: type[FastSlowMetaStore] = FastSlowMetaStore):
        url = server.url if isinstance(server, Valkey) else server.redis_url()
        made.append(worker.store_of(url, postgres, tmp_path.name, lease_s, kind))
        return made[-1]

    yield make
    for store in made:
        await store.close()


@pytest.fixture(params=[True, False], ids=["lives count", "lives do not count"])
def lives(request, monkeypatch) -> bool:
    """Whether documents of another life are told from those of this one."""
    if not request.param:
        for name in ("READ", "FILL", "BEGIN_WRITE", "END_WRITE"):
            text = getattr(lease, name).text.replace(*LUA_MUTANTS["another life counts"])
            script = Script(text, hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest())
            monkeypatch.setattr(lease, name, script)
    return request.param


async def _write(store, before: ResourceMeta | None = None) -> ResourceMeta:
    (meta,) = await store.commit([worker.change_of("r", before)])
    return meta


async def test_a_dump_from_before_a_write_brings_nothing_back(servers, stores, lives):
    server = servers[0]
    store = stores(server, 30.0)
    old = await _write(store)
    assert await store.get("r") == old  # is filled in
    dump = server.dump()
    new = await _write(store, old)
    server.restore(dump)
    assert await store.get("r") == (new if lives else old)


async def test_a_replica_that_lags_brings_nothing_back(servers, stores, lives):
    primary, replica = servers
    with Way(primary) as way, TcpProxy(primary.url) as replication:
        replica.follow(primary, urlsplit(replication.url).port)
        store = stores(way, 30.0)
        old = await _write(store)
        await store.get("r")
        with primary.client() as client:
            assert client.execute_command("WAIT", 1, 10_000) == 1
        replication.hold()
        new = await _write(store, old)
        primary.stop()
        replica.promote()
        way.lead_to_server(replica)
        assert await store.get("r") == (new if lives else old)


@pytest.mark.parametrize("kind", [FastSlowMetaStore, TrustsNewLives])
async def test_who_stays_with_an_old_primary_reads_nothing_old(servers, stores, kind):
    primary, promoted = servers
    promoted.follow(primary, primary.port)
    lease_s = 2.0 if kind is FastSlowMetaStore else 20.0
    first, second = stores(primary, lease_s), stores(promoted, lease_s, kind)
    old = await _write(first)
    promoted.promote()
    assert await first.get("r") == await second.get("r") == old  # the second one has the life of its server adopted
    new = await _write(second, old)
    assert await first.get("r") == (new if kind is FastSlowMetaStore else old)
    assert await second.degradations() == []
    assert "another Redis" in (await first.degradations())[0]


@pytest.mark.parametrize("kind", [FastSlowMetaStore, DoesNotWait])
async def test_a_writer_that_is_cut_off_waits_and_a_reader_that_is_does_not(servers, stores, kind):
    with Way(servers[0]) as way:
        lease_s = 2.0 if kind is FastSlowMetaStore else 20.0
        reader, writer = stores(servers[0], lease_s), stores(way, lease_s, kind)
        old = await _write(reader)
        way.lead_to_server(None)
        assert await reader.get("r") == await writer.get("r") == old
        new = await _write(writer, old)
        assert await writer.get("r") == new
        assert await reader.get("r") == (new if kind is FastSlowMetaStore else old)
        (impaired,) = await writer.degradations()
        assert "cannot be reached" in impaired
        assert servers[0].key not in impaired
        way.lead_to_server(servers[0])
        assert await writer.degradations() == []
        await writer.health()


async def test_a_paused_server_holds_nobody_up_for_long(servers, stores):
    first, second = stores(servers[0], 1.0), stores(servers[0], 1.0)
    old = await _write(first)
    assert await second.get("r") == old
    servers[0].pause()
    new = await _write(first, old)
    assert await second.get("r") == new
    servers[0].resume()
    assert await second.get("r") == await first.get("r") == new


async def test_a_writer_who_gives_up_waiting_has_settled_all_the_same(servers, stores):
    first, second = stores(servers[0], 30.0), stores(servers[0], 30.0)
    old = await _write(first)
    assert await second.get("r") == old
    committing, goes_on = asyncio.Event(), asyncio.Event()
    commit = first._slow.commit

    async def slowly(changes, once=None):
        committed = await commit(changes, once)
        committing.set()
        await goes_on.wait()
        return committed

    first._slow.commit = slowly
    writing = asyncio.create_task(_write(first, old))
    await committing.wait()
    writing.cancel()
    with pytest.raises(asyncio.CancelledError):
        await writing
    settled = asyncio.Event()
    settle = first._leases.end_write

    async def told(*arguments):
        server_epoch = await settle(*arguments)
        settled.set()
        return server_epoch

    first._leases.end_write = told
    goes_on.set()
    await settled.wait()
    assert (await second.get("r")).version == 2


async def test_a_hit_asks_nobody_else_and_a_miss_fills_in(servers, stores, monkeypatch):
    first, second = stores(servers[0], 30.0), stores(servers[0], 30.0)
    meta = await _write(first)  # had the life adopted; from now on writers store too
    meta = await _write(first, meta)

    async def never(*_):
        raise AssertionError("the slow store was asked")

    monkeypatch.setattr(PostgresMetaStore, "get_fenced", never)
    monkeypatch.setattr(PostgresMetaStore, "get", never)
    assert await second.get("r") == meta
    monkeypatch.undo()
    with servers[0].client() as client:
        client.flushall()
    assert await second.get("r") == meta
    monkeypatch.setattr(PostgresMetaStore, "get", never)
    monkeypatch.setattr(PostgresMetaStore, "get_fenced", never)
    assert await first.get("r") == meta


async def test_two_slow_stores_behind_one_prefix_read_nothing_of_each_other(servers, postgres, tmp_path):
    """Two applications on one Redis, as by mistake."""
    ours, theirs = (
        worker.store_of(servers[0].url, postgres, name, 30.0, prefix="shared:")
        for name in (tmp_path.name, f"{tmp_path.name}2")
    )
    meta = await _write(ours, await _write(ours))
    assert await ours.get("r") == meta
    with pytest.raises(ResourceNotFound):
        await theirs.get("r")
    other = await _write(theirs)
    assert (await ours.get("r"), await theirs.get("r")) == (meta, other)
    for store in (ours, theirs):
        await store.close()


async def test_what_cannot_be_decoded_is_a_miss(servers, stores):
    store = stores(servers[0], 30.0)
    meta = await _write(store)
    await store.get("r")
    with servers[0].client() as client:
        (key,) = client.keys("*fast:v:*")
        value = client.get(key)
        client.set(key, value[:93] + b"\x81\xa1x\x01")
    assert await store.get("r") == meta


async def test_a_server_that_does_not_say_who_it_is_is_not_believed(servers, stores):
    server = servers[0]
    with server.client() as client:
        client.acl_setuser(
            "default", enabled=True, passwords=[f"+{server.key}"], categories=["+@all"], commands=["-info"], keys=["*"]
        )
    store = stores(server, 0.3)
    old = await _write(store)
    new = await _write(store, old)
    assert await store.get("r") == new
    assert "run_id" in (await store.degradations())[0]
    with server.client() as client:
        assert client.keys("*fast:*") == []


async def test_a_cluster_will_do_where_it_shows_one_address(tmp_path, stores, monkeypatch):
    """As ElastiCache Serverless does. All keys of a store hash to one slot."""
    directory = tmp_path / "cluster"
    directory.mkdir()
    server = Valkey(directory, cluster_enabled="yes")
    server.start()
    try:
        with server.client() as client:
            client.execute_command("CLUSTER", "ADDSLOTSRANGE", 0, 16383)
            async with asyncio.timeout(30):
                while "cluster_state:ok" not in str(client.execute_command("CLUSTER", "INFO")):
                    await asyncio.sleep(0.01)
        store = stores(server, 30.0)
        meta = await _write(store, await _write(store))
        assert await store.degradations() == []
        monkeypatch.delattr(PostgresMetaStore, "get")  # a hit asks nobody else
        monkeypatch.setattr(PostgresMetaStore, "get_fenced", None)
        assert await store.get("r") == meta
        await store.close()
    finally:
        server.stop()


async def test_a_full_server_is_only_slower(servers, stores):
    with servers[0].client() as client:
        client.config_set("maxmemory", "1")
    store = stores(servers[0], 0.3)
    old = await _write(store)
    new = await _write(store, old)
    assert await store.get("r") == new


async def test_tables_of_an_older_program_are_completed(postgres, servers, tmp_path, stores):
    old = PostgresMetaStore(postgres, table_name=tmp_path.name)
    await old.health()
    async with await psycopg.AsyncConnection.connect(postgres, autocommit=True) as connection:
        state = old._schema.names["state"]
        await connection.execute(f"ALTER TABLE {state} DROP fast_life, DROP fast_since, DROP fast_lease")
    meta = await _write(old)
    store = stores(servers[0], 1.0)
    assert await store.get("r") == meta
    assert (await store._fences.fence()).server_epoch is not None
    await old.close()


@pytest.mark.parametrize("lease_s", [0, -1.0, 61.0])
def test_what_cannot_be_put_together_is_refused(valkey, postgres, lease_s):
    fast, slow = RedisMetaStore(valkey), PostgresMetaStore(postgres)
    with pytest.raises(ConfigError, match="lease_s"):
        FastSlowMetaStore(fast, slow, lease_s=lease_s)
    with pytest.raises(ConfigError, match="cannot be a fast_store"):
        FastSlowMetaStore(MemoryMetaStore(), slow)
    with pytest.raises(ConfigError, match="cannot be a slow_store"):
        FastSlowMetaStore(fast, MemoryMetaStore())
