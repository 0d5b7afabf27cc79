"""Writes under an Idempotency-Key happen once."""

from __future__ import annotations

import asyncio
import contextlib
import datetime as dt
import threading
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from ..errors import (
    AnswerGone,
    KeyInFlight,
    KeyReused,
    ResourceNotFound,
)
from ..resource_manager.core import Caller, ResourceManager
from ..resource_manager.engine.operations import (
    Create,
    Delete,
    Operation,
    Patch,
    Purge,
    Update,
)
from ..resource_manager.model.resource import Resource
from .base import ROUNDS, Conformance, keyed, resource_of, state_of
from .model import Clock, Item, manage


class IdempotencyConformance(Conformance):
    """Writes under an Idempotency-Key happen once."""

    async def test_under_a_key_a_write_happens_once(self, manager: ResourceManager[Item]) -> None:
        first = await manager.create(Item(number=1), status="draft", by=keyed("create"))
        rid = first.meta.resource_id
        calls: dict[str, Callable[[Caller], Awaitable[Any]]] = {
            "update": lambda by: manager.update(rid, Item(number=2), status="draft", by=by),
            "patch": lambda by: manager.patch(
                rid, lambda tree: tree | {"number": tree["number"] + 1}, status="draft", by=by
            ),
            "publish": lambda by: manager.publish(rid, by=by),
            "switch": lambda by: manager.switch(rid, 2, by=by),
            "delete": lambda by: manager.delete(rid, by=by),
            "restore": lambda by: manager.restore(rid, by=by),
        }
        answers = {}
        for name, call in calls.items():
            by = keyed(name)
            answers[name] = await call(by)
            assert by.key is not None
            assert not by.key.replayed
        now = (await manager.get(rid)).meta
        for name, call in calls.items():
            by = keyed(name)
            again, told = await call(by), answers[name]
            assert by.key is not None
            assert by.key.replayed
            assert getattr(again, "meta", again) == getattr(told, "meta", told)
            assert getattr(again, "json", b"") == getattr(told, "json", b"")
        assert (await manager.create(Item(number=1), status="draft", by=keyed("create"))).meta == first.meta
        assert (await manager.get(rid)).meta == now
        assert await manager.count() == 1

    async def test_a_key_belongs_to_one_request_of_one_caller(self, manager: ResourceManager[Item]) -> None:
        first = await manager.create(Item(text="1"), by=keyed("k", request="1"))
        with pytest.raises(KeyReused):
            await manager.create(Item(text="2"), by=keyed("k", request="2"))
        other = await manager.create(Item(text="1"), by=keyed("k", "bob", request="1"))
        assert other.meta.resource_id != first.meta.resource_id
        assert await manager.count() == 2

    async def test_a_write_without_a_change_is_remembered(self, manager: ResourceManager[Item]) -> None:
        created = await manager.create(Item(text="1"))
        rid = created.meta.resource_id
        assert (await manager.update(rid, Item(text="1"), by=keyed("k"))).meta == created.meta
        newer = await manager.update(rid, Item(text="2"))
        assert (await manager.update(rid, Item(text="1"), by=keyed("k"))).meta == created.meta
        assert (await manager.get(rid)).meta == newer.meta

    async def test_a_refused_request_may_be_repeated(self, manager: ResourceManager[Item]) -> None:
        with pytest.raises(ResourceNotFound):
            await manager.update("r", Item(text="1"), by=keyed("k"))
        await manager.create(Item(), resource_id="r")
        assert (await manager.update("r", Item(text="1"), by=keyed("k"))).data.text == "1"

    async def test_a_batch_under_a_key(self, manager: ResourceManager[Item]) -> None:
        await manager.create(Item(number=1), resource_id="old")
        same = Update(resource_id="old", data=Item(number=1))
        add = Patch(resource_id="old", apply=lambda tree: tree | {"number": tree["number"] + 1})
        operations: list[Operation] = [Create(Item(), "new"), same, add, add, Delete(resource_id="new")]
        first = await manager.batch(operations, by=keyed("k"))
        await manager.update("old", Item(number=100))
        again = await manager.batch(operations, by=keyed("k"))
        assert [getattr(one, "meta", one) for one in again] == [getattr(one, "meta", one) for one in first]
        assert [resource_of(one).data.number for one in again[1:4]] == [1, 2, 3]
        assert (await manager.get("old")).data.number == 100
        purging: list[Operation] = [Purge(resource_id="old"), Create(Item(number=7), "old")]
        first = await manager.batch(purging, by=keyed("purging"))
        assert (first[0], state_of(first[1])) == (None, (await manager.get("old")).meta)
        told = await manager.batch(purging, by=keyed("purging"))
        assert (told[0], state_of(told[1])) == (None, state_of(first[1]))
        assert resource_of(told[1]).json == resource_of(first[1]).json
        for _ in range(2):
            assert await manager.batch([Purge(resource_id="old")], by=keyed("alone")) == [None]
        with pytest.raises(AnswerGone):
            await manager.batch(purging, by=keyed("purging"))

    async def test_a_purge_removes_remembered_results_and_is_not_repeated(self, manager: ResourceManager[Item]) -> None:
        await manager.create(Item(text="1"), resource_id="r", by=keyed("create"))
        await manager.purge("r", by=keyed("purge"))
        with pytest.raises(AnswerGone):
            await manager.create(Item(text="1"), resource_id="r", by=keyed("create"))
        again = await manager.create(Item(text="2"), resource_id="r")
        await manager.purge("r", by=keyed("purge"))
        assert (await manager.get("r")).meta == again.meta

    async def test_a_repeated_request_after_its_draft_was_modified(self, manager: ResourceManager[Item]) -> None:
        draft = await manager.create(Item(text="1"), status="draft", by=keyed("create"))
        rid = draft.meta.resource_id
        patched = await manager.patch(rid, lambda tree: tree | {"text": "2"}, mode="modify", by=keyed("patch"))
        assert patched.data.text == "2"
        await manager.modify(rid, Item(text="3"))
        told = await manager.create(Item(text="1"), status="draft", by=keyed("create"))
        assert (told.meta, told.data.text) == (draft.meta, "1")  # the request holds what the store no longer has
        with pytest.raises(AnswerGone):
            await manager.patch(rid, lambda tree: tree | {"text": "2"}, mode="modify", by=keyed("patch"))
        assert (await manager.get(rid)).data.text == "3"

    async def test_a_key_is_remembered_for_a_day(self, manager: ResourceManager[Item], clock: Clock) -> None:
        await manager.create(Item(), by=keyed("k"))
        clock.now += dt.timedelta(hours=23)
        await manager.create(Item(), by=keyed("other"))
        await manager.create(Item(), by=keyed("k"))
        assert await manager.count() == 2

    async def test_one_of_several_tasks_writes_under_a_key(self, manager: ResourceManager[Item]) -> None:
        for round_ in range(ROUNDS):
            answers = await asyncio.gather(
                *(manager.create(Item(number=round_), by=keyed(f"{round_}")) for _ in range(8)), return_exceptions=True
            )
            assert sum(not isinstance(answer, KeyInFlight) for answer in answers) >= 1
            told = await manager.create(Item(number=round_), by=keyed(f"{round_}"))
            assert {one.meta.etag for one in answers if isinstance(one, Resource)} == {told.meta.etag}
        assert await manager.count() == ROUNDS

    def test_one_of_several_event_loops_writes_under_a_key(self, root: Path) -> None:
        """A manager knows only its own keys in flight, so two managers race in the store."""
        managers = [manage(self.make(root)), manage(self.make(root))] if self.shares else [manage(self.make(root))] * 2
        etags: list[list[str]] = [[], []]
        barrier = threading.Barrier(2, timeout=60)

        async def write(at: int) -> None:
            for round_ in range(ROUNDS):
                await asyncio.to_thread(barrier.wait)
                with contextlib.suppress(KeyInFlight):
                    etags[at].append((await managers[at].create(Item(number=round_), by=keyed(f"{round_}"))).meta.etag)
            await asyncio.to_thread(barrier.wait)
            await managers[at].close()

        threads = [threading.Thread(target=lambda at=at: asyncio.run(write(at))) for at in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len({*etags[0], *etags[1]}) == ROUNDS
        if self.shares:
            assert etags[0] == etags[1]
