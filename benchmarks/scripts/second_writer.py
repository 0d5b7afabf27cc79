"""Another process that writes to our disk store while it is measured: proof that no answer comes from a cache.

Every line on stdin creates an article and answers with its id.
"""

from __future__ import annotations

import asyncio
import sys

from benchmarks.scripts.ours import Article, crud


async def main() -> None:
    manager = crud("disk", sys.argv[1]).resource_manager(Article)
    for line in sys.stdin:
        created = await manager.create(Article(line.strip(), "by another process", "second"))
        print(created.meta.resource_id, flush=True)
    await manager.close()


if __name__ == "__main__":
    asyncio.run(main())
