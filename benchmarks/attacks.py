"""How long others wait while one client asks for what costs most: `python -m benchmarks.attacks [NAME ...]`.

A server with everything in memory; one process attacks it, another asks for `/healthz` and creates articles meanwhile.
Written are the worst times that these others waited, and by how much the server's memory grew.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import urlsplit

import httpx

SECONDS = 4.0
JSON_PATCH = {"content-type": "application/json-patch+json"}
OBJECTS = b'{"title":"t","content":"c","author":"a","x":[' + b'{"a":1},' * 89_999 + b"{}]}"
TEXT = "x" * 125_000


def doubling(count: int = 22) -> bytes:
    first = {"op": "add", "path": "/content", "value": ["x"]}
    return json.dumps(
        [first, *({"op": "copy", "from": "/content", "path": "/content/-"} for _ in range(count))]
    ).encode()


def in_front(count: int) -> bytes:
    first = {"op": "add", "path": "/content", "value": []}
    return json.dumps([first, *({"op": "add", "path": "/content/0", "value": 0} for _ in range(count))]).encode()


def patched(body: bytes) -> Callable[[httpx.Client], None]:
    return lambda client: client.patch("/article/sun", content=body, headers=JSON_PATCH).read()


def posted(body: bytes) -> Callable[[httpx.Client], None]:
    return lambda client: client.post("/article", content=body, headers={"content-type": "application/json"}).read()


def got(path: str, **headers: str) -> Callable[[httpx.Client], None]:
    return lambda client: client.get(path, headers=headers).read()


def fifty(method: str, path: str, body: bytes, content_type: str) -> Callable[[httpx.Client], None]:
    """Send one request on each of fifty connections at once, with sockets: fifty clients would need the cores."""

    def run(client: httpx.Client) -> None:
        head = (
            f"{method} {path} HTTP/1.1\r\nHost: 127.0.0.1\r\n"
            f"Content-Type: {content_type}\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        with contextlib.ExitStack() as stack:
            address = (client.base_url.host, client.base_url.port)
            sockets = [stack.enter_context(socket.create_connection(address, timeout=60)) for _ in range(50)]
            for one in sockets:
                one.sendall(head.encode() + body)
            for one in sockets:
                one.recv(4096)

    return run


def endless_header(client: httpx.Client) -> None:
    with socket.create_connection((client.base_url.host, client.base_url.port), timeout=10) as connection:
        connection.sendall(b"GET /healthz HTTP/1.1\r\nHost: 127.0.0.1\r\nX: ")
        until = time.monotonic() + SECONDS
        while time.monotonic() < until:
            connection.sendall(b"x" * 1_000_000)


def many_headers(client: httpx.Client) -> None:
    with socket.create_connection((client.base_url.host, client.base_url.port), timeout=10) as connection:
        connection.sendall(b"GET /healthz HTTP/1.1\r\nHost: 127.0.0.1\r\n")
        until = time.monotonic() + SECONDS
        while time.monotonic() < until:
            connection.sendall(b"X-Y: z\r\n" * 100_000)


def titles(count: int) -> str:
    return ",".join(f"t{number}" for number in range(count))


ATTACKS: dict[str, Callable[[httpx.Client], None]] = {
    "nothing": lambda _: time.sleep(0.2),  # what the rest is compared with
    "endless header": endless_header,
    "endless headers": many_headers,
    "22 doublings": patched(doubling()),
    "9,900 times in front": patched(in_front(9_900)),
    "100,000 times in front": patched(in_front(100_000)),
    "10,000 copies of the whole": patched(
        json.dumps([{"op": "copy", "from": "", "path": "/content"}] * 10_000).encode()
    ),
    "If-None-Match of 512 KB": got("/article/sun", **{"if-none-match": ",".join(['"1-0"'] * 87_000)}),
    "If-Match of 512 KB": lambda client: client.delete(
        "/article/sun", headers={"if-match": ",".join(['"1-0123456789abcdef"'] * 26_000)}
    ).read(),
    "diff of shuffled items": got("/list/shuffled/diff?from=1&to=2"),
    "contains with 30 KB": got("/article?author[contains]=" + "x" * 29_999 + "y"),
    "contains with 1 KB": got("/article?author[contains]=" + "x" * 999 + "y"),
    "1,000 values of a condition": got("/article?" + "&".join(["author[in]=" + titles(20)] * 50)),
    "2,000,000 objects": posted(b'{"title":"t","content":"c","author":"a","x":[' + b"{}," * 1_999_999 + b"{}]}"),
    "90,000 objects": posted(OBJECTS),
    "3,000,000 numbers": posted(b'{"title":"t","content":"c","author":"a","x":[' + b"1," * 2_999_999 + b"1]}"),
    "nested 3,000,000 deep": posted(b'{"title":' + b"[" * 3_000_000 + b"]" * 3_000_000 + b"}"),
    "700,000 unknown fields": posted(b"{" + b",".join(b'"%x":1' % number for number in range(600_000)) + b"}"),
    "merge patch of 6 MB": lambda client: client.patch("/article/sun", json={"content": '\\"' * 1_900_000}).read(),
    "50 x 22 doublings": fifty("PATCH", "/article/sun", doubling(), JSON_PATCH["content-type"]),
    "50 x 9,900 in front": fifty("PATCH", "/article/sun", in_front(9_900), JSON_PATCH["content-type"]),
    "50 x 90,000 objects": fifty("POST", "/article", OBJECTS, "application/json"),
}


def main() -> None:
    names = sys.argv[1:] or list(ATTACKS)
    print(f"{'attack':32} {'healthz, worst':>15} {'create, worst':>15} {'memory':>10} {'rounds':>7}", flush=True)
    for name in names:
        with served() as (url, pid):
            prepare(url)
            before = resident_mb(pid)
            health, create, peak, rounds = measured(url, pid, name)
            print(
                f"{name:32} {health * 1e3:12.0f} ms {create * 1e3:12.0f} ms {peak - before:7.0f} MB {rounds:7d}",
                flush=True,
            )


@contextlib.contextmanager
def served() -> Iterator[tuple[str, int]]:
    """A server of its own; gives its URL and its pid."""
    with tempfile.TemporaryDirectory() as directory:
        environment = {name: value for name, value in os.environ.items() if not name.startswith("CRUDSTACK_")}
        environment |= {"CRUDSTACK_STORAGE": "memory", "CRUDSTACK_DATA_DIR": directory}
        code = (
            "from app import models\nfrom msgspec import Struct\n"
            "class List(Struct):\n    items: list[str]\n"
            "own = models.register\n"
            "def register(crud):\n    own(crud)\n    crud.add_model(List)\n"
            "models.register = register\nfrom app.cli import main\nmain()"
        )
        process = subprocess.Popen(
            [sys.executable, "-c", code, "serve", "--port", "0"],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        assert process.stdout is not None
        try:
            for line in process.stdout:
                if line.startswith("docs at "):
                    yield line.removeprefix("docs at ").partition("/docs")[0], process.pid
                    return
        finally:
            process.send_signal(signal.SIGKILL)
            process.wait()
            process.stdout.close()


def prepare(url: str) -> None:
    made = {"if-none-match": "*"}
    items = [f"item {number}" for number in range(24_000)]
    with httpx.Client(base_url=url, timeout=60) as client:
        article = {"title": "t", "content": "c", "author": "a"}
        client.put("/article/sun", json=article, headers=made).raise_for_status()
        for at in range(40):
            client.put(f"/article/long{at}", json=article | {"author": TEXT}, headers=made).raise_for_status()
        client.put("/list/shuffled", json={"items": items}, headers=made).raise_for_status()
        client.put("/list/shuffled", json={"items": sorted(items, key=hash)}).raise_for_status()


def measured(url: str, pid: int, name: str) -> tuple[float, float, float, int]:
    """Worst times of others in seconds, the most memory in MB, and how often the attack was finished."""
    context = multiprocessing.get_context("fork")
    rounds = context.Value("i", 0)
    attacker = context.Process(target=attack, args=(url, name, rounds))
    waits = context.Array("d", 2)
    asks = context.Process(target=probe, args=(url, waits))
    asks.start()
    time.sleep(0.5)
    waits[0] = waits[1] = 0
    attacker.start()
    peak, until = resident_mb(pid), time.monotonic() + SECONDS
    while time.monotonic() < until:
        peak = max(peak, resident_mb(pid))
        time.sleep(0.02)
    attacker.kill()
    attacker.join()
    time.sleep(0.3)
    asks.kill()
    asks.join()
    return waits[0], waits[1], peak, rounds.value


def attack(url: str, name: str, rounds: object) -> None:
    with httpx.Client(base_url=url, timeout=120) as client:
        while True:
            with contextlib.suppress(httpx.HTTPError, OSError):
                ATTACKS[name](client)
            rounds.value += 1  # type: ignore[attr-defined]


def probe(url: str, waits: object) -> None:
    """Ask and create in turn; an answer that has not come yet counts with the time that it has taken so far."""
    parts = urlsplit(url)

    def ask(at: int, request: bytes) -> None:
        began = time.monotonic()
        with socket.create_connection((parts.hostname, parts.port), timeout=0.05) as connection:
            connection.sendall(request)
            while True:
                with contextlib.suppress(TimeoutError):
                    if re.match(rb"HTTP/1.1 20[01]", connection.recv(4096)) is None:
                        waits[at] = float("inf")  # type: ignore[index]
                    break
                waits[at] = max(waits[at], time.monotonic() - began)  # type: ignore[index]
        waits[at] = max(waits[at], time.monotonic() - began)  # type: ignore[index]

    body = b'{"title":"t","content":"c","author":"a"}'
    create = (
        b"POST /article HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%b"
    )
    while True:
        with contextlib.suppress(OSError):
            ask(0, b"GET /healthz HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
            ask(1, create % (len(body), body))
        time.sleep(0.005)


def resident_mb(pid: int) -> float:
    found = re.search(r"VmRSS:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())
    return int(found[1]) / 1024 if found else 0.0


if __name__ == "__main__":
    main()
