"""A simulation of several processes with a FastSlowMetaStore, on virtual time.

The scripts are the real ones, and run on a real server. Clocks, server epochs, networks and the slow store are
simulated. Each seed gives one history. A read that begins after a commit was acknowledged must return the state of this
commit or a later one.
"""

from __future__ import annotations

import asyncio
import contextlib
import datetime as dt
import math
import os
import random
import re
import types

import pytest
import redis
from msgspec.structs import replace

from app.autocrud import Encoding
from app.autocrud.errors import (
    CrudError,
    OutcomeUnknown,
    ResourceNotFound,
    StoreUnavailable,
    VersionConflict,
)
from app.autocrud.resource_manager.backends.redis.client import ReplyLost
from app.autocrud.resource_manager.backends.redis.lease import Leases
from app.autocrud.resource_manager.backends.redis.script_parts import Script
from app.autocrud.resource_manager.basic import (
    AlreadyCommitted,
    Change,
    CommitResult,
    Findings,
    IdempotentCommit,
    ResourceMeta,
)
from app.autocrud.resource_manager.meta_store import fast_slow
from app.autocrud.resource_manager.meta_store.fast_slow import FastSlowMetaStore, Fence
from app.autocrud.resource_manager.meta_store.simple import MemoryMetaStore
from tests import virtual_time
from tests.stores.fast_slow_mutants import LEASE_MUTANTS, LUA_MUTANTS, MUTANTS


class Died(Exception):
    """The process of a writer ended after its commit, before the acknowledgement."""


class Server:
    """A simulated Redis server: a database of a real server, with a simulated epoch and a simulated clock."""

    def __init__(self, world: World, number: int) -> None:
        self.world = world
        self.data = redis.Redis.from_url(world.url.rpartition("/")[0] + f"/{number}")
        self.data.flushdb()
        self.paused_until = 0.0
        # The clock of a server may be wrong, but its speed is right.
        self.offset = world.random.choice([0, world.random.uniform(-1e6, 1e6)])
        self.begin()

    def begin(self) -> None:
        """Begin a new server epoch, like a server that restarts."""
        self.server_epoch = [f"{self.world.random.getrandbits(159) + 1:040x}" for _ in range(2)]

    def run(self, script: Script, key: str, *arguments):
        """Run a script with the simulated clock and epoch, which are passed as additional keys."""
        text = self.world.texts.get(script.text)
        if text is None:
            text = script.text.replace("told(said, 'run_id')", "KEYS[2]")
            text = text.replace("told(said, 'master_replid')", "KEYS[3]")
            text = text.replace("redis.call('TIME')", "{KEYS[4], KEYS[5]}")
            text = re.sub(r"'PX', [a-z()]+\)", "'PX', 3600000)", text)  # entries expire by the time in their value only
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
    """The network between a process and the servers. It delays commands, and loses commands and replies."""

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
        if fate < 0.4:  # the connection is cut, before or after the command was sent
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
    """A fast store, of which only `leases` is used. Counts cache hits."""

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
    """A linearizable slow store. The version of a resource counts its changes, including purges."""

    authoritative = True

    def __init__(self, world: World, *, fails: bool = True) -> None:
        super().__init__()
        self.world, self.fails = world, fails
        self.history: dict[str, list[ResourceMeta | None]] = {rid: [None] for rid in RESOURCES}
        self.keys: dict[str, CommitResult] = {}
        # The versions that a commit wrote, by its idempotency key and by resource id.
        self.left: dict[str, dict[str, int]] = {}
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
        # The change becomes visible only after this time.
        await asyncio.sleep(self.stalled or self.world.random.expovariate(50))
        aged = self.since <= began - min_age_s
        if self.server_epoch is None or ((self.server_epoch != server_epoch or self.lease_s < lease_s) and aged):
            since = began if self.world.mutant == "the age of an epoch begins too early" else math.inf
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
            raise VersionConflict("another writer was faster")
        if fate < 0.1:
            self.world.spawn(self._later(changes))
            raise OutcomeUnknown("the commit may still happen")
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
    """One simulated history. `stale` describes each stale read."""

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
        self.forgotten: list[str] = []  # idempotency keys of writers that died

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
                with contextlib.suppress(AlreadyCommitted):  # the look-up or the commit returns the earlier result
                    if self.random.random() < 0.5:
                        await store.done(key)
                    else:
                        changes = [unconditional_change(rid, purge=False) for rid in self.slow.left[key]]
                        await store.commit(changes, IdempotentCommit(key=key, request="", time=0, results=()))
                self.acknowledge(key)
                continue
            if self.random.random() < 0.2:
                await self.write_nothing(store)
                continue
            chosen = self.random.sample(RESOURCES, self.random.choice([1, 1, 2]))
            changes = [unconditional_change(rid, purge=self.random.random() < 0.15) for rid in chosen]
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
        """Confirm a state that is stored already, like a write that changes nothing."""
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
                case "fail over":  # to a replica that lags; some processes keep using the old primary
                    await asyncio.sleep(self.random.uniform(0, 1.5))
                    other.restore(copy)
                    other.begin()
                    for one in networks:
                        one.server = other if self.random.random() < 0.7 else server
                case "split":
                    network.server = other


def unconditional_change(rid: str, purge: bool) -> Change:
    return Change(meta=replace(META, resource_id=rid), record=None, index=None, expect="any", purge=purge)


def on_virtual_time(work):
    with pytest.MonkeyPatch.context() as patch, asyncio.Runner(loop_factory=virtual_time.VirtualTimeLoop) as runner:
        patch.setattr(fast_slow, "time", types.SimpleNamespace(monotonic=runner.get_loop().time))
        return runner.run(work)


def simulate(seed: int, url: str, mutant: str | None = None) -> World:
    world = World(seed, url, mutant)
    on_virtual_time(world.run())
    return world
