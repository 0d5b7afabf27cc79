"""Maintenance removes bodies that nothing refers to, and no others."""

from __future__ import annotations

from typing import Any

import pytest

from .. import Query
from ..errors import (
    AnswerGone,
    ResourceNotFound,
)
from ..query import Sort
from ..resource_manager.contract.protocols import MetaSweeping
from ..resource_manager.core import ResourceManager
from ..resource_manager.engine.operations import (
    Create,
    Delete,
    Modify,
    Operation,
    Publish,
    Purge,
    Restore,
    Switch,
    Update,
)
from .base import Conformance, keyed
from .model import Item, storage_of


class SweepConformance(Conformance):
    """Maintenance removes bodies that nothing refers to, and no others."""

    async def test_maintenance_keeps_bodies_of_all_revisions(self, manager: ResourceManager[Item]) -> None:
        created = await manager.create(Item(text="1"))
        rid = created.meta.resource_id
        for number in range(5):
            await manager.update(rid, Item(number=number))
            await manager.maintain(10)
        for revision in range(1, 7):
            await manager.get(rid, revision=revision)
        assert await manager.count() == 1

    async def test_a_sweep_between_put_and_commit_loses_no_body(self, manager: ResourceManager[Item]) -> None:
        """If a sweep runs between put and commit of a body, the body stays, or is put again under another uid."""
        await manager.open()
        storage = storage_of(manager)
        commits_here = storage.meta_store.authoritative  # else body and record are one step
        decider: Any = storage.meta_store if commits_here and storage._pair is None else storage
        name = "commit" if decider is not storage else "_commit"
        commit, times = getattr(decider, name), 0

        async def slow(*arguments: Any) -> Any:
            nonlocal times
            times += 1
            if times <= 2:
                for _ in range(3):
                    await storage.maintain(10)
            return await commit(*arguments)

        setattr(decider, name, slow)
        created = await manager.create(Item(text="1"))
        setattr(decider, name, commit)
        assert (await manager.get(created.meta.resource_id)).data.text == "1"
        page = await manager.search(Query(sort=(Sort("text"),)))
        assert [found.data.text for found in page.items] == ["1"]

    async def test_a_resource_that_its_own_batch_purges_leaves_nothing(self, manager: ResourceManager[Item]) -> None:
        caller = keyed("k")
        batch: list[Operation] = [Create(Item(text="secret"), "x"), Purge(resource_id="x")]
        await manager.batch(batch, by=caller)
        with pytest.raises((AnswerGone, ResourceNotFound)):
            await manager.batch(batch, by=keyed("k"))
        with pytest.raises(ResourceNotFound):
            await manager.get("x")

    async def test_batches_survive_sweeps_of_other_processes(self, manager: ResourceManager[Item]) -> None:
        """If another process advances the generation, bodies are put again, everywhere the batch names them."""
        batches: list[list[Operation]] = [
            [Create(Item(number=1), "a", "draft"), Publish(resource_id="a")],
            [Create(Item(number=2), "b"), Delete(resource_id="b"), Restore(resource_id="b")],
            [
                Create(Item(number=1), "c"),
                Update(resource_id="c", data=Item(number=3)),
                Switch(resource_id="c", revision=1),
            ],
            [Create(Item(number=1), "d", "draft"), Modify(resource_id="d", data=Item(number=4))],
            [Create(Item(number=1), "e"), Purge(resource_id="e"), Create(Item(number=5), "e")],
        ]
        for operations in batches:
            await self._swept_elsewhere(manager)
            await manager.batch(operations)
            await manager.maintain(10)
        for rid, number in {"a": 1, "b": 2, "c": 1, "d": 4, "e": 5}.items():
            assert (await manager.get(rid)).data.number == number
        assert (await manager.get("c", revision=2)).data.number == 3

    async def test_bodies_of_old_generations_are_not_orphans(self, manager: ResourceManager[Item]) -> None:
        """Bodies that records name are never swept, so resources of any age can be published, deleted and restored."""
        await manager.create(Item(number=1), resource_id="a", status="draft")
        for _ in range(3):
            await self._swept_elsewhere(manager)
        assert (await manager.publish("a")).meta.status == "stable"
        await manager.delete("a")
        await manager.restore("a")
        await manager.maintain(10)
        assert (await manager.get("a")).data.number == 1

    async def _swept_elsewhere(self, manager: ResourceManager[Item]) -> None:
        await manager.open()
        meta_store = storage_of(manager).meta_store
        assert isinstance(meta_store, MetaSweeping)
        for _ in range(2):
            await meta_store.advance_generation()
