"""One cold start: `cold.py WHO KIND MODELS PLACE BEGAN`. Creates an app with MODELS models and answers one request.

Prints the milliseconds of CPU of the process so far and those that have passed since BEGAN (seconds since 1970), start
of Python included.

WHO    crudstack, handler (the Lambda entry point, and an event), boto3 (crudstack with boto3 as its port to S3),
       specstar, fastapi (only the import)
PLACE  a directory, or the URL of an S3 with the bucket `bench`
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
import warnings
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent.parent))
who, kind, models, place, began = sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4], float(sys.argv[5])
INDEXED: Any = [("author", str), ("views", int)]


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


def structs() -> list[Any]:
    from msgspec import defstruct

    fields = [("title", str), ("content", str), ("author", str), ("published", bool, False), ("views", int, 0)]
    return [defstruct(f"Model{number}", fields) for number in range(models)]


def our_factory() -> Any:
    from app.autocrud.resource_manager import storage_factory

    if kind == "memory":
        return storage_factory.MemoryStorageFactory()
    if kind == "disk":
        return storage_factory.DiskStorageFactory(place)
    objects = None
    if who == "boto3":
        from benchmarks.scripts.boto3_store import Boto3ObjectStore

        objects = Boto3ObjectStore("bench", place)
    return storage_factory.S3StorageFactory("bench", place, "local", "local", prefix=f"{models}/", object_store=objects)


def application() -> Any:
    from fastapi import FastAPI

    made: Any
    if who == "specstar":
        from specstar import SpecStar
        from specstar.resource_manager import storage_factory as theirs

        warnings.simplefilter("ignore")
        factory: Any = theirs.MemoryStorageFactory()
        if kind == "s3-sqlite":
            factory = theirs.S3StorageFactory(
                bucket="bench",
                endpoint_url=place,
                access_key_id="local",
                secret_access_key="local",  # noqa: S106 - ministack checks none
            )
        elif kind == "disk":
            factory = theirs.DiskStorageFactory(place)
        made = SpecStar(storage_factory=factory)
    else:
        from app.autocrud import AutoCRUD

        made = AutoCRUD(storage_factory=our_factory())
    for struct in structs():
        made.add_model(struct, indexed_fields=INDEXED)
    app = FastAPI()
    made.apply(app)
    return app


def through_the_handler() -> int:
    """As Lambda does it: the module is imported, then comes an event."""
    outputs = {
        "version": 1,
        "storage": "s3-sqlite",
        "bucket": "bench",
        "prefix": f"{models}/",
        "auth": {"mode": "none"},
    }
    keys = {"AWS_ACCESS_KEY_ID": "local", "AWS_SECRET_ACCESS_KEY": "local", "AWS_ENDPOINT_URL_S3": place}
    os.environ.update({"CRUDSTACK_OUTPUTS": json.dumps(outputs), **keys})
    from app import models as registered

    def register(crud: Any) -> None:
        for struct in structs():
            crud.add_model(struct, indexed_fields=INDEXED)

    registered.register = register
    from app.handler import handler

    class Context:
        aws_request_id = "1"

        def get_remaining_time_in_millis(self) -> int:
            return 29_000

    http = {"method": "GET", "path": "/model0", "sourceIp": "127.0.0.1"}
    event = {
        "version": "2.0",
        "rawPath": "/model0",
        "rawQueryString": "limit=20",
        "requestContext": {"http": http},
        "headers": {},
    }
    sys.stdout = sys.stderr  # the line of the request
    status = int(handler(event, Context())["statusCode"])
    sys.stdout = sys.__stdout__
    return status


if who == "fastapi":
    import fastapi  # noqa: F401
else:
    status = through_the_handler() if who == "handler" else asyncio.run(answer(application(), "/model0"))
    if status != 200:
        sys.exit(f"{who} answered {status}")
print(json.dumps([time.process_time() * 1e3, (time.time() - began) * 1e3]))
sys.stdout.flush()
os._exit(0)
