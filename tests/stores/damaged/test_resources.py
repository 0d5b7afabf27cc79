"""Damaged bodies, metadata and records of single resources."""

from __future__ import annotations

import pytest

from tests.stores.damaged.helpers import (
    ABSENT,
    BODIES,
    DOCS,
    FIRST,
    KINDS,
    READS,
    SECOND,
    STOPPED,
    WHOLE,
    ask,
    client_of,
    degradations,
    flipped,
    in_objects,
    of_caches,
    right,
    stopped,
    unaffected,
    written,
)


@pytest.mark.parametrize(("kind", "way"), BODIES, ids=lambda one: getattr(one, "__name__", one))
async def test_a_damaged_body(kind, way, place):
    made = KINDS[kind]
    uids = await written(made.factory(place))
    made.bodies(place, uids["2"], way)
    crud, client = await client_of(made.factory(place))
    async with client:
        for path in READS:
            right(path, await ask(client, "GET", path))
        answer = await ask(client, "GET", "/note/a")
        assert answer.status_code == 503
        assert "'a'" in answer.json()["detail"]
        for path in ("/note/a?fields=title", "/note/a/diff?from=1&to=2", "/note/a/revisions/2"):
            assert (await ask(client, "GET", path)).status_code == 503, path
        assert (await ask(client, "GET", "/note/a?revision=1")).json()["data"] == FIRST | WHOLE
        assert [one["meta"]["resource_id"] for one in (await ask(client, "GET", "/note")).json()["items"]] == ["b"]
        await unaffected(client)
        told = [one for one in await degradations(client) if one.startswith("1 resources cannot be read as a whole")]
        assert [one.rpartition(": ")[2] for one in told] == ["a"]
        patched = await ask(client, "PATCH", "/note/a", json={"title": "c"})
        assert patched.status_code == 503
        many = [
            {"op": "create", "id": "z", "data": {"title": "z"}},
            {"op": "patch", "id": "a", "patch": {"title": "c"}},
        ]
        refused = await ask(client, "POST", "/note/batch", json={"operations": many})
        assert refused.status_code == 503
        assert refused.json()["detail"].startswith("operation 1: ")
        assert (await ask(client, "GET", "/note/z")).status_code == 404
        await ask(client, "POST", "/note/a/publish")
        # The error names the remedies: an earlier revision, new data, or a purge.
        assert (await ask(client, "POST", "/note/a/switch", json={"revision": 1})).json()["data"] == FIRST | WHOLE
        assert (await ask(client, "GET", "/note/a")).json()["data"] == FIRST | WHOLE
        assert (await ask(client, "POST", "/note/a/switch", json={"revision": 2})).status_code == 503
        assert (await ask(client, "PUT", "/note/a", json={"title": "c"})).status_code == 200
        assert (await ask(client, "GET", "/note/a/data")).json()["title"] == "c"
        assert "cannot be read" in "".join(await degradations(client))  # the damaged revision is still there
        assert (await ask(client, "POST", "/note/a/purge")).status_code in (200, 202)
        assert (await ask(client, "GET", "/note/a")).status_code == 404
        assert "cannot be read" not in "".join(await degradations(client))
    await crud.close()


@pytest.mark.parametrize("kind", KINDS)
async def test_a_body_that_is_put_back_is_read_again(kind, place):
    made = KINDS[kind]
    uids = await written(made.factory(place))
    kept: list[bytes] = []
    made.bodies(place, uids["2"], lambda value: kept.append(value) or flipped(value))
    crud, client = await client_of(made.factory(place))
    async with client:
        assert (await ask(client, "GET", "/note/a")).status_code == 503
        assert await degradations(client)
        made.bodies(place, uids["2"], lambda _: kept[0])
        assert "cannot be read" not in "".join(await degradations(client))
        assert (await ask(client, "GET", "/note/a/data")).json() == SECOND | WHOLE
    await crud.close()


@pytest.mark.parametrize("kind", KINDS)
async def test_a_body_that_is_damaged_while_the_program_runs(kind, place):
    """The damage is found even if the body was verified before."""
    made = KINDS[kind]
    crud, client = await client_of(made.factory(place))
    async with client:
        await ask(client, "PUT", "/note/a", json=SECOND, headers=ABSENT)
        for path in ("/note/a", "/note", "/note/a"):
            assert (await ask(client, "GET", path)).status_code == 200
        uid = (await ask(client, "GET", "/note/a")).json()["meta"]["uid"]
        made.bodies(place, uid, flipped)
        assert (await ask(client, "GET", "/note/a")).status_code == 503
        assert (await ask(client, "GET", "/note")).json()["items"] == []
    await crud.close()


@pytest.mark.parametrize(("kind", "way"), DOCS, ids=lambda one: getattr(one, "__name__", one))
async def test_damaged_metadata(kind, way, place):
    made = KINDS[kind]
    await written(made.factory(place))
    made.docs(place, "a", way)
    crud, client = await client_of(made.factory(place))
    async with client:
        for path in READS:
            right(path, await ask(client, "GET", path))
        answer = await ask(client, "GET", "/note/a")
        assert answer.status_code == 503
        if kind != "redis-disk":  # which keeps hashes of ids
            assert "'a'" in answer.json()["detail"]
        for method, path, body in [
            ("PUT", "/note/a", {"title": "c"}),
            ("PATCH", "/note/a", {"title": "c"}),
            ("DELETE", "/note/a", None),
            ("POST", "/note/a/purge", None),
            ("POST", "/note/a/switch", {"revision": 1}),
        ]:
            assert (await ask(client, method, path, json=body)).status_code == 503, path
        assert (await ask(client, "GET", "/other/o")).status_code == 200
        if kind in STOPPED:
            await stopped(client)
        else:
            await unaffected(client)
            assert any(told.endswith(": a") for told in await degradations(client))
    await crud.close()


@pytest.mark.parametrize(("kind", "way"), DOCS, ids=lambda one: getattr(one, "__name__", one))
async def test_a_damaged_record_of_a_revision(kind, way, place):
    made = KINDS[kind]
    uids = await written(made.factory(place))
    made.records(place, uids["1"], way)
    crud, client = await client_of(made.factory(place))
    async with client:
        for path in READS:
            right(path, await ask(client, "GET", path))
        if kind in STOPPED:
            await stopped(client)
            await crud.close()
            return
        for path in ("/note/a/revisions", "/note/a/revisions/1", "/note/a/diff?from=1&to=2"):
            answer = await ask(client, "GET", path)
            assert answer.status_code == 503, path
            assert "'a'" in answer.json()["detail"]
        assert (await ask(client, "GET", "/note/a")).json()["data"] == SECOND | WHOLE
        await unaffected(client)
        assert (await ask(client, "PUT", "/note/a", json={"title": "c"})).status_code == 200
    await crud.close()


@pytest.mark.parametrize("kind", ["cached"])
async def test_a_cache_does_not_keep_what_is_damaged(kind, place):  # noqa: ARG001 - `place` reads it
    """The body in the bucket is repaired; copies of the damaged one in memory and on disk are not served."""
    uids = await written(of_caches(place))
    kept: list[bytes] = []
    in_objects(place, uids["2"], lambda value: kept.append(value) or flipped(value))
    for cache in (place.directory / "cache").rglob("*"):
        if cache.is_file():
            cache.unlink()
    crud, client = await client_of(of_caches(place))
    async with client:
        assert (await ask(client, "GET", "/note/a")).status_code == 503
        in_objects(place, uids["2"], lambda _: kept[0])
        assert (await ask(client, "GET", "/note/a/data")).json() == SECOND | WHOLE
        assert await degradations(client) == []
    await crud.close()
