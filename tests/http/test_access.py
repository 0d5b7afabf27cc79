"""Authentication and permissions: the hooks, the table of permissions, and resources that a caller may not read."""

from __future__ import annotations

import asyncio

import pytest
from fastapi import FastAPI
from hypothesis import given, settings
from hypothesis import strategies as st

from app.autocrud import AutoCRUD, field
from app.autocrud.access import Permissions, Principal, Unauthenticated, anyone, own, role
from app.autocrud.errors import ConfigError
from app.autocrud.http.guard import Guard

from .conftest import Note, client_of, make_crud, problem

ROLES = {"alice": ["writer"], "bob": ["writer"], "eve": [], "root": ["admin"]}


def sign_in(request) -> Principal:
    """Return the principal that a header names, without any check: for tests only."""
    name = request.header(b"x-name")
    if name is None:
        raise Unauthenticated("send x-name")
    return Principal(name=name, roles=frozenset(ROLES.get(name, ())))


def api_of(authorize=None, **options):
    crud = make_crud(authenticate=sign_in, authorize=authorize, **options)
    app = FastAPI()
    crud.apply(app)
    return client_of(app)


def by(name: str, **more: str) -> dict[str, str]:
    return {"x-name": name, **more}


EVERYTHING = [
    ("GET", "/note", {}),
    ("GET", "/note/count", {}),
    ("POST", "/note", {"json": {"title": "Sun"}}),
    ("POST", "/note/batch", {"json": {"operations": [{"op": "create", "data": {"title": "B"}}]}}),
    ("GET", "/note/n", {}),
    ("HEAD", "/note/n", {}),
    ("GET", "/note/n/data", {}),
    ("PUT", "/note/n", {"json": {"title": "Moon"}}),
    ("PUT", "/note/new", {"json": {"title": "Moon"}, "headers": {"if-none-match": "*"}}),
    ("PATCH", "/note/n", {"json": {"views": 2}}),
    ("DELETE", "/note/n", {}),
    ("POST", "/note/n/publish", {}),
    ("POST", "/note/n/switch", {"json": {"revision": 1}}),
    ("POST", "/note/n/restore", {}),
    ("POST", "/note/n/purge", {}),
    ("GET", "/note/n/revisions", {}),
    ("GET", "/note/n/revisions/1", {}),
    ("GET", "/note/n/diff?from=1", {}),
]
ACTION = {"GET": "read", "HEAD": "read", "DELETE": "delete", "PATCH": "update"}


def asked(name: str | None, how: dict) -> dict:
    return {**how, "headers": {**how.get("headers", {}), **({} if name is None else by(name))}}


async def test_a_request_without_a_name_is_401():
    async with api_of() as api:
        for method, path, how in [
            *EVERYTHING,
            ("GET", "/readyz", {}),
            ("GET", "/note/a/b/c/d", {}),
            ("BREW", "/note", {}),
        ]:
            answer = await api.request(method, path, **how)
            assert (answer.status_code, answer.headers["www-authenticate"]) == (401, "Bearer"), path
        assert (await api.get("/healthz")).status_code == 200
        assert (await api.get("/note/count", headers=by("alice"))).json() == {"count": 0}


async def test_the_metadata_names_the_caller():
    async with api_of() as api:
        created = await api.post("/note", json={"title": "Sun"}, headers=by("alice"))
        changed = await api.patch(created.headers["location"], json={"views": 1}, headers=by("bob"))
        meta = changed.json()["meta"]
        assert (meta["created_by"], meta["updated_by"]) == ("alice", "bob")


@pytest.mark.parametrize("allowed", ["read", "create", "update", "delete", "purge"])
async def test_each_action_has_its_own_permission(allowed):
    """A change requires the permission to read, because the response shows the resource. A creation does not."""
    actions = {
        "POST /note": "create",
        "POST /note/batch": "create",
        "PUT /note/n": "update",
        "PUT /note/new": "create",
        "POST /note/n/publish": "update",
        "POST /note/n/switch": "update",
        "POST /note/n/restore": "delete",
        "POST /note/n/purge": "purge",
    }
    async with api_of(
        Permissions({"note": {allowed: role("admin"), "read": anyone} if allowed != "create" else {"create": anyone}})
    ) as api:
        for method, path, how in EVERYTHING:
            action = ACTION.get(method) or actions[f"{method} {path}"]
            may = action == allowed if allowed == "create" else action in ("read", allowed)
            answer = await api.request(method, path, **asked("root", how))
            assert (answer.status_code != 403) == may, (method, path, answer.text)
            if allowed != "create" and action != "read":
                problem(await api.request(method, path, **asked("eve", how)), 403, "forbidden")


OWN = Permissions(
    {"note": {"read": [own, role("admin")], "create": role("writer"), "update": own, "delete": [own, role("admin")]}}
)


async def test_a_resource_of_another_caller_is_answered_like_one_that_does_not_exist():
    async with api_of(OWN) as api:
        mine = (await api.post("/note", json={"title": "mine"}, headers=by("alice"))).headers
        await api.post("/note", json={"title": "theirs"}, headers=by("bob"))
        path = mine["location"]
        missing = path[:-4] + "0000"
        for method, url, how in EVERYTHING:
            if "/n" not in url.removeprefix("/note") or "new" in url:
                continue
            for headers in ({}, {"if-match": mine["etag"]}, {"if-match": '"x", "y"'}):
                how = {**how, "headers": headers}
                theirs = await api.request(method, url.replace("/note/n", path), **asked("bob", how))
                nothing = await api.request(method, url.replace("/note/n", missing), **asked("bob", how))
                assert theirs.status_code == nothing.status_code, (method, url)
                assert theirs.text.replace(path[6:], missing[6:]) == nothing.text
                assert theirs.status_code in ((403,) if "purge" in url else (404,))
        for name, titles in {"alice": ["mine"], "bob": ["theirs"], "eve": [], "root": ["mine", "theirs"]}.items():
            found = (await api.get("/note", headers=by(name))).json()["items"]
            assert [item["data"]["title"] for item in found] == titles
            for parameters in ("data=false", "fields=title", "fields=tags,slug", "title[in]=mine,theirs"):
                assert len((await api.get(f"/note?{parameters}", headers=by(name))).json()["items"]) == len(titles)
            assert (await api.get("/note/count", headers=by(name))).json() == {"count": len(titles)}
            assert (await api.get("/note/count?title=mine", headers=by(name))).json() == {
                "count": int("mine" in titles)
            }
        problem(
            await api.patch(path, json={"views": 1}, headers=by("root")), 403, "forbidden"
        )  # seen, but not theirs to change
        assert (await api.delete(path, headers=by("root"))).status_code == 204
        problem(await api.get(path, headers=by("bob")), 404, "not-found")
        problem(await api.get(path, headers=by("alice")), 410, "deleted")


async def test_each_operation_of_a_batch_needs_permission():
    async with api_of(OWN) as api:
        mine = (await api.post("/note", json={"title": "mine"}, headers=by("alice"))).json()["meta"]["resource_id"]
        for operations, status in (
            ([{"op": "create", "data": {"title": "new"}}, {"op": "patch", "id": mine, "patch": {"views": 1}}], 404),
            ([{"op": "create", "data": {"title": "new"}}, {"op": "purge", "id": mine}], 403),
            ([{"op": "create", "data": {"title": "new"}}, {"op": "delete", "id": mine}], 404),
        ):
            answer = await api.post("/note/batch", json={"operations": operations}, headers=by("bob"))
            assert answer.status_code == status
        assert (await api.get("/note/count", headers=by("bob"))).json() == {"count": 0}


async def test_a_write_cannot_move_a_resource_out_of_the_allowed_ones():
    def authorize(principal, action, model):  # noqa: ARG001
        return True if action == "read" else field("author").eq(principal.name)

    async with api_of(authorize) as api:
        problem(await api.post("/note", json={"title": "x", "author": "bob"}, headers=by("alice")), 403, "forbidden")
        made = await api.post("/note", json={"title": "x", "author": "alice"}, headers=by("alice"))
        path = made.headers["location"]
        problem(await api.patch(path, json={"author": "bob"}, headers=by("alice")), 403, "forbidden")
        problem(await api.patch(path, json={"author": "bob"}, headers=by("bob")), 403, "forbidden")
        assert (await api.patch(path, json={"views": 1}, headers=by("alice"))).status_code == 200
        assert (await api.get(path, headers=by("bob"))).json()["data"]["author"] == "alice"


async def test_permissions_are_checked_against_the_state_that_is_replaced():
    """Between the read and the commit, another caller gets the resource: the write is planned again, and refused."""

    def authorize(principal, action, model):  # noqa: ARG001
        return field("author").eq(principal.name) if action == "update" and principal.name != "root" else True

    crud = make_crud(authenticate=sign_in, authorize=authorize)
    app = FastAPI()
    crud.apply(app)
    async with client_of(app) as api:
        path = (await api.post("/note", json={"title": "x", "author": "alice"}, headers=by("alice"))).headers[
            "location"
        ]
        storage = crud.managers["note"].storage
        commit, given = storage.commit, []

        async def meanwhile(writes, once):
            if not given:
                given.append(True)
                await api.patch(path, json={"author": "bob"}, headers=by("root"))
            return await commit(writes, once)

        storage.commit = meanwhile
        problem(await api.patch(path, json={"title": "stolen"}, headers=by("alice")), 403, "forbidden")
        assert (await api.get(f"{path}/data", headers=by("bob"))).json()["title"] == "x"


def of_author(principal, action, model):  # noqa: ARG001
    return principal.name == "root" or field("author").eq(principal.name)


@pytest.mark.parametrize("url", ["?revision=1", "/revisions", "/revisions/1", "/diff?from=1"])
async def test_permission_for_one_state_is_no_permission_for_the_next(url):
    """Between the check and the read of history, one caller purges the resource, and another creates it again."""
    crud = make_crud(authenticate=sign_in, authorize=of_author)
    app = FastAPI()
    crud.apply(app)
    async with client_of(app) as api:
        new = {"if-none-match": "*"}
        await api.put("/note/n", json={"title": "hers", "author": "alice"}, headers=by("alice", **new))
        storage, fired = crud.managers["note"].storage, []
        name = "revisions" if url == "/revisions" else "revision"
        read = getattr(storage, name)

        async def meanwhile(*given):
            if not fired:
                fired.append(True)
                await api.post("/note/n/purge", headers=by("root"))
                await api.put("/note/n", json={"title": "SECRET", "author": "bob"}, headers=by("bob", **new))
            return await read(*given)

        setattr(storage, name, meanwhile)
        answer = await api.get(f"/note/n{url}", headers=by("alice"))
        problem(answer, 404, "not-found")
        assert fired


async def test_a_list_with_a_lost_body_shows_only_allowed_resources():
    crud = make_crud(authenticate=sign_in, authorize=of_author)
    app = FastAPI()
    crud.apply(app)
    async with client_of(app) as api:
        for rid in ("kept", "lost", "n"):
            headers = by("alice", **{"if-none-match": "*"})
            await api.put(f"/note/{rid}", json={"title": rid, "author": "alice"}, headers=headers)
        manager = crud.managers["note"]
        await manager.storage.resource_store.delete([(await manager.meta("lost")).uid])
        readable = manager._reads._readable

        async def meanwhile(hit, query):
            if hit.meta.resource_id == "n":
                await api.patch("/note/n", json={"title": "SECRET", "author": "bob"}, headers=by("root"))
            return await readable(hit, query)

        manager._reads._readable = meanwhile
        found = (await api.get("/note", headers=by("alice"))).json()["items"]
        assert [item["meta"]["resource_id"] for item in found] == ["kept"]


async def test_a_repeated_key_shows_no_resource_that_the_caller_may_no_longer_read():
    async with api_of(of_author) as api:
        headers = by("alice", **{"if-none-match": "*"})
        await api.put("/note/n", json={"title": "x", "author": "alice"}, headers=headers)
        again = by("alice", **{"idempotency-key": "k"})
        assert (await api.patch("/note/n", json={"views": 1}, headers=again)).status_code == 200
        await api.patch("/note/n", json={"author": "bob"}, headers=by("root"))
        for method, path in (("GET", "/note/n"), ("DELETE", "/note/n"), ("POST", "/note/n/purge")):
            problem(await api.patch("/note/n", json={"views": 1}, headers=again), 404, "not-found")
            await api.request(method, path, headers=by("bob"))
        problem(await api.patch("/note/n", json={"views": 1}, headers=again), 404, "not-found")


async def test_every_write_is_checked_against_the_state_that_it_leaves():
    def drafts(principal, action, model):  # noqa: ARG001
        return field("meta.status").eq("draft") if action == "update" else True

    async with api_of(drafts) as api:
        await api.put("/note/n?status=draft", json={"title": "x"}, headers=by("alice", **{"if-none-match": "*"}))
        problem(await api.post("/note/n/publish", headers=by("alice")), 403, "forbidden")
        assert (await api.patch("/note/n?mode=modify", json={"views": 1}, headers=by("alice"))).status_code == 200


async def test_a_hook_may_be_async():
    async def slow_sign_in(request):
        await asyncio.sleep(0)
        return sign_in(request)

    async def authorize(principal, action, model):  # noqa: ARG001
        await asyncio.sleep(0)
        return principal.name == "alice"

    app = FastAPI()
    make_crud(authenticate=slow_sign_in, authorize=authorize).apply(app)
    async with client_of(app) as api:
        assert (await api.get("/note", headers=by("alice"))).status_code == 200
        problem(await api.get("/note", headers=by("bob")), 403, "forbidden")


@pytest.mark.parametrize("answer", [None, 1, "yes", [True]])
async def test_a_hook_with_an_invalid_result_refuses_the_request(answer, caplog):
    async with api_of(lambda *_: answer) as api:
        problem(await api.get("/note", headers=by("alice")), 500, "internal-error")
    async with api_of(lambda *_: field("titel").eq("x")) as api:
        problem(await api.get("/note", headers=by("alice")), 500, "misconfigured")
    app = FastAPI()
    make_crud(authenticate=lambda _: answer).apply(app)
    async with client_of(app) as api:
        problem(await api.get("/note"), 500, "internal-error")
    assert "authenticate returned" in caplog.text
    assert "authorize returned" in caplog.text


@pytest.mark.parametrize("name", ["", "x" * 1025, "é" * 513, "a\0b", "\ud800"])
async def test_a_principal_with_an_invalid_name_is_401(name):
    app = FastAPI()
    make_crud(authenticate=lambda _: Principal(name=name)).apply(app)
    async with client_of(app) as api:
        problem(await api.get("/note"), 401, "unauthenticated")


def test_a_table_with_an_unknown_action_or_model_is_refused():
    with pytest.raises(ConfigError, match="raed"):
        Permissions({"note": {"raed": anyone}})
    crud = make_crud(authenticate=sign_in, authorize=Permissions({"nota": {"read": anyone}}))
    with pytest.raises(ConfigError, match="'nota'; there are note"):
        crud.apply(FastAPI())


def test_the_row_of_a_model_replaces_the_row_of_all_models():
    table = Permissions({"note": {"read": anyone, "*": role("admin")}, "*": {"read": [own, role("admin")]}})
    eve, root = Principal(name="eve"), Principal(name="root", roles=frozenset({"admin"}))
    assert table(eve, "read", "note") is True
    assert table(eve, "purge", "note") is False
    assert table(root, "purge", "note") is True
    assert table(root, "purge", "other") is False
    assert table(eve, "read", "other") == field("meta.created_by").eq("eve")
    assert table(root, "read", "other") is True


PATHS = st.lists(
    st.sampled_from(
        ["", "note", "healthz", "readyz", "docs", "openapi.json", "n", "count", "batch", "..", ".", "%2e%2e", "//", "a"]
    )
    | st.text(max_size=5),
    max_size=5,
).map("/".join)


def test_no_path_method_or_header_bypasses_the_guard():
    """The deployed application gets requests that hypothesis generates."""
    crud = AutoCRUD(authenticate=sign_in)
    crud.add_model(Note, indexed_fields=["title"])
    app = FastAPI()
    crud.apply(app)
    guarded = Guard(app, sign_in)
    reached = []
    crud.managers["note"].storage.commit = lambda *_: reached.append(True)

    @settings(max_examples=400, deadline=None)
    @given(
        st.sampled_from(["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "X"]),
        PATHS,
        st.binary(max_size=20),
        st.lists(
            st.tuples(
                st.sampled_from(
                    [b"authorization", b"x-original-url", b"x-http-method-override", b"cookie", b"host", b"x-name-"]
                ),
                st.binary(max_size=12),
            ),
            max_size=3,
        ),
    )
    def check(method, path, query, headers):
        sent = []

        async def receive():
            return {"type": "http.request", "body": b'{"title": "x"}'}

        async def send(message):
            sent.append(message)

        path = "/" + path
        scope = {
            "type": "http",
            "method": method,
            "path": path,
            "raw_path": b"/healthz",
            "query_string": query,
            "headers": headers,
        }
        scope |= {
            "root_path": "",
            "scheme": "http",
            "server": ("x", 1),
            "http_version": "1.1",
            "asgi": {"version": "3.0"},
        }
        asyncio.run(guarded(scope, receive, send))
        assert sent[0]["status"] == 401 or path == "/healthz"
        assert not reached

    check()


async def test_a_websocket_is_closed():
    sent = []

    async def send(message):
        sent.append(message)

    await Guard(None, sign_in)({"type": "websocket", "path": "/healthz"}, None, send)
    assert sent == [{"type": "websocket.close", "code": 1008}]


async def test_the_openapi_document_names_the_security_scheme():
    app = FastAPI()
    make_crud(authenticate=sign_in).apply(app)
    described = app.openapi()
    assert described["components"]["securitySchemes"] == {"bearer": {"type": "http", "scheme": "bearer"}}
    for path, item in described["paths"].items():
        for operation in item.values():
            assert ("401" in operation["responses"]) == (path != "/healthz")
            assert operation.get("security") == (None if path == "/healthz" else [{"bearer": []}])
