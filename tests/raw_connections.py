"""Raw connections to a server: send any bytes, read one answer, and measure the server's memory and open files."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
from collections.abc import AsyncIterator
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit

import httpx

from tests.conftest import Server

MB = 1024 * 1024
HANGS_S = 90
"""Seconds after which a test fails because an expected event did not happen."""
HOST = b"Host: localhost\r\n"
POST = b"POST /article HTTP/1.1\r\n" + HOST + b"Content-Type: application/json\r\n"
CHUNKED = POST + b"Transfer-Encoding: chunked\r\n\r\n"
HEALTH = b"GET /healthz HTTP/1.1\r\n" + HOST + b"\r\n"
GET = b"GET /healthz HTTP/1.1\r\n" + HOST
BODY = b'{"title":"t","content":"c","author":"a"}'


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
    """Wait for the end of the connection. Fails if more bytes arrive."""
    async with asyncio.timeout(HANGS_S):
        with contextlib.suppress(ConnectionResetError):
            assert await reader.read() == b""


async def asked(served: Server, sent: bytes) -> Answer:
    """Send these bytes and return the only answer. Fails if the connection stays open."""
    async with connected(served) as (reader, writer):
        writer.write(sent)
        answer = await next_answer(reader)
        assert answer.headers["connection"] == "close"
        await ended(reader)
    return answer


def resident(served: Server) -> int:
    """Return the resident memory of the server, in bytes."""
    pages = int(Path(f"/proc/{served.process.pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def files(served: Server) -> int:
    return len(list(Path(f"/proc/{served.process.pid}/fd").iterdir()))


async def back_to(before: int, served: Server) -> None:
    """Wait until the server has no more open files than `before`."""
    async with asyncio.timeout(HANGS_S):
        while files(served) > before:
            await asyncio.sleep(0.05)


def is_alive(served: Server) -> bool:
    return httpx.get(f"{served.url}/healthz", timeout=HANGS_S).status_code == 200
