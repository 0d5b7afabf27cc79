"""The protocol of FastSlowMetaStore on virtual time, with and without its guards."""

from __future__ import annotations

import asyncio
import os
import types

import pytest

from app.autocrud.errors import (
    StoreUnavailable,
)
from app.autocrud.resource_manager.basic import (
    IdempotentCommit,
)
from app.autocrud.resource_manager.meta_store.fast_slow import FastSlowMetaStore
from tests.stores.fast_slow_mutants import LEASE_MUTANTS, LUA_MUTANTS, MUTANTS, RARE, StoresInNewLives
from tests.stores.fast_slow_simulation import (
    SEEDS,
    Network,
    SimulatedFast,
    SimulatedSlow,
    World,
    _change,
    on_virtual_time,
    simulate,
)


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
