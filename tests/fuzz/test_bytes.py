"""For any bytes, the server answers in HTTP or closes the connection. No error, no lost data, no other client waits.

`make fuzz` runs this for longer. A failure names the number of its request, and the smallest part of it that fails too.
"""

from __future__ import annotations

import json
import os
import random
import re
import socket
import time
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import pytest

from .requests import request, smaller

SECONDS = float(os.environ.get("FUZZ_SECONDS", "30"))
SEED = int(os.environ.get("FUZZ_SEED", "17"))
QUIET_S = 0.15
"""Seconds of silence after which the server counts as waiting for the rest of a request."""
HANGS_S = 20.0
ARTICLE = {"title": "Sun", "content": "It shines.", "author": "alice"}
KEPT = {"username": "keep", "email": "keep@example.org"}
STATUS = re.compile(rb"HTTP/1\.[01] (\d{3})[ \r]")
REFUSED = frozenset({501, 503, 505})
"""Statuses from 500 on that are no error of the server: unknown methods and versions, and overload."""


class Fault(Exception):
    """A response that no request may get."""


def answers(url: str, sent: bytes) -> list[int]:
    """Send bytes on a new connection, and return the statuses of all responses. Raises Fault."""
    parts = urlsplit(url)
    with socket.create_connection((parts.hostname, parts.port), timeout=HANGS_S) as connection:
        received = b""
        try:
            connection.sendall(sent)
            connection.settimeout(QUIET_S)
            while piece := connection.recv(1 << 20):
                received += piece
        except TimeoutError:
            pass
        except (ConnectionResetError, BrokenPipeError):
            return []  # it was closed on us, with what was still under way
    return _statuses(received)


def _statuses(received: bytes) -> list[int]:
    found = []
    while received:
        head, end, rest = received.partition(b"\r\n\r\n")
        match = STATUS.match(head)
        if match is None or not end:
            raise Fault(f"this is no answer: {received[:200]!r}")
        status = int(match[1])
        found.append(status)
        if status >= 500 and status not in REFUSED:
            raise Fault(f"answered {status}: {received[:400]!r}")
        if b"Traceback" in rest:
            raise Fault(f"a traceback: {rest[:400]!r}")
        length = re.search(rb"(?i)\r\ncontent-length: (\d+)", head)
        if length is None:
            if status >= 200 and status not in (204, 304) and rest:
                return found  # up to the end of the connection
            received = rest
            continue
        size = int(length[1])
        if STATUS.match(rest):  # of a HEAD, which has no body
            size = 0
        body = rest[:size]
        if status >= 400 and body and len(body) == size:
            _check_problem(head, body)
        received = rest[size:]
    return found


def _check_problem(head: bytes, body: bytes) -> None:
    if not re.search(rb"(?i)\r\ncontent-type: application/problem\+json", head):
        raise Fault(f"an error that is no problem detail: {head + body[:200]!r}")
    problem = json.loads(body)
    if not {"type", "title", "status", "detail"} <= problem.keys():
        raise Fault(f"an incomplete problem detail: {problem}")


def fails(url: str, sent: bytes) -> str | None:
    try:
        answers(url, sent)
    except Fault as fault:
        return str(fault)
    return None


def smallest(url: str, sent: bytes) -> bytes:
    """Return the smallest part of a request that still fails; tries a limited number of parts."""
    tries = 600
    while True:
        for candidate in smaller(sent):
            tries -= 1
            if tries < 0:
                return sent
            if fails(url, candidate):
                sent = candidate
                break
        else:
            return sent


def restore(client: httpx.Client) -> None:
    """Create the resources that requests name, if earlier requests removed them."""
    for name in ("sun", "moon"):
        answer = client.put(f"/article/{name}", json=ARTICLE, headers={"if-none-match": "*"})
        if answer.status_code == 412:  # there is one, deleted perhaps
            assert client.post(f"/article/{name}/restore").status_code == 200


def open_files(pid: int) -> int:
    return len(list(Path(f"/proc/{pid}/fd").iterdir()))


def resident_mb(pid: int) -> float:
    found = re.search(r"VmRSS:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())
    return int(found[1]) / 1024


@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_any_bytes_leave_the_server_healthy(serve, tmp_path, capfd):
    server = serve("memory", tmp_path)
    seeds = random.Random(SEED)
    statuses: dict[int, int] = {}
    count = 0
    with httpx.Client(base_url=server.url, timeout=HANGS_S) as other:
        assert other.put("/user/keep", json=KEPT, headers={"if-none-match": "*"}).status_code == 201
        restore(other)
        files, memory = open_files(server.process.pid), resident_mb(server.process.pid)
        until = time.monotonic() + SECONDS
        while time.monotonic() < until:
            number = seeds.randrange(2**48)
            sent = request(number)
            count += 1
            try:
                for status in answers(server.url, sent):
                    statuses[status] = statuses.get(status, 0) + 1
            except Fault as fault:
                part = smallest(server.url, sent)
                pytest.fail(
                    f"request {number}: {fault}\nthe smallest that fails too: {part!r}: {fails(server.url, part)}"
                )
            if count % 50 == 0:
                assert other.get("/healthz").status_code == 200
                restore(other)
        assert other.get("/user/keep/data").json() == KEPT
        left = open_files(server.process.pid) - files
        grown = resident_mb(server.process.pid) - memory
    said = capfd.readouterr().err
    assert server.process.poll() is None
    assert "Traceback" not in said, said[-3000:]
    assert left <= 5
    assert grown < 200
    # What is sent is not only nonsense: each kind of answer is among them.
    assert {200, 201, 204, 400, 404, 405, 422} <= statuses.keys(), statuses
    print(f"{count} requests, answered {dict(sorted(statuses.items()))}")
