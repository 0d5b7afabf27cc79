"""wrk against a server: requests a second, and the CPU time of the server for each.

The server is pinned to one core and wrk to another. CPU time is what /proc says of the server's process (user and
system, all threads), so it stays the same where the machine is busy otherwise.
"""

from __future__ import annotations

import itertools
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

LUA = Path(__file__).parent / "load.lua"
CONNECTIONS = 16
TICKS = os.sysconf("SC_CLK_TCK")
_numbers = itertools.count(1_000_000, 10_000_000)


class Requests(NamedTuple):
    """The requests of wrk: a method, paths, and a body in which %d is replaced by a new number."""

    method: str
    paths: list[str]
    body: str = ""


class Sample(NamedTuple):
    per_second: float
    cpu_us: float
    failed: int


def require_wrk() -> None:
    if shutil.which("wrk") is None:
        print("wrk is missing: sudo apt-get install wrk", file=sys.stderr)
        sys.exit(2)


def on_first_core() -> None:
    os.sched_setaffinity(0, {0})


def on_last_core() -> None:
    os.sched_setaffinity(0, {(os.cpu_count() or 1) - 1})


def cpu_ticks(pid: int) -> int:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return int(fields[11]) + int(fields[12])


SLOW = 20
"""Requests per second below which a run takes longer and sends one request at a time.

The reason is that CPU time is counted in hundredths of a second, and unfinished requests are not counted at all.
"""


def measure(url: str, pid: int, requests: Requests, seconds: int) -> Sample:
    """One run of so many seconds, after a second to warm up."""
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as paths:
        paths.write("\n".join(requests.paths))
        paths.flush()
        connections = CONNECTIONS
        warm, warm_us, _, _ = _wrk(url, paths.name, requests, 1, connections)
        if warm / warm_us * 1e6 < SLOW:
            seconds, connections = max(seconds, 5), 1
        before = cpu_ticks(pid)
        done, duration_us, status, broken = _wrk(url, paths.name, requests, seconds, connections)
        ticks = cpu_ticks(pid) - before
    # A server that finished nothing has no figure.
    return Sample(done / duration_us * 1e6, ticks / TICKS * 1e6 / max(done, 1), status + broken + (done == 0))


def _wrk(url: str, paths: str, requests: Requests, seconds: int, connections: int) -> list[int]:
    command = ["wrk", "-t1", f"-c{connections}", f"-d{seconds}s", "--timeout", "10s", "-s", str(LUA), url]
    command += ["--", paths, requests.method, requests.body, str(next(_numbers))]
    said = subprocess.run(command, capture_output=True, text=True, check=True, preexec_fn=on_last_core)
    line = next((line for line in said.stdout.splitlines() if line.startswith("RESULT ")), None)
    if line is None:
        raise RuntimeError(f"wrk said nothing of its result: {said.stdout}{said.stderr}")
    return [int(number) for number in line.split()[1:]]
