"""A MemoryMetaStore over S3: the index lies beside the bodies, and other instances' writes appear within `refresh_s`."""

from __future__ import annotations

import pytest

from app.autocrud.errors import ConfigError, UniqueConflict
from app.autocrud.resource_manager.core import SimpleStorage
from app.autocrud.resource_manager.meta_store.simple import MemoryMetaStore
from app.autocrud.resource_manager.object_store_double import MemoryObjectStore
from app.autocrud.resource_manager.resource_store.s3 import S3ResourceStore
from app.autocrud.resource_manager.storage_factory import IStorageFactory
from tests.conformance.model import Item, manage


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
    assert (await again.get("1")).data == Item(text="3")  # whoever starts looks first
    for manager in (eager, again):
        await manager.close()


async def test_a_change_upon_an_old_state_is_refused_and_unique_values_hold(objects):
    one, other = manage(Factory(objects, 3600)), manage(Factory(objects, 3600))
    await one.create(Item(text="1", code="a"), resource_id="1")
    await other.open()
    with pytest.raises(UniqueConflict):
        await other.create(Item(code="a"))
    assert (await other.update("1", Item(text="2"))).meta.version == 2
    assert (await one.update("1", Item(text="3"))).meta.version == 3  # built upon 1, refused, and built again upon 2
    for manager in (one, other):
        await manager.close()


async def test_it_says_that_it_is_durable(objects):
    storage = Factory(objects, 5).build("m")
    assert (storage.durable, storage.remote) == (True, True)


def test_models_need_a_prefix_of_their_own(objects):
    with pytest.raises(ConfigError, match="prefix is empty"):
        SimpleStorage(MemoryMetaStore(), S3ResourceStore("double", object_store=objects))
