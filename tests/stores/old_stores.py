"""Make, keep and open stores that earlier commits wrote, each in one file.

    python tests/stores/old_stores.py DIRECTORY [large | imported]

makes the files with the `app` that Python finds first. To make them with an earlier commit, set PYTHONPATH to a
checkout of that commit. The files of a commit are kept in `tests/stores/old/COMMIT/` and never change. With `large`,
the stores hold larger values than later commits accept. These files are in `tests/stores/old_large/COMMIT/`. With
`imported`, the content of a store in memory was imported into stores of IMPORTED. These files are in
`tests/stores/old_imported/COMMIT/`.

A file is a tar of the directory (`disk/`), the bucket (`s3/`), Redis (`redis.json`), PostgreSQL (`postgres.sql`), and
the content of the store as the API shows it (`content.json`). If Redis is only a cache, it is left out.
"""

from __future__ import annotations

import asyncio
import base64
import functools
import io
import json
import os
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import msgspec
import psycopg
import redis
from msgspec import Struct

from app.autocrud import AutoCRUD, Encoding, IndexedField, Query, field
from app.autocrud.backup.importing import import_all
from app.autocrud.query import Filter
from app.autocrud.resource_manager.backends.s3.memory_object_store import MemoryObjectStore
from app.autocrud.resource_manager.basic import IStorage
from app.autocrud.resource_manager.core import ResourceManager, SimpleStorage
from app.autocrud.resource_manager.meta_store.postgres import PostgresMetaStore
from app.autocrud.resource_manager.meta_store.redis import RedisMetaStore
from app.autocrud.resource_manager.meta_store.simple import MemoryMetaStore
from app.autocrud.resource_manager.resource_store.s3 import S3ResourceStore
from app.autocrud.resource_manager.resource_store.simple import DiskResourceStore
from app.autocrud.resource_manager.storage.former_layout import WhenFormer
from app.autocrud.resource_manager.storage_factory import (
    CachedS3StorageFactory,
    DiskStorageFactory,
    FullStorageFactory,
    IStorageFactory,
    MemoryDiskStorageFactory,
    MemoryStorageFactory,
    MQCachedS3StorageFactory,
    PostgresS3StorageFactory,
    RedisPgStorageFactory,
    S3StorageFactory,
)


class Note(Struct, kw_only=True):
    text: str
    code: str | None = None
    number: int = 0
    tags: list[str] = []


INDEXED = ["text", IndexedField("code", unique=True), "number", ("tags", list[str])]


NO_BROKER = "amqp://u:p@127.0.0.1:1"
PREFIX = "team/"


class Servers:
    """The servers and the directory of one test, empty at first."""

    def __init__(self, directory: Path, postgres: str, redis_url: str, amqp_url: str = NO_BROKER) -> None:
        self.directory, self.postgres, self.redis_url, self.amqp_url = directory, postgres, redis_url, amqp_url
        self.objects = MemoryObjectStore()

    @property
    def s3(self) -> dict[str, Any]:
        """The bucket, as the named factories take it."""
        return {"s3_bucket": "b", "prefix": PREFIX, "object_store": self.objects}

    @property
    def s3_config(self) -> dict[str, Any]:
        """The bucket, as factories with RabbitMQ take it."""
        return {"bucket": "b", "prefix": PREFIX, "object_store": self.objects}


IMPORTED = ("s3-sqlite", "memory-s3")
"""Kinds of KINDS whose imports store packs."""


class Made(IStorageFactory):
    def __init__(self, make: Callable[[str], IStorage]) -> None:
        self._make = make

    def build(self, model_name: str) -> IStorage:
        return self._make(model_name)


def disk_bodies(servers: Servers) -> DiskResourceStore:
    return DiskResourceStore(rootdir=servers.directory / "bodies")


def s3_bodies(servers: Servers) -> S3ResourceStore:
    return S3ResourceStore("b", prefix="data/", object_store=servers.objects)


KINDS: dict[str, Callable[[Servers], IStorageFactory]] = {
    "disk": lambda servers: DiskStorageFactory(servers.directory),
    "disk-msgpack": lambda servers: DiskStorageFactory(servers.directory),
    "memory-disk": lambda servers: MemoryDiskStorageFactory(servers.directory),
    "s3-sqlite": lambda servers: S3StorageFactory("b", object_store=servers.objects),
    "memory-s3": lambda servers: Made(lambda _: SimpleStorage(MemoryMetaStore(), s3_bodies(servers))),
    "postgres": lambda servers: Made(
        lambda name: SimpleStorage(PostgresMetaStore(servers.postgres, table_name=f"meta_{name}"), disk_bodies(servers))
    ),
    "redis": lambda servers: Made(
        lambda name: SimpleStorage(RedisMetaStore(servers.redis_url, prefix=f"{name}:"), disk_bodies(servers))
    ),
}


# Since d44b783. `kind-*` were written by the kinds of the settings with CRUDSTACK_PREFIX=team, `factory-*` by factories
# with this prefix, in the layout that they had before kinds and factories shared one.

OF_KINDS: dict[str, Callable[[Servers], IStorageFactory]] = {
    "kind-s3-sqlite": lambda servers: S3StorageFactory("b", prefix=PREFIX, object_store=servers.objects),
    "kind-postgres-s3": lambda servers: PostgresS3StorageFactory(servers.postgres, **servers.s3),
    "kind-redis-postgres": lambda servers: RedisPgStorageFactory(servers.redis_url, servers.postgres, **servers.s3),
    "kind-redis-postgres-on-disk": lambda servers: RedisPgStorageFactory(
        servers.redis_url, servers.postgres, servers.directory, prefix=PREFIX
    ),
    "kind-cached-s3": lambda servers: CachedS3StorageFactory(
        s3_endpoint=None, cache_dir=servers.directory / "cache", **servers.s3
    ),
    "kind-mq-cached-s3": lambda servers: MQCachedS3StorageFactory(
        servers.s3_config, servers.directory / "cache", servers.amqp_url
    ),
    "kind-full": lambda servers: FullStorageFactory(
        servers.redis_url, servers.postgres, servers.s3_config, servers.directory / "cache", servers.amqp_url
    ),
}


def former(kind: str, servers: Servers, former_layout: WhenFormer) -> IStorageFactory:
    """Return the factory that wrote a store in the former layout, with its present default or another choice."""
    more: dict[str, Any] = {"former_layout": former_layout}
    cache = servers.directory / "cache"
    match kind:
        case "factory-postgres-s3":
            return PostgresS3StorageFactory(servers.postgres, **servers.s3, **more)
        case "factory-redis-postgres":
            return RedisPgStorageFactory(servers.redis_url, servers.postgres, **servers.s3, **more)
        case "factory-redis-postgres-on-disk":
            return RedisPgStorageFactory(
                servers.redis_url, servers.postgres, servers.directory / "data", prefix=PREFIX, **more
            )
        case "factory-cached-s3":
            return CachedS3StorageFactory(s3_endpoint=None, cache_dir=cache, **servers.s3, **more)
    return MQCachedS3StorageFactory(servers.s3_config, cache, servers.amqp_url, **more)


OF_FACTORIES: dict[str, Callable[[Servers], IStorageFactory]] = {
    kind: functools.partial(former, kind, former_layout="open")
    for kind in (
        "factory-postgres-s3",
        "factory-redis-postgres",
        "factory-redis-postgres-on-disk",
        "factory-cached-s3",
        "factory-mq-cached-s3",
    )
}


def program(kind: str, servers: Servers, *more: Any) -> ResourceManager[Note]:
    """Return the manager of a program that opens a store. `more` are fields that it indexes in addition."""
    encoding = Encoding.msgpack if kind.endswith("msgpack") else None
    crud = AutoCRUD(storage_factory=(KINDS | OF_KINDS | OF_FACTORIES)[kind](servers), encoding=encoding)
    return crud.add_model(Note, indexed_fields=[*INDEXED, *more])


async def fill(manager: ResourceManager[Note]) -> None:
    """Write revisions and a draft; delete, restore, switch back and purge resources."""
    for number in range(8):
        note = Note(text=f"text {number % 3}", code=f"c{number}", number=number, tags=["a", f"t{number}"])
        await manager.create(note, resource_id=f"n{number}")
    for number in range(3):
        await manager.update("n1", Note(text="changed", code="c1", number=100 + number))
    await manager.create(Note(text="draft", code=None), resource_id="draft", status="draft")
    await manager.modify("draft", Note(text="draft 2", code="d"))
    await manager.delete("n2")
    await manager.delete("n3")
    await manager.restore("n3")
    await manager.switch("n1", 2)
    await manager.purge("n4")


def long_of(kind: str) -> str:
    """Return a text that the earlier commit accepted.

    With an index on S3 it accepted 256 KiB of indexed values, in which each text counted twice.
    """
    return "\x01" * 37_000 if "s3" in kind else "x" * 300_000  # as JSON 222,000 bytes and 300,000


MANY = ["t"] * 11_999 + ["last"]
LONG_ID = "i" * 1500
LONG_NAME = "n" * 3000


async def fill_large(manager: ResourceManager[Note], kind: str) -> None:
    """Leave larger values than `limits` allow."""
    long = long_of(kind)
    await manager.create(Note(text=long), resource_id="text")
    await manager.create(Note(text="short", code=long), resource_id="code")
    await manager.create(Note(text="short", tags=MANY), resource_id="many")
    await manager.create(Note(text="short"), resource_id=LONG_ID)
    await manager.create(Note(text="short"), resource_id="name", by=LONG_NAME)
    await manager.create(Note(text="short"), resource_id="nul", by="a" if kind == "postgres" else "a\0b")
    await manager.create(Note(text=long), resource_id="draft", status="draft")
    await manager.create(Note(text=long), resource_id="deleted")
    await manager.delete("deleted")
    await manager.create(Note(text=long), resource_id="former")
    await manager.update("former", Note(text="short"))


def large_searches(kind: str) -> dict[str, Filter]:
    long = long_of(kind)
    return {
        "text": field("text").eq(long),
        "start": field("text").starts_with(long[:30_000]),
        "code": field("code").eq(long),
        "tags": field("tags").contains("last"),
        "id": field("meta.resource_id").eq(LONG_ID),
        "name": field("meta.created_by").eq(LONG_NAME),
    }


SEARCHES = {
    "text": field("text").eq("text 0"),
    "code": field("code").eq("c1"),
    "number": field("number").gte(3),
    "tags": field("tags").contains("a"),
}


async def content(manager: ResourceManager[Note], searches: Mapping[str, Filter] = SEARCHES) -> dict[str, Any]:
    """Return everything that the API shows of a store, as JSON values."""
    await manager.open()
    found: dict[str, Any] = {}
    async for meta in manager.storage.scan():
        page = await manager.storage.revisions(meta.resource_id)
        datas = [manager.codec.decode(await manager.storage.body(one.uid), one.encoding) for one in page.items]
        found[meta.resource_id] = msgspec.to_builtins({"meta": meta, "revisions": page.items, "data": datas})
    counts = {
        f"{name} {deleted}": await manager.count(Query(where=where, include_deleted=deleted))
        for name, where in searches.items()
        for deleted in (False, True)
    }
    whole: dict[str, Any] = msgspec.json.decode(msgspec.json.encode({"resources": found, "counts": counts}))
    return whole


# One file for each store


def pack(servers: Servers, held: dict[str, Any], path: Path, pg_dump: list[str]) -> None:
    with tarfile.open(path, "w:gz") as tar:
        tar.add(servers.directory, "disk", filter=_anonymous)
        for key, found in sorted(servers.objects.objects.items()):
            _add(tar, f"s3/{key}", found.body)
        _add(tar, "redis.json", json.dumps(_of_redis(servers.redis_url)).encode())
        dumped = subprocess.run([*pg_dump, servers.postgres], capture_output=True, check=True)
        statements = [line for line in dumped.stdout.splitlines() if not line.startswith(b"\\")]
        _add(tar, "postgres.sql", b"\n".join(statements))
        _add(tar, "content.json", json.dumps(held).encode())


def unpack(path: Path, servers: Servers) -> dict[str, Any]:
    """Put everything back in its place. Return the content of the store."""
    held: dict[str, Any] = {}
    with tarfile.open(path) as tar:
        for member in tar.getmembers():
            if member.name == "disk" or member.name.startswith("disk/"):
                member.name = member.name.removeprefix("disk").lstrip("/") or "."
                tar.extract(member, servers.directory, filter="data")
                continue
            body = tar.extractfile(member).read()  # type: ignore[union-attr]
            if member.name.startswith("s3/"):
                servers.objects._store(member.name.removeprefix("s3/"), body)
            elif member.name == "redis.json":
                _to_redis(servers.redis_url, json.loads(body))
            elif member.name == "postgres.sql":
                with psycopg.connect(servers.postgres, autocommit=True) as connection:
                    connection.execute(body)
            else:
                held = json.loads(body)
    return held


def _anonymous(member: tarfile.TarInfo) -> tarfile.TarInfo:
    member.uid = member.gid = 0
    member.uname = member.gname = ""
    return member


def _add(tar: tarfile.TarFile, name: str, body: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(body)
    tar.addfile(member, io.BytesIO(body))


def _text(value: bytes) -> str:
    return base64.b64encode(value).decode()


def _of_redis(url: str) -> dict[str, Any]:
    client = redis.Redis.from_url(url)
    read: dict[bytes, Callable[[bytes], Any]] = {
        b"hash": lambda key: [[_text(name), _text(value)] for name, value in client.hgetall(key).items()],
        b"set": lambda key: [_text(value) for value in client.smembers(key)],
        b"list": lambda key: [_text(value) for value in client.lrange(key, 0, -1)],
        b"zset": lambda key: [[_text(value), score] for value, score in client.zrange(key, 0, -1, withscores=True)],
    }
    try:
        return {_text(key): [client.type(key).decode(), read[client.type(key)](key)] for key in client.keys("*")}
    finally:
        client.close()


def _to_redis(url: str, content: dict[str, Any]) -> None:
    client = redis.Redis.from_url(url)
    decoded = base64.b64decode
    try:
        for name, (kind, values) in content.items():
            key = decoded(name)
            if kind == "hash":
                client.hset(key, mapping={decoded(one): decoded(value) for one, value in values})
            elif kind == "set":
                client.sadd(key, *map(decoded, values))
            elif kind == "list":
                client.rpush(key, *map(decoded, values))
            else:
                client.zadd(key, {decoded(value): score for value, score in values})
    finally:
        client.close()


async def _import(manager: ResourceManager[Note], scratch: Path) -> None:
    """Import what `fill` leaves in a store in memory."""
    source = AutoCRUD(storage_factory=MemoryStorageFactory())
    source.add_model(Note, indexed_fields=INDEXED)
    await fill(source.resource_manager(Note))
    await source.export_all(scratch / "archive.tar.gz")
    await import_all({manager.name: manager}, scratch / "archive.tar.gz")


async def _make(kind: str, directory: Path, postgres: str, redis_url: str, pg_dump: list[str], filled: str) -> None:
    with tempfile.TemporaryDirectory() as scratch, tempfile.TemporaryDirectory() as archive:
        servers = Servers(Path(scratch), postgres, redis_url)
        manager = program(kind, servers)
        if filled == "imported":
            await _import(manager, Path(archive))
        else:
            await (fill_large(manager, kind) if filled == "large" else fill(manager))
        held = await content(manager, large_searches(kind) if filled == "large" else SEARCHES)
        await manager.storage.close()
        pack(servers, held, directory / f"{kind}.tar.gz", pg_dump)


def main() -> None:
    from tests.postgres import Postgres, as_somebody, binaries
    from tests.valkey import Valkey

    directory = Path(sys.argv[1]).absolute()
    filled = "".join(sys.argv[2:])
    directory.mkdir(parents=True, exist_ok=True)
    for kind in IMPORTED if filled == "imported" else KINDS:
        postgres, valkey = Postgres(), Valkey(Path(tempfile.mkdtemp()))
        valkey.start()
        pg_dump = as_somebody(binaries() / "pg_dump", "--no-owner", "--no-privileges", "--inserts")
        os.chdir("/")
        try:
            asyncio.run(_make(kind, directory, postgres.dsn, valkey.url, pg_dump, filled))
        finally:
            valkey.stop()
            postgres.remove()
        print(directory / f"{kind}.tar.gz")


if __name__ == "__main__":
    main()
