"""Fixtures of the tests of RedisMetaStore."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import redis

from tests.stores.redis.helpers import Instances, Proxy


@pytest.fixture
async def instance(valkey, tmp_path):
    instances = Instances(tmp_path, valkey)
    yield instances
    for manager in instances.made:
        await manager.close()


@pytest.fixture
def server(valkey) -> Iterator[redis.Redis]:
    """The server itself."""
    with redis.Redis.from_url(valkey) as direct:
        yield direct
        direct.config_set("maxmemory", 0)


@pytest.fixture
def proxy(valkey) -> Iterator[Proxy]:
    with Proxy(valkey) as running:
        yield running
        running.later.set()
