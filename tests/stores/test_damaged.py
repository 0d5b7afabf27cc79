"""Stored data that is damaged: 503 `store-damaged` or the right data, never wrong data, never 500; others are unaffected.

For each kind of store, one stored thing at a time is removed, cut, zeroed, flipped or replaced behind the back of the
program. Then a new process asks everything.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import apsw
import httpx
import psycopg
import pytest
import redis
from fastapi import FastAPI
from msgspec import Struct

from app.autocrud import AutoCRUD, IndexedField
from app.autocrud.resource_manager.backends.s3.memory_object_store import MemoryObjectStore
from app.autocrud.resource_manager.backends.s3.object_store import Object
from app.autocrud.resource_manager.backends.sqlite.findings_table import TABLE
from app.autocrud.resource_manager.basic import IStorage
from app.autocrud.resource_manager.meta_store.fast_slow import FastSlowMetaStore
from app.autocrud.resource_manager.meta_store.postgres import PostgresMetaStore
from app.autocrud.resource_manager.meta_store.redis import RedisMetaStore
from app.autocrud.resource_manager.resource_store.cache import DiskCache, MemoryCache
from app.autocrud.resource_manager.resource_store.cached_s3 import CachedS3ResourceStore
from app.autocrud.resource_manager.resource_store.s3 import S3ResourceStore
from app.autocrud.resource_manager.resource_store.simple import DiskResourceStore
from app.autocrud.resource_manager.storage.simple_storage import SimpleStorage
from app.autocrud.resource_manager.storage_factory import (
    DiskStorageFactory,
    IStorageFactory,
    MemoryDiskStorageFactory,
    S3StorageFactory,
)


class Note(Struct):
    title: str
    author: str = "nobody"
    slug: str | None = None


class Other(Struct):
    text: str


class Factory(IStorageFactory):
    def __init__(self, build: Callable[[str], IStorage]) -> None:
        self._build = build

    def build(self, model_name: str) -> IStorage:
        return self._build(model_name)


class Place(NamedTuple):
    """Where the data of a test lies."""

    directory: Path
    name: str
    objects: MemoryObjectStore
    postgres: str
    redis: str


FIRST, SECOND, OTHERS = {"title": "a1", "author": "x"}, {"title": "a2", "author": "x"}, {"title": "b1", "author": "x"}
WHOLE = {"slug": None}
ABSENT = {"If-None-Match": "*"}


async def client_of(factory: IStorageFactory) -> tuple[AutoCRUD, httpx.AsyncClient]:
    crud = AutoCRUD(storage_factory=factory)
    crud.add_model(Note, indexed_fields=["title", "author", IndexedField("slug", unique=True)])
    crud.add_model(Other)
    app = FastAPI()
    crud.apply(app)
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    return crud, httpx.AsyncClient(transport=transport, base_url="http://test")


# The ways


def cut(value: bytes) -> bytes:
    return value[: len(value) // 2]


def zeroed(value: bytes) -> bytes:
    return bytes(len(value))


def emptied(_: bytes) -> bytes:
    return b""


def flipped(value: bytes) -> bytes:
    """A letter of a value becomes another one: still JSON, still of the model."""
    at = value.rindex(b"x")
    return value[:at] + b"y" + value[at + 1 :]


def replaced(_: bytes) -> bytes:
    return json.dumps({"title": "of another", "author": "x", "slug": None}).encode()


def removed(_: bytes) -> None:
    return None


def numbers(_: bytes) -> bytes:
    return b"[1, 2]"


BODY_WAYS = [removed, cut, zeroed, emptied, flipped, replaced, numbers]
DOC_WAYS = [cut, zeroed, emptied, numbers]
"""Of metadata and records, which have no hash: what can be decoded is taken for what was stored."""

# The kinds: how the storage is made, how a stored thing is changed


class Kind(NamedTuple):
    factory: Callable[[Place], IStorageFactory]
    bodies: Callable[[Place, str, Callable], None]
    docs: Callable[[Place, str, Callable], None] | None
    records: Callable[[Place, str, Callable], None] | None


def _rows(path: Path, table: str, column: str, where: str, way: Callable) -> None:
    connection = apsw.Connection(str(path))
    rows = connection.execute(f"SELECT rowid, {column} FROM {table} WHERE {where}").fetchall()
    assert rows, f"there is nothing to damage in {path}"
    for rowid, value in rows:
        new = way(value)
        if new is None:
            connection.execute(f"DELETE FROM {table} WHERE rowid = ?", (rowid,))
        else:
            connection.execute(f"UPDATE {table} SET {column} = ? WHERE rowid = ?", (new, rowid))
    connection.close()


def in_bodies(below: str) -> Callable[[Place, str, Callable], None]:
    return lambda place, uid, way: _rows(
        place.directory / "note" / below / "bodies.sqlite", "bodies", "body", f"uid = '{uid}'", way
    )


def in_objects(place: Place, uid: str, way: Callable) -> None:
    (key,) = (key for key in place.objects.objects if key.endswith(uid))
    new = way(place.objects.objects[key].body)
    if new is None:
        del place.objects.objects[key]
    else:
        place.objects.objects[key] = Object(new, '"another"')


def in_index(place: Place, resource_id: str, way: Callable) -> None:
    path = place.directory / "note/meta/index.sqlite"
    _rows(path, "resources", "doc", f"id = '{resource_id}'", way)


def in_kept_records(place: Place, resource_id: str, way: Callable) -> None:
    _rows(place.directory / "note/bodies.sqlite", "resources", "doc", f"id = '{resource_id}'", way)


def in_kept_revisions(place: Place, uid: str, way: Callable) -> None:
    _records(place.directory / "note/bodies.sqlite", uid, way)


def in_index_records(place: Place, uid: str, way: Callable) -> None:
    _records(place.directory / "note/meta/index.sqlite", uid, way)


def _records(path: Path, uid: str, way: Callable) -> None:
    connection = apsw.Connection(str(path))
    (doc,) = connection.execute("SELECT doc FROM revisions WHERE uid = ?", (uid,)).fetchone()
    connection.execute("UPDATE revisions SET doc = ? WHERE uid = ?", (way(doc), uid))
    connection.close()


def in_postgres(part: str, column: str) -> Callable[[Place, str, Callable], None]:
    def damage(place: Place, key: str, way: Callable) -> None:
        table = f'"meta_{place.name}{part}"'
        with psycopg.connect(place.postgres, autocommit=True) as connection:
            row = connection.execute(f"SELECT doc FROM {table} WHERE {column} = %s", (key,)).fetchone()
            assert row is not None
            connection.execute(f"UPDATE {table} SET doc = %s WHERE {column} = %s", (way(bytes(row[0])), key))

    return damage


def in_redis(place: Place, resource_id: str, way: Callable) -> None:
    from app.autocrud.resource_manager.backends.redis.script_arguments import digest

    with redis.Redis.from_url(place.redis) as client:
        key = f"{place.name}:res:{digest(resource_id)}"
        client.hset(key, "d", way(client.hget(key, "d")))


def in_redis_records(place: Place, uid: str, way: Callable) -> None:
    with redis.Redis.from_url(place.redis) as client:
        for key in client.scan_iter(f"{place.name}:res:*"):
            for field, value in client.hgetall(key).items():
                size, colon, rest = value.partition(b":")
                if colon and rest.startswith(uid.encode()):
                    doc = rest[int(size) :]
                    client.hset(key, field, size + colon + rest[: int(size)] + way(doc))
                    return
        raise AssertionError("there is no such record")


def of_postgres(place: Place) -> IStorageFactory:
    def build(model: str) -> IStorage:
        table = f"meta_{place.name}" if model == "note" else f"meta_{place.name}_{model}"
        bodies = S3ResourceStore("double", f"{model}/", object_store=place.objects)
        return SimpleStorage(PostgresMetaStore(place.postgres, table_name=table), bodies)

    return Factory(build)


def of_redis(place: Place) -> IStorageFactory:
    def build(model: str) -> IStorage:
        prefix = f"{place.name}:" if model == "note" else f"{place.name}-{model}:"
        return SimpleStorage(RedisMetaStore(place.redis, prefix), DiskResourceStore(place.directory / model))

    return Factory(build)


def of_caches(place: Place) -> IStorageFactory:
    def build(model: str) -> IStorage:
        caches = [MemoryCache(max_size=100), DiskCache(place.directory / "cache" / model)]
        store = CachedS3ResourceStore(caches, bucket="double", prefix=f"{model}/", object_store=place.objects)
        table = f"meta_{place.name}" if model == "note" else f"meta_{place.name}_{model}"
        return SimpleStorage(PostgresMetaStore(place.postgres, table_name=table), store)

    return Factory(build)


KINDS = {
    "memory-disk": Kind(
        lambda place: MemoryDiskStorageFactory(place.directory), in_bodies(""), in_kept_records, in_kept_revisions
    ),
    "disk": Kind(lambda place: DiskStorageFactory(place.directory), in_bodies("data"), in_index, in_index_records),
    "s3-sqlite": Kind(lambda place: S3StorageFactory("double", object_store=place.objects), in_objects, None, None),
    "postgres-s3": Kind(of_postgres, in_objects, in_postgres("", "id"), in_postgres(":revisions", "uid")),
    "redis-disk": Kind(of_redis, in_bodies(""), in_redis, in_redis_records),
}
STOPPED = ("memory-disk", "redis-disk")
"""Kinds whose index is made of all metadata and records."""
BODIES = [(kind, way) for kind in KINDS for way in BODY_WAYS]
DOCS = [(kind, way) for kind, made in KINDS.items() if made.docs for way in DOC_WAYS]


@pytest.fixture
def place(request, tmp_path) -> Place:
    kind = KINDS.get(request.node.callspec.params["kind"])
    wants = request.getfixturevalue
    postgres = wants("postgres") if kind is None or kind.factory in (of_postgres, of_caches) else ""
    valkey = wants("valkey") if kind is not None and kind.factory is of_redis else ""
    return Place(tmp_path, tmp_path.name, MemoryObjectStore(), postgres, valkey)


@pytest.fixture(autouse=True)
def quiet(caplog) -> Iterator[None]:
    """No damage is a defect: nothing is logged with a traceback."""
    caplog.set_level(logging.DEBUG, "crudstack")
    yield
    assert not [record for record in caplog.records if record.exc_info]


async def written(factory: IStorageFactory) -> dict[str, str]:
    """Write two resources; return the uids of the first one's bodies by revision."""
    crud, client = await client_of(factory)
    async with client:
        for path, data in [("/note/a", FIRST), ("/note/b", OTHERS), ("/other/o", {"text": "o"})]:
            assert (await client.put(path, json=data, headers=ABSENT)).status_code == 201
        assert (await client.put("/note/a", json=SECOND)).status_code == 200
        history = (await client.get("/note/a/revisions")).json()["items"]
    await crud.close()
    return {str(info["revision"]): info["uid"] for info in history}


READS = [
    "/note/a",
    "/note/a?include_deleted=true",
    "/note/a/data",
    "/note/a?fields=title",
    "/note/a?revision=1",
    "/note/a/revisions",
    "/note/a/revisions/1",
    "/note/a/revisions/2",
    "/note/a/diff?from=1&to=2",
    "/note",
    "/note?sort=-title&limit=1",
    "/note?fields=title",
    "/note?fields=title,slug",
    "/note?data=false",
    "/note?author=x",
    "/note/count",
    "/note/count?author=x",
]


async def ask(client: httpx.AsyncClient, method: str, path: str, **more: Any) -> httpx.Response:
    async with asyncio.timeout(60):
        answer = await client.request(method, path, **more)
    if answer.status_code >= 500:
        problem = answer.json()
        assert answer.status_code == 503, (path, problem)
        assert problem["type"] in ("urn:crudstack:store-damaged", "urn:crudstack:head-lost"), (path, problem)
        assert len(problem["detail"]) > 20
        assert "crudstack" not in problem["detail"]
    elif answer.content:
        answer.json()
    return answer


def right(path: str, answer: httpx.Response) -> None:
    """What is answered is what was stored."""
    if answer.status_code != 200 or "diff" in path or "revisions" in path or "count" in path:
        return
    body = answer.json()
    found = body.get("items", [body if "data" in body or "meta" in body else {"data": body}])
    for one in found:
        if "data" in one:
            known = [FIRST | WHOLE, SECOND | WHOLE, OTHERS | WHOLE]
            assert any(one["data"].items() <= data.items() for data in known), (path, one)
            if "meta" in one and one["meta"]["resource_id"] == "b":
                assert one["data"]["title"] == "b1"


async def unaffected(client: httpx.AsyncClient) -> None:
    assert (await ask(client, "GET", "/note/b")).json()["data"] == OTHERS | WHOLE
    assert (await ask(client, "GET", "/other/o")).json()["data"] == {"text": "o"}
    assert "b" in [one["meta"]["resource_id"] for one in (await ask(client, "GET", "/note?author=x")).json()["items"]]
    assert (await ask(client, "POST", "/note", json={"title": "new"})).status_code == 201


async def degradations(client: httpx.AsyncClient) -> list[str]:
    ready = await client.get("/readyz")
    assert ready.status_code == 200, ready.text
    return ready.json()["models"]["note"]["impairments"]


async def stopped(client: httpx.AsyncClient) -> None:
    """The index in memory cannot be made of all resources, so the model stops rather than to miss one; others go on."""
    ready = await client.get("/readyz")
    assert ready.status_code == 503
    models = ready.json()["models"]
    assert "cannot be decoded" in models["note"]["status"]
    if ready.json()["models"]["note"]["durable"]:
        assert "'a'" in models["note"]["status"]
    assert models["other"]["status"] == "ready"
    assert (await ask(client, "GET", "/note")).status_code == 503


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
        # What to do is what the error says: an earlier revision, new data, or a purge.
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
    """Also one that was compared before."""
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


# What a whole model needs


def _file(path: Path, way: Callable) -> None:
    for one in path.parent.glob(f"{path.name}-*"):  # what SQLite keeps beside it
        one.unlink()
    new = way(path.read_bytes())
    path.unlink() if new is None else path.write_bytes(new)


def header(value: bytes) -> bytes:
    return b"not a database file" + value[19:]


def middle(value: bytes) -> bytes:
    """All pages but the first one."""
    return value[:4096] + bytes(len(value) - 4096)


def _statement(text: str) -> Callable[[Place], None]:
    def run(place: Place) -> None:
        with psycopg.connect(place.postgres, autocommit=True) as connection:
            connection.execute(text.format(table=f"meta_{place.name}"))

    return run


def _object(key: str, way: Callable) -> Callable[[Place], None]:
    def damage(place: Place) -> None:
        found = [one for one in place.objects.objects if one.startswith("meta/note.sqlite/") and key in one]
        assert found, list(place.objects.objects)
        for one in found:
            new = way(place.objects.objects[one].body)
            if new is None:
                del place.objects.objects[one]
            else:
                place.objects.objects[one] = Object(new, '"another"')

    return damage


def _key(command: str, *arguments: Any) -> Callable[[Place], None]:
    def damage(place: Place) -> None:
        with redis.Redis.from_url(place.redis) as client:
            client.execute_command(command, f"{place.name}:meta", *arguments)

    return damage


def _index(way: Callable) -> Callable[[Place], None]:
    return lambda place: _file(place.directory / "note/meta/index.sqlite", way)


def _bodies(below: str, way: Callable) -> Callable[[Place], None]:
    return lambda place: _file(place.directory / "note" / below / "bodies.sqlite", way)


def _state(path: str) -> Callable[[Place], None]:
    def damage(place: Place) -> None:
        connection = apsw.Connection(str(place.directory / path))
        connection.execute("DELETE FROM state")
        connection.close()

    return damage


def _findings(statement: str) -> Callable[[Place], None]:
    def run(place: Place) -> None:
        connection = apsw.Connection(str(place.directory / "note/meta/index.sqlite"))
        connection.execute(TABLE)
        connection.execute(statement)
        connection.close()

    return run


MODELS = {
    "findings removed": ("disk", _findings("DELETE FROM findings")),
    "findings that are none": ("disk", _findings("INSERT OR REPLACE INTO findings VALUES (1, 'x')")),
    "findings of another kind": ("disk", _findings("""INSERT OR REPLACE INTO findings VALUES (1, '{"healed":1}')""")),
    **{f"disk index {way.__name__}": ("disk", _index(way)) for way in (cut, zeroed, header, middle)},
    **{f"disk bodies {way.__name__}": ("disk", _bodies("data", way)) for way in (removed, cut, zeroed, header, middle)},
    **{f"records {way.__name__}": ("memory-disk", _bodies("", way)) for way in (cut, zeroed, header, middle)},
    **{f"HEAD {way.__name__}": ("s3-sqlite", _object("HEAD", way)) for way in (removed, cut, zeroed, emptied, numbers)},
    **{f"BORN {way.__name__}": ("s3-sqlite", _object("BORN", way)) for way in (removed, cut, zeroed, emptied, numbers)},
    "postgres main": ("postgres-s3", _statement('DROP TABLE "{table}" CASCADE')),
    "postgres revisions": ("postgres-s3", _statement('DROP TABLE "{table}:revisions" CASCADE')),
    "postgres state": ("postgres-s3", _statement('DELETE FROM "{table}:state"')),
    "redis meta of another type": ("redis-disk", _key("SET", "x")),
    "redis meta removed": ("redis-disk", _key("DEL")),
}


@pytest.mark.parametrize(("kind", "damage"), MODELS.values(), ids=MODELS)
async def test_a_damaged_store(kind, damage, place):
    made = KINDS[kind]
    await written(made.factory(place))
    damage(place)
    crud, client = await client_of(made.factory(place))
    async with client:
        answers = {path: await ask(client, "GET", path) for path in READS}
        for path, answer in answers.items():
            right(path, answer)
        written_too = await ask(client, "PUT", "/note/a", json={"title": "c"})
        assert (await ask(client, "GET", "/other/o")).json()["data"] == {"text": "o"}
        ready = await client.get("/readyz")
        note = ready.json()["models"]["note"]
        statuses = {answer.status_code for answer in answers.values()}
        if statuses == {503}:
            assert ready.status_code == 503
            assert note["status"] != "ready"
        elif 503 in {*statuses, written_too.status_code}:
            assert ready.status_code == 503 or note["impairments"]
        if ready.status_code == 503:
            assert ready.json()["models"]["other"]["status"] == "ready"
    await crud.close()


@pytest.mark.parametrize("way", DOC_WAYS, ids=lambda way: way.__name__)
@pytest.mark.parametrize("kind", ["copies"])
async def test_a_damaged_copy_in_redis_is_a_miss(kind, way, place, valkey):  # noqa: ARG001 - `place` reads it
    """Before PostgreSQL, Redis holds copies only."""

    def build(model: str) -> IStorage:
        table, prefix = f"meta_{place.name}_{model}", f"{place.name}-{model}:"
        meta = FastSlowMetaStore(RedisMetaStore(valkey, prefix), PostgresMetaStore(place.postgres, table_name=table))
        return SimpleStorage(meta, S3ResourceStore("double", f"{model}/", object_store=place.objects))

    crud, client = await client_of(Factory(build))
    async with client:
        await ask(client, "PUT", "/note/a", json=FIRST, headers=ABSENT)
        damaged = 0
        for _ in range(40):  # until there is a copy: the first ones are kept once the server is known
            assert (await ask(client, "GET", "/note/a")).json()["data"] == FIRST | WHOLE
            with redis.Redis.from_url(valkey) as raw:
                for key in raw.scan_iter(f"*{place.name}-note:*fast:v:*"):
                    copy = raw.get(key)
                    at = copy.index(b"\x8f" if b"\x8f" in copy else b"\xde")  # where the map begins
                    raw.set(key, copy[:at] + way(copy[at:]), keepttl=True)
                    damaged += 1
            assert (await ask(client, "GET", "/note/a")).json()["data"] == FIRST | WHOLE
            if damaged:
                break
            await asyncio.sleep(0.1)
        assert damaged
    await crud.close()
