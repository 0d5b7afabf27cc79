"""The protocol of FastSlowMetaStore on virtual time, with and without its safeguards."""

from __future__ import annotations

import asyncio
import os
import types

import pytest

from app.autocrud.errors import StoreUnavailable
from app.autocrud.resource_manager.basic import IdempotentCommit
from app.autocrud.resource_manager.meta_store.fast_slow import FastSlowMetaStore
from tests.stores.fast_slow_mutants import LEASE_MUTANTS, LUA_MUTANTS, MUTANTS, RARE, StoresInNewEpochs
from tests.stores.fast_slow_simulation import (
    SEEDS,
    Network,
    SimulatedFast,
    SimulatedSlow,
    World,
    on_virtual_time,
    simulate,
    unconditional_change,
)


def test_a_read_sees_every_commit_that_was_acknowledged_before(valkey):
    hits = 0
    for seed in SEEDS:
        world = simulate(seed, valkey)
        assert not world.stale, f"seed {seed}: {world.stale}"
        hits += world.hits
    assert hits > 20 * len(SEEDS)


@pytest.mark.parametrize("mutant", sorted({*MUTANTS, *LUA_MUTANTS, *LEASE_MUTANTS} - RARE))
def test_without_one_safeguard_some_read_is_stale(valkey, mutant):
    assert any(simulate(seed, valkey, mutant).stale for seed in range(400))


# Histories that are too rare for random seeds


def two_processes(
    url: str, *, kind: type[FastSlowMetaStore] = FastSlowMetaStore, mutant: str | None = None, apart: bool = False
):
    """Return a simulation, its slow store, and the stores of two processes. If `apart`, they use different servers."""
    world = World(1, url, mutant)
    world.trouble = 0.0
    world.slow = slow = SimulatedSlow(world, fails=False)
    networks = [Network(world), Network(world)]
    networks[1].server = world.servers[1 if apart else 0]
    stores = [kind(SimulatedFast(network), slow) for network in networks]
    for store in stores:
        store._store_id_prefix = b""  # they have read the fence already
    return world, slow, stores


def server_epoch_of(store) -> str:
    leases = store._leases
    return "".join(leases._client.server.server_epoch) + "/" + leases._location


async def write_one(store, rid: str = "a") -> int:
    (meta,) = await store.commit(
        [unconditional_change(rid, purge=False)],
        IdempotentCommit(key=f"{os.urandom(8)}", request="", time=0, results=()),
    )
    return meta.version


@pytest.mark.parametrize("kind", [FastSlowMetaStore, StoresInNewEpochs])
def test_a_writer_stores_nothing_in_an_epoch_that_came_into_use_after_its_commit(valkey, kind):
    async def history() -> tuple[int, int]:
        world, slow, (first, second) = two_processes(valkey, kind=kind, apart=True)
        await write_one(first)
        await asyncio.sleep(10)
        may_end_write = asyncio.Event()

        async def fence():
            await may_end_write.wait()
            return await slow.fence()

        second._fences = types.SimpleNamespace(fence=fence, get_fenced=slow.get_fenced, adopt=slow.adopt)
        late = asyncio.create_task(write_one(second))
        while slow.history["a"][-1].version != 2:
            await asyncio.sleep(0.01)
        acknowledged = await write_one(first)
        await slow.adopt(server_epoch_of(second), 2.0, 0)
        may_end_write.set()
        await asyncio.sleep(0.5)
        seen = (await second.get("a")).version
        await late
        world.close()
        return acknowledged, seen

    acknowledged, seen = on_virtual_time(history())
    assert (seen < acknowledged) == (kind is StoresInNewEpochs)


@pytest.mark.parametrize("mutant", [None, "the age of an epoch begins too early"])
def test_the_age_of_an_epoch_begins_when_every_process_sees_it(valkey, mutant):
    async def history() -> tuple[int, int]:
        world, slow, (first, second) = two_processes(valkey, mutant=mutant, apart=True)
        await write_one(first)
        await asyncio.sleep(10)
        slow.stalled = 5.0  # the database is slow to commit
        adoption = asyncio.create_task(slow.adopt(server_epoch_of(second), 2.0, 0))
        await asyncio.sleep(4.9)
        await first.get("a")
        while slow.server_epoch != server_epoch_of(second):
            await asyncio.sleep(0.01)
        slow.stalled = 0.0
        acknowledged = await write_one(second)
        seen = (await first.get("a")).version
        await adoption
        world.close()
        return acknowledged, seen

    acknowledged, seen = on_virtual_time(history())
    assert (seen < acknowledged) == (mutant is not None)


@pytest.mark.parametrize("mutant", [None, "an entry outlives its lease"])
def test_an_entry_expires_with_the_lease_under_which_it_was_stored(valkey, mutant):
    async def history() -> tuple[int, int]:
        world, slow, (reader, writer) = two_processes(valkey, mutant=mutant)
        await write_one(writer)
        await asyncio.sleep(10)

        async def get_fenced(resource_id):
            found = await slow.get_fenced(resource_id)
            await asyncio.sleep(1.8)
            return found

        reader._fences = types.SimpleNamespace(get_fenced=get_fenced)
        filling = asyncio.create_task(reader.get("a"))
        await asyncio.sleep(0.2)
        writer._leases._client.cut = True
        acknowledged = await write_one(writer)
        assert (await filling).version < acknowledged
        seen = (await reader.get("a")).version
        world.close()
        return acknowledged, seen

    acknowledged, seen = on_virtual_time(history())
    assert (seen < acknowledged) == (mutant is not None)


@pytest.mark.parametrize("mutant", [None, "TrustsUngrantedLeases"])
def test_commands_that_arrive_after_a_later_commit_store_nothing(valkey, mutant):
    async def history() -> tuple[int, int]:
        world, _, (first, second) = two_processes(valkey, mutant=mutant)
        await write_one(second)
        held = []

        async def hold(_user, *command, **_limit):
            held.append(command)
            raise StoreUnavailable("no answer")

        first._leases._client.run_within = hold
        await write_one(first)
        acknowledged = await write_one(second)
        for command in held:  # BEGIN_WRITE and END_WRITE
            world.servers[0].run(*command)
        seen = (await second.get("a")).version
        world.close()
        assert len(held) == 2
        return acknowledged, seen

    acknowledged, seen = on_virtual_time(history())
    assert (seen < acknowledged) == (mutant is not None)
