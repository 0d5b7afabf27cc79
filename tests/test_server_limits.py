"""Limits on what one client can do to a server over raw sockets: each attack is refused, and others are served."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import time
from collections.abc import Callable
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import pytest

from app.server import connections, http_protocol, overload, request_head
from app.server import serve as server
from tests.conftest import Server
from tests.raw_connections import (
    BODY,
    CHUNKED,
    GET,
    HANGS_S,
    HEALTH,
    HOST,
    MB,
    POST,
    Answer,
    back_to,
    connected,
    ended,
    files,
    is_alive,
    next_answer,
    resident,
)


@pytest.fixture
def served(serve: Callable[..., Server], tmp_path: Path) -> Server:
    return serve("memory", tmp_path)


@pytest.mark.parametrize(
    ("begins", "repeated", "status", "type_"),
    [
        (GET + b"X: ", b"a" * 4096, 431, "request-headers-too-large"),
        (GET, b"a: b\r\n" * 512, 431, "request-headers-too-large"),
        (b"GET /", b"a" * 4096, 414, "uri-too-long"),
        (b"", b"\r\n" * 2048, 431, "request-headers-too-large"),
        (CHUNKED + b"1;", b"a" * 4096, 431, "request-headers-too-large"),
        (CHUNKED + b"1\r\n \r\n0\r\n", b"a: b\r\n" * 512, 431, "request-headers-too-large"),
        (CHUNKED + b"1\r\n \r\n0\r\na:", b"a" * 4096, 431, "request-headers-too-large"),
        (CHUNKED, b"1\r\n \r\n" * 512, 400, "malformed-request"),
        (CHUNKED, b"1;" + b"e" * 100 + b"\r\n \r\n", 431, "request-headers-too-large"),
    ],
    ids=[
        "header",
        "headers",
        "line",
        "empty-lines",
        "extension",
        "trailers",
        "trailer",
        "chunks",
        "extensions",
    ],
)
async def test_an_endless_request_is_refused_after_few_bytes(served, begins, repeated, status, type_):
    before = resident(served)
    async with connected(served) as (reader, writer):
        writer.transport.set_write_buffer_limits(0)
        answer = asyncio.create_task(next_answer(reader))
        writer.write(begins)
        sent = 0
        with contextlib.suppress(ConnectionError):
            while sent < 64 * MB and not answer.done():
                writer.write(repeated)
                sent += len(repeated)
                async with asyncio.timeout(HANGS_S):
                    await writer.drain()
                await asyncio.sleep(0)
        found = await answer
        assert (found.status, found.type, found.headers["connection"]) == (status, type_, "close")
        await ended(reader)
    assert sent < 16 * MB  # this includes the buffers of both sockets
    assert resident(served) - before < 32 * MB
    assert is_alive(served)


async def test_a_head_may_be_as_large_as_the_limits_say_and_no_larger(served):
    async with connected(served) as (reader, writer):
        for fields, status in ((http_protocol.MAX_FIELDS - 1, 200), (http_protocol.MAX_FIELDS, 431)):
            writer.write(GET + b"a: b\r\n" * fields + b"\r\n")
            answer = await next_answer(reader)
            assert answer.status == status
        assert answer.type == "request-headers-too-large"
        assert "found 101 header fields; expected at most 100" in answer.body.decode()
    remaining = request_head.MAX_HEAD - len(GET + b"a: \r\n\r\n")
    async with connected(served) as (reader, writer):
        writer.write(GET + b"a: " + b"b" * remaining + b"\r\n\r\n")
        assert (await next_answer(reader)).status == 200
        writer.write(GET + b"a: " + b"b" * (remaining + 1) + b"\r\n\r\n")
        assert (await next_answer(reader)).type == "request-headers-too-large"
    path = b"/healthz?a=" + b"b" * (request_head.MAX_LINE - len(b"/healthz?a="))
    async with connected(served) as (reader, writer):
        writer.write(b"GET " + path + b" HTTP/1.1\r\n" + HOST + b"\r\n")
        assert (await next_answer(reader)).type == "invalid-query"  # the application answered this
        writer.write(b"GET " + path + b"b HTTP/1.1\r\n" + HOST + b"\r\n")
        assert (await next_answer(reader)).type == "uri-too-long"


async def drip(writer: asyncio.StreamWriter, byte: bytes) -> None:
    with contextlib.suppress(ConnectionError):
        while True:
            writer.write(byte)
            await writer.drain()
            await asyncio.sleep(0.5)


async def test_a_slow_client_gets_408_and_is_disconnected(served):
    """All attacks run at the same time."""
    assert is_alive(served)
    files_before = files(served)

    async def slow(begins: bytes, dripped: bytes) -> Answer | None:
        async with connected(served) as (reader, writer):
            writer.write(begins)
            dripping = asyncio.create_task(drip(writer, dripped)) if dripped else None
            try:
                answer = await next_answer(reader)
            except asyncio.IncompleteReadError as error:
                return None if not error.partial else Answer(0, {}, error.partial)
            finally:
                if dripping is not None:
                    dripping.cancel()
            await ended(reader)
            return answer

    async def idle() -> None:
        async with connected(served) as (reader, writer):
            writer.write(HEALTH)
            assert (await next_answer(reader)).status == 200
            await ended(reader)

    async def unfinished_answer() -> None:
        """The server answers before the body arrives. The body never arrives."""
        async with connected(served) as (reader, writer):
            writer.write(b"POST /nowhere HTTP/1.1\r\n" + HOST + b"Content-Length: 1000\r\n\r\n")
            answer = await next_answer(reader)
            assert (answer.status, answer.headers["connection"]) == (404, "close")
            await ended(reader)

    nothing, *answers = await asyncio.gather(
        slow(b"", b""),
        slow(GET, b""),
        slow(GET + b"X: ", b"a"),
        slow(b"", b"\r\n"),
        slow(POST + b"Content-Length: 1000\r\n\r\n{", b""),
        slow(POST + b"Content-Length: 1000\r\n\r\n{", b" "),
        slow(CHUNKED, b"1\r\n \r\n"),
        slow(CHUNKED + b"1;", b"a"),
        idle(),
        unfinished_answer(),
    )
    assert nothing is None  # this client sent no request
    assert [(answer.status, answer.type) for answer in answers[:7]] == [(408, "request-timeout")] * 7
    assert {answer.headers["connection"] for answer in answers[:7]} == {"close"}
    await back_to(files_before, served)


async def test_unread_answers_use_a_bounded_number_of_bytes(served):
    """Each client sends as many requests as allowed and reads nothing. It is disconnected, and others are served."""
    article = {"title": "t", "content": "c" * MB, "author": "a"}
    for _ in range(4):
        httpx.post(f"{served.url}/article", json=article, timeout=HANGS_S).raise_for_status()
    files_before, before, most = files(served), resident(served), 0
    url = urlsplit(served.url)
    asking = b"GET /article HTTP/1.1\r\n" + HOST + b"\r\n"
    sockets = [socket.create_connection((url.hostname, url.port)) for _ in range(150)]
    try:
        for each in sockets:
            each.sendall(asking * 3)
        until = time.monotonic() + HANGS_S
        while files(served) > files_before:  # until all of them are disconnected
            most = max(most, resident(served) - before)
            assert is_alive(served)
            assert time.monotonic() < until
            await asyncio.sleep(0.1)
        assert most < overload.MAX_UNSENT + 4 * MB * overload.IN_PROGRESS + 32 * MB
    finally:
        for each in sockets:
            each.close()


async def test_unfinished_bodies_use_a_bounded_number_of_bytes(served):
    """Fifty clients send 5 MB each of a larger body, and wait. Each is refused; small bodies are accepted."""
    before, refused = resident(served), []
    url = urlsplit(served.url)

    async def upload() -> None:
        async with connected(served) as (reader, writer):
            writer.write(POST + b"Content-Length: 6000000\r\n\r\n{")
            with contextlib.suppress(ConnectionError):
                for _ in range(50):
                    writer.write(b" " * 100_000)
                    await writer.drain()
            answer = await next_answer(reader)
            refused.append((answer.status, answer.type, answer.headers.get("retry-after")))

    uploads = [asyncio.create_task(upload()) for _ in range(50)]
    small = []
    for _ in range(20):
        async with connected(served) as (reader, writer):
            writer.write(POST + b"Content-Length: %d\r\n\r\n" % len(BODY) + BODY)
            small.append((await next_answer(reader)).status)
        await asyncio.sleep(0.1)
    assert small == [201] * 20
    await asyncio.gather(*uploads)
    assert set(refused) == {(503, "too-much-in-transfer", "1"), (408, "request-timeout", None)}
    assert len(refused) == 50
    assert resident(served) - before < connections.MAX_BODIES + 64 * MB
    assert url.port is not None


@pytest.mark.parametrize(
    "begins", [b"", GET + b"X: ", POST + b"Content-Length: 100\r\n\r\n{"], ids=["idle", "head", "body"]
)
async def test_waiting_connections_are_closed_to_serve_new_requests(serve, tmp_path, begins):
    """Open four times as many connections as file descriptors. Connections that wait for their clients are closed."""
    served = serve("memory", tmp_path, max_files=256)
    assert is_alive(served)
    before = files(served)
    async with contextlib.AsyncExitStack() as stack:
        for _ in range(16):
            for _ in range(64):
                _, writer = await stack.enter_async_context(connected(served))
                writer.write(begins)
            assert is_alive(served)
            created = httpx.post(f"{served.url}/article", content=BODY, headers={"content-type": "application/json"})
            assert created.status_code == 201
            assert files(served) < 200
    await back_to(before, served)


async def test_a_waiting_connection_gets_503_before_it_is_closed(serve, tmp_path):
    served = serve("memory", tmp_path, max_files=256)
    async with contextlib.AsyncExitStack() as stack:
        reader, writer = await stack.enter_async_context(connected(served))
        writer.write(GET + b"X: ")
        while not reader.at_eof() and not reader._buffer:
            await stack.enter_async_context(connected(served))
        answer = await next_answer(reader)
        assert (answer.status, answer.type, answer.headers["retry-after"]) == (503, "too-many-connections", "1")
        await ended(reader)


def test_connections_leave_file_descriptors_for_other_files(monkeypatch):
    for limits, expected in (
        ((1024, 4096), server.MAX_CONNECTIONS),
        ((256, 1024), 1024 - server.OTHER_FILES),
        ((256, 256), 64),
        ((65536, 65536), server.MAX_CONNECTIONS),
    ):
        now = list(limits)
        monkeypatch.setattr(server.resource, "getrlimit", lambda _, now=now: tuple(now))
        monkeypatch.setattr(server.resource, "setrlimit", lambda _, given, now=now: now.__setitem__(slice(None), given))
        assert server.connection_limit() == expected
        assert server.connection_limit() < now[0]
        assert now[1] == limits[1]


def test_ctrl_c_does_not_wait_for_slow_clients(served):
    """One client has sent half a request, one is idle, and one has sent half a body."""
    url = urlsplit(served.url)
    sockets = [socket.create_connection((url.hostname, url.port)) for _ in range(3)]
    for each, sent in zip(sockets, (GET, HEALTH, POST + b"Content-Length: 100\r\n\r\n{"), strict=True):
        each.sendall(sent)
    assert sockets[1].recv(1)
    served.stop()
    for each in sockets:
        each.close()


async def test_ctrl_c_answers_requests_in_progress(serve, tmp_path):
    """Each of many clients gets whole answers or none, and every acknowledged write is stored."""
    served = serve("disk", tmp_path)
    async with contextlib.AsyncExitStack() as stack:
        streams = [await stack.enter_async_context(connected(served)) for _ in range(30)]
        for _, writer in streams:
            writer.write((POST + b"Content-Length: %d\r\n\r\n" % len(BODY) + BODY) * 3)
        assert (await next_answer(streams[0][0])).status == 201
        await asyncio.to_thread(served.stop)
        created = 1
        for reader, _ in streams:
            with contextlib.suppress(ConnectionResetError):
                async with asyncio.timeout(HANGS_S):
                    answers = await reader.read()
                whole = answers.count(b"HTTP/1.1 201 Created\r\n")
                assert answers.count(b"HTTP/1.1 ") == answers.count(b'"published":false}}') == whole  # none is cut off
                created += whole
    again = serve("disk", tmp_path)
    assert httpx.get(f"{again.url}/article/count").json()["count"] >= created
