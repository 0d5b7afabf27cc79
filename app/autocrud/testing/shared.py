"""Several processes use one storage at once."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import multiprocessing
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from multiprocessing.queues import Queue
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any, ClassVar
from unittest import mock

import pytest

from .. import Query, field
from ..errors import (
    ConfigError,
    UniqueConflict,
    VersionConflict,
)
from ..resource_manager.basic import CommitResult, IdempotentCommit, ResourceMeta, Write
from ..resource_manager.contract.protocols import IndexMigration
from ..resource_manager.core import Caller, ResourceManager
from ..resource_manager.model.resource import Resource
from .base import ROUNDS, keyed, version_of
from .blob_contents import SharedBlobContentConformance
from .model import Item, manage, storage_of
from .shared_blobs import SharedBlobConformance
from .suite import DurableConformance


class SharedConformance(SharedBlobConformance, SharedBlobContentConformance, DurableConformance):
    """Tests for storages that several processes may use at once. `make` also runs in other processes."""

    shares: ClassVar[bool] = True

    async def test_writers_of_several_instances_to_one_resource_all_succeed(self, root: Path) -> None:
        """Writers without an expectation never get a conflict, even if there are many."""
        instances = [manage(self.make(root)) for _ in range(3)]
        rid = (await instances[0].create(Item())).meta.resource_id
        writes = [(at, number) for number in range(10) for at in range(len(instances))]
        await asyncio.gather(*(instances[at].update(rid, Item(number=10 * number + at)) for at, number in writes))
        for instance in instances:
            assert (await instance.get(rid)).meta.version == len(writes) + 1
            await instance.close()

    async def test_a_concurrent_commit_under_the_same_key_is_the_response(self, root: Path) -> None:
        """One instance looks for the key, the other one commits under it, and the change is no longer possible."""
        here, there = manage(self.make(root)), manage(self.make(root))
        changes: tuple[Callable[[ResourceManager[Item], ResourceMeta, Caller], Coroutine[Any, Any, Any]], ...] = (
            lambda manager, meta, by: manager.update(meta.resource_id, Item(text="2"), expect=version_of(meta), by=by),
            lambda manager, meta, by: manager.delete(meta.resource_id, by=by),
            lambda manager, _, by: manager.create(Item(text="new"), resource_id="new", by=by),
        )
        for number, change in enumerate(changes):
            meta = (await here.create(Item(text="1"))).meta
            looked, go_on, done = asyncio.Event(), asyncio.Event(), there.storage.done

            async def slow(
                key: str,
                *,
                peek: bool = False,
                looked: asyncio.Event = looked,
                go_on: asyncio.Event = go_on,
                done: Callable[..., Awaitable[CommitResult | None]] = done,
            ) -> CommitResult | None:
                found = await done(key, peek=peek)
                looked.set()
                await go_on.wait()
                return found

            with mock.patch.object(there.storage, "done", slow):
                second = asyncio.create_task(change(there, meta, keyed(f"k{number}")))
                await looked.wait()
                first = await change(here, meta, keyed(f"k{number}"))
                go_on.set()
                answer = await second
            assert getattr(answer, "meta", answer) == getattr(first, "meta", first)
        for manager in (here, there):
            await manager.close()

    @pytest.mark.parametrize("earlier", [["text"], ["text", "code"]])
    async def test_a_new_unique_field_binds_running_programs(self, root: Path, earlier: list[str]) -> None:
        """The running programs continue to write while the index is completed."""
        old, new = manage(self.make(root), indexed=earlier), manage(self.make(root))
        await old.create(Item(code="c"), resource_id="a")
        await old.create(Item(code="d"), resource_id="b")
        opened, numbers = asyncio.Event(), itertools.count()

        async def write() -> None:
            while not opened.is_set():
                await old.update("b", Item(text=f"{next(numbers)}", code="d"))

        writing = asyncio.create_task(write())
        await new.open()
        opened.set()
        with contextlib.suppress(ConfigError):  # those that do not index it cannot keep it unique
            await writing
        with pytest.raises((UniqueConflict, ConfigError)):
            await old.create(Item(code="d"))
        with pytest.raises(UniqueConflict):
            await new.create(Item(code="d"))
        await new.create(Item(code="e"))
        for manager in (old, new):
            await manager.close()

    async def test_a_write_is_answered_even_if_another_instance_purges_it_at_once(self, root: Path) -> None:
        here, there = manage(self.make(root)), manage(self.make(root))
        commit = here.storage.commit

        async def then_purge(writes: Sequence[Write], once: IdempotentCommit | None = None) -> list[ResourceMeta]:
            committed = await commit(writes, once)
            await there.purge("r")
            return committed

        writes: tuple[Callable[[], Awaitable[Resource[Item]]], ...] = (  # each needs a body that exists already
            lambda: here.publish("r"),
            lambda: here.switch("r", 1),
            lambda: here.patch("r", lambda data: data | {"number": 1}),
        )
        for write in writes:
            await here.create(Item(text="1"), resource_id="r")
            await here.update("r", Item(text="1", number=2), status="draft")
            with mock.patch.object(here.storage, "commit", then_purge):
                assert (await write()).data.text == "1"
        for manager in (here, there):
            await manager.close()

    async def test_maintenance_indexes_the_writes_of_older_programs(self, root: Path) -> None:
        old, new = manage(self.make(root), indexed=["text"]), manage(self.make(root), indexed=["text", "number"])
        await old.open()
        await new.open()
        await old.create(Item(number=7), resource_id="a")
        await new.maintain(30)
        assert await new.count(Query(where=field("number").eq(7))) == 1
        for manager in (old, new):
            await manager.close()

    async def test_a_refused_unique_field_does_not_lock_out_earlier_programs(self, root: Path) -> None:
        """The earlier program writes an equal value at the last moment, when it is locked out already."""
        old, new = manage(self.make(root), indexed=["text"]), manage(self.make(root))
        await old.create(Item(code="c"), resource_id="a")
        await old.create(Item(), resource_id="b")
        meta_store = storage_of(new).meta_store
        assert isinstance(meta_store, IndexMigration)
        activate, texts = meta_store.activate_unique_fields, iter("12")

        async def slow(*, force: bool = False) -> bool:
            if not force and (text := next(texts, None)):
                await old.update("b", Item(text=text, code="c"))
            return bool(await activate(force=force))

        with (
            mock.patch.object(meta_store, "activate_unique_fields", slow),
            pytest.raises(ConfigError, match="code was declared unique, but stored resources share a value"),
        ):
            await new.open()
        await old.update("b", Item(code="d"))
        again = manage(self.make(root))
        await again.open()
        with pytest.raises(UniqueConflict):
            await again.create(Item(code="d"))
        for manager in (old, new, again):
            await manager.close()

    def test_one_of_several_processes_wins_a_race(self, root: Path) -> None:
        processes = 4
        rid = asyncio.run(self._prepare(root))
        context = multiprocessing.get_context("spawn")
        barrier, outcomes = context.Barrier(processes), context.Queue()
        started = [
            context.Process(target=_race_in_process, args=(type(self), root, rid, at, barrier, outcomes))
            for at in range(processes)
        ]
        for process in started:
            process.start()
        results = [outcomes.get(timeout=120) for _ in started]
        for process in started:
            process.join()
        wins = [sum(result[round_] for result in results) for round_ in range(ROUNDS)]
        assert wins == [1] * ROUNDS

        async def check() -> None:
            manager = manage(self.make(root))
            assert (await manager.get(rid)).meta.revision == ROUNDS + 1
            assert await manager.count(Query(where=field("text").eq("unique"))) == 1
            assert await manager.count(Query(where=field("text").starts_with("key "))) == ROUNDS
            await manager.close()

        asyncio.run(check())

    async def _prepare(self, root: Path) -> str:
        manager = manage(self.make(root))
        created = await manager.create(Item())
        await manager.close()
        return created.meta.resource_id


def _race_in_process(
    conformance: type[SharedConformance], root: Path, rid: str, at: int, barrier: Barrier, outcomes: Queue[list[int]]
) -> None:
    asyncio.run(_race_rounds(conformance, root, rid, at, barrier, outcomes))


async def _race_rounds(
    conformance: type[SharedConformance], root: Path, rid: str, at: int, barrier: Barrier, outcomes: Queue[list[int]]
) -> None:
    manager = manage(conformance().make(root))
    won = []
    for round_ in range(ROUNDS):
        expect = (await manager.get(rid)).version
        barrier.wait(60)
        try:
            await manager.update(rid, Item(text=f"{round_} {at}"), expect=expect)
            won.append(1)
        except VersionConflict:
            won.append(0)
        await manager.create(Item(text=f"key {round_}"), by=keyed(f"{round_}"))
        barrier.wait(60)
    with contextlib.suppress(UniqueConflict):
        await manager.create(Item(text="unique", code="one"))
    await manager.close()
    outcomes.put(won)
