"""What the tests of MQCachedS3ResourceStore share: instances in one process, a broker for one module, and waiting."""

from __future__ import annotations

import asyncio
import contextlib
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import urlsplit, urlunsplit

import aio_pika
import pytest

from app.autocrud.resource_manager.backends.s3.memory_object_store import MemoryObjectStore
from app.autocrud.resource_manager.basic import IStorage
from app.autocrud.resource_manager.core import SimpleStorage
from app.autocrud.resource_manager.meta_store.simple import MemoryMetaStore
from app.autocrud.resource_manager.resource_store.cache import MemoryCache
from app.autocrud.resource_manager.resource_store.mq_cached_s3 import MQCachedS3ResourceStore
from app.autocrud.resource_manager.storage_factory import IStorageFactory
from app.autocrud.testing.model import manage
from tests.rabbitmq import RabbitMQ, rabbitmq, running  # noqa: F401
from tests.tcp_proxy import TcpProxy

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


@pytest.fixture(name="instance")
async def instance_fixture(rabbitmq, tmp_path):  # noqa: F811
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


async def publish(url: str, name: str, *bodies: bytes) -> None:
    async with await aio_pika.connect(url) as connection, connection.channel() as channel:
        exchange = await channel.get_exchange(f"{name}invalidations")
        for body in bodies:
            await exchange.publish(aio_pika.Message(body), "")


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


@pytest.fixture(name="certificates", scope="module")
def certificates_fixture(tmp_path_factory) -> Path:
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


@pytest.fixture(name="broker", scope="module")
def broker_fixture(tmp_path_factory, certificates) -> Iterator[RabbitMQ]:
    with running(tmp_path_factory.mktemp("broker"), certificates) as server:
        yield server
