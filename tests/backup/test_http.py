"""`GET /export` and `POST /import`, on the application and on a server."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Awaitable, Callable
from pathlib import Path

import httpx
import pytest
from fastapi import FastAPI
from msgspec import Struct

from app.autocrud import AutoCRUD
from app.autocrud.access import Permissions, Principal, Unauthenticated, anyone, own, role
from app.autocrud.backup import pieces
from app.autocrud.errors import ConfigError
from app.autocrud.http import backups
from app.autocrud.resource_manager.storage_factory import (
    DiskStorageFactory,
    IStorageFactory,
    MemoryDiskStorageFactory,
    MemoryStorageFactory,
    PairStorageFactory,
)

from .exports import Account, read

OPERATIONS = {"/export": "get", "/import": "post"}


def application(factory: IStorageFactory | None = None, **options) -> tuple[AutoCRUD, httpx.AsyncClient]:
    crud = AutoCRUD(storage_factory=factory or MemoryStorageFactory(), **options)
    crud.add_model(Account, indexed_fields=["amount"])
    app = FastAPI()
    crud.apply(app)
    return crud, httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test")


async def filled(crud: AutoCRUD, count: int = 3, note: str = "") -> None:
    for number in range(count):
        await crud.resource_manager(Account).create(Account(number, note), resource_id=f"a{number}", by="alice")


@pytest.mark.parametrize("kind", [MemoryStorageFactory, MemoryDiskStorageFactory])
async def test_a_running_server_gives_an_archive_of_what_only_it_can_read(kind, tmp_path: Path):
    crud, client = application(kind() if kind is MemoryStorageFactory else kind(tmp_path / "data"))
    await filled(crud)
    answer = await client.get("/export")
    assert answer.status_code == 200
    assert answer.headers["content-type"] == "application/gzip"
    assert answer.headers["content-disposition"] == 'attachment; filename="backup.tar.gz"'
    (tmp_path / "x.tar.gz").write_bytes(answer.content)
    assert list(read(tmp_path / "x.tar.gz").resources) == ["a0", "a1", "a2"]
    assert not await crud.resource_manager(Account).storage.meta_store.has_pins()
    await client.aclose()
    await crud.close()


async def test_the_format_and_the_models_can_be_chosen(tmp_path: Path):
    crud, client = application()
    await filled(crud)
    answer = await client.get("/export", params={"format": "tar.zst", "model": "account", "per_resource": "true"})
    assert answer.headers["content-type"] == "application/zstd"
    (tmp_path / "x.tar.zst").write_bytes(answer.content)
    found = read(tmp_path / "x.tar.zst")
    assert not found.entry.one_moment
    assert len(found.resources) == 3
    for query, detail in (
        ("format=zip", "expected tar.gz or tar.zst"),
        ("model=nope", "there is no model 'nope'"),
        ("nope=1", "unknown parameter"),
        ("per_resource=maybe", "expected true or false"),
        ("format=tar.gz&format=tar.gz", "given twice"),
    ):
        answer = await client.get(f"/export?{query}")
        assert (answer.status_code, answer.json()["type"]) == (400, "urn:crudstack:invalid-query")
        assert detail in answer.json()["detail"]
    assert (await client.head("/export")).status_code == 200
    assert (await client.post("/export")).headers["allow"] == "GET, HEAD"
    assert (await client.get("/import")).headers["allow"] == "POST"
    await client.aclose()


class Note(Struct):
    text: str


async def test_an_import_without_names_of_models_takes_those_of_the_archive():
    """An archive may have fewer models than the program, but none that the program lacks."""
    crud, client = application()
    await filled(crud)
    archive = (await client.get("/export")).content
    larger = AutoCRUD()
    larger.add_model(Account)
    larger.add_model(Note)
    app = FastAPI()
    larger.apply(app)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as other:
        answer = await other.post("/import", content=archive)
        assert {name: model["created"] for name, model in answer.json()["models"].items()} == {"account": 3}
        await larger.resource_manager(Note).create(Note("x"))
        both = (await other.get("/export")).content
    answer = await client.post("/import", content=both)
    assert answer.status_code == 422
    assert "the archive has the model 'note', which this program does not have" in answer.json()["detail"]
    assert "name the models" in answer.json()["detail"]
    answer = await client.post("/import?model=account&on_conflict=skip", content=both)
    assert answer.json()["models"]["account"]["skipped"] == 3
    await client.aclose()


@pytest.mark.parametrize("kind", ["disk", "redis"])
async def test_stores_that_commands_can_reach_are_left_to_the_commands(kind: str, tmp_path: Path):
    """Redis is not called durable. Every process can read it all the same."""
    redis = PairStorageFactory("redis", "disk", data_dir=tmp_path / "data", redis_url="redis://127.0.0.1:1/0")
    crud, client = application(DiskStorageFactory(tmp_path / "data") if kind == "disk" else redis)
    for method, path in (("GET", "/export"), ("POST", "/import")):
        answer = await client.request(method, path)
        assert (answer.status_code, answer.json()["type"]) == (409, "urn:crudstack:stored-elsewhere")
        assert f"use `crudstack {path[1:]}`" in answer.json()["detail"]
    await client.aclose()
    await crud.close()


@pytest.mark.parametrize("path", ["/export", "/import"])
@pytest.mark.parametrize(
    ("table", "status"),
    [
        ({"*": {"*": anyone}}, 403),
        ({"account": {"*": anyone}}, 403),
        ({"account": {"read": anyone, "create": anyone, "*": role("admin")}}, 403),
        ({"account": {"export": own, "import": own}}, 403),  # an archive holds all resources
        ({"account": {"export": role("backup"), "import": role("backup")}}, 200),
        ({"account": {"export": role("other"), "import": role("other")}}, 403),
    ],
)
async def test_only_a_row_of_the_model_that_names_the_action_allows_it(path: str, table, status: int):
    crud, client = application(
        authenticate=lambda _: Principal(name="eve", roles=frozenset({"admin", "backup"})),
        authorize=Permissions(table),
    )
    await filled(crud)
    before = [meta async for meta in crud.resource_manager(Account).storage.scan()]
    answer = await client.request("GET" if path == "/export" else "POST", path, content=b"no archive")
    assert answer.status_code == (422 if path == "/import" and status == 200 else status)
    if status == 403:
        assert answer.json()["type"] == "urn:crudstack:forbidden"
    assert [meta async for meta in crud.resource_manager(Account).storage.scan()] == before
    await client.aclose()


def test_a_row_of_all_models_cannot_name_the_actions():
    for action in ("export", "import"):
        with pytest.raises(ConfigError, match=f"'{action}': name it in the row of each model"):
            Permissions({"*": {action: anyone}})


async def test_callers_are_authenticated_first():
    def refuse(_):
        raise Unauthenticated("no")

    _, client = application(authenticate=refuse)
    assert (await client.get("/export")).status_code == 401
    assert (await client.post("/import")).status_code == 401
    await client.aclose()


class Client:
    """An ASGI client of one request that reads when it likes."""

    def __init__(self, crud: AutoCRUD, path: str = "/export") -> None:
        app = FastAPI()
        crud.apply(app)
        self.app, self.path, self.gone = app, path, asyncio.Event()
        self.got: list[dict] = []
        self.may_read = asyncio.Event()
        self.may_read.set()

    async def receive(self) -> dict:
        await self.gone.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: dict) -> None:
        await self.may_read.wait()
        self.got.append(message)

    async def run(self, method: str = "GET") -> None:
        scope = {
            "type": "http",
            "method": method,
            "path": self.path,
            "query_string": b"",
            "headers": [],
            "root_path": "",
            "http_version": "1.1",
        }
        await self.app(scope, self.receive, self.send)


def unapplied() -> AutoCRUD:
    crud = AutoCRUD(storage_factory=MemoryStorageFactory())
    crud.add_model(Account)
    return crud


async def noisy(crud: AutoCRUD) -> None:
    """Fill a model with 24 MB that cannot be compressed."""
    import random

    for number in range(24):
        await crud.resource_manager(Account).create(
            Account(number, random.Random(number).randbytes(500_000).hex()), resource_id=f"a{number:02d}"
        )


async def test_an_export_waits_for_a_slow_client_in_constant_memory():
    await noisy(crud := unapplied())
    client = Client(crud)
    client.may_read.clear()
    running = asyncio.create_task(client.run())
    await asyncio.sleep(1)
    waiting = await blocked(running)
    assert waiting < 4 * backups.AHEAD
    assert await crud.resource_manager(Account).storage.meta_store.has_pins()
    client.may_read.set()
    await running
    assert client.got[-1] == {"type": "http.response.body", "body": b"", "more_body": False}
    assert sum(len(message.get("body", b"")) for message in client.got) > 10_000_000
    assert not await crud.resource_manager(Account).storage.meta_store.has_pins()


async def blocked(running: asyncio.Task) -> int:
    """Return how many bytes wait in the pipe of an export."""
    import gc

    assert not running.done()
    (pipe,) = [found for found in gc.get_objects() if isinstance(found, backups._Pipe) and not found._ended]
    return pipe._size


async def test_an_export_ends_when_its_client_is_gone():
    await noisy(crud := unapplied())
    client = Client(crud)
    running = asyncio.create_task(client.run())
    while not client.got:
        await asyncio.sleep(0)
    client.may_read.clear()
    await asyncio.sleep(0.2)
    client.gone.set()
    client.may_read.set()
    await asyncio.wait_for(running, 10)
    assert client.got[-1].get("more_body") is not False
    assert not await crud.resource_manager(Account).storage.meta_store.has_pins()
    again = Client(crud2 := unapplied())
    await again.run()  # the next one is not refused
    assert again.got[0]["status"] == 200
    await crud2.close()


async def test_an_export_that_fails_half_way_is_cut_off():
    """The client must not take half an archive for a whole one."""
    await noisy(crud := unapplied())
    store = crud.resource_manager(Account).storage.resource_store
    lost = (await crud.resource_manager(Account).meta("a20")).uid
    del store._bodies[lost]
    client = Client(crud)
    with pytest.raises(backups._AnswerCutOff):
        await client.run()
    assert client.got[0]["status"] == 200
    assert client.got[-1]["more_body"] is True


async def test_an_export_that_fails_at_once_is_answered_with_its_error():
    await filled(crud := unapplied(), 1)
    crud.resource_manager(Account).storage.resource_store._bodies.clear()
    client = Client(crud)
    await client.run()
    assert client.got[0]["status"] == 503


async def test_one_export_runs_at_a_time():
    await noisy(crud := unapplied())
    client = Client(crud)
    client.may_read.clear()
    running = asyncio.create_task(client.run())
    await asyncio.sleep(0.3)
    other = httpx.AsyncClient(transport=httpx.ASGITransport(client.app), base_url="http://test")
    answer = await other.get("/export")
    assert (answer.status_code, answer.json()["type"]) == (503, "urn:crudstack:overloaded")
    assert answer.headers["retry-after"] == "1"
    client.may_read.set()
    await running
    assert (await other.get("/export")).status_code == 200
    await other.aclose()


async def test_a_client_that_reads_nothing_does_not_hold_its_pin_for_ever(monkeypatch):
    monkeypatch.setattr(backups, "STALLED_S", 0.3)
    await noisy(crud := unapplied())
    client = Client(crud)
    client.may_read.clear()
    running = asyncio.create_task(client.run())
    await asyncio.sleep(2)
    assert not await crud.resource_manager(Account).storage.meta_store.has_pins()
    client.may_read.set()
    with pytest.raises(backups._AnswerCutOff):
        await running


async def test_the_openapi_document_has_all_parameters():
    _, client = application()
    paths = (await client.get("/openapi.json")).json()["paths"]
    described = {
        path: {one["name"] for one in paths[path][method]["parameters"]} for path, method in OPERATIONS.items()
    }
    assert described["/import"] == {"model", "on_conflict", "sha256", "max_bytes", *backups.FLAGS}
    assert described["/export"] == {"model", "format", "per_resource"}
    await client.aclose()


async def test_an_import_of_another_content_type_is_refused():
    _, client = application()
    answer = await client.post("/import", content=b"{}", headers={"content-type": "application/json"})
    assert answer.status_code == 415
    await client.aclose()


async def test_an_archive_is_imported_by_another_server():
    crud, client = application()
    await filled(crud)
    archive = (await client.get("/export")).content
    other, receiver = application()
    digest = hashlib.sha256(archive).hexdigest()
    answer = await receiver.post("/import", content=archive, params={"sha256": digest})
    assert answer.status_code == 200, answer.text
    assert answer.json()["models"]["account"]["created"] == 3
    assert answer.json()["sha256"] == digest
    for rid in ("a0", "a1", "a2"):
        manager, copied = crud.resource_manager(Account), other.resource_manager(Account)
        assert (await manager.get(rid)).data == (await copied.get(rid)).data
        meta, again = await manager.meta(rid), await copied.meta(rid)
        assert (again.version, again.nonce, again.created_by) == (meta.version, meta.nonce, "alice")
    conflict = await receiver.post("/import", content=archive)
    checked = await receiver.post("/import", content=archive, params={"on_conflict": "replace", "check": "true"})
    assert (checked.status_code, checked.json()["models"]["account"]["replaced"]) == (200, 0)
    assert checked.json()["models"]["account"]["not_fitting"] == 0
    assert (conflict.status_code, conflict.json()["type"]) == (409, "urn:crudstack:import-conflict")
    skipped = await receiver.post("/import", content=archive, params={"on_conflict": "skip"})
    assert skipped.json()["models"]["account"]["skipped"] == 3
    await client.aclose()
    await receiver.aclose()


@pytest.mark.parametrize(
    ("query", "status"),
    [
        ({"sha256": "0" * 64}, 422),
        ({"max_bytes": "100"}, 413),
        ({"on_conflict": "nope"}, 400),
        ({"check": "nope"}, 400),
        ({"resume": "nope"}, 400),
        ({"resume": "true", "abort": "true"}, 422),
        ({"resume": "true"}, 404),
        ({"abort": "true"}, 404),
        ({"max_bytes": "x"}, 400),
        ({"model": "nope"}, 400),
        ({"nope": "1"}, 400),
    ],
)
async def test_an_import_that_is_refused_changes_nothing(query, status):
    crud, client = application()
    await filled(crud)
    archive = (await client.get("/export")).content
    other, receiver = application()
    answer = await receiver.post("/import", content=archive, params=query)
    assert answer.status_code == status, answer.text
    assert await other.resource_manager(Account).count() == 0
    cut = await receiver.post("/import", content=archive[:-30])
    assert (cut.status_code, cut.json()["type"]) == (422, "urn:crudstack:bad-archive")
    assert await other.resource_manager(Account).count() == 0
    await client.aclose()
    await receiver.aclose()


class Ended(BaseException):
    """Stands for the end of the process."""


def at_second_commit(monkeypatch: pytest.MonkeyPatch, crud: AutoCRUD, work: Callable[[], Awaitable[object]]) -> None:
    """Do some work before the second commit of an import."""
    storage = crud.resource_manager(Account).storage
    commit, count = storage.commit, 0

    async def watched(writes, once=None):
        nonlocal count
        count += 1
        if count == 2:
            await work()
        return await commit(writes, once)

    monkeypatch.setattr(storage, "commit", watched)


async def half_imported(monkeypatch: pytest.MonkeyPatch, work) -> tuple[AutoCRUD, httpx.AsyncClient, bytes]:
    """Return a program with data of its own, its client, and an archive of whose import the second commit does work."""
    crud, client = application()
    await filled(crud, 9)
    archive = (await client.get("/export")).content
    await client.aclose()
    crud, client = application()
    await crud.resource_manager(Account).create(Account(1), resource_id="own")
    monkeypatch.setattr(pieces, "BATCH", 3)
    at_second_commit(monkeypatch, crud, lambda: work(crud))
    return crud, client, archive


async def test_an_import_that_fails_in_the_middle_takes_back_what_it_has_written(monkeypatch):
    async def other_client(crud: AutoCRUD) -> None:
        await crud.resource_manager(Account).create(Account(1, "mine"), resource_id="a8")

    crud, client, archive = await half_imported(monkeypatch, other_client)
    answer = await client.post("/import", content=archive)
    assert (answer.status_code, answer.json()["type"]) == (409, "urn:crudstack:import-conflict")
    assert "import with on_conflict=skip or replace; what was imported until then is taken back" in answer.text
    manager = crud.resource_manager(Account)
    assert [meta.resource_id async for meta in manager.storage.scan()] == ["a8", "own"]
    answer = await client.post("/import?on_conflict=skip", content=archive)
    assert answer.json()["models"]["account"]["created"] == 8
    await client.aclose()


@pytest.mark.parametrize("how", ["resume", "abort"])
async def test_an_import_that_is_not_finished_is_resumed_or_taken_back_over_http(monkeypatch, how):
    async def end(_: AutoCRUD) -> None:
        raise Ended

    crud, client, archive = await half_imported(monkeypatch, end)
    with pytest.raises(Ended):
        await client.post("/import", content=archive)
    manager = crud.resource_manager(Account)
    answer = await client.post("/import", content=archive)
    assert (answer.status_code, answer.json()["type"]) == (409, "urn:crudstack:import-unfinished")
    assert "with resume=true to continue, or with abort=true to take it back" in answer.json()["detail"]
    await manager.update("a0", Account(5, "edited"))
    if how == "resume":
        answer = await client.post("/import?resume=true", content=archive)
        assert "continue with resume=true and on_conflict=skip or replace, or" in answer.json()["detail"]
        answer = await client.post("/import?resume=true&on_conflict=skip", content=archive)
        assert answer.json()["models"]["account"]["skipped"] == 1
        assert await manager.count() == 10
    else:
        answer = await client.post("/import?abort=true", content=archive)
        assert (answer.status_code, answer.json()["models"]["account"]["taken_back"]) == (200, 2)
        assert answer.json()["models"]["account"]["ids"] == ["a0"]
        assert [meta.resource_id async for meta in manager.storage.scan()] == ["a0", "own"]
    assert (await manager.get("a0")).data.note == "edited"
    assert (await client.post("/import?on_conflict=skip", content=archive)).status_code == 200
    await client.aclose()


async def test_an_import_whose_client_is_gone_changes_nothing():
    crud, client = application()
    await filled(crud)
    archive = (await client.get("/export")).content
    await client.aclose()
    other = unapplied()
    uploader = Client(other, "/import")
    parts = iter([{"type": "http.request", "body": archive[:200], "more_body": True}, {"type": "http.disconnect"}])

    async def receive() -> dict:
        return next(parts)

    uploader.receive = receive
    await uploader.run("POST")
    assert uploader.got == []
    assert await other.resource_manager(Account).count() == 0
    assert not await other.resource_manager(Account).storage.meta_store.has_pins()


# A server


@pytest.mark.slow
def test_a_server_streams_its_memory(serve, tmp_path: Path):
    server = serve("memory", tmp_path)
    for number in range(3):
        httpx.post(f"{server.url}/user", json={"username": f"u{number}", "email": f"u{number}@example.org"})
    with httpx.stream("GET", f"{server.url}/export") as answer:
        content = b"".join(answer.iter_bytes())
    (tmp_path / "x.tar.gz").write_bytes(content)
    assert len(read(tmp_path / "x.tar.gz", "user").resources) == 3
    assert hashlib.sha256(content).hexdigest()
    server.stop()
