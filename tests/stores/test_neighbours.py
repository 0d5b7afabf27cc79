"""Stores beside and inside each other in one bucket or database: no maintenance removes data of another store."""

from __future__ import annotations

from collections import Counter

import pytest
from msgspec.structs import replace
from uuid_utils import uuid4, uuid7

from app.autocrud import AutoCRUD
from app.autocrud.errors import ConfigError
from app.autocrud.resource_manager.backends.postgres.schema import PARTS, PostgresSchema
from app.autocrud.resource_manager.backends.s3.memory_object_store import MemoryObjectStore
from app.autocrud.resource_manager.backends.s3.object_store import REQUESTS
from app.autocrud.resource_manager.backends.s3_sqlite import housekeeping
from app.autocrud.resource_manager.backends.s3_sqlite.head import Segment, segment_key, snapshot_key
from app.autocrud.resource_manager.core import SimpleStorage
from app.autocrud.resource_manager.meta_store.postgres import PostgresMetaStore
from app.autocrud.resource_manager.meta_store.simple import DiskMetaStore
from app.autocrud.resource_manager.meta_store.sqlite3 import S3SqliteMetaStore
from app.autocrud.resource_manager.resource_store.s3 import S3ResourceStore
from app.autocrud.resource_manager.storage_factory import IStorageFactory, S3StorageFactory
from app.autocrud.testing.model import Item, manage
from app.settings import load
from app.wiring import storage_factory


class BodiesAt(IStorageFactory):
    """Metadata on disk, bodies below a prefix."""

    def __init__(self, root, objects: MemoryObjectStore, prefix: str) -> None:
        self.root, self.objects, self.prefix = root, objects, prefix

    def build(self, model_name: str) -> SimpleStorage:
        bodies = S3ResourceStore("double", self.prefix, object_store=self.objects)
        return SimpleStorage(DiskMetaStore(self.root / self.prefix / model_name), bodies)


@pytest.fixture
def objects() -> MemoryObjectStore:
    return MemoryObjectStore()


async def test_a_model_named_like_a_generation_inside_the_prefix_of_another(objects, tmp_path):
    crud = AutoCRUD(storage_factory=S3StorageFactory("double", object_store=objects))
    outer = crud.add_model(Item, name="data", storage_factory=BodiesAt(tmp_path, objects, "data/"))
    inner = crud.add_model(Item, name="0")
    await inner.create(Item(text="precious"), resource_id="x")
    await outer.create(Item(text="1"), resource_id="x")
    assert {key.rpartition("/")[0] for key in objects.objects if key.startswith("data/")} == {"data/0", "data/0/0"}
    for _ in range(4):
        await crud.maintain(10)
    assert [(await manager.get("x")).data.text for manager in (inner, outer)] == ["precious", "1"]
    await crud.close()


async def test_a_deployment_whose_prefix_continues_with_a_generation(objects, tmp_path):
    outer = manage(BodiesAt(tmp_path, objects, "x/article/"))
    inner = manage(BodiesAt(tmp_path, objects, "x/article/2/user/"))
    index = manage(S3StorageFactory("double", object_store=objects, prefix="x/article/1/"))
    for manager in (outer, inner, index):
        await manager.create(Item(text="precious"), resource_id="x")
    before = set(objects.objects)
    for _ in range(5):
        await outer.maintain(10)
    assert before <= set(objects.objects)
    for manager in (outer, inner, index):
        assert (await manager.get("x")).data.text == "precious"
        await manager.close()


NOT_UIDS = [
    "0",
    "0/",
    f"00/{uuid7()}",
    f"01/{uuid7()}",
    f"²/{uuid7()}",
    f"٣/{uuid7()}",
    f"-1/{uuid7()}",
    f"/{uuid7()}",
    f"0//{uuid7()}",
    f"0/{uuid7()}/",
    f"0/{uuid7()}/0",
    f"0/0/{uuid7()}",
    f"0/{uuid7()}.bak",
    f"0/{uuid7()}\n",
    f"0/{str(uuid7()).upper()}"[:-1] + "A",
    f"0/{uuid7().hex}",
    f"0/{uuid4()}",
    "0/report.pdf",
    f"a/{uuid7()}",
    "index.sqlite/HEAD",
]


async def test_the_sweep_lists_exactly_the_uids(objects):
    store = S3ResourceStore("double", "m/", object_store=objects)
    uids = sorted(f"{number}/{uuid7()}" for number in (0, 1, 2, 9, 10, 11, 20, 100))
    for uid in [*NOT_UIDS, *uids]:
        await objects.put(f"m/{uid}", b"")
        await objects.put(uid, b"")
        await objects.put(f"m/0/{uid}", b"")
    old = [uid for uid in uids if int(uid.partition("/")[0]) < 11]
    assert await store.older_than(11) == old
    assert await store.older_than(11, limit=2) == old[:2]
    assert await store.older_than(11, old[1]) == old[2:]


async def test_objects_after_the_bodies_are_not_listed(ministack_s3):
    objects, prefix = ministack_s3.object_store(), f"{uuid4()}/"
    store = S3ResourceStore("tests", prefix, object_store=objects)
    uid = f"0/{uuid7()}"
    await store.put(uid, None, b"")
    for number in range(2001):
        await objects.put(f"{prefix}user/{number}", b"")
    counter = Counter()
    REQUESTS.set(counter)
    assert await store.older_than(1) == [uid]
    assert counter.pop("LIST") <= 2  # one page, and the next one, which is requested at the same time
    await store.health()
    assert counter.pop("LIST", 0) <= 1


@pytest.mark.parametrize("prefix", ["a1", "team/v2", "0"])
def test_a_prefix_that_generations_could_continue_is_refused(prefix, objects):
    """The body 12/... of a store at `a` would have the key of the body 2/... of a store at `a1`."""
    with pytest.raises(ConfigError, match=f"'{prefix}' ends with a digit.* end it with a slash, '{prefix}/'"):
        S3ResourceStore("double", prefix, object_store=objects)
    S3ResourceStore("double", f"{prefix}/", object_store=objects)


async def test_garbage_collection_removes_only_segments_and_snapshots_of_its_store(objects):
    factory = S3StorageFactory("double", object_store=objects)
    manager = manage(factory)
    for number in range(3):
        await manager.create(Item(text=str(number)))
    prefix = "meta/item.sqlite/"
    garbage = {segment_key(prefix, 1, 1), snapshot_key(prefix, 1, 1)}
    body = "00000001" + str(uuid7())[8:]  # a UUID with a low time
    others = {f"{prefix}seg/0/{body}", f"{prefix}snap/0/{body}", f"{prefix}seg/{body}", f"{prefix}snap/1-notes.txt"}
    others |= {segment_key(f"{prefix}seg/", 1, 1), snapshot_key(f"{prefix}seg/", 1, 1)}
    others |= {snapshot_key(prefix, 1, 1).replace("snap/", "seg/"), segment_key(prefix, 1, 1).replace("seg/", "snap/")}
    for key in garbage | others:
        await objects.put(key, b"")
    await manager.maintain(30)
    assert garbage & set(objects.objects) == set()
    assert others <= set(objects.objects)
    await manager.close()


@pytest.mark.parametrize("folder", ["snap", "seg"])
async def test_a_key_that_contains_the_name_of_a_folder_is_not_taken_for_the_folder(objects, monkeypatch, folder):
    """Otherwise a segment that is being made passes for a snapshot, or the reverse, and its maker is waited for."""
    monkeypatch.setattr(housekeeping, "LEAST_LOG", -1)
    monkeypatch.setattr(housekeeping, "FANOUT", 1)
    store = S3SqliteMetaStore("double", f"team/{folder}/item.sqlite", object_store=objects)
    await store.generation()
    keeper = store._loop_state().housekeeping
    name = segment_key if folder == "snap" else snapshot_key
    await keeper.announce(lambda head: name(keeper._replica.prefix, head.ver + 1, 1))
    head = replace(await keeper._replica.head(), segs=(Segment("s", 1, 1, 1),))
    assert keeper._snapshot_due(head) if folder == "snap" else keeper._mergeable(head)
    await store.close()


def prefix_of_bodies(storage: str, prefix: str) -> str:
    """Return the beginning of the keys of bodies of the model `article`."""
    settings = load(
        {
            "CRUDSTACK_STORAGE": storage,
            "CRUDSTACK_PREFIX": prefix,
            "CRUDSTACK_BUCKET": "b",
            "CRUDSTACK_PG_DSN": "postgresql://h/d",
            "CRUDSTACK_AMQP_URL": "amqp://h",
            "CRUDSTACK_REDIS_URL": "redis://h",
        }
    )
    return storage_factory(settings).build("article").resource_store.location_key[2]


@pytest.mark.parametrize(
    "storage",
    [
        "postgres-s3",
        "full",
        *(f'{{"meta": "memory", "resource": "{kind}"}}' for kind in ("s3", "cached-s3", "mq-cached-s3")),
    ],
)
def test_a_prefix_that_another_deployment_may_use_for_bodies_is_refused(storage):
    for outer, inner in (("", "data"), ("team", "team/data"), ("team", "team/data/")):
        with pytest.raises(ConfigError, match="each would remove the other's"):
            prefix_of_bodies(storage, inner)
        assert prefix_of_bodies("s3-sqlite", outer) != prefix_of_bodies("s3-sqlite", inner)
    for prefix in ("", "mydata", "data/team", "team/data-2"):
        assert prefix_of_bodies(storage, prefix) == f"{prefix}/article/".removeprefix("/")


@pytest.mark.parametrize("part", PARTS)
def test_a_table_name_of_another_store_is_refused(part):
    """A purge by the other store would remove rows of this one."""
    with pytest.raises(ConfigError, match="is a table of the store whose table_name is 'a:b'"):
        PostgresMetaStore("postgresql://h/d", table_name=f"a:b:{part}")
    PostgresMetaStore("postgresql://h/d", table_name=part)
    PostgresMetaStore("postgresql://h/d", table_name=f"a:{part}s")


def test_parts_names_all_tables():
    assert set(PostgresSchema("a", {}).names.values()) == {'"a"', *(f'"a:{part}"' for part in PARTS)}
