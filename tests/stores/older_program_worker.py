"""A program of an earlier commit that uses a store beside this one. `older_program` starts it and talks to it.

Runs with the `app` of the earlier commit, so it uses only what that commit has. Reads a JSON list from each line of its
standard input: a command and its arguments. Answers with a JSON object: `ok`, or `error` and `detail`.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import sys
from typing import Any

from app.autocrud.errors import CrudError
from app.autocrud.query import Query
from app.autocrud.resource_manager.basic import IStorage, MetaStore
from app.autocrud.resource_manager.core import SimpleStorage
from app.autocrud.resource_manager.meta_store.fast_slow import FastSlowMetaStore
from app.autocrud.resource_manager.meta_store.postgres import PostgresMetaStore
from app.autocrud.resource_manager.meta_store.redis import RedisMetaStore
from app.autocrud.resource_manager.resource_store.simple import DiskResourceStore
from app.autocrud.resource_manager.storage_factory import (
    DiskStorageFactory,
    IStorageFactory,
    MemoryDiskStorageFactory,
    S3StorageFactory,
)
from app.autocrud.testing.model import Item, manage


class OnServers(IStorageFactory):
    """Metadata in PostgreSQL, in Redis or, if both are given, in both; bodies on disk."""

    def __init__(self, bodies: str, *, dsn: str = "", table: str = "", url: str = "", prefix: str = "") -> None:
        self.bodies, self.dsn, self.table, self.url, self.prefix = bodies, dsn, table, url, prefix

    def build(self, model_name: str) -> IStorage:
        store: MetaStore
        if not self.dsn:
            store = RedisMetaStore(self.url, prefix=self.prefix)
        else:
            store = PostgresMetaStore(self.dsn, table_name=self.table)
            if self.url:
                store = FastSlowMetaStore(RedisMetaStore(self.url, prefix=self.prefix), store, lease_s=0.2)
        return SimpleStorage(store, DiskResourceStore(self.bodies))


FACTORIES: dict[str, Any] = {
    "disk": DiskStorageFactory,
    "memory-disk": MemoryDiskStorageFactory,
    "s3-sqlite": S3StorageFactory,
    "servers": OnServers,
}


class Program:
    def __init__(self, factory: IStorageFactory) -> None:
        self.manager = manage(factory)
        self.writing: asyncio.Task[None] | None = None
        self.acknowledged: list[str] = []
        self.failure = ""

    async def run(self, command: str, *arguments: Any) -> Any:
        manager = self.manager
        match command, arguments:
            case "open" | "close", ():
                await getattr(manager, command)()
            case "create", (rid, text):
                await manager.create(Item(text=text), resource_id=rid, status="draft")
            case "update" | "modify", (rid, text):
                await getattr(manager, command)(rid, Item(text=text))
            case "publish" | "delete" | "purge", (rid,):
                await getattr(manager, command)(rid)
            case "switch", (rid, revision):
                await manager.switch(rid, revision)
            case "texts", ():
                page = await manager.search(Query(include_deleted=True))
                return {hit.meta.resource_id: hit.data.text for hit in page.items}
            case "maintain", (seconds,):
                await manager.maintain(seconds)
            case "start writing", ():
                self.writing = asyncio.create_task(self.write())
            case "refused", ():
                assert self.writing is not None
                await asyncio.wait_for(self.writing, 60)
                return self.acknowledged, self.failure
            case _:
                raise ValueError(command)
        return None

    async def write(self) -> None:
        """Create resources until a write is refused."""
        for number in itertools.count():
            rid = f"old-{number:05}"
            try:
                await self.manager.create(Item(text=rid), resource_id=rid)
            except CrudError as error:
                self.failure = f"{type(error).__name__}: {error}"
                return
            self.acknowledged.append(rid)


async def main(kind: str, arguments: list[Any], named: dict[str, Any]) -> None:
    program = Program(FACTORIES[kind](*arguments, **named))
    loop = asyncio.get_running_loop()
    while line := await loop.run_in_executor(None, sys.stdin.readline):
        try:
            answer: dict[str, Any] = {"ok": await program.run(*json.loads(line))}
        except CrudError as error:
            answer = {"error": type(error).__name__, "detail": str(error)}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    asyncio.run(main(*json.loads(sys.argv[1])))
