"""The same with specstar's S3StorageFactory, run by the Python of its own environment."""

from __future__ import annotations

import json
import sys
import time
import warnings
from concurrent.futures import ThreadPoolExecutor

from msgspec import Struct
from specstar import SpecStar
from specstar.resource_manager.basic import Encoding
from specstar.resource_manager.storage_factory import S3StorageFactory

warnings.simplefilter("ignore")


class Article(Struct):
    title: str
    content: str
    author: str
    published: bool = False
    views: int = 0


factory = S3StorageFactory(
    bucket=sys.argv[2],
    endpoint_url=sys.argv[1],
    access_key_id="local",
    secret_access_key="local",  # noqa: S106 - ministack checks none
)
made = SpecStar(storage_factory=factory, encoding=Encoding.json)
made.add_model(Article, indexed_fields=[("author", str), ("views", int)])
manager = made.get_resource_manager(Article)
manager.create(Article("first", "", "a"))
found: dict[str, list[float] | str] = {}
for name, writers in (("one writer", 1), ("eight writers", 8)):
    times = 200
    began, used = time.perf_counter(), time.process_time()

    def write(number: int) -> None:
        manager.create(Article(f"Title {number}", "Some content. " * 20, "a", views=number))

    try:
        with ThreadPoolExecutor(writers) as pool:
            list(pool.map(write, range(times)))
    except Exception as error:  # its store is not made for threads
        found[name] = f"fails: {type(error).__name__}"
        continue
    found[name] = [times / (time.perf_counter() - began), (time.process_time() - used) / times * 1e6]
print(json.dumps(found))
