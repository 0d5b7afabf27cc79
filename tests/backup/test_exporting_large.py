"""Exports of bodies that suddenly become large: they are not read at once."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from app.autocrud.backup import exporting
from app.autocrud.resource_manager.basic import READ_AT_ONCE
from app.autocrud.resource_manager.contract import snapshots
from app.autocrud.resource_manager.engine.operations import Create
from app.autocrud.resource_manager.resource_store import s3, simple
from app.autocrud.resource_manager.storage import snapshots as stored

from .exports import Account, World, read

SMALL, LARGE = 300, 40
SIZE = 50_000
LIMIT = 200_000
"""PAGE_BYTES in these tests: four large bodies."""


@pytest.fixture
def pages(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The bytes of the bodies of each page of an export."""
    monkeypatch.setattr(exporting, "PAGE_BYTES", LIMIT)
    monkeypatch.setattr(snapshots, "PAGE_BYTES", LIMIT)
    monkeypatch.setattr(stored, "PAGE_BYTES", LIMIT)
    monkeypatch.setattr(s3, "PAGE_BYTES", LIMIT)
    monkeypatch.setattr(s3, "CONCURRENT_GETS", 4)
    found: list[int] = []
    with_bodies = exporting._ModelExport._with_bodies

    async def watched(self: Any, *arguments: Any) -> Any:
        result = await with_bodies(self, *arguments)
        found.append(sum(len(body or b"") for _, body in result[0]))
        return result

    monkeypatch.setattr(exporting._ModelExport, "_with_bodies", watched)
    return found


async def fill(world: World) -> Any:
    crud = world.crud()
    sizes = [0] * SMALL + [SIZE] * LARGE + [0] * SMALL
    accounts = [Create(data=Account(at, "x" * size), resource_id=f"a{at:04}") for at, size in enumerate(sizes)]
    for start in range(0, len(accounts), 100):
        await crud.resource_manager(Account).batch(accounts[start : start + 100])
    return crud


@pytest.mark.parametrize(
    ("kind", "each_resource", "most"),
    [
        ("disk", False, LIMIT + SIZE),
        ("memory-disk", False, LIMIT + SIZE),
        ("s3-sqlite", False, LIMIT + 8 * SIZE),
        ("disk", True, READ_AT_ONCE * SIZE),  # so many are read before their sizes are known
    ],
)
async def test_a_page_of_bodies_that_suddenly_become_large_ends_early(
    tmp_path: Path, pages: list[int], kind: str, each_resource: bool, most: int
):
    world = World(kind, tmp_path / "data")
    try:
        crud = await fill(world)
        await crud.export_all(tmp_path / "x.tar.gz", each_resource=each_resource)
    finally:
        await world.close()
    amounts = [account.amount for account in read(tmp_path / "x.tar.gz").current().values()]
    assert amounts == list(range(2 * SMALL + LARGE))
    assert max(pages) < most + 20_000  # the small ones
    assert len(pages) < 60


async def test_any_snapshot_may_leave_out_the_last_bodies_of_a_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(exporting, "PAGE_BODIES", 128)
    world = World("memory", tmp_path)
    crud = await fill(world)
    asked: list[int] = []
    bodies = simple._BodiesInMemory.bodies

    async def some(self: Any, uids: Sequence[str]) -> list[bytes | None]:
        asked.append(len(uids))
        return await bodies(self, uids[: 1 + len(uids) // 3])

    monkeypatch.setattr(simple._BodiesInMemory, "bodies", some)
    for each_resource in (False, True):
        await crud.export_all(tmp_path / "x.tar.gz", each_resource=each_resource)
        amounts = [account.amount for account in read(tmp_path / "x.tar.gz").current().values()]
        assert amounts == list(range(2 * SMALL + LARGE))
    assert max(asked) == exporting.PAGE_BODIES
    await world.close()
