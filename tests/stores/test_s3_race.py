"""Conditional writes are raced once per store and endpoint, before anything is acknowledged."""

from __future__ import annotations

import contextlib
import random

import msgspec
import pytest
from msgspec import Struct

from app.autocrud import AutoCRUD
from app.autocrud.errors import ConditionalWritesUnsupported, StoreUnavailable
from app.autocrud.resource_manager.backends.s3.memory_object_store import Call, InjectedFault, MemoryObjectStore
from app.autocrud.resource_manager.backends.s3.object_store import NotStored, ObjectStore, S3ObjectStore, Stored
from app.autocrud.resource_manager.backends.s3_sqlite import housekeeping, race_check
from app.autocrud.resource_manager.backends.s3_sqlite.head import decode_head
from app.autocrud.resource_manager.backends.s3_sqlite.race_check import race_conditional_writes
from app.autocrud.resource_manager.core import ResourceManager
from app.autocrud.resource_manager.storage_factory import S3StorageFactory
from tests import virtual_time
from tests.check_then_act_proxy import CheckThenActProxy

KEY = "meta/note.sqlite"
HEAD = f"{KEY}/HEAD"
RACE = f"{KEY}/race/"
PUTS = race_check.OBJECTS * race_check.WRITERS * race_check.ROUNDS * (1 + race_check.REPLACED)


class Note(Struct):
    text: str


class Counting(MemoryObjectStore):
    """A store in memory that counts the PUTs of races and has an endpoint."""

    def __init__(self, endpoint: str = "http://one:9000") -> None:
        super().__init__()
        self._endpoint = endpoint
        self.raced = 0

    @property
    def endpoint(self) -> str:
        return self._endpoint

    async def put_if(self, key, body, etag):
        self.raced += key.startswith(RACE)
        return await super().put_if(key, body, etag)


def instance(objects: ObjectStore) -> ResourceManager[Note]:
    crud = AutoCRUD(storage_factory=S3StorageFactory("double", object_store=objects, sync_interval=None))
    return crud.add_model(Note, indexed_fields=["text"])


def left(objects: MemoryObjectStore) -> list[str]:
    return [key for key in objects.objects if "/race/" in key]


def raced(objects: MemoryObjectStore) -> tuple[str, ...]:
    return decode_head(objects.objects[HEAD].body).raced


def process(objects: Counting, endpoint: str) -> Counting:
    """Return another client of the same bucket, like that of another process."""
    client = Counting(endpoint)
    client.objects = objects.objects
    return client


async def test_a_store_is_raced_once_and_the_endpoint_is_recorded():
    objects = Counting()
    await instance(objects).create(Note("0"))
    assert (objects.raced, raced(objects), left(objects)) == (PUTS, ("http://one:9000",), [])
    other = process(objects, "http://one:9000")
    assert await instance(other).count() == 1
    assert other.raced == 0
    assert other.requests["put_if"] == 2  # the probe: conditions one at a time
    assert not other.requests.keys() - {"get", "get_if", "put_if"}


async def test_another_endpoint_is_raced_too():
    objects = Counting()
    await instance(objects).create(Note("0"))
    other = process(objects, "http://two:9000")
    assert await instance(other).count() == 1
    assert (other.raced, raced(objects)) == (PUTS, ("http://one:9000", "http://two:9000"))
    again = process(objects, "http://one:9000")
    assert await instance(again).count() == 1
    assert again.raced == 0


async def test_a_store_of_an_earlier_program_is_raced_at_its_first_start():
    objects = Counting()
    await instance(objects).create(Note("0"))
    head = msgspec.msgpack.decode(objects.objects[HEAD].body)
    del head["raced"]
    objects._store(HEAD, msgspec.msgpack.encode(head))
    other = process(objects, "http://one:9000")
    assert await instance(other).count() == 1
    assert (other.raced, raced(objects), left(objects)) == (PUTS, ("http://one:9000",), [])


@pytest.mark.parametrize("seed", range(20))
def test_check_then_act_is_refused(seed):
    """The single conditional PUTs of the probe pass, but the race does not."""

    async def main():
        chance = random.Random(seed)
        objects = Counting()
        objects.latency = lambda _: chance.uniform(0.001, 0.004)
        objects.check_then_act = lambda: chance.uniform(0, 0.003)
        with pytest.raises(ConditionalWritesUnsupported, match=r"concurrent PUTs .* acknowledged writes are lost"):
            await instance(objects).create(Note("0"))
        assert left(objects) == []
        assert raced(objects) == ()
        with pytest.raises(ConditionalWritesUnsupported):  # a failure is not remembered as a pass
            await instance(objects).create(Note("0"))

    virtual_time.run(main())


@pytest.mark.parametrize("seed", range(20))
def test_a_slow_and_unreliable_storage_is_never_refused(seed):
    """Lost answers, false conflicts and PUTs that take effect late are no reason to refuse a correct storage."""

    async def main():
        chance = random.Random(seed)
        objects = Counting()
        objects.latency = lambda _: chance.expovariate(1 / 2.0)
        trouble = chance.choice([0.01, 0.05, 0.3])

        def fault(call: Call) -> InjectedFault | None:
            if chance.random() >= trouble:
                return None
            late = chance.choice([None, chance.expovariate(1 / 2.0)]) if call.op == "put_if" else None
            return InjectedFault(chance.choice(["unknown", "conflict"]), applied=chance.random() < 0.5, late=late)

        objects.fault = fault
        # If a third of all requests fail, perhaps no round has a result. With fewer failures the race must pass.
        with contextlib.suppress(*([StoreUnavailable] if trouble == 0.3 else [])):
            await race_conditional_writes(objects, f"{KEY}/")
            assert objects.raced >= PUTS

    virtual_time.run(main())


@pytest.mark.parametrize("answer", ["conflict", "unknown"])
def test_a_race_without_a_result_ends(answer):
    async def main():
        objects = Counting()
        objects.fault = lambda call: (
            InjectedFault(answer) if call.key.startswith(RACE) and call.op == "put_if" else None
        )
        with pytest.raises(StoreUnavailable, match="could not be tested: 20 repeats"):
            await instance(objects).create(Note("0"))
        assert objects.raced <= race_check.OBJECTS * race_check.WRITERS * (race_check.MAX_REPEATS + 1)
        objects.fault = lambda _: None
        assert (await instance(objects).create(Note("0"))).data.text == "0"

    virtual_time.run(main())


async def test_a_winner_whose_content_was_replaced_is_refused(monkeypatch):
    objects = Counting()
    put_if = objects.put_if

    async def writes_all(key, body, etag):
        outcome = await put_if(key, body, etag)
        if key.startswith(RACE) and isinstance(outcome, NotStored):
            objects._store(key, body)  # although the answer says that nothing was stored
        return outcome

    monkeypatch.setattr(objects, "put_if", writes_all)
    with pytest.raises(ConditionalWritesUnsupported, match="another content"):
        await instance(objects).create(Note("0"))


async def test_objects_of_a_killed_race_are_collected(monkeypatch):
    objects = Counting()
    manager = instance(objects)
    await manager.create(Note("0"))
    await objects.put(f"{RACE}killed", b"")
    await manager.maintain(10)
    assert left(objects) == [f"{RACE}killed"]  # that race may still run
    monkeypatch.setattr(housekeeping, "LEFTOVER_S", -60.0)
    await manager.maintain(10)
    assert left(objects) == []
    assert await manager.count() == 1


# A real server


def client(url: str, bucket: str) -> S3ObjectStore:
    return S3ObjectStore(bucket, url, "local", "local", "us-east-1")


async def test_a_real_server_passes_over_many_connections(ministack_s3, bucket):
    with CheckThenActProxy(ministack_s3.url, None) as proxy:
        objects = client(proxy.url, bucket)
        manager = instance(objects)
        await manager.create(Note("0"))
        assert (await manager.storage.meta_store.head()).raced == (proxy.url,)
        assert proxy.most_at_once >= race_check.WRITERS
        assert [listed async for listed in objects.list(RACE)] == []


async def test_a_real_server_behind_check_then_act_is_refused(ministack_s3, bucket):
    with CheckThenActProxy(ministack_s3.url, 0.003) as proxy:
        objects = client(proxy.url, bucket)
        created = await objects.put_if("alone", b"1", None)  # one at a time, its conditions are honoured
        assert isinstance(created, Stored)
        assert isinstance(await objects.put_if("alone", b"2", None), NotStored)
        assert isinstance(await objects.put_if("alone", b"2", '"0"'), NotStored)
        assert isinstance(await objects.put_if("alone", b"2", created.etag), Stored)
        with pytest.raises(ConditionalWritesUnsupported, match="concurrent PUTs"):
            await instance(objects).create(Note("0"))
        assert [listed async for listed in objects.list(RACE)] == []


def test_an_endpoint_names_the_server_and_no_credentials(monkeypatch):
    monkeypatch.delenv("AWS_ENDPOINT_URL", raising=False)
    monkeypatch.delenv("AWS_ENDPOINT", raising=False)
    assert client("http://user:secret@127.0.0.1:9000/path", "b").endpoint == "http://127.0.0.1:9000"
    assert S3ObjectStore("b", None, "k", "s", "us-east-1").endpoint == "aws"
    assert MemoryObjectStore().endpoint.endswith("MemoryObjectStore")
