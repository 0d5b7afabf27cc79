"""Unique fields, and batches that are committed as a whole."""

from __future__ import annotations

import pytest

from ..errors import (
    ResourceNotFound,
    RevisionIsStable,
    UniqueConflict,
)
from ..resource_manager.core import ResourceManager
from ..resource_manager.engine.operations import (
    Create,
    Delete,
    Modify,
    Patch,
    Publish,
    Purge,
    Restore,
    Switch,
    Update,
)
from .base import Conformance, state_of
from .model import Item


class BatchConformance(Conformance):
    """Unique fields, and batches that are committed as a whole."""

    async def test_unique_values(self, manager: ResourceManager[Item]) -> None:
        first = await manager.create(Item(code="c"))
        await manager.create(Item(code=None))
        await manager.create(Item(code=None))
        with pytest.raises(UniqueConflict):
            await manager.create(Item(code="c"))
        other = await manager.create(Item(code="d"))
        with pytest.raises(UniqueConflict):
            await manager.update(other.meta.resource_id, Item(code="c"))
        await manager.update(first.meta.resource_id, Item(code="e"))
        await manager.update(other.meta.resource_id, Item(code="c"))
        assert await manager.count() == 4

    async def test_a_batch_may_swap_unique_values(self, manager: ResourceManager[Item]) -> None:
        one, two = await manager.create(Item(code="1")), await manager.create(Item(code="2"))
        await manager.batch(
            [
                Update(resource_id=one.meta.resource_id, data=Item(code="2")),
                Update(resource_id=two.meta.resource_id, data=Item(code="1")),
            ]
        )
        assert (await manager.get(one.meta.resource_id)).data.code == "2"
        with pytest.raises(UniqueConflict) as raised:
            await manager.batch([Create(Item(code="9")), Create(Item(code="9"))])
        assert raised.value.operation == 1
        with pytest.raises(UniqueConflict) as raised:
            await manager.batch([Create(Item(code="9")), Create(Item(code="1"))])
        assert raised.value.operation == 1
        assert await manager.count() == 2

    async def test_a_batch_is_all_or_nothing(self, manager: ResourceManager[Item]) -> None:
        one = await manager.create(Item(text="1", code="c"))
        rid = one.meta.resource_id
        for last in (
            Create(Item(code="c")),
            Update(resource_id="nothing", data=Item()),
            Modify(resource_id=rid, data=Item(text="x")),
        ):
            with pytest.raises((UniqueConflict, ResourceNotFound, RevisionIsStable)):
                await manager.batch(
                    [Create(Item(text="new")), Update(resource_id=rid, data=Item(text="2", code="c")), last]
                )
        assert (await manager.get(rid)).meta == one.meta
        assert await manager.count() == 1

    async def test_operations_of_a_batch_see_each_other(self, manager: ResourceManager[Item]) -> None:
        results = await manager.batch(
            [
                Create(Item(number=1), "r", "draft"),
                Modify(resource_id="r", data=Item(number=2)),
                Publish(resource_id="r"),
                Update(resource_id="r", data=Item(number=3)),
                Patch(resource_id="r", apply=lambda tree: tree | {"number": tree["number"] + 1}),
                Switch(resource_id="r", revision=2),
                Delete(resource_id="r"),
                Restore(resource_id="r"),
                Switch(resource_id="r", revision=3),
            ]
        )
        assert [state_of(result).version for result in results] == list(range(1, 10))
        assert (await manager.get("r")).data.number == 4
        assert [info.revision for info in (await manager.revisions("r")).items] == [3, 2, 1]
        await manager.batch([Purge(resource_id="r"), Create(Item(number=9), "r")])
        assert (await manager.get("r")).data.number == 9
        assert [info.revision for info in (await manager.revisions("r")).items] == [1]
