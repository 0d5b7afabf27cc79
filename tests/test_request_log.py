"""The fields of a request's log line that describe caches, and the lines of files.

tests/aws_lambda/test_requests.py checks the rest.
"""

from __future__ import annotations

from fastapi import FastAPI
from msgspec import Struct

from app.autocrud import AutoCRUD
from app.autocrud.resource_manager.backends.s3.memory_object_store import MemoryObjectStore
from app.autocrud.resource_manager.core import SimpleStorage
from app.autocrud.resource_manager.meta_store.simple import MemoryMetaStore
from app.autocrud.resource_manager.resource_store.cache import MemoryCache
from app.autocrud.resource_manager.resource_store.cached_s3 import CachedS3ResourceStore
from app.autocrud.resource_manager.storage_factory import IStorageFactory
from app.request_log import RequestLog
from tests.http.albums import app_of, sent
from tests.http.conftest import client_of


class Note(Struct):
    text: str


class Cached(IStorageFactory):
    def __init__(self) -> None:
        self.cache, self.objects = MemoryCache(max_size=10), MemoryObjectStore()

    def build(self, model_name: str) -> SimpleStorage:
        bodies = CachedS3ResourceStore([self.cache], bucket="b", prefix=f"{model_name}/", object_store=self.objects)
        return SimpleStorage(MemoryMetaStore(), bodies)


async def test_a_line_has_the_hits_and_misses_of_caches():
    storage, lines = Cached(), []
    crud = AutoCRUD(storage_factory=storage)
    crud.add_model(Note)
    app = FastAPI()
    crud.apply(app)
    async with app.router.lifespan_context(app), client_of(RequestLog(app, service="s", write=lines.append)) as api:
        for text in ("1", "2"):
            created = await api.post("/note", json={"text": text})
        await api.get(created.headers["location"])
        await storage.cache.clear()
        await api.get("/note")
        await api.get("/note")
    assert [(line["cache_hits"], line["cache_misses"]) for line in lines] == [(0, 0), (0, 0), (1, 0), (0, 2), (2, 0)]
    metrics = {metric["Name"] for metric in lines[0]["_aws"]["CloudWatchMetrics"][0]["Metrics"]}
    assert {"cache_hits", "cache_misses"} <= metrics


async def test_a_line_of_a_file_names_no_hash_and_no_file():
    lines = []
    app, _ = app_of()
    async with app.router.lifespan_context(app), client_of(RequestLog(app, write=lines.append)) as api:
        ref = await sent(api, b"content", "secret.txt")
        path = (await api.post("/album", json={"title": "x", "cover": ref})).headers["location"]
        await api.get(f"{path}/blobs/{ref['sha256']}")
        await api.get(f"{path}/blobs/{'0' * 64}")
    assert [(line["route"], line["status"]) for line in lines] == [
        ("/album/blobs", 201),
        ("/album", 201),
        ("/album/{id}/blobs/{sha256}", 200),
        ("/album/{id}/blobs/{sha256}", 404),
    ]
    assert "secret" not in str(lines)
    assert ref["sha256"] not in str(lines)
