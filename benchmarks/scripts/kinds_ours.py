"""Our engine without HTTP on any kind, with the settings of the environment: `python -m benchmarks.scripts.kinds_ours`.

`asking` describes the protocol.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Mapping
from typing import cast

import msgspec

from app import settings, wiring
from app.autocrud import AutoCRUD, Query, field
from app.autocrud.resource_manager.core import Resource, ResourceManager
from app.autocrud.resource_manager.engine.operations import Create
from benchmarks.article import AUTHOR, COUNT, HOT, VIEWS, article, changed, fresh
from benchmarks.scripts.asking import Row, serve_rows
from benchmarks.scripts.ours import Article

BATCH, AT_ONCE = 100, 4

LISTED = Query(limit=20)
EQUALITY = Query(where=field("author").eq(AUTHOR), limit=20)
BY_VIEWS = Query(where=field("views").gte(VIEWS), sort=("-views",), limit=20)


def made_of(fields: Mapping[str, object]) -> Article:
    return msgspec.convert(fields, Article)


async def load(manager: ResourceManager[Article], count: int) -> list[str]:
    """The ids of the articles, in their order."""
    turns = asyncio.Semaphore(AT_ONCE)

    async def some(first: int) -> list[str]:
        async with turns:
            made = await manager.batch([Create(made_of(article(number))) for number in range(first, first + BATCH)])
        return [cast(Resource[Article], one).meta.resource_id for one in made]

    return list(itertools.chain.from_iterable(await asyncio.gather(*map(some, range(0, count, BATCH)))))


def rows(manager: ResourceManager[Article], ids: list[str]) -> dict[str, Row]:
    numbers = itertools.count(COUNT)
    created: list[str] = []

    async def get(at: int) -> Article:
        return (await manager.get(ids[at % HOT])).data

    async def found(query: Query) -> list[Article]:
        return [one.data for one in (await manager.search(query)).items]

    async def create(_: int) -> None:
        created.append((await manager.create(made_of(fresh(next(numbers))))).meta.resource_id)

    async def update(at: int) -> None:
        number = HOT + at % (COUNT - HOT)
        await manager.update(ids[number], made_of(changed(number, next(numbers))))

    async def titles() -> int:
        return len({one.title for one in await found(LISTED)})

    async def equality() -> list[object]:
        articles = await found(EQUALITY)
        return [len(articles), *{one.author for one in articles}]

    async def views() -> list[int]:
        return [one.views for one in await found(BY_VIEWS)]

    async def count() -> int:
        return await manager.count() - len(created)

    async def created_one() -> bool:
        await create(0)
        return (await manager.get(created[-1])).data.views == -1

    async def updated_one() -> bool:
        await update(0)
        return (await manager.get(ids[HOT])).data.title not in ("", f"Title {HOT}")

    async def first_title() -> str:
        return (await get(0)).title

    return {
        "get": Row(get, first_title),
        "list 20": Row(lambda _: found(LISTED), titles),
        "equality": Row(lambda _: found(EQUALITY), equality),
        "range + sort": Row(lambda _: found(BY_VIEWS), views),
        "count": Row(lambda _: manager.count(), count),
        "create": Row(create, created_one),
        "update": Row(update, updated_one),
    }


async def main() -> None:
    crud = AutoCRUD(storage_factory=wiring.storage_factory(settings.load()))
    manager = crud.add_model(Article, indexed_fields=["author", "views"])
    ids = await load(manager, COUNT)
    for rid in ids[:HOT]:  # into the caches, where there are some
        await manager.get(rid)
    await serve_rows("crudstack", rows(manager, ids))
    await crud.close()


if __name__ == "__main__":
    asyncio.run(main())
