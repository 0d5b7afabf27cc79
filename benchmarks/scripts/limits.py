"""Stores compared with their raw clients, in one process: `python -m benchmarks.scripts.limits DIRECTORY`.

`asking` describes the protocol.

A row has two sides that take turns many times: what a person would write by hand to get the same from the same server,
and the store.
"""

from __future__ import annotations

import asyncio
import contextlib
import sys
import time
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.scripts.asking import figures, serve

TURNS = 5
RAW, OURS = "raw client", "crudstack"


class Side(NamedTuple):
    """`call` does it for each argument in turn; `arguments` makes so many of them, before any clock runs."""

    call: Callable[[Sequence[Any]], Awaitable[None]]
    arguments: Callable[[int], Sequence[Any]] = range


async def _nothing() -> None:
    pass


class Pair(NamedTuple):
    """A row: our store and the raw client.

    same    whether both sides have done the same, and what the row says
    calls   of each side, in all turns together
    each    in groups of so many, where reading a clock would be seen
    before  what is done before each turn
    """

    raw: Side
    ours: Side
    same: Callable[[], Awaitable[bool]]
    calls: int = 500
    each: int = 1
    before: Callable[[], Awaitable[None]] = _nothing


async def measured(pair: Pair) -> dict[str, dict[str, Any]]:
    sides = {RAW: pair.raw, OURS: pair.ours}
    walls: dict[str, list[float]] = {name: [] for name in sides}
    cpu = dict.fromkeys(sides, 0.0)
    times = pair.calls // TURNS
    for turn in range(TURNS):
        for name, side in sorted(sides.items(), reverse=turn % 2 == 1):
            await pair.before()
            await side.call(side.arguments(1))
            arguments = side.arguments(times)
            used = time.process_time()
            for first in range(0, times, pair.each):
                group = arguments[first : first + pair.each]
                began = time.perf_counter()
                await side.call(group)
                walls[name].append((time.perf_counter() - began) / len(group))
            cpu[name] += time.process_time() - used
    same = await pair.same()
    return {name: figures(walls[name], cpu[name], times * TURNS) | {"answer": same} for name in sides}


async def main() -> None:
    from benchmarks.scripts import limits_bodies, limits_meta

    async with contextlib.AsyncExitStack() as stack:
        pairs = await limits_meta.pairs(stack) | await limits_bodies.pairs(stack, Path(sys.argv[1]))

        async def answer(row: str, _: float) -> dict[str, dict[str, Any]]:
            return await measured(pairs[row])

        await serve(answer)


if __name__ == "__main__":
    asyncio.run(main())
