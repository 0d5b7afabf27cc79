"""`python -m benchmarks`: run everything and write benchmarks/RESULTS.md."""

from __future__ import annotations

import argparse
import contextlib
import datetime as dt
import importlib.metadata
import os
import platform
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import httpx
import msgspec
from rich.console import Console
from rich.markdown import Markdown
from rich.progress import Progress

from . import report, s3
from .load import measure, on_first_core, require_wrk
from .peers import POCKETBASE, ROOT, ROWS, SPECSTAR, Floor, Ours, Peer, PocketBase, Specstar
from .report import Cell

PARTS = ("cold", "engine", "memory", "disk", "s3")
PORT = 18_100


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="what to run (all)")
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=ROWS, help="which rows over HTTP (all)")
    parser.add_argument("--rounds", type=int, default=5, help="how often everything runs in turn (5)")
    parser.add_argument("--seconds", type=int, default=1, help="how long a row of a peer runs in a round (1)")
    parser.add_argument("--sizes", type=int, nargs="+", default=[1000, 10_000, 100_000, 1_000_000], help="for s3")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks/RESULTS.md", help="where to write")
    options = parser.parse_args()
    require_wrk()
    if not (SPECSTAR.exists() and POCKETBASE.exists()):
        sys.exit("the peers are not installed: run `make bench`")
    sections = [_header()]
    with Progress(console=Console(stderr=True)) as progress:
        if "cold" in options.parts:
            sections += cold_starts(progress, options.rounds)
        if "engine" in options.parts:
            for kind in ("memory", "disk"):
                sections += engines(progress, kind, options.rounds)
        for kind in ("memory", "disk"):
            if kind in options.parts:
                sections += over_http(progress, kind, options.rows, options.rounds, options.seconds)
        if "s3" in options.parts:
            sections += s3.sections(progress, 2.0 * options.seconds, options.sizes, SPECSTAR)
    tables, rounds = sections[1::2], sections[2::2]
    Console(width=160).print(Markdown("\n".join([sections[0], *tables])))
    options.results.write_text("\n".join([sections[0], *tables, "## Raw numbers\n", *rounds]))


def _header() -> str:
    model = next((line for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line), ": unknown")
    versions = [f"{name} {importlib.metadata.version(name)}" for name in ("fastapi", "msgspec", "apsw", "uvicorn")]
    return (
        "# Results\n\n"
        f"{dt.datetime.now(dt.UTC):%Y-%m-%d %H:%M} UTC, Python {platform.python_version()}, {', '.join(versions)},"
        " specstar 0.12.3, PocketBase 0.40. "
        f"{os.cpu_count()} cores of {model.partition(':')[2].strip()}; the server has one, wrk the other.\n\n"
        "Everyone stores JSON and holds the same 10,000 articles; all peers of a table ran in turn in one run. Figures are the median CPU"
        " microseconds of the server for a request, and requests a second; the columns with a slash say how many times as much the"
        " peer needs. Made by `make bench`.\n"
    )


def over_http(progress: Progress, kind: str, rows: list[str], rounds: int, seconds: int) -> list[str]:
    """Every row against every peer, in turn."""
    with tempfile.TemporaryDirectory() as directory, contextlib.ExitStack() as stack:
        root = Path(directory)
        ours = Ours(kind, root / "ours", PORT)
        floor = Floor(ours, root / "floor", PORT + 1)
        peers: list[Peer] = [ours, floor, Specstar(kind, root / "specstar", PORT + 2)]
        if kind == "disk":
            peers.append(PocketBase(root / "pocketbase", PORT + 3))
        loading = progress.add_task(f"{kind}: loading", total=len(peers))
        for peer in peers:
            peer.start()
            stack.callback(peer.stop)
            peer.load()
            progress.advance(loading)
        floor.check()
        table = {row: {peer.name: Cell([], []) for peer in peers} for row in rows}
        task = progress.add_task(f"{kind}: over HTTP", total=rounds * len(rows) * len(peers))
        writer = stack.enter_context(second_writer(ours)) if kind == "disk" else None
        for _ in range(rounds):
            for row in rows:
                for peer in peers:
                    sample = measure(peer.url, peer.process.pid, peer.requests()[row], seconds)
                    cell = table[row][peer.name]
                    cell.cpu.append(sample.cpu_us)
                    cell.per_second.append(sample.per_second)
                    table[row][peer.name] = cell._replace(failed=cell.failed + sample.failed)
                    progress.advance(task)
                if writer is not None:
                    writer.check()
    note = "What an answered write survives: " + ", ".join(f"{peer.name} {peer.durability}" for peer in peers) + "."
    if writer is not None:
        note += (
            f" Another process wrote {writer.written} articles to our directory meanwhile, and each was seen at once."
        )
    title = f"Over HTTP, {kind}"
    return [report.markdown(title, note, table, ours.name, [peer.name for peer in peers]), report.raw(title, table)]


class SecondWriter:
    """Writes to our directory while it is measured, from another process."""

    def __init__(self, ours: Ours) -> None:
        self.ours, self.written, self.last = ours, 0, ""
        command = [sys.executable, "-m", "benchmarks.scripts.second_writer", str(ours.directory)]
        self.process = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self._ended = threading.Event()
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._write)
        self._thread.start()

    def _write(self) -> None:
        while not self._ended.wait(0.2):
            with self._lock:
                self.write()

    def write(self) -> None:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(f"{self.written}\n")
        self.process.stdin.flush()
        self.last = self.process.stdout.readline().strip()
        self.written += 1

    def check(self) -> None:
        """What was written a moment ago must be in the answers now."""
        with self._lock:
            self.write()
            got = httpx.get(f"{self.ours.url}/article/{self.last}")
            counted = httpx.get(f"{self.ours.url}/article/count?author=second").json()["count"]
        if got.status_code != 200 or counted != self.written:
            raise RuntimeError(
                f"another process wrote {self.written} articles, crudstack shows {counted}: a stale answer"
            )

    def end(self) -> None:
        self._ended.set()
        self._thread.join()
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


@contextlib.contextmanager
def second_writer(ours: Ours) -> Iterator[SecondWriter]:
    writer = SecondWriter(ours)
    try:
        yield writer
    finally:
        writer.end()


def engines(progress: Progress, kind: str, rounds: int) -> list[str]:
    """The engines without HTTP."""
    scripts = {
        "crudstack": [sys.executable, "-m", "benchmarks.scripts.engine_ours"],
        "specstar": [str(SPECSTAR), "benchmarks/scripts/engine_specstar.py"],
    }
    table: dict[str, dict[str, Cell]] = {}
    for _ in progress.track(range(rounds), description=f"{kind}: engines without HTTP"):
        for name, command in scripts.items():
            with tempfile.TemporaryDirectory() as directory:
                for row, cpu in msgspec.json.decode(
                    _output([*command, kind, directory]), type=dict[str, float]
                ).items():
                    table.setdefault(row, {}).setdefault(name, Cell([], [])).cpu.append(cpu)
    title = f"Without HTTP, {kind}"
    note = "CPU microseconds of one call, one after the other, data decoded."
    return [report.markdown(title, note, table, "crudstack", list(scripts)), report.raw(title, table)]


def cold_starts(progress: Progress, rounds: int) -> list[str]:
    """CPU milliseconds until the first answer, Python's own start included."""
    ours, theirs = sys.executable, str(SPECSTAR)
    cases = {
        "5 models": {
            "crudstack disk": (ours, "crudstack", "disk", 5),
            "crudstack memory": (ours, "crudstack", "memory", 5),
            "specstar memory": (theirs, "specstar", "memory", 5),
            "import fastapi": (ours, "fastapi", "-", 0),
        },
        "30 models": {
            "crudstack disk": (ours, "crudstack", "disk", 30),
            "crudstack memory": (ours, "crudstack", "memory", 30),
            "specstar memory": (theirs, "specstar", "memory", 30),
            "import fastapi": (ours, "fastapi", "-", 0),
        },
    }
    table = {row: {name: Cell([], []) for name in peers} for row, peers in cases.items()}
    for at in progress.track(range(rounds + 1), description="cold starts"):
        for row, peers in cases.items():
            for name, (python, who, kind, models) in peers.items():
                with tempfile.TemporaryDirectory() as directory:
                    took = float(_output([python, "benchmarks/scripts/cold.py", who, kind, str(models), directory]))
                if at:  # the first round only warms the bytecode
                    table[row][name].cpu.append(took)
    note = "CPU milliseconds of a fresh process: start of Python, import, app, first request through ASGI."
    names = list(cases["5 models"])
    return [report.markdown("Cold start", note, table, "crudstack disk", names), report.raw("Cold start", table)]


def _output(command: list[str]) -> str:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, preexec_fn=on_first_core
    )
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed: {done.stderr[-2000:]}")
    return done.stdout


if __name__ == "__main__":
    main()
