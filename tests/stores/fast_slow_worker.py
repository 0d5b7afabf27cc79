"""A process that reads and writes a few resources through a FastSlowMetaStore, and prints which reads were stale.

test_fast_slow starts it through fast_slow_processes. A file that all processes share records the acknowledged writes:
the last acknowledged version of each shared resource, and for each process the numbers of the last resource that it
created, that it is about to purge, and that it has purged. Each read looks into this file before it begins.
"""

from __future__ import annotations

import asyncio
import contextlib
import datetime as dt
import fcntl
import json
import mmap
import random
import struct
import sys
from pathlib import Path

from app.autocrud import Encoding
from app.autocrud.errors import CrudError, ResourceNotFound
from app.autocrud.resource_manager.basic import Change, ResourceMeta, Version
from app.autocrud.resource_manager.meta_store.fast_slow import FastSlowMetaStore
from app.autocrud.resource_manager.meta_store.postgres import PostgresMetaStore
from app.autocrud.resource_manager.meta_store.redis import RedisMetaStore

RESOURCES, PROCESSES = 3, 4
CREATED, PURGING, PURGED = range(3)


class Broken(FastSlowMetaStore):
    """A cache that writes do not invalidate: an entry stays until it expires."""

    async def _commit(self, changes, once):
        return await self._slow.commit(changes, once)


class Register:
    """Numbers that only increase, in a file that all processes share."""

    SIZE = 8 * (RESOURCES + 3 * PROCESSES)

    def __init__(self, path: Path) -> None:
        self._file = path.open("r+b")
        self._map = mmap.mmap(self._file.fileno(), self.SIZE)

    def get(self, at: int) -> int:
        return struct.unpack_from("<Q", self._map, 8 * at)[0]  # reading eight aligned bytes is atomic

    def raise_to(self, at: int, number: int) -> None:
        fcntl.lockf(self._file, fcntl.LOCK_EX)
        struct.pack_into("<Q", self._map, 8 * at, max(number, self.get(at)))
        fcntl.lockf(self._file, fcntl.LOCK_UN)

    def once(self, process: int, what: int) -> int:
        return RESOURCES + 3 * process + what


def store_of(
    redis_url: str,
    dsn: str,
    name: str,
    lease_s: float,
    kind: type[FastSlowMetaStore] = FastSlowMetaStore,
    prefix: str | None = None,
):
    return kind(
        RedisMetaStore(redis_url, prefix=prefix or f"{name}:"),
        PostgresMetaStore(dsn, table_name=name, max_size=4),
        lease_s=lease_s,
    )


def change_of(rid: str, before: ResourceMeta | None = None, *, purge: bool = False) -> Change:
    version = 1 if before is None else before.version + 1
    meta = ResourceMeta(
        resource_id=rid,
        version=version,
        nonce=f"{random.getrandbits(64):x}",
        revision=1,
        total_revision_count=1,
        schema_version=1,
        status="stable",
        is_deleted=False,
        uid="0/x",
        data_hash="",
        encoding=Encoding.json,
        created_time=dt.datetime.now(dt.UTC),
        updated_time=dt.datetime.now(dt.UTC),
        created_by="",
        updated_by="",
    )
    expect = "absent" if before is None else Version(before.version, before.nonce)
    return Change(meta=meta, record=None, index=None, expect=expect, purge=purge)


class Worker:
    def __init__(self, number: int, store: FastSlowMetaStore, register: Register) -> None:
        self.number, self.store, self.register = number, store, register
        self.stopped = False
        self.hits = 0
        self.random = random.Random(number)

    def say(self, what: str, **more) -> None:
        print(json.dumps({"what": what, **more}), flush=True)

    async def read_shared(self) -> None:
        at = self.random.randrange(RESOURCES)
        least = self.register.get(at)
        version = (await self.store.get(f"shared-{at}")).version
        if version < least:
            self.say("stale", was=f"shared-{at} at {version}, {least} was acknowledged")

    async def read_once(self) -> None:
        process = self.random.randrange(PROCESSES)
        purged = self.register.get(self.register.once(process, PURGED))
        number = self.register.get(self.register.once(process, CREATED))
        if number == 0:
            return
        try:
            await self.store.get(f"once-{process}-{number}")
        except ResourceNotFound:
            if number > self.register.get(self.register.once(process, PURGING)):
                self.say("stale", was=f"once-{process}-{number} was created, but was not found")
        else:
            if number <= purged:
                self.say("stale", was=f"once-{process}-{number} was purged, but was found")

    async def read(self) -> None:
        reads = 0
        while not self.stopped:
            await (self.read_shared() if self.random.random() < 0.6 else self.read_once())
            reads += 1
            if reads % 50 == 0:
                self.say("read", hits=self.hits)
            await asyncio.sleep(0.002)

    async def write_shared(self) -> None:
        while not self.stopped:
            at = self.random.randrange(RESOURCES)
            with contextlib.suppress(CrudError):  # another writer was faster
                before = await self.store.get(f"shared-{at}")
                (meta,) = await self.store.commit([change_of(f"shared-{at}", before)])
                self.register.raise_to(at, meta.version)
                self.say("written")
            await asyncio.sleep(self.random.uniform(0, 0.05))

    async def write_once(self) -> None:
        number = 0
        while not self.stopped:
            number += 1
            rid = f"once-{self.number}-{number}"
            (meta,) = await self.store.commit([change_of(rid)])
            self.register.raise_to(self.register.once(self.number, CREATED), number)
            await asyncio.sleep(self.random.uniform(0, 0.1))
            self.register.raise_to(self.register.once(self.number, PURGING), number)
            await self.store.commit([change_of(rid, meta, purge=True)])
            self.register.raise_to(self.register.once(self.number, PURGED), number)
            self.say("purged")
            await asyncio.sleep(self.random.uniform(0, 0.1))

    async def run(self) -> None:
        """Work until the standard input ends."""
        read = self.store._leases.read

        async def counted(resource_id):
            found = await read(resource_id)
            self.hits += isinstance(found, bytes)
            return found

        self.store._leases.read = counted
        tasks = [asyncio.create_task(work()) for work in (self.read, self.read, self.write_shared, self.write_once)]
        waits = asyncio.create_task(asyncio.to_thread(sys.stdin.read))
        await asyncio.wait([waits, *tasks], return_when=asyncio.FIRST_COMPLETED)
        self.stopped = True
        await asyncio.gather(*tasks)
        await self.store.close()
        self.say("ended")


def main() -> None:
    number, redis_url, dsn, name, lease_s, path, broken = json.loads(sys.argv[1])
    store = store_of(redis_url, dsn, name, lease_s, Broken if broken else FastSlowMetaStore)
    asyncio.run(Worker(number, store, Register(Path(path))).run())


if __name__ == "__main__":
    main()
