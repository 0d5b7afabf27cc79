"""S3-SQLite with injected latency of the storage, so that the machine does not matter: round trips, requests, bytes.

"20/10 ms": a PUT takes 20 ms and a GET 10 ms on average, with exponential jitter on top of a fixed half. A round trip
is that of a PUT.
"""

from __future__ import annotations

import asyncio
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import httpx
from msgspec import Struct
from rich.progress import Progress

from app.autocrud import AutoCRUD
from app.autocrud.errors import WriteContention
from app.autocrud.resource_manager.backends.s3.memory_object_store import Call, InjectedFault, MemoryObjectStore
from app.autocrud.resource_manager.core import Resource, ResourceManager
from app.autocrud.resource_manager.engine.operations import Create
from app.autocrud.resource_manager.storage_factory import S3StorageFactory
from app.dev.local_s3 import ministack

T = TypeVar("T")

LATENCIES = ((0.020, 0.010), (0.060, 0.020))
INSTANCES, WRITERS = (1, 2, 8), (1, 8, 64)


class Article(Struct):
    title: str
    content: str
    author: str
    published: bool = False
    views: int = 0


def article(number: int) -> Article:
    return Article(f"Title {number}", "Some content. " * 20, f"author {number % 100}", number % 2 == 0, number)


def instance(objects: MemoryObjectStore, local_dir: str | None = None) -> ResourceManager[Article]:
    crud = AutoCRUD(storage_factory=S3StorageFactory("bench", object_store=objects, local_dir=local_dir))
    return crud.add_model(Article, indexed_fields=["author", "views"])


class Timed(MemoryObjectStore):
    """Knows how long its latencies really took: timers of an event loop are late by up to a millisecond."""

    def __init__(self) -> None:
        super().__init__()
        self.waited = 0.0

    async def _serve(self, call: Call, work: Callable[[InjectedFault | None], T]) -> T:
        began = time.perf_counter()
        try:
            return await super()._serve(call, work)
        finally:
            self.waited += time.perf_counter() - began


def injected(put: float, get: float) -> Callable[[Call], float]:
    draw = random.Random(7)

    def latency(call: Call) -> float:
        mean = put if call.op.startswith("put") else get
        return mean / 2 + draw.expovariate(2 / mean)

    return latency


def table(title: str, note: str, head: list[str], rows: list[list[str]]) -> str:
    lines = [f"## {title}", "", note, "", f"| {' | '.join(head)} |", f"|{' --- |' * len(head)}"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)]) + "\n"


def beside_specstar(progress: Progress, specstar: Path) -> str:
    """Creates on a local S3 server, which both share."""
    scripts = {"crudstack": (sys.executable, "s3_ours.py"), "specstar": (str(specstar), "s3_specstar.py")}
    found: dict[str, dict[str, list[float] | str]] = {}
    with tempfile.TemporaryDirectory() as directory, ministack(Path(directory)) as url:
        httpx.put(f"{url}/bench").raise_for_status()
        for name, (python, script) in progress.track(scripts.items(), description="s3: beside specstar"):
            command = [python, str(Path(__file__).parent / "scripts" / script), url, "bench"]
            said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
            found[name] = json.loads(said.splitlines()[-1])
    rows = [[row, *(_speed(found[name][row]) for name in scripts)] for row in found["crudstack"]]
    note = (
        "200 creates on ministack: creates per second, and CPU of the process for each. specstar uploads its whole"
        " database at every write."
    )
    return table("S3-SQLite: beside specstar", note, ["", *scripts], rows)


def _speed(figures: list[float] | str) -> str:
    return figures if isinstance(figures, str) else f"{figures[0]:,.0f}/s, {figures[1]:,.0f} us"


def sections(progress: Progress, seconds: float, sizes: list[int], specstar: Path) -> list[str]:
    """Tables, each followed by an empty string where others have raw numbers."""
    made = [asyncio.run(quiet(progress)), asyncio.run(grid(progress, seconds))]
    made.append(asyncio.run(growth(progress, sizes)))
    made.append(beside_specstar(progress, specstar))
    return [part for table_ in made for part in (table_, "")]


async def quiet(progress: Progress) -> str:
    rows = []
    for put, get in progress.track(LATENCIES, description="s3: one writer"):
        objects = Timed()
        manager = instance(objects)
        last = await manager.create(article(0))
        objects.latency = injected(put, get)
        for name in ("create", "update", "get", "count"):
            ratios, over, cpu = [], [], []
            objects.requests.clear()
            objects.bytes_put = 0
            times = 60
            for number in range(times):
                objects.waited = 0.0
                began, used = time.perf_counter(), time.process_time()
                last = await _do(manager, name, last, number)
                took = time.perf_counter() - began
                cpu.append(time.process_time() - used)
                ratios.append(took / objects.waited)
                over.append(took - objects.waited)
            asked = ", ".join(f"{count / times:.2f} {op}" for op, count in sorted(objects.requests.items()))
            figures = [f"{statistics.median(ratios):.3f} x", f"{statistics.median(over) * 1e3:.2f} ms"]
            figures += [f"{statistics.median(cpu) * 1e6:,.0f} us", asked, f"{objects.bytes_put / times:,.0f}"]
            rows.append([f"{name}, {put * 1e3:.0f}/{get * 1e3:.0f} ms", *figures])
        await manager.storage.close()
    head = ["", "time / round trips that it made", "above them (p50)", "CPU (p50)", "requests", "bytes uploaded"]
    return table(
        "S3-SQLite: one writer", "One after the other; the time of the requests is injected and measured.", head, rows
    )


async def _do(manager: ResourceManager[Article], name: str, last: Resource[Article], number: int) -> Resource[Article]:
    rid = last.meta.resource_id
    match name:
        case "create":
            return await manager.create(article(number))
        case "update":
            return await manager.update(rid, article(10_000 + number))
        case "get":
            return await manager.get(rid)
    await manager.count()
    return last


async def grid(progress: Progress, seconds: float) -> str:
    rows = []
    cases = [(latency, n, t) for latency in LATENCIES for n in INSTANCES for t in WRITERS]
    for (put, get), n, t in progress.track(cases, description="s3: instances and writers"):
        objects = MemoryObjectStore()
        managers = [instance(objects) for _ in range(n)]
        for manager in managers:
            await manager.create(article(0))
        objects.latency = injected(put, get)
        objects.requests.clear()
        before = (await managers[0].storage.meta_store.head()).ver
        took: list[float] = []
        lost: Counter[str] = Counter()
        end = time.perf_counter() + seconds

        async def write(
            manager: ResourceManager[Article], end: float = end, took: list[float] = took, lost: Counter[str] = lost
        ) -> None:
            while time.perf_counter() < end:
                began = time.perf_counter()
                try:
                    await manager.create(article(len(took)))
                except WriteContention:
                    lost["contention"] += 1
                took.append(time.perf_counter() - began)

        began = time.perf_counter()
        await asyncio.gather(*(write(manager) for manager in managers for _ in range(t)))
        elapsed = time.perf_counter() - began
        await managers[0].count()
        swaps = (await managers[0].storage.meta_store.head()).ver - before
        took.sort()
        done = len(took) - lost["contention"]
        rows.append(
            [
                f"N = {n}, T = {t}, {put * 1e3:.0f}/{get * 1e3:.0f} ms",
                f"{done / elapsed:,.0f}",
                f"{done / swaps:.1f}",
                f"{swaps / (elapsed / put):.2f}",
                f"{took[len(took) // 2] / put:.1f}",
                f"{took[int(len(took) * 0.99)] / put:.1f}",
                f"{lost['contention']}",
            ]
        )
        for manager in managers:
            await manager.storage.close()
    head = ["", "creates/s", "writes a swap", "swaps a round trip", "p50, round trips", "p99, round trips", "gave up"]
    note = "N instances with T writers each, on one model. A create is a PUT of the body and its part of a swap."
    return table("S3-SQLite: instances and writers", note, head, rows)


async def growth(progress: Progress, sizes: list[int]) -> str:
    """Measure the upload of a write and the time of a cold start, by the size of the database."""
    objects = MemoryObjectStore()
    manager = instance(objects)
    count, rows = 0, []
    task = progress.add_task("s3: sizes", total=sizes[-1])
    for size in sizes:
        while count < size:
            await asyncio.gather(
                *(manager.batch([Create(article(count + at * 100 + each)) for each in range(100)]) for at in range(10))
            )
            count += 1000
            progress.advance(task, 1000)
        await manager.maintain(600)
        objects.bytes_put = 0
        objects.requests.clear()
        for number in range(100):
            await manager.create(article(number))
        count += 100
        per_write, puts = objects.bytes_put / 100, objects.requests["put"] / 100
        head = await manager.storage.meta_store.head()
        snapshot = 0 if head.snap is None else head.snap.size
        walls, cpus = [], []
        for _ in range(3):
            with tempfile.TemporaryDirectory() as directory:
                fresh = instance(objects, directory)
                began, used = time.perf_counter(), time.process_time()
                assert await fresh.count() == count
                walls.append(time.perf_counter() - began)
                cpus.append(time.process_time() - used)
                copied = _copy_seconds(Path(directory), snapshot)
                await fresh.storage.close()
        figures = [f"{per_write:,.0f}", f"{puts:.2f}", f"{len(head.encode()):,}", f"{snapshot / 1e6:,.1f}"]
        figures += [f"{min(walls):.2f}", f"{min(cpus):.2f}", f"{copied:.2f}"]
        rows.append([f"{size:,}", *figures])
    await manager.storage.close()
    head_ = [
        "resources",
        "bytes a create",
        "PUTs a create",
        "bytes of HEAD",
        "snapshot MB",
        "cold start s",
        "its CPU s",
        "writing such a file s",
    ]
    note = "Cold start: an empty directory, until the first strong count; the storage is in memory and has no latency."
    return table("S3-SQLite: sizes", note, head_, rows)


def _copy_seconds(directory: Path, size: int) -> float:
    """Return the seconds to write and read a file of this size, which no start can be faster than."""
    began = time.perf_counter()
    path = directory / "plain"
    path.write_bytes(bytes(size))
    path.read_bytes()
    return time.perf_counter() - began
