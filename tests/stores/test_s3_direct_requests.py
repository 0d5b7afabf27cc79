"""The operations of the object store that direct transfers need, on every object store."""

from __future__ import annotations

import hashlib
import os
import uuid
from base64 import b64encode
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from urllib.parse import parse_qs, urlsplit

import httpx
import pytest

from app.autocrud.errors import ConfigError, StoreUnavailable
from app.autocrud.resource_manager.backends.s3 import signed_requests
from app.autocrud.resource_manager.backends.s3.memory_object_store import DROPPED, MemoryObjectStore
from app.autocrud.resource_manager.backends.s3.object_store import ObjectStore, S3ObjectStore, Signed, s3
from tests.services import BUCKET
from tests.silent_s3 import SILENT, SilentS3

STORES = ["memory", "ministack", "seaweed"]


@pytest.fixture(params=STORES)
def store(request: pytest.FixtureRequest) -> ObjectStore:
    if request.param == "memory":
        return MemoryObjectStore()
    return request.getfixturevalue(f"{request.param}_s3").object_store()


@pytest.fixture
def key() -> str:
    return f"direct/{uuid.uuid4().hex}/file"


async def use(store: ObjectStore, method: str, url: str, body: bytes = b"", headers: Mapping[str, str] = {}) -> int:
    """Send a request by a presigned URL and return the status of the answer."""
    if isinstance(store, MemoryObjectStore):
        return (await store.use(method, url, body, headers)).status
    async with httpx.AsyncClient() as client:
        return (await client.request(method, url, content=body, headers=dict(headers))).status_code


def signed_headers(body: bytes) -> dict[str, str]:
    digest = b64encode(hashlib.sha256(body).digest()).decode()
    return {"content-length": str(len(body)), "x-amz-checksum-sha256": digest}


async def test_head_tells_size_etag_and_date(store, key):
    assert await store.head(key) is None
    assert await store.head(key, checksum=True) is None
    await store.put(key, b"twelve bytes")
    found = await store.head(key)
    assert found is not None
    assert (found.size, found.etag, found.sha256) == (12, (await store.get(key)).etag, None)
    assert abs(datetime.now(UTC) - found.modified) < timedelta(minutes=1)
    again = await store.head(key, checksum=True)
    assert again is not None
    assert (again.size, again.etag, again.modified) == (12, found.etag, found.modified)


async def test_an_upload_by_a_presigned_url_has_the_signed_length_and_checksum(store, key):
    body = os.urandom(1000)
    headers = signed_headers(body)
    url = await store.presign(key, "PUT", 60, Signed(headers=headers))
    assert await use(store, "PUT", url, body, headers) == 200
    assert (await store.get(key)).body == body
    found = await store.head(key, checksum=True)
    assert found is not None
    assert found.sha256 in (None, hashlib.sha256(body).hexdigest())


@pytest.mark.parametrize("change", ["no checksum", "another checksum", "another length", "another method"])
async def test_a_presigned_url_allows_no_other_request(seaweed_s3, key, change):
    for store in (MemoryObjectStore(), seaweed_s3.object_store()):
        body = b"the right body"
        headers = signed_headers(body)
        url = await store.presign(key, "PUT", 60, Signed(headers=headers))
        method = "GET" if change == "another method" else "PUT"
        if change == "no checksum":
            del headers["x-amz-checksum-sha256"]
        elif change == "another checksum":
            headers["x-amz-checksum-sha256"] = signed_headers(b"another")["x-amz-checksum-sha256"]
        elif change == "another length":
            body += b"!"
            headers["content-length"] = str(len(body))
        assert await use(store, method, url, body, headers) == 403
        assert await store.get(key) is None


async def test_a_download_by_a_presigned_url_has_the_signed_type_and_name(store, key):
    await store.put(key, b"content")
    shown = {
        "response-content-type": "image/png",
        "response-content-disposition": "attachment; filename*=UTF-8''%E2%82%AC%20%22.png",
    }
    url = await store.presign(key, "GET", 60, Signed(query=shown))
    assert await use(store, "GET", url) == 200
    if isinstance(store, MemoryObjectStore):
        return
    async with httpx.AsyncClient() as client:
        answer = await client.get(url, headers={"range": "bytes=2-4"})
    assert (answer.status_code, answer.content) == (206, b"nte")
    assert answer.headers["content-type"] == "image/png"
    assert answer.headers["content-disposition"] == shown["response-content-disposition"]


async def test_a_presigned_download_cannot_be_changed(seaweed_s3, key):
    store = seaweed_s3.object_store()
    await store.put(key, b"content")
    url = await store.presign(key, "GET", 60, Signed(query={"response-content-type": "application/octet-stream"}))
    assert await use(store, "GET", url.replace("application%2Foctet-stream", "text%2Fhtml")) == 403


async def test_a_copy_has_the_content_of_its_source(store, key):
    body = os.urandom(3_000_000)
    await store.put(key, body)
    etag = (await store.head(key)).etag
    assert await store.copy(key, f"{key}-copy", etag)
    assert (await store.get(f"{key}-copy")).body == body
    assert not await store.copy(f"{key}-missing", f"{key}-other", etag)
    assert await store.get(f"{key}-other") is None


async def test_a_copy_of_another_version_is_refused(ministack_s3, key):
    for store in (MemoryObjectStore(), ministack_s3.object_store()):
        await store.put(key, b"first")
        etag = (await store.head(key)).etag
        await store.put(key, b"second")
        assert not await store.copy(key, f"{key}-copy", etag)
        assert await store.get(f"{key}-copy") is None


async def test_every_operation_of_the_store_in_memory_can_fail():
    store = MemoryObjectStore()
    await store.put("k", b"body")
    etag = (await store.head("k")).etag
    url = await store.presign("k", "PUT", 60)
    store.fault = lambda _: DROPPED
    requests = (store.head("k"), store.copy("k", "to", etag), store.stream("k"), store.use("PUT", url, b"x"))
    for request in requests:
        with pytest.raises(StoreUnavailable):
            await request
    assert set(store.objects) == {"k"}
    assert store.objects["k"].body == b"body"


async def test_a_presigned_url_of_the_store_in_memory_expires():
    store, now = MemoryObjectStore(), datetime(2030, 1, 1, tzinfo=UTC)
    store.clock = lambda: now
    url = await store.presign("k", "PUT", 60)
    now += timedelta(seconds=61)
    assert (await store.use("PUT", url, b"late")).status == 403


async def test_presigned_urls_have_the_address_that_clients_reach(seaweed_s3, key):
    """The signature covers the host, so a URL for one address is refused at the other one of the same server."""
    port = urlsplit(seaweed_s3.url).port
    inside, outside = f"127.0.0.1:{port}", f"localhost:{port}"
    keys = seaweed_s3.access_key_id, seaweed_s3.secret_access_key, "us-east-1"
    store = s3(BUCKET, f"http://{inside}", *keys, public_url=f"http://{outside}/")
    body = b"from outside"
    headers = signed_headers(body)
    key += " ü+%"  # a custom prefix may have such characters
    put = await store.presign(key, "PUT", 60, Signed(headers=headers))
    assert urlsplit(put).netloc == outside
    assert await use(store, "PUT", put.replace(outside, inside), body, headers) == 403
    assert await use(store, "PUT", put, body, headers) == 200
    found = await store.get(key)
    assert found is not None
    assert found.body == body
    get = await store.presign(key, "GET", 60, Signed(query={"response-content-type": "image/png"}))
    async with httpx.AsyncClient() as client:
        assert (await client.get(get)).content == body
    assert await store.verifies_checksums(f"{key}-probe")
    assert await store.copy(key, f"{key}-copy", found.etag)


@pytest.mark.parametrize("address", ["files.example.org", "http://key:secret@files.example.org"])
def test_a_wrong_address_for_clients_is_refused(address):
    with pytest.raises(ConfigError, match="public_url"):
        S3ObjectStore("b", "http://127.0.0.1:1", "key", "secret", public_url=address)


async def test_a_session_token_is_part_of_a_presigned_url():
    store = S3ObjectStore("b", "http://127.0.0.1:1", "key", "secret", "eu-west-1", "the+token/")
    url = urlsplit(await store.presign("k", "GET", 60, Signed(query={"response-content-type": "a/b"})))
    query = parse_qs(url.query)
    assert query["X-Amz-Security-Token"] == ["the+token/"]
    assert query["X-Amz-Credential"][0].split("/")[2:] == ["eu-west-1", "s3", "aws4_request"]
    assert (url.netloc, url.path) == ("127.0.0.1:1", "/b/k")


async def test_credentials_of_the_environment_are_signed_with(monkeypatch):
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "ambient")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setenv("AWS_SESSION_TOKEN", "ambient-token")
    store = S3ObjectStore("b", region_name="eu-central-1")
    url = urlsplit(await store.presign("k", "PUT", 60, Signed(headers={"content-length": "1"})))
    query = parse_qs(url.query)
    assert query["X-Amz-Credential"][0].startswith("ambient/")
    assert query["X-Amz-Security-Token"] == ["ambient-token"]
    assert query["X-Amz-SignedHeaders"] == ["content-length;host"]
    assert url.netloc.endswith(".amazonaws.com")


async def test_botocore_is_named_if_it_is_missing(monkeypatch):
    monkeypatch.setattr(signed_requests.importlib.util, "find_spec", lambda _: None)
    store = S3ObjectStore("b", "http://127.0.0.1:1", "key", "secret", "eu-west-1")
    with pytest.raises(ConfigError, match="install boto3"):
        await store.presign("k", "GET", 60, Signed(query={"response-content-type": "a/b"}))


@pytest.mark.parametrize("lost", [1, 2])
async def test_a_copy_without_an_answer_is_repeated_on_a_new_connection(monkeypatch, lost):
    monkeypatch.setattr("app.autocrud.resource_manager.backends.s3.signed_requests.COPY_WAITS_S", (0.5, 0.5, 0.5))
    with SilentS3() as server:
        store = S3ObjectStore("b", server.url, "key", "secret", "us-east-1")
        left = [SILENT] * lost
        server.plan = lambda _: left.pop() if left else "412 PreconditionFailed"
        assert not await store.copy("from", "to", '"etag"')
        assert len({request.connection for request in server.requests}) == lost + 1
        left += [SILENT] * 3
        with pytest.raises(StoreUnavailable):
            await store.copy("from", "to", '"etag"')


async def test_expired_credentials_are_renewed_once():
    with SilentS3() as server:
        store = S3ObjectStore("b", server.url, "key", "secret", "us-east-1")
        left = ["400 ExpiredToken"]
        server.plan = lambda _: left.pop() if left else "412 PreconditionFailed"
        assert not await store.copy("from", "to", '"etag"')
        assert len(server.requests) == 2
        server.plan = lambda _: "400 ExpiredToken"
        with pytest.raises(StoreUnavailable):
            await store.copy("from", "to", '"etag"')
        assert len(server.requests) == 4
