"""Imports that do not fit on the disk of the data directory are refused before anything is changed."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from app.autocrud.backup import import_space
from app.autocrud.backup.errors import ArchiveTooLarge
from app.autocrud.backup.importing import import_all
from app.autocrud.resource_manager.runtime.disk_space import Space, device, space
from tests.small_disk import small_disk

from .archives import Content, blob, resource, write
from .imports import Note, Place, program
from .test_importing import programs
from .test_importing_failed import archive

__all__ = ["archive", "programs"]

ON_DISK = ("disk", "memory-disk")
MB = 1024 * 1024


def with_free(monkeypatch: pytest.MonkeyPatch, free: int) -> list[Path]:
    """Let each disk have so many free bytes. Return the directories whose disks are looked at."""
    seen: list[Path] = []

    def found(directory: Path) -> Space:
        seen.append(directory)
        return Space(10**9, free, inodes=True)

    monkeypatch.setattr(import_space, "space", found)
    return seen


@pytest.mark.parametrize("kind", ON_DISK)
@pytest.mark.parametrize("check", [False, True])
async def test_an_archive_that_does_not_fit_changes_nothing(
    programs, tmp_path, monkeypatch, archive, caplog, kind, check
):
    crud = programs(kind, Place(tmp_path / "data"))
    with_free(monkeypatch, 5 * MB)
    told: list[object] = []
    with pytest.raises(ArchiveTooLarge) as caught:
        await import_all(crud.managers, archive, check=check, max_bytes=10**9, surveyed=told.append)
    detail = caught.value.detail
    assert "needs at least 5.7 MB on the disk with the data directory of 'note', and 5.0 MB are free there: " in detail
    assert "make room on this disk" in detail
    assert str(tmp_path) not in detail  # clients see it
    assert str(tmp_path / "data") in caplog.text
    storage = crud.resource_manager(Note).storage
    assert [meta async for meta in storage.scan()] == told == []
    assert await storage.import_journal.state() is None
    monkeypatch.undo()
    assert (await import_all(crud.managers, archive)).models["note"].created == 30


@pytest.mark.parametrize("kind", ON_DISK)
async def test_an_archive_that_just_fits_is_imported(programs, monkeypatch, archive, kind):
    crud = programs(kind)
    with_free(monkeypatch, 6 * MB)
    assert (await import_all(crud.managers, archive)).models["note"].created == 30


@pytest.mark.parametrize("kind", ["memory", "s3-sqlite", "disk-s3", "cached-s3"])
async def test_other_stores_do_not_need_the_space_of_this_machine(programs, monkeypatch, archive, kind):
    crud = programs(kind)
    seen = with_free(monkeypatch, 0)
    await import_all(crud.managers, archive, check=True)
    assert seen == []


async def test_resources_that_are_skipped_need_no_space(programs, monkeypatch, archive):
    crud = programs("disk")
    await import_all(crud.managers, archive)
    with_free(monkeypatch, 0)
    assert (await import_all(crud.managers, archive, on_conflict="skip")).models["note"].skipped == 30
    with pytest.raises(ArchiveTooLarge):
        await import_all(crud.managers, archive, on_conflict="replace")


@pytest.mark.parametrize("missing", ["body", "file"])
async def test_purged_resources_and_files_need_no_space(programs, tmp_path, monkeypatch, missing):
    """The manifest counts them."""
    row, content = blob(os.urandom(1000))
    gone = resource("a", [{"text": "x" * 100_000}, {"text": "y"}], blobs=[[row.key], []])
    if missing == "body":
        gone[1][1] = (gone[1][1][0], None)
    note = Content(resources=[gone], blobs=[(row, b"" if missing == "file" else content)], absent=("a",))
    await write(tmp_path / "a.tar.gz", {"note": note})
    crud = programs("disk")
    with_free(monkeypatch, 1000 if missing == "body" else 101_000)
    assert (await import_all(crud.managers, tmp_path / "a.tar.gz")).models["note"].created == 0


async def test_a_small_disk_is_left_as_it_is(tmp_path, archive):
    with small_disk(tmp_path / "disk", 5) as directory:
        crud = program("disk", Place(directory / "data"))
        await crud.resource_manager(Note).open()
        before = os.statvfs(directory).f_bavail
        with pytest.raises(ArchiveTooLarge, match="free there"):
            await import_all(crud.managers, archive)
        assert os.statvfs(directory).f_bavail == before
        await crud.close()


def test_the_disk_of_a_directory_that_does_not_exist_is_that_of_its_parent(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for new in (tmp_path / "a/b/c", Path("a/b/c")):
        assert device(new) == tmp_path.stat().st_dev
        assert space(new).total == space(tmp_path).total
