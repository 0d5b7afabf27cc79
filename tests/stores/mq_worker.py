"""One of several instances of an MQCachedS3ResourceStore below a MemoryMetaStore.

test_mq_processes runs it, and sends it one command a line.

Times are CLOCK_MONOTONIC, which all processes of a machine share.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from pathlib import Path

from app.autocrud.errors import CrudError, ResourceNotFound
from app.autocrud.resource_manager.backends.s3.object_store import S3ObjectStore
from app.autocrud.resource_manager.basic import IStorage
from app.autocrud.resource_manager.core import SimpleStorage
from app.autocrud.resource_manager.meta_store.simple import MemoryMetaStore
from app.autocrud.resource_manager.resource_store.cache import DiskCache, MemoryCache
from app.autocrud.resource_manager.resource_store.mq_cached_s3 import MQCachedS3ResourceStore
from app.autocrud.resource_manager.storage_factory import IStorageFactory
from app.autocrud.testing.model import Item, manage
from tests.services import BUCKET, given


class Counting(S3ObjectStore):
    """An S3ObjectStore that records the keys that are read."""

    def __init__(self, *arguments) -> None:
        super().__init__(*arguments)
        self.keys_read: list[str] = []

    async def get_range(self, key, start, end):
        self.keys_read.append(key)
        return await super().get_range(key, start, end)

    async def _read(self, key, options):
        self.keys_read.append(key)
        return await super()._read(key, options)


class Factory(IStorageFactory):
    def __init__(self, amqp_url: str, name: str, cache_dir: str, max_staleness_s: float = 30.0) -> None:
        self.amqp_url, self.name, self.cache_dir = amqp_url, name, Path(cache_dir)
        self.max_staleness_s = max_staleness_s

    def build(self, model_name: str) -> IStorage:
        server = given("TEST_MINISTACK")
        bodies = MQCachedS3ResourceStore(
            [MemoryCache(100), DiskCache(self.cache_dir / model_name)],
            self.amqp_url,
            f"{self.name}_{model_name}_",
            bucket=BUCKET,
            prefix=f"{self.name}/{model_name}/",
            object_store=Counting(BUCKET, *server, "us-east-1"),
            max_staleness_s=self.max_staleness_s,
        )
        return SimpleStorage(MemoryMetaStore(), bodies)


class Worker:
    def __init__(self, **options) -> None:
        self.manager = manage(Factory(**options))
        self.bodies: MQCachedS3ResourceStore = self.manager.storage.resource_store
        self.loads: list[asyncio.Task] = []
        self.events: list[tuple[float, int]] = []

    async def set(self, rid: str, number: int):
        try:
            await self.manager.update(rid, Item(number=number))
        except ResourceNotFound:
            await self.manager.create(Item(number=number), resource_id=rid)
        return time.monotonic()

    async def get(self, rid: str, revision: int | None = None):
        began = time.monotonic()
        try:
            return began, (await self.manager.get(rid, revision=revision)).data.number
        except ResourceNotFound:
            return began, None

    async def uids(self, rid: str):
        return [info.uid for info in (await self.manager.revisions(rid)).items]

    async def purge(self, rid: str):
        await self.manager.purge(rid)
        return time.monotonic()

    async def cached(self, uids: list[str]):
        """Return how many of these uids each cache has."""
        return [len(await cache.get_many(uids)) for cache in self.bodies.caches]

    async def read_keys(self):
        """Return the keys that were read from S3 since the last call."""
        read, self.bodies._objects.keys_read = self.bodies._objects.keys_read, []
        return read

    async def state(self):
        return {"fresh": self.bodies._bus.is_fresh(), "impairments": await self.manager.storage.degradations()}

    async def write_all_the_time(self, rid: str):
        async def load():
            number = 0
            while True:
                number += 1
                self.events.append((await self.set(rid, number), number))
                await asyncio.sleep(0.02)

        self.loads.append(asyncio.create_task(load()))

    async def read_all_the_time(self, rid: str):
        async def load():
            while True:
                self.events.append(await self.get(rid))
                await asyncio.sleep(0.01)

        self.loads.append(asyncio.create_task(load()))

    async def end(self):
        """Return each write with the time of its acknowledgement, or each read with the time when it began."""
        for load in self.loads:
            load.cancel()
        await asyncio.gather(*self.loads, return_exceptions=True)
        failures = [repr(load.exception()) for load in self.loads if not load.cancelled()]
        return {"events": self.events, "failures": failures}

    async def run(self) -> None:
        loop = asyncio.get_running_loop()
        print(json.dumps("ready"), flush=True)
        while line := await loop.run_in_executor(None, sys.stdin.readline):
            name, arguments = json.loads(line)
            try:
                answer = await getattr(self, name)(**arguments)
            except CrudError as error:
                answer = {"error": repr(error)}
            print(json.dumps(answer), flush=True)
        await self.manager.close()


if __name__ == "__main__":
    asyncio.run(Worker(**json.loads(sys.argv[1])).run())
