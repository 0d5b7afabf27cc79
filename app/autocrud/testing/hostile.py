"""Ids and bodies that are hard to store."""

from __future__ import annotations

import pytest

from ..errors import (
    ResourceNotFound,
)
from ..resource_manager.core import ResourceManager
from .base import Conformance
from .model import Item


class HostileInputConformance(Conformance):
    """Ids and bodies that are hard to store."""

    @pytest.mark.parametrize(
        "rid",
        [
            "../../x",
            "..",
            ".",
            "a/b",
            "/",
            "x" * 300,
            "😀",
            "a b",
            "%2e",
            "'; DROP TABLE resources; --",
            "A",
            "con",
            "\n",
            "\ufeff",
        ],
    )
    async def test_an_id_is_never_a_path_or_a_command(self, manager: ResourceManager[Item], rid: str) -> None:
        created = await manager.create(Item(text="1"), resource_id=rid)
        assert created.meta.resource_id == rid
        await manager.update(rid, Item(text="2"))
        assert (await manager.get(rid)).data.text == "2"
        assert [hit.meta.resource_id for hit in (await manager.find()).items] == [rid]
        await manager.purge(rid)

    async def test_ids_differ_by_case(self, manager: ResourceManager[Item]) -> None:
        await manager.create(Item(text="upper"), resource_id="Id")
        await manager.create(Item(text="lower"), resource_id="id")
        assert (await manager.get("Id")).data.text == "upper"
        assert (await manager.get("id")).data.text == "lower"

    @pytest.mark.parametrize("rid", ["\0", "a\0b", "\ud800", "a\udfff"])
    async def test_ids_that_are_not_text_are_refused(self, manager: ResourceManager[Item], rid: str) -> None:
        with pytest.raises(ValueError):  # noqa: PT011 - the contract says no more
            await manager.create(Item(), resource_id=rid)
        with pytest.raises((ValueError, ResourceNotFound)):
            await manager.get(rid)

    async def test_small_and_large_bodies(self, manager: ResourceManager[Item]) -> None:
        large = "ä" * 2_500_000
        created = await manager.create(Item(note=large))
        assert (await manager.get(created.meta.resource_id)).data.note == large
        empty = await manager.create(Item())
        assert (await manager.get(empty.meta.resource_id)).data == Item()
