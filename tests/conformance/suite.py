"""Every promise that a storage makes, as tests. See `tests.conformance` for how to run it on yours."""

from __future__ import annotations

import asyncio
import contextlib
import datetime as dt
import itertools
import multiprocessing
import tempfile
import threading
from abc import abstractmethod
from pathlib import Path
from typing import ClassVar

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from msgspec import UNSET, defstruct
from msgspec.structs import replace
from starlette.applications import Starlette

from app.autocrud import Encoding, IndexedField, Query, Retention, field
from app.autocrud.errors import (
    AnswerGone,
    ConfigError,
    InvalidData,
    KeyInFlight,
    KeyReused,
    ResourceDeleted,
    ResourceNotFound,
    RevisionIsStable,
    RevisionNotFound,
    StoreDamaged,
    StoreUnavailable,
    UniqueConflict,
    VersionConflict,
)
from app.autocrud.http.routes import Policy
from app.autocrud.http.service import routes
from app.autocrud.query import SET_OPS, STATE_OPS, Compare, Not, Sort, ops_of
from app.autocrud.resource_manager.basic import Version
from app.autocrud.resource_manager.core import Caller, IdempotencyKey, ResourceManager
from app.autocrud.resource_manager.engine.access_filter import holds
from app.autocrud.resource_manager.engine.operations import (
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
from app.autocrud.resource_manager.model.codec import Codec
from app.autocrud.resource_manager.storage_factory import IStorageFactory

from . import reference
from .limits import DurableLimitsConformance, LimitsConformance
from .model import INDEXED, Clock, Failing, FailingCall, Item, Stricter, drop_entries, manage
from .strategies import SAMPLES, items, queries

ROUNDS = 25


def keyed(key: str, name: str = "alice", request: str = "") -> Caller:
    return Caller(name, key=IdempotencyKey(key, request))


def version_of(meta) -> Version:
    return Version(meta.version, meta.nonce)


class StorageConformance(LimitsConformance):
    durable: ClassVar[bool] = False
    shares: ClassVar[bool] = False  # whether two storages that `make` makes in one process are one

    @abstractmethod
    def make(self, root: Path) -> IStorageFactory:
        """The factory under test."""

    @pytest.fixture
    def root(self, tmp_path: Path) -> Path:
        return tmp_path

    @pytest.fixture
    def clock(self) -> Clock:
        return Clock()

    @pytest.fixture
    async def manager(self, root: Path, clock: Clock):
        manager = manage(self.make(root), clock=clock)
        yield manager
        await manager.close()

    # What it says about itself

    def test_it_says_whether_it_is_durable(self, root):
        assert manage(self.make(root)).storage.durable is self.durable

    async def test_health(self, manager):
        await manager.open()
        await manager.storage.health()

    # The rules of revisions

    async def test_create_and_get(self, manager):
        created = await manager.create(Item(text="a", tags=["x"]), by="alice")
        meta = created.meta
        assert (meta.version, meta.revision, meta.total_revision_count) == (1, 1, 1)
        assert (meta.status, meta.is_deleted, meta.created_by, meta.updated_by) == ("stable", False, "alice", "alice")
        found = await manager.get(meta.resource_id)
        assert found.meta == meta
        assert found.data == Item(text="a", tags=["x"])

    async def test_create_under_a_chosen_id_once(self, manager):
        await manager.create(Item(), resource_id="mine")
        with pytest.raises(VersionConflict):
            await manager.create(Item(text="other"), resource_id="mine")
        assert (await manager.get("mine")).data == Item()

    async def test_what_is_not_there(self, manager):
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

    async def test_update_appends(self, manager):
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

    async def test_the_same_data_appends_nothing(self, manager):
        created = await manager.create(Item(text="1"))
        assert (await manager.update(created.meta.resource_id, Item(text="1"))).meta == created.meta
        with pytest.raises(VersionConflict):
            await manager.update(created.meta.resource_id, Item(text="1"), expect=created.version._replace(version=7))

    async def test_drafts_are_modified_in_place_and_stable_revisions_never(self, manager):
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

    async def test_switch_moves_the_current_revision_and_history_branches(self, manager):
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

    async def test_switching_there_and_back_makes_a_new_state(self, manager):
        created = await manager.create(Item(text="1"))
        rid = created.meta.resource_id
        second = await manager.update(rid, Item(text="2"))
        await manager.switch(rid, 1)
        await manager.switch(rid, 2)
        with pytest.raises(VersionConflict):
            await manager.update(rid, Item(text="3"), expect=second.version)

    async def test_delete_hides_restore_brings_back_purge_erases(self, manager):
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

    async def test_purge_removes_the_bodies(self, manager):
        created = await manager.create(Item(text="1"))
        rid = created.meta.resource_id
        second = await manager.update(rid, Item(text="2"))
        await manager.purge(rid)
        for uid in (created.meta.uid, second.meta.uid):
            with pytest.raises(Exception, match=uid):
                await manager.storage.bodies([uid])

    async def test_patch_is_applied_to_the_newest_state(self, manager):
        created = await manager.create(Item(number=0))
        rid = created.meta.resource_id
        await asyncio.gather(
            *(manager.patch(rid, lambda tree: tree | {"number": tree["number"] + 1}) for _ in range(20))
        )
        assert (await manager.get(rid)).data.number == 20

    async def test_the_history_has_pages(self, manager):
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

    async def test_a_list_goes_on_after_an_item_that_no_answer_holds(self, manager):
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
    async def test_retention_keeps_the_last_n(self, root, keep):
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

    async def test_retention_of_days_spares_the_current_revision(self, root, clock):
        import datetime as dt

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

    async def test_times_and_hashes(self, manager, clock):
        created = await manager.create(Item(text="1"))
        updated = await manager.update(created.meta.resource_id, Item(text="2"))
        assert updated.meta.created_time == created.meta.created_time < updated.meta.updated_time <= clock.now
        other = await manager.create(Item(text="2"))
        assert other.meta.data_hash == updated.meta.data_hash != created.meta.data_hash

    # Queries

    def test_every_query_gives_what_the_reference_says(self):
        """Results must be equal, order and pages included, for any data and any query."""
        runner = asyncio.Runner()

        # Making a store is what takes time on servers: few of them, and many queries to each.
        @settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
        @given(
            st.lists(items, max_size=10),
            st.lists(st.integers(0, 9), max_size=3),
            st.lists(queries, min_size=3, max_size=14),
        )
        def check(data, touched, asked):
            with tempfile.TemporaryDirectory() as directory:
                runner.run(self._compare(manage(self.make(Path(directory))), data, touched, asked))

        with runner:
            check()

    async def _compare(self, manager: ResourceManager[Item], data, touched, asked):
        creates = [
            Create(replace(item, note=str(at)), status="draft" if at % 3 == 0 else "stable")
            for at, item in enumerate(data)
        ]
        ids = [created.meta.resource_id for created in await manager.batch(creates)] if creates else []
        for at in touched:
            if at < len(ids):
                meta = (await manager.get(ids[at], include_deleted=True)).meta
                await (manager.restore(ids[at]) if meta.is_deleted else manager.delete(ids[at]))
        rows = [(found.meta, found.data) for found in [await manager.get(rid, include_deleted=True) for rid in ids]]
        for query in asked:
            expected = reference.answer(query, rows)
            assert await manager.count(query) == len(expected)
            assert await self._all(manager, query) == expected
            assert await self._held(manager, query, rows) == set(expected)
        await manager.close()

    async def _held(self, manager, query, rows) -> set[str]:
        """What a filter finds when it is held against single resources, as permissions do."""
        where, found = query.resolve(manager.codec.fields).where, set()
        for meta, data in rows:
            json = manager.codec.accept(data).json
            if await holds(where, meta, lambda json=json: asyncio.sleep(0, json), manager.codec):
                found.add(meta.resource_id)
        return found if query.include_deleted else found - {meta.resource_id for meta, _ in rows if meta.is_deleted}

    async def _all(self, manager, query) -> list[str]:
        found, after = [], None
        while True:
            page = await manager.find(replace(query, after=after))
            assert len(page.items) <= query.limit
            found += [hit.meta.resource_id for hit in page.items]
            if (after := page.next) is None:
                return found

    @pytest.mark.parametrize("name", SAMPLES)
    async def test_every_operator_with_every_value(self, manager, name):
        await manager.batch([Create(Item(**{name: value}), f"{at:02}") for at, value in enumerate(SAMPLES[name])])
        rows = [(found.meta, found.data) for found in (await manager.search(Query(limit=200))).items]
        kind = manager.codec.fields[name]
        plain = [element for value in SAMPLES[name] if isinstance(value, list) for element in value] or SAMPLES[name]
        values = [value for value in plain if value is not None and value is not UNSET]
        for op in ops_of(kind):
            arguments = [True, False] if op in STATE_OPS else [(), tuple(values[:2])] if op in SET_OPS else values
            for condition in [Compare(name, op, argument) for argument in arguments]:
                for where in (condition, Not(condition)):
                    query = Query(where=where, limit=200)
                    assert await self._all(manager, query) == reference.answer(query, rows), where
        for descending in () if kind.is_list else (False, True):
            query = Query(sort=(Sort(name, descending),), limit=3)
            assert await self._all(manager, query) == reference.answer(query, rows)

    async def test_strings_compare_by_code_point(self, manager):
        for text in ("10", "9", "a", "B", "ä", "\ue000", "😀"):
            await manager.create(Item(text=text))
        page = await manager.search(Query(where=field("text").gte("2"), sort=("text",)))
        assert [found.data.text for found in page.items] == ["9", "B", "a", "ä", "\ue000", "😀"]

    async def test_pages_stay_right_while_rows_are_written(self, manager):
        for number in range(0, 20, 2):
            await manager.create(Item(number=number))
        seen, after, extra = [], None, itertools.count(1, 2)
        while True:
            page = await manager.search(Query(sort=("number",), limit=3, after=after))
            seen += [found.data.number for found in page.items]
            if (after := page.next) is None:
                break
            await manager.create(Item(number=-next(extra)))  # before the cursor: never seen, never shifts
        assert seen == list(range(0, 20, 2))

    async def test_a_search_follows_every_write(self, manager):
        created = await manager.create(Item(text="a", tags=["x"]))
        rid = created.meta.resource_id

        async def found(where) -> bool:
            return [hit.meta.resource_id for hit in (await manager.find(Query(where=where))).items] == [rid]

        assert await found(field("tags").contains("x"))
        await manager.update(rid, Item(text="b", tags=["y"]))
        assert not await found(field("tags").contains("x"))
        assert await found(field("tags").contains("y") & field("text").eq("b"))
        await manager.delete(rid)
        assert not await found(field("text").eq("b"))
        await manager.restore(rid)
        assert await found(field("text").eq("b"))

    async def test_values_that_cannot_be_compared_are_refused(self, manager):
        import datetime as dt

        for item in (Item(at=dt.datetime(2026, 1, 1)), Item(number=2**63), Item(text="\0"), Item(tags=["\0"])):  # noqa: DTZ001
            with pytest.raises(InvalidData):
                await manager.create(item)
        assert await manager.count() == 0

    # Unique fields and batches

    async def test_unique_values(self, manager):
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

    async def test_a_batch_may_swap_unique_values(self, manager):
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

    async def test_a_batch_is_all_or_nothing(self, manager):
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

    async def test_operations_of_a_batch_see_each_other(self, manager):
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
        assert [getattr(result, "meta", result).version for result in results] == list(range(1, 10))
        assert (await manager.get("r")).data.number == 4
        assert [info.revision for info in (await manager.revisions("r")).items] == [3, 2, 1]
        await manager.batch([Purge(resource_id="r"), Create(Item(number=9), "r")])
        assert (await manager.get("r")).data.number == 9
        assert [info.revision for info in (await manager.revisions("r")).items] == [1]

    # Idempotency-Keys

    async def test_under_a_key_a_write_happens_once(self, manager):
        first = await manager.create(Item(number=1), status="draft", by=keyed("create"))
        rid = first.meta.resource_id
        calls = {
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
            assert not by.key.replayed
        now = (await manager.get(rid)).meta
        for name, call in calls.items():
            by = keyed(name)
            again, told = await call(by), answers[name]
            assert by.key.replayed
            assert getattr(again, "meta", again) == getattr(told, "meta", told)
            assert getattr(again, "json", b"") == getattr(told, "json", b"")
        assert (await manager.create(Item(number=1), status="draft", by=keyed("create"))).meta == first.meta
        assert (await manager.get(rid)).meta == now
        assert await manager.count() == 1

    async def test_a_key_belongs_to_one_request_of_one_caller(self, manager):
        first = await manager.create(Item(text="1"), by=keyed("k", request="1"))
        with pytest.raises(KeyReused):
            await manager.create(Item(text="2"), by=keyed("k", request="2"))
        other = await manager.create(Item(text="1"), by=keyed("k", "bob", request="1"))
        assert other.meta.resource_id != first.meta.resource_id
        assert await manager.count() == 2

    async def test_what_changed_nothing_is_remembered_too(self, manager):
        created = await manager.create(Item(text="1"))
        rid = created.meta.resource_id
        assert (await manager.update(rid, Item(text="1"), by=keyed("k"))).meta == created.meta
        newer = await manager.update(rid, Item(text="2"))
        assert (await manager.update(rid, Item(text="1"), by=keyed("k"))).meta == created.meta
        assert (await manager.get(rid)).meta == newer.meta

    async def test_what_was_refused_may_be_asked_again(self, manager):
        with pytest.raises(ResourceNotFound):
            await manager.update("r", Item(text="1"), by=keyed("k"))
        await manager.create(Item(), resource_id="r")
        assert (await manager.update("r", Item(text="1"), by=keyed("k"))).data.text == "1"

    async def test_a_batch_under_a_key(self, manager):
        await manager.create(Item(number=1), resource_id="old")
        same = Update(resource_id="old", data=Item(number=1))
        add = Patch(resource_id="old", apply=lambda tree: tree | {"number": tree["number"] + 1})
        operations = [Create(Item(), "new"), same, add, add, Delete(resource_id="new")]
        first = await manager.batch(operations, by=keyed("k"))
        await manager.update("old", Item(number=100))
        again = await manager.batch(operations, by=keyed("k"))
        assert [getattr(one, "meta", one) for one in again] == [getattr(one, "meta", one) for one in first]
        assert [one.data.number for one in again[1:4]] == [1, 2, 3]
        assert (await manager.get("old")).data.number == 100
        again = [Purge(resource_id="old"), Create(Item(number=7), "old")]
        first = await manager.batch(again, by=keyed("purging"))
        assert (first[0], first[1].meta) == (None, (await manager.get("old")).meta)
        told = await manager.batch(again, by=keyed("purging"))
        assert (told[0], told[1].meta, told[1].json) == (None, first[1].meta, first[1].json)
        for _ in range(2):
            assert await manager.batch([Purge(resource_id="old")], by=keyed("alone")) == [None]
        with pytest.raises(AnswerGone):
            await manager.batch(again, by=keyed("purging"))

    async def test_what_is_purged_is_forgotten_but_not_done_again(self, manager):
        await manager.create(Item(text="1"), resource_id="r", by=keyed("create"))
        await manager.purge("r", by=keyed("purge"))
        with pytest.raises(AnswerGone):
            await manager.create(Item(text="1"), resource_id="r", by=keyed("create"))
        again = await manager.create(Item(text="2"), resource_id="r")
        await manager.purge("r", by=keyed("purge"))
        assert (await manager.get("r")).meta == again.meta

    async def test_an_answer_whose_draft_was_modified_since(self, manager):
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

    async def test_a_key_is_remembered_for_a_day(self, manager, clock):
        import datetime as dt

        await manager.create(Item(), by=keyed("k"))
        clock.now += dt.timedelta(hours=23)
        await manager.create(Item(), by=keyed("other"))
        await manager.create(Item(), by=keyed("k"))
        assert await manager.count() == 2

    async def test_of_tasks_with_one_key_one_writes(self, manager):
        for round_ in range(ROUNDS):
            answers = await asyncio.gather(
                *(manager.create(Item(number=round_), by=keyed(f"{round_}")) for _ in range(8)), return_exceptions=True
            )
            assert sum(not isinstance(answer, KeyInFlight) for answer in answers) >= 1
            told = await manager.create(Item(number=round_), by=keyed(f"{round_}"))
            assert {one.meta.etag for one in answers if not isinstance(one, KeyInFlight)} == {told.meta.etag}
        assert await manager.count() == ROUNDS

    def test_of_event_loops_with_one_key_one_writes(self, root):
        """The keys that are in flight are known to one process; so here two managers meet in the store."""
        managers = [manage(self.make(root)), manage(self.make(root))] if self.shares else [manage(self.make(root))] * 2
        etags = [[], []]
        barrier = threading.Barrier(2, timeout=60)

        async def write(at):
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

    # Races

    async def test_of_tasks_that_expect_one_state_one_wins(self, manager):
        created = await manager.create(Item())
        await self._race(
            manager, created.meta.resource_id, ROUNDS, lambda call: asyncio.gather(*(call(at) for at in range(8)))
        )

    async def _race(self, manager, rid, rounds, run):
        for round_ in range(rounds):
            expect = (await manager.get(rid)).version

            async def attempt(at, round_=round_, expect=expect):
                try:
                    await manager.update(rid, Item(text=f"{round_} {at}"), expect=expect)
                except VersionConflict:
                    return False
                return True

            assert sum(await run(attempt)) == 1
        assert (await manager.get(rid)).meta.revision == rounds + 1

    def test_of_event_loops_in_threads_one_wins(self, root):
        manager = manage(self.make(root))
        rid = asyncio.run(manager.create(Item())).meta.resource_id
        for round_ in range(ROUNDS):
            expect = asyncio.run(manager.get(rid)).version
            won, barrier = [], threading.Barrier(2)

            def attempt(at, round_=round_, expect=expect, won=won, barrier=barrier):
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

    async def test_concurrent_updates_are_all_kept(self, manager):
        created = await manager.create(Item())
        rid = created.meta.resource_id
        await asyncio.gather(*(manager.update(rid, Item(number=number)) for number in range(200)))
        meta = (await manager.get(rid)).meta
        assert (meta.revision, meta.version) == (201, 201)
        numbers = [(await manager.get(rid, revision=revision)).data.number for revision in range(2, 202)]
        assert sorted(numbers) == list(range(200))

    async def test_of_tasks_that_want_one_unique_value_one_gets_it(self, manager):
        for round_ in range(ROUNDS):
            results = await asyncio.gather(
                *(manager.create(Item(code=f"{round_}")) for _ in range(8)), return_exceptions=True
            )
            assert sum(not isinstance(result, UniqueConflict) for result in results) == 1
        assert await manager.count() == ROUNDS

    async def test_of_tasks_that_want_one_id_one_gets_it(self, manager):
        results = await asyncio.gather(
            *(manager.create(Item(number=at), resource_id="id") for at in range(8)), return_exceptions=True
        )
        assert sum(not isinstance(result, VersionConflict) for result in results) == 1

    # Hostile ids and bodies

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
    async def test_ids_are_only_names(self, manager, rid):
        created = await manager.create(Item(text="1"), resource_id=rid)
        assert created.meta.resource_id == rid
        await manager.update(rid, Item(text="2"))
        assert (await manager.get(rid)).data.text == "2"
        assert [hit.meta.resource_id for hit in (await manager.find()).items] == [rid]
        await manager.purge(rid)

    async def test_ids_differ_by_case(self, manager):
        await manager.create(Item(text="upper"), resource_id="Id")
        await manager.create(Item(text="lower"), resource_id="id")
        assert (await manager.get("Id")).data.text == "upper"
        assert (await manager.get("id")).data.text == "lower"

    @pytest.mark.parametrize("rid", ["\0", "a\0b", "\ud800", "a\udfff"])
    async def test_ids_that_are_no_text_are_value_errors(self, manager, rid):
        with pytest.raises(ValueError):
            await manager.create(Item(), resource_id=rid)
        with pytest.raises((ValueError, ResourceNotFound)):
            await manager.get(rid)

    async def test_small_and_large_bodies(self, manager):
        large = "ä" * 2_500_000
        created = await manager.create(Item(note=large))
        assert (await manager.get(created.meta.resource_id)).data.note == large
        empty = await manager.create(Item())
        assert (await manager.get(empty.meta.resource_id)).data == Item()

    # Keeping house

    async def test_maintenance_loses_nothing_that_is_referred_to(self, manager):
        created = await manager.create(Item(text="1"))
        rid = created.meta.resource_id
        for number in range(5):
            await manager.update(rid, Item(number=number))
            await manager.maintain(10)
        for revision in range(1, 7):
            await manager.get(rid, revision=revision)
        assert await manager.count() == 1

    async def test_a_commit_whose_body_was_put_before_a_sweep_is_not_lost(self, manager):
        """Whatever is swept between putting a body and committing it: the body is there, or it is put again under another uid."""
        await manager.open()
        storage = manager.storage
        commits_here = storage.meta_store.authoritative  # else body and record are one step
        decider = storage.meta_store if commits_here and storage._pair is None else storage
        name = "commit" if decider is not storage else "_commit"
        commit, times = getattr(decider, name), 0

        async def slow(*arguments):
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

    async def test_nothing_is_kept_of_what_a_batch_made_and_purged(self, manager):
        caller = keyed("k")
        batch = [Create(Item(text="secret"), "x"), Purge(resource_id="x")]
        await manager.batch(batch, by=caller)
        with pytest.raises((AnswerGone, ResourceNotFound)):
            await manager.batch(batch, by=keyed("k"))
        with pytest.raises(ResourceNotFound):
            await manager.get("x")

    async def test_sweeps_in_between_change_no_batch(self, manager):
        """A generation that was advanced elsewhere: bodies are put again, wherever the batch names them."""
        batches = [
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

    async def test_what_is_old_is_no_orphan(self, manager):
        """Bodies that records name are never swept, so they may be published, deleted and restored however old they are."""
        await manager.create(Item(number=1), resource_id="a", status="draft")
        for _ in range(3):
            await self._swept_elsewhere(manager)
        assert (await manager.publish("a")).meta.status == "stable"
        await manager.delete("a")
        await manager.restore("a")
        await manager.maintain(10)
        assert (await manager.get("a")).data.number == 1

    async def _swept_elsewhere(self, manager):
        await manager.open()
        for _ in range(2):
            await manager.storage.meta_store.advance_generation()


class DurableConformance(DurableLimitsConformance, StorageConformance):
    """For storages that keep what they acknowledged."""

    durable: ClassVar[bool] = True
    keeps_index: ClassVar[bool] = True
    """False: the index is made of the bodies at each start, so a lost body leaves nothing to be found by."""

    async def test_bodies_of_both_encodings_live_side_by_side(self, root):
        rich = Item(text="ä", real=1.5, tags=["x"], number=-1)
        ids = {}
        for encoding in Encoding:
            manager = manage(self.make(root), encoding=encoding)
            ids[encoding] = (await manager.create(replace(rich, code=encoding.value))).meta
            await manager.close()
        manager = manage(self.make(root))
        for encoding, meta in ids.items():
            assert (await manager.get(meta.resource_id)).data == replace(rich, code=encoding.value)
        page = await manager.search()
        assert {item.data.code for item in page.items} == {"json", "msgpack"}
        await manager.close()

    async def test_everything_is_there_after_a_restart(self, root, clock):
        manager = manage(self.make(root), clock=clock)
        kept = await manager.create(Item(text="kept", tags=["x"], code="c"), resource_id="kept", by="alice")
        kept = await manager.update("kept", Item(text="kept 2", tags=["y"], code="c"), status="draft")
        await manager.create(Item(text="deleted"), resource_id="deleted")
        await manager.delete("deleted")
        await manager.create(Item(text="purged"), resource_id="purged")
        await manager.purge("purged")
        once = await manager.create(Item(text="once"), resource_id="once", by=keyed("k"))
        history = await manager.revisions("kept")
        await manager.close()
        again = manage(self.make(root), clock=clock)
        assert (await again.get("kept")).meta == kept.meta
        assert (await again.get("kept", revision=1)).data.text == "kept"
        assert (await again.revisions("kept")).items == history.items
        assert (await again.get("deleted", include_deleted=True)).meta.is_deleted
        assert (await again.create(Item(text="once"), resource_id="once", by=keyed("k"))).meta == once.meta
        assert await again.count(Query(include_deleted=True)) == 3
        found = await again.find(Query(where=field("tags").contains("y")))
        assert [hit.meta.resource_id for hit in found.items] == ["kept"]
        with pytest.raises(UniqueConflict):
            await again.create(Item(code="c"))
        with pytest.raises(VersionConflict):
            await again.create(Item(), resource_id="deleted")
        await again.modify("kept", Item(text="kept 3"), expect=kept.version)
        await again.close()

    async def test_a_body_that_cannot_be_read_now_removes_nothing(self, root):
        """R1: whichever read fails while a field is indexed later, opening fails, and the next try finds everything."""
        plain = manage(self.make(root), indexed=["text", "code"])
        for number in range(6):
            await plain.create(Item(text="x", code=f"c{number}", number=number), resource_id=f"r{number}")
        await plain.close()
        for failing in range(6):
            manager = manage(self.make(root), indexed=INDEXED)
            bodies = Failing(manager.storage.resource_store, at=failing, error=StoreUnavailable("503 of the test"))
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
                assert await manager.storage.impairments() == []
                await manager.close()

    async def test_a_body_that_is_lost_keeps_its_resource_in_the_index(self, root):
        """R2 and R3: it keeps what it was found by, holds its unique value, and is named; the model opens."""
        plain = manage(self.make(root), indexed=["text", IndexedField("code", unique=True)])
        for number in range(3):
            await plain.create(Item(text="x", code=f"c{number}", number=number), resource_id=f"r{number}")
        lost = (await plain.get("r1")).meta.uid
        await plain.storage.resource_store.delete([lost])
        await plain.close()
        manager = manage(self.make(root), indexed=INDEXED)
        await manager.open()
        assert await manager.count() == 3
        assert await manager.count(Query(where=field("number").gte(0))) == 2
        assert await manager.count(Query(where=field("text").eq("x"))) == (3 if self.keeps_index else 2)
        if self.keeps_index:
            with pytest.raises(UniqueConflict):
                await manager.create(Item(code="c1"))
        (told,) = await manager.storage.impairments()
        assert told.startswith("1 resources have lost their data")
        assert told.endswith(": r1")
        await manager.close()

    async def test_a_body_that_is_lost_is_damage_that_is_named_until_it_is_purged(self, root):
        """Others are read as before, and the resource can be written anew."""
        manager = manage(self.make(root), indexed=INDEXED)
        for number in range(3):
            await manager.create(Item(text=f"{number}"), resource_id=f"r{number}")
        await manager.storage.resource_store.delete([(await manager.get("r1")).meta.uid])
        with pytest.raises(StoreDamaged, match="'r1'"):
            await manager.get("r1")
        with pytest.raises(StoreDamaged, match="'r1'"):
            await manager.patch("r1", lambda tree: tree)
        assert [found.meta.resource_id for found in (await manager.search()).items] == ["r0", "r2"]
        assert (await manager.get("r2")).data.text == "2"
        (told,) = await manager.impairments()
        assert told.endswith(": r1")
        await manager.update("r1", Item(text="anew"))
        assert (await manager.get("r1")).data.text == "anew"
        with pytest.raises(StoreDamaged, match="'r1'"):
            await manager.get("r1", revision=1)
        await manager.purge("r1")
        assert await manager.impairments() == []
        await manager.close()

    async def test_what_an_earlier_program_dropped_from_the_index_comes_back_once(self, root):
        """R4. It left empty entries that counted as made, and gave a unique value of one out again."""
        manager = manage(self.make(root), indexed=INDEXED)
        for number in range(5):
            await manager.create(Item(text="x", code=f"c{number}", number=number), resource_id=f"r{number}")
        await manager.create(Item(text="y", code="gone"), resource_id="lost")
        await manager.delete("r0")
        if not await drop_entries(manager):
            await manager.close()
            return  # its index is made of the bodies at each start
        await manager.storage.resource_store.delete([(await manager.get("lost")).meta.uid])
        await manager.create(Item(text="second", code="c1"), resource_id="second")
        assert await manager.count(Query(where=field("text").eq("x"))) == 0
        await manager.close()

        for _ in range(2):  # a restart does not forget
            manager = manage(self.make(root), indexed=INDEXED)
            await manager.open()
            assert await manager.count(Query(where=field("text").eq("x"))) == 4
            assert await manager.count(Query(where=field("number").gte(0), include_deleted=True)) == 5
            assert await manager.count(Query(where=field("code").eq("c1"))) == 2
            lost, shared = await manager.storage.impairments()
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
        assert await manager.storage.impairments() == []
        await manager.update("r1", Item(text="x", code="c8"))
        await manager.create(Item(code="c1"))
        await manager.close()
        manager = manage(self.make(root), indexed=INDEXED)
        await manager.open()
        assert await manager.storage.impairments() == []
        await manager.close()

    @pytest.mark.parametrize("done", [False, True], ids=["not-done", "done"])
    async def test_whichever_request_fails_nothing_disappears(self, root, done):
        """R1 and R4: a start that heals and indexes a field more is cut off at each of its requests; the last one ends well."""
        manager = manage(self.make(root), indexed=["text", IndexedField("code", unique=True)])
        for number in range(3):
            await manager.create(Item(text="x", code=f"c{number}", number=number), resource_id=f"r{number}")
        if await drop_entries(manager, ["r1"]):
            await manager.create(Item(text="second", code="c1", number=9), resource_id="second")
        await manager.close()
        for at in itertools.count():
            manager = manage(self.make(root), indexed=INDEXED)
            calls = FailingCall(manager.storage, at=at, done=done, error=StoreUnavailable("503 of the test"))
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

    async def test_healing_beside_a_field_that_is_indexed_later(self, root):
        """R4: the entries are outdated as well, so they are made before those that are empty are looked for."""
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
        (told,) = await manager.storage.impairments()
        assert "another one has too" in told
        with pytest.raises(UniqueConflict):
            await manager.create(Item(code="c1"))
        await manager.close()

    async def test_an_entry_of_lists_alone_comes_back(self, root):
        manager = manage(self.make(root), indexed=["tags"])
        await manager.create(Item(tags=["a"]))
        await manager.create(Item())
        if await drop_entries(manager):
            await manager.close()
            manager = manage(self.make(root), indexed=["tags"])
        assert await manager.count(Query(where=field("tags").contains("a"))) == 1
        await manager.close()

    async def test_data_that_do_not_fit_the_model_are_indexed_as_far_as_they_do(self, root):
        """R2: a field that can be read is indexed, one that cannot keeps the value of the old entry."""
        plain = manage(self.make(root), indexed=["text"])
        await plain.create(Item(text="x", number=7, code="c"), resource_id="r")
        await plain.close()
        manager = manage(self.make(root), model=Stricter, indexed=["text", "number"])
        await manager.open()
        assert await manager.count(Query(where=field("text").eq("x"))) == 1
        assert await manager.count(Query(where=field("number").eq(7))) == 1
        (told,) = await manager.storage.impairments()
        assert told.startswith("1 resources have data that do not fit the model")
        await manager.close()

    async def test_a_field_that_is_indexed_later_finds_what_was_there(self, root):
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
    async def test_a_field_may_be_indexed_as_something_else(self, root, later, value):
        """And back again, as long as there are rows of both kinds."""
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
    async def test_a_field_that_becomes_unique_must_be(self, root, earlier):
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


class SharedConformance(DurableConformance):
    """For storages that several processes may use at once. `make` is called in other processes too: no state of the test in it."""

    shares: ClassVar[bool] = True

    async def test_writers_of_several_instances_to_one_resource_all_succeed(self, root):
        """Without an expectation no writer is told that others were faster, however many there are."""
        instances = [manage(self.make(root)) for _ in range(3)]
        rid = (await instances[0].create(Item())).meta.resource_id
        writes = [(at, number) for number in range(10) for at in range(len(instances))]
        await asyncio.gather(*(instances[at].update(rid, Item(number=10 * number + at)) for at, number in writes))
        for instance in instances:
            assert (await instance.get(rid)).meta.version == len(writes) + 1
            await instance.close()

    async def test_what_another_instance_did_under_the_key_meanwhile_is_the_answer(self, root):
        """It looked for the key, the other one committed, and now the change is no longer possible."""
        here, there = manage(self.make(root)), manage(self.make(root))
        for number, change in enumerate(
            (
                lambda manager, meta, by: manager.update(
                    meta.resource_id, Item(text="2"), expect=version_of(meta), by=by
                ),
                lambda manager, meta, by: manager.delete(meta.resource_id, by=by),
                lambda manager, _, by: manager.create(Item(text="new"), resource_id="new", by=by),
            )
        ):
            meta = (await here.create(Item(text="1"))).meta
            looked, go_on, done = asyncio.Event(), asyncio.Event(), there.storage.done

            async def slow(key, *, peek=False, looked=looked, go_on=go_on, done=done):
                found = await done(key, peek=peek)
                looked.set()
                await go_on.wait()
                return found

            there.storage.done = slow
            second = asyncio.create_task(change(there, meta, keyed(f"k{number}")))
            await looked.wait()
            first = await change(here, meta, keyed(f"k{number}"))
            go_on.set()
            answer = await second
            there.storage.done = done
            assert getattr(answer, "meta", answer) == getattr(first, "meta", first)
        for manager in (here, there):
            await manager.close()

    @pytest.mark.parametrize("earlier", [["text"], ["text", "code"]])
    async def test_what_becomes_unique_is_so_for_programs_that_run_already(self, root, earlier):
        """And they go on writing while the index is completed."""
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

    async def test_a_write_is_answered_although_it_is_purged_at_once(self, root):
        here, there = manage(self.make(root)), manage(self.make(root))
        commit = here.storage.commit

        async def then_purge(writes, once=None):
            committed = await commit(writes, once)
            await there.purge("r")
            return committed

        for write in (  # of what needs a body that is there already
            lambda: here.publish("r"),
            lambda: here.switch("r", 1),
            lambda: here.patch("r", lambda data: data | {"number": 1}),
        ):
            await here.create(Item(text="1"), resource_id="r")
            await here.update("r", Item(text="1", number=2), status="draft")
            here.storage.commit = then_purge
            assert (await write()).data.text == "1"
            here.storage.commit = commit
        for manager in (here, there):
            await manager.close()

    async def test_what_an_older_program_writes_later_is_indexed_by_housekeeping(self, root):
        old, new = manage(self.make(root), indexed=["text"]), manage(self.make(root), indexed=["text", "number"])
        await old.open()
        await new.open()
        await old.create(Item(number=7), resource_id="a")
        await new.maintain(30)
        assert await new.count(Query(where=field("number").eq(7))) == 1
        for manager in (old, new):
            await manager.close()

    async def test_what_cannot_become_unique_locks_nobody_out(self, root):
        """Although the earlier program wrote it at the last moment, when it was kept out already."""
        old, new = manage(self.make(root), indexed=["text"]), manage(self.make(root))
        await old.create(Item(code="c"), resource_id="a")
        await old.create(Item(), resource_id="b")
        indexed, texts = new.storage.meta_store.indexed, iter("12")

        async def slow(*, force: bool = False) -> bool:
            if not force and (text := next(texts, None)):
                await old.update("b", Item(text=text, code="c"))
            return await indexed(force=force)

        new.storage.meta_store.indexed = slow
        with pytest.raises(ConfigError, match="code was declared unique, but stored resources share a value"):
            await new.open()
        await old.update("b", Item(code="d"))
        again = manage(self.make(root))
        await again.open()
        with pytest.raises(UniqueConflict):
            await again.create(Item(code="d"))
        for manager in (old, new, again):
            await manager.close()

    def test_of_processes_that_expect_one_state_one_wins(self, root):
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

        async def check():
            manager = manage(self.make(root))
            assert (await manager.get(rid)).meta.revision == ROUNDS + 1
            assert await manager.count(Query(where=field("text").eq("unique"))) == 1
            assert await manager.count(Query(where=field("text").starts_with("key "))) == ROUNDS
            await manager.close()

        asyncio.run(check())

    async def _prepare(self, root) -> str:
        manager = manage(self.make(root))
        created = await manager.create(Item())
        await manager.close()
        return created.meta.resource_id


class OwnedConformance(DurableConformance):
    """For storages that one process owns."""

    keeps_index: ClassVar[bool] = False

    async def test_an_owner_that_comes_back_sees_what_another_one_did(self, root):
        first, second = manage(self.make(root)), manage(self.make(root))
        for rid in ("kept", "purged"):
            await first.create(Item(text=rid), resource_id=rid)
        await first.close()
        await second.purge("purged")
        await second.update("kept", Item(text="changed"))
        await second.close()
        assert [found.data.text for found in (await first.search()).items] == ["changed"]
        await first.close()

    def test_a_second_process_is_refused(self, root):
        manager = manage(self.make(root))
        asyncio.run(manager.open())
        with pytest.raises(ConfigError, match="another process"):
            asyncio.run(manage(self.make(root)).open())
        asyncio.run(manager.close())
        again = manage(self.make(root))
        asyncio.run(again.open())
        asyncio.run(again.close())


def _race_in_process(conformance, root, rid, at, barrier, outcomes):
    asyncio.run(_race_rounds(conformance, root, rid, at, barrier, outcomes))


async def _race_rounds(conformance, root, rid, at, barrier, outcomes):
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
