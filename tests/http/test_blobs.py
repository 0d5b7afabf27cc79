"""Files over HTTP: uploads, references to them, and downloads."""

from __future__ import annotations

import hashlib

from .album_fixtures import CONTENT, PNG, album_fixture, api_fixture, crud_and_app_fixture, crud_fixture  # noqa: F401
from .albums import Album, sent, sha256_of
from .conftest import MERGE, PATCH, client_of, make_crud, problem


async def test_an_upload_returns_the_reference(api):
    assert await sent(api, CONTENT, "sun.png", **PNG) == {
        "sha256": sha256_of(CONTENT),
        "size": len(CONTENT),
        "content_type": "image/png",
        "name": "sun.png",
    }
    assert await sent(api, b"") == {
        "sha256": sha256_of(b""),
        "size": 0,
        "content_type": "application/octet-stream",
        "name": "",
    }


async def test_the_size_of_a_reference_is_that_of_the_store(api, crud):
    ref = await sent(api, CONTENT)
    for size in ({}, {"size": 7}, {"size": 2**70}):
        answer = await api.post("/album", json={"title": "x", "cover": {"sha256": ref["sha256"], **size}})
        assert answer.status_code == 201, answer.text
        assert answer.json()["data"]["cover"]["size"] == len(CONTENT)
        assert (await api.get(answer.headers["location"])).json()["data"]["cover"]["size"] == len(CONTENT)
    path, etag = answer.headers["location"], answer.headers["etag"]
    again = await api.put(path, json={"title": "x", "cover": {"sha256": ref["sha256"], "size": 9}})
    assert (again.headers["etag"], again.json()["meta"]["revision"]) == (etag, 1)
    manager = crud.resource_manager(Album)
    stored = await manager.get(path.rpartition("/")[2])
    assert stored.data.cover.size == len(CONTENT)
    assert hashlib.sha256(stored.json).hexdigest() == stored.meta.data_hash


async def test_the_record_of_each_revision_names_its_blobs(api, crud, album):
    path, cover = album
    other = await sent(api, b"other")
    assert (await api.patch(path, json={"photos": [other, cover, other]}, headers=MERGE)).status_code == 200
    assert (await api.patch(path, json={"cover": None, "photos": [other]}, headers=MERGE)).status_code == 200
    storage, id_ = crud.resource_manager(Album).storage, path.rpartition("/")[2]
    named = [[key[:64] for key in (await storage.revision(id_, number)).blobs] for number in (1, 2, 3)]
    assert named == [[cover["sha256"]], sorted([cover["sha256"], other["sha256"]]), [other["sha256"]]]
    uses = await storage.blobs.uses((await storage.revision(id_, 1)).blobs[0])
    assert [use.resource_id for use in uses] == [id_]


async def test_drafts_publish_switch_and_restore_keep_their_blobs(api):
    first, second = await sent(api, b"first"), await sent(api, b"second")
    made = await api.post("/album?status=draft", json={"title": "x", "cover": first})
    path = made.headers["location"]
    assert (await api.put(f"{path}?mode=modify", json={"title": "x", "cover": second})).status_code == 200
    assert (await api.get(f"{path}/blobs/{first['sha256']}")).status_code == 404
    assert (await api.post(f"{path}/publish")).status_code == 200
    assert (await api.put(path, json={"title": "y", "cover": first})).status_code == 200
    assert (await api.post(f"{path}/switch", json={"revision": 1})).status_code == 200
    assert (await api.get(f"{path}/blobs/{second['sha256']}")).content == b"second"
    assert (await api.get(f"{path}/blobs/{first['sha256']}")).status_code == 404
    assert (await api.get(f"{path}/blobs/{first['sha256']}?revision=2")).content == b"first"
    assert (await api.delete(path)).status_code == 204
    problem(await api.get(f"{path}/blobs/{second['sha256']}"), 410, "deleted")
    assert (await api.get(f"{path}/blobs/{second['sha256']}?include_deleted=true")).content == b"second"
    assert (await api.post(f"{path}/restore")).status_code == 200
    assert (await api.get(f"{path}/blobs/{second['sha256']}")).content == b"second"


async def test_a_reference_to_no_blob_is_refused_where_it_stands(api, album):
    path, cover = album
    gone = {"sha256": "f" * 64}
    answer = await api.post("/album", json={"title": "x", "photos": [cover, gone], "pages": {"1/2": {"photo": gone}}})
    found = problem(answer, 422, "blob-gone")
    assert [error["pointer"] for error in found["errors"]] == ["/photos/1/sha256", "/pages/1~12/photo/sha256"]
    for refused in (
        await api.put(path, json={"title": "x", "cover": gone}),
        await api.patch(path, json={"cover": gone}, headers=MERGE),
        await api.patch(path, json=[{"op": "add", "path": "/photos/-", "value": gone}], headers=PATCH),
    ):
        problem(refused, 422, "blob-gone")
    batch = {
        "operations": [
            {"op": "create", "data": {"title": "a"}},
            {"op": "create", "data": {"title": "b", "cover": gone}},
        ]
    }
    found = problem(await api.post("/album/batch", json=batch), 422, "blob-gone")
    assert [error["pointer"] for error in found["errors"]] == ["/operations/1/data/cover/sha256"]
    assert (await api.get("/album/count")).json() == {"count": 1}


async def test_invalid_references_are_refused_where_they_stand(api, album):
    _, cover = album
    bad = [cover | {"name": "../x"}, cover | {"content_type": "text"}, cover | {"sha256": "x"}, cover | {"more": 1}]
    for field, ref in zip(("name", "content_type", "sha256", "more"), bad, strict=True):
        found = problem(await api.post("/album", json={"title": "x", "photos": [ref]}), 422, "invalid-data")
        assert [error["pointer"] for error in found["errors"]] == [f"/photos/0/{field}"]


async def test_equal_content_is_uploaded_again_under_a_key_of_its_own(api, crud):
    storage = crud.resource_manager(Album).storage
    for _ in range(3):
        await sent(api, CONTENT)
    assert len({row.key for row in await storage.blobs.rows([sha256_of(CONTENT)])}) == 3


async def test_a_search_finds_albums_by_the_hash_of_their_cover(api, album):
    path, cover = album
    found = (await api.get("/album", params={"cover.sha256": cover["sha256"]})).json()["items"]
    assert [item["meta"]["resource_id"] for item in found] == [path.rpartition("/")[2]]


async def test_a_resource_with_the_id_blobs_keeps_its_methods(api):
    made = await api.put("/album/blobs", json={"title": "b"}, headers={"if-none-match": "*"})
    assert made.status_code == 201
    assert (await api.get("/album/blobs")).json()["data"]["title"] == "b"
    ref = await sent(api, CONTENT)
    assert (await api.put("/album/blobs", json={"title": "c", "cover": ref})).status_code == 200
    assert (await api.get(f"/album/blobs/blobs/{ref['sha256']}")).content == CONTENT
    assert (await api.get("/album/blobs/revisions")).status_code == 200
    assert (await api.delete("/album/blobs")).status_code == 204
    allowed = (await api.request("BREW", "/album/blobs")).headers["allow"]
    assert set(allowed.split(", ")) == {"GET", "HEAD", "PUT", "PATCH", "DELETE", "POST"}


async def test_a_model_without_files_has_no_such_routes():
    from fastapi import FastAPI

    crud, app = make_crud(), FastAPI()
    crud.apply(app)
    async with client_of(app) as api:
        assert (await api.post("/note/blobs", content=b"x")).status_code == 405
        problem(await api.get(f"/note/x/blobs/{'a' * 64}"), 404, "no-such-route")
        assert "Blob" not in (await api.get("/openapi.json")).json()["components"]["schemas"]
