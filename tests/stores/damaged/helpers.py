"""Models, kinds of storage, ways to damage stored data and checks for the tests of damaged data."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import apsw
import httpx
import psycopg
import redis
from fastapi import FastAPI
from msgspec import Struct

from app.autocrud import AutoCRUD, IndexedField
from app.autocrud.resource_manager.backends.s3.memory_object_store import MemoryObjectStore
from app.autocrud.resource_manager.backends.s3.object_store import Object
from app.autocrud.resource_manager.basic import IStorage
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
    author: str = "unknown"
    slug: str | None = None


class Other(Struct):
    text: str


class Factory(IStorageFactory):
    def __init__(self, build: Callable[[str], IStorage]) -> None:
        self._build = build

    def build(self, model_name: str) -> IStorage:
        return self._build(model_name)


class Place(NamedTuple):
    """The directory, object store and addresses of the servers that a test uses."""

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


# Ways to damage a value


def cut(value: bytes) -> bytes:
    return value[: len(value) // 2]


def zeroed(value: bytes) -> bytes:
    return bytes(len(value))


def emptied(_: bytes) -> bytes:
    return b""


def flipped(value: bytes) -> bytes:
    """Change one letter of a value. The result is still valid JSON of the model."""
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
"""Ways to damage metadata and records. They have no hash, so damaged bytes that can be decoded are not detected."""

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
"""Kinds whose index is built from all metadata and records."""
BODIES = [(kind, way) for kind in KINDS for way in BODY_WAYS]
DOCS = [(kind, way) for kind, made in KINDS.items() if made.docs for way in DOC_WAYS]


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
    """Assert that a successful response contains only data that was stored."""
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
    """Assert that the model is not ready because its index would miss a resource, and that other models are ready."""
    ready = await client.get("/readyz")
    assert ready.status_code == 503
    models = ready.json()["models"]
    assert "cannot be decoded" in models["note"]["status"]
    if ready.json()["models"]["note"]["durable"]:
        assert "'a'" in models["note"]["status"]
    assert models["other"]["status"] == "ready"
    assert (await ask(client, "GET", "/note")).status_code == 503
