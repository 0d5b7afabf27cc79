"""A MemoryMetaStore over S3. The index lies beside the bodies; writes of other instances appear within `refresh_s`."""

from __future__ import annotations

import pytest

from app.autocrud import AutoCRUD
from app.autocrud.errors import ConfigError, UniqueConflict
from app.autocrud.resource_manager.backends.s3.memory_object_store import MemoryObjectStore
from app.autocrud.resource_manager.basic import ModelSpec
from app.autocrud.resource_manager.core import Caller, IdempotencyKey, SimpleStorage
from app.autocrud.resource_manager.meta_store.postgres import PostgresMetaStore
from app.autocrud.resource_manager.meta_store.redis import RedisMetaStore
from app.autocrud.resource_manager.meta_store.simple import DiskMetaStore, MemoryMetaStore
from app.autocrud.resource_manager.meta_store.sqlite3 import S3SqliteMetaStore
from app.autocrud.resource_manager.resource_store.s3 import S3ResourceStore
from app.autocrud.resource_manager.resource_store.simple import DiskResourceStore
from app.autocrud.resource_manager.storage_factory import IStorageFactory
from app.autocrud.testing.model import Item, manage


class Factory(IStorageFactory):
    def __init__(self, objects: MemoryObjectStore, refresh_s: float) -> None:
        self.objects, self.refresh_s = objects, refresh_s

    def build(self, model_name: str) -> SimpleStorage:
        bodies = S3ResourceStore("double", f"{model_name}/", object_store=self.objects)
        bodies.refresh_s = self.refresh_s
        return SimpleStorage(MemoryMetaStore(), bodies)


@pytest.fixture
def objects() -> MemoryObjectStore:
    return MemoryObjectStore()


async def test_reads_ask_s3_for_bodies_alone_until_the_index_is_old(objects):
    writer, reader = manage(Factory(objects, 3600)), manage(Factory(objects, 3600))
    await writer.create(Item(text="1"), resource_id="1")
    await reader.open()
    await writer.update("1", Item(text="2"))
    objects.requests.clear()
    assert (await reader.get("1")).data == Item(text="1")
    assert (await writer.get("1")).data == Item(text="2")  # its own writes are there at once
    assert objects.requests == {"get": 2}  # a body each
    for manager in (writer, reader):
        await manager.close()
    eager = manage(Factory(objects, 0))
    assert (await eager.get("1")).data == Item(text="2")
    await eager.update("1", Item(text="3"))
    again = manage(Factory(objects, 3600))
    assert (await again.get("1")).data == Item(text="3")  # a new instance looks at the index first
    for manager in (eager, again):
        await manager.close()


async def test_a_change_to_an_old_version_is_retried_and_unique_values_hold(objects):
    one, other = manage(Factory(objects, 3600)), manage(Factory(objects, 3600))
    await one.create(Item(text="1", code="a"), resource_id="1")
    await other.open()
    with pytest.raises(UniqueConflict):
        await other.create(Item(code="a"))
    assert (await other.update("1", Item(text="2"))).meta.version == 2
    assert (
        await one.update("1", Item(text="3"))
    ).meta.version == 3  # built on version 1, rejected, and built again on version 2
    for manager in (one, other):
        await manager.close()


async def test_it_says_that_it_is_durable(objects):
    storage = Factory(objects, 5).build("m")
    assert (storage.durable, storage.remote) == (True, True)


async def test_without_a_prefix_each_model_has_one_of_its_own(objects):
    class Bare(IStorageFactory):
        def build(self, _: str) -> SimpleStorage:
            return SimpleStorage(MemoryMetaStore(), S3ResourceStore("double", object_store=objects))

    crud = AutoCRUD(storage_factory=Bare())
    items, others = crud.add_model(Item), crud.add_model(Item, name="other")
    await items.create(Item(text="1"), resource_id="1")
    await others.create(Item(text="2"), resource_id="1")
    for _ in range(3):  # each sweeps
        await crud.maintain(10)
    assert [(await manager.get("1")).data.text for manager in (items, others)] == ["1", "2"]
    assert {key.partition("/")[0] for key in objects.objects} == {"item", "other"}
    await crud.close()


@pytest.mark.parametrize("where", ["bodies", "index", "disk", "disk bodies", "postgres", "redis"])
def test_models_cannot_keep_their_data_in_one_place(objects, tmp_path, where):
    """Each store would take the bodies of the other one for orphans."""

    class Shared(IStorageFactory):
        def build(self, model_name: str) -> SimpleStorage:
            bodies = S3ResourceStore("double", f"{model_name}/", object_store=objects)
            match where:
                case "bodies":
                    meta, bodies = (
                        DiskMetaStore(tmp_path / model_name),
                        S3ResourceStore("double", "x/", object_store=objects),
                    )
                case "index":
                    meta = S3SqliteMetaStore("double", "index", object_store=objects)
                case "disk":
                    meta = DiskMetaStore(tmp_path)
                case "disk bodies":
                    meta, bodies = MemoryMetaStore(), DiskResourceStore(tmp_path)
                case "postgres":
                    meta = PostgresMetaStore("postgresql://h/d")
                case _:
                    meta = RedisMetaStore("redis://h/0")
            return SimpleStorage(meta, bodies)

    crud = AutoCRUD(storage_factory=Shared())
    crud.add_model(Item)
    with pytest.raises(ConfigError, match="models 'item' and 'other' would keep their data in the same place"):
        crud.add_model(Item, name="other")


async def test_an_instance_that_finds_a_used_key_invalidates_the_others(objects):
    """The instance that committed may have ended before it told the others."""
    manager = manage(Factory(objects, 3600))
    told = []

    async def committed():
        told.append(True)

    manager.storage.resource_store.committed = committed
    for times in (1, 2):
        await manager.create(Item(), by=Caller("a", key=IdempotencyKey("k")))
        assert len(told) >= times
    await manager.close()


async def test_no_request_is_refused_because_of_an_old_state(objects):
    one, other = manage(Factory(objects, 3600)), manage(Factory(objects, 3600))
    await one.open()
    await other.open()
    created = await one.create(Item(text="1"), resource_id="a")
    assert (await other.update("a", Item(text="2"), expect=created.version)).meta.version == 2
    await one.create(Item(), resource_id="b")
    await other.delete("b")
    await one.purge("b")
    await other.create(Item(text="again"), resource_id="b")
    for manager in (one, other):
        await manager.close()


async def test_the_replaced_store_is_logged_once_at_open_and_shown(objects, caplog):
    caplog.set_level("INFO", "crudstack.storage")
    manager = manage(Factory(objects, 5))
    await manager.open()
    await manager.create(Item())
    replaced = [record.getMessage() for record in caplog.records if "replaced" in record.getMessage()]
    assert replaced == [
        "item: the MemoryMetaStore that was given is replaced by the index beside the bodies, S3SqliteMetaStore"
    ]
    assert type(manager.storage.meta_store) is S3SqliteMetaStore
    await manager.close()


@pytest.mark.parametrize("prefix", ["", "given/"])
@pytest.mark.parametrize("index_first", [True, False])
def test_the_index_lies_beside_the_bodies_in_whichever_order_they_are_bound(objects, prefix, index_first):
    bodies = S3ResourceStore("double", prefix, object_store=objects)
    stores = [bodies.index(), bodies]
    for store in stores if index_first else reversed(stores):
        store.bind(ModelSpec("item"))
    expected = prefix or "item/"
    assert stores[0].key == f"{expected}index.sqlite"
    assert bodies.location_key == ("s3", objects, expected)
