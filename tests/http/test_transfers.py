"""Limits on concurrent transfers: counts, and the replacement of transfers whose clients do nothing."""

from __future__ import annotations

import asyncio
import contextlib

import pytest

from app.autocrud.errors import CrudError
from app.autocrud.http import problems, transfers
from app.autocrud.http.transfers import TooManyUploads, Transfers


@pytest.fixture(autouse=True)
def stalled_at_once(monkeypatch):
    monkeypatch.setattr(transfers, "STALLED_S", 0.0)


class Client:
    """A transfer in a task of its own. It waits for its client, or works, until it is released."""

    def __init__(self, all_of_them: Transfers, caller: str = "alice", *, works: bool = False) -> None:
        self.released = asyncio.Event()
        self.task = asyncio.ensure_future(self._run(all_of_them, caller, works))

    async def _run(self, all_of_them: Transfers, caller: str, works: bool) -> str:
        async with all_of_them.one(caller) as transfer:
            with contextlib.nullcontext() if works else transfer.waits():
                await self.released.wait()
        return "done"

    async def result(self) -> str:
        try:
            return await self.task
        except TooManyUploads as error:
            return error.detail


async def started(*clients: Client) -> None:
    for _ in range(5):
        await asyncio.sleep(0)
    assert all(client.task is not None for client in clients)


async def test_a_caller_that_has_too_many_is_refused():
    limits = Transfers(TooManyUploads, total=10, per_caller=2)
    working = [Client(limits, works=True), Client(limits, works=True)]
    await started(*working)
    assert "you have 2 in progress" in await Client(limits).result()
    other = Client(limits, "bob")
    other.released.set()
    assert await other.result() == "done"
    for client in working:
        client.released.set()
        assert await client.result() == "done"
    assert (limits._count, limits._of, limits.waiting) == (0, {}, {})


async def test_the_transfer_that_has_waited_longest_is_replaced():
    limits = Transfers(TooManyUploads, total=3, per_caller=2)
    first, second, third = Client(limits), Client(limits), Client(limits, "bob")
    await started(first, second, third)
    fourth = Client(limits)  # too many of alice
    assert "another one needed its place" in await first.result()
    fifth = Client(limits, "carol")  # too many of all
    assert "another one needed its place" in await second.result()
    await started(third, fourth, fifth)
    for client in (third, fourth, fifth):
        client.released.set()
        assert await client.result() == "done"
    assert (limits._count, limits._of, limits.waiting) == (0, {}, {})


async def test_a_transfer_that_works_is_not_replaced():
    limits = Transfers(TooManyUploads, total=2, per_caller=2)
    working, waiting = Client(limits, works=True), Client(limits)
    await started(working, waiting)
    newer = Client(limits, works=True)
    assert "another one needed its place" in await waiting.result()
    assert "in progress" in await Client(limits).result()
    for client in (working, newer):
        client.released.set()
        assert await client.result() == "done"


async def test_a_transfer_that_has_waited_for_a_moment_is_not_replaced(monkeypatch):
    monkeypatch.setattr(transfers, "STALLED_S", 60.0)
    limits = Transfers(TooManyUploads, total=1, per_caller=1)
    waiting = Client(limits)
    await started(waiting)
    assert "in progress" in await Client(limits).result()
    waiting.released.set()
    assert await waiting.result() == "done"


async def test_a_cancelled_transfer_is_forgotten():
    limits = Transfers(TooManyUploads, total=1, per_caller=1)
    client = Client(limits)
    await started(client)
    client.task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await client.task
    assert (limits._count, limits._of, limits.waiting) == (0, {}, {})


async def test_the_task_of_a_replaced_transfer_goes_on():
    """It is no longer cancelled, so it can send its answer."""
    limits = Transfers(TooManyUploads, total=1, per_caller=1)

    async def request() -> str:
        try:
            async with limits.one("alice") as transfer:
                with transfer.waits():
                    await asyncio.Event().wait()
        except TooManyUploads:
            await asyncio.sleep(0.01)
            return "answered"
        return "never"

    waiting = asyncio.ensure_future(request())
    await asyncio.sleep(0.01)
    newer = Client(limits)
    assert await waiting == "answered"
    assert waiting.cancelling() == 0
    newer.released.set()
    assert await newer.result() == "done"


async def test_each_event_loop_has_counts_of_its_own():
    here = transfers.transfers()
    assert transfers.transfers() is here

    async def elsewhere() -> transfers.LoopTransfers:
        return transfers.transfers()

    assert await asyncio.to_thread(lambda: asyncio.run(elsewhere())) is not here


def test_every_429_says_when_to_try_again():
    """Uploads that were announced are counted elsewhere than those in progress, with an error of their own."""
    kinds, found = [CrudError], []
    while kinds:
        kind = kinds.pop()
        kinds += kind.__subclasses__()
        if kind.status == 429:
            assert (b"retry-after", b"1") in problems.response(kind("too many")).headers, kind
            found.append(kind)
    assert len(found) >= 2
