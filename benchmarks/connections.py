"""The effect on other clients while one client attacks `crudstack serve`, and the cost of its limits.

The comparison is the same application on plain uvicorn.
"""

from __future__ import annotations

import asyncio
import contextlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import httpx
from rich.progress import Progress

from . import report
from .article import article
from .load import measure
from .peers import ROOT, Ours
from .report import Cell

SECONDS = 4
HOST = b"Host: localhost\r\n"
GET = b"GET /healthz HTTP/1.1\r\n" + HOST
LARGE = b"GET /article?limit=200 HTTP/1.1\r\n" + HOST + b"\r\n"
POST = b"POST /article HTTP/1.1\r\n" + HOST + b"Content-Type: application/json\r\n"
CHUNKED = POST + b"Transfer-Encoding: chunked\r\n\r\n"
ROWS = ("get", "list 20", "create")


class OnUvicorn(Ours):
    """The same application on uvicorn with httptools as it is."""

    name = "uvicorn"

    def command(self) -> list[str]:
        return [*super().command(), "uvicorn"]


async def _send(port: int, begins: bytes, repeated: bytes, pause: float) -> None:
    """Send without end. If the connection ends, begin again."""
    while True:
        with contextlib.suppress(OSError):
            _, writer = await asyncio.open_connection("127.0.0.1", port)
            try:
                writer.write(begins)
                while not writer.transport.is_closing():
                    writer.write(repeated)
                    await writer.drain()
                    await asyncio.sleep(pause)
            finally:
                writer.transport.abort()
        await asyncio.sleep(0.001)


def _flood(
    begins: bytes, repeated: bytes, clients: int = 1, pause: float = 0.0
) -> Callable[[int], Coroutine[Any, Any, Any]]:
    async def flood(port: int) -> None:
        await asyncio.gather(*(_send(port, begins, repeated, pause) for _ in range(clients)))

    return flood


ATTACKS = {
    "a header without end": _flood(GET + b"X: ", b"a" * 65_536),
    "headers without end": _flood(GET, b"a: b\r\n" * 10_000),
    "a request line without end": _flood(b"GET /", b"a" * 65_536),
    "trailers without end": _flood(CHUNKED + b"1\r\n \r\n0\r\n", b"a: b\r\n" * 10_000),
    "a chunk extension without end": _flood(CHUNKED + b"1;", b"a" * 65_536),
    "chunks of a byte": _flood(CHUNKED, b"1\r\n \r\n" * 10_000),
    "pipelined, never read": _flood(b"", LARGE * 100),
    "900 slow headers": _flood(GET + b"X: ", b"a", 900, 1.0),
    "2,000 slow bodies": _flood(POST + b"Content-Length: 9999\r\n\r\n{", b" ", 2000, 1.0),
    "500 clients that want a large page": _flood(LARGE, b"", 500, 1.0),
}


def _memory(pid: int) -> float:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * 4096 / 1e6


def _under(server: Ours, name: str) -> str:
    """The worst /healthz and create of another client meanwhile, and the memory."""
    before, most, failed = _memory(server.process.pid), 0.0, 0
    worst = {"GET": 0.0, "POST": 0.0}
    # A process of its own, which does not slow the other client down by its lock.
    attacker = subprocess.Popen([sys.executable, "-m", "benchmarks.connections", str(server.port), name], cwd=ROOT)
    try:
        until = time.monotonic() + SECONDS
        while time.monotonic() < until:
            for method, path in (("GET", "/healthz"), ("POST", "/article")):
                began = time.monotonic()
                try:
                    body = article(1) if method == "POST" else None
                    failed += not httpx.request(method, server.url + path, json=body, timeout=15).is_success
                except httpx.HTTPError:
                    failed += 1
                worst[method] = max(worst[method], time.monotonic() - began)
            most = max(most, _memory(server.process.pid) - before)
            time.sleep(0.02)
    finally:
        attacker.terminate()
        attacker.wait()
    refused = f", {failed} failed" if failed else ""
    return f"{worst['GET'] * 1e3:,.0f} ms / {worst['POST'] * 1e3:,.0f} ms / {most:,.0f} MB{refused}"


def sections(progress: Progress, rounds: int, port: int) -> list[str]:
    """The two tables, each with its raw numbers."""
    with tempfile.TemporaryDirectory() as directory, contextlib.ExitStack() as stack:
        peers = [kind("memory", Path(directory) / kind.name, port + at) for at, kind in enumerate((Ours, OnUvicorn))]
        for peer in peers:
            peer.start()
            stack.callback(peer.stop)
            peer.load()
        table = {row: {peer.name: Cell([], []) for peer in peers} for row in ROWS}
        for _ in progress.track(range(rounds), description="the cost of limits"):
            for row in ROWS:
                for peer in peers:
                    sample = measure(peer.url, peer.process.pid, peer.requests()[row], 1)
                    table[row][peer.name].cpu.append(sample.cpu_us)
                    table[row][peer.name].per_second.append(sample.per_second)
        lines = [
            f"| {name} | {' | '.join(_under(peer, name) for peer in peers)} |"
            for name in progress.track(ATTACKS, description="attacks")
        ]
    title = "The cost of limits on connections"
    note = "The same application, in memory, on `crudstack serve` and on uvicorn as it is."
    attacked = "\n".join(
        [
            "## Under attack",
            "",
            f"The longest /healthz and create of another client in {SECONDS} s of an attack, and the growth of memory.",
            "",
            f"| | {' | '.join(peer.name for peer in peers)} |",
            f"| --- {'| --- ' * len(peers)}|",
            *lines,
            "",
        ]
    )
    return [
        report.markdown(title, note, table, Ours.name, [peer.name for peer in peers]),
        report.raw(title, table),
        attacked,
        "",
    ]


if __name__ == "__main__":
    asyncio.run(ATTACKS[sys.argv[2]](int(sys.argv[1])))
