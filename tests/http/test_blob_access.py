"""Knowing the hash of a file gives no access to it: references and downloads of several principals."""

from __future__ import annotations

import contextlib

import pytest
from fastapi import FastAPI

from app.autocrud import AutoCRUD, field
from app.autocrud.access import Permissions, anyone, own
from app.autocrud.errors import BlobGone
from app.autocrud.resource_manager.core import AccessFilter, Caller

from .albums import Album, by, register, sign_in
from .conftest import MERGE, client_of, problem

SECRET = b"the secret of alice"


def crud_of(rules) -> AutoCRUD:
    crud = AutoCRUD(authenticate=sign_in, authorize=None if rules is None else Permissions({"album": rules}))
    register(crud)
    return crud


@contextlib.asynccontextmanager
async def api_of(rules):
    app = FastAPI()
    crud_of(rules).apply(app)
    async with client_of(app) as client:
        yield client


async def upload(api, name: str, content: bytes = SECRET) -> dict:
    answer = await api.post("/album/blobs", content=content, headers=by(name))
    assert answer.status_code == 201, answer.text
    return answer.json()


async def create(api, name: str, ref: dict, title: str = "x"):
    return await api.post("/album", json={"title": title, "cover": ref}, headers=by(name))


OWN = {"*": own, "create": anyone}


async def test_the_hash_of_a_file_that_is_not_readable_is_like_an_unknown_one():
    async with api_of(OWN) as api:
        secret = await upload(api, "alice")
        unused = await create(api, "eve", secret)
        assert (await create(api, "alice", secret)).status_code == 201
        used = await create(api, "eve", secret)
        unknown = await create(api, "eve", secret | {"sha256": "0" * 64})
        for answer in (unused, used, unknown):
            problem(answer, 422, "blob-gone")
        assert unused.content == used.content == unknown.content

        mine = (await create(api, "eve", await upload(api, "eve", b"mine"))).headers["location"]
        for refused in (
            await api.put(mine, json={"title": "x", "cover": secret}, headers=by("eve")),
            await api.patch(mine, json={"photos": [secret]}, headers=by("eve") | MERGE),
            await api.post(
                "/album/batch",
                json={"operations": [{"op": "create", "data": {"title": "x", "cover": secret}}]},
                headers=by("eve"),
            ),
            await api.put(
                "/album/chosen", json={"title": "x", "cover": secret}, headers=by("eve") | {"if-none-match": "*"}
            ),
        ):
            problem(refused, 422, "blob-gone")
        problem(await api.get(f"{mine}/blobs/{secret['sha256']}", headers=by("eve")), 404, "blob-not-found")


async def test_a_file_that_the_caller_uploaded_itself_is_accepted():
    async with api_of(OWN) as api:
        await create(api, "alice", await upload(api, "alice"))
        secret = await upload(api, "eve")  # every byte again
        made = await create(api, "eve", secret)
        assert made.status_code == 201
        url = f"{made.headers['location']}/blobs/{secret['sha256']}"
        assert (await api.get(url, headers=by("eve"))).content == SECRET
        problem(await api.get(url, headers=by("alice")), 404, "not-found")


async def test_a_file_of_a_readable_revision_is_accepted():
    """Also of an earlier revision, and of a deleted resource, because both can be read."""
    async with api_of({"*": anyone}) as api:
        secret = await upload(api, "alice")
        problem(await create(api, "bob", secret), 422, "blob-gone")
        path = (await create(api, "alice", secret)).headers["location"]
        assert (await create(api, "bob", secret)).status_code == 201
        second = await upload(api, "alice", b"second")
        await api.patch(path, json={"cover": second}, headers=by("alice") | MERGE)
        await api.patch(path, json={"cover": None}, headers=by("alice") | MERGE)
        assert (await create(api, "bob", second)).status_code == 201
        await api.delete(path, headers=by("alice"))
        assert (await create(api, "carol", second)).status_code == 201


async def test_the_read_filter_decides_by_the_present_state():
    public = {"read": lambda _: field("title").eq("public"), "create": anyone, "update": anyone}
    async with api_of(public) as api:
        secret = await upload(api, "alice")
        path = (await create(api, "alice", secret, "public")).headers["location"]
        assert (await create(api, "bob", secret)).status_code == 201
        await create(api, "alice", await upload(api, "alice", b"other"), "private")
        problem(await create(api, "bob", await upload(api, "alice", b"other")), 422, "blob-gone")
        changed = await api.patch(path, json={"title": "private"}, headers=by("alice") | MERGE)
        assert changed.status_code == 200
        problem(await create(api, "carol", secret), 422, "blob-gone")


async def test_a_caller_that_may_only_create_may_use_its_own_files_alone():
    async with api_of({"create": anyone, "read": lambda who: who.name == "alice"}) as api:
        secret = await upload(api, "alice")
        await create(api, "alice", secret)
        assert (await create(api, "alice", secret)).status_code == 201
        problem(await create(api, "eve", secret), 422, "blob-gone")
        assert (await create(api, "eve", await upload(api, "eve"))).status_code == 201


async def test_a_reference_that_the_replaced_state_holds_is_kept():
    """The next writer need not be able to read the file in another way."""
    async with api_of({"*": anyone}) as api:
        secret = await upload(api, "alice")
        path = (await create(api, "alice", secret)).headers["location"]
        changed = await api.put(path, json={"title": "new", "photos": [secret]}, headers=by("bob"))
        assert changed.status_code == 200
        assert (await api.get(f"{path}/blobs/{secret['sha256']}", headers=by("bob"))).content == SECRET


@pytest.mark.parametrize(
    ("rules", "status"),
    [({"create": anyone}, 201), ({"update": own}, 201), ({"read": anyone, "delete": anyone}, 403), ({}, 403)],
)
async def test_an_upload_needs_the_permission_to_create_or_to_update(rules, status):
    async with api_of(rules) as api:
        answer = await api.post("/album/blobs", content=b"x", headers=by("eve"))
        assert answer.status_code == status
        assert (await api.post("/album/blobs", content=b"x")).status_code == 401


async def test_a_download_needs_the_permission_to_read():
    async with api_of({"create": anyone, "read": own}) as api:
        secret = await upload(api, "alice")
        path = (await create(api, "alice", secret)).headers["location"]
        url = f"{path}/blobs/{secret['sha256']}"
        assert (await api.get(url, headers=by("alice"))).content == SECRET
        problem(await api.get(url, headers=by("eve")), 404, "not-found")
        problem(await api.get(url, headers=by("eve") | {"if-none-match": "*"}), 404, "not-found")
        assert (await api.get(url)).status_code == 401
    async with api_of({"create": anyone}) as api:
        problem(await api.get(url, headers=by("alice")), 403, "forbidden")


async def test_python_callers_follow_the_same_rule():
    manager = crud_of(None).resource_manager(Album)
    ref = await manager.upload(SECRET, by="alice")
    with pytest.raises(BlobGone, match="refer to a file that does not exist; upload it first"):
        await manager.create(Album("x", ref), by="bob")
    with pytest.raises(BlobGone, match="refer to 2 files that do not exist; upload them first"):
        await manager.create(Album("x", ref, [ref]), by="bob")
    made = await manager.create(Album("x", ref), by="alice")
    copied = await manager.create(Album("y", ref), by="bob")  # without a filter, bob reads every album
    assert (
        b"".join([chunk async for chunk in (await manager.blob(copied.meta.resource_id, ref.sha256)).read()]) == SECRET
    )
    blind = Caller("eve", access_filter=AccessFilter(None, {"create": None}))
    with pytest.raises(BlobGone):
        await manager.create(Album("z", ref), by=blind)
    await manager.purge(made.meta.resource_id)
    assert (await manager.blob(copied.meta.resource_id, ref.sha256)).blob == ref


async def test_a_filter_is_applied_to_a_bounded_number_of_resources(monkeypatch):
    """The work for one request is bounded, however many resources refer to the file."""
    manager = crud_of(None).resource_manager(Album)
    ref = await manager.upload(SECRET, by="alice")
    for number in range(130):
        await manager.create(Album(f"private {number}", ref), resource_id=f"a{number:03}", by="alice")
    reads = []
    get = manager.storage.get

    async def counted(resource_id):
        reads.append(resource_id)
        return await get(resource_id)

    monkeypatch.setattr(manager.storage, "get", counted)
    only_public = field("title").eq("public")
    eve = Caller("eve", access_filter=AccessFilter(only_public, {"create": None, "read": only_public}))
    with pytest.raises(BlobGone):
        await manager.create(Album("x", ref), by=eve)
    assert len(reads) == 100
