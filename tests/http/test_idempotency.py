"""Idempotency-Key over HTTP: asking again gives the first answer."""

from __future__ import annotations

import asyncio

import pytest

from app.autocrud.errors import StoreUnavailable

from .conftest import MERGE, PATCH, problem


def key(name: str, **more: str) -> dict[str, str]:
    return {"idempotency-key": name, **more}


def same(again, first) -> None:
    assert again.headers["idempotency-replayed"] == "true"
    assert "idempotency-replayed" not in first.headers
    assert (again.status_code, again.content) == (first.status_code, first.content)
    for header in ("etag", "location"):
        assert again.headers.get(header) == first.headers.get(header)


async def test_every_write_asked_again_gives_the_first_answer(api):
    path = "/note/n"
    calls = [
        ("PUT", path, {"json": {"title": "Sun"}, "headers": key("1", **{"if-none-match": "*"})}),
        ("PATCH", path, {"json": {"views": 1}, "headers": key("2")}),
        ("PATCH", path, {"content": b'[{"op":"add","path":"/tags/-","value":"x"}]', "headers": key("3", **PATCH)}),
        ("PUT", f"{path}?status=draft", {"json": {"title": "Moon"}, "headers": key("4")}),
        ("POST", f"{path}/publish", {"headers": key("5")}),
        ("POST", f"{path}/switch", {"json": {"revision": 1}, "headers": key("6")}),
        ("DELETE", path, {"headers": key("7")}),
        ("POST", f"{path}/restore", {"headers": key("8")}),
        ("POST", "/note", {"json": {"title": "Other"}, "headers": key("9")}),
        (
            "POST",
            "/note/batch",
            {"json": {"operations": [{"op": "create", "data": {"title": "B"}}]}, "headers": key("10")},
        ),
    ]
    first = [await api.request(method, url, **how) for method, url, how in calls]
    assert [one.status_code for one in first] == [201, 200, 200, 200, 200, 200, 204, 200, 201, 200]
    state = (await api.get(path)).content
    for (method, url, how), told in zip(calls, first, strict=True):
        same(await api.request(method, url, **how), told)
    assert (await api.get(path)).content == state
    assert (await api.get("/note/count")).json() == {"count": 3}


async def test_a_purge_asked_again(api):
    await api.put("/note/n", json={"title": "Sun"}, headers={"if-none-match": "*"})
    assert (await api.post("/note/n/purge", headers=key("k"))).status_code == 202
    await api.put("/note/n", json={"title": "New"}, headers={"if-none-match": "*"})
    again = await api.post("/note/n/purge", headers=key("k"))
    assert (again.status_code, again.headers["idempotency-replayed"]) == (202, "true")
    assert (await api.get("/note/n/data")).json()["title"] == "New"


@pytest.mark.parametrize(
    ("method", "url", "how"),
    [
        ("POST", "/note", {"json": {"title": "Moon"}}),
        ("POST", "/note?status=draft", {"json": {"title": "Sun"}}),
        ("POST", "/note/batch", {"json": {"operations": [{"op": "create", "data": {"title": "Sun"}}]}}),
        ("PUT", "/note/x", {"json": {"title": "Sun"}, "headers": {"if-none-match": "*"}}),
    ],
)
async def test_a_key_belongs_to_one_request(api, method, url, how):
    await api.post("/note", json={"title": "Sun"}, headers=key("k"))
    how = {**how, "headers": {**how.get("headers", {}), **key("k")}}
    problem(await api.request(method, url, **how), 422, "idempotency-key-reused")
    assert (await api.get("/note/count")).json() == {"count": 1}


async def test_conditions_are_no_part_of_the_request(api, note):
    """The client may have read the resource before it retries, and so send another condition."""
    path, etag = note
    first = await api.patch(path, json={"views": 2}, headers=key("k", **{"if-match": etag}))
    again = await api.patch(path, json={"views": 2}, headers=key("k", **{"if-match": first.headers["etag"]}))
    same(again, first)


async def test_patches_of_two_types_are_two_requests(api, note):
    body = b'[{"op":"add","path":"/views","value":7}]'
    assert (await api.patch(note[0], content=body, headers=key("k", **PATCH))).status_code == 200
    problem(await api.patch(note[0], content=body, headers=key("k", **MERGE)), 422, "idempotency-key-reused")


async def test_a_refusal_may_be_asked_again(api):
    problem(await api.patch("/note/n", json={"views": 2}, headers=key("k")), 404, "not-found")
    await api.put("/note/n", json={"title": "Sun"}, headers={"if-none-match": "*"})
    assert (await api.patch("/note/n", json={"views": 2}, headers=key("k"))).status_code == 200


async def test_in_flight(api, crud, monkeypatch):
    manager = crud.managers["note"]
    release, commit = asyncio.Event(), manager.storage.commit

    async def slow(writes, once):
        await release.wait()
        return await commit(writes, once)

    monkeypatch.setattr(manager.storage, "commit", slow)
    first = asyncio.create_task(api.post("/note", json={"title": "Sun"}, headers=key("k")))
    while not manager._writes._in_flight:
        await asyncio.sleep(0)
    second = await api.post("/note", json={"title": "Sun"}, headers=key("k"))
    problem(second, 409, "idempotency-key-in-flight")
    assert second.headers["retry-after"] == "1"
    release.set()
    told = await first
    same(await api.post("/note", json={"title": "Sun"}, headers=key("k")), told)


@pytest.mark.parametrize("name", ["", "a b", "x" * 256, "ä"])
async def test_texts_that_are_not_keys(api, name):
    answer = await api.post("/note", json={"title": "Sun"}, headers={"idempotency-key": name.encode()})
    problem(answer, 400, "invalid-condition")


async def test_reading_takes_no_key(api, note):
    assert (await api.get(note[0], headers=key("a b"))).status_code == 200


async def test_several_etags_and_a_key(api, note):
    """The first answer comes before any condition is looked at, however many states the condition names."""
    path, etag = note
    headers = key("k", **{"if-match": f'{etag}, "7-0000000000000000"'})
    first = await api.patch(path, json={"views": 5}, headers=headers)
    same(await api.patch(path, json={"views": 5}, headers=headers), first)
    problem(
        await api.patch(path, json={"views": 6}, headers={"if-match": f'{etag}, "7-0000000000000000"'}),
        412,
        "version-conflict",
    )
    headers = key("p", **{"if-match": f'{first.headers["etag"]}, "7-0000000000000000"'})
    assert [(await api.post(f"{path}/purge", headers=headers)).status_code for _ in range(2)] == [202, 202]


async def test_a_batch_that_purges(api, note):
    rid = note[0].rpartition("/")[2]
    operations = [{"op": "purge", "id": rid}, {"op": "create", "id": rid, "data": {"title": "New"}}]
    for body in ({"operations": operations}, {"operations": operations[:1]}):
        name = f"{len(body['operations'])}"
        first = await api.post("/note/batch", json=body, headers=key(name))
        assert first.json()["results"][0] == {"meta": None}
        same(await api.post("/note/batch", json=body, headers=key(name)), first)


async def test_a_purge_whose_traces_stay_is_said_so_and_finished_later(api, crud, note, monkeypatch):
    manager = crud.managers["note"]
    purge_remnants, failing = manager.storage.purge_remnants, [True]

    async def sometimes(now):
        if failing:
            raise StoreUnavailable("the storage cannot be used right now; nothing was changed")
        failing.append("erased")
        return await purge_remnants(now)

    monkeypatch.setattr(manager.storage, "purge_remnants", sometimes)
    problem(await api.post(f"{note[0]}/purge", headers=key("k")), 503, "outcome-unknown")
    problem(await api.get(note[0]), 404, "not-found")
    failing.clear()
    await manager.maintain(10)
    assert failing == ["erased"]
    failing.clear()
    assert (await api.post(f"{note[0]}/purge", headers=key("k"))).status_code == 202
