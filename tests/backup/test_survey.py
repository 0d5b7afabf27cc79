"""What an import tells before it changes anything: bodies that do not fit the models of today."""

from __future__ import annotations

import datetime as dt
from collections.abc import Mapping
from decimal import Decimal
from uuid import uuid4

import pytest
from msgspec import Raw, Struct
from msgspec.structs import replace

from app.autocrud import AutoCRUD, Encoding
from app.autocrud.backup.exporting import export_all
from app.autocrud.backup.importing import ModelSurvey, import_all
from app.autocrud.errors import InvalidData
from tests.http.everything import EXAMPLE, Color, EveryType, Level, Square

from .archives import Content, resource, write
from .imports import KINDS, Note, Place, content, fill, program


class Strict(Struct, kw_only=True):
    text: str
    needed: int


@pytest.mark.parametrize("kind", ["memory", "disk", "s3-sqlite"])
async def test_bodies_that_do_not_fit_are_counted_and_kept(tmp_path, kind):
    source, archive = program("memory", Place(tmp_path / "source")), tmp_path / "a.tar.gz"
    await fill(source.resource_manager(Note))
    await export_all(source.managers, archive)
    place = Place(tmp_path / "strict")
    crud = AutoCRUD(storage_factory=KINDS[kind](place))
    crud.add_model(Strict, name="note", indexed_fields=["text"])
    expected = await content(source.resource_manager(Note).storage)
    bodies = sum(len(records) for _, records in expected["resources"].values())
    told: list[ModelSurvey] = []

    def refuse(models: Mapping[str, ModelSurvey]) -> None:
        told.append(models["note"])
        raise InterruptedError

    with pytest.raises(InterruptedError):
        await import_all(crud.managers, archive, surveyed=refuse)
    assert told == [ModelSurvey(len(expected["resources"]), bodies, not_fitting=bodies, unique_conflicts={})]
    checked = (await crud.import_all(archive, check=True, surveyed=lambda models: told.append(models["note"]))).models
    assert (checked["note"].not_fitting, checked["note"].created, told[1]) == (bodies, 0, told[0])
    assert (await content(crud.managers["note"].storage))["resources"] == {}, "until here, nothing is changed"
    result = await import_all(crud.managers, archive)
    assert result.models["note"].not_fitting == bodies
    assert await content(crud.managers["note"].storage) == expected
    await crud.close()
    await source.close()


@pytest.mark.parametrize("encoding", Encoding)
async def test_a_body_that_no_request_could_write_does_not_fit(tmp_path, encoding):
    """Such as one with a field that the model does not have: a patch of it is refused, or would drop the field."""
    datas = {"fits": {"text": "a"}, "none": {}, "type": {"text": 5}, "unknown": {"text": "a", "more": 1}}
    resources = [resource(rid, [data], encoding=encoding) for rid, data in datas.items()]
    await write(
        tmp_path / "a.tar.gz", {"note": Content(resources=sorted(resources, key=lambda one: one[0].resource_id))}
    )
    crud = program("memory", Place(tmp_path))
    result = await import_all(crud.managers, tmp_path / "a.tar.gz")
    assert result.models["note"].not_fitting == 3
    manager = crud.resource_manager(Note)
    await manager.patch("fits", lambda tree: tree | {"number": 1})
    if encoding == Encoding.json:
        with pytest.raises(InvalidData, match="fields that Note does not have"):
            await manager.patch("unknown", lambda tree: tree | {"number": 1})
    await crud.close()


class Unusual(Struct):
    """Data that JSON and MessagePack write differently."""

    raw: Raw = Raw(b"null")
    numbered: dict[int, bytes] = {}
    timed: dict[dt.date, float] = {}


UNUSUAL = Unusual(Raw(b'{"b":1,"a":[2]}'), {2: b"x", 10: b"\xff"}, {dt.date(2026, 1, 2): 1e300})
NOW = dt.datetime(2026, 1, 1, 12, 30, 0, 123456, tzinfo=dt.UTC)
FULL = replace(
    EXAMPLE,
    at=NOW,
    day=dt.date(1, 1, 1),
    hour=dt.time(12, 30),
    span=dt.timedelta(days=400, microseconds=1),
    key=uuid4(),
    price=Decimal("1.10"),
    color=Color.green,
    level=Level.high,
    numbers={3, 1, 2},
    pair=(2**53, "\u2028"),
    blob=bytes(range(256)),
    shape=Square(3),
    maybe="m",
)


@pytest.mark.parametrize("encoding", Encoding)
async def test_bodies_that_the_model_wrote_fit(tmp_path, encoding):
    crud, other = AutoCRUD(encoding=encoding), AutoCRUD()
    for program_ in (crud, other):
        program_.add_model(EveryType, indexed_fields=["text"])
        program_.add_model(Unusual)
    for data in (EXAMPLE, FULL, replace(FULL, at=NOW.replace(tzinfo=None))):
        await crud.resource_manager(EveryType).create(data)
    await crud.resource_manager(Unusual).create(UNUSUAL)
    await crud.export_all(tmp_path / "a.tar.gz")
    result = await other.import_all(tmp_path / "a.tar.gz")
    assert {name: (one.created, one.not_fitting) for name, one in result.models.items()} == {
        "every-type": (3, 0),
        "unusual": (1, 0),
    }
    await crud.close()
    await other.close()
