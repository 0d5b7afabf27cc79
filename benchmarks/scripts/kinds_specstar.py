"""specstar's engine on its equivalents of our kinds: `kinds_specstar.py SHARED`, with the Python of its environment.

`asking` describes the protocol.

SHARED is a directory for the metadata of the bodies that lie on S3: three writes each take minutes, so they are made
once, by the first that needs them.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import pickle
import sys
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, Any

sys.path.insert(0, str(Path(__file__).parent.parent.parent))

from msgspec import Struct
from specstar import SortIndex, SpecStar
from specstar.query_types import (
    DataSearchCondition,
    DataSearchOperator,
    ResourceDataSearchSort,
    ResourceMetaSearchQuery,
    ResourceMetaSortDirection,
)
from specstar.resource_manager.basic import Encoding
from specstar.resource_manager.core import SimpleStorage
from specstar.resource_manager.meta_store.fast_slow import FastSlowMetaStore
from specstar.resource_manager.meta_store.postgres import PostgresMetaStore
from specstar.resource_manager.meta_store.redis import RedisMetaStore
from specstar.resource_manager.meta_store.simple import DiskMetaStore, MemoryMetaStore
from specstar.resource_manager.meta_store.sqlite3 import S3SqliteMetaStore
from specstar.resource_manager.resource_store.cache import DiskCache, MemoryCache
from specstar.resource_manager.resource_store.cached_s3 import CachedS3ResourceStore
from specstar.resource_manager.resource_store.s3 import S3ResourceStore
from specstar.resource_manager.resource_store.simple import DiskResourceStore, MemoryResourceStore

from benchmarks.article import AUTHOR, COUNT, HOT, VIEWS, article, changed, fresh
from benchmarks.scripts.asking import Row, serve_rows

warnings.simplefilter("ignore")

GIVEN = os.environ
CHANGED = {"s3-sqlite": 1000, "postgres-s3": 4000, "cached-s3": 7000}
"""Where updates begin: those on shared bodies leave each other's alone."""


class Article(Struct):
    title: str
    content: str
    author: str
    published: bool = False
    views: Annotated[int, SortIndex()] = 0  # the best that its PostgreSQL store has for ranges and sorting


class Given:
    """A storage factory of the storage that is given."""

    def __init__(self, storage: SimpleStorage) -> None:
        self.storage = storage

    def build(self, model_name: str) -> SimpleStorage:
        return self.storage

    def build_blob_store(self) -> None:
        return None


def manager_of(meta_store: Any, bodies: Any) -> Any:
    made = SpecStar(storage_factory=Given(SimpleStorage(meta_store, bodies)), encoding=Encoding.json)
    made.add_model(Article, indexed_fields=[("author", str), ("views", int)])
    return made.get_resource_manager(Article)


def postgres() -> PostgresMetaStore:
    return PostgresMetaStore(GIVEN["CRUDSTACK_PG_DSN"], table_name="article_meta")


def on_s3() -> dict[str, Any]:
    keys = {"access_key_id": "local", "secret_access_key": "local", "region_name": "us-east-1"}
    return keys | {"endpoint_url": GIVEN["CRUDSTACK_S3_ENDPOINT_URL"], "bucket": GIVEN["CRUDSTACK_BUCKET"]}


def shared_bodies() -> dict[str, Any]:
    return on_s3() | {"prefix": "specstar/", "encoding": Encoding.json}


def s3_sqlite() -> S3SqliteMetaStore:
    store = S3SqliteMetaStore(key=f"{GIVEN['CRUDSTACK_PREFIX']}meta.db", **on_s3())
    # It uploads the whole database at every write: while loading that would take an hour.
    store.auto_sync = False
    return store


def stores(kind: str) -> tuple[Callable[[], Any], Any]:
    root = Path(GIVEN["CRUDSTACK_DATA_DIR"])
    match kind:
        case "memory":
            return MemoryMetaStore, MemoryResourceStore()
        case "disk":
            return lambda: DiskMetaStore(rootdir=root / "meta"), DiskResourceStore(rootdir=root / "data")
        case "memory-disk":
            return MemoryMetaStore, DiskResourceStore(rootdir=root / "data")
        case "s3-sqlite":
            return s3_sqlite, S3ResourceStore(**shared_bodies())
        case "postgres-s3":
            return postgres, S3ResourceStore(**shared_bodies())
        case "redis-postgres":
            redis = RedisMetaStore(GIVEN["CRUDSTACK_REDIS_URL"], prefix=GIVEN["CRUDSTACK_PREFIX"])
            return lambda: FastSlowMetaStore(redis, postgres()), DiskResourceStore(rootdir=root / "data")
        case "cached-s3":
            caches = [MemoryCache(), DiskCache(str(root / "cache"))]
            return s3_sqlite, CachedS3ResourceStore(caches, **shared_bodies())
    raise ValueError(kind)


def loaded(bodies: Any, count: int) -> tuple[MemoryMetaStore, list[str]]:
    """The metadata of articles whose bodies it puts where they belong, and their ids in order."""
    metas = MemoryMetaStore()
    manager = manager_of(metas, bodies)

    def create(number: int) -> str:
        return str(manager.create(Article(**article(number))).resource_id)  # type: ignore[arg-type]

    with ThreadPoolExecutor(8 if isinstance(bodies, S3ResourceStore) else 1) as pool:
        return metas, list(pool.map(create, range(count)))


def shared(path: Path, bodies: Any) -> tuple[Any, list[str]]:
    if path.exists():
        return pickle.loads(path.read_bytes())  # noqa: S301 - it is our own
    metas, ids = loaded(bodies, COUNT)
    path.write_bytes(pickle.dumps((dict(metas), ids)))
    return metas, ids


def fill(meta_store: Any, metas: Any) -> None:
    """Its own way to save many, where there is one."""
    slow = getattr(meta_store, "_slow_store", meta_store)
    if hasattr(slow, "save_many"):
        slow.save_many(metas.values())
    else:
        for rid, meta in metas.items():
            slow[rid] = meta
    if isinstance(meta_store, S3SqliteMetaStore):
        meta_store.auto_sync = True
        meta_store.sync_to_s3()


def condition(name: str, operator: DataSearchOperator, value: object) -> list[DataSearchCondition]:
    return [DataSearchCondition(field_path=name, operator=operator, value=value)]


LISTED = ResourceMetaSearchQuery(limit=20, is_deleted=False)
EQUALITY = ResourceMetaSearchQuery(
    conditions=condition("author", DataSearchOperator.equals, AUTHOR), limit=20, is_deleted=False
)
BY_VIEWS = ResourceMetaSearchQuery(
    conditions=condition("views", DataSearchOperator.greater_than_or_equal, VIEWS),
    sorts=[ResourceDataSearchSort(direction=ResourceMetaSortDirection.descending, field_path="views")],
    limit=20,
    is_deleted=False,
)
EVERYTHING = ResourceMetaSearchQuery(is_deleted=False)


def rows(manager: Any, ids: list[str], changes: int) -> dict[str, Row]:
    numbers = itertools.count(COUNT)
    created: list[str] = []

    def get(at: int) -> Article:
        return manager.get(ids[at % HOT]).data

    def found(query: ResourceMetaSearchQuery) -> list[Article]:
        return [one.data for one in manager.list_resources(query)]

    def create(_: int) -> None:
        created.append(manager.create(Article(**fresh(next(numbers)))).resource_id)  # type: ignore[arg-type]

    def update(at: int) -> None:
        number = changes + at % 3000
        manager.update(ids[number], Article(**changed(number, next(numbers))))  # type: ignore[arg-type]

    def equality() -> list[object]:
        articles = found(EQUALITY)
        return [len(articles), *{one.author for one in articles}]

    def created_one() -> bool:
        create(0)
        return manager.get(created[-1]).data.views == -1

    def updated_one() -> bool:
        update(0)
        return manager.get(ids[changes]).data.title not in ("", f"Title {changes}")

    return {
        "get": Row(get, lambda: get(0).title),
        "list 20": Row(lambda _: found(LISTED), lambda: len({one.title for one in found(LISTED)})),
        "equality": Row(lambda _: found(EQUALITY), equality),
        "range + sort": Row(lambda _: found(BY_VIEWS), lambda: [one.views for one in found(BY_VIEWS)]),
        "count": Row(
            lambda _: manager.count_resources(EVERYTHING),
            lambda: manager.count_resources(EVERYTHING) - len(created),
        ),
        "create": Row(create, created_one),
        "update": Row(update, updated_one),
    }


def main() -> None:
    kind = GIVEN["CRUDSTACK_STORAGE"]
    made, bodies = stores(kind)
    if isinstance(bodies, S3ResourceStore):
        metas, ids = shared(Path(sys.argv[1]) / "specstar.pickle", bodies)
    else:
        metas, ids = loaded(bodies, COUNT)
    meta_store = made()
    fill(meta_store, metas)
    manager = manager_of(meta_store, bodies)
    for rid in ids[:HOT]:
        manager.get(rid)
    asyncio.run(serve_rows("specstar", rows(manager, ids, CHANGED.get(kind, HOT))))


if __name__ == "__main__":
    main()
