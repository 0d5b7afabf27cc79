"""FastSlowMetaStore: the conformance suite, and four processes while servers and networks fail."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from app.autocrud.resource_manager.basic import IStorage
from app.autocrud.resource_manager.blob_store.simple import DiskBlobStore
from app.autocrud.resource_manager.core import SimpleStorage
from app.autocrud.resource_manager.meta_store.fast_slow import FastSlowMetaStore
from app.autocrud.resource_manager.meta_store.postgres import PostgresMetaStore
from app.autocrud.resource_manager.meta_store.redis import RedisMetaStore
from app.autocrud.resource_manager.resource_store.simple import DiskResourceStore
from app.autocrud.resource_manager.storage_factory import IStorageFactory
from app.autocrud.testing import SharedConformance
from tests.stores.fast_slow_processes import Processes
from tests.tcp_proxy import TcpProxy
from tests.valkey import Valkey


class RedisPg(IStorageFactory):
    def __init__(self, root: Path) -> None:
        self.root = root

    def build(self, model_name: str) -> IStorage:
        meta_store = FastSlowMetaStore(
            RedisMetaStore(os.environ["TEST_VALKEY"], prefix=f"{self.root.name}:{model_name}:"),
            PostgresMetaStore(
                os.environ["TEST_POSTGRES"], table_name=f"{self.root.name}/meta_{model_name}", max_size=4
            ),
            lease_s=0.2,
        )
        directory = self.root / model_name
        return SimpleStorage(meta_store, DiskResourceStore(directory), DiskBlobStore(directory / "blobs"))


@pytest.mark.usefixtures("valkey", "postgres")
class TestFastSlow(SharedConformance):
    def make(self, root: Path) -> IStorageFactory:
        return RedisPg(root)


WORK = {"read": 1, "written": 1, "purged": 1}


@pytest.fixture
def servers(tmp_path) -> Iterator[list[Valkey]]:
    started = []
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
        started.append(Valkey(tmp_path / name))
        started[-1].start()
    yield started
    for server in started:
        server.stop()


async def test_four_processes_read_nothing_stale_while_servers_and_networks_fail(postgres, servers, tmp_path):
    one, other = servers
    async with Processes(tmp_path, one, postgres, 0.6) as processes:
        proxies = processes.proxies

        async def recovered() -> None:
            await processes.go_on(hits=20, **WORK)
            assert not processes.stale

        one.stop()  # SIGKILL
        await processes.go_on(**WORK)
        one.start()
        await recovered()
        with one.client() as client:
            for _ in range(5):
                client.flushall()
                await processes.go_on(**WORK)
        one.pause()
        await processes.go_on(**WORK)
        one.resume()
        await recovered()
        for proxy in (proxies[0], proxies[1]):
            # One process is cut off. It must see the writes of the others, and the others must see its writes.
            proxy.route_to(None)
            await processes.go_on(**WORK)
            proxy.route_to(one)
            await recovered()
        proxies[2].hold()  # its commands are executed, but it receives no replies
        await processes.go_on(**WORK)
        proxies[2].release()
        await recovered()
        for _ in range(2):
            dump = one.dump()
            await processes.go_on(written=1)
            one.restore(dump)
            await recovered()
        with TcpProxy(one.url) as replication:
            other.follow(one, urlsplit(replication.url).port)
            await processes.go_on(hits=20)
            replication.hold()
            await processes.go_on(written=1)
            one.stop()
            other.promote()
            for proxy in proxies:
                proxy.route_to(other)
            await recovered()
        one.start()
        with TcpProxy(other.url) as replication:
            one.follow(other, urlsplit(replication.url).port)
            await processes.go_on(hits=20)
            replication.hold()
            await processes.go_on(written=1)
            one.promote()
            for proxy in proxies[1:]:
                proxy.route_to(one)
            for _ in range(2):
                await processes.go_on(**WORK)  # the first process keeps using the old primary, which is alive
            proxies[0].route_to(one)
            await recovered()
    assert not processes.stale


async def test_the_processes_notice_a_stale_read(postgres, servers, tmp_path):
    async with Processes(tmp_path, servers[0], postgres, 5.0, broken=True) as processes:
        await processes.until(lambda: processes.stale)
