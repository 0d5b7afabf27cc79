"""MQCachedS3ResourceStore on a real broker: the conformance suite, and several instances in one process."""

from __future__ import annotations

import asyncio
import os
import threading
from pathlib import Path

import pytest

from app.autocrud.errors import ResourceNotFound, StoreUnavailable
from app.autocrud.resource_manager.backends.rabbitmq import consumer as listening
from app.autocrud.resource_manager.backends.rabbitmq.connection import THREAD
from app.autocrud.resource_manager.backends.s3.memory_object_store import MemoryObjectStore
from app.autocrud.resource_manager.basic import IStorage
from app.autocrud.resource_manager.core import SimpleStorage
from app.autocrud.resource_manager.meta_store.simple import MemoryMetaStore
from app.autocrud.resource_manager.resource_store.cache import DiskCache, MemoryCache
from app.autocrud.resource_manager.resource_store.cached_s3 import CachedS3ResourceStore
from app.autocrud.resource_manager.resource_store.mq_cached_s3 import MQCachedS3ResourceStore
from app.autocrud.resource_manager.storage_factory import IStorageFactory
from app.autocrud.secret import hidden
from app.autocrud.testing import DurableConformance, SharedConformance
from app.autocrud.testing.model import Item
from tests.rabbitmq import RabbitMQ, rabbitmq, running  # noqa: F401
from tests.services import BUCKET, given
from tests.stores.mq_helpers import (  # noqa: F401
    bodies_of,
    broker_fixture,
    certificates_fixture,
    fresh,
    instance_fixture,
    publish,
    until,
)

pytestmark = pytest.mark.rabbitmq


# The suite


_doubles: dict[Path, MemoryObjectStore] = {}


class Cached(IStorageFactory):
    """Example 5 of the seed over a bucket in memory. Tests of processes below use a real S3."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def build(self, model_name: str) -> IStorage:
        objects = _doubles.setdefault(self.root, MemoryObjectStore())
        bodies = CachedS3ResourceStore(
            self.caches(model_name), bucket="double", prefix=f"{model_name}/", object_store=objects
        )
        return SimpleStorage(MemoryMetaStore(), bodies)

    def caches(self, model_name: str):
        return [MemoryCache(100), DiskCache(self.root / "cache" / str(os.getpid()) / model_name)]


class TestCachedS3(DurableConformance):
    def make(self, root: Path) -> IStorageFactory:
        return Cached(root)


class MQCached(Cached):
    """Example 6 of the seed. Each read looks at the index, because the suite expects that of shared stores."""

    def build(self, model_name: str) -> IStorage:
        endpoint, key, secret = given("TEST_MINISTACK")
        bodies = MQCachedS3ResourceStore(
            self.caches(model_name),
            os.environ["TEST_RABBITMQ"],
            f"{self.root.name}_{model_name}_",
            bucket=BUCKET,
            prefix=f"{self.root.name}/{model_name}/",
            endpoint_url=endpoint,
            access_key_id=key,
            secret_access_key=secret,
            region_name="us-east-1",
            max_staleness_s=0,
        )
        return SimpleStorage(MemoryMetaStore(), bodies)


@pytest.mark.usefixtures("ministack_s3", "rabbitmq")
class TestMQCachedS3(SharedConformance):
    def make(self, root: Path) -> IStorageFactory:
        return MQCached(root)


# Instances in one process, over one bucket in memory


async def test_another_instance_sees_a_write_without_reading_the_index_from_s3(instance):
    writer, reader = instance(), instance()
    await writer.create(Item(text="1"), resource_id="1")
    await fresh(writer, reader)
    assert (await reader.get("1")).data.text == "1"
    for text in ("2", "3"):
        await writer.update("1", Item(text=text))
        assert await bodies_of(reader).drain()
        instance.objects.requests.clear()
        assert (await reader.get("1")).data.text == text
        assert instance.objects.requests == {"get": 1}  # the new body
        for _ in range(20):
            assert (await reader.get("1")).data.text == (await writer.get("1")).data.text == text
        assert instance.objects.requests == {"get": 1}
    assert await writer.storage.degradations() == await reader.storage.degradations() == []


class PublishesNothing(MQCachedS3ResourceStore):
    """An instance with a defect, which a test must detect."""

    async def committed(self) -> None:
        return None


async def test_a_write_is_published_before_it_is_acknowledged(instance):
    """A cancelled writer publishes. So does one that finds nothing to change: the first one may have been killed."""
    writer = instance()
    await writer.create(Item(text="a"), resource_id="r")
    committed, told = bodies_of(writer).committed, []
    begun, go_on = asyncio.Event(), asyncio.Event()

    async def slowly() -> None:
        begun.set()
        await go_on.wait()
        await committed()
        told.append(True)

    bodies_of(writer).committed = slowly
    writing = asyncio.create_task(writer.update("r", Item(text="b")))
    await begun.wait()
    writing.cancel()
    await asyncio.wait([writing])
    go_on.set()
    await until(lambda: told == [True])
    await writer.update("r", Item(text="b"))
    assert told == [True, True]


async def test_an_instance_that_publishes_nothing_is_detected(instance):
    writer, reader = instance(kind=PublishesNothing), instance()
    await writer.create(Item(text="1"), resource_id="1")
    await fresh(writer, reader)
    assert (await reader.get("1")).data.text == "1"
    await writer.update("1", Item(text="2"))
    assert await bodies_of(reader).drain()
    assert (await reader.get("1")).data.text == "1", "then the test above would find nothing"


async def test_purged_bodies_leave_all_caches(instance, tmp_path):
    caches = {at: [MemoryCache(100), DiskCache(tmp_path / f"{at}")] for at in range(3)}
    managers = [instance(caches=caches[at]) for at in range(3)]
    await managers[0].create(Item(text="1"), resource_id="1")
    await fresh(*managers)
    await managers[1].update("1", Item(text="2"))
    uids = [info.uid for info in (await managers[1].revisions("1")).items]
    for manager in managers:
        await bodies_of(manager).drain()
        assert len(await bodies_of(manager).get_many(uids)) == 2
    assert [len(await cache.get_many(uids)) for at in caches for cache in caches[at]] == [2] * 6
    await managers[2].purge("1")
    for manager in managers:
        assert await bodies_of(manager).drain()
        with pytest.raises(ResourceNotFound):
            await manager.get("1")
    assert [len(await cache.get_many(uids)) for at in caches for cache in caches[at]] == [0] * 6


async def test_a_body_that_is_being_read_is_not_cached_after_all_were_evicted(instance, tmp_path):
    class Waits(DiskCache):
        """Waits before it returns what it found."""

        async def get_many(self, keys):
            found = await super().get_many(keys)
            if self.waits is not None:
                asked.set()
                await self.waits.wait()
            return found

    asked, memory, disk = asyncio.Event(), MemoryCache(100), Waits(tmp_path / "disk")
    disk.waits = None
    manager = instance(caches=[memory, disk])
    created = await manager.create(Item(text="1"))
    await memory.clear()
    disk.waits = asyncio.Event()
    reading = asyncio.create_task(bodies_of(manager).get_many([created.meta.uid]))
    await asked.wait()
    await bodies_of(manager).evict_all()
    disk.waits.set()
    assert len(await reading) == 1
    disk.waits = None
    key = [created.meta.uid]
    assert await memory.get_many(key) == await disk.get_many(key) == {}
    await bodies_of(manager).get_many([created.meta.uid])  # a later read is cached
    assert len(await memory.get_many(key)) == 1


async def test_after_close_it_can_be_used_again_and_no_thread_is_left(instance):
    first, second = instance(), instance()
    await fresh(first, second)
    (connection,) = (connection for connection, _ in THREAD._connections.values())
    assert THREAD._connections[hidden(instance.url)] == (connection, 2)  # one connection
    created = await first.create(Item(text="1"))
    assert await bodies_of(second).drain()
    await second.get(created.meta.resource_id)
    await second.close()
    await first.update(created.meta.resource_id, Item(text="2"))
    await first.purge(created.meta.resource_id)
    await first.close()
    await until(lambda: not any(thread.name == "crudstack-amqp" for thread in threading.enumerate()))
    key = [created.meta.uid]
    (cache,) = bodies_of(second).caches
    assert len(await cache.get_many(key)) == 1
    with pytest.raises(ResourceNotFound):
        await second.get(created.meta.resource_id)
    await fresh(second)
    assert await cache.get_many(key) == {}  # it cannot know what it missed


async def test_a_message_that_cannot_be_read_clears_the_caches(instance, caplog):
    writer, reader = instance(), instance()
    created = await writer.create(Item(text="1"), resource_id="1")
    await fresh(writer, reader)
    await reader.get("1")
    (cache,) = bodies_of(reader).caches
    garbage = [b"", b"\xff\xfe", b"null", b"[]", b'{"version":2,"sender":"x"}', b'{"version":1}', b"{" * 100_000]
    for body in garbage:
        assert len(await cache.get_many([created.meta.uid])) == 1
        caplog.clear()
        await publish(instance.url, instance.name, body)
        assert await bodies_of(reader).drain()
        assert await cache.get_many([created.meta.uid]) == {}
        assert len([one for one in caplog.records if "cannot be read" in one.message]) == 2  # each instance logs it
        await reader.get("1")
    await writer.update("1", Item(text="2"))
    assert await bodies_of(reader).drain()
    assert (await reader.get("1")).data.text == "2"


async def test_an_invalidation_that_fails_is_tried_again_and_holds_the_lease(instance):
    writer, reader = instance(), instance()
    await writer.create(Item(text="1"), resource_id="1")
    await fresh(writer, reader)
    refresh, failing = bodies_of(reader)._index.refresh, [True]

    async def fails() -> None:
        if failing:
            raise StoreUnavailable("not now")
        await refresh()

    bodies_of(reader)._index.refresh = fails
    await writer.update("1", Item(text="2"))
    await until(lambda: not bodies_of(reader)._bus.is_fresh())  # markers come back, and do not count
    assert (await reader.get("1")).data.text == "2"
    failing.clear()
    await until(bodies_of(reader)._bus.is_fresh)


async def test_markers_stop_without_reads_and_start_again(instance, monkeypatch):
    monkeypatch.setattr(listening, "IDLE_S", 0.05)
    reader = instance()
    await fresh(reader)
    bus = bodies_of(reader)._bus
    await until(lambda: bus._joined.session.consumer.is_idle)
    assert not bus._joined.session.consumer.lease.age() < 0.05
    await until(bus.is_fresh)
