"""specstar's engine without HTTP, run by the Python of its own environment. `... KIND DIRECTORY`."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent.parent))

from specstar.query_types import (
    DataSearchCondition,
    DataSearchOperator,
    ResourceDataSearchSort,
    ResourceMetaSearchQuery,
    ResourceMetaSortDirection,
)

from benchmarks.article import AUTHOR, COUNT, VIEWS, article
from benchmarks.scripts.specstar_server import Article, specstar

manager = specstar(sys.argv[1], sys.argv[2]).get_resource_manager(Article)
ids = [manager.create(Article(**article(number))).resource_id for number in range(COUNT)]
fresh = iter(range(COUNT, 10 * COUNT))


def condition(name: str, operator: DataSearchOperator, value: object) -> list[DataSearchCondition]:
    return [DataSearchCondition(field_path=name, operator=operator, value=value)]


equality = ResourceMetaSearchQuery(
    conditions=condition("author", DataSearchOperator.equals, AUTHOR), limit=20, is_deleted=False
)
by_views = ResourceMetaSearchQuery(
    conditions=condition("views", DataSearchOperator.greater_than_or_equal, VIEWS),
    sorts=[ResourceDataSearchSort(direction=ResourceMetaSortDirection.descending, field_path="views")],
    limit=20,
    is_deleted=False,
)
everything = ResourceMetaSearchQuery(is_deleted=False)
rows: dict[str, tuple[Callable[[int], object], int]] = {
    "get": (lambda at: manager.get(ids[at]), 500),
    "list 20": (lambda _: manager.list_resources(ResourceMetaSearchQuery(limit=20, is_deleted=False)), 5),
    "equality": (lambda _: manager.list_resources(equality), 5),
    "range + sort": (lambda _: manager.list_resources(by_views), 5),
    "count": (lambda _: manager.count_resources(everything), 5),
    "create": (lambda _: manager.create(Article(**article(next(fresh)))), 300),
    "update": (lambda at: manager.update(ids[at], Article(**article(next(fresh)))), 300),
}
answer = {}
for name, (call, times) in rows.items():
    call(0)
    start = time.process_time()
    for at in range(times):
        call(at)
    answer[name] = (time.process_time() - start) / times * 1e6
print(json.dumps(answer))
