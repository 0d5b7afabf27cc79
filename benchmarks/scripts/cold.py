"""One cold start: `cold.py WHO KIND MODELS DIRECTORY`. Imports, makes an app with so many models, answers one request through ASGI.

Prints the CPU milliseconds of the process so far, start of Python included. `fastapi` as WHO only imports FastAPI.
"""

from __future__ import annotations

import asyncio
import sys
import time
import warnings
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent.parent))
who, kind, models, directory = sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4]


async def answer(app: Any, path: str) -> int:
    sent: list[Any] = []

    async def receive() -> Any:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": "GET",
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"limit=20",
        "root_path": "",
        "headers": [(b"host", b"localhost")],
        "client": ("127.0.0.1", 1),
        "server": ("127.0.0.1", 2),
    }
    await app(scope, receive, send)
    return int(sent[0]["status"])


def application() -> Any:
    from fastapi import FastAPI
    from msgspec import Struct, defstruct

    fields = [("title", str), ("content", str), ("author", str), ("published", bool, False), ("views", int, 0)]
    structs: list[type[Struct]] = [defstruct(f"Model{number}", fields) for number in range(models)]
    indexed: Any = [("author", str), ("views", int)]
    made: Any
    if who == "crudstack":
        from app.autocrud import AutoCRUD
        from app.autocrud.resource_manager import storage_factory

        made = AutoCRUD(
            storage_factory=storage_factory.MemoryStorageFactory()
            if kind == "memory"
            else storage_factory.DiskStorageFactory(directory)
        )
    else:
        from specstar import SpecStar
        from specstar.resource_manager import storage_factory as theirs

        warnings.simplefilter("ignore")
        made = SpecStar(
            storage_factory=theirs.MemoryStorageFactory() if kind == "memory" else theirs.DiskStorageFactory(directory)
        )
    for struct in structs:
        made.add_model(struct, indexed_fields=indexed)
    app = FastAPI()
    made.apply(app)
    return app


if who == "fastapi":
    import fastapi  # noqa: F401
else:
    status = asyncio.run(answer(application(), "/model0"))
    if status != 200:
        sys.exit(f"{who} answered {status}")
print(time.process_time() * 1e3)
