"""PostgresMetaStore: the conformance suite, its indexes and its commits."""

from __future__ import annotations

import asyncio
import os
import random
from pathlib import Path
from unittest import mock
from urllib.parse import urlsplit

import psycopg
import pytest

from app.autocrud import Encoding, Query, field
from app.autocrud.errors import (
    ConfigError,
    InvalidData,
    MetadataTooLarge,
    StoreUnavailable,
    UniqueConflict,
)
from app.autocrud.resource_manager.backends.postgres.schema import name_of
from app.autocrud.resource_manager.basic import IndexedField, IStorage
from app.autocrud.resource_manager.core import Caller, IdempotencyKey
from app.autocrud.resource_manager.engine import planning
from app.autocrud.resource_manager.meta_store.postgres import PostgresMetaStore
from app.autocrud.resource_manager.resource_store.simple import MemoryResourceStore
from app.autocrud.resource_manager.storage_factory import IStorageFactory, PostgresS3StorageFactory
from app.autocrud.testing import SharedConformance
from tests.postgres import Postgres
from tests.services import BUCKET, given
from tests.stores.postgres_helpers import Note, WithDisk, manager_of, waits_for_advisory_lock
from tests.tcp_proxy import TcpProxy


@pytest.mark.usefixtures("postgres")
class TestPostgresWithDisk(SharedConformance):
    def make(self, root: Path) -> IStorageFactory:
        return WithDisk(root)


@pytest.mark.usefixtures("postgres")
class TestPostgresAsMessagePack(SharedConformance):
    def make(self, root: Path) -> IStorageFactory:
        return WithDisk(root, Encoding.msgpack)


@pytest.mark.usefixtures("postgres", "ministack_s3")
class TestPostgresWithS3(SharedConformance):
    def make(self, root: Path) -> IStorageFactory:
        s3 = given("TEST_MINISTACK")
        return _Named(root, os.environ["TEST_POSTGRES"], BUCKET, *s3, prefix=f"{root.name}/")


class _Named(PostgresS3StorageFactory):
    """A factory whose table names differ between tests."""

    def __init__(self, root: Path, *arguments, **options) -> None:
        super().__init__(*arguments, **options)
        self.root = root

    def build(self, model_name: str) -> IStorage:
        return super().build(f"{self.root.name}_{model_name}")


@pytest.fixture
def name(request) -> str:
    """Return a table name that no other test uses."""
    return request.node.name


async def plan_of(dsn: str, meta_store: PostgresMetaStore, query: Query) -> str:
    statement, params = meta_store._search(query.resolve(meta_store._spec.fields))
    async with await psycopg.AsyncConnection.connect(dsn) as connection:
        rows = await connection.execute(f"EXPLAIN {statement}", params)
        return "\n".join(row[0] for row in await rows.fetchall())


async def test_every_search_uses_its_index_at_100_000_rows(postgres, name):
    manager = manager_of(postgres, name)
    await manager.create(Note("seed", tags=["x"]))
    meta_store = manager.storage.meta_store
    main = meta_store._schema.names["main"]
    async with await psycopg.AsyncConnection.connect(postgres, autocommit=True) as connection:
        await connection.execute(
            f"INSERT INTO {main} SELECT 'r' || n, 1, 'x', 1, 1, 1, 'stable', FALSE,"
            " now() + n * interval '1 second', now(), 'a', 'a', '0/u' || n, 'json', doc, shown,"
            " jsonb_build_object('text', 't' || n, 'views', n, 'tags', jsonb_build_array('g' || n % 1000)),"
            f" '{{}}', spec FROM {main}, generate_series(1, 100000) n"
        )
        await connection.execute(f"ANALYZE {main}")
    queries = {
        "text": Query(where=field("text").eq("t5")),
        "text one of": Query(where=field("text").in_(["t5", "t6"])),
        "text prefix": Query(where=field("text").starts_with("t9999")),
        "range": Query(where=field("views").gte(99_000) & field("views").lt(99_500), sort=("-views",), limit=20),
        "sort": Query(sort=("views",), limit=20),
        "sort text": Query(sort=("text",), limit=20),
        "list": Query(where=field("tags").contains("g7")),
        "created": Query(sort=("-meta.created_time",), limit=20),
        "id": Query(where=field("meta.resource_id").eq("r5")),
    }
    for what, query in queries.items():
        plan = await plan_of(postgres, meta_store, query)
        assert "Seq Scan" not in plan, f"{what}: {plan}"
        assert "Index" in plan
    assert len((await manager.find(Query(where=field("tags").contains("g7"), limit=200))).items) == 100
    await manager.close()


async def test_calls_send_no_more_statements_than_needed(postgres, name, monkeypatch):
    """A create and each read are one statement. An update reads before it writes."""
    manager = manager_of(postgres, name)
    created = await manager.create(Note("a"))
    sent = []
    execute = psycopg.AsyncConnection.execute

    async def counted(self, query, *given, **more):
        sent.append(query)
        return await execute(self, query, *given, **more)

    monkeypatch.setattr(psycopg.AsyncConnection, "execute", counted)
    meta_store = manager.storage.meta_store
    for call, expected in (
        (lambda: manager.create(Note("b")), 1),
        (lambda: meta_store.get(created.meta.resource_id), 1),
        (lambda: manager.update(created.meta.resource_id, Note("c")), 2),
        (manager.find, 1),
        (manager.count, 1),
    ):
        sent.clear()
        await call()
        assert len(sent) == expected, sent
    await manager.close()


async def test_an_index_entry_that_is_too_long_raises_metadata_too_large(postgres, name):
    """Only an id that an earlier program accepted can be so long."""
    manager = manager_of(postgres, name)
    with mock.patch.object(planning, "check_new_id", return_value=None):
        await manager.create(Note("a"), resource_id="".join(random.Random(1).choices("abcdefghijklmnop", k=2000)))
    (meta,) = [meta async for meta in manager.storage.scan()]
    long = "".join(map(chr, random.Random(2).choices(range(0x10000, 0x110000), k=256)))
    with pytest.raises(MetadataTooLarge, match=r"shorten the text; nothing was changed$"):
        await manager.update(meta.resource_id, Note(long))
    await manager.update(meta.resource_id, Note("b"))
    assert await manager.count(Query(where=field("text").eq("b"))) == 1
    await manager.close()


async def test_long_texts_are_found_sorted_and_unique(postgres, name):
    """An entry of a B-tree has at most 2.7 KB, but a text may be longer."""
    manager = manager_of(postgres, name)
    long = "b" + "".join(random.Random(1).choices("äbcdef😀", k=20_000))
    for at, text in enumerate((f"{long}1", f"{long}2", f"{long}2x", "z")):
        await manager.create(Note(text, code=f"{text}{at}"), resource_id=f"{at}")
    for where, found in (
        (field("text").eq(f"{long}2"), ["1"]),
        (field("text").gt(f"{long}1"), ["1", "2", "3"]),
        (field("text").starts_with(f"{long}2"), ["1", "2"]),
        (field("text").in_([f"{long}1", "z"]), ["0", "3"]),
        (~field("text").lte(f"{long}2"), ["2", "3"]),
    ):
        page = await manager.find(Query(where=where, sort=("text",)))
        assert [hit.meta.resource_id for hit in page.items] == found
    with pytest.raises(UniqueConflict):
        await manager.create(Note("y", code=f"{long}10"))
    with pytest.raises(InvalidData):
        await manager.create(Note("y"), resource_id="x" * 3000)
    await manager.close()


@pytest.mark.parametrize("landed", [True, False])
async def test_a_lost_reply_to_a_commit_is_resolved(postgres, name, landed):
    """If the connection is cut during a commit, its outcome is determined, and it happens once."""
    parts = urlsplit(postgres)
    with TcpProxy(f"http://{parts.hostname}:{parts.port}") as proxy:
        through = f"postgresql://{parts.username}@127.0.0.1:{urlsplit(proxy.url).port}/postgres"
        manager, direct = manager_of(through, name), manager_of(postgres, name)
        await manager.create(Note("first"))
        await direct.count()
        if landed:
            proxy.hold()
            writing = asyncio.create_task(manager.create(Note("x")))
            await asyncio.to_thread(proxy.held.wait, 20)  # the server has replied
            proxy.release()
            proxy.cut()
        else:
            async with await psycopg.AsyncConnection.connect(postgres) as blocker:
                lock = manager.storage.meta_store._schema.lock
                await blocker.execute("SELECT pg_advisory_xact_lock(%s)", (lock,))
                writing = asyncio.create_task(manager.create(Note("x")))
                while not await waits_for_advisory_lock(postgres):
                    await asyncio.sleep(0)
                proxy.cut()
            # The call whose caller is gone either continues now or is refused.
        created = await writing
        assert (await direct.meta(created.meta.resource_id)) == created.meta
        assert await direct.count() == 2
        await manager.close()
        await direct.close()


async def test_transactions_are_read_committed_whatever_the_default_of_the_server_is(postgres, name):
    """The invariants P2 and P3 depend on seeing what other transactions have committed meanwhile."""
    manager = manager_of(f"{postgres}?options=-c%20default_transaction_isolation%3Drepeatable%5C%20read", name)
    await manager.create(Note("a"))
    assert await manager.storage.meta_store._rows("SHOW transaction_isolation") == [("read committed",)]
    await manager.close()


async def test_two_versions_of_the_program_run_side_by_side(postgres, name):
    """Eight programs of two versions create the schema at once.

    Each version searches by its own fields, and finds what the other version wrote.
    """
    bodies = MemoryResourceStore()
    old = [manager_of(postgres, name, ["text", IndexedField("code", unique=True)], bodies) for _ in range(4)]
    new = [manager_of(postgres, name, bodies=bodies) for _ in range(4)]
    await asyncio.gather(*(one.open() for one in (*old, *new)))
    await old[0].create(Note("a", views=7, code="c"), resource_id="a")
    await new[0].create(Note("b", views=8), resource_id="b")
    with pytest.raises(UniqueConflict):
        await new[1].create(Note("x", code="c"))
    later = manager_of(postgres, name, bodies=bodies)
    page = await later.find(Query(where=field("views").gte(7), sort=("views",)))
    assert [hit.meta.resource_id for hit in page.items] == ["a", "b"]
    ignorant = manager_of(postgres, name, ["text"], bodies)
    with pytest.raises(ConfigError, match="code is unique in the store"):
        await ignorant.open()
    for one in (*old, *new, later, ignorant):
        await one.close()


async def test_each_connection_asks_for_a_new_password(name):
    server = Postgres()
    try:
        async with await psycopg.AsyncConnection.connect(server.dsn, autocommit=True) as connection:
            await connection.execute("CREATE ROLE app LOGIN PASSWORD 'secret-1'")
            await connection.execute("GRANT ALL ON SCHEMA public TO app")
        rules = server.data / "pg_hba.conf"
        rules.write_text("host all crud 127.0.0.1/32 trust\nhost all app 127.0.0.1/32 scram-sha-256\n")
        async with await psycopg.AsyncConnection.connect(server.dsn, autocommit=True) as connection:
            await connection.execute("SELECT pg_reload_conf()")
        asked = []

        def password() -> str:
            asked.append(True)
            return f"secret-{len(asked)}"

        manager = manager_of(server.dsn.replace("crud@", "app@"), name, password=password)
        await manager.create(Note("a"), resource_id="a")
        await manager.close()
        async with await psycopg.AsyncConnection.connect(server.dsn, autocommit=True) as connection:
            await connection.execute("ALTER ROLE app PASSWORD 'secret-2'")
        assert (await manager.meta("a")).version == 1
        await manager.close()
        with pytest.raises(StoreUnavailable) as raised:
            await manager.meta("a")
        assert "secret" not in str(raised.value)
        await manager.close()
    finally:
        server.remove()


def test_the_error_for_an_invalid_address_hides_the_password():
    with pytest.raises(ConfigError) as raised:
        PostgresMetaStore("postgresql://user:secret@host:port:7/x y=z")
    assert "secret" not in str(raised.value)


async def test_purged_rows_leave_the_tables(postgres, name):
    manager = manager_of(postgres, name)
    await manager.create(Note("secret words"), resource_id="secret id", by=Caller("alice", key=IdempotencyKey("k")))
    await manager.purge("secret id")
    async with await psycopg.AsyncConnection.connect(postgres) as connection:
        for part in manager.storage.meta_store._schema.names.values():
            rows = await connection.execute("SELECT to_regclass(%s)", (part,))
            if await rows.fetchone() != (None,):
                rows = await connection.execute(f"SELECT t::text FROM {part} t")
                assert "secret" not in str(await rows.fetchall())
    await manager.close()


def test_long_names_that_differ_stay_different_and_short():
    long = "m" * 80
    assert len({name_of(f"{long}{at}", "revisions") for at in range(10)}) == 10
    assert len(name_of("ä" * 60).encode()) <= 63
