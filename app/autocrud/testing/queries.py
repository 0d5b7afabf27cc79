"""Queries give what the reference in plain Python gives, order and pages included."""

from __future__ import annotations

import asyncio
import functools
import itertools
import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from msgspec import UNSET
from msgspec.structs import replace

from .. import Query, field
from ..errors import (
    InvalidData,
)
from ..query import SET_OPS, STATE_OPS, Compare, Filter, Not, Sort, ops_of
from ..resource_manager.basic import ResourceMeta
from ..resource_manager.core import ResourceManager
from ..resource_manager.engine.access_filter import matches
from ..resource_manager.engine.operations import (
    Create,
)
from . import reference
from .base import Conformance, state_of
from .model import Item, manage
from .strategies import SAMPLES, items, queries

Row = tuple[ResourceMeta, Item]


async def _ready(json: bytes) -> bytes:
    return json


class QueryConformance(Conformance):
    """Queries give what the reference in plain Python gives, order and pages included."""

    def test_every_query_returns_the_result_of_the_reference(self) -> None:
        """Results must be equal, order and pages included, for any data and any query."""
        runner = asyncio.Runner()

        # Making a store is what takes time on servers: few of them, and many queries to each.
        @settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
        @given(
            st.lists(items, max_size=10),
            st.lists(st.integers(0, 9), max_size=3),
            st.lists(queries, min_size=3, max_size=14),
        )
        def check(data: list[Item], touched: list[int], asked: list[Query]) -> None:
            with tempfile.TemporaryDirectory() as directory:
                runner.run(self._compare(manage(self.make(Path(directory))), data, touched, asked))

        with runner:
            check()

    async def _compare(
        self, manager: ResourceManager[Item], data: list[Item], touched: list[int], asked: list[Query]
    ) -> None:
        creates = [
            Create(replace(item, note=str(at)), status="draft" if at % 3 == 0 else "stable")
            for at, item in enumerate(data)
        ]
        ids = [state_of(created).resource_id for created in await manager.batch(creates)] if creates else []
        for at in touched:
            if at < len(ids):
                meta = (await manager.get(ids[at], include_deleted=True)).meta
                await (manager.restore(ids[at]) if meta.is_deleted else manager.delete(ids[at]))
        rows: list[Row] = [
            (found.meta, found.data) for found in [await manager.get(rid, include_deleted=True) for rid in ids]
        ]
        for query in asked:
            expected = reference.answer(query, rows)
            assert await manager.count(query) == len(expected)
            assert await self._all(manager, query) == expected
            assert await self._held(manager, query, rows) == set(expected)
        await manager.close()

    async def _held(self, manager: ResourceManager[Item], query: Query, rows: list[Row]) -> set[str]:
        """Return the ids for which the filter holds, evaluated for one resource at a time, as permissions are."""
        where, found = query.resolve(manager.codec.fields).where, set()
        for meta, data in rows:
            json = manager.codec.accept(data).json
            if where is None or await matches(where, meta, functools.partial(_ready, json), manager.codec):
                found.add(meta.resource_id)
        return found if query.include_deleted else found - {meta.resource_id for meta, _ in rows if meta.is_deleted}

    async def _all(self, manager: ResourceManager[Item], query: Query) -> list[str]:
        found: list[str] = []
        after: str | None = None
        while True:
            page = await manager.find(replace(query, after=after))
            assert len(page.items) <= query.limit
            found += [hit.meta.resource_id for hit in page.items]
            if (after := page.next) is None:
                return found

    @pytest.mark.parametrize("name", SAMPLES)
    async def test_every_operator_with_every_value(self, manager: ResourceManager[Item], name: str) -> None:
        await manager.batch([Create(Item(**{name: value}), f"{at:02}") for at, value in enumerate(SAMPLES[name])])
        rows: list[Row] = [(found.meta, found.data) for found in (await manager.search(Query(limit=200))).items]
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

    async def test_strings_compare_by_code_point(self, manager: ResourceManager[Item]) -> None:
        for text in ("10", "9", "a", "B", "ä", "\ue000", "😀"):
            await manager.create(Item(text=text))
        page = await manager.search(Query(where=field("text").gte("2"), sort=("text",)))
        assert [found.data.text for found in page.items] == ["9", "B", "a", "ä", "\ue000", "😀"]

    async def test_pages_are_stable_during_writes(self, manager: ResourceManager[Item]) -> None:
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

    async def test_a_search_sees_every_write(self, manager: ResourceManager[Item]) -> None:
        created = await manager.create(Item(text="a", tags=["x"]))
        rid = created.meta.resource_id

        async def found(where: Filter) -> bool:
            return [hit.meta.resource_id for hit in (await manager.find(Query(where=where))).items] == [rid]

        assert await found(field("tags").contains("x"))
        await manager.update(rid, Item(text="b", tags=["y"]))
        assert not await found(field("tags").contains("x"))
        assert await found(field("tags").contains("y") & field("text").eq("b"))
        await manager.delete(rid)
        assert not await found(field("text").eq("b"))
        await manager.restore(rid)
        assert await found(field("text").eq("b"))

    async def test_values_that_cannot_be_compared_are_refused(self, manager: ResourceManager[Item]) -> None:
        import datetime as dt

        for item in (
            Item(at=dt.datetime(2026, 1, 1)),  # noqa: DTZ001 - it has none
            Item(number=2**63),
            Item(text="\0"),
            Item(tags=["\0"]),
        ):
            with pytest.raises(InvalidData):
                await manager.create(item)
        assert await manager.count() == 0
