"""MQCachedS3ResourceStore without a broker, and with a broker that fails."""

from __future__ import annotations

import asyncio
import logging

import aio_pika
import pytest

from app.autocrud.errors import ConfigError
from app.autocrud.resource_manager.backends.rabbitmq import consumer as listening
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
from app.autocrud.resource_manager.resource_store.mq_cached_s3 import MQCachedS3ResourceStore
from app.autocrud.resource_manager.runtime.moments import Moment
from app.autocrud.testing.model import Item
from tests.rabbitmq import RabbitMQ, rabbitmq, running  # noqa: F401
from tests.stores.mq_helpers import (  # noqa: F401
    Proxy,
    bodies_of,
    broker_fixture,
    certificates_fixture,
    fresh,
    instance_fixture,
    until,
)

pytestmark = pytest.mark.rabbitmq


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
def test_a_queue_prefix_that_a_broker_refuses_is_refused(prefix):
    with pytest.raises(ConfigError, match="queue_prefix"):
        MQCachedS3ResourceStore([], queue_prefix=prefix, bucket="b", object_store=MemoryObjectStore())


def test_too_many_uids_become_an_invalidation_of_everything():
    many = Invalidation(forget=frozenset(f"{at}" for at in range(MOST_UIDS)))
    assert many.merged_with(Invalidation(forget=frozenset(["0"]))) == many
    assert many.merged_with(Invalidation(forget=frozenset(["more"]))) == Invalidation(clear=True)
    assert REFRESH.merged_with(Invalidation(clear=True)) == EVERYTHING
    assert not NOTHING
    assert decode(encode("me", many)).invalidation == many
    assert (decode(encode("me", marker=7)).marker, decode(encode("me", marker=7)).invalidation) == (7, NOTHING)


async def test_a_message_that_was_left_out_is_detected():
    one = Consumer("me", None)
    one.begin(NOTHING)
    one.receive(1, encode("other", REFRESH))
    with pytest.raises(OutOfOrder):
        one.receive(3, encode("other", REFRESH))


async def test_the_lease_is_when_the_marker_was_sent_once_all_before_it_is_handled():
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
    await sent.get()  # the next one is sent, so the first one was received
    assert one.lease is None
    gate.set()
    await until(lambda: one.lease is not None)
    assert done == [EVERYTHING]  # what was missed and what was received, together
    assert before.running <= one.lease.running <= after.running
    one.receive(3, encode("me", marker=1))  # a marker that came back already
    one.receive(4, encode("me", REFRESH))  # a message of its own
    one.receive(5, encode("other", REFRESH))
    await until(lambda: done == [EVERYTHING, REFRESH])
    assert before.running <= one.lease.running <= after.running
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def test_an_unconfirmed_invalidation_is_sent_again_with_those_that_wait():
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


async def test_a_host_that_does_not_exist(instance, caplog):
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


# A broker for this module


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


async def test_a_broker_that_refuses_the_exchange(instance, broker, caplog):
    """An exchange of another type, and a login that is wrong."""
    async with await aio_pika.connect(broker.url) as connection, connection.channel() as channel:
        await channel.declare_exchange(f"{instance.name}invalidations", aio_pika.ExchangeType.TOPIC, durable=True)
    refused, stranger = instance(broker.url), instance(broker.url.replace("mq-secret", "wrong"))
    await refused.create(Item(text="1"), resource_id="1")
    assert (await stranger.get("1")).data.text == "1"
    for manager in (refused, stranger):
        await until(manager.storage.degradations)
    assert "PRECONDITION_FAILED" in caplog.text
    assert "ACCESS_REFUSED" in caplog.text


async def test_a_writer_that_is_cut_off_publishes_later(instance, broker):
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


async def test_a_silent_connection_is_replaced_and_the_caches_are_cleared(instance, broker, monkeypatch):
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
