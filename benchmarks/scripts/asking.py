"""The protocol that asks a process for one row at a time, so that peers take turns and keep their loaded data.

A line of JSON comes in, `{"row": "get", "seconds": 0.2}`, and one goes out, `{"crudstack": {"wall": 71.2, "cpu": 44.0,
"calls": 210, ...}}`. Imports nothing of anyone: specstar's Python runs it too.
"""

from __future__ import annotations

import asyncio
import inspect
import json
import statistics
import sys
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, NamedTuple

LEAST, MOST = 3, 2000
"""How often a row is called in one turn."""
GROUP_S = 1e-4
"""What takes less is timed in groups of calls: reading clocks costs 0.1 us."""


class Row(NamedTuple):
    """The timed function, for a number that counts up; and something that tells whether it works. Both may be async."""

    call: Callable[[int], Any]
    check: Callable[[], Any]


async def settled(found: Any) -> Any:
    return await found if inspect.isawaitable(found) else found


def figures(walls: list[float], cpu: float, calls: int) -> dict[str, Any]:
    """Microseconds of a call: the median of the wall, the mean of the CPU time of all threads."""
    return {"wall": statistics.median(walls) * 1e6, "cpu": cpu / calls * 1e6, "calls": calls}


async def measured(call: Callable[[int], Any], seconds: float) -> dict[str, Any]:
    began = time.perf_counter()
    found = call(0)
    awaits = inspect.isawaitable(found)
    await settled(found)
    each = max(1, min(100, int(GROUP_S / (time.perf_counter() - began))))
    walls: list[float] = []
    calls = 0
    used, end = time.process_time(), time.perf_counter() + seconds
    while len(walls) < LEAST or (calls < MOST and time.perf_counter() < end):
        began = time.perf_counter()
        for at in range(calls, calls + each):
            found = call(at)
            if awaits:
                await found
        walls.append((time.perf_counter() - began) / each)
        calls += each
    return figures(walls, time.process_time() - used, calls)


async def serve(answer: Callable[[str, float], Awaitable[Mapping[str, Any]]]) -> None:
    """Serve requests until the input ends. Background work of a store continues in the meantime."""
    print('"ready"', flush=True)
    while line := await asyncio.get_running_loop().run_in_executor(None, sys.stdin.readline):
        asked = json.loads(line)
        print(json.dumps(await answer(asked["row"], asked["seconds"])), flush=True)


async def serve_rows(name: str, rows: Mapping[str, Row]) -> None:
    """For a process that is one peer; it says with each row what the check found."""

    async def answer(row: str, seconds: float) -> dict[str, Any]:
        found = await settled(rows[row].check())
        return {name: await measured(rows[row].call, seconds) | {"answer": found}}

    await serve(answer)
