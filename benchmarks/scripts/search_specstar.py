"""Searches in specstar's PostgresMetaStore: `search_specstar.py COUNT`, with the Python of its environment.

`asking` describes the protocol.
"""

from __future__ import annotations

import asyncio
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent.parent))

import psycopg2
from specstar.query_types import ResourceMetaSearchQuery
from specstar.resource_manager.resource_store.simple import MemoryResourceStore

from benchmarks.article import article
from benchmarks.scripts.asking import Row, serve_rows
from benchmarks.scripts.kinds_specstar import BY_VIEWS, EQUALITY, EVERYTHING, LISTED, fill, loaded, manager_of, postgres


def main() -> None:
    bodies, store = MemoryResourceStore(), postgres()
    metas, ids = loaded(bodies, int(sys.argv[1]))
    fill(store, metas)
    manager = manager_of(store, bodies)  # which makes its index for sorting
    numbers = {rid: number for number, rid in enumerate(ids)}
    connection = psycopg2.connect(os.environ["CRUDSTACK_PG_DSN"])
    connection.autocommit = True
    connection.cursor().execute("VACUUM ANALYZE")
    connection.close()

    def found(query: ResourceMetaSearchQuery) -> list[str]:
        return [meta.resource_id for meta in manager.search_resources(query)]

    def authors() -> list[object]:
        articles = [article(numbers[rid]) for rid in found(EQUALITY)]
        return [len(articles), *{one["author"] for one in articles}]

    asyncio.run(
        serve_rows(
            "specstar",
            {
                "list 20": Row(lambda _: found(LISTED), lambda: len(set(found(LISTED)) & numbers.keys())),
                "equality": Row(lambda _: found(EQUALITY), authors),
                "range + sort": Row(
                    lambda _: found(BY_VIEWS), lambda: [article(numbers[rid])["views"] for rid in found(BY_VIEWS)]
                ),
                "count": Row(
                    lambda _: manager.count_resources(EVERYTHING), lambda: manager.count_resources(EVERYTHING)
                ),
            },
        )
    )


main()
