"""What one client can do to a server over raw sockets: each attack is refused, the connection ends, and others are served."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit

import httpx
import pytest

from app.server import connections, http_protocol, overload, request_head
from app.server import serve as server
from tests.conftest import Server

MB = 1024 * 1024
HANGS_S = 90
"""How long a test waits for what should have happened long before."""
HOST = b"Host: localhost\r\n"
POST = b"POST /article HTTP/1.1\r\n" + HOST + b"Content-Type: application/json\r\n"
CHUNKED = POST + b"Transfer-Encoding: chunked\r\n\r\n"
HEALTH = b"GET /healthz HTTP/1.1\r\n" + HOST + b"\r\n"
BODY = b'{"title":"t","content":"c","author":"a"}'


@pytest.fixture
def served(serve: Callable[..., Server], tmp_path: Path) -> Server:
    return serve("memory", tmp_path)


class Answer(NamedTuple):
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def type(self) -> str:
        assert self.headers["content-type"] == "application/problem+json"
        problem = json.loads(self.body)
        assert problem["status"] == self.status
        return str(problem["type"]).removeprefix("urn:crudstack:")


@contextlib.asynccontextmanager
async def connected(served: Server) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    url = urlsplit(served.url)
    reader, writer = await asyncio.open_connection(url.hostname, url.port)
    try:
        yield reader, writer
    finally:
        writer.transport.abort()


async def next_answer(reader: asyncio.StreamReader) -> Answer:
    async with asyncio.timeout(HANGS_S):
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in head[1:] if line)}
        body = await reader.readexactly(int(headers.get("content-length", "0")))
    return Answer(int(head[0].split()[1]), headers, body)


async def ended(reader: asyncio.StreamReader) -> None:
    """Wait for the end of a connection on which nothing more is said."""
    async with asyncio.timeout(HANGS_S):
        with contextlib.suppress(ConnectionResetError):
            assert await reader.read() == b""


async def asked(served: Server, sent: bytes) -> Answer:
    """The one answer to these bytes, after which the connection ends."""
    async with connected(served) as (reader, writer):
        writer.write(sent)
        answer = await next_answer(reader)
        assert answer.headers["connection"] == "close"
        await ended(reader)
    return answer


def resident(served: Server) -> int:
    """The memory of the server, in bytes."""
    pages = int(Path(f"/proc/{served.process.pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def files(served: Server) -> int:
    return len(list(Path(f"/proc/{served.process.pid}/fd").iterdir()))


async def back_to(before: int, served: Server) -> None:
    """Wait until the server has as many open files as before."""
    async with asyncio.timeout(HANGS_S):
        while files(served) > before:
            await asyncio.sleep(0.05)


def is_alive(served: Server) -> bool:
    return httpx.get(f"{served.url}/healthz", timeout=HANGS_S).status_code == 200


GET = b"GET /healthz HTTP/1.1\r\n" + HOST


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
async def test_what_never_ends_is_refused_after_few_bytes(served, begins, repeated, status, type_):
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
    assert sent < 16 * MB  # the buffers of both sockets are in it
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
    room = request_head.MAX_HEAD - len(GET + b"a: \r\n\r\n")
    async with connected(served) as (reader, writer):
        writer.write(GET + b"a: " + b"b" * room + b"\r\n\r\n")
        assert (await next_answer(reader)).status == 200
        writer.write(GET + b"a: " + b"b" * (room + 1) + b"\r\n\r\n")
        assert (await next_answer(reader)).type == "request-headers-too-large"
    path = b"/healthz?a=" + b"b" * (request_head.MAX_LINE - len(b"/healthz?a="))
    async with connected(served) as (reader, writer):
        writer.write(b"GET " + path + b" HTTP/1.1\r\n" + HOST + b"\r\n")
        assert (await next_answer(reader)).type == "invalid-query"  # it came as far as the application
        writer.write(b"GET " + path + b"b HTTP/1.1\r\n" + HOST + b"\r\n")
        assert (await next_answer(reader)).type == "uri-too-long"


async def drip(writer: asyncio.StreamWriter, byte: bytes) -> None:
    with contextlib.suppress(ConnectionError):
        while True:
            writer.write(byte)
            await writer.drain()
            await asyncio.sleep(0.5)


async def test_a_slow_client_is_told_and_let_go(served):
    """All at once: no attack waits for another."""
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
        """An answer was given before the body arrived, and it never does."""
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
    assert nothing is None  # nobody asked
    assert [(answer.status, answer.type) for answer in answers[:7]] == [(408, "request-timeout")] * 7
    assert {answer.headers["connection"] for answer in answers[:7]} == {"close"}
    await back_to(files_before, served)


async def test_answers_that_nobody_reads_hold_a_bounded_number_of_bytes(served):
    """Each client asks for as much as it may, and reads nothing. They are let go, and others are served meanwhile."""
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
        while files(served) > files_before:  # until all of them are let go
            most = max(most, resident(served) - before)
            assert is_alive(served)
            assert time.monotonic() < until
            await asyncio.sleep(0.1)
        assert most < overload.MAX_UNSENT + 4 * MB * overload.IN_PROGRESS + 32 * MB
    finally:
        for each in sockets:
            each.close()


async def test_bodies_that_do_not_end_hold_a_bounded_number_of_bytes(served):
    """Fifty clients send five megabytes each of a body, and wait. Who sends most is refused, and a small body is taken."""
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


SMUGGLED = b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n"


@pytest.mark.parametrize(
    ("sent", "status", "type_"),
    [
        (POST + b"Content-Length: 2\r\nContent-Length: 3\r\n\r\n{}" + SMUGGLED, 400, "malformed-request"),
        (POST + b"Content-Length: 2, 2\r\n\r\n{}" + SMUGGLED, 400, "malformed-request"),
        (POST + b"Content-Length: +2\r\n\r\n{}" + SMUGGLED, 400, "malformed-request"),
        (POST + b"Content-Length : 2\r\n\r\n{}" + SMUGGLED, 400, "malformed-request"),
        (
            POST + b"Content-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n" + SMUGGLED,
            400,
            "malformed-request",
        ),
        (
            POST + b"Transfer-Encoding: chunked\r\nContent-Length: 2\r\n\r\n0\r\n\r\n" + SMUGGLED,
            400,
            "malformed-request",
        ),
        (
            POST + b"Transfer-Encoding: chunked\r\nTransfer-Encoding: identity\r\n\r\n0\r\n\r\n",
            400,
            "malformed-request",
        ),
        (POST + b"Transfer-Encoding: xchunked\r\n\r\n0\r\n\r\n", 501, "transfer-coding-not-supported"),
        (POST + b"Transfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n", 501, "transfer-coding-not-supported"),
        (POST + b"Transfer-Encoding:\x0bchunked\r\n\r\n0\r\n\r\n", 400, "malformed-request"),
        (
            POST.replace(b"1.1", b"1.0") + b"Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
            501,
            "transfer-coding-not-supported",
        ),
        (CHUNKED + b"0x2\r\n{}\r\n0\r\n\r\n", 400, "malformed-request"),
        (CHUNKED + b"2\n{}\r\n0\r\n\r\n", 400, "malformed-request"),
        (CHUNKED + b"2\r\n{}0\r\n\r\n", 400, "malformed-request"),
        (CHUNKED + b"fffffffffffffffff\r\n{}\r\n0\r\n\r\n", 400, "malformed-request"),
        (b"GET /healthz HTTP/1.1\nHost: localhost\n\n", 400, "malformed-request"),
        (b"GET /healthz HTTP/1.1\r\nHost: localhost\nX: y\r\n\r\n", 400, "malformed-request"),
        (b"GET /healthz HTTP/1.1\r\nHost: localhost\rX: y\r\n\r\n", 400, "malformed-request"),
        (b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nX: y\r\n z\r\n\r\n", 400, "malformed-request"),
        (b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nX: a\0b\r\n\r\n", 400, "malformed-request"),
        (b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nHost: evil.example\r\n\r\n", 400, "malformed-request"),
        (b"GET /healthz HTTP/1.1\r\n\r\n", 400, "malformed-request"),
        (b"GET /h\xc3\xa9 HTTP/1.1\r\nHost: localhost\r\n\r\n", 400, "malformed-request"),
        (b"CONNECT evil.example:80 HTTP/1.1\r\nHost: evil.example:80\r\n\r\n", 400, "malformed-request"),
        (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 400, "malformed-request"),
        (b"GET /healthz HTTP/3.0\r\nHost: localhost\r\n\r\n", 400, "malformed-request"),
        (b"GET /healthz HTTP/2.0\r\nHost: localhost\r\n\r\n", 400, "malformed-request"),
        (b"GET /healthz HTTP/0.9\r\nHost: localhost\r\n\r\n", 400, "malformed-request"),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\x00" * 500, 400, "malformed-request"),
        # The parser takes the body of what asks for an upgrade for the next request.
        (
            POST + b"Connection: upgrade\r\nUpgrade: other\r\nContent-Length: %d\r\n\r\n" % len(SMUGGLED) + SMUGGLED,
            400,
            "upgrade-not-supported",
        ),
        (
            POST + b"Connection: upgrade\r\nUpgrade: other\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
            400,
            "upgrade-not-supported",
        ),
    ],
)
async def test_a_request_that_others_might_read_otherwise_is_refused(served, sent, status, type_):
    answer = await asked(served, sent)
    assert (answer.status, answer.type) == (status, type_)
    assert is_alive(served)


async def test_a_websocket_is_refused_and_no_traceback_is_logged(served, capfd):
    upgrade = b"Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n"
    answer = await asked(
        served, b"GET /article HTTP/1.1\r\n" + HOST + upgrade + b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
    )
    assert (answer.status, answer.type) == (400, "upgrade-not-supported")
    assert "Traceback" not in capfd.readouterr().err


async def test_an_upgrade_that_is_only_offered_changes_nothing(served):
    """curl offers HTTP/2 in this way."""
    offer = b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABkAAQAAP__\r\n\r\n"
    async with connected(served) as (reader, writer):
        for _ in range(2):
            writer.write(GET + offer)
            assert (await next_answer(reader)).status == 200


async def test_pipelined_requests_are_answered_in_order(served):
    post = POST + b"Content-Length: %d\r\n\r\n" % len(BODY) + BODY
    async with connected(served) as (reader, writer):
        writer.write(HEALTH + post + HEALTH + b"GET /nowhere HTTP/1.1\r\n" + HOST + b"\r\n" + post)
        assert [(await next_answer(reader)).status for _ in range(5)] == [200, 201, 200, 404, 201]


ASKING = b"GET /openapi.json HTTP/1.1\r\n" + HOST + b"\r\n"


async def test_of_pipelined_requests_none_is_parsed_before_its_turn(served):
    """A client that pipelines without end and reads nothing. Each request is 60 bytes, each answer 60 KB."""
    before, sent = resident(served), 0
    async with connected(served) as (reader, writer):
        writer.transport.set_write_buffer_limits(0)
        with contextlib.suppress(TimeoutError):
            while sent < 64 * MB:
                writer.write(ASKING * 1000)
                sent += 1000 * len(ASKING)
                async with asyncio.timeout(2):
                    await writer.drain()
        assert sent < 16 * MB
        assert resident(served) - before < 32 * MB
        assert is_alive(served)
        assert (await next_answer(reader)).status == 200


async def test_after_a_chunked_body_the_next_request_may_follow_or_the_connection_ends(served):
    chunked = CHUNKED + b"%x\r\n" % len(BODY) + BODY + b"\r\n0\r\nX-Trailer: t\r\n\r\n"
    async with connected(served) as (reader, writer):
        for _ in range(2):
            writer.write(chunked)
            assert (await next_answer(reader)).status == 201
        writer.write(chunked + HEALTH)  # where the first one ends only the parser knows
        answer = await next_answer(reader)
        assert (answer.status, answer.headers["connection"]) == (201, "close")
        await ended(reader)


async def test_a_trailer_is_no_header(served):
    """Otherwise a proxy's rules for headers could be passed by."""
    once = b"0\r\nIdempotency-Key: k\r\n\r\n"
    chunked = CHUNKED + b"%x\r\n" % len(BODY) + BODY + b"\r\n" + once
    async with connected(served) as (reader, writer):
        locations = []
        for _ in range(2):
            writer.write(chunked)
            locations.append((await next_answer(reader)).headers["location"])
    assert locations[0] != locations[1]


async def test_a_body_is_asked_for_only_if_it_is_wanted(served):
    async with connected(served) as (reader, writer):
        writer.write(POST + b"Content-Length: %d\r\nExpect: 100-continue\r\n\r\n" % len(BODY))
        assert (await next_answer(reader)).status == 100
        writer.write(BODY)
        assert (await next_answer(reader)).status == 201
    nowhere = POST.replace(b"/article", b"/nowhere")
    answer = await asked(served, nowhere + b"Content-Length: 100\r\nExpect: 100-continue\r\n\r\n")
    assert answer.status == 404


async def test_an_answer_before_the_end_of_the_body_can_be_read(served):
    """The server must not close at once: the bytes that come then would reset the connection, and the answer be lost."""
    for path in (b"/nowhere", b"/article"):
        async with connected(served) as (reader, writer):
            writer.write(POST.replace(b"/article", path) + b"Content-Length: 50000000\r\n\r\n{")
            with contextlib.suppress(ConnectionError):
                for _ in range(200):
                    writer.write(b" " * 50_000)
                    await writer.drain()
            answer = await next_answer(reader)
            assert (answer.status, answer.headers["connection"]) == (404 if path == b"/nowhere" else 413, "close")


async def test_a_client_that_ends_its_side_gets_its_answer(served):
    async with connected(served) as (reader, writer):
        writer.write(POST + b"Content-Length: %d\r\n\r\n" % len(BODY) + BODY)
        writer.write_eof()
        assert (await next_answer(reader)).status == 201
        await ended(reader)
    for unfinished in (GET, POST + b"Content-Length: 100\r\n\r\n{"):
        async with connected(served) as (reader, writer):
            writer.write(unfinished)
            writer.write_eof()
            await ended(reader)


async def test_http_1_0_is_answered_and_the_connection_closed(served):
    answer = await asked(served, b"GET /healthz HTTP/1.0\r\n\r\n")
    assert answer.status == 200


async def test_an_absolute_target_says_for_which_host_it_is(served):
    for host, status in ((b"localhost", 200), (b"[::1]:80", 200), (b"evil.example", 421)):
        async with connected(served) as (reader, writer):
            writer.write(b"GET http://" + host + b"/article HTTP/1.1\r\nHost: localhost\r\n\r\n")
            assert (await next_answer(reader)).status == status


@pytest.mark.parametrize(
    "begins", [b"", GET + b"X: ", POST + b"Content-Length: 100\r\n\r\n{"], ids=["idle", "head", "body"]
)
async def test_there_is_room_for_who_asks_beside_any_number_of_connections(serve, tmp_path, begins):
    """Four times as many connections as file descriptors. Those that wait for their clients make room."""
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


async def test_a_client_that_makes_room_is_told_why(serve, tmp_path):
    served = serve("memory", tmp_path, max_files=256)
    async with contextlib.AsyncExitStack() as stack:
        reader, writer = await stack.enter_async_context(connected(served))
        writer.write(GET + b"X: ")
        while not reader.at_eof() and not reader._buffer:
            await stack.enter_async_context(connected(served))
        answer = await next_answer(reader)
        assert (answer.status, answer.type, answer.headers["retry-after"]) == (503, "too-many-connections", "1")
        await ended(reader)


def test_connections_leave_file_descriptors_for_all_else(monkeypatch):
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


def test_ctrl_c_waits_for_no_slow_client(served):
    """A client that has sent half a request, one that is idle, and one that has sent half a body."""
    url = urlsplit(served.url)
    sockets = [socket.create_connection((url.hostname, url.port)) for _ in range(3)]
    for each, sent in zip(sockets, (GET, HEALTH, POST + b"Content-Length: 100\r\n\r\n{"), strict=True):
        each.sendall(sent)
    assert sockets[1].recv(1)
    served.stop()
    for each in sockets:
        each.close()


async def test_ctrl_c_answers_what_is_in_progress(serve, tmp_path):
    """Each of many clients gets a whole answer or none, and what was answered is stored."""
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
