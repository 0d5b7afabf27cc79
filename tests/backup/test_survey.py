"""What an import tells before it changes anything: bodies that do not fit the models of today."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
from msgspec import Struct

from app.autocrud import AutoCRUD
from app.autocrud.backup.exporting import export_all
from app.autocrud.backup.importing import ModelSurvey, import_all

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
