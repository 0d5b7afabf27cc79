"""Searches in our PostgresMetaStore with 100,000 rows: `python -m benchmarks.scripts.search_ours COUNT`.

`asking` describes the protocol.

What is found is metadata, decoded; the bodies stay in memory and are not read.
"""

from __future__ import annotations

import asyncio
import os
import sys

import psycopg

from app.autocrud import AutoCRUD, Query
from app.autocrud.resource_manager.basic import ResourceMeta
from app.autocrud.resource_manager.core import SimpleStorage
from app.autocrud.resource_manager.meta_store.postgres import PostgresMetaStore
from app.autocrud.resource_manager.resource_store.simple import MemoryResourceStore
from app.autocrud.resource_manager.storage_factory import IStorageFactory
from benchmarks.article import article
from benchmarks.scripts.asking import Row, serve_rows
from benchmarks.scripts.kinds_ours import BY_VIEWS, EQUALITY, LISTED, load
from benchmarks.scripts.ours import Article


class PostgresOnly(IStorageFactory):
    def build(self, model_name: str) -> SimpleStorage:
        return SimpleStorage(PostgresMetaStore(os.environ["CRUDSTACK_PG_DSN"]), MemoryResourceStore())


async def main() -> None:
    count = int(sys.argv[1])
    crud = AutoCRUD(storage_factory=PostgresOnly())
    manager = crud.add_model(Article, indexed_fields=["author", "views"])
    numbers = {rid: number for number, rid in enumerate(await load(manager, count))}
    with psycopg.connect(os.environ["CRUDSTACK_PG_DSN"], autocommit=True) as connection:
        connection.execute("VACUUM ANALYZE")

    async def found(query: Query) -> list[ResourceMeta]:
        return [hit.meta for hit in (await manager.find(query)).items]

    async def authors() -> list[object]:
        articles = [article(numbers[meta.resource_id]) for meta in await found(EQUALITY)]
        return [len(articles), *{one["author"] for one in articles}]

    async def views() -> list[object]:
        return [article(numbers[meta.resource_id])["views"] for meta in await found(BY_VIEWS)]

    async def listed() -> int:
        return len({meta.resource_id for meta in await found(LISTED)} & numbers.keys())

    await serve_rows(
        "crudstack",
        {
            "list 20": Row(lambda _: found(LISTED), listed),
            "equality": Row(lambda _: found(EQUALITY), authors),
            "range + sort": Row(lambda _: found(BY_VIEWS), views),
            "count": Row(lambda _: manager.count(), manager.count),
        },
    )
    await crud.close()


asyncio.run(main())
