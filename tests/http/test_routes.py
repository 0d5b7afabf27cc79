"""The routes of one resource: create, read, conditional writes, patches, drafts, history, delete and purge."""

from __future__ import annotations

import hashlib
import json

from fastapi import FastAPI

from app.autocrud.testing.blobs import NamedBlobs, blob_rows_of, upload

from .conftest import MERGE, PATCH, client_of, make_crud, problem


async def test_create(api):
    answer = await api.post("/note?status=draft", json={"title": "Sun"})
    assert answer.status_code == 201
    body = answer.json()
    rid = body["meta"]["resource_id"]
    assert answer.headers["location"] == f"/note/{rid}"
    assert answer.headers["etag"] == f'"1-{body["meta"]["nonce"]}"'
    assert body["meta"]["status"] == "draft"
    assert body["data"] == {"title": "Sun", "author": "unknown", "views": 0, "tags": [], "slug": None, "inner": None}
    canonical = json.dumps(body["data"], separators=(",", ":")).encode()
    assert body["meta"]["data_hash"] == hashlib.sha256(canonical).hexdigest()


async def test_conditional_get(api, note):
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


async def test_the_error_of_a_conflict_explains_the_etag(api, note):
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


async def test_put_creates_only_with_if_none_match(api):
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
    violation = problem(await api.patch(path, json={"views": "many"}, headers=MERGE), 422, "invalid-data")["errors"][0]
    assert violation["pointer"] == "/views"
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


async def test_unique_values(api):
    await api.post("/note", json={"title": "x", "slug": "s"})
    conflict = problem(await api.post("/note", json={"title": "y", "slug": "s"}), 409, "unique-conflict")
    assert conflict["errors"][0]["pointer"] == "/slug"


async def test_the_keys_of_blobs_are_not_shown(crud, api, note):
    """Only stores use the keys. An answer would tell the ids of uploads."""
    path, _ = note
    manager = crud.resource_manager("note")
    row = upload()
    await blob_rows_of(manager).add_blob(row)
    NamedBlobs(manager.storage).by_resource[path.rpartition("/")[2]] = (row.key,)
    await api.patch(path, json={"title": "Moon"})
    assert (await manager.storage.revision(path.rpartition("/")[2], 2)).blobs == (row.key,)
    for url in ("", "?revision=2", "/revisions", "/revisions/2", "/data", "/diff?from=1"):
        answer = await api.get(path + url)
        assert answer.status_code == 200
        assert row.sha256 not in answer.text, url
    schemas = (await api.get("/openapi.json")).json()["components"]["schemas"]
    assert "uid" in schemas["RevisionInfo"]["properties"]
    assert "blobs" not in schemas["RevisionInfo"]["properties"]
