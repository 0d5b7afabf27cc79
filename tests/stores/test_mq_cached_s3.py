"""MQCachedS3ResourceStore on a real broker: several instances, in one process and in four, and everything that goes wrong between them."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit, urlunsplit

import aio_pika
import pytest

from app.autocrud.errors import ConfigError, ResourceNotFound, StoreUnavailable
from app.autocrud.resource_manager.backends.rabbitmq import consumer as listening
from app.autocrud.resource_manager.backends.rabbitmq.connection import THREAD
from app.autocrud.resource_manager.backends.rabbitmq.consumer import Consumer, OutOfOrder
from app.autocrud.resource_manager.backends.rabbitmq.invalidation import (
    EVERYTHING,
    MOST_UIDS,
    NOTHING,
    REFRESH,
    Invalidation,
    decode,
    encode,
)
from app.autocrud.resource_manager.backends.rabbitmq.publisher import Publisher
from app.autocrud.resource_manager.backends.s3.memory_object_store import MemoryObjectStore
from app.autocrud.resource_manager.basic import IStorage
from app.autocrud.resource_manager.core import SimpleStorage
from app.autocrud.resource_manager.meta_store.simple import MemoryMetaStore
from app.autocrud.resource_manager.resource_store.cache import DiskCache, MemoryCache
from app.autocrud.resource_manager.resource_store.cached_s3 import CachedS3ResourceStore
from app.autocrud.resource_manager.resource_store.mq_cached_s3 import MQCachedS3ResourceStore
from app.autocrud.resource_manager.runtime.moments import Moment
from app.autocrud.resource_manager.storage_factory import IStorageFactory
from app.autocrud.secret import hidden
from tests.conformance import DurableConformance, SharedConformance
from tests.conformance.model import Item, manage
from tests.rabbitmq import RabbitMQ, rabbitmq, running  # noqa: F401
from tests.services import BUCKET, given
from tests.tcp_proxy import TcpProxy

pytestmark = pytest.mark.rabbitmq

PATIENCE_S = 40.0
"""How long a test waits for what happens in a few seconds on a machine that has nothing else to do."""


async def until(holds: Callable[[], object]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while True:
        held = holds()
        if await held if asyncio.iscoroutine(held) else held:
            return
        assert time.monotonic() < deadline, "it did not happen"
        await asyncio.sleep(0.01)


# The suite


_doubles: dict[Path, MemoryObjectStore] = {}


class Cached(IStorageFactory):
    """As in example 5 of the seed, over a bucket in memory: what several processes have of it on a real S3 is seen below."""

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
    """As in example 6. Each read looks at the index, as the suite expects of what several instances share."""

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


class Instances:
    def __init__(self, name: str, url: str) -> None:
        self.name, self.url = name, url
        self.objects = MemoryObjectStore()
        self.made = []

    def __call__(self, url: str | None = None, kind=MQCachedS3ResourceStore, caches=None, **options):
        class Factory(IStorageFactory):
            def build(_, model_name: str) -> IStorage:  # noqa: N805
                bodies = kind(
                    [MemoryCache(100)] if caches is None else caches,
                    url or self.url,
                    self.name,
                    bucket="double",
                    prefix="m/",
                    object_store=self.objects,
                    **options,
                )
                return SimpleStorage(MemoryMetaStore(), bodies)

        manager = manage(Factory())
        self.made.append(manager)
        return manager


@pytest.fixture
async def instance(rabbitmq, tmp_path):  # noqa: F811
    instances = Instances(tmp_path.name, rabbitmq)
    yield instances
    for manager in instances.made:
        await manager.close()
    await until(lambda: not any(thread.name == "crudstack-amqp" for thread in threading.enumerate()))


def bodies_of(manager) -> MQCachedS3ResourceStore:
    return manager.storage.resource_store


async def fresh(*managers) -> None:
    for manager in managers:
        await manager.open()
        await until(bodies_of(manager)._bus.is_fresh)


async def test_a_write_is_seen_without_a_look_at_s3(instance):
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


class SaysNothing(MQCachedS3ResourceStore):
    """A planted defect."""

    async def committed(self) -> None:
        return None


async def test_what_is_acknowledged_was_told(instance):
    """A writer who is cancelled tells all the same; so does one who finds that it is so already, as the first one may have been killed."""
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


async def test_an_instance_that_says_nothing_is_found_out(instance):
    writer, reader = instance(kind=SaysNothing), instance()
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


async def test_a_body_on_its_way_into_the_caches_does_not_survive_forgetting_everything(instance, tmp_path):
    class Waits(DiskCache):
        """Gives an answer that is already old."""

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
    await bodies_of(manager).get_many([created.meta.uid])  # the next one is welcome
    assert len(await memory.get_many(key)) == 1


async def test_it_may_be_used_again_and_leaves_no_thread_behind(instance):
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
    assert await cache.get_many(key) == {}  # what was missed is not known


async def publish(url: str, name: str, *bodies: bytes) -> None:
    async with await aio_pika.connect(url) as connection, connection.channel() as channel:
        exchange = await channel.get_exchange(f"{name}invalidations")
        for body in bodies:
            await exchange.publish(aio_pika.Message(body), "")


async def test_messages_that_cannot_be_read_clear_the_caches_and_harm_nobody(instance, caplog):
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
        assert len([one for one in caplog.records if "cannot be read" in one.message]) == 2  # each instance says so
        await reader.get("1")
    await writer.update("1", Item(text="2"))
    assert await bodies_of(reader).drain()
    assert (await reader.get("1")).data.text == "2"


async def test_what_cannot_be_done_is_tried_again_and_counts_only_then(instance):
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


async def test_markers_end_while_nobody_reads_and_begin_again(instance, monkeypatch):
    monkeypatch.setattr(listening, "IDLE_S", 0.05)
    reader = instance()
    await fresh(reader)
    bus = bodies_of(reader)._bus
    await until(lambda: bus._joined.session.consumer.is_idle)
    assert not bus._joined.session.consumer.lease.age() < 0.05
    await until(bus.is_fresh)


# Without a broker


@pytest.mark.parametrize(
    "url",
    [
        "http://user:mq-secret@localhost",
        "user:mq-secret@localhost",
        "amqp://user:mq-secret@",
        "amqp://user:mq-secret@host:port",
        "amqps://user:mq-secret@host?cafile=/nowhere/ca.pem",
        "",
    ],
)
def test_a_url_that_cannot_be_read_is_not_repeated(url):
    with pytest.raises(ConfigError, match="amqp_url") as caught:
        MQCachedS3ResourceStore([], url, bucket="b", object_store=MemoryObjectStore())
    assert "mq-secret" not in str(caught.value)
    assert caught.value.__context__ is None or "mq-secret" not in repr(caught.value.__context__)


@pytest.mark.parametrize("prefix", ["amq.", "x" * 201])
def test_names_that_a_broker_refuses(prefix):
    with pytest.raises(ConfigError, match="queue_prefix"):
        MQCachedS3ResourceStore([], queue_prefix=prefix, bucket="b", object_store=MemoryObjectStore())


def test_more_uids_than_are_listed_are_everything():
    many = Invalidation(forget=frozenset(f"{at}" for at in range(MOST_UIDS)))
    assert many.merged_with(Invalidation(forget=frozenset(["0"]))) == many
    assert many.merged_with(Invalidation(forget=frozenset(["more"]))) == Invalidation(clear=True)
    assert REFRESH.merged_with(Invalidation(clear=True)) == EVERYTHING
    assert not NOTHING
    assert decode(encode("me", many)).invalidation == many
    assert (decode(encode("me", marker=7)).marker, decode(encode("me", marker=7)).invalidation) == (7, NOTHING)


async def test_a_message_that_was_left_out_is_noticed():
    one = Consumer("me", None)
    one.begin(NOTHING)
    one.receive(1, encode("other", REFRESH))
    with pytest.raises(OutOfOrder):
        one.receive(3, encode("other", REFRESH))


async def test_a_marker_counts_when_all_before_it_is_done_and_as_of_when_it_was_sent():
    gate, done = asyncio.Event(), []

    async def handle(invalidation: Invalidation) -> None:
        await gate.wait()
        done.append(invalidation)

    async def publish(body: bytes) -> None:
        sent.put_nowait(body)
        await confirmed.wait()

    one, sent, confirmed = Consumer("me", handle), asyncio.Queue(), asyncio.Event()
    one.begin(EVERYTHING)
    before = Moment.now()
    tasks = [asyncio.create_task(one.send_markers(publish, lambda: None)), asyncio.create_task(one.handle_all())]
    marker = await sent.get()
    after = Moment.now()
    confirmed.set()
    await asyncio.sleep(0)
    one.receive(1, encode("other", Invalidation(forget=frozenset("u"))))
    one.receive(2, marker)
    await sent.get()  # the next one is sent, so the first one was heard
    assert one.lease is None
    gate.set()
    await until(lambda: one.lease is not None)
    assert done == [EVERYTHING]  # what is missed and what is heard, together
    assert before.running <= one.lease.running <= after.running
    one.receive(3, encode("me", marker=1))  # a marker that came back already
    one.receive(4, encode("me", REFRESH))  # one's own words
    one.receive(5, encode("other", REFRESH))
    await until(lambda: done == [EVERYTHING, REFRESH])
    assert before.running <= one.lease.running <= after.running
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def test_what_is_not_confirmed_is_said_again_and_whoever_waits_shares():
    one, published, confirm = Publisher("me", Invalidation(forget=frozenset("u"))), asyncio.Queue(), asyncio.Event()

    async def publish(body: bytes) -> None:
        published.put_nowait(decode(body).invalidation)
        await confirm.wait()

    session = asyncio.create_task(one.run(publish, lambda: None))
    assert await published.get() == Invalidation(forget=frozenset("u"))
    waiting = [
        asyncio.create_task(one.publish(each)) for each in (REFRESH, REFRESH, Invalidation(forget=frozenset("v")))
    ]
    await asyncio.sleep(0)
    session.cancel()
    await asyncio.gather(session, return_exceptions=True)
    everything = Invalidation(forget=frozenset("uv"), refresh=True)
    assert one.unpublished == everything
    session = asyncio.create_task(one.run(publish, lambda: None))
    assert await published.get() == everything
    confirm.set()
    assert await asyncio.gather(*waiting) == [True] * 3
    assert (one.unpublished, published.empty()) == (NOTHING, True)
    session.cancel()
    await asyncio.gather(session, return_exceptions=True)


async def test_a_host_that_is_not_there(instance, caplog):
    url = "amqp://user:mq-secret@no-such-host.invalid/"
    writer, reader = instance(url), instance(lambda: url)
    with caplog.at_level(logging.DEBUG, "crudstack"):
        await writer.create(Item(text="1"), resource_id="1")
        assert (await reader.get("1")).data.text == "1"
        await writer.update("1", Item(text="2"))
        assert (await reader.get("1")).data.text == "2"
        await until(reader.storage.degradations)
        await until(lambda: bodies_of(writer)._bus._joined.session._pause > 0.5)  # several attempts
    assert any("RabbitMQ cannot be reached" in one for one in await writer.storage.degradations())
    assert not await bodies_of(reader).drain(0.01)
    said = [one.getMessage() for one in caplog.records if one.name == "crudstack.amqp"]
    assert len(said) == 2, said  # once for each address
    assert "mq-secret" not in caplog.text


# A broker of one's own


class Proxy(TcpProxy):
    """A network that lets nothing through while it is held."""

    def __init__(self, url: str) -> None:
        super().__init__(url)
        parts = urlsplit(url)
        login = parts.netloc.rpartition("@")[0]
        self.amqp_url = urlunsplit(parts._replace(netloc=f"{login}@127.0.0.1:{urlsplit(self.url).port}"))

    def _pump(self, source, sink, answers):
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                if not self._flows.is_set():
                    self.held.set()
                    self._flows.wait()
                sink.sendall(data)
        with contextlib.suppress(OSError):
            sink.shutdown(2)


@pytest.fixture(scope="module")
def certificates(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("tls")

    def openssl(*arguments: str) -> None:
        done = subprocess.run(["openssl", *arguments], cwd=directory, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr

    key = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2"]
    for name in ("ca", "stranger"):
        openssl("req", "-x509", *key, "-keyout", f"{name}.key", "-out", f"{name}.pem", "-subj", f"/CN=crudstack {name}")
    (directory / "names").write_text("subjectAltName=DNS:localhost,IP:127.0.0.1\n")
    openssl("req", *key, "-keyout", "server.key", "-out", "server.csr", "-subj", "/CN=localhost")
    signed = ["-CA", "ca.pem", "-CAkey", "ca.key", "-CAcreateserial", "-extfile", "names", "-days", "2"]
    openssl("x509", "-req", "-in", "server.csr", "-out", "server.pem", *signed)
    return directory


@pytest.fixture(scope="module")
def broker(tmp_path_factory, certificates) -> Iterator[RabbitMQ]:
    with running(tmp_path_factory.mktemp("broker"), certificates) as server:
        yield server


async def test_tls(instance, broker, certificates, caplog):
    known, unknown = (f"{broker.tls_url}?cafile={certificates / name}.pem" for name in ("ca", "stranger"))
    writer, reader, stranger = instance(known), instance(known), instance(unknown)
    await fresh(writer, reader)
    await writer.create(Item(text="1"), resource_id="1")
    assert await bodies_of(reader).drain()
    assert (await reader.get("1")).data.text == "1"
    assert (await stranger.get("1")).data.text == "1"
    await until(stranger.storage.degradations)
    assert "CERTIFICATE_VERIFY_FAILED" in caplog.text
    assert broker.key not in caplog.text
    assert "mq-secret" not in caplog.text


async def test_a_broker_that_refuses_what_is_needed(instance, broker, caplog):
    """Somebody else's exchange, and a login that is wrong."""
    async with await aio_pika.connect(broker.url) as connection, connection.channel() as channel:
        await channel.declare_exchange(f"{instance.name}invalidations", aio_pika.ExchangeType.TOPIC, durable=True)
    refused, stranger = instance(broker.url), instance(broker.url.replace("mq-secret", "wrong"))
    await refused.create(Item(text="1"), resource_id="1")
    assert (await stranger.get("1")).data.text == "1"
    for manager in (refused, stranger):
        await until(manager.storage.degradations)
    assert "PRECONDITION_FAILED" in caplog.text
    assert "ACCESS_REFUSED" in caplog.text


async def test_a_writer_that_is_cut_off_says_later_what_it_could_not_say(instance, broker):
    with Proxy(broker.url) as proxy:
        writer, reader = instance(proxy.amqp_url), instance(broker.url)
        for rid in ("1", "2"):
            await writer.create(Item(text="1"), resource_id=rid)
        await fresh(writer, reader)
        purged = await reader.get("2")
        (cache,) = bodies_of(reader).caches
        proxy.hold()
        await writer.update("1", Item(text="2"))
        await writer.purge("2")
        assert await bodies_of(reader).drain()
        assert (await reader.get("1")).data.text == "1"  # documented: it relies on writers for max_staleness_s
        assert len(await cache.get_many([purged.meta.uid])) == 1
        first, second = await writer.storage.degradations()
        assert "RabbitMQ cannot be reached" in first
        assert "late and may keep copies" in second
        assert await reader.storage.degradations() == []
        proxy.release()
        await until(lambda: not bodies_of(writer)._bus.unpublished())
        assert await bodies_of(reader).drain()
        assert (await reader.get("1")).data.text == "2"
        assert await cache.get_many([purged.meta.uid]) == {}
        assert await writer.storage.degradations() == []


async def test_a_connection_that_is_silent_for_long_is_replaced_and_caches_cleared(instance, broker, monkeypatch):
    monkeypatch.setattr(listening, "SILENCE_S", 1.2)
    with Proxy(broker.url) as proxy:
        manager = instance(proxy.amqp_url)
        created = await manager.create(Item(text="1"))
        await fresh(manager)
        consumer = bodies_of(manager)._bus._joined.session.consumer
        (cache,) = bodies_of(manager).caches
        cut = proxy._open.copy()
        proxy.hold()
        await until(lambda: bodies_of(manager)._bus._joined.session._down)
        assert consumer.lease.age() >= 1.0
        assert len(await cache.get_many([created.meta.uid])) == 1  # it is cleared once another connection works
        proxy.release()
        await until(bodies_of(manager)._bus.is_fresh)
        assert proxy._open - cut
        assert await cache.get_many([created.meta.uid]) == {}


# Four processes


class Process:
    """A worker, see mq_worker."""

    def __init__(self, url: str, name: str, cache_dir: Path, **options) -> None:
        arguments = json.dumps({"amqp_url": url, "name": name, "cache_dir": str(cache_dir), **options})
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.stores.mq_worker", arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def tell(self, name: str, **arguments) -> None:
        self.process.stdin.write(json.dumps([name, arguments]) + "\n")
        self.process.stdin.flush()

    def hear(self):
        line = self.process.stdout.readline()
        assert line, "the worker has ended"
        return json.loads(line)

    def ask(self, name: str, **arguments):
        self.tell(name, **arguments)
        return self.hear()

    def stop(self) -> None:
        self.process.send_signal(signal.SIGCONT)
        self.process.stdin.close()
        try:
            self.process.wait(20)
        finally:
            self.process.kill()
            self.process.wait()
            self.process.stdout.close()


@pytest.fixture
def start(tmp_path, ministack_s3) -> Iterator[Callable[..., list[Process]]]:  # noqa: ARG001 - its address is in the environment
    with contextlib.ExitStack() as stack:

        def started(*urls: str, **options) -> list[Process]:
            made = []
            for at, url in enumerate(urls):
                made.append(Process(url, tmp_path.name, tmp_path / f"cache {at}", **options))
                stack.callback(made[-1].stop)
            assert [one.hear() for one in made] == ["ready"] * len(made)
            return made

        yield started


def wait(holds: Callable[[], bool]) -> None:
    asyncio.run(until(holds))


def all_fresh(processes) -> bool:
    states = [one.ask("state") for one in processes]
    return all(state == {"fresh": True, "impairments": []} for state in states)


class Write(NamedTuple):
    acknowledged: float
    number: int


class Read(NamedTuple):
    began: float
    number: int


def too_old(writes: list[Write], reads: list[Read], bound: Callable[[Read], float]) -> list[Read]:
    """Reads that do not show what was acknowledged longer ago than is documented."""
    return [
        one
        for one in reads
        if one.number
        < max((write.number for write in writes if write.acknowledged < one.began - bound(one)), default=0)
    ]


def test_the_checker_bites():
    writes = [Write(10.0, 1), Write(11.0, 2)]
    reads = [Read(10.5, 0), Read(11.5, 1), Read(11.9, 1), Read(12.1, 1), Read(12.1, 2), Read(13.0, 0)]
    assert too_old(writes, reads, lambda _: 1.0) == [Read(12.1, 1), Read(13.0, 0)]
    assert too_old(writes, reads, lambda _: 2.5) == [Read(13.0, 0)]


def test_four_processes_see_each_others_writes_and_purges(start, rabbitmq):  # noqa: F811
    processes = start(*[rabbitmq] * 4)
    processes[0].ask("set", rid="r", number=0)
    for one in processes:
        wait(lambda one=one: one.ask("get", rid="r")[1] == 0)
    wait(lambda: all_fresh(processes))
    for number in range(1, 9):
        writer = processes[number % 4]
        acknowledged = writer.ask("set", rid="r", number=number)
        for one in processes:
            while True:
                began, seen = one.ask("get", rid="r")
                if seen == number:
                    break
                assert began < acknowledged + 1.0, "the write should have been seen"
    for one in processes:
        one.ask("read_keys")
        assert {one.ask("get", rid="r")[1] for _ in range(50)} == {8}
        assert one.ask("read_keys") == []  # neither the index nor a body
    uids = processes[0].ask("uids", rid="r")
    for one in processes:
        for revision in range(1, 10):
            one.ask("get", rid="r", revision=revision)
        assert one.ask("cached", uids=uids) == [9, 9]
    purged = processes[3].ask("purge", rid="r")
    for one in processes:
        while True:
            began, seen = one.ask("get", rid="r")
            if seen is None:
                break
            assert began < purged + 1.0
        wait(lambda one=one: one.ask("cached", uids=uids) == [0, 0])


def test_a_process_that_was_stopped_reads_what_is_new_first(start, rabbitmq):  # noqa: F811
    writer, reader = start(*[rabbitmq] * 2)
    for rid in ("r", "s"):
        writer.ask("set", rid=rid, number=1)
        wait(lambda rid=rid: reader.ask("get", rid=rid)[1] == 1)
    uids = writer.ask("uids", rid="s")
    wait(lambda: all_fresh([writer, reader]))
    assert reader.ask("cached", uids=uids) == [1, 1]
    reader.process.send_signal(signal.SIGSTOP)
    writer.ask("set", rid="r", number=2)
    done = writer.ask("purge", rid="s")
    wait(lambda: time.monotonic() > done + 1.0)
    reader.tell("get", rid="r")
    reader.tell("get", rid="s")
    reader.process.send_signal(signal.SIGCONT)
    assert reader.hear()[1] == 2
    assert reader.hear()[1] is None
    wait(lambda: reader.ask("cached", uids=uids) == [0, 0])
    wait(lambda: all_fresh([reader]))


def test_no_read_is_older_than_documented_whatever_breaks(start, broker):
    staleness = 2.0
    with Proxy(broker.url) as writers, Proxy(broker.url) as readers:
        urls = [writers.amqp_url, readers.amqp_url, broker.url, broker.url]
        writer, cut_off, *others = processes = start(*urls, max_staleness_s=staleness)
        writer.ask("set", rid="r", number=0)
        for one in processes:
            wait(lambda one=one: one.ask("get", rid="r")[1] == 0)
        wait(lambda: all_fresh(processes))
        writer.ask("write_all_the_time", rid="r")
        for one in (cut_off, *others):
            one.ask("read_all_the_time", rid="r")

        def impaired(one: Process) -> bool:
            return any("RabbitMQ cannot be reached" in said for said in one.ask("state")["impairments"])

        # A reader alone
        readers.hold()
        wait(lambda: impaired(cut_off))
        assert all_fresh([writer, *others])
        readers.release()
        wait(lambda: all_fresh(processes))
        # A writer alone: the readers do not know
        began = time.monotonic()
        writers.hold()
        wait(lambda: impaired(writer))
        seen = others[0].ask("get", rid="r")[1]
        wait(lambda: others[0].ask("get", rid="r")[1] > seen)  # by looking
        assert all_fresh([cut_off, *others])
        writers.release()
        wait(lambda: all_fresh(processes))
        ended = time.monotonic()
        # The broker
        broker.kill()
        wait(lambda: all(map(impaired, processes)))
        broker.launch()
        broker.wait()
        wait(lambda: all_fresh(processes))
        ends = [one.ask("end") for one in processes]
    assert [end["failures"] for end in ends] == [[]] * 4
    writes = [Write(*event) for event in ends[0]["events"]]
    assert len(writes) > 20
    for end in ends[1:]:
        reads = [Read(*event) for event in end["events"]]
        assert len(reads) > 100
        assert [read.number for read in reads] == sorted(read.number for read in reads)  # never back
        old = too_old(writes, reads, lambda one: staleness if began <= one.began <= ended + 1.0 else 1.0)
        assert old == []
