"""Writes without an expectation are repeated until they succeed. Only the time limit ends them with 409."""

from __future__ import annotations

import asyncio
import random

import pytest
from msgspec import Struct

from app.autocrud import AutoCRUD
from app.autocrud.errors import StoreDamaged, VersionConflict, WriteContention
from app.autocrud.resource_manager.backends.s3.memory_object_store import MemoryObjectStore
from app.autocrud.resource_manager.basic import Version
from app.autocrud.resource_manager.core import ResourceManager
from app.autocrud.resource_manager.engine import writing
from app.autocrud.resource_manager.engine.state import StateReader
from app.autocrud.resource_manager.storage_factory import IStorageFactory, MemoryStorageFactory, S3StorageFactory
from tests import virtual_time


class Note(Struct):
    text: str


def manage(factory: IStorageFactory) -> ResourceManager[Note]:
    return AutoCRUD(storage_factory=factory).add_model(Note, indexed_fields=["text"])


@pytest.mark.parametrize("seed", range(10))
def test_all_writes_of_many_instances_on_a_slow_bucket_succeed(seed):
    """Eight instances of equal speed write to one resource. With a limit of 16 attempts, two of these runs failed."""

    async def main():
        chance, objects = random.Random(seed), MemoryObjectStore()
        objects.latency = lambda _: chance.uniform(0.01, 0.05)
        instances = [manage(S3StorageFactory("b", object_store=objects, sync_interval=None)) for _ in range(8)]
        rid = (await instances[0].create(Note("0"))).meta.resource_id

        async def write(at: int, writer: int) -> None:
            for number in range(3):
                await instances[at].update(rid, Note(f"{at} {writer} {number}"))

        await asyncio.gather(*(write(at, writer) for at in range(8) for writer in range(2)))
        assert (await instances[-1].get(rid)).meta.version == 8 * 2 * 3 + 1

    virtual_time.run(main())


async def rival_that_always_wins(manager: ResourceManager[Note], rid: str) -> list[float]:
    """Let a rival commit before each commit of the manager. Return the list of times at which the manager tried."""
    commit, number, loop = manager.storage.commit, 0, asyncio.get_running_loop()
    tried: list[float] = []

    async def lose(changes, once=None):
        nonlocal number
        number += 1
        tried.append(loop.time())
        await commit_rival(number)
        return await commit(changes, once)

    rival = writing.WriteExecutor(
        manager.storage,
        manager.codec,
        StateReader(manager.storage, manager.codec),
        schema_version=1,
        retention=None,
        clock=manager._writes._clock,
    )

    async def commit_rival(number: int) -> None:
        manager.storage.commit = commit
        try:
            await rival.commit([writing.Update(data=Note(f"rival {number}"), resource_id=rid)], "rival")
        finally:
            manager.storage.commit = lose

    manager.storage.commit = lose
    return tried


def test_a_writer_that_always_loses_fails_after_the_time_limit():
    async def main():
        manager = manage(MemoryStorageFactory())
        rid = (await manager.create(Note("0"))).meta.resource_id
        tried = await rival_that_always_wins(manager, rid)
        with pytest.raises(WriteContention, match="nothing was changed, try again"):
            await manager.update(rid, Note("1"))
        assert writing.CONTENTION_TIMEOUT_S <= tried[-1] - tried[0] < writing.CONTENTION_TIMEOUT_S + 1
        assert len(tried) > 100
        assert (await manager.get(rid)).meta.version == len(tried) + 1

    virtual_time.run(main())


def test_a_writer_that_expects_a_state_is_refused_at_once():
    async def main():
        manager = manage(MemoryStorageFactory())
        meta = (await manager.create(Note("0"))).meta
        tried = await rival_that_always_wins(manager, meta.resource_id)
        with pytest.raises(VersionConflict):
            await manager.update(meta.resource_id, Note("1"), expect=Version(meta.version, meta.nonce))
        assert len(tried) == 1

    virtual_time.run(main())


def test_a_commit_is_repeated_if_the_store_reports_contention():
    async def main():
        manager = manage(MemoryStorageFactory())
        rid = (await manager.create(Note("0"))).meta.resource_id
        commit, left = manager.storage.commit, 30

        async def crowded(changes, once=None):
            nonlocal left
            left -= 1
            if left:
                raise WriteContention("other writers were faster; nothing was changed, try again")
            return await commit(changes, once)

        manager.storage.commit = crowded
        assert (await manager.update(rid, Note("1"))).meta.version == 2
        assert left == 0

    virtual_time.run(main())


def test_a_lost_body_ends_the_retries():
    async def main():
        manager = manage(MemoryStorageFactory())
        rid = (await manager.create(Note("0"))).meta.resource_id
        asked = 0

        async def lost(_):
            nonlocal asked
            asked += 1
            raise StoreDamaged("the body is missing")

        manager.storage.body = lost
        with pytest.raises(StoreDamaged, match="the body is missing"):
            await manager.patch(rid, lambda data: {**data, "text": "1"})
        assert asked <= writing.MAX_ATTEMPTS + 2

    virtual_time.run(main())
