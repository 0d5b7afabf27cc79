"""Files that go straight to S3 and come straight from it, over HTTP."""

from __future__ import annotations

import asyncio
import hashlib
import os
import uuid
from collections.abc import AsyncIterator
from typing import Any
from urllib.parse import parse_qs, urlsplit

import httpx
import pytest
from fastapi import FastAPI
from msgspec import Struct

from app import aws_lambda
from app.autocrud import AutoCRUD, Blob
from app.autocrud.http import direct_blobs
from app.autocrud.resource_manager.contract.direct import RESERVED
from app.autocrud.resource_manager.model.blob_references import BlobFinder
from app.autocrud.resource_manager.model.codec import Codec
from app.autocrud.resource_manager.storage.direct_s3 import S3DirectTransfer
from app.autocrud.resource_manager.storage_factory import MemoryStorageFactory, PairStorageFactory, S3StorageFactory
from tests.services import BUCKET

BODY = os.urandom(3000)
SHA256 = hashlib.sha256(BODY).hexdigest()
ASKED: dict[str, Any] = {"size": len(BODY), "sha256": SHA256, "content_type": "image/png", "name": "sun.png"}
REFERENCE = {"sha256": SHA256, "size": len(BODY), "content_type": "image/png", "name": "sun.png"}


class Album(Struct):
    title: str
    cover: Blob | None = None


def client_of(crud: AutoCRUD) -> httpx.AsyncClient:
    app = FastAPI()
    crud.apply(app)
    return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test")


@pytest.fixture(params=["ministack", "seaweed"])
async def crud(request: pytest.FixtureRequest) -> AsyncIterator[AutoCRUD]:
    objects = request.getfixturevalue(f"{request.param}_s3").object_store()
    factory = S3StorageFactory(BUCKET, prefix=f"{uuid.uuid4().hex}/", object_store=objects, sync_interval=None)
    crud = AutoCRUD(storage_factory=factory)
    crud.add_model(Album)
    yield crud
    await crud.close()


@pytest.fixture
async def client(crud: AutoCRUD) -> AsyncIterator[httpx.AsyncClient]:
    async with client_of(crud) as client:
        yield client


async def send(upload: dict[str, Any], body: bytes = BODY) -> int:
    async with httpx.AsyncClient() as s3:
        return (await s3.request(upload["method"], upload["url"], content=body, headers=upload["headers"])).status_code


async def uploaded(client: httpx.AsyncClient) -> dict[str, Any]:
    begun = await client.post("/album/blobs/uploads", json=ASKED)
    assert begun.status_code == 201, begun.text
    upload = begun.json()
    assert begun.headers["location"] == f"/album/blobs/uploads/{upload['id']}"
    assert begun.headers["cache-control"] == "no-store"
    assert await send(upload) == 200
    return upload


async def test_a_file_goes_to_s3_and_comes_from_it(client):
    upload = await uploaded(client)
    status = await client.get(f"/album/blobs/uploads/{upload['id']}")
    assert status.json() == {"status": "open"}
    completed = await client.post(upload["complete"])
    assert (completed.status_code, completed.json()) == (200, REFERENCE)
    assert (await client.post(upload["complete"])).json() == REFERENCE
    status = await client.get(f"/album/blobs/uploads/{upload['id']}")
    assert status.json() == {"status": "complete", "blob": REFERENCE}
    created = await client.post("/album", json={"title": "Sun", "cover": completed.json()})
    assert created.status_code == 201, created.text
    path = f"{created.headers['location']}/blobs/{SHA256}"
    answer = await client.get(path)
    assert (answer.status_code, answer.headers["cache-control"]) == (303, "no-store")
    query = parse_qs(urlsplit(answer.headers["location"]).query)
    assert query["response-content-type"] == ["image/png"]
    assert query["response-content-disposition"][0].startswith("inline")
    async with httpx.AsyncClient() as s3:
        file = await s3.get(answer.headers["location"], headers={"range": "bytes=10-19"})
    assert (file.status_code, file.content) == (206, BODY[10:20])
    assert file.headers["content-type"] == "image/png"


async def test_how_a_download_is_answered(client):
    upload = await uploaded(client)
    cover = (await client.post(upload["complete"])).json()
    # The reference may have another type than the upload: it is that of the resource.
    cover["content_type"] = "text/html"
    created = await client.post("/album", json={"title": "Sun", "cover": cover})
    path = f"{created.headers['location']}/blobs/{SHA256}"
    url = await client.get(path, params={"redirect": "url"})
    assert (url.status_code, set(url.json()), url.headers["cache-control"]) == (200, {"url", "expires"}, "no-store")
    query = parse_qs(urlsplit(url.json()["url"]).query)
    assert query["response-content-type"] == ["application/octet-stream"]
    assert query["response-content-disposition"][0].startswith("attachment")
    bytes_ = await client.get(path, params={"redirect": "false"})
    assert (bytes_.status_code, bytes_.content) == (200, BODY)
    head = await client.head(path)
    assert (head.status_code, head.headers["content-length"]) == (200, str(len(BODY)))
    unchanged = await client.get(path, headers={"if-none-match": f'"{SHA256}"'})
    assert unchanged.status_code == 304
    wrong = await client.get(path, params={"redirect": "yes"})
    assert (wrong.status_code, wrong.json()["type"]) == (400, "urn:crudstack:invalid-query")


async def test_a_stored_reference_with_a_wrong_size_name_and_type(client, monkeypatch):
    """An import of an earlier program has stored it."""
    cover = (await client.post((await uploaded(client))["complete"])).json()
    wrong = {"size": 5, "name": "../../x", "content_type": "image/png; " + "a" * 20_000}
    monkeypatch.setattr(Codec, "with_sizes", lambda _, model_data, __: model_data)
    monkeypatch.setattr(BlobFinder, "check", lambda *_: None)
    created = await client.post("/album", json={"title": "Sun", "cover": cover | wrong})
    assert created.json()["data"]["cover"] == cover | wrong
    path = f"{created.headers['location']}/blobs/{SHA256}"
    answer = await client.get(path)
    query = parse_qs(urlsplit(answer.headers["location"]).query)
    assert query["response-content-type"] == ["application/octet-stream"]
    assert query["response-content-disposition"] == ['attachment; filename="x"']
    async with httpx.AsyncClient() as s3:
        assert (await s3.get(answer.headers["location"])).content == BODY
    assert (await client.get(path, params={"redirect": "false"})).content == BODY
    assert (await client.head(path)).headers["content-length"] == str(len(BODY))


async def test_wrong_content_and_a_second_use_of_the_url(client):
    begun = (await client.post("/album/blobs/uploads", json=ASKED)).json()
    early = await client.post(begun["complete"])
    assert (early.status_code, early.json()["type"]) == (409, "urn:crudstack:upload-incomplete")
    assert await send(begun, b"evil".ljust(len(BODY))) in (400, 403)
    assert (await client.post(begun["complete"])).status_code == 409
    assert await send(begun) == 200
    assert (await client.post(begun["complete"])).status_code == 200
    await send(begun)
    created = await client.post("/album", json={"title": "Sun", "cover": REFERENCE})
    path = f"{created.headers['location']}/blobs/{SHA256}?redirect=false"
    assert (await client.get(path)).content == BODY


@pytest.mark.parametrize(
    ("change", "type_"),
    [
        ({"size": -1}, "invalid-data"),
        ({"size": "1"}, "invalid-data"),
        ({"size": 6 * 1024**3}, "blob-too-large"),
        ({"sha256": "x"}, "invalid-data"),
        ({"name": "../x"}, "invalid-data"),
        ({"content_type": "no type"}, "invalid-data"),
        ({"more": 1}, "invalid-data"),
    ],
)
async def test_a_wrong_announcement_is_refused(client, change, type_):
    answer = await client.post("/album/blobs/uploads", json=ASKED | change)
    status = 413 if type_ == "blob-too-large" else 422
    assert (answer.json()["type"], answer.status_code) == (f"urn:crudstack:{type_}", status)


async def test_unknown_uploads(client):
    for path in ("0" * 20, "x", "%2e%2e"):
        assert (await client.post(f"/album/blobs/uploads/{path}/complete")).status_code == 404
        assert (await client.get(f"/album/blobs/uploads/{path}")).status_code == 404


async def test_a_reserved_hash_is_no_file(client):
    await client.post("/album/blobs/uploads", json=ASKED)
    answer = await client.post("/album", json={"title": "Sun", "cover": {"sha256": "0" * 64}})
    assert (answer.status_code, answer.json()["type"]) == (422, "urn:crudstack:blob-gone")


@pytest.mark.parametrize("meta", ["postgres", "redis", "redis-postgres"])
async def test_metadata_that_is_not_on_s3(meta, seaweed_s3, request: pytest.FixtureRequest):
    """The rows of uploads are beside the metadata, so the quota and the reserved hash mean the same in every kind."""
    urls = {}
    if "postgres" in meta:
        urls["pg_dsn"] = request.getfixturevalue("postgres")
    if "redis" in meta:
        urls["redis_url"] = request.getfixturevalue("valkey")
    factory = PairStorageFactory(
        meta, "s3", prefix=f"{uuid.uuid4().hex}/", bucket=BUCKET, object_store=seaweed_s3.object_store(), **urls
    )
    crud = AutoCRUD(storage_factory=factory, blob_quota=2 * len(BODY) - 1)
    crud.add_model(Album)
    async with client_of(crud) as client:
        upload = await uploaded(client)
        more = await client.post("/album/blobs/uploads", json=ASKED)
        assert (more.status_code, more.json()["type"]) == (413, "urn:crudstack:blob-quota-exceeded")
        assert (await client.post("/album/blobs", content=BODY)).status_code == 413
        reserved = await client.post("/album", json={"title": "Sun", "cover": {"sha256": RESERVED}})
        assert (reserved.status_code, reserved.json()["type"]) == (422, "urn:crudstack:blob-gone")
        completed = await client.post(upload["complete"])
        assert (completed.status_code, completed.json()) == (200, REFERENCE)
        created = await client.post("/album", json={"title": "Sun", "cover": REFERENCE})
        assert created.status_code == 201, created.text
        answer = await client.get(f"{created.headers['location']}/blobs/{SHA256}")
        assert httpx.get(answer.headers["location"]).content == BODY
    await crud.close()


async def test_a_long_completion_is_answered_202_and_goes_on(client, monkeypatch):
    monkeypatch.setattr(direct_blobs, "WAIT_S", 0.05)
    released, complete = asyncio.Event(), S3DirectTransfer.complete

    async def slow(self: S3DirectTransfer, upload: str, caller: str) -> Any:
        await released.wait()
        return await complete(self, upload, caller)

    monkeypatch.setattr(S3DirectTransfer, "complete", slow)
    upload = await uploaded(client)
    answer = await client.post(upload["complete"])
    assert (answer.status_code, answer.headers["location"]) == (202, f"/album/blobs/uploads/{upload['id']}")
    assert (await client.get(answer.headers["location"])).json() == {"status": "processing"}
    released.set()
    for _ in range(200):
        status = (await client.get(answer.headers["location"])).json()
        if status["status"] != "processing":
            break
        await asyncio.sleep(0.05)
    assert status == {"status": "complete", "blob": REFERENCE}


async def test_files_too_large_for_one_answer(crud, client):
    upload = await uploaded(client)
    cover = (await client.post(upload["complete"])).json()
    created = await client.post("/album", json={"title": "Sun", "cover": cover})
    path = f"{created.headers['location']}/blobs/{SHA256}"
    small = AutoCRUD(storage_factory=crud.storage_factory, fits=lambda body: len(body) < 2000)
    small.add_model(Album)
    async with client_of(small) as limited:
        answer = await limited.get(path, params={"redirect": "false"})
        part = await limited.get(path, params={"redirect": "false"}, headers={"range": "bytes=0-99"})
        assert (await limited.get(path)).status_code == 303
    await small.close()
    assert (answer.status_code, answer.json()["type"]) == (413, "urn:crudstack:file-too-large-to-send")
    assert (part.status_code, part.content) == (206, BODY[:100])


def test_lambda_sends_files_of_4_mb():
    direct_blobs.check_sendable(4 * 1024**2, aws_lambda.fits)
    for size in (5 * 1024**2, 5 * 1024**3):
        with pytest.raises(direct_blobs.FileTooLargeToSend, match=str(size)):
            direct_blobs.check_sendable(size, aws_lambda.fits)


async def test_files_that_are_not_on_s3_have_no_urls():
    crud = AutoCRUD(storage_factory=MemoryStorageFactory())
    crud.add_model(Album)
    async with client_of(crud) as client:
        answer = await client.post("/album/blobs/uploads", json=ASKED)
        assert answer.status_code == 404
        assert "POST /album/blobs" in answer.json()["detail"]
        cover = (await client.post("/album/blobs", content=BODY)).json()
        created = await client.post("/album", json={"title": "Sun", "cover": cover})
        path = f"{created.headers['location']}/blobs/{SHA256}"
        assert (await client.get(path)).content == BODY
        assert (await client.get(path, params={"redirect": "url"})).status_code == 400
