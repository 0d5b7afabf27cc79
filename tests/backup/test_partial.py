"""Archives and copies of data directories appear complete or not at all, and killed writers leave nothing for ever."""

from __future__ import annotations

import errno
import os
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from app.autocrud.backup.exporting import export_all
from app.autocrud.errors import InvalidData
from app.autocrud.resource_manager.runtime.partial import Partial

from .exports import Account, World

WRITER = """
import sys, time
from pathlib import Path
from app.autocrud.resource_manager.runtime.partial import Partial
file = Partial(Path(sys.argv[1], "x.tar.gz"))
directory = Partial(Path(sys.argv[1], "copy"), directory=True)
(directory.path / "inside").write_text("x")
print("ready", flush=True)
time.sleep(600)
"""


def names(directory: Path) -> list[str]:
    return sorted(entry.name for entry in directory.iterdir())


def test_files_of_a_killed_writer_are_removed_by_the_next_one(tmp_path: Path):
    (tmp_path / ".notes.partial").write_text("of another program")
    writer = subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path)], stdout=subprocess.PIPE)
    try:
        assert writer.stdout is not None
        assert writer.stdout.readline() == b"ready\n"
        left = set(names(tmp_path))
        assert len(left) == 3
        Partial(tmp_path / "y.tar.gz").discard()
        assert set(names(tmp_path)) == left, "its writer is running"
    finally:
        writer.send_signal(signal.SIGKILL)
        writer.communicate()
    Partial(tmp_path / "y.tar.gz").discard()
    assert names(tmp_path) == [".notes.partial"]


@pytest.mark.parametrize("links", [True, False])
def test_a_file_that_was_made_meanwhile_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, links: bool):
    def no_link(*_: object, **__: object) -> None:
        raise OSError(errno.EPERM, "this file system has no hard links")

    if not links:
        monkeypatch.setattr(os, "link", no_link)
    target = tmp_path / "x"
    first, second = Partial(target), Partial(target)
    os.write(first.handle, b"first")
    os.write(second.handle, b"second")
    first.publish(replace=False)
    with pytest.raises(FileExistsError):
        second.publish(replace=False)
    assert (target.read_bytes(), stat.S_IMODE(target.stat().st_mode)) == (b"first", 0o600)
    second.publish(replace=True)
    assert target.read_bytes() == b"second"
    first.discard()
    second.discard()
    assert names(tmp_path) == ["x"]


@pytest.mark.parametrize("made", ["a file", "a directory"])
def test_a_directory_replaces_only_an_empty_one(tmp_path: Path, made: str):
    target = tmp_path / "copy"
    target.mkdir()
    copy = Partial(target, directory=True)
    (copy.path / "inside").write_text("x")
    copy.publish(replace=False)
    copy.discard()
    assert names(target) == ["inside"]
    if made == "a file":
        target = tmp_path / "other"
        target.write_text("mine")
    late = Partial(target, directory=True)
    with pytest.raises(FileExistsError):
        late.publish(replace=False)
    late.discard()
    assert [name for name in names(tmp_path) if name.startswith(".")] == []


async def test_an_export_does_not_replace_a_file_that_was_made_meanwhile(tmp_path: Path):
    world = World("memory", tmp_path / "data")
    crud = world.crud()
    await crud.resource_manager(Account).create(Account(1))
    path = tmp_path / "x.tar.gz"

    def progress(*_: object) -> None:
        path.write_text("of another program")

    with pytest.raises(InvalidData, match="was made by another program meanwhile, and is kept"):
        await export_all(crud.managers, path, progress=progress, replace=False)
    assert path.read_text() == "of another program"
    await crud.export_all(path)
    assert path.read_bytes()[:2] == b"\x1f\x8b"
    assert names(tmp_path) == ["x.tar.gz"]
    await world.close()
