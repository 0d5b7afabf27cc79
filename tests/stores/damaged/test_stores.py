"""Damaged data that a whole model needs, and damaged copies in Redis."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import apsw
import psycopg
import pytest
import redis

from app.autocrud.resource_manager.backends.s3.object_store import Object
from app.autocrud.resource_manager.backends.sqlite.findings_table import TABLE
from app.autocrud.resource_manager.basic import IStorage
from app.autocrud.resource_manager.meta_store.fast_slow import FastSlowMetaStore
from app.autocrud.resource_manager.meta_store.postgres import PostgresMetaStore
from app.autocrud.resource_manager.meta_store.redis import RedisMetaStore
from app.autocrud.resource_manager.resource_store.s3 import S3ResourceStore
from app.autocrud.resource_manager.storage.simple_storage import SimpleStorage
from tests.stores.damaged.helpers import (
    ABSENT,
    DOC_WAYS,
    FIRST,
    KINDS,
    READS,
    WHOLE,
    Factory,
    Place,
    ask,
    client_of,
    cut,
    emptied,
    numbers,
    removed,
    right,
    written,
    zeroed,
)

# Data that a whole model needs


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
    """In front of PostgreSQL, Redis holds copies only."""

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
