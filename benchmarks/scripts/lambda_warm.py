"""The cost of the Lambda handler: CPU microseconds of warm calls, with and without it, on a storage without latency.

Prints JSON: row -> [bare, through the handler].
"""

from __future__ import annotations

import asyncio
import io
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent.parent))
OUTPUTS = {"version": 1, "storage": "s3-sqlite", "bucket": "bench", "auth": {"mode": "none"}}
os.environ["CRUDSTACK_OUTPUTS"] = json.dumps(OUTPUTS)
ARTICLE = json.dumps({"title": "Title", "content": "Some content. " * 20, "author": "alice"})


class Context:
    aws_request_id = "1"

    def get_remaining_time_in_millis(self) -> int:
        return 29_000


def cpu(call: Callable[[], Any], times: int) -> float:
    used = time.process_time()
    for _ in range(times):
        call()
    return (time.process_time() - used) / times * 1e6


def main() -> None:
    from app.autocrud.resource_manager.backends.s3.memory_object_store import MemoryObjectStore
    from app.autocrud.resource_manager.storage.stores_by_name import StoresByName

    objects = MemoryObjectStore()
    StoresByName._objects = lambda _: objects

    from app.aws_lambda import fits
    from app.handler import handler
    from app.main import create_app

    loop = asyncio.get_event_loop()
    bare = create_app(idle_work=False, fits=fits)

    def through_handler(method: str, path: str, body: str | None) -> dict[str, Any]:
        url, _, query = path.partition("?")
        http = {"method": method, "path": url, "sourceIp": "127.0.0.1"}
        event = {"version": "2.0", "rawPath": url, "rawQueryString": query, "requestContext": {"http": http}}
        event |= {"headers": {"host": "localhost", "content-type": "application/json"}, "body": body}
        answer: dict[str, Any] = handler(event, Context())
        assert answer["statusCode"] < 300, answer
        return answer

    def directly(method: str, path: str, body: str | None) -> None:
        url, _, query = path.partition("?")
        sent: list[Any] = []

        async def receive() -> Any:
            return {"type": "http.request", "body": (body or "").encode(), "more_body": False}

        async def send(message: Any) -> None:
            sent.append(message)

        scope = {
            "type": "http",
            "method": method,
            "path": url,
            "raw_path": url.encode(),
            "query_string": query.encode(),
        }
        scope |= {"headers": [(b"host", b"localhost"), (b"content-type", b"application/json")], "root_path": ""}
        scope |= {"asgi": {"version": "3.0"}, "http_version": "1.1", "scheme": "http"}
        loop.run_until_complete(bare(scope, receive, send))
        assert sent[0]["status"] < 300, sent

    sys.stdout = io.StringIO()  # the lines of the requests
    path = through_handler("POST", "/article", ARTICLE)["headers"]["location"]
    for _ in range(99):
        through_handler("POST", "/article", ARTICLE)
    rows = {
        "healthz": ("GET", "/healthz", None, 3000),
        "get": ("GET", path, None, 1000),
        "list 20": ("GET", "/article?limit=20", None, 300),
        "create": ("POST", "/article", ARTICLE, 300),
    }
    found = {}
    for name, (method, url, body, times) in rows.items():
        bare_us, handler_us = [], []
        for _ in range(5):
            bare_us.append(cpu(lambda: directly(method, url, body), times))  # noqa: B023 - called at once
            handler_us.append(cpu(lambda: through_handler(method, url, body), times))  # noqa: B023 - called at once
        found[name] = [sorted(bare_us)[2], sorted(handler_us)[2]]
    sys.stdout = sys.__stdout__
    print(json.dumps(found))


main()
