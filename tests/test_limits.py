"""Limits of stored data: writes to a resource that is too large already, and models that cannot be served."""

from __future__ import annotations

import threading
from unittest import mock

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec import Struct, defstruct

from app.autocrud import AutoCRUD
from app.autocrud.errors import ConfigError, MetadataTooLarge
from app.autocrud.resource_manager.basic import IndexEntry
from app.autocrud.resource_manager.contract import limits
from app.autocrud.resource_manager.model.codec import Codec, canonical_json


class Inner(Struct):
    deep: str = ""


class Data(Struct):
    a: str = ""
    b: str = ""
    numbers: list[int] = []
    inner: Inner | None = None


CODEC = Codec(Data, ["a", "b", "numbers", "inner.deep"])
texts = st.integers(0, 60).map(lambda size: "x" * size)
datas = st.builds(
    Data,
    a=texts,
    b=texts,
    numbers=st.integers(0, 12).map(lambda count: [1] * count),
    inner=st.none() | st.builds(Inner, deep=texts),
)


def sizes(data: Data) -> dict[str, int]:
    deep = 0 if data.inner is None else len(msgspec.json.encode(data.inner.deep))
    return {name: len(msgspec.json.encode(getattr(data, name))) for name in ("a", "b", "numbers")} | {"deep": deep}


def refusal(data: Data, before: Data | None) -> str | None:
    """Return the field that a refused write names; None if the write is allowed."""
    try:
        if limits.may_exceed(canonical_json(data)):
            limits.check_items("r", CODEC.items(data), {} if before is None else CODEC.items(before))
            limits.check_index("r", CODEC.index(data), None if before is None else CODEC.index(before))
    except MetadataTooLarge as error:
        (violation,) = error.violations
        return violation.pointer
    return None


@settings(max_examples=500)
@given(st.none() | datas, st.lists(datas, min_size=1, max_size=8))
def test_no_sequence_of_writes_makes_a_resource_too_large(start: Data | None, steps: list[Data]):
    with mock.patch.multiple(limits, MAX_INDEXED=100, MAX_ITEMS=6, SMALL=10):
        now = start
        for step in steps:
            entry = CODEC.index(step)
            before = None if now is None else CODEC.index(now)
            total, old_total = len(entry.shown), 0 if before is None else len(before.shown)
            grown = (
                [] if now is None else [name for name, size in sizes(step).items() if size > max(10, sizes(now)[name])]
            )
            fits = total <= 100 or (old_total > 100 and not grown)
            few = len(step.numbers) <= max(6, 0 if now is None else len(now.numbers))
            refused = refusal(step, now)
            assert refused in (None, "/a", "/b", "/numbers", "/inner/deep")
            allowed = refused is None
            assert allowed is (fits and few)
            if allowed:
                now = step
        most = 100 if start is None else max(100, len(CODEC.index(start).shown))
        assert now is None or len(CODEC.index(now).shown) <= most + 4 * 10


def test_an_entry_within_the_limits_costs_one_comparison():
    assert not limits.may_exceed(canonical_json(Data(a="x" * (2 * limits.MAX_ITEMS - 100))))
    assert limits.may_exceed(canonical_json(Data(numbers=[1] * (limits.MAX_ITEMS + 1))))


async def test_the_items_of_a_list_that_is_too_long_get_no_keys():
    manager = AutoCRUD().add_model(Data, indexed_fields=["numbers"])
    await manager.create(Data(), resource_id="r")
    made: list[int] = []
    (path,) = manager.codec._paths
    path.kind = path.kind._replace(key=lambda value: made.append(value) or value)
    for write in (
        manager.create(Data(numbers=[1] * (limits.MAX_ITEMS + 1))),
        manager.update("r", Data(numbers=[1] * 900_000)),
        manager.patch("r", lambda tree: tree | {"numbers": [1] * 900_000}),
    ):
        with pytest.raises(MetadataTooLarge):
            await write
    assert made == []
    await manager.update("r", Data(numbers=[1, 2]))
    assert made == [1, 2]


async def test_large_data_is_indexed_off_the_event_loop():
    manager = AutoCRUD().add_model(Data, indexed_fields=["a"])
    threads: list[str] = []
    index = manager.codec.index

    def watched(*arguments: object) -> IndexEntry:
        threads.append(threading.current_thread().name)
        return index(*arguments)

    with mock.patch.object(manager.codec, "index", watched):
        await manager.create(Data(a="x" * 100_000), resource_id="r")
        with pytest.raises(MetadataTooLarge):
            await manager.update("r", Data(a="x" * 3_000_000))
    assert {name.rpartition("_")[0] for name in threads} == {"crudstack-heavy"}
    assert len(threads) == 3


def test_a_model_with_too_many_indexed_fields():
    names = [f"f{number}" for number in range(limits.MAX_FIELDS + 1)]
    wide = defstruct("Wide", [(name, str, "") for name in names])
    with pytest.raises(ConfigError, match="Wide has 501 indexed fields, expected at most 500"):
        AutoCRUD().add_model(wide, indexed_fields=names)
    AutoCRUD().add_model(wide, indexed_fields=names[1:])


@pytest.mark.parametrize("number", [0, 2**63, 10**30, "1"])
def test_schema_versions_that_no_store_can_hold(number):
    with pytest.raises(ConfigError, match="schema_version: expected a whole number from 1 to 9223372036854775807"):
        AutoCRUD().add_model(Data, schema_version=number)


async def test_the_largest_schema_version():
    manager = AutoCRUD().add_model(Data, schema_version=2**63 - 1)
    assert (await manager.create(Data())).meta.schema_version == 2**63 - 1
