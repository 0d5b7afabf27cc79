"""Requests over raw sockets: ambiguous ones are refused, and pipelining, bodies and upgrades follow HTTP."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import Server
from tests.raw_connections import (
    BODY,
    CHUNKED,
    GET,
    HEALTH,
    HOST,
    MB,
    POST,
    asked,
    connected,
    ended,
    is_alive,
    next_answer,
    resident,
)


@pytest.fixture
def served(serve: Callable[..., Server], tmp_path: Path) -> Server:
    return serve("memory", tmp_path)


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
        # The parser would take the body of a request with an upgrade for the next request.
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
async def test_an_ambiguous_request_is_refused(served, sent, status, type_):
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
    """The program curl offers HTTP/2 in this way."""
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


async def test_a_pipelined_request_is_not_parsed_before_its_turn(served):
    """The client pipelines up to 64 MB of requests and reads nothing. Each answer is far larger than its request."""
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


async def test_a_connection_is_reused_or_closed_after_a_chunked_body(served):
    chunked = CHUNKED + b"%x\r\n" % len(BODY) + BODY + b"\r\n0\r\nX-Trailer: t\r\n\r\n"
    async with connected(served) as (reader, writer):
        for _ in range(2):
            writer.write(chunked)
            assert (await next_answer(reader)).status == 201
        writer.write(chunked + HEALTH)  # only the parser knows the end of the first request
        answer = await next_answer(reader)
        assert (answer.status, answer.headers["connection"]) == (201, "close")
        await ended(reader)


async def test_a_trailer_is_not_a_header(served):
    """Otherwise a client could bypass a proxy's rules for headers."""
    once = b"0\r\nIdempotency-Key: k\r\n\r\n"
    chunked = CHUNKED + b"%x\r\n" % len(BODY) + BODY + b"\r\n" + once
    async with connected(served) as (reader, writer):
        locations = []
        for _ in range(2):
            writer.write(chunked)
            locations.append((await next_answer(reader)).headers["location"])
    assert locations[0] != locations[1]


async def test_100_continue_is_sent_only_if_the_body_is_wanted(served):
    async with connected(served) as (reader, writer):
        writer.write(POST + b"Content-Length: %d\r\nExpect: 100-continue\r\n\r\n" % len(BODY))
        assert (await next_answer(reader)).status == 100
        writer.write(BODY)
        assert (await next_answer(reader)).status == 201
    nowhere = POST.replace(b"/article", b"/nowhere")
    answer = await asked(served, nowhere + b"Content-Length: 100\r\nExpect: 100-continue\r\n\r\n")
    assert answer.status == 404


async def test_an_answer_before_the_end_of_the_body_can_be_read(served):
    """The server must not close at once. If it did, later bytes would reset the connection and lose the answer."""
    for path in (b"/nowhere", b"/article"):
        async with connected(served) as (reader, writer):
            writer.write(POST.replace(b"/article", path) + b"Content-Length: 50000000\r\n\r\n{")
            with contextlib.suppress(ConnectionError):
                for _ in range(200):
                    writer.write(b" " * 50_000)
                    await writer.drain()
            answer = await next_answer(reader)
            assert (answer.status, answer.headers["connection"]) == (404 if path == b"/nowhere" else 413, "close")


async def test_a_client_that_half_closes_gets_its_answer(served):
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


async def test_the_host_of_an_absolute_target_is_checked(served):
    for host, status in ((b"localhost", 200), (b"[::1]:80", 200), (b"evil.example", 421)):
        async with connected(served) as (reader, writer):
            writer.write(b"GET http://" + host + b"/article HTTP/1.1\r\nHost: localhost\r\n\r\n")
            assert (await next_answer(reader)).status == status
