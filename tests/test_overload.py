"""Overload by ten times more clients than slots: some are served in time, the rest are refused at once.

Afterwards the server uses as many files, threads and slots as before.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import json
import random
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest

from app.server import overload
from app.server.overload import Gate, Overload
from tests.conftest import Server
from tests.raw_connections import HANGS_S, MB, back_to, files, next_answer, resident

SCOPE = {"type": "http", "path": "/article", "method": "POST", "headers": []}
BODY = b'{"title":"t","content":"c","author":"wave"}'


class Work:
    """An application whose requests end when the test allows it. It counts the requests in progress."""

    def __init__(self) -> None:
        self.now = self.most = self.done = 0
        self.may_end = asyncio.Event()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        while (await receive()).get("more_body"):
            pass
        self.now += 1
        self.most = max(self.most, self.now)
        try:
            await self.may_end.wait()
            self.done += 1
        finally:
            self.now -= 1
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"done"})


async def whole_body() -> dict[str, Any]:
    return {"type": "http.request", "body": b"", "more_body": False}


async def never() -> dict[str, Any]:
    await asyncio.Event().wait()
    raise AssertionError


class Client:
    """A request, and its answer."""

    def __init__(self, app: Any, receive: Any = whole_body, path: str = "/article", method: str = "POST") -> None:
        self.said: list[dict[str, Any]] = []
        self.task = asyncio.create_task(app(SCOPE | {"path": path, "method": method}, receive, self._hear))

    async def _hear(self, message: dict[str, Any]) -> None:
        self.said.append(message)

    @property
    def status(self) -> int | None:
        return self.said[0]["status"] if self.said else None


async def settle() -> None:
    for _ in range(20):
        await asyncio.sleep(0)


async def test_requests_beyond_the_slots_and_the_queue_are_refused_at_once():
    work = Work()
    app = Overload(work, in_progress=3, queued=4)
    clients = [Client(app) for _ in range(70)]
    await settle()
    assert (work.now, work.most) == (3, 3)
    refused = [client for client in clients if client.status is not None]
    assert len(refused) == 70 - 3 - 4
    for client in refused:
        assert client.status == 503
        assert (b"retry-after", b"1") in client.said[0]["headers"]
        problem = json.loads(client.said[1]["body"])
        assert problem["type"] == "urn:crudstack:overloaded"
        assert problem["detail"].startswith("found 3 requests in progress and 4 waiting")
    work.may_end.set()
    await asyncio.gather(*(client.task for client in clients))
    assert collections.Counter(client.status for client in clients) == {200: 7, 503: 63}
    assert (work.done, work.most, work.now) == (7, 3, 0)


async def test_a_refused_request_has_not_been_read():
    app = Overload(Work(), in_progress=0, queued=0)

    async def read() -> dict[str, Any]:
        raise AssertionError("the body was read")

    client = Client(app, read)
    await client.task
    assert client.status == 503


async def test_a_client_that_sends_slowly_holds_no_slot():
    work = Work()
    app = Overload(work, in_progress=2, queued=0)
    slow = [Client(app, never) for _ in range(50)]
    await settle()
    quick = [Client(app) for _ in range(2)]
    await settle()
    assert work.now == 2
    work.may_end.set()
    await asyncio.gather(*(client.task for client in quick))
    assert [client.status for client in quick] == [200, 200]
    for client in slow:
        client.task.cancel()
    await asyncio.gather(*(client.task for client in slow), return_exceptions=True)
    assert app._gate.free == 2


async def test_an_admitted_request_precedes_new_ones_once_its_body_has_arrived():
    work = Work()
    app = Overload(work, in_progress=1, queued=10)
    arrives = asyncio.Event()

    async def late() -> dict[str, Any]:
        await arrives.wait()
        return await whole_body()

    admitted = Client(app, late)
    await settle()
    others = [Client(app) for _ in range(5)]
    await settle()
    arrives.set()
    await settle()
    order: list[Client] = []
    for client in (admitted, *others):
        client.task.add_done_callback(lambda _, client=client: order.append(client))
    work.may_end.set()
    await asyncio.gather(*(client.task for client in (admitted, *others)))
    assert order.index(admitted) == 1  # after the request that had the slot
    assert all(client.status == 200 for client in order)


async def test_a_health_check_never_waits_and_a_readiness_check_waits_only_for_others():
    work = Work()
    app = Overload(work, in_progress=1, queued=1)
    [Client(app) for _ in range(2)]
    await settle()
    health = [Client(app, path="/healthz", method="GET") for _ in range(100)]
    ready = [Client(app, path="/readyz", method="GET") for _ in range(100)]
    await settle()
    assert work.now == 1 + 100 + overload.PROBES
    assert collections.Counter(client.status for client in ready) == {503: 100 - overload.PROBES, None: overload.PROBES}
    work.may_end.set()
    await asyncio.gather(*(client.task for client in (*health, *ready)))
    assert {client.status for client in health} == {200}


async def test_a_request_that_waits_too_long_is_refused(monkeypatch):
    monkeypatch.setattr(overload, "WAIT_S", 0.01)
    work = Work()
    app = Overload(work, in_progress=1, queued=2)
    clients = [Client(app) for _ in range(3)]
    await asyncio.gather(*(client.task for client in clients[1:]))
    assert [client.status for client in clients] == [None, 503, 503]
    work.may_end.set()
    await clients[0].task
    assert app._gate.free == 1
    again = Client(app)
    await again.task
    assert again.status == 200


async def test_unread_answers_refuse_only_large_answers():
    """If too many bytes are unsent, a large answer is refused.

    The limit is twice as high for the answer to a write. Small answers are always sent.
    """
    unsent, body = 0, b""

    async def work(_scope: Any, _receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": body})

    app = Overload(work, unsent=lambda: unsent)
    large, small = b" " * (overload.LARGE + 1), b" " * overload.LARGE
    most = overload.MAX_UNSENT
    for waits, method, answer, expected in [
        (most, "GET", large, 200),
        (most + 1, "GET", large, "urn:crudstack:too-much-in-transfer"),
        (most + 1, "POST", large, 200),
        (2 * most + 1, "POST", large, "urn:crudstack:outcome-unknown"),
        (9 * most, "GET", small, 200),
        (9 * most, "POST", small, 200),
    ]:
        unsent, body = waits, answer
        client = Client(app, method=method)
        await client.task
        found = client.status if client.status == 200 else json.loads(client.said[1]["body"])["type"]
        assert (found, len(client.said)) == (expected, 2), (unsent, method)
    assert app._gate.free == overload.IN_PROGRESS


@pytest.mark.parametrize("seed", range(100))
async def test_cancellation_keeps_the_number_of_slots(seed):
    """Requests enter, return after their body, fail, are cancelled and give up, in any order."""
    chance = random.Random(seed)
    limit = chance.randint(1, 4)
    gate = Gate(limit, chance.randint(0, 6))
    holding = most = 0

    async def request() -> None:
        nonlocal holding, most
        if not (gate.take() or await gate.wait()):
            return
        holding += 1
        most = max(most, holding)
        for _ in range(chance.randint(0, 3)):
            for _ in range(chance.randint(0, 3)):
                try:
                    await asyncio.sleep(0)
                except asyncio.CancelledError:
                    holding -= 1
                    gate.leave()
                    raise
            holding -= 1
            gate.leave()
            await asyncio.sleep(0)
            if not gate.take():
                await gate.come_back()
            holding += 1
            most = max(most, holding)
        holding -= 1
        gate.leave()

    tasks = []
    for _ in range(60):
        tasks.append(asyncio.create_task(request()))
        for _ in range(chance.randint(0, 3)):
            await asyncio.sleep(0)
        if chance.random() < 0.3:
            chance.choice(tasks).cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    assert 1 <= most <= limit
    assert (holding, gate.free) == (0, limit)
    assert not gate._new
    assert not gate._returning


def threads(served: Server) -> int:
    return len(list(Path(f"/proc/{served.process.pid}/task").iterdir()))


async def test_after_a_wave_of_ten_times_more_clients_the_server_is_as_before(serve, tmp_path):
    served = serve("disk", tmp_path)
    url = urlsplit(served.url)
    request = b"POST /article HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: "
    request += b"%d\r\n\r\n" % len(BODY) + BODY
    clients = 10 * (overload.IN_PROGRESS + overload.QUEUED) // 2
    assert clients < 1024  # so that no connection is closed for another

    async def wave() -> collections.Counter[tuple[int, str]]:
        healthy = 0
        async with contextlib.AsyncExitStack() as stack:
            streams = []
            for _ in range(clients):
                reader, writer = await asyncio.open_connection(url.hostname, url.port)
                stack.callback(writer.transport.abort)
                streams.append((reader, writer))
            for _, writer in streams:
                writer.write(request * 2)  # each sends two requests
            async with httpx.AsyncClient(base_url=served.url, timeout=HANGS_S) as prober:
                answering = asyncio.gather(*(answers_of(reader) for reader, _ in streams))
                while not answering.done():
                    assert (await prober.get("/healthz")).status_code == 200
                    healthy += 1
            assert healthy > 0
            return sum(await answering, collections.Counter())

    async def answers_of(reader: asyncio.StreamReader) -> collections.Counter[tuple[int, str]]:
        found: collections.Counter[tuple[int, str]] = collections.Counter()
        for _ in range(2):
            answer = await next_answer(reader)
            found[answer.status, answer.headers.get("retry-after", "")] += 1
            assert answer.status == 201 or answer.type == "overloaded"
        return found

    await wave()  # this creates what is created once
    created = httpx.get(f"{served.url}/article/count?author=wave").json()["count"]
    files_before, threads_before, memory_before = files(served), threads(served), resident(served)
    found = await wave()
    await back_to(files_before, served)
    assert set(found) == {(201, ""), (503, "1")}
    assert found.total() == 2 * clients
    assert found[201, ""] >= overload.IN_PROGRESS + overload.QUEUED
    # There is one article for each answer 201, and none for a refusal.
    counted = httpx.get(f"{served.url}/article/count?author=wave").json()["count"] - created
    assert counted == found[201, ""]
    assert threads(served) == threads_before
    assert resident(served) - memory_before < 32 * MB
    assert httpx.post(f"{served.url}/article", content=BODY, headers={"content-type": "application/json"}).is_success
    served.stop()
