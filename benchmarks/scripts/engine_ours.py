"""Our engine without HTTP: CPU microseconds of each operation at 10,000 articles, as JSON. `... KIND DIRECTORY`."""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import Awaitable, Callable

from app.autocrud import Query, field
from benchmarks.article import AUTHOR, COUNT, VIEWS, article
from benchmarks.scripts.ours import Article, crud


async def main() -> None:
    made = crud(sys.argv[1], sys.argv[2])
    manager = made.resource_manager(Article)
    articles = [Article(**article(number)) for number in range(COUNT)]  # type: ignore[arg-type]
    ids = [(await manager.create(each)).meta.resource_id for each in articles]
    fresh = iter(range(COUNT, 10 * COUNT))

    async def create(_: int) -> object:
        return await manager.create(Article(**article(next(fresh))))  # type: ignore[arg-type]

    async def update(at: int) -> object:
        return await manager.update(ids[at], Article(**article(next(fresh))))  # type: ignore[arg-type]

    async def listed(query: Query) -> list[Article]:
        return [found.data for found in (await manager.search(query)).items]

    rows: dict[str, tuple[Callable[[int], Awaitable[object]], int]] = {
        "get": (lambda at: manager.get(ids[at]), 2000),
        "list 20": (lambda _: listed(Query(limit=20)), 500),
        "equality": (lambda _: listed(Query(where=field("author").eq(AUTHOR), limit=20)), 500),
        "range + sort": (lambda _: listed(Query(where=field("views").gte(VIEWS), sort=("-views",), limit=20)), 500),
        "count": (lambda _: manager.count(), 500),
        "create": (create, 1000),
        "update": (update, 1000),
    }
    answer = {}
    for name, (call, times) in rows.items():
        await call(0)
        start = time.process_time()
        for at in range(times):
            await call(at)
        answer[name] = (time.process_time() - start) / times * 1e6
    await made.close()
    print(json.dumps(answer))


asyncio.run(main())
