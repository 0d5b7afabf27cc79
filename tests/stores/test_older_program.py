"""A program of the commit before blobs beside this one: F5 of `contract.blobs`, and stores without blobs."""

from __future__ import annotations

import asyncio
import contextlib
import re
import uuid
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import apsw
import psycopg
import pytest
import redis

from app.autocrud.errors import ConfigError
from app.autocrud.query import Query
from app.autocrud.resource_manager.backends.postgres.schema import PostgresSchema
from app.autocrud.resource_manager.backends.s3_sqlite.head import decode_head
from app.autocrud.resource_manager.contract.blobs import BLOBS_MARKER, BlobUse
from app.autocrud.resource_manager.storage_factory import (
    DiskStorageFactory,
    IStorageFactory,
    MemoryDiskStorageFactory,
    S3StorageFactory,
)
from app.autocrud.testing.blobs import NamedBlobs, blob_rows_of, upload
from app.autocrud.testing.loading import example, fill, loading
from app.autocrud.testing.model import Item, manage
from tests.services import BUCKET, S3Server

from .older_program import BEFORE_BLOBS, OlderProgram, Refused, older_program, sources
from .older_program_worker import OnServers

pytestmark = pytest.mark.slow


class Store(NamedTuple):
    """A store that both programs use.

    old      starts an older program
    factory  returns the factory of the new program
    format   returns the format of the store
    write    a pattern of the error of a write of the older program to a marked store
    open     a pattern of the error of an older program that is started; None if only its writes are refused
    read     a pattern of the error of a read; None if the older program can read
    """

    old: Callable[[], AbstractContextManager[OlderProgram]]
    factory: Callable[[], IStorageFactory]
    format: Callable[[], int]
    write: str
    open: str | None = r"ConfigError: the .* has format 2"
    read: str | None = None


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    return sources(BEFORE_BLOBS, tmp_path_factory.mktemp("older"))


def on_disk(source: Path, root: Path) -> Store:
    def format_() -> int:
        connection = apsw.Connection(str(next(root.rglob("index.sqlite"))), flags=apsw.SQLITE_OPEN_READONLY)
        found = connection.execute("SELECT format FROM state").get
        connection.close()
        return found

    return Store(
        partial(older_program, source, "disk", str(root)),
        lambda: DiskStorageFactory(root),
        format_,
        re.escape(f"ConfigError: model 'item': {BLOBS_MARKER} is unique in the store"),
    )


def on_s3(source: Path, server: S3Server, local_dir: Path | None = None) -> Store:
    prefix = f"{uuid.uuid4().hex}/"
    named: dict[str, Any] = {"prefix": prefix}
    if local_dir is not None:
        named["local_dir"] = str(local_dir)

    def format_() -> int:
        async def read() -> int:
            objects = server.object_store()
            (key,) = [one.key async for one in objects.list(prefix) if one.key.endswith("/HEAD")]
            return decode_head((await objects.get(key)).body).fmt

        return asyncio.run(read())

    refusal = "ConfigError: the store in the bucket has format 2, this program knows 1"
    return Store(
        partial(older_program, source, "s3-sqlite", BUCKET, *server, **named),
        lambda: S3StorageFactory(BUCKET, *server, **named),
        format_,
        # A write that needs no read sends a PUT first. It conflicts with a HEAD that the program cannot read, so it
        # does not learn the outcome. A shared local copy has that HEAD.
        refusal if local_dir is not None else f"{refusal}|OutcomeUnknown",
        read=None if local_dir is not None else refusal,
    )


def on_servers(source: Path, root: Path, postgres: str | None, valkey: str | None) -> Store:
    named: dict[str, Any] = {}
    if postgres is not None:
        named |= {"dsn": postgres, "table": f"{root.name}/meta_item"}
    if valkey is not None:
        named |= {"url": valkey, "prefix": f"{root.name}:"}

    def format_() -> int:
        if postgres is not None:
            with psycopg.connect(postgres) as connection:
                state = PostgresSchema(named["table"], {}).names["state"]
                (found,) = connection.execute(f"SELECT format FROM {state}".encode()).fetchone()
                return found
        with redis.Redis.from_url(valkey) as client:
            return int(client.hget(f"{root.name}:meta", "format") or 1)

    refusal = re.escape(f"ConfigError: model 'item': {BLOBS_MARKER} is unique in the store")
    return Store(
        partial(older_program, source, "servers", str(root), **named),
        lambda: OnServers(str(root), **named),
        format_,
        refusal,
        refusal if postgres is not None else None,
    )


SERVERS = {"postgres": (True, False), "redis": (False, True), "redis-postgres": (True, True)}
KINDS = ["disk", "s3-sqlite", "s3-sqlite-one-copy", *SERVERS]


@pytest.fixture(params=KINDS)
def store(request, source, tmp_path) -> Store:
    if request.param == "disk":
        return on_disk(source, tmp_path)
    if request.param in SERVERS:
        uses_postgres, uses_redis = SERVERS[request.param]
        postgres = request.getfixturevalue("postgres") if uses_postgres else None
        return on_servers(source, tmp_path, postgres, request.getfixturevalue("valkey") if uses_redis else None)
    server = request.getfixturevalue("seaweed_s3" if "seaweed" in request.param else "ministack_s3")
    return on_s3(source, server, tmp_path if "one-copy" in request.param else None)


@pytest.fixture
def old(store) -> Iterator[OlderProgram]:
    with store.old() as program:
        yield program


WRITES = [
    ("create", "x", "x"),
    ("update", "r", "x"),
    ("modify", "d", "x"),
    ("publish", "d"),
    ("switch", "r", 1),
    ("delete", "r"),
    ("purge", "r"),
]


@pytest.mark.parametrize("store", [*KINDS, "s3-sqlite-seaweed"], indirect=True)
def test_a_running_older_program_refuses_to_write_beside_blobs(store, old):
    old("create", "by old", "1")

    async def with_blobs() -> None:
        new = manage(store.factory())
        await new.open()
        rows, names = blob_rows_of(new), NamedBlobs(new.storage)
        await new.create(Item(text="1"), resource_id="by new")
        old("update", "by new", "2")
        await new.create(Item(text="1"), resource_id="d", status="draft")
        row, unused = upload(), upload()
        await rows.add_blob(row)
        await rows.add_blob(unused)
        names.by_resource["r"] = (row.key,)
        await new.create(Item(text="1"), resource_id="r")
        await new.update("r", Item(text="2"))
        for write in WRITES:
            with pytest.raises(Refused, match=store.write):
                old(*write)
        if store.read is None:
            assert old("texts") == {"by old": "1", "by new": "2", "d": "1", "r": "2"}
        else:
            with pytest.raises(Refused, match=store.read):
                old("texts")
        with contextlib.suppress(Refused):  # it may be refused, but must not remove or lose anything
            old("maintain", 10)
        await new.maintain(10)
        await new.close()

        again = manage(store.factory())  # without what the first one has in memory
        await again.open()
        rows = blob_rows_of(again)
        page = await again.search(Query())
        assert {hit.meta.resource_id: hit.data.text for hit in page.items} == {
            "by old": "1",
            "by new": "2",
            "d": "1",
            "r": "2",
        }
        for revision in (1, 2):
            assert (await again.storage.revision("r", revision)).blobs == (row.key,)
            await again.get("r", revision=revision)
        assert await rows.blob_uses(row.key) == [BlobUse("r", 2)]
        assert await rows.blobs([row.sha256]) == sorted([row, unused], key=lambda one: one.key)
        assert await rows.remove_blobs([row.key, unused.key]) == [unused.key]
        await again.close()

    asyncio.run(with_blobs())
    assert store.format() == 2
    with store.old() as started_later:
        with contextlib.nullcontext() if store.open is None else pytest.raises(Refused, match=store.open):
            started_later("open")
        for write in WRITES:
            with pytest.raises(Refused, match=store.open or store.write):
                started_later(*write)


def test_each_acknowledged_write_of_an_older_program_is_kept(store, old):
    """The older program writes without a pause while the first row is stored."""
    old("open")
    row = upload()

    async def first_row() -> None:
        new = manage(store.factory())
        await new.open()
        old("start writing")
        await asyncio.sleep(0.5)
        await blob_rows_of(new).add_blob(row)
        acknowledged, failure = await asyncio.to_thread(old, "refused")
        assert re.match(f"{store.write}|OutcomeUnknown", failure)
        assert len(acknowledged) > 2
        stored = [meta.resource_id async for meta in new.storage.scan()]
        # A write that was under way may be stored although its outcome was not known.
        assert set(acknowledged) <= set(stored)
        assert len(stored) - len(acknowledged) <= failure.startswith("OutcomeUnknown")
        assert await blob_rows_of(new).blobs([row.sha256]) == [row]
        await new.close()

    asyncio.run(first_row())


def test_older_programs_use_models_without_blobs(store, old):
    """The epoch of a model without rows survives the swaps, the snapshots and the maintenance of older programs."""
    old("create", "a", "1")

    async def without_blobs() -> None:
        for number in range(2, 5):
            new = manage(store.factory())
            await new.open()
            rows = blob_rows_of(new)
            await rows.remove_blobs([upload(epoch=number).key])
            await new.update("a", Item(text=str(number)))
            await new.create(Item(text="new"), resource_id=f"{number}")
            old("update", "a", f"{number} by old")
            old("create", f"old {number}", "old")
            old("purge", f"{number}")
            old("maintain", 10)
            await new.maintain(10)
            assert (await new.get("a")).data.text == f"{number} by old"
            assert await rows.blob_epoch() == number + 1
            await new.close()

    asyncio.run(without_blobs())
    assert store.format() == 1


def test_an_older_program_refuses_records_beside_bodies_with_blobs(source, tmp_path):
    """One process at a time uses this kind, so the older program starts again instead of running on."""
    with older_program(source, "memory-disk", str(tmp_path)) as old:
        old("create", "by old", "1")

        async def with_blobs() -> None:
            new = manage(MemoryDiskStorageFactory(tmp_path))
            with pytest.raises(ConfigError, match="in use by another process"):
                await new.open()
            old("close")
            await new.open()
            await new.update("by old", Item(text="2"))
            await new.close()
            assert old("texts") == {"by old": "2"}  # a store without blobs
            old("close")
            await new.open()
            row = upload()
            await blob_rows_of(new).add_blob(row)
            NamedBlobs(new.storage).by_resource["by old"] = (row.key,)
            await new.update("by old", Item(text="3"))
            await new.close()
            for command in (("open",), *WRITES):
                with pytest.raises(Refused, match="ConfigError: the database of model 'item' has format 2"):
                    old(*command)
            old("close")  # it locked the directory before it read the format
            await new.open()
            assert (await new.get("by old")).data.text == "3"
            assert await blob_rows_of(new).blob_uses(row.key) == [BlobUse("by old", 3)]
            await new.close()

        asyncio.run(with_blobs())


def test_a_running_older_program_uses_a_loaded_model(store, old):
    """The older program has the empty model open while it is loaded."""
    old("create", "purged", "1")
    old("purge", "purged")
    contents = asyncio.run(example())

    async def load() -> None:
        new = manage(store.factory())
        async with loading(new) as (loader, _):
            await fill(new, loader, contents)
            await loader.publish()
        loaded = {meta.resource_id for meta in contents.metas}
        assert old("texts").keys() == loaded  # deleted ones too
        old("update", "r0", "by old")
        old("create", "by old", "1")
        with pytest.raises(Refused, match="VersionConflict"):
            old("create", "r4", "x")
        await new.update("r4", Item(text="by new"))
        old("maintain", 10)
        await new.maintain(10)
        assert old("texts")["r4"] == "by new"
        found = await new.search(Query())
        texts = {hit.meta.resource_id: hit.data.text for hit in found.items}
        assert (texts["r0"], texts["by old"], texts["ü"]) == ("by old", "1", "ö")
        await new.close()

    asyncio.run(load())
