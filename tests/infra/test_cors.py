"""Pages of the origins in `cors` may send all headers that the API and the bucket understand."""

from __future__ import annotations

from fastapi import FastAPI

from app.autocrud import AutoCRUD
from app.autocrud.resource_manager.backends.s3.memory_object_store import MemoryObjectStore
from app.autocrud.resource_manager.contract.direct import Announced
from app.autocrud.resource_manager.storage_factory import S3StorageFactory
from app.settings import EXPOSED_HEADERS
from infra.components.bucket import DOWNLOAD_HEADERS, UPLOAD_HEADERS
from infra.components.http_api import cors
from tests.http import albums


def with_files() -> tuple[FastAPI, AutoCRUD]:
    factory = S3StorageFactory("bucket", object_store=MemoryObjectStore(), sync_interval=None)
    return albums.app_of(storage_factory=factory)


def test_pages_may_send_and_read_the_headers_of_the_openapi_document():
    operations = [operation for item in with_files()[0].openapi()["paths"].values() for operation in item.values()]
    sent = {
        parameter["name"].lower()
        for operation in operations
        for parameter in operation.get("parameters", [])
        if parameter["in"] == "header"
    }
    assert {"content-disposition", "range", "if-match"} <= sent
    assert sent <= set(cors(["https://app.example"])["allow_headers"])
    read = {
        name.lower()
        for operation in operations
        for answer in operation["responses"].values()
        for name in answer.get("headers", {})
    }
    assert {"content-range", "location", "etag"} <= read
    assert read <= set(EXPOSED_HEADERS)


async def test_pages_may_send_the_headers_of_an_upload_to_the_bucket():
    _, crud = with_files()
    manager = crud.resource_manager(albums.Album)
    await manager.open()
    announced = Announced(size=1, sha256=albums.sha256_of(b"x"), content_type="image/png", name="x.png")
    upload = await manager.storage.direct.begin("ann", announced)
    assert set(upload.headers) <= set(UPLOAD_HEADERS)
    assert "content-range" in DOWNLOAD_HEADERS
    await crud.close()
