"""The rules of revisions: drafts, history, deletion, retention."""

from __future__ import annotations

import asyncio
import datetime as dt
from pathlib import Path

import httpx
import pytest
from starlette.applications import Starlette

from .. import Query, Retention, field
from ..errors import (
    ResourceDeleted,
    ResourceNotFound,
    RevisionIsStable,
    RevisionNotFound,
    UniqueConflict,
    VersionConflict,
)
from ..http.model_context import Policy
from ..http.service import routes
from ..resource_manager.core import ResourceManager
from ..resource_manager.engine.operations import (
    Switch,
    Update,
)
from .base import Conformance
from .model import Clock, Item, manage


class RevisionConformance(Conformance):
    """The rules of revisions: drafts, history, deletion, retention."""

    async def test_create_and_get(self, manager: ResourceManager[Item]) -> None:
        created = await manager.create(Item(text="a", tags=["x"]), by="alice")
        meta = created.meta
        assert (meta.version, meta.revision, meta.total_revision_count) == (1, 1, 1)
        assert (meta.status, meta.is_deleted, meta.created_by, meta.updated_by) == ("stable", False, "alice", "alice")
        found = await manager.get(meta.resource_id)
        assert found.meta == meta
        assert found.data == Item(text="a", tags=["x"])

    async def test_create_under_a_chosen_id_once(self, manager: ResourceManager[Item]) -> None:
        await manager.create(Item(), resource_id="mine")
        with pytest.raises(VersionConflict):
            await manager.create(Item(text="other"), resource_id="mine")
        assert (await manager.get("mine")).data == Item()

    async def test_missing_resources_and_revisions(self, manager: ResourceManager[Item]) -> None:
        with pytest.raises(ResourceNotFound):
            await manager.get("nothing")
        with pytest.raises(ResourceNotFound):
            await manager.update("nothing", Item())
        created = await manager.create(Item())
        with pytest.raises(RevisionNotFound):
            await manager.get(created.meta.resource_id, revision=2)
        with pytest.raises(RevisionNotFound):
            await manager.get(created.meta.resource_id, revision=10**30)
        for number in (0, 2, 10**30):
            with pytest.raises(RevisionNotFound):
                await manager.batch([Switch(resource_id=created.meta.resource_id, revision=number)])

    async def test_update_appends(self, manager: ResourceManager[Item]) -> None:
        first = await manager.create(Item(text="1"), by="alice")
        second = await manager.update(first.meta.resource_id, Item(text="2"), by="bob")
        assert (second.meta.version, second.meta.revision, second.meta.total_revision_count) == (2, 2, 2)
        assert (second.meta.created_by, second.meta.updated_by) == ("alice", "bob")
        assert second.meta.nonce != first.meta.nonce
        history = await manager.revisions(first.meta.resource_id)
        assert [(info.revision, info.parent, info.created_by) for info in history.items] == [
            (2, 1, "bob"),
            (1, None, "alice"),
        ]
        assert (await manager.get(first.meta.resource_id, revision=1)).data == Item(text="1")

    async def test_the_same_data_appends_nothing(self, manager: ResourceManager[Item]) -> None:
        created = await manager.create(Item(text="1"))
        assert (await manager.update(created.meta.resource_id, Item(text="1"))).meta == created.meta
        with pytest.raises(VersionConflict):
            await manager.update(created.meta.resource_id, Item(text="1"), expect=created.version._replace(version=7))

    async def test_drafts_are_modified_in_place_and_stable_revisions_never(
        self, manager: ResourceManager[Item]
    ) -> None:
        draft = await manager.create(Item(text="1"), status="draft")
        modified = await manager.modify(draft.meta.resource_id, Item(text="2"))
        assert (modified.meta.revision, modified.meta.version, modified.meta.status) == (1, 2, "draft")
        published = await manager.publish(draft.meta.resource_id)
        assert (published.meta.status, published.meta.version) == ("stable", 3)
        assert (await manager.publish(draft.meta.resource_id)).meta == published.meta
        with pytest.raises(RevisionIsStable):
            await manager.modify(draft.meta.resource_id, Item(text="3"))
        with pytest.raises(RevisionIsStable):
            await manager.patch(draft.meta.resource_id, lambda tree: tree | {"text": "3"}, mode="modify")
        (info,) = (await manager.revisions(draft.meta.resource_id)).items
        assert (info.status, info.revision) == ("stable", 1)
        assert (await manager.get(draft.meta.resource_id)).data == Item(text="2")

    async def test_switch_moves_the_current_revision_and_history_branches(self, manager: ResourceManager[Item]) -> None:
        created = await manager.create(Item(text="1"))
        rid = created.meta.resource_id
        await manager.update(rid, Item(text="2"))
        switched = await manager.switch(rid, 1)
        assert (switched.meta.revision, switched.meta.total_revision_count, switched.data) == (1, 2, Item(text="1"))
        assert [hit.meta.resource_id for hit in (await manager.find(Query(where=field("text").eq("1")))).items] == [rid]
        third = await manager.update(rid, Item(text="3"))
        assert third.meta.revision == 3
        history = await manager.revisions(rid)
        assert [(info.revision, info.parent) for info in history.items] == [(3, 1), (2, 1), (1, None)]
        with pytest.raises(RevisionNotFound):
            await manager.switch(rid, 4)

    async def test_switching_there_and_back_makes_a_new_state(self, manager: ResourceManager[Item]) -> None:
        created = await manager.create(Item(text="1"))
        rid = created.meta.resource_id
        second = await manager.update(rid, Item(text="2"))
        await manager.switch(rid, 1)
        await manager.switch(rid, 2)
        with pytest.raises(VersionConflict):
            await manager.update(rid, Item(text="3"), expect=second.version)

    async def test_delete_hides_restore_brings_back_purge_erases(self, manager: ResourceManager[Item]) -> None:
        created = await manager.create(Item(text="1", code="c"))
        rid = created.meta.resource_id
        await manager.update(rid, Item(text="2", code="c"))
        await manager.delete(rid)
        for call in (manager.get(rid), manager.update(rid, Item()), manager.delete(rid), manager.publish(rid)):
            with pytest.raises(ResourceDeleted):
                await call
        assert await manager.count() == 0
        assert await manager.count(Query(include_deleted=True)) == 1
        assert (await manager.get(rid, include_deleted=True)).data.text == "2"
        with pytest.raises(UniqueConflict):
            await manager.create(Item(code="c"))
        restored = await manager.restore(rid)
        assert restored.meta.is_deleted is False
        assert (await manager.restore(rid)).meta == restored.meta
        await manager.purge(rid)
        with pytest.raises(ResourceNotFound):
            await manager.get(rid, include_deleted=True)
        assert await manager.count(Query(include_deleted=True)) == 0
        again = await manager.create(Item(code="c"), resource_id=rid)
        assert [info.revision for info in (await manager.revisions(rid)).items] == [1]
        with pytest.raises(VersionConflict):  # a state of the purged one never comes back
            await manager.update(rid, Item(), expect=created.version)
        assert again.meta.version == created.meta.version

    async def test_purge_removes_the_bodies(self, manager: ResourceManager[Item]) -> None:
        created = await manager.create(Item(text="1"))
        rid = created.meta.resource_id
        second = await manager.update(rid, Item(text="2"))
        await manager.purge(rid)
        for uid in (created.meta.uid, second.meta.uid):
            with pytest.raises(Exception, match=uid):
                await manager.storage.bodies([uid])

    async def test_patch_is_applied_to_the_newest_state(self, manager: ResourceManager[Item]) -> None:
        created = await manager.create(Item(number=0))
        rid = created.meta.resource_id
        await asyncio.gather(
            *(manager.patch(rid, lambda tree: tree | {"number": tree["number"] + 1}) for _ in range(20))
        )
        assert (await manager.get(rid)).data.number == 20

    async def test_the_history_has_pages(self, manager: ResourceManager[Item]) -> None:
        created = await manager.create(Item(number=1))
        for number in range(2, 8):
            await manager.update(created.meta.resource_id, Item(number=number))
        seen, before = [], None
        while True:
            page = await manager.revisions(created.meta.resource_id, before=before, limit=3)
            seen += [info.revision for info in page.items]
            if (before := page.next) is None:
                break
        assert seen == [7, 6, 5, 4, 3, 2, 1]

    async def test_a_list_continues_after_an_item_that_is_too_large_for_a_response(
        self, manager: ResourceManager[Item]
    ) -> None:
        for number in range(12):
            note = "x" * (30_000 if number in (0, 5, 6, 11) else 3_000)
            await manager.create(Item(number=number, note=note), resource_id=f"r{number:02}")
        policy = Policy(None, None, False, 1_000_000, fits=lambda body: len(body) <= 20_000)
        transport = httpx.ASGITransport(Starlette(routes=routes({manager.name: manager}, policy)))
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            for more, too_large in (("", {0, 5, 6, 11}), ("&fields=note", {0, 5, 6, 11}), ("&fields=number", set())):
                seen, cursor, pages = [], "", 0
                while cursor is not None:
                    asked = f"/{manager.name}?sort=number&limit=10{more}{cursor and f'&cursor={cursor}'}"
                    answer = await client.get(asked)
                    assert answer.status_code == 200
                    assert len(answer.content) <= 20_000
                    for item in answer.json()["items"]:
                        seen.append(item["meta"]["resource_id"])
                        if len(seen) - 1 in too_large:
                            assert item.keys() == {"meta", "data", "error"}
                            assert (item["data"], item["error"]["type"]) == (None, "urn:crudstack:response-too-large")
                            assert "fields=" in item["error"]["detail"]
                            whole = await client.get(f"/{manager.name}/{seen[-1]}")
                            assert whole.json()["type"] == item["error"]["type"]
                            part = await client.get(f"/{manager.name}/{seen[-1]}?fields=number")
                            assert part.json()["data"] == {"number": len(seen) - 1}
                        else:
                            assert item.keys() == {"meta", "data"}
                    cursor, pages = answer.json()["next_cursor"], pages + 1
                assert seen == [f"r{number:02}" for number in range(12)]
                assert (pages > 2) == bool(too_large)

    @pytest.mark.parametrize("keep", [1, 2, 3])
    async def test_retention_keeps_the_last_n(self, root: Path, keep: int) -> None:
        manager = manage(self.make(root), retention=Retention(last=keep))
        created = await manager.create(Item(number=1))
        rid = created.meta.resource_id
        for number in range(2, 7):
            await manager.update(rid, Item(number=number))
        assert [info.revision for info in (await manager.revisions(rid)).items] == list(range(6, 6 - keep, -1))
        await manager.batch([Update(resource_id=rid, data=Item(number=number)) for number in (7, 8)])
        assert [info.revision for info in (await manager.revisions(rid)).items] == list(range(8, 8 - keep, -1))
        assert (await manager.get(rid)).data.number == 8
        with pytest.raises(Exception, match=created.meta.uid):
            await manager.storage.bodies([created.meta.uid])
        await manager.close()

    async def test_retention_by_days_keeps_the_current_revision(self, root: Path, clock: Clock) -> None:
        manager = manage(self.make(root), retention=Retention(days=1), clock=clock)
        created = await manager.create(Item(number=1))
        rid = created.meta.resource_id
        await manager.update(rid, Item(number=2))
        await manager.switch(rid, 1)
        clock.now += dt.timedelta(days=2)
        await manager.maintain(60)
        assert [info.revision for info in (await manager.revisions(rid)).items] == [1]
        await manager.update(rid, Item(number=3))
        assert [info.revision for info in (await manager.revisions(rid)).items] == [3]
        await manager.close()

    async def test_times_and_hashes(self, manager: ResourceManager[Item], clock: Clock) -> None:
        created = await manager.create(Item(text="1"))
        updated = await manager.update(created.meta.resource_id, Item(text="2"))
        assert updated.meta.created_time == created.meta.created_time < updated.meta.updated_time <= clock.now
        other = await manager.create(Item(text="2"))
        assert other.meta.data_hash == updated.meta.data_hash != created.meta.data_hash
