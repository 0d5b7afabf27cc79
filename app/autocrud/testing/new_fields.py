"""Fields that are indexed, or declared unique, after data was stored."""

from __future__ import annotations

import datetime as dt
from pathlib import Path
from typing import Any

import pytest
from msgspec import defstruct

from .. import Query, field
from ..errors import (
    ConfigError,
    UniqueConflict,
)
from ..resource_manager.core import ResourceManager
from ..resource_manager.model.codec import Codec
from .base import Conformance
from .model import INDEXED, Clock, Item, manage


class NewFieldConformance(Conformance):
    """Fields that are indexed, or declared unique, after data was stored."""

    async def test_a_field_that_is_indexed_later_finds_stored_resources(self, root: Path) -> None:
        plain = manage(self.make(root), indexed=["text"])
        await plain.create(Item(text="a", number=1, tags=["x"], code="c"))
        await plain.create(Item(text="b", number=2))
        await plain.close()
        manager = manage(self.make(root), indexed=INDEXED)
        page = await manager.search(Query(where=field("number").gte(1), sort=("-number",)))
        assert [found.data.text for found in page.items] == ["b", "a"]
        assert await manager.count(Query(where=field("tags").contains("x"))) == 1
        with pytest.raises(UniqueConflict):
            await manager.create(Item(code="c"))
        await manager.close()

    @pytest.mark.parametrize(
        ("later", "value"), [(float, 1.5), (str, "abc"), (dt.datetime, dt.datetime(2026, 1, 1, tzinfo=dt.UTC))]
    )
    async def test_an_indexed_field_may_change_its_type(self, root: Path, later: Any, value: Any) -> None:
        """The type may also change back while the store has rows of both types."""
        for type_, one in ((int, 5), (later, value), (int, 7)):
            struct = defstruct("Item", [("value", type_)])
            manager = ResourceManager(
                "item",
                Codec(struct, ["value"]),
                self.make(root).build("item"),
                encoding=None,
                schema_version=1,
                retention=None,
                clock=Clock(),
            )
            await manager.create(struct(one))
            assert await manager.count(Query(where=field("value").eq(one))) == 1
            assert len((await manager.find(Query(sort=("value",)))).items) >= 1
            await manager.close()

    @pytest.mark.parametrize("earlier", [["text"], ["text", "code"]])
    async def test_a_field_with_equal_values_cannot_become_unique(self, root: Path, earlier: list[str]) -> None:
        plain = manage(self.make(root), indexed=earlier)
        await plain.create(Item(code="c"), resource_id="a")
        await plain.create(Item(code="c"), resource_id="b")
        await plain.close()
        manager = manage(self.make(root))
        with pytest.raises(ConfigError, match="code was declared unique, but stored resources share a value"):
            await manager.open()
        await manager.close()
        plain = manage(self.make(root), indexed=earlier)  # the program that wrote it is not locked out
        await plain.update("b", Item(code="d"))
        await plain.close()
        manager = manage(self.make(root))
        with pytest.raises(UniqueConflict):
            await manager.create(Item(code="d"))
        await manager.close()
