"""Packs: small bodies of an import share objects. K1 to K3 of `packs`, and M4 of `sweeping`."""

from __future__ import annotations

import asyncio
import random
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from uuid_utils import uuid7

from app.autocrud.errors import StoreUnavailable
from app.autocrud.resource_manager.backends.s3.memory_object_store import (
    DROPPED,
    FALSE_CONFLICT,
    LOST_ANSWER,
    Call,
    InjectedFault,
    MemoryObjectStore,
)
from app.autocrud.resource_manager.contract.packs import StoredPack
from app.autocrud.resource_manager.resource_store import packs as packs_module
from app.autocrud.resource_manager.resource_store.packs import (
    BODY_BYTES,
    PACK_BYTES,
    PADDING,
    PackAllotment,
    Packs,
    Place,
    place_of,
    places_by_pack,
)
from app.autocrud.resource_manager.resource_store.s3 import S3ResourceStore
from app.autocrud.resource_manager.storage.sweeping import Sweep, _PackSweep
from tests import virtual_time


def new_uid() -> str:
    return f"0/{uuid7()}"


# Places


def allotted(bodies: list[bytes]) -> list[str]:
    allotment = PackAllotment(new_uid)
    return [allotment.uid_for(body) for body in bodies]


@given(st.lists(st.binary(max_size=40) | st.integers(0, PACK_BYTES).map(lambda size: b"x" * size), max_size=40))
def test_bodies_lie_one_after_the_other_in_packs(bodies):
    uids = allotted(bodies)
    assert len(set(uids)) == len(uids)
    places = [place_of(uid) for uid in uids]
    for body, place in zip(bodies, places, strict=True):
        assert (place is None) == (len(body) > BODY_BYTES or body[:1] in (b"", b"\0"))
        assert place is None or place.end - place.start == len(body)
    for of_pack in places_by_pack(uids).values():
        assert [place.start for place in of_pack] == [0, *(place.end for place in of_pack[:-1])]
        assert of_pack[-1].end <= PACK_BYTES


def test_a_pack_has_fewer_bodies_than_the_padding():
    uids = allotted([b"{}"] * (2 * PADDING))
    sizes = [len(places) for places in places_by_pack(uids).values()]
    assert sizes == [PADDING - 1, PADDING - 1, 2]


def test_each_batch_has_packs_of_its_own():
    allotment = PackAllotment(new_uid)
    first = allotment.uid_for(b"{}")
    allotment.end_batch()
    assert place_of(first).pack != place_of(allotment.uid_for(b"{}")).pack


@pytest.mark.parametrize("behind", ["", ".", ".0-0", ".01-2", ".1-2x", ".1", "/.1-2"])
def test_other_uids_have_no_place(behind):
    assert place_of(new_uid() + behind) is None


# Edits


def stored(count: int, draw: random.Random) -> dict[Place, bytes]:
    bodies, start, pack = {}, 0, new_uid()
    for number in range(count):
        body = f"{{{number}:{'x' * draw.randrange(300)}}}".encode()
        bodies[Place(pack, start, start + len(body))] = body
        start += len(body)
    return bodies


async def check(packs: Packs, objects: MemoryObjectStore, bodies: dict[Place, bytes], left: set[Place]) -> None:
    """Check that exactly these bodies are left, and no byte of another one."""
    (pack,) = {place.pack for place in bodies}
    found = await packs.get(list(bodies))
    assert {place for place, body in zip(bodies, found, strict=True) if body is not None} == left
    assert all(body in (None, bodies[place]) for place, body in zip(bodies, found, strict=True))
    listed = await packs.older_than(1)
    assert listed == ([StoredPack(pack, len(left))] if left else [])
    for stored in objects.objects.values():
        expected = bytearray(len(stored.body))
        for place in left:
            expected[place.start : place.end] = bodies[place]
        assert stored.body == expected


async def test_a_part_of_a_pack_does_not_replace_the_pack():
    objects = MemoryObjectStore()
    packs, bodies = Packs(objects, "data/"), stored(3, random.Random(2))
    first, *rest = bodies
    await packs.put(first.pack, bodies)
    with pytest.raises(ValueError, match="is not the place of a body"):
        await packs.put(first.pack, {place: bodies[place] for place in rest})
    await check(packs, objects, bodies, set(bodies))


@given(st.randoms(use_true_random=False))
def test_removed_bodies_leave_no_byte_and_the_others_stay(draw):
    async def main() -> None:
        objects = MemoryObjectStore()
        packs, bodies = Packs(objects, "data/"), stored(draw.randrange(1, 20), draw)
        (pack,) = {place.pack for place in bodies}
        await packs.put(pack, bodies)
        left = set(bodies)
        await check(packs, objects, bodies, left)
        for _ in range(6):
            some = draw.sample(list(bodies), draw.randint(1, min(4, len(bodies))))
            if draw.random() < 0.7:
                await packs.remove(some)
                left -= set(some)
            else:
                await packs.retain(pack, kept := [place for place in sorted(left) if draw.random() < 0.8])
                left &= set(kept)
            await check(packs, objects, bodies, left)

    asyncio.run(main())


def test_a_pack_is_deleted_with_its_last_body():
    async def main() -> None:
        objects = MemoryObjectStore()
        packs, bodies = Packs(objects, "data/"), stored(3, random.Random(1))
        await packs.put(next(iter(bodies)).pack, bodies)
        await packs.remove(list(bodies)[:2])
        assert len(objects.objects) == 1
        await packs.remove(list(bodies)[2:])
        assert not objects.objects
        await packs.remove(list(bodies))  # no error
        assert await packs.get(list(bodies)) == [None] * 3

    asyncio.run(main())


@pytest.mark.parametrize("seed", range(60))
def test_processes_that_remove_bodies_of_one_pack_at_once(seed):
    """Every answer may be lost, and every PUT may arrive late."""
    draw = random.Random(seed)

    async def main() -> None:
        objects = MemoryObjectStore()
        packs, bodies = Packs(objects, "data/"), stored(24, draw)
        await packs.put(next(iter(bodies)).pack, bodies)
        objects.latency = lambda _: draw.expovariate(20)

        def fault(call: Call) -> InjectedFault | None:
            if draw.random() >= 0.3:
                return None
            late = InjectedFault(late=draw.expovariate(1))
            return draw.choice([DROPPED, LOST_ANSWER, late, FALSE_CONFLICT]) if call.op == "put_if" else DROPPED

        objects.fault = fault
        places = list(bodies)
        draw.shuffle(places)
        kept, rest = set(places[:8]), places[8:]

        async def remove(some: list[Place]) -> None:
            while True:
                try:
                    await packs.remove(some)
                    return
                except StoreUnavailable:
                    await asyncio.sleep(0.1)

        tasks = [remove(rest[at : at + 4]) for at in range(0, 16, 4)]
        tasks += [remove(rest[at : at + 6]) for at in (1, 7)]
        await asyncio.gather(*tasks)
        objects.fault = lambda _: None
        await check(packs, objects, bodies, kept)
        await asyncio.sleep(60)  # what is late arrives
        await check(packs, objects, bodies, kept)

    virtual_time.run(main())


async def test_removals_that_wait_for_one_pack_share_its_edits():
    objects = MemoryObjectStore()
    packs, bodies = Packs(objects, "data/"), stored(300, random.Random(1))
    await packs.put(next(iter(bodies)).pack, bodies)
    objects.latency = lambda _: 0.05
    removals = [asyncio.create_task(packs.remove([place])) for place in list(bodies)[:200]]
    await asyncio.sleep(0.01)
    removals[0].cancel()  # the one that edits
    removals[1].cancel()
    results = await asyncio.gather(*removals, return_exceptions=True)
    assert [result for result in results if result is not None] == results[:2]
    assert objects.requests["put_if"] <= 2
    objects.latency = lambda _: 0.0
    found = await packs.get(list(bodies))
    assert not any(found[2:200])
    assert all(found[200:])


async def test_removals_that_wait_for_one_pack_fail_together(monkeypatch):
    monkeypatch.setattr(packs_module, "MAX_ATTEMPTS", 2)
    objects = MemoryObjectStore()
    packs, bodies = Packs(objects, "data/"), stored(30, random.Random(1))
    await packs.put(next(iter(bodies)).pack, bodies)
    objects.fault = lambda call: DROPPED if call.op == "put_if" else None
    removals = await asyncio.gather(*(packs.remove([place]) for place in list(bodies)[:20]), return_exceptions=True)
    assert all(isinstance(error, StoreUnavailable) for error in removals)
    assert objects.requests["put_if"] <= 4
    objects.fault = lambda _: None
    await packs.remove(list(bodies)[:20])
    assert [body is None for body in await packs.get(list(bodies))] == [True] * 20 + [False] * 10


# Stores and sweeps


async def test_bodies_of_one_pack_take_one_request():
    objects = MemoryObjectStore()
    store = S3ResourceStore("b", prefix="data/", object_store=objects)
    bodies = [b'{"n":%d}' % number for number in range(50)] + [b"\0", b"y" * (BODY_BYTES + 1)]
    allotment = store.uid_allotment(new_uid)
    uids = [allotment.uid_for(body) for body in bodies]
    infos: list[Any] = [type("Info", (), {"uid": uid}) for uid in uids]
    await store.put_many(list(zip(infos, bodies, strict=True)))
    assert objects.requests == {"put": 3, "get": 1}  # one part of the first pack
    objects.requests.clear()
    assert await store.get_many([*uids, uids[3]]) == [*bodies, bodies[3]]
    assert objects.requests["get"] == 3
    assert await store.get(uids[7]) == bodies[7]
    async with store.snapshot() as snapshot:
        await store.delete([uids[3], uids[-1]])
        expected = [None if at in (3, 51) else body for at, body in enumerate(bodies)]
        assert await snapshot.bodies(uids) == expected
    assert await store.older_than(1) == [uids[50]]
    assert [pack.bodies for pack in await store.packs_older_than(1)] == [49]
    assert await store.packs_older_than(0) == []


async def test_packs_are_listed_in_pages():
    objects = MemoryObjectStore()
    packs = Packs(objects, "data/")
    names = sorted(f"{generation}/{uuid7()}" for generation in (0, 1, 2, 9, 10, 11))
    for name in names:
        await packs.put(name, {Place(name, 0, 2): b"{}"})
    for key in ("data/packs/x", "data/packs/0/x.pack", f"data/packs/00/{uuid7()}.pack", f"data/{uuid7()}.pack"):
        await objects.put(key, b"other")
    old = [name for name in names if int(name.partition("/")[0]) < 10]
    found, after = [], ""
    while page := await packs.older_than(10, after, 2):
        found += [pack.name for pack in page]
        after = found[-1]
    assert found == old


@pytest.mark.parametrize("packed", [False, True])
async def test_a_sweep_keeps_what_is_published_while_it_looks(packed):
    """An import publishes its records, and removes its pin, after the sweep has looked for references."""
    body, named = (f"0/{uuid7()}", set[str]())
    pinned, removed = True, []

    class Stores:
        async def generation(self) -> int:
            return 5

        async def advance_generation(self) -> int:
            return 5

        async def unreferenced(self, uids: list[str]) -> list[str]:
            return [uid for uid in uids if uid not in named]

        async def packs_with_orphans(self, packs: list[StoredPack]) -> dict[str, list[str]]:
            return {pack.name: [] for pack in packs if pack.name not in named}

        async def add_pin(self, pin: str) -> None: ...

        async def renew_pin(self, pin: str) -> bool: ...

        async def remove_pin(self, pin: str) -> bool: ...

        async def has_pins(self) -> bool:
            nonlocal pinned
            named.add(body)
            pinned = False
            return pinned

        async def older_than(self, generation: int, after: str = "", limit: int = 1000) -> list[str]:
            return [] if packed or after else [body]

        def uid_allotment(self, new_uid: Any) -> Any: ...

        async def packs_older_than(self, generation: int, after: str = "", limit: int = 1000) -> list[StoredPack]:
            return [StoredPack(body, 1)] if packed else []

        async def retain_in_pack(self, pack: str, uids: list[str]) -> None:
            removed.append(pack)

        async def delete(self, uids: list[str]) -> None:
            removed.extend(uids)

    stores: Any = Stores()
    sweep = Sweep(stores, stores, stores)
    await sweep.run(float("inf"))
    assert named == {body}
    assert not removed


async def test_a_sweep_of_packs_keeps_what_a_pin_needs_that_was_added_while_it_looks():
    """After the sweep has found no pin, an export adds one, and a commit drops a body that the export needs."""
    pack = new_uid()
    looks = iter([[f"{pack}.0-2", f"{pack}.2-4"], [f"{pack}.2-4"]])
    kept: list[Any] = []

    class Stores:
        async def packs_with_orphans(self, packs: list[StoredPack]) -> dict[str, list[str]]:
            return {pack: next(looks)}

        async def packs_older_than(self, generation: int, after: str = "", limit: int = 1000) -> list[StoredPack]:
            return [StoredPack(pack, 3)]

        async def has_pins(self) -> bool:
            return False

        async def retain_in_pack(self, pack: str, uids: list[str]) -> None:
            kept.append((pack, set(uids)))

    stores: Any = Stores()
    await _PackSweep(stores, stores, stores).run(1, float("inf"))
    assert kept == [(pack, {f"{pack}.0-2", f"{pack}.2-4"})]


@pytest.mark.parametrize("threads", [1, 2])
def test_a_store_removes_bodies_of_a_pack_in_several_event_loops(threads):
    objects = MemoryObjectStore()
    packs, bodies = Packs(objects, "data/"), stored(40, random.Random(1))
    asyncio.run(packs.put(next(iter(bodies)).pack, bodies))
    places = list(bodies)

    async def remove(some: list[Place]) -> None:
        await asyncio.gather(*(packs.remove([place]) for place in some))

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(lambda at: asyncio.run(remove(places[at : at + 15])), (0, 15)))
    asyncio.run(check(packs, objects, bodies, set(places[30:])))


async def test_a_failed_edit_ends_a_sweep_of_packs():
    objects = MemoryObjectStore()
    store = S3ResourceStore("b", prefix="data/", object_store=objects)
    names = [new_uid() for _ in range(40)]
    for name in names:
        await store._packs.put(name, {Place(name, 0, 2): b"{}"})
    objects.latency = lambda _: 0.001
    objects.fault = lambda call: DROPPED if call.op == "delete" else None

    class References:
        async def packs_with_orphans(self, packs: list[StoredPack]) -> dict[str, list[str]]:
            return {pack.name: [] for pack in packs}

    references: Any = References()
    with pytest.raises(StoreUnavailable):
        await _PackSweep(references, store, None).run(1, float("inf"))
    await asyncio.sleep(0.1)
    assert objects.requests["delete"] <= 8


async def test_reads_stop_after_a_failure():
    objects = MemoryObjectStore()
    store = S3ResourceStore("b", prefix="data/", object_store=objects)
    uids = [new_uid() for _ in range(500)]
    objects.latency = lambda _: 0.001
    objects.fault = lambda call: DROPPED if call.key.endswith(uids[40]) else None
    with pytest.raises(StoreUnavailable):
        await store.get_many(uids)
    await asyncio.sleep(0.1)
    assert objects.requests["get"] < 150
