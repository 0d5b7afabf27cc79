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
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import msgspec
from rich.console import Console
from rich.markdown import Markdown
from rich.progress import Progress

from app.dev.local_s3 import ministack
from infra import artifact

from . import backends, connections, report, s3
from .load import measure, on_first_core, require_wrk
from .peers import POCKETBASE, ROOT, ROWS, SPECSTAR, Floor, Ours, Peer, PocketBase, Specstar
from .report import Cell

PARTS = ("cold", "lambda", "engine", "memory", "disk", "s3", "backends", "connections")
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
    if {"memory", "disk", "connections"} & set(options.parts):
        require_wrk()
    if not (SPECSTAR.exists() and POCKETBASE.exists()):
        sys.exit("the peers are not installed: run `make bench`")
    sections = [_header()]
    with Progress(console=Console(stderr=True)) as progress:
        if "cold" in options.parts:
            sections += cold_starts(progress, options.rounds)
        if "lambda" in options.parts:
            sections += on_lambda(progress)
        if "engine" in options.parts:
            for kind in ("memory", "disk"):
                sections += engines(progress, kind, options.rounds)
        for kind in ("memory", "disk"):
            if kind in options.parts:
                sections += over_http(progress, kind, options.rows, options.rounds, options.seconds)
        if "s3" in options.parts:
            sections += s3.sections(progress, 2.0 * options.seconds, options.sizes, SPECSTAR)
        if "backends" in options.parts:
            sections += backends.sections(progress, options.rounds, SPECSTAR)
        if "connections" in options.parts:
            sections += connections.sections(progress, options.rounds, PORT)
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
        "All peers store JSON and hold the same 10,000 articles; the peers of a table took turns in one run. Figures\n"
        "are the median CPU microseconds of the server for a request, and requests per second. The columns with a\n"
        "slash are ratios: the peer's CPU time by ours. Written by `make bench`.\n"
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
        """Check that responses contain the newest writes."""
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
    """Milliseconds until the first answer, Python's own start included."""
    ours, theirs = sys.executable, str(SPECSTAR)
    peers = {
        "crudstack s3-sqlite": (ours, "crudstack", "s3-sqlite"),
        "handler s3-sqlite": (ours, "handler", "s3-sqlite"),
        "crudstack disk": (ours, "crudstack", "disk"),
        "crudstack memory": (ours, "crudstack", "memory"),
        "with boto3": (ours, "boto3", "s3-sqlite"),
        "specstar S3": (theirs, "specstar", "s3-sqlite"),
        "specstar memory": (theirs, "specstar", "memory"),
        "import fastapi": (ours, "fastapi", "-"),
    }
    cpu, wall = ({f"{models} models": {name: Cell([], []) for name in peers} for models in (5, 30)} for _ in range(2))
    with tempfile.TemporaryDirectory() as s3_directory, ministack(Path(s3_directory)) as url:
        httpx.put(f"{url}/bench").raise_for_status()
        for at in progress.track(range(rounds + 1), description="cold starts"):
            for models in (5, 30):
                for name, (python, who, kind) in peers.items():
                    with tempfile.TemporaryDirectory() as directory:
                        place = url if kind == "s3-sqlite" else directory
                        command = [python, "benchmarks/scripts/cold.py", who, kind, str(models), place]
                        took = msgspec.json.decode(_output([*command, str(time.time())]), type=tuple[float, float])
                    if at:  # the first round warms the bytecode, and makes the stores
                        cpu[f"{models} models"][name].cpu.append(took[0])
                        wall[f"{models} models"][name].cpu.append(took[1])
    first, names = "crudstack s3-sqlite", list(peers)
    note = (
        "of a fresh process: start of Python, import, app, first request. S3 is ministack on this machine; the stores"
        " exist already."
    )
    return [
        report.markdown("Cold start, CPU", f"CPU milliseconds {note}", cpu, first, names),
        report.raw("Cold start, CPU", cpu),
        report.markdown("Cold start, wall", f"Milliseconds {note}", wall, first, names),
        report.raw("Cold start, wall", wall),
    ]


def on_lambda(progress: Progress) -> list[str]:
    """Measure what the handler adds to the app, and list the contents of the zip."""
    task = progress.add_task("lambda", total=2)
    warm = msgspec.json.decode(
        _output([sys.executable, "-m", "benchmarks.scripts.lambda_warm"]), type=dict[str, tuple[float, float]]
    )
    progress.advance(task)
    table = {
        name: {"handler": Cell([handler], []), "bare ASGI app": Cell([bare], [])}
        for name, (bare, handler) in warm.items()
    }
    note = (
        "CPU microseconds of a warm call, on a storage in memory: the app alone, and from an event to a response"
        " (Mangum, checks, the log line)."
    )
    with tempfile.TemporaryDirectory() as directory:
        built = artifact.build(Path(directory) / "lambda.zip")
        contents = _without_path(artifact.report(built))
        size = f"## The zip\n\nFor Lambda (arm64, Python 3.13), in bytes.\n\n```\n{contents}\n```\n"
    progress.advance(task)
    return [
        report.markdown("Warm on Lambda", note, table, "handler", ["handler", "bare ASGI app"]),
        report.raw("Warm on Lambda", table),
        size,
        "",
    ]


def _without_path(text: str) -> str:
    return "\n".join(line for line in text.splitlines() if "sha256" not in line and "dist-info" not in line)


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
