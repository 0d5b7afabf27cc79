"""Deadlines of requests: work that might not end in time is refused before it begins, and nothing is changed.

Nothing here measures time. Deadlines have clocks of their own, and work is counted in calls of functions.
"""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from fastapi import FastAPI

from app.autocrud import AutoCRUD
from app.autocrud.errors import NotEnoughTime
from app.autocrud.http import patching, problems
from app.autocrud.http.json_patch import MAX_MADE, MAX_MADE_CONTAINERS
from app.autocrud.resource_manager.model.json_shape import MAX_CONTAINERS, MAX_NAMES, MAX_VALUES
from app.autocrud.resource_manager.runtime import threads
from app.autocrud.resource_manager.runtime.deadline import (
    CONTAINER_STEPS,
    DEADLINE,
    MOST_PARTS,
    OPERATIONS_PER_S,
    STEP_BYTES,
    Deadline,
    check_time,
    operations,
)
from benchmarks.json_work import TEXTS, WORK, Bag, text_of

from .conftest import client_of
from .test_bounded_work import calls, every_item

LARGE = {"x": "y" * 200_000}
JSON = {"content-type": "application/json"}


class Clock:
    """Time that passes at each look by `step` seconds, and after `ends` looks for ever."""

    def __init__(self, step: float = 0.0, ends: float = float("inf")) -> None:
        self.now, self.step, self.looks, self.ends = 0.0, step, 0, ends

    def __call__(self) -> float:
        self.looks += 1
        self.now += self.step
        return self.now if self.looks <= self.ends else self.now + 1e9


class Timed:
    """An application whose requests have a deadline."""

    def __init__(self, app: Any) -> None:
        self.app, self.deadline = app, lambda: None

    async def __call__(self, scope, receive, send) -> None:
        reset = DEADLINE.set(self.deadline())
        try:
            await self.app(scope, receive, send)
        finally:
            DEADLINE.reset(reset)


@pytest.fixture
async def timed():
    crud = AutoCRUD()
    crud.add_model(Bag, indexed_fields=["author"])
    app = FastAPI()
    crud.apply(app)
    timed = Timed(app)
    yield timed
    await crud.close()


@pytest.fixture
async def api(timed):
    async with client_of(timed) as client:
        yield client


def left(count: int) -> Any:
    """Deadlines within which so many operations are certain to end."""
    return lambda: Deadline(count / OPERATIONS_PER_S, 1, clock=Clock())


def test_the_time_that_is_left_is_a_share_of_a_cpu():
    clock = Clock()
    for cpus, share in ((1, 1), (4, 1), (0.25, 0.25)):
        deadline = Deadline(10, cpus, clock=clock)
        assert deadline.affordable() == int(10 * OPERATIONS_PER_S * share)
        deadline.check(deadline.affordable())
        with pytest.raises(NotEnoughTime, match="send or ask for less at once") as never:
            deadline.check(deadline.affordable() + 1)
        assert not never.value.may_fit
        assert not problems.response(never.value).headers
        clock.now += 9
        with pytest.raises(NotEnoughTime, match="try again") as late:
            deadline.check(deadline.affordable() + 1)
        assert problems.response(late.value).headers == ((b"retry-after", b"1"),)
        clock.now += 1
        assert deadline.affordable() == 0
        with pytest.raises(NotEnoughTime):
            deadline.check(0)


def test_without_a_deadline_nothing_is_refused():
    assert DEADLINE.get() is None
    check_time(2**60)


def test_work_within_the_limits_is_in_time_with_512_mb_and_29_s():
    """The largest data, the largest patch, and copies in it."""
    assert MOST_PARTS == MAX_VALUES + MAX_NAMES + CONTAINER_STEPS * MAX_CONTAINERS
    largest = 6 * 1024 * 1024 // STEP_BYTES + MOST_PARTS
    assert operations(b"[" * 6 * 1024 * 1024) == largest
    most = 2 * largest + patching.work_of_json_patch(10_000, copies=1)
    Deadline(28.5, 512 / 1769, clock=Clock()).check(most)
    assert patching.work_of_json_patch(0, 1) >= MAX_MADE // STEP_BYTES + CONTAINER_STEPS * MAX_MADE_CONTAINERS


@pytest.mark.parametrize("work", WORK)
@pytest.mark.parametrize("name", TEXTS)
def test_no_work_takes_more_than_its_bound(name, work):
    """Each operation may be a few calls; that the calls are no slower is what benchmarks.json_work looks at."""
    text = text_of(name, 200_000)
    work_on, bound = WORK[work]
    assert calls(work_on(text)) <= 5 * bound(text)


@pytest.mark.parametrize(
    ("method", "path", "how"),
    [
        ("POST", "/bag", {"json": LARGE}),
        ("PUT", "/bag/large", {"json": LARGE | {"author": "b"}}),
        ("PUT", "/bag/new", {"json": LARGE, "headers": {"if-none-match": "*"}}),
        ("PATCH", "/bag/large", {"json": {"author": "b"}}),
        ("PATCH", "/bag/small", {"json": LARGE}),
        (
            "PATCH",
            "/bag/small",
            {
                "content": json.dumps([{"op": "add", "path": "/x", "value": LARGE}]),
                "headers": {"content-type": patching.JSON_PATCH},
            },
        ),
        ("POST", "/bag/batch", {"json": {"operations": [{"op": "create", "data": LARGE}]}}),
        ("POST", "/bag/batch", {"json": {"operations": [{"op": "patch", "id": "large", "patch": {"author": "b"}}]}}),
        ("GET", "/bag/large?fields=author", {}),
        ("GET", "/bag/large/data?fields=author", {}),
        ("GET", "/bag/large/diff?from=1", {}),
        ("GET", "/bag/large", {}),
        ("GET", "/bag/large/data", {}),
        ("GET", "/bag/large/revisions/1", {}),
        ("GET", "/bag", {}),
        ("GET", "/bag?fields=x", {}),
    ],
)
async def test_work_that_might_not_end_is_refused_and_changes_nothing(api, timed, method, path, how):
    for name, data in (("large", LARGE), ("small", {})):
        assert (await api.put(f"/bag/{name}", json=data, headers={"if-none-match": "*"})).status_code == 201
    before = (await api.get("/bag?sort=meta.resource_id")).json()
    timed.deadline = left(2_000)
    assert (await api.get("/bag/small")).status_code == 200
    refused = await api.request(method, path, **how)
    assert (refused.status_code, refused.json()["type"]) == (503, "urn:crudstack:not-enough-time")
    timed.deadline = lambda: None
    assert (await api.get("/bag?sort=meta.resource_id")).json() == before
    timed.deadline = left(1_000_000)
    assert (await api.request(method, path, **how)).status_code in (200, 201)


@pytest.mark.parametrize("key", [{}, {"idempotency-key": "order-17"}])
@pytest.mark.parametrize(
    ("method", "path", "body"),
    [
        ("PATCH", "/bag/large", {"author": "b"}),
        ("PUT", "/bag/large", {**LARGE, "author": "b"}),
        ("POST", "/bag/batch", {"operations": [{"op": "patch", "id": "large", "patch": {"author": "b"}}] * 3}),
        ("DELETE", "/bag/large", None),
    ],
)
async def test_the_time_ends_at_any_moment(api, timed, method, path, body, key):
    """At whatever look at the clock the time is over: either the write was done, or it is refused and was not done."""
    content = None if body is None else json.dumps(body)
    done = refused = 0
    for looks in range(60):
        await api.put("/bag/large", json=LARGE, headers={"if-none-match": "*"})
        before = (await api.get("/bag/large")).json()["meta"]
        clock = Clock(ends=1 + looks)
        timed.deadline = lambda clock=clock: Deadline(20, 1, clock=clock)
        answer = await api.request(method, path, content=content, headers=JSON | key)
        timed.deadline = lambda: None
        after = (await api.get("/bag/large?include_deleted=true")).json()["meta"]
        if answer.status_code == 503:
            assert answer.json()["type"] == "urn:crudstack:not-enough-time"
            assert after == before
            refused += 1
        else:
            assert answer.status_code in (200, 204), answer.text
            assert after["version"] > before["version"]
            done += 1
        await api.post("/bag/large/purge")
        key = {name: f"{value}." for name, value in key.items()}
        if done == 3:
            break
    assert (done, refused > 0) == (3, True)


async def test_a_list_of_fields_ends_where_the_time_does(api, timed):
    for at in range(12):
        await api.put(f"/bag/{at:02}", json=LARGE | {"author": f"a{at:02}"}, headers={"if-none-match": "*"})
    whole, _ = await every_item(api, "/bag?sort=author&limit=200&fields=author,names")
    one = operations((await api.get("/bag/00/data")).content)
    timed.deadline = left(20 * one)  # comparing bodies with their hashes takes some, and half of the rest is used
    found, pages = await every_item(api, "/bag?sort=author&limit=200&fields=author,names")
    assert found == whole
    assert 1 < pages < 12
    timed.deadline = left(one - 1)
    assert (await api.get("/bag?sort=author&limit=200&fields=author,names")).status_code == 503


async def test_a_late_write_invalidates_caches_for_a_short_time(api, timed):
    """The time ends after the commit, when there is a large answer to send."""
    seen = []
    for looks in range(60):
        await api.put("/bag/a", json={}, headers={"if-none-match": "*"})
        clock = Clock(ends=1 + looks)
        timed.deadline = lambda clock=clock: Deadline(20, 1, clock=clock)
        answer = await api.put("/bag/a", json=LARGE)
        timed.deadline = lambda: None
        seen.append((answer.status_code, set(answer.json()) & {"meta", "data"}))
        await api.post("/bag/a/purge")
    assert (503, set()) in seen
    assert seen[seen.index((200, {"meta"})) + 1] == (200, {"meta", "data"}) == seen[-1]
    assert all(one[0] == 503 for one in seen[: seen.index((200, {"meta"}))])


async def test_time_that_passes_in_the_lane_counts():
    """The check is made when the work's turn has come, not when it is handed over."""
    clock = Clock()
    reset = DEADLINE.set(Deadline(10, 1, clock=clock))
    try:
        begun = asyncio.Event()
        loop = asyncio.get_running_loop()

        def work() -> None:
            loop.call_soon_threadsafe(begun.set)
            clock.now += 20

        waiting = asyncio.create_task(threads.heavy(threads.HEAVY_BYTES, work, b"x"))
        await begun.wait()
        with pytest.raises(NotEnoughTime):
            await threads.heavy(threads.HEAVY_BYTES, lambda: None, b"x")
        await waiting
        assert threads.LANE.waiting == 0
    finally:
        DEADLINE.reset(reset)
