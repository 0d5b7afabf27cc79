"""Streams of parts of an object: any range, in small chunks, continued after a lost connection, of one version only."""

from __future__ import annotations

import os

import pytest

from app.autocrud.errors import StoreUnavailable
from app.autocrud.resource_manager.backends.s3 import clients as s3_clients
from app.autocrud.resource_manager.backends.s3.memory_object_store import MemoryObjectStore
from app.autocrud.resource_manager.backends.s3.object_store import STREAM_CHUNK, ObjectStore, S3ObjectStore
from tests.silent_s3 import HALF, Request, SilentS3

CONTENT = os.urandom(3 * STREAM_CHUNK + 17)
RANGES = [(0, None), (0, 1), (1, None), (17, 4000), (len(CONTENT) - 1, None), (len(CONTENT) - 1, len(CONTENT))]
PAST_THE_END = [(5, len(CONTENT) + 9), (len(CONTENT), None), (len(CONTENT) + 5, len(CONTENT) + 9)]


@pytest.fixture(params=["memory", "ministack", "seaweed"])
async def objects(request) -> ObjectStore:
    if request.param == "memory":
        return MemoryObjectStore()
    return request.getfixturevalue(f"{request.param}_s3").object_store()


async def received(objects: ObjectStore, key: str, start: int = 0, end: int | None = None) -> bytes | None:
    stream = await objects.stream(key, start, end)
    return None if stream is None else b"".join([chunk async for chunk in stream])


@pytest.mark.parametrize(("start", "end"), [*RANGES, *PAST_THE_END])
async def test_any_range_of_an_object(objects, start, end):
    await objects.put("stream/object", CONTENT)
    assert await received(objects, "stream/object", start, end) == CONTENT[start:end]


async def test_an_empty_and_a_missing_object(objects):
    await objects.put("stream/empty", b"")
    assert await received(objects, "stream/empty") == b""
    assert await received(objects, "stream/missing") is None
    assert await received(objects, "stream/missing", 3, 5) is None


async def test_chunks_are_small_and_an_unfinished_stream_can_be_left(objects):
    await objects.put("stream/object", CONTENT)
    stream = await objects.stream("stream/object")
    first = await anext(stream)
    assert STREAM_CHUNK <= len(first) <= 2 * STREAM_CHUNK
    await stream.aclose()
    assert await received(objects, "stream/object") == CONTENT


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(s3_clients, "WAITS_S", s3_clients.WAITS_S | {"small": (0.5, 0.7, 1)})
    monkeypatch.setattr(s3_clients, "RETRY_S", 0.2)
    with SilentS3() as server:
        yield server


@pytest.fixture
def store(server) -> S3ObjectStore:
    return S3ObjectStore("b", server.url, "key", "secret", "us-east-1")


async def test_a_stream_continues_after_dropped_connections(server, store):
    server.objects["file"] = os.urandom(8 * 1024 * 1024)
    server.plan = lambda _: HALF if len(server.requests) <= 2 else None
    assert await received(store, "file", 1000, 8_000_000) == server.objects["file"][1000:8_000_000]
    ranges = [one.headers["range"].removeprefix("bytes=").split("-") for one in server.requests]
    assert {end for _, end in ranges} == {"7999999"}
    first, second, third = (int(start) for start, _ in ranges)
    assert 1000 == first < second < third
    assert {one.headers.get("if-match") for one in server.requests[1:]} == {(await store.get("file")).etag}


async def test_a_stream_never_mixes_two_versions_of_an_object(server, store):
    server.objects["file"] = os.urandom(8 * 1024 * 1024)

    def plan(_: Request) -> str | None:
        if len(server.requests) == 1:
            return HALF
        server.objects["file"] = b"new"
        return None

    server.plan = plan
    with pytest.raises(StoreUnavailable):
        await received(store, "file")


async def test_no_answer_at_all_is_reported_before_the_first_byte(server, store):
    server.objects["file"] = b"content"
    server.plan = lambda _: "silent"
    with pytest.raises(StoreUnavailable):
        await store.stream("file")
    assert len(server.requests) == 3
