"""Of concurrent writers that expect the same state, one succeeds."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable, Coroutine
from pathlib import Path
from typing import Any

from ..errors import (
    UniqueConflict,
    VersionConflict,
)
from ..resource_manager.basic import Version
from ..resource_manager.core import ResourceManager
from .base import ROUNDS, Conformance
from .model import Item, manage


class RaceConformance(Conformance):
    """Of concurrent writers that expect the same state, one succeeds."""

    async def test_one_of_several_tasks_wins_a_race(self, manager: ResourceManager[Item]) -> None:
        created = await manager.create(Item())
        await self._race(
            manager, created.meta.resource_id, ROUNDS, lambda call: asyncio.gather(*(call(at) for at in range(8)))
        )

    async def _race(
        self,
        manager: ResourceManager[Item],
        rid: str,
        rounds: int,
        run: Callable[[Callable[[int], Coroutine[Any, Any, bool]]], Awaitable[list[bool]]],
    ) -> None:
        for round_ in range(rounds):
            expect = (await manager.get(rid)).version

            async def attempt(at: int, round_: int = round_, expect: Version = expect) -> bool:
                try:
                    await manager.update(rid, Item(text=f"{round_} {at}"), expect=expect)
                except VersionConflict:
                    return False
                return True

            assert sum(await run(attempt)) == 1
        assert (await manager.get(rid)).meta.revision == rounds + 1

    def test_one_of_several_event_loops_wins_a_race(self, root: Path) -> None:
        manager = manage(self.make(root))
        rid = asyncio.run(manager.create(Item())).meta.resource_id
        for round_ in range(ROUNDS):
            expect = asyncio.run(manager.get(rid)).version
            won: list[int] = []
            barrier = threading.Barrier(2)

            def attempt(
                at: int,
                round_: int = round_,
                expect: Version = expect,
                won: list[int] = won,
                barrier: threading.Barrier = barrier,
            ) -> None:
                barrier.wait()
                try:
                    asyncio.run(manager.update(rid, Item(text=f"{round_} {at}"), expect=expect))
                except VersionConflict:
                    return
                won.append(at)

            threads = [threading.Thread(target=attempt, args=(at,)) for at in range(2)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            assert len(won) == 1
        assert asyncio.run(manager.get(rid)).meta.revision == ROUNDS + 1
        asyncio.run(manager.close())

    async def test_concurrent_updates_are_all_kept(self, manager: ResourceManager[Item]) -> None:
        created = await manager.create(Item())
        rid = created.meta.resource_id
        await asyncio.gather(*(manager.update(rid, Item(number=number)) for number in range(200)))
        meta = (await manager.get(rid)).meta
        assert (meta.revision, meta.version) == (201, 201)
        numbers = [(await manager.get(rid, revision=revision)).data.number for revision in range(2, 202)]
        assert set(numbers) == set(range(200))

    async def test_one_of_several_tasks_gets_a_unique_value(self, manager: ResourceManager[Item]) -> None:
        for round_ in range(ROUNDS):
            results = await asyncio.gather(
                *(manager.create(Item(code=f"{round_}")) for _ in range(8)), return_exceptions=True
            )
            assert sum(not isinstance(result, UniqueConflict) for result in results) == 1
        assert await manager.count() == ROUNDS

    async def test_one_of_several_tasks_creates_an_id(self, manager: ResourceManager[Item]) -> None:
        results = await asyncio.gather(
            *(manager.create(Item(number=at), resource_id="id") for at in range(8)), return_exceptions=True
        )
        assert sum(not isinstance(result, VersionConflict) for result in results) == 1
