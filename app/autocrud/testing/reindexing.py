"""Indexes are completed and healed, and damaged bodies are named."""

from __future__ import annotations

import contextlib
import itertools
from pathlib import Path
from typing import ClassVar

import pytest

from .. import IndexedField, Query, field
from ..errors import (
    StoreDamaged,
    StoreUnavailable,
    UniqueConflict,
)
from .base import Conformance
from .model import INDEXED, Failing, FailingCall, Item, Stricter, drop_entries, manage, storage_of


class ReindexingConformance(Conformance):
    """Indexes are completed and healed, and damaged bodies are named."""

    keeps_index: ClassVar[bool] = True
    """Whether index entries survive a restart. If not, the index is made from the bodies at each start."""

    async def test_a_failed_read_of_a_body_removes_no_index_entry(self, root: Path) -> None:
        """R1: if a read fails while a field is added to the index, opening fails; the next try finds everything."""
        plain = manage(self.make(root), indexed=["text", "code"])
        for number in range(6):
            await plain.create(Item(text="x", code=f"c{number}", number=number), resource_id=f"r{number}")
        await plain.close()
        for failing in range(6):
            manager = manage(self.make(root), indexed=INDEXED)
            bodies = Failing(storage_of(manager).resource_store, at=failing, error=StoreUnavailable("503 of the test"))
            if failing < 5:
                with pytest.raises(StoreUnavailable):
                    await manager.open()
                bodies.heal()
                await manager.close()
                before = manage(self.make(root), indexed=["text", "code"])
                assert await before.count(Query(where=field("text").eq("x"))) == 6
                await before.close()
            else:
                bodies.heal()
                await manager.open()
                assert await manager.count(Query(where=field("text").eq("x"))) == 6
                assert await manager.count(Query(where=field("number").gte(0))) == 6
                for number in range(6):
                    with pytest.raises(UniqueConflict):
                        await manager.create(Item(code=f"c{number}"))
                assert await manager.storage.degradations() == []
                await manager.close()

    async def test_a_resource_with_a_lost_body_stays_in_the_index(self, root: Path) -> None:
        """R2 and R3: it keeps its index entry and its unique value, and is reported; the model opens."""
        plain = manage(self.make(root), indexed=["text", IndexedField("code", unique=True)])
        for number in range(3):
            await plain.create(Item(text="x", code=f"c{number}", number=number), resource_id=f"r{number}")
        lost = (await plain.get("r1")).meta.uid
        await storage_of(plain).resource_store.delete([lost])
        await plain.close()
        manager = manage(self.make(root), indexed=INDEXED)
        await manager.open()
        assert await manager.count() == 3
        assert await manager.count(Query(where=field("number").gte(0))) == 2
        assert await manager.count(Query(where=field("text").eq("x"))) == (3 if self.keeps_index else 2)
        if self.keeps_index:
            with pytest.raises(UniqueConflict):
                await manager.create(Item(code="c1"))
        (told,) = await manager.storage.degradations()
        assert told.startswith("1 resources have lost their data")
        assert told.endswith(": r1")
        await manager.close()

    async def test_a_lost_body_is_reported_until_its_resource_is_purged(self, root: Path) -> None:
        """Other resources are read as before, and the damaged one can be replaced."""
        manager = manage(self.make(root), indexed=INDEXED)
        for number in range(3):
            await manager.create(Item(text=f"{number}"), resource_id=f"r{number}")
        await storage_of(manager).resource_store.delete([(await manager.get("r1")).meta.uid])
        with pytest.raises(StoreDamaged, match="'r1'"):
            await manager.get("r1")
        with pytest.raises(StoreDamaged, match="'r1'"):
            await manager.patch("r1", lambda tree: tree)
        assert [found.meta.resource_id for found in (await manager.search()).items] == ["r0", "r2"]
        assert (await manager.get("r2")).data.text == "2"
        (told,) = await manager.degradations()
        assert told.endswith(": r1")
        await manager.update("r1", Item(text="again"))
        assert (await manager.get("r1")).data.text == "again"
        with pytest.raises(StoreDamaged, match="'r1'"):
            await manager.get("r1", revision=1)
        await manager.purge("r1")
        assert await manager.degradations() == []
        await manager.close()

    async def test_index_entries_that_an_earlier_program_dropped_are_restored(self, root: Path) -> None:
        """R4: it left empty entries that counted as complete, and gave a unique value to a second resource."""
        manager = manage(self.make(root), indexed=INDEXED)
        for number in range(5):
            await manager.create(Item(text="x", code=f"c{number}", number=number), resource_id=f"r{number}")
        await manager.create(Item(text="y", code="gone"), resource_id="lost")
        await manager.delete("r0")
        if not await drop_entries(manager):
            await manager.close()
            return  # its index is made of the bodies at each start
        await storage_of(manager).resource_store.delete([(await manager.get("lost")).meta.uid])
        await manager.create(Item(text="second", code="c1"), resource_id="second")
        assert await manager.count(Query(where=field("text").eq("x"))) == 0
        await manager.close()

        for _ in range(2):  # a restart does not forget
            manager = manage(self.make(root), indexed=INDEXED)
            await manager.open()
            assert await manager.count(Query(where=field("text").eq("x"))) == 4
            assert await manager.count(Query(where=field("number").gte(0), include_deleted=True)) == 5
            assert await manager.count(Query(where=field("code").eq("c1"))) == 2
            lost, shared = await manager.storage.degradations()
            assert lost.startswith("1 resources have lost their data")
            assert lost.endswith(": lost")
            assert shared.startswith("1 resources have a value of a unique field that another one has too")
            assert "r1" not in shared  # ids of such resources are for the log alone
            with pytest.raises(UniqueConflict):
                await manager.create(Item(code="c2"))
            with pytest.raises(UniqueConflict):
                await manager.create(Item(code="c1"))
            for resource_id in ("r1", "second"):
                with pytest.raises(UniqueConflict):
                    await manager.update(resource_id, Item(text="x", code="c1"))
            await manager.close()

        manager = manage(self.make(root), indexed=INDEXED)
        await manager.update("second", Item(text="second", code="c9"))
        with pytest.raises(UniqueConflict):  # the one that came back has it still
            await manager.create(Item(code="c1"))
        await manager.update("r1", Item(text="x", code="c1"))
        await manager.purge("lost")
        await manager.storage.maintain(10)
        assert await manager.storage.degradations() == []
        await manager.update("r1", Item(text="x", code="c8"))
        await manager.create(Item(code="c1"))
        await manager.close()
        manager = manage(self.make(root), indexed=INDEXED)
        await manager.open()
        assert await manager.storage.degradations() == []
        await manager.close()

    @pytest.mark.parametrize("done", [False, True], ids=["not-done", "done"])
    async def test_a_failure_of_any_request_at_start_loses_no_entry(self, root: Path, done: bool) -> None:
        """R1 and R4: a start that heals and indexes a field fails at each request in turn; the last start succeeds."""
        manager = manage(self.make(root), indexed=["text", IndexedField("code", unique=True)])
        for number in range(3):
            await manager.create(Item(text="x", code=f"c{number}", number=number), resource_id=f"r{number}")
        if await drop_entries(manager, ["r1"]):
            await manager.create(Item(text="second", code="c1", number=9), resource_id="second")
        await manager.close()
        for at in itertools.count():
            manager = manage(self.make(root), indexed=INDEXED)
            calls = FailingCall(storage_of(manager), at=at, done=done, error=StoreUnavailable("503 of the test"))
            with contextlib.suppress(StoreUnavailable):
                await manager.open()
            failed = calls.failed
            calls.heal()
            await manager.close()
            if not failed:
                break
        assert at > 3, "no request was made to fail"
        manager = manage(self.make(root), indexed=INDEXED)
        for number in range(3):
            assert await manager.count(Query(where=field("text").eq("x") & field("number").eq(number))) == 1
            with pytest.raises(UniqueConflict):
                await manager.create(Item(code=f"c{number}"))
        await manager.close()

    async def test_healing_beside_a_field_that_is_indexed_later(self, root: Path) -> None:
        """R4: the empty entries are outdated as well, so they are made before empty entries are searched for."""
        manager = manage(self.make(root), indexed=["text", IndexedField("code", unique=True)])
        for number in range(3):
            await manager.create(Item(text="x", code=f"c{number}", number=number), resource_id=f"r{number}")
        if not await drop_entries(manager):
            await manager.close()
            return
        await manager.create(Item(text="second", code="c1", number=9), resource_id="second")
        await manager.close()
        manager = manage(self.make(root), indexed=INDEXED)
        await manager.open()
        assert await manager.count(Query(where=field("text").eq("x"))) == 3
        assert await manager.count(Query(where=field("number").gte(0))) == 4
        (told,) = await manager.storage.degradations()
        assert "another one has too" in told
        with pytest.raises(UniqueConflict):
            await manager.create(Item(code="c1"))
        await manager.close()

    async def test_a_dropped_entry_with_only_lists_is_restored(self, root: Path) -> None:
        manager = manage(self.make(root), indexed=["tags"])
        await manager.create(Item(tags=["a"]))
        await manager.create(Item())
        if await drop_entries(manager):
            await manager.close()
            manager = manage(self.make(root), indexed=["tags"])
        assert await manager.count(Query(where=field("tags").contains("a"))) == 1
        await manager.close()

    async def test_data_that_does_not_fit_the_model_is_indexed_as_far_as_possible(self, root: Path) -> None:
        """R2: readable fields are indexed; for the others the value of the old entry is kept."""
        plain = manage(self.make(root), indexed=["text"])
        await plain.create(Item(text="x", number=7, code="c"), resource_id="r")
        await plain.close()
        manager = manage(self.make(root), model=Stricter, indexed=["text", "number"])
        await manager.open()
        assert await manager.count(Query(where=field("text").eq("x"))) == 1
        assert await manager.count(Query(where=field("number").eq(7))) == 1
        (told,) = await manager.storage.degradations()
        assert told.startswith("1 resources have data that do not fit the model")
        await manager.close()
