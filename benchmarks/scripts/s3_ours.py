"""Creates on a real S3, one at a time and eight at once: `s3_ours.py URL BUCKET`.

Prints creates per second and CPU microseconds of each as JSON.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from pathlib import Path

from msgspec import Struct

sys.path.insert(0, str(Path(__file__).parent.parent.parent))

from app.autocrud import AutoCRUD
from app.autocrud.resource_manager.storage_factory import S3StorageFactory


class Article(Struct):
    title: str
    content: str
    author: str
    published: bool = False
    views: int = 0


async def main() -> None:
    factory = S3StorageFactory(sys.argv[2], sys.argv[1], "local", "local", prefix="ours/")
    manager = AutoCRUD(storage_factory=factory).add_model(Article, indexed_fields=["author", "views"])
    await manager.create(Article("first", "", "a"))
    found = {}
    for name, writers in (("one writer", 1), ("eight writers", 8)):
        times = 200
        began, used = time.perf_counter(), time.process_time()

        async def write(writers: int = writers, times: int = times) -> None:
            for number in range(times // writers):
                await manager.create(Article(f"Title {number}", "Some content. " * 20, "a", views=number))

        await asyncio.gather(*(write() for _ in range(writers)))
        found[name] = [times / (time.perf_counter() - began), (time.process_time() - used) / times * 1e6]
    print(json.dumps(found))
    await manager.storage.close()


asyncio.run(main())
