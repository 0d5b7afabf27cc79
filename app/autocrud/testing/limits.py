"""The limits of stored data, which are the same on every storage; `contract.limits` lists them."""

from __future__ import annotations

import asyncio
import functools
import tempfile
from abc import abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from msgspec import defstruct
from msgspec.structs import replace

from .. import Query, field
from ..errors import ConfigError, CrudError, InvalidData, MetadataTooLarge, ResourceNotFound, UniqueConflict
from ..resource_manager.basic import Change, Version, Write
from ..resource_manager.contract.limits import MAX_FIELDS, MAX_ID, MAX_INDEXED, MAX_ITEMS, MAX_NAME, SMALL
from ..resource_manager.contract.protocols import IndexMigration
from ..resource_manager.core import Caller, IdempotencyKey, ResourceManager
from ..resource_manager.engine import planning
from ..resource_manager.engine.operations import Create, Update
from ..resource_manager.storage.reindexing import CHUNK
from ..resource_manager.storage_factory import IStorageFactory
from .base import state_of
from .model import Inner, Item, manage, storage_of

UNITS = ["a", "é", "漢", "\U0010ffff", '"', "\x01"]
"""Characters of one to four bytes in UTF-8, and characters that JSON escapes."""
units = st.sampled_from(UNITS)
offsets = st.sampled_from([-1, 0, 1])
edges = settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)


def text_of(size: int, unit: str) -> str:
    """Return a text that takes so many bytes in UTF-8."""
    count, rest = divmod(size, len(unit.encode()))
    return unit * count + "a" * rest


def padded(manager: ResourceManager[Item], item: Item, name: str, unit: str, size: int) -> Item:
    """Return the item with a text in one field, so long that the indexed fields take so many bytes."""

    def made(text: str) -> Item:
        return replace(item, inner=Inner(text)) if name == "inner.code" else replace(item, **{name: text})

    empty = len(manager.codec.index(made("")).shown)
    each = len(manager.codec.index(made(unit)).shown) - empty
    count, rest = divmod(size - empty, each)
    full = made(unit * count + "a" * rest)
    assert len(manager.codec.index(full).shown) == size
    return full


def merged(change: dict[str, Any]) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """Return the function of a patch that replaces some fields."""
    return lambda tree: tree | change


async def plant(manager: ResourceManager[Item], item: Item, **how: str) -> str:
    """Create a resource as a program without limits did."""
    with (
        mock.patch.object(planning, "may_exceed", return_value=False),
        mock.patch.object(planning, "check_new_id", return_value=None),
    ):
        return (await manager.create(item, **how)).meta.resource_id  # type: ignore[arg-type]


async def ids(manager: ResourceManager[Item], query: Query) -> list[str]:
    """Return the ids of a page of a query."""
    return [hit.meta.resource_id for hit in (await manager.find(query)).items]


class LimitsConformance:
    """Values at and above the limits, and resources that were too large before there were limits."""

    @abstractmethod
    def make(self, root: Path) -> IStorageFactory:
        """Return the factory under test."""

    def test_indexed_fields_at_the_limit(self) -> None:
        @edges
        @given(st.sampled_from(["text", "maybe", "inner.code", "code"]), units, offsets, st.integers(0, 3))
        @example("text", "a", 0, 0)
        @example("code", "\U0010ffff", 0, 0)
        @example("code", "\x01", 1, 3)
        def check(name: str, unit: str, offset: int, tags: int) -> None:
            with tempfile.TemporaryDirectory() as directory:
                runner.run(self._at_the_limit(manage(self.make(Path(directory))), name, unit, offset, tags))

        with asyncio.Runner() as runner:
            check()

    async def _at_the_limit(self, manager: ResourceManager[Item], name: str, unit: str, offset: int, tags: int) -> None:
        start = Item(tags=[f"{number}{unit * 500}" for number in range(tags)])
        item = padded(manager, start, name, unit, MAX_INDEXED + offset)
        value: Any = functools.reduce(getattr, name.split("."), item)
        if offset > 0:
            with pytest.raises(MetadataTooLarge) as refused:
                await manager.create(item, resource_id="r")
            assert str(MAX_INDEXED + offset) in refused.value.detail
            assert repr(name) in refused.value.detail
            assert [violation.pointer for violation in refused.value.violations] == ["/" + name.replace(".", "/")]
            with pytest.raises(ResourceNotFound):
                await manager.get("r")
            assert await manager.count() == 0
        else:
            await manager.create(item, resource_id="r")
            assert (await manager.get("r")).data == item
            by_value = field(name).eq(value)
            assert await ids(manager, Query(where=by_value, sort=(name,))) == ["r"]
            await manager.create(Item(), resource_id="s")
            page = await manager.find(Query(sort=("-" + name,), limit=1))
            assert await ids(manager, Query(sort=("-" + name,), limit=1, after=page.next)) == ["s"]
            if name == "code":
                with pytest.raises(UniqueConflict):
                    await manager.create(replace(item, note="other"))
                await manager.create(Item(code=value[:-300]))
            await manager.update("r", Item(text="now"))
            assert await ids(manager, Query(where=by_value)) == []
        await manager.close()

    @pytest.mark.parametrize("offset", [-1, 0, 1])
    async def test_items_of_an_indexed_list_at_the_limit(self, manager: ResourceManager[Item], offset: int) -> None:
        numbers = list(range(MAX_ITEMS + offset))
        if offset > 0:
            with pytest.raises(MetadataTooLarge, match=f"'numbers' .* has {MAX_ITEMS + 1} items") as refused:
                await manager.create(Item(numbers=numbers), resource_id="r")
            assert [violation.pointer for violation in refused.value.violations] == ["/numbers"]
            assert await manager.count() == 0
            return
        await manager.create(Item(numbers=numbers), resource_id="r")
        assert (await manager.get("r")).data.numbers == numbers
        for number in (0, numbers[-1]):
            assert await ids(manager, Query(where=field("numbers").contains(number))) == ["r"]
        await manager.update("r", Item(numbers=numbers[1:]))
        assert await ids(manager, Query(where=field("numbers").contains(0))) == []

    @pytest.mark.parametrize("unit", UNITS)
    async def test_ids_at_the_limit(self, manager: ResourceManager[Item], unit: str) -> None:
        for offset in (-1, 0):
            resource_id = text_of(MAX_ID + offset, unit)
            # The longest entry of an index that a store makes: a text of four bytes each beside the id.
            await manager.create(Item(text="".join(map(chr, range(0x10000, 0x10100)))), resource_id=resource_id)
            await manager.update(resource_id, Item(text="2"))
            assert await ids(manager, Query(where=field("meta.resource_id").eq(resource_id))) == [resource_id]
            assert len((await manager.revisions(resource_id)).items) == 2
            await manager.purge(resource_id)
        with pytest.raises(InvalidData, match=f"takes {MAX_ID + 1} bytes in UTF-8, expected at most {MAX_ID}"):
            await manager.create(Item(), resource_id=text_of(MAX_ID + 1, unit))
        assert await manager.count() == 0

    @pytest.mark.parametrize("unit", UNITS)
    async def test_names_of_callers_at_the_limit(self, manager: ResourceManager[Item], unit: str) -> None:
        for offset in (-1, 0):
            name = text_of(MAX_NAME + offset, unit)
            created = await manager.create(Item(), by=name)
            assert await ids(manager, Query(where=field("meta.created_by").eq(name))) == [created.meta.resource_id]
        with pytest.raises(InvalidData, match=f"takes {MAX_NAME + 1} bytes in UTF-8, expected at most {MAX_NAME}"):
            await manager.create(Item(), by=text_of(MAX_NAME + 1, unit))
        assert await manager.count() == 2

    @pytest.mark.parametrize("name", ["a\0b", "\ud800", None])
    async def test_names_that_no_store_can_hold(self, manager: ResourceManager[Item], name: Any) -> None:
        with pytest.raises(InvalidData, match="the name of a caller"):
            await manager.create(Item(), by=Caller(name))
        assert await manager.count() == 0

    async def test_other_fields_of_a_too_large_resource_can_be_changed(self, manager: ResourceManager[Item]) -> None:
        long, many = "x" * 200_000, list(range(12_000))
        large = Item(text=long, numbers=many, number=1)
        await plant(manager, large, resource_id="r")
        assert (await manager.get("r")).data == large
        for where in (field("text").eq(long), field("text").contains("x" * 999), field("numbers").contains(11_999)):
            assert await ids(manager, Query(where=where)) == ["r"]
        # Elsewhere: another field, and one that was not there.
        await manager.patch("r", lambda tree: tree | {"number": 2, "note": "n" * 9000, "maybe": "m" * (SMALL - 2)})
        assert await ids(manager, Query(where=field("number").eq(2))) == ["r"]
        # No worse.
        for less in ({"text": "y" * 200_000}, {"text": long[1:]}, {"numbers": many[1:]}):
            await manager.patch("r", merged(less))
        before = await manager.get("r")
        worse: dict[str, tuple[dict[str, Any], type[CrudError], str]] = {
            "text": ({"text": long}, MetadataTooLarge, "/text"),
            "numbers": ({"numbers": many}, MetadataTooLarge, "/numbers"),
            "another": ({"code": "c" * (SMALL - 1)}, MetadataTooLarge, "/code"),
        }
        for change, error, pointer in worse.values():
            with pytest.raises(error) as refused:
                await manager.patch("r", merged(change))
            assert [violation.pointer for violation in refused.value.violations] == [pointer]
        assert (await manager.get("r")).meta == before.meta

    async def test_a_too_large_resource_takes_every_other_operation(self, manager: ResourceManager[Item]) -> None:
        long = "x" * 200_000
        await plant(manager, Item(text=long), resource_id="r", status="draft")
        await manager.modify("r", Item(text=long, note="1"))
        await manager.publish("r")
        await manager.delete("r")
        await manager.restore("r")
        await manager.update("r", Item(text="short"))
        with pytest.raises(MetadataTooLarge):  # it is too large no more
            await manager.update("r", Item(text=long))
        await manager.switch("r", 1)
        assert await ids(manager, Query(where=field("text").eq(long))) == ["r"]
        await manager.update("r", Item(text=long, note="3"))
        await manager.batch([Update(resource_id="r", data=Item(text=long, note=f"{n}")) for n in range(4, 7)])
        with pytest.raises(MetadataTooLarge) as refused:
            await manager.batch(
                [
                    Update(resource_id="r", data=Item(text="short")),
                    Update(resource_id="r", data=Item(text=long)),
                ]
            )
        assert refused.value.operation == 1
        assert [info.revision for info in (await manager.revisions("r")).items] == [6, 5, 4, 3, 2, 1]
        await manager.purge("r")
        assert await manager.count(Query(include_deleted=True)) == 0

    async def test_a_stored_resource_with_a_too_long_id_stays_usable(self, manager: ResourceManager[Item]) -> None:
        resource_id = "x" * (MAX_ID + 500)
        await plant(manager, Item(text="1"), resource_id=resource_id)
        await manager.update(resource_id, Item(text="2"))
        await manager.delete(resource_id)
        await manager.restore(resource_id)
        assert (await manager.get(resource_id, revision=1)).data.text == "1"
        assert await ids(manager, Query(where=field("text").eq("2"))) == [resource_id]
        await manager.purge(resource_id)

    async def test_a_commit_that_expects_any_state_is_refused(self, manager: ResourceManager[Item]) -> None:
        """Only `apply_committed` takes such changes. A commit says which state it replaces."""
        created = await manager.create(Item(text="1"))
        meta = replace(created.meta, version=2, nonce="ab" * 8)
        for resource_id in (meta.resource_id, "absent"):
            new = replace(meta, resource_id=resource_id)
            with pytest.raises(ConfigError, match='expects "any"'):
                await manager.storage.commit([Write(Change(meta=new, record=None, index=None, expect="any"), None)])
        assert (await manager.get(meta.resource_id)).meta == created.meta
        assert await manager.count() == 1

    async def test_one_commit_may_drop_any_number_of_revisions(self, manager: ResourceManager[Item]) -> None:
        """A retention that is declared later drops all old revisions in one commit."""
        created = await manager.create(Item(text="1"))
        meta = replace(created.meta, version=2, nonce="ab" * 8)
        gone = tuple(f"0/{number:036}" for number in range(10_000))
        change = Change(meta=meta, record=None, index=None, expect=Version(1, created.meta.nonce), drop=gone)
        await manager.storage.commit([Write(change, None)])
        assert (await manager.get(meta.resource_id)).meta.version == 2

    async def test_a_batch_that_changes_nothing_remembers_the_longest_metadata(
        self, manager: ResourceManager[Item]
    ) -> None:
        names = [f"{number:03}{'x' * (MAX_ID - 3)}" for number in range(100)]
        by = "y" * MAX_NAME
        await manager.batch([Create(Item(number=1), name) for name in names], by=by)
        same = [Update(resource_id=name, data=Item(number=1)) for name in names]
        for _ in range(2):
            left = await manager.batch(same, by=Caller(by, key=IdempotencyKey("k")))
            assert [state_of(one).version for one in left] == [1] * 100

    async def test_the_maximal_number_of_indexed_fields(self, root: Path) -> None:
        names = [f"f{number}" for number in range(MAX_FIELDS)]
        wide: Any = defstruct("Wide", [(name, str, "") for name in names])
        manager = manage(self.make(root), model=wide, indexed=names, name="wide")
        await manager.create(wide(**{name: name for name in names}), resource_id="r")
        assert await ids(manager, Query(where=field(names[-1]).eq(names[-1]), sort=(names[0],))) == ["r"]
        await manager.close()


class DurableLimitsConformance:
    """Fields with large values that are indexed after the data was stored."""

    @abstractmethod
    def make(self, root: Path) -> IStorageFactory:
        """Return the factory under test."""

    async def test_a_field_of_any_size_can_be_indexed_later(self, root: Path) -> None:
        plain = manage(self.make(root), indexed=["number"])
        texts = [f"{number}" + "x" * 300_000 for number in range(4)]
        for number, text in enumerate(texts):
            await plain.create(Item(text=text, code=text, number=number), resource_id=f"r{number}")
        await plain.create(Item(numbers=list(range(30_000)), tags=["t" * 300_000]), resource_id="l")
        await plain.close()

        manager = manage(self.make(root))
        meta_store = storage_of(manager).meta_store
        assert isinstance(meta_store, IndexMigration)
        with mock.patch.object(meta_store, "reindex", wraps=meta_store.reindex) as reindex:
            await manager.open()
        sizes = [[len(entry.entry.shown) for entry in call.args[0]] for call in reindex.await_args_list]
        assert len(sizes) > 1
        assert all(sum(chunk[:-1]) < CHUNK for chunk in sizes)
        assert await manager.storage.degradations() == []
        for number, text in enumerate(texts):
            for where in (field("text").eq(text), field("code").starts_with(text[:300]), field("number").eq(number)):
                assert await ids(manager, Query(where=where)) == [f"r{number}"]
        for where in (field("numbers").contains(29_999), field("tags").contains("t" * 300_000)):
            assert await ids(manager, Query(where=where)) == ["l"]
        assert await ids(manager, Query(sort=("text",))) == ["l", "r0", "r1", "r2", "r3"]
        with pytest.raises(UniqueConflict):
            await manager.patch("r0", lambda tree: tree | {"code": texts[1]})
        await manager.patch("r0", lambda tree: tree | {"number": 7})
        assert await ids(manager, Query(where=field("number").eq(7))) == ["r0"]
        await manager.close()

    async def test_a_value_that_cannot_be_indexed_stays_if_its_field_is_indexed_later(self, root: Path) -> None:
        plain = manage(self.make(root), indexed=["number"])
        await plain.create(Item(text="a\0b", tags=["t", "a\0b"], number=1), resource_id="r")
        await plain.close()

        manager = manage(self.make(root))
        await manager.open()
        assert len(await manager.storage.degradations()) == 1
        await manager.patch("r", lambda tree: tree | {"number": 2})
        assert await ids(manager, Query(where=field("number").eq(2) & field("text").exists(False))) == ["r"]
        for change, pointer in (({"text": "b\0"}, "/text"), ({"tags": ["a\0b"]}, "/tags")):
            with pytest.raises(InvalidData) as refused:
                await manager.patch("r", merged(change))
            assert [violation.pointer for violation in refused.value.violations] == [pointer]
        # What a filter of access control finds is what a search finds.
        for where, found in ((field("number").eq(2), True), (field("text").eq("a"), False)):
            read_filter = Query(where=where).resolve(manager.codec.fields).where
            if found:
                assert (await manager.get("r", read_filter=read_filter)).data.text == "a\0b"
            else:
                with pytest.raises(ResourceNotFound):
                    await manager.get("r", read_filter=read_filter)
        await manager.patch("r", lambda tree: tree | {"text": "c", "tags": ["t"]})
        assert await ids(manager, Query(where=field("text").eq("c") & field("tags").contains("t"))) == ["r"]
        with pytest.raises(InvalidData):
            await manager.patch("r", lambda tree: tree | {"text": "a\0b"})
        await manager.switch("r", 1)
        assert await ids(manager, Query(where=field("number").eq(1))) == ["r"]
        await manager.close()
