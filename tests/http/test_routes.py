"""What each route answers, as docs say it."""

from __future__ import annotations

import hashlib
import json

import httpx
import pytest
from fastapi import APIRouter, FastAPI
from starlette.applications import Starlette

from app import main
from app.autocrud.resource_manager.core import ResourceManager

from .conftest import client_of, make_crud

MERGE, PATCH = {"content-type": "application/merge-patch+json"}, {"content-type": "application/json-patch+json"}


def problem(answer: httpx.Response, status: int, type_: str) -> dict:
    assert (answer.status_code, answer.headers["content-type"]) == (status, "application/problem+json"), answer.text
    body = answer.json()
    assert (body["status"], body["type"]) == (status, f"urn:crudstack:{type_}")
    return body


async def test_create(api):
    answer = await api.post("/note?status=draft", json={"title": "Sun"})
    assert answer.status_code == 201
    body = answer.json()
    rid = body["meta"]["resource_id"]
    assert answer.headers["location"] == f"/note/{rid}"
    assert answer.headers["etag"] == f'"1-{body["meta"]["nonce"]}"'
    assert body["meta"]["status"] == "draft"
    assert body["data"] == {"title": "Sun", "author": "nobody", "views": 0, "tags": [], "slug": None, "inner": None}
    canonical = json.dumps(body["data"], separators=(",", ":")).encode()
    assert body["meta"]["data_hash"] == hashlib.sha256(canonical).hexdigest()


async def test_get_and_its_conditions(api, note):
    path, etag = note
    answer = await api.get(path)
    assert (answer.status_code, answer.headers["etag"], answer.json()["data"]["title"]) == (200, etag, "Sun")
    for header in (etag, f'"x", {etag}', "*", f"W/{etag}"):
        unchanged = await api.get(path, headers={"if-none-match": header})
        assert (unchanged.status_code, unchanged.content, unchanged.headers["etag"]) == (304, b"", etag)
    assert (await api.get(path, headers={"if-none-match": '"x"'})).status_code == 200
    problem(await api.get(path, headers={"if-none-match": "x"}), 400, "invalid-condition")
    head = await api.head(path)
    assert (head.status_code, head.content, head.headers["content-length"]) == (
        200,
        b"",
        answer.headers["content-length"],
    )
    assert (await api.get(f"{path}/data")).json() == answer.json()["data"]
    assert (await api.get(f"{path}?fields=title,inner.code")).json()["data"] == {"title": "Sun"}
    problem(await api.get(f"{path}?fields=titel"), 400, "invalid-query")
    problem(await api.get("/note/nothing"), 404, "not-found")


async def test_update_with_if_match(api, note):
    path, etag = note
    answer = await api.put(path, json={"title": "Moon"}, headers={"if-match": f'"0-0000000000000000", {etag}'})
    assert (answer.status_code, answer.json()["meta"]["revision"]) == (200, 2)
    problem(await api.put(path, json={"title": "Stars"}, headers={"if-match": etag}), 412, "version-conflict")
    weak = f"W/{answer.headers['etag']}"
    problem(await api.put(path, json={"title": "Stars"}, headers={"if-match": weak}), 412, "version-conflict")
    problem(await api.delete(path, headers={"if-match": '"something-else"'}), 412, "version-conflict")
    assert (await api.put(path, json={"title": "Stars"}, headers={"if-match": "*"})).status_code == 200
    problem(await api.put("/note/nothing", json={"title": "x"}), 404, "not-found")


async def test_a_conflict_says_what_is_wrong_with_the_etag(api, note):
    path, etag = note
    other = (await api.post("/note", json={"title": "Moon"})).headers["etag"]
    none_of_ours = "is at version 1, and what was expected is no resource's ETag"
    for given, expected in [
        (other, "is at version 1, but not in the expected state: the ETag is another resource's, or this"),
        (f'"2{etag[2:]}', "is at version 1; expected version 2; read it again"),
        (f"W/{etag}", none_of_ours),
        ('"x"', none_of_ours),
        (f'"0{etag[2:]}', none_of_ours),
        (f'{other}, "x"', "none of those that were expected; read it again"),
    ]:
        answers = [await api.delete(path, headers={"if-match": given})]
        if "," not in given:
            operation = {"op": "delete", "id": path.rpartition("/")[2], "if_match": given}
            answers.append(await api.post("/note/batch", json={"operations": [operation]}))
        for answer in answers:
            assert expected in problem(answer, 412, "version-conflict")["detail"]


async def test_put_creates_only_when_asked(api):
    create = {"if-none-match": "*"}
    answer = await api.put("/note/mine", json={"title": "Sun"}, headers=create)
    assert (answer.status_code, answer.headers["location"]) == (201, "/note/mine")
    problem(await api.put("/note/mine", json={"title": "Moon"}, headers=create), 412, "version-conflict")
    for bad in (".hidden", "a%20b", "x" * 129, "%C3%A4"):
        problem(await api.put(f"/note/{bad}", json={"title": "Sun"}, headers=create), 422, "invalid-data")
    problem(await api.put("/note/count", json={"title": "Sun"}, headers=create), 405, "method-not-allowed")
    both = {"if-none-match": "*", "if-match": "*"}
    problem(await api.put("/note/mine", json={"title": "Moon"}, headers=both), 400, "invalid-condition")


async def test_if_match_can_be_required():
    app = FastAPI()
    make_crud(require_if_match=True).apply(app)
    async with client_of(app) as api:
        created = await api.post("/note", json={"title": "Sun"})
        path = created.headers["location"]
        problem(await api.put(path, json={"title": "Moon"}), 428, "precondition-required")
        problem(await api.delete(path), 428, "precondition-required")
        batch = {"operations": [{"op": "delete", "id": created.json()["meta"]["resource_id"]}]}
        problem(await api.post("/note/batch", json=batch), 428, "precondition-required")
        assert (await api.delete(path, headers={"if-match": created.headers["etag"]})).status_code == 204


async def test_merge_patch(api, note):
    path, _ = note
    answer = await api.patch(path, json={"views": 2, "inner": {"code": "x"}}, headers=MERGE)
    assert (answer.json()["data"]["views"], answer.json()["data"]["inner"]) == (2, {"code": "x"})
    answer = await api.patch(path, json={"inner": None})  # application/json is a merge patch too
    assert answer.json()["data"]["inner"] is None
    fault = problem(await api.patch(path, json={"views": "many"}, headers=MERGE), 422, "invalid-data")["errors"][0]
    assert fault["pointer"] == "/views"
    problem(await api.patch(path, json=[1], headers=MERGE), 422, "invalid-data")
    problem(await api.patch(path, json={"title": None}, headers=MERGE), 422, "invalid-data")


async def test_json_patch(api, note):
    path, _ = note
    operations = [{"op": "test", "path": "/title", "value": "Sun"}, {"op": "add", "path": "/tags/-", "value": "x"}]
    assert (await api.patch(path, json=operations, headers=PATCH)).json()["data"]["tags"] == ["x"]
    for test, says in [
        ({"path": "/title", "value": "Moon"}, 'the value at \'/title\' is "Sun"; the test expects "Moon"'),
        ({"path": "/tags", "value": None}, "the value at '/tags' is [\"x\"]; the test expects null"),
        ({"path": "/tags/7", "value": 1}, "there is nothing at '/tags/7'; the test expects 1"),
        ({"path": "/title/x", "value": {}}, "there is nothing at '/title/x'; the test expects {}"),
    ]:
        failed = await api.patch(path, json=[{"op": "test", **test}], headers=PATCH)
        assert problem(failed, 409, "patch-conflict")["errors"][0]["detail"] == says
    below = await api.patch(path, json=[{"op": "remove", "path": "/title/x"}], headers=PATCH)
    assert "class" not in problem(below, 409, "patch-conflict")["detail"]
    problem(await api.patch(path, json=[{"op": "remove", "path": "/tags/7"}], headers=PATCH), 409, "patch-conflict")
    problem(await api.patch(path, json=[{"op": "fly", "path": "/"}], headers=PATCH), 422, "invalid-data")
    problem(await api.patch(path, json={"op": "add"}, headers=PATCH), 422, "invalid-data")
    answer = await api.patch(path, content=b"x", headers={"content-type": "text/plain"})
    problem(answer, 415, "unsupported-media-type")
    assert (
        answer.headers["accept-patch"] == "application/merge-patch+json, application/json, application/json-patch+json"
    )


async def test_drafts(api):
    path = (await api.post("/note?status=draft", json={"title": "Sun"})).headers["location"]
    modified = await api.put(f"{path}?mode=modify", json={"title": "Moon"})
    assert (modified.status_code, modified.json()["meta"]["revision"], modified.json()["meta"]["version"]) == (
        200,
        1,
        2,
    )
    appended = await api.put(path, json={"title": "Stars"}, params={"status": "draft"})  # without mode it appends
    assert appended.json()["meta"]["revision"] == 2
    problem(await api.put(f"{path}?mode=modify&status=stable", json={"title": "x"}), 400, "invalid-query")
    published = await api.post(f"{path}/publish")
    assert published.json()["meta"]["status"] == "stable"
    problem(await api.patch(f"{path}?mode=modify", json={"title": "x"}), 409, "revision-is-stable")


async def test_delete_restore_purge(api, note):
    path, _ = note
    deleted = await api.delete(path)
    assert (deleted.status_code, deleted.content) == (204, b"")
    for answer in (await api.get(path), await api.put(path, json={"title": "x"}), await api.delete(path)):
        problem(answer, 410, "deleted")
    assert (await api.get(f"{path}?include_deleted=true")).json()["meta"]["is_deleted"] is True
    assert (await api.get("/note")).json()["items"] == []
    assert len((await api.get("/note?include_deleted=true")).json()["items"]) == 1
    restored = await api.post(f"{path}/restore")
    again = await api.post(f"{path}/restore")
    assert (again.status_code, again.json()) == (200, restored.json())
    purged = await api.post(f"{path}/purge")
    assert (purged.status_code, list(purged.json())) == (202, ["erased_by"])
    problem(await api.get(path), 404, "not-found")


async def test_history(api, note):
    path, _ = note
    for title in ("Moon", "Stars"):
        await api.patch(path, json={"title": title})
    page = (await api.get(f"{path}/revisions?limit=2")).json()
    assert [info["revision"] for info in page["items"]] == [3, 2]
    rest = (await api.get(f"{path}/revisions", params={"cursor": page["next_cursor"]})).json()
    assert ([info["revision"] for info in rest["items"]], rest["next_cursor"]) == ([1], None)
    one = (await api.get(f"{path}/revisions/1")).json()
    assert (one["meta"]["revision"], one["data"]["title"]) == (1, "Sun")
    shown = (await api.get(f"{path}?revision=2")).json()
    assert (shown["meta"]["revision"], shown["data"]["title"]) == (2, "Moon")
    diff = await api.get(f"{path}/diff?from=1&to=2")
    assert diff.json() == [{"op": "replace", "path": "/title", "value": "Moon"}]
    assert diff.headers["content-type"] == "application/json-patch+json"
    assert (await api.get(f"{path}/diff?from=3")).json() == []
    problem(await api.get(f"{path}/diff"), 400, "invalid-query")
    problem(await api.get(f"{path}/revisions/9"), 404, "revision-not-found")
    switched = await api.post(f"{path}/switch", json={"revision": 1})
    assert (switched.json()["meta"]["revision"], switched.json()["data"]["title"]) == (1, "Sun")
    problem(await api.post(f"{path}/switch", json={"revision": 9}), 404, "revision-not-found")
    problem(await api.post(f"{path}/switch", json={"revision": 1, "x": 1}), 422, "invalid-data")


async def test_search(api):
    for views in range(6):
        data = {"title": f"t{views}", "author": "ab"[views % 2], "views": views, "tags": ["x"] if views < 2 else []}
        await api.post("/note", json=data)

    async def titles(query: str) -> list[str]:
        answer = await api.get(f"/note?{query}")
        assert answer.status_code == 200, answer.text
        return [item["data"]["title"] for item in answer.json()["items"]]

    assert await titles("author=a&sort=-views") == ["t4", "t2", "t0"]
    assert await titles("views[gte]=2&views[lt]=4&sort=views") == ["t2", "t3"]
    assert await titles("tags[contains]=x") == ["t0", "t1"]
    assert await titles("author[in]=b,c&sort=views") == ["t1", "t3", "t5"]
    assert await titles("title[in]=t1&title[in]=t2&sort=views") == ["t1", "t2"]
    assert await titles("inner.code[is_null]=true&limit=2") == ["t0", "t1"]
    assert await titles("meta.created_time[gte]=2026-01-01T00:00:00Z&limit=1") == ["t0"]
    assert await titles("meta.status=draft") == []
    assert (await api.get("/note/count?author=a")).json() == {"count": 3}


async def test_pages(api):
    for views in range(5):
        await api.post("/note", json={"title": f"t{views}", "views": views})
    first = await api.get("/note?sort=-views&limit=2")
    cursor = first.json()["next_cursor"]
    assert first.headers["link"] == f'</note?sort=-views&limit=2&cursor={cursor}>; rel="next"'
    seen, answer = first.json()["items"], first
    while "next" in answer.links:
        answer = await api.get(answer.links["next"]["url"])
        seen += answer.json()["items"]
    assert [item["data"]["views"] for item in seen] == [4, 3, 2, 1, 0]
    for other in ("sort=views", "sort=-views&author=x", "", "sort=-views&include_deleted=true"):
        problem(await api.get(f"/note?{other}&cursor={cursor}"), 400, "invalid-query")
    problem(await api.get("/note?sort=-views&cursor=x"), 400, "invalid-query")


async def test_a_link_that_proxies_would_refuse_is_left_to_the_cursor(api):
    for length in range(2800, 3200, 50):
        await api.post("/note", json={"title": "x" * length})
    path, cursor, links = "/note?sort=title&limit=1&data=false", "", []
    while cursor is not None:
        answer = await api.get(path + cursor)
        links.append(answer.headers.get("link", ""))
        following = answer.json()["next_cursor"]
        cursor = None if following is None else f"&cursor={following}"
    assert len(links) == 8
    assert links[0].endswith('>; rel="next"')
    assert 4000 < max(map(len, links)) <= 4096
    assert links[6] == ""


async def test_lists_from_the_index_touch_no_body(api, crud, monkeypatch):
    await api.post("/note", json={"title": "Sun", "author": "alice", "tags": ["x"], "inner": {"code": "c"}})

    async def refuse(*_):
        raise AssertionError("a body was read")

    monkeypatch.setattr(crud.managers["note"].storage, "bodies", refuse)
    (item,) = (await api.get("/note?fields=author,inner.code,tags")).json()["items"]
    assert item["data"] == {"author": "alice", "inner": {"code": "c"}, "tags": ["x"]}
    (item,) = (await api.get("/note?data=false")).json()["items"]
    assert list(item) == ["meta"]


@pytest.mark.parametrize(
    ("query", "names"),
    [
        ("authr=a", "?authr"),
        ("limit=201", "?limit"),
        ("limit=0", "?limit"),
        ("limit=ten", "?limit"),
        ("limit=5&limit=6", "?limit"),
        ("sort=nothing", "?sort"),
        ("sort=tags", "?sort"),
        ("views[gte]=many", "?views[gte]"),
        ("views=99999999999999999999", "?views"),
        ("views[like]=1", "?views[like]"),
        ("tags=x", "?tags"),
        ("views[contains]=1", "?views[contains]"),
        ("meta.created_time[gte]=2026-01-01T00:00:00+01:00", "?meta.created_time[gte]"),
        ("meta.nonce=x", "?meta.nonce"),
        ("data=perhaps", "?data"),
        ("data=false&fields=title", "?fields"),
        ("author=%00", "?author"),
    ],
)
async def test_what_is_wrong_in_a_query_is_400_and_named(api, query, names):
    assert problem(await api.get(f"/note?{query}"), 400, "invalid-query")["errors"][0]["pointer"] == names


async def test_a_plus_that_became_a_space_is_named(api):
    answer = await api.get("/note?meta.created_time[gte]=2026-01-01T00:00:00+01:00")
    assert "%2B" in answer.json()["detail"]


async def test_an_unindexed_field_names_the_indexed_ones(api):
    assert "author, inner.code, slug, tags, title, views" in (await api.get("/note?sort=inner")).json()["detail"]


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
async def test_a_patch_in_a_batch_that_is_none_is_422(api, note, patch):
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
async def test_what_is_wrong_in_a_body_is_422_and_located(api, body, pointer):
    answer = await api.post("/note", content=body, headers={"content-type": "application/json"})
    assert problem(answer, 422, "invalid-data")["errors"][0]["pointer"] == pointer
    assert (await api.get("/note/count")).json() == {"count": 0}


@pytest.mark.parametrize("half", ["\\ud800", "\\udc00", "x\\ud800\\u0041"])
async def test_half_of_a_pair_is_not_called_truncated(api, note, half):
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
async def test_a_revision_that_cannot_be_is_told_what_can(api, note, number):
    path, _ = note
    alone = await api.post(f"{path}/switch", json={"revision": number})
    operation = {"op": "switch", "id": path.rpartition("/")[2], "revision": number}
    batch = await api.post("/note/batch", json={"operations": [operation]})
    for answer, pointer in ((alone, "/revision"), (batch, "/operations/0/revision")):
        (fault,) = problem(answer, 422, "invalid-data")["errors"]
        assert fault["pointer"] == pointer
        assert fault["detail"].startswith("expected a whole number from 1 to 2147483648, got ")


async def test_who_asks_whether_something_is_deleted_finds_what_is(api, note):
    await api.post("/note", json={"title": "Moon"})
    await api.delete(note[0])
    for query, titles in [
        ("meta.is_deleted=true", {"Sun"}),
        ("meta.is_deleted=false", {"Moon"}),
        ("meta.is_deleted[in]=true,false", {"Sun", "Moon"}),
        ("meta.is_deleted=true&include_deleted=false", set()),
        ("", {"Moon"}),
    ]:
        found = (await api.get(f"/note?{query}")).json()["items"]
        assert {item["data"]["title"] for item in found} == titles
        assert (await api.get(f"/note/count?{query}")).json() == {"count": len(titles)}


async def test_unique_values(api):
    await api.post("/note", json={"title": "x", "slug": "s"})
    conflict = problem(await api.post("/note", json={"title": "y", "slug": "s"}), 409, "unique-conflict")
    assert conflict["errors"][0]["pointer"] == "/slug"


async def test_a_batch_says_which_operation_wants_a_value_that_is_taken(api):
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


async def test_bodies_have_a_limit():
    app = FastAPI()
    make_crud(max_body=100).apply(app)

    async def chunks():
        for _ in range(20):
            yield b" " * 10

    async with client_of(app) as api:
        problem(await api.post("/note", json={"title": "x" * 200}), 413, "body-too-large")
        headers = {"content-type": "application/json"}
        problem(await api.post("/note", content=chunks(), headers=headers), 413, "body-too-large")


async def test_405_lists_all_methods(api, note):
    for path, allowed in (
        ("/note", "GET, POST, HEAD"),
        (note[0], "GET, PUT, PATCH, DELETE, HEAD"),
        (f"{note[0]}/publish", "POST"),
        ("/healthz", "GET, HEAD"),
    ):
        answer = await api.request("TRACE", path)
        problem(answer, 405, "method-not-allowed")
        assert answer.headers["allow"] == allowed
    problem(await api.get(f"{note[0]}/nothing"), 404, "no-such-route")
    problem(await api.get(f"{note[0]}/revisions/one"), 404, "no-such-route")


async def test_a_defect_of_ours_tells_nothing(api, note, monkeypatch, caplog):
    async def explode(*_, **__):
        raise RuntimeError("secret")

    monkeypatch.setattr(ResourceManager, "get", explode)
    answer = await api.get(note[0])
    problem(answer, 500, "internal-error")
    assert "secret" not in answer.text
    assert "secret" in caplog.text


async def test_health(api, crud, monkeypatch):
    assert (await api.get("/healthz")).json() == {"status": "ok"}
    ready = await api.get("/readyz")
    assert (ready.status_code, ready.json()["not_durable"]) == (200, ["note"])

    async def fail():
        raise RuntimeError("secret")

    monkeypatch.setattr(crud.managers["note"].storage, "health", fail)
    answer = await api.get("/readyz")
    assert (answer.status_code, answer.json()["status"]) == (503, "unavailable")
    assert "secret" not in answer.text


@pytest.mark.parametrize("prefix", ["", "/v1"])
async def test_a_bare_router_answers_the_same(prefix):
    router = APIRouter(prefix=prefix)
    crud = make_crud()
    crud.apply(router)
    app = FastAPI()
    app.include_router(router, prefix="/api")
    crud.describe(app, prefix="/api")
    async with client_of(app) as api:
        created = await api.post("/api/note", json={"title": "Sun"})
        assert created.headers["location"].startswith("/api/note/")
        assert (await api.get(created.headers["location"])).status_code == 200
        problem(await api.get("/api/note/nothing"), 404, "not-found")
        problem(await api.delete("/api/note"), 405, "method-not-allowed")
        assert "/api/note/{id}" in (await api.get("/openapi.json")).json()["paths"]


async def test_starlette_will_do():
    app = Starlette()
    make_crud().apply(app)
    async with client_of(app) as api:
        assert (await api.post("/note", json={"title": "Sun"})).status_code == 201


async def test_docs_are_local(api):
    page = (await api.get("/docs")).text
    assert "//" not in page.replace("// ", "").replace("http://www.w3.org", "")
    for name in ("swagger-ui-bundle.js", "swagger-ui.css", "favicon.png"):
        assert f"/docs/assets/{name}" in page
        assert (await api.get(f"/docs/assets/{name}")).status_code == 200
    assert (await api.get("/docs/assets/other")).status_code == 404
    assert (await api.get("/redoc")).status_code == 404


async def test_the_description_is_openapi_31(api):
    document = (await api.get("/openapi.json")).json()
    assert document["openapi"] == "3.1.0"
    for schema in document["components"]["schemas"].values():
        if "properties" in schema and "meta" in schema["properties"]:
            assert schema["additionalProperties"] is False
    names = {parameter["name"] for parameter in document["paths"]["/note"]["get"]["parameters"]}
    assert {"views[gte]", "tags[contains]", "meta.created_time[gte]", "sort", "limit", "cursor"} <= names


async def test_a_patch_that_doubles_the_data_again_and_again(api, note):
    operations = [{"op": "copy", "from": "", "path": f"/k{number}"} for number in range(40)]
    refused = problem(await api.patch(note[0], json=operations, headers=PATCH), 422, "invalid-data")
    assert "copies more than" in refused["detail"]


async def test_messages_have_a_length(api, note):
    fields = {f"field-{number}": 1 for number in range(20_000)}
    unknown = await api.post("/note", json={"title": "x", **fields})
    assert len(unknown.json()["errors"]) == 100
    test = [{"op": "test", "path": "/title", "value": "y" * 100_000}]
    tested = await api.patch(note[0], json=test, headers=PATCH)
    batch = await api.post("/note/batch", json={"operations": [{"op": "q" * 100_000}]})
    for answer in (unknown, tested, batch):
        assert answer.status_code in (409, 422)
        assert len(answer.content) < 20_000


async def test_no_scheme_makes_an_error(crud):
    app = main_app(crud)
    sent = []

    async def send(message):
        sent.append(message)

    scope = {
        "type": "http",
        "method": "GET",
        "path": "/nowhere",
        "raw_path": b"/nowhere",
        "query_string": b"",
        "headers": [],
    }
    await app(scope | {"scheme": "*", "root_path": "", "http_version": "1.1", "server": ("x", 1)}, None, send)
    assert sent[0]["status"] == 404


def main_app(crud):
    app = FastAPI(exception_handlers={404: main._problem, 405: main._problem})
    crud.apply(app)
    return app
