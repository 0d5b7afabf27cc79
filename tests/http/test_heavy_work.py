"""Heavy work on JSON: one thread for all of it, a bounded number of requests at a time, and a bounded queue."""

from __future__ import annotations

import asyncio
import json
import threading

import pytest

from app.autocrud.errors import Overloaded
from app.autocrud.resource_manager.model import codec, json_shape
from app.autocrud.resource_manager.runtime import threads

from .bag import bag_client


@pytest.fixture
async def api():
    async with bag_client() as client:
        yield client


class Slot:
    """A turn that a server gave."""

    def __init__(self) -> None:
        self.held, self.left = True, 0

    def leave(self) -> None:
        self.held, self.left = False, self.left + 1

    async def come_back(self) -> None:
        self.held = True


async def test_a_request_that_waits_for_the_lane_holds_no_turn():
    slot = Slot()
    token = threads.TURN.set(slot)
    try:
        assert await threads.heavy(10, lambda: slot.held)
        assert slot.left == 0
        assert await threads.heavy(threads.HEAVY_BYTES, lambda: slot.held) is False
        assert (slot.held, slot.left) == (True, 1)
    finally:
        threads.TURN.reset(token)


async def test_the_queue_for_the_lane_is_bounded(api, monkeypatch):
    monkeypatch.setattr(threads, "MAX_WAITING", 1_000_000)
    go = threading.Event()
    first = asyncio.create_task(threads.heavy(2_000_000, lambda: go.wait(30)))  # alone it may be larger
    await asyncio.sleep(0)
    large = json.dumps({"x": ["y" * 100] * 2000}).encode()
    refused = await api.post("/bag", content=large, headers={"content-type": "application/json"})
    assert (refused.status_code, refused.json()["type"]) == (503, "urn:crudstack:overloaded")
    assert refused.headers["retry-after"] == "1"
    assert (await api.post("/bag", json={"x": [1]})).status_code == 201  # small ones go on
    go.set()
    assert await first
    assert threads.LANE.waiting == 0
    assert (await api.post("/bag", content=large, headers={"content-type": "application/json"})).status_code == 201


async def test_few_large_bodies_are_worked_on_at_once(api, monkeypatch):
    """Decoded data takes many times the size of its body, so most requests wait with their undecoded bodies."""
    large = json.dumps({"x": ["y" * 100] * 2000}).encode()
    monkeypatch.setattr(threads, "AT_ONCE", 3 * json_shape.weight(large))
    turns = threads.large_turns()
    used, waiting = 0, 0
    parse = codec.Codec.parse

    def noting(self, body):
        nonlocal used, waiting
        used, waiting = max(used, turns.used), max(waiting, turns.waiting_bytes)
        return parse(self, body)

    monkeypatch.setattr(codec.Codec, "parse", noting)
    headers = {"content-type": "application/json"}
    answers = await asyncio.gather(*(api.post("/bag", content=large, headers=headers) for _ in range(12)))
    assert {answer.status_code for answer in answers} == {201}
    assert used == threads.AT_ONCE
    assert 0 < waiting <= 9 * len(large)
    wrong = await asyncio.gather(*(api.patch("/bag/b", content=large[:-1], headers=headers) for _ in range(12)))
    assert {answer.status_code for answer in wrong} == {422}
    assert (turns.used, turns.waiting_bytes, len(turns._waiting)) == (0, 0, 0)


async def test_a_cancelled_waiter_gives_back_its_turn_for_a_large_body(monkeypatch):
    monkeypatch.setattr(threads, "AT_ONCE", 10)
    turns = threads.LargeTurns()
    await turns.take(1, 10)
    slot = Slot()
    token = threads.TURN.set(slot)
    waiting = [asyncio.create_task(turns.take(100, 10)) for _ in range(3)]
    threads.TURN.reset(token)
    await asyncio.sleep(0)
    assert (slot.held, turns.waiting_bytes) == (False, 300)
    waiting[0].cancel()
    turns.leave(10)  # it is for the first, which does not want it any more in the same moment
    await asyncio.wait(waiting[:2])
    assert waiting[0].cancelled()
    assert waiting[1].result() is None
    waiting[2].cancel()
    await asyncio.wait(waiting)
    turns.leave(10)
    assert (turns.used, turns.waiting_bytes) == (0, 0)


async def test_large_bodies_that_wait_are_bounded_and_in_order(monkeypatch):
    monkeypatch.setattr(threads, "MAX_WAITING", 250)
    monkeypatch.setattr(threads, "AT_ONCE", 10)
    turns = threads.LargeTurns()
    await turns.take(1000, 50)  # alone it may take more
    order = []

    async def one(name, weight):
        await turns.take(100, weight)
        order.append(name)

    waiting = [asyncio.create_task(one(*given)) for given in (("a", 10), ("b", 1))]
    await asyncio.sleep(0)
    with pytest.raises(Overloaded, match="found 200 bytes of bodies that wait"):
        await turns.take(100, 1)
    turns.leave(50)
    await asyncio.sleep(0)
    assert (order, turns.used) == (["a"], 10)  # there is no room for both, and no overtaking
    turns.leave(10)
    await asyncio.wait(waiting)
    assert (order, turns.used) == (["a", "b"], 1)
