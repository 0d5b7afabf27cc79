"""Exports in parts, which are joined: for calls that may not run for as long as a whole export."""

from __future__ import annotations

import datetime as dt
from pathlib import Path
from typing import Any

import pytest

from app.autocrud.backup.archive_writer import ArchiveWriter
from app.autocrud.backup.errors import BadArchive
from app.autocrud.backup.exporting import ExportedModel, export_part
from app.autocrud.backup.joining import join_parts
from app.autocrud.resource_manager.core import ResourceManager

from .exports import read
from .imports import Note, Place, fill, program

MOMENTLESS = ("redis-disk", "custom")


async def in_parts(manager: ResourceManager[Any], directory: Path, **options: Any) -> tuple[ExportedModel, list[str]]:
    """Export a model in parts of three resources, and join them to `all.tar.gz`. Return the ids that parts end with."""
    parts, ends, after, asked = [], [], "", 0

    def is_full(_: int) -> bool:
        nonlocal asked
        asked += 1
        return asked % 4 == 0

    while True:
        asked = 0
        path = directory / f"{len(parts)}.tar.gz"
        part = await export_part(manager, path, after=after, is_full=is_full, **options)
        parts.append((path, part.sha256))
        if part.after is None:
            break
        after = part.after
        ends.append(after)
    async with ArchiveWriter(directory / "all.tar.gz", created=dt.datetime.now(dt.UTC)) as writer:
        model = await join_parts("note", parts, writer)
        await writer.close()
    return model, ends


@pytest.mark.parametrize("kind", ["memory", "disk", "s3-sqlite", "memory-s3", *MOMENTLESS])
async def test_joined_parts_are_the_whole(request, tmp_path, kind):
    redis = request.getfixturevalue("valkey") if kind == "redis-disk" else ""
    crud = program(kind, Place(tmp_path / "store", redis_url=redis))
    manager = crud.resource_manager(Note)
    await fill(manager)
    await crud.export_all(tmp_path / "whole.tar.gz")
    whole = read(tmp_path / "whole.tar.gz", "note")
    model, ends = await in_parts(manager, tmp_path, each_resource=kind not in MOMENTLESS)
    joined = read(tmp_path / "all.tar.gz", "note")
    assert ends == sorted(whole.resources)[2::3][: len(ends)], "each part has three resources"
    assert len(ends) == (len(whole.resources) - 1) // 3
    assert joined.resources == whole.resources
    assert joined.keys == whole.keys
    assert (model.resources, model.revisions, model.one_moment) == (whole.entry.resources, whole.entry.revisions, False)
    await crud.close()


async def test_a_model_that_is_exported_as_at_one_moment_is_one_part(tmp_path):
    crud = program("disk", Place(tmp_path / "store"))
    await fill(crud.resource_manager(Note))
    model, ends = await in_parts(crud.resource_manager(Note), tmp_path)
    assert (model.one_moment, ends) == (True, [])
    await crud.close()


async def test_a_damaged_part_is_refused(tmp_path):
    crud = program("disk", Place(tmp_path / "store"))
    part = await export_part(crud.resource_manager(Note), tmp_path / "0.tar.gz", is_full=lambda _: False)
    async with ArchiveWriter(tmp_path / "all.tar.gz", created=dt.datetime.now(dt.UTC)) as writer:
        with pytest.raises(BadArchive, match="has the SHA-256"):
            await join_parts("note", [(tmp_path / "0.tar.gz", part.sha256[::-1])], writer)
    assert not (tmp_path / "all.tar.gz").exists()
    await crud.close()
