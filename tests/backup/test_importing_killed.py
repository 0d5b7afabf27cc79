"""Imports whose process is killed (SIGKILL) at random moments, and resumed or taken back by another process."""

from __future__ import annotations

import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from app.autocrud.backup.exporting import export_all
from tests.services import BUCKET

from .import_worker import text_of
from .imports import Note, Place, content, program

COUNT = 150


def run(kind: str, place: Place, archive: Path, work: str, kill_after: float | None = None) -> float:
    """Run the worker, and kill it some seconds after it is ready. Return how long it worked."""
    command = [sys.executable, "-m", "tests.backup.import_worker", kind, text_of(place), str(archive), work]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline() == "ready\n"
        began = time.monotonic()
        if kill_after is not None:
            time.sleep(kill_after)
            process.kill()
        said = process.stdout.read()
        assert process.wait() in ((0,) if kill_after is None else (0, -9))
        assert kill_after is not None or said.endswith("done\n")
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
    return time.monotonic() - began


async def states(kind: str, place: Place) -> dict[str, Any]:
    crud = program(kind, place)
    manager = crud.resource_manager(Note)
    await manager.open()
    for _ in range(3):
        await manager.maintain(10)
    found = await content(manager.storage, states=False, keys=False)
    assert await manager.storage.import_journal.state() is None
    await crud.close()
    return found


@pytest.mark.slow
@pytest.mark.parametrize("data", [True, False], ids=["with data", "empty"])
@pytest.mark.parametrize("kind", ["disk", "memory-disk", "s3-sqlite", "postgres-disk"])
async def test_a_killed_import_is_whole_or_nothing_afterwards(tmp_path, request, ministack_s3, kind, data):
    random.seed(f"{kind} {data}")
    postgres = request.getfixturevalue("postgres") if "postgres" in kind else ""
    s3 = {
        "bucket": BUCKET,
        "endpoint_url": ministack_s3.url,
        "access_key_id": ministack_s3.access_key_id,
        "secret_access_key": ministack_s3.secret_access_key,
        "region_name": "us-east-1",
    }
    source = program("memory", Place(tmp_path))
    manager = source.resource_manager(Note)
    for number in range(COUNT):
        await manager.create(Note(text=f"new {number}", code=f"c{number}"), resource_id=f"n{number:05d}")
    await manager.update("n00003", Note(text="more", code="c3"))
    archive = tmp_path / "a.tar.gz"
    await export_all(source.managers, archive)
    expected = await content(manager.storage, states=False, keys=False)

    async def prepared(name: str) -> Place:
        place = Place(tmp_path / name, postgres, "", s3)
        crud = program(kind, place)
        for number in range(0, COUNT if data else 0, 10):
            await crud.resource_manager(Note).create(Note(text=f"old {number}"), resource_id=f"n{number:05d}")
        await crud.resource_manager(Note).open()
        await crud.close()
        return place

    whole = run(kind, await prepared("whole"), archive, "begin")
    place = await prepared("killed")
    before = await states(kind, place)
    run(kind, place, archive, "begin", kill_after=random.uniform(0, whole))
    work = random.choice(["resume", "abort"])
    run(kind, place, archive, work, kill_after=random.uniform(0, whole))
    run(kind, place, archive, work)
    found = await states(kind, place)
    # If the process was killed before it began the journal, or after it had ended it, there was nothing to do.
    assert found in (before, expected), work
