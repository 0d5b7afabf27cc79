"""The HTTP protocol of one connection: requests and answers do not depend on how TCP splits the bytes."""

from __future__ import annotations

import asyncio
import functools
import itertools
import json
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import uvicorn
from hypothesis import given, settings
from hypothesis import strategies as st
from uvicorn.server import ServerState

from app.server import request_head
from app.server.connections import Connections
from app.server.http_protocol import LimitedProtocol


class Sent(NamedTuple):
    """A request: its bytes, and the request that the application should see."""

    raw: bytes
    seen: tuple[str, str, str, str]
    chunked: bool


async def echo(scope: Any, receive: Any, send: Any) -> None:
    body, more = b"", True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            return
        body += message["body"]
        more = message["more_body"]
    fields = [value.decode() for name, value in scope["headers"] if name == b"x"]
    said = json.dumps([scope["method"], scope["path"], ",".join(fields), body.decode("latin-1")]).encode()
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"%d" % len(said))]})
    await send({"type": "http.response.body", "body": said})


class Socket:
    """A transport. Its peer sends bytes in pieces, and reads everything."""

    def __init__(self) -> None:
        self.written = b""
        self.paused = self.closing = self.ended = False
        self.protocol: Any = None

    def get_extra_info(self, _name: str) -> None:
        return None

    def write(self, data: bytes) -> None:
        assert not self.closing
        assert not self.ended
        self.written += data

    def is_closing(self) -> bool:
        return self.closing

    def can_write_eof(self) -> bool:
        return True

    def write_eof(self) -> None:
        self.ended = True

    def get_write_buffer_size(self) -> int:
        return 0

    def pause_reading(self) -> None:
        assert not self.paused
        self.paused = True

    def resume_reading(self) -> None:
        assert self.paused
        self.paused = False

    def close(self) -> None:
        self.closing = True

    abort = close


@functools.cache
def config(app: Any) -> uvicorn.Config:
    made = uvicorn.Config(app, ws="none", http=LimitedProtocol, proxy_headers=False, log_config=None)
    made.load()
    return made


async def exchange(
    pieces: list[bytes], check: Callable[[LimitedProtocol], None] = lambda _: None, app: Any = echo
) -> Socket:
    """Send each piece when the server reads, until the server ends the connection."""
    transport = Socket()
    protocol = LimitedProtocol(
        Connections(10),
        config=config(app),
        server_state=ServerState(),
        app_state={},
        _loop=asyncio.get_running_loop(),
    )
    transport.protocol = protocol
    protocol.connection_made(transport)  # type: ignore[arg-type]
    for piece in pieces:
        for _ in range(100):
            if not transport.paused:
                break
            await asyncio.sleep(0)
        if transport.closing:
            break
        assert not transport.paused, "nothing is read any more"
        protocol.data_received(piece)
        check(protocol)
        await asyncio.sleep(0)
    for _ in range(100):
        await asyncio.sleep(0)
    protocol.connection_lost(None)
    assert protocol._registry._sweeping is not None
    protocol._registry._sweeping.cancel()
    assert (protocol._registry.body_bytes, len(protocol._registry.waiting)) == (0, 0)
    return transport


def answers(written: bytes) -> list[tuple[int, bytes, bool]]:
    """Return the status, the body and `Connection: close` (a bool) of each answer."""
    found = []
    while written:
        head, _, written = written.partition(b"\r\n\r\n")
        lines = head.split(b"\r\n")
        fields = dict(line.split(b": ", 1) for line in lines[1:])
        size = int(fields[b"content-length"])
        assert len(written) >= size
        found.append((int(lines[0].split()[1]), written[:size], fields.get(b"connection") == b"close"))
        written = written[size:]
    return found


def cut(whole: bytes, places: list[int]) -> list[bytes]:
    at = sorted({place % (len(whole) + 1) for place in places} | {0, len(whole)})
    return [whole[start:end] for start, end in itertools.pairwise(at)]


@st.composite
def requests(draw: st.DrawFn) -> Sent:
    method = draw(st.sampled_from(["GET", "POST", "PUT"]))
    path = draw(st.from_regex(r"/[a-z]{0,5}", fullmatch=True))
    field = draw(st.from_regex(r"[a-z]{1,8}", fullmatch=True))
    body = draw(st.binary(max_size=60) | st.just(b"\r\n\r\nGET /evil HTTP/1.1\r\nHost: a\r\n\r\n"))
    kind = draw(st.sampled_from(["none", "length", "chunked"]))
    raw = f"{method} {path} HTTP/1.1\r\nHost: a\r\nX: {field}\r\n".encode()
    if kind == "length":
        raw += b"Content-Length: %d\r\n\r\n" % len(body) + body
    elif kind == "chunked":
        raw += b"Transfer-Encoding: chunked\r\n\r\n"
        for piece in filter(None, cut(body, draw(st.lists(st.integers(0, 60), max_size=4)))):
            raw += b"%x;e=1\r\n%b\r\n" % (len(piece), piece)
        raw += b"0\r\n" + draw(st.sampled_from([b"", b"X: trailer\r\n"])) + b"\r\n"
    else:
        raw, body = raw + b"\r\n", b""
    blank = draw(st.sampled_from([b"", b"", b"\r\n", b"\r\n\r\n"]))
    return Sent(blank + raw, (method, path, field, body.decode("latin-1")), kind == "chunked")


@settings(deadline=None, max_examples=400)
@given(st.lists(requests(), min_size=1, max_size=5), st.lists(st.integers(0, 2000), max_size=8))
def test_splitting_the_bytes_does_not_change_the_requests(sent: list[Sent], places: list[int]) -> None:
    whole = b"".join(request.raw for request in sent)
    transport = asyncio.run(exchange(cut(whole, places)))
    found = answers(transport.written)
    assert {status for status, _, _ in found} == {200}
    seen = [tuple(json.loads(body)) for _, body, _ in found]
    assert seen == [request.seen for request in sent[: len(found)]]
    if len(found) < len(sent):  # the connection may end only after a chunked body, if a request follows it
        assert sent[len(found) - 1].chunked
        assert transport.closing or transport.ended


@settings(deadline=None, max_examples=200)
@given(st.lists(requests(), min_size=1, max_size=4))
def test_requests_may_arrive_byte_by_byte(sent: list[Sent]) -> None:
    """No bytes of a next request arrive with the end of a request, so each request gets its answer."""
    whole = b"".join(request.raw for request in sent)
    transport = asyncio.run(exchange([whole[at : at + 1] for at in range(len(whole))]))
    assert [tuple(json.loads(body)) for _, body, _ in answers(transport.written)] == [request.seen for request in sent]


WORDS = [
    *(
        b"GET / HTTP/1.1\r\n",
        b"POST /a HTTP/1.1\r\n",
        b"Host: a\r\n",
        b"Content-Length: 5\r\n",
        b"Content-Length: 0\r\n",
    ),
    *(b"Transfer-Encoding: chunked\r\n", b"Connection: upgrade\r\n", b"Upgrade: b\r\n", b"Connection: close\r\n"),
    *(
        b"Expect: 100-continue\r\n",
        b"\r\n",
        b"\n",
        b"\r",
        b"0\r\n\r\n",
        b"5\r\nabcde\r\n",
        b"5;",
        b"\0",
        b"\xff",
        b":",
        b" ",
    ),
]


@settings(deadline=None, max_examples=1000)
@given(st.lists(st.lists(st.sampled_from(WORDS) | st.binary(max_size=8), max_size=12).map(b"".join), max_size=6))
def test_any_bytes_use_little_memory_and_a_refusal_is_the_last_answer(pieces: list[bytes]) -> None:
    """Each answer is whole. Only the last one may be a refusal, and the connection ends after it."""
    largest = max(map(len, pieces), default=0)

    def check(protocol: LimitedProtocol) -> None:
        assert len(protocol.held) <= largest

    transport = asyncio.run(exchange([piece for piece in pieces if piece], check))
    written = transport.written.replace(b"HTTP/1.1 100 Continue\r\n\r\n", b"")
    found = answers(written)
    for status, body, ends in found[:-1]:
        assert (status, ends) == (200, False), body
    if found and found[-1][0] != 200:
        assert found[-1][2]
        assert json.loads(found[-1][1])["status"] == found[-1][0]
    if found and found[-1][2]:
        assert transport.closing or transport.ended


def test_the_parser_gets_no_bytes_beyond_the_limits(monkeypatch) -> None:
    """The parser gets no byte of a head beyond the limit, however the bytes are split."""
    fed = 0
    parse = LimitedProtocol._parse

    def count(self: LimitedProtocol, data: bytes) -> None:
        nonlocal fed
        fed += len(data)
        parse(self, data)

    monkeypatch.setattr(LimitedProtocol, "_parse", count)
    for size in (1000, 4096, 100_000):
        fed = 0
        head = b"GET / HTTP/1.1\r\nHost: a\r\nX: "
        transport = asyncio.run(exchange([head, *[b"a" * size] * 100]))
        assert answers(transport.written)[0][0] == 431
        assert fed <= request_head.MAX_HEAD


def said(status: int, headers: list[tuple[bytes, bytes]], *parts: bytes, method: str = "GET") -> bytes:
    """Return the bytes that the server writes for an answer of the application."""

    async def app(_scope: Any, _receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": status, "headers": headers})
        for at, part in enumerate(parts, 1):
            await send({"type": "http.response.body", "body": part, "more_body": at < len(parts)})

    return asyncio.run(exchange([method.encode() + b" / HTTP/1.1\r\nHost: a\r\n\r\n"], app=app)).written


LENGTH = (b"content-length", b"3")


def test_an_answer_is_written_as_http_specifies():
    assert said(200, [LENGTH, (b"etag", b"e")], b"abc") == b"HTTP/1.1 200 OK\r\ncontent-length: 3\r\netag: e\r\n\r\nabc"
    assert said(200, [LENGTH], b"abc", method="HEAD") == b"HTTP/1.1 200 OK\r\ncontent-length: 3\r\n\r\n"
    assert said(204, [], b"") == b"HTTP/1.1 204 No Content\r\n\r\n"
    assert said(304, [(b"etag", b"e")], b"") == b"HTTP/1.1 304 Not Modified\r\netag: e\r\n\r\n"
    assert said(200, [LENGTH], b"a", b"bc") == b"HTTP/1.1 200 OK\r\ncontent-length: 3\r\n\r\nabc"
    chunked = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n"
    assert said(200, [], b"abc") == said(200, [], b"abc", b"") == chunked
    closing = b"HTTP/1.1 200 OK\r\ncontent-length: 3\r\nconnection: close\r\n\r\nabc"
    assert said(200, [LENGTH, (b"connection", b"close")], b"abc") == closing
    large = b"x" * 100_000
    assert said(200, [(b"content-length", b"100000")], large).endswith(b"\r\n\r\n" + large)


@pytest.mark.parametrize(
    "headers",
    [
        [LENGTH, (b"x", b"a\r\nset-cookie: b")],
        [LENGTH, (b"x", b"a\nset-cookie: b")],
        [LENGTH, (b"x", b"a\rset-cookie: b")],
        [LENGTH, (b"x: a\r\nset-cookie", b"b")],
        [(b"content-length", b"4")],
        [(b"content-length", b"2")],
    ],
)
def test_an_invalid_header_or_wrong_length_is_not_written(headers, caplog):
    written = said(200, headers, b"abc")
    assert b"set-cookie" not in written
    assert "Exception in ASGI application" in caplog.text
