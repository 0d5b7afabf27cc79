"""Request bodies: batches, and the errors for invalid or too large bodies."""

from __future__ import annotations

import pytest
from fastapi import FastAPI

from .conftest import PATCH, client_of, make_crud, problem


async def test_batch(api, note):
    path, etag = note
    rid = path.removeprefix("/note/")
    operations = [
        {"op": "create", "id": "new", "data": {"title": "New"}, "status": "draft"},
        {"op": "modify", "id": "new", "data": {"title": "Newer"}},
        {"op": "publish", "id": "new"},
        {"op": "update", "id": rid, "if_match": etag, "data": {"title": "Moon"}},
        {"op": "patch", "id": rid, "patch": {"views": 7}},
        {"op": "patch", "id": rid, "patch": [{"op": "add", "path": "/tags/-", "value": "x"}]},
        {"op": "switch", "id": rid, "revision": 1},
        {"op": "delete", "id": rid},
        {"op": "restore", "id": rid},
    ]
    answer = await api.post("/note/batch", json={"operations": operations})
    assert answer.status_code == 200, answer.text
    results = answer.json()["results"]
    assert len(results) == 9
    assert (results[4]["data"]["views"], results[6]["data"]["title"]) == (7, "Sun")
    assert "data" not in results[7]
    failing = [
        {"op": "create", "data": {"title": "x"}},
        {"op": "update", "id": rid, "if_match": etag, "data": {"title": "x"}},
    ]
    stale = problem(await api.post("/note/batch", json={"operations": failing}), 412, "version-conflict")
    assert stale["errors"][0]["pointer"] == "/operations/1"
    failing[1] = {"op": "create", "data": {"title": 1}}
    wrong = problem(await api.post("/note/batch", json={"operations": failing}), 422, "invalid-data")
    assert wrong["errors"][0]["pointer"] == "/operations/1/data/title"
    for body in ({}, {"operations": []}, {"operations": [{"op": "fly"}]}, {"operations": operations * 12}):
        problem(await api.post("/note/batch", json=body), 422, "invalid-data")
    assert (await api.get("/note/count")).json() == {"count": 2}


@pytest.mark.parametrize(
    "patch", [[{"path": ""}], [{}], [1], ["op"], [[]], [None], "x", 1, None, [{"op": "fly", "path": ""}]]
)
async def test_an_invalid_patch_in_a_batch_is_422(api, note, patch):
    body = {"operations": [{"op": "patch", "id": note[0].removeprefix("/note/"), "patch": patch}]}
    wrong = problem(await api.post("/note/batch", json=body), 422, "invalid-data")
    assert wrong["errors"][0]["pointer"].startswith("/operations/0")


@pytest.mark.parametrize(
    ("body", "pointer"),
    [
        (b"", ""),
        (b"{", ""),
        (b"[]", ""),
        (b'{"title": 1}', "/title"),
        (b'{"title": "x", "extra": 1}', "/extra"),
        (b'{"title": "x", "inner": {"extra": 1}}', "/inner/extra"),
        (b'{"title": "x", "title": "y"}', ""),
        (b'{"title": "x", "tags": [1]}', "/tags/0"),
        (b'{"title": "\\ud800"}', ""),
        (b'{"title": "\xff"}', ""),
        (b'{"title": "x", "views": 1e999}', "/views"),
        (b'{"title": "x", "views": 9223372036854775808}', "/views"),
        (b'{"title": "a\\u0000"}', "/title"),
        (b'{"title": NaN}', ""),
        (b"[" * 100_000, ""),
        (b'{"title": "x", "inner": ' * 3000, ""),
    ],
)
async def test_an_invalid_body_is_422_and_the_error_has_its_location(api, body, pointer):
    answer = await api.post("/note", content=body, headers={"content-type": "application/json"})
    assert problem(answer, 422, "invalid-data")["errors"][0]["pointer"] == pointer
    assert (await api.get("/note/count")).json() == {"count": 0}


@pytest.mark.parametrize("half", ["\\ud800", "\\udc00", "x\\ud800\\u0041"])
async def test_an_unpaired_surrogate_is_not_reported_as_truncated_json(api, note, half):
    title = b'{"title": "%b"}' % half.encode()
    batch = b'{"operations": [{"op": "create", "data": %b}]}' % title
    for answer in (
        await api.post("/note", content=title),
        await api.patch(note[0], content=title),
        await api.post("/note/batch", content=batch),
    ):
        assert "an unpaired surrogate" in problem(answer, 422, "invalid-data")["detail"]
    assert "truncated" in problem(await api.post("/note", content=b'{"title": "x'), 422, "invalid-data")["detail"]


@pytest.mark.parametrize("number", [0, -1, 2**31 + 1, 2**70])
async def test_the_error_for_an_invalid_revision_number_gives_the_range(api, note, number):
    path, _ = note
    alone = await api.post(f"{path}/switch", json={"revision": number})
    operation = {"op": "switch", "id": path.rpartition("/")[2], "revision": number}
    batch = await api.post("/note/batch", json={"operations": [operation]})
    for answer, pointer in ((alone, "/revision"), (batch, "/operations/0/revision")):
        (violation,) = problem(answer, 422, "invalid-data")["errors"]
        assert violation["pointer"] == pointer
        assert violation["detail"].startswith("expected a whole number from 1 to 2147483648, got ")


async def test_a_unique_conflict_in_a_batch_names_the_operation(api):
    for slug in ("a", "b", "c"):
        await api.put(f"/note/{slug}", json={"title": "x", "slug": slug}, headers={"if-none-match": "*"})

    def create(slug):
        return {"op": "create", "data": {"title": "y", "slug": slug}}

    free, purge = create("free"), {"op": "purge", "id": "a"}
    rename = {"op": "update", "id": "b", "data": {"title": "x", "slug": "d"}}
    for operations, at in [
        ([create("a")], 0),
        ([{"op": "patch", "id": "b", "patch": {"title": "z"}}, create("a")], 1),
        ([free, create("a")], 1),
        ([free, create("new"), create("new")], 2),
        ([purge, create("a"), free, create("c")], 3),
        ([rename, create("b"), free, create("c")], 3),
        ([{"op": "delete", "id": "a"}, free, create("a")], 2),
        ([free, {"op": "patch", "id": "b", "patch": {"slug": "a"}}, {"op": "delete", "id": "b"}], 1),
    ]:
        answer = await api.post("/note/batch", json={"operations": operations})
        conflict = problem(answer, 409, "unique-conflict")
        assert conflict["detail"].startswith(f"operation {at}: another resource has this 'slug'"), operations
        assert conflict["errors"][0]["pointer"] == f"/operations/{at}/data/slug"
    assert (await api.get("/note/count")).json() == {"count": 3}


async def test_a_body_over_the_limit_is_413():
    app = FastAPI()
    make_crud(max_body=100).apply(app)

    async def chunks():
        for _ in range(20):
            yield b" " * 10

    async with client_of(app) as api:
        problem(await api.post("/note", json={"title": "x" * 200}), 413, "body-too-large")
        headers = {"content-type": "application/json"}
        problem(await api.post("/note", content=chunks(), headers=headers), 413, "body-too-large")


async def test_a_patch_that_doubles_the_data_40_times_is_refused(api, note):
    operations = [{"op": "copy", "from": "", "path": f"/k{number}"} for number in range(40)]
    refused = problem(await api.patch(note[0], json=operations, headers=PATCH), 422, "invalid-data")
    assert "copies more than" in refused["detail"]


async def test_error_messages_are_short_for_large_bodies(api, note):
    fields = {f"field-{number}": 1 for number in range(20_000)}
    unknown = await api.post("/note", json={"title": "x", **fields})
    assert len(unknown.json()["errors"]) == 100
    test = [{"op": "test", "path": "/title", "value": "y" * 100_000}]
    tested = await api.patch(note[0], json=test, headers=PATCH)
    batch = await api.post("/note/batch", json={"operations": [{"op": "q" * 100_000}]})
    for answer in (unknown, tested, batch):
        assert answer.status_code in (409, 422)
        assert len(answer.content) < 20_000
