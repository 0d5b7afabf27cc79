"""A process that writes to S3 with its copies and caches on a small disk. Run by test_full_disk, which kills it.

It first checks what the processes before it were told, then goes on. Each line says what was acknowledged.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys
from collections.abc import Awaitable, Callable
from typing import TypeVar

from msgspec import Struct

from app import wiring
from app.autocrud import AutoCRUD
from app.autocrud.errors import OutcomeUnknown, StoreUnavailable, VersionConflict
from app.autocrud.resource_manager.runtime.disk_space import DiskFull
from app.settings import load


class Note(Struct):
    text: str


T = TypeVar("T")


async def until_s3_answers(work: Callable[[], Awaitable[T]]) -> T:
    """The server is slow on a busy machine. A full disk is no reason to try again here: no request may fail for it."""
    while True:
        try:
            return await work()
        except DiskFull:
            raise
        except (StoreUnavailable, OutcomeUnknown):
            await asyncio.sleep(0.1)


async def main(expected: dict[str, str]) -> None:
    crud = AutoCRUD(storage_factory=wiring.storage_factory(load(), idle_work=False))
    manager = crud.add_model(Note, indexed_fields=["text"])
    for resource_id, least in expected.items():
        found = (await until_s3_answers(lambda: manager.get(resource_id))).data.text  # noqa: B023 - awaited at once
        assert int(found.split("-", 1)[0]) >= int(least), f"{resource_id} is {found[:20]}, {least} was acknowledged"
    print("checked", flush=True)
    number = max([0, *map(int, expected.values())])
    while True:
        number += 1
        resource_id = f"note{number % 8}"
        note = Note(f"{number}-" + "x" * 100_000)
        with contextlib.suppress(VersionConflict):  # it is there: an attempt without an answer, or of a killed process
            await until_s3_answers(lambda: manager.create(note, resource_id=resource_id))  # noqa: B023
        await until_s3_answers(lambda: manager.update(resource_id, note))  # noqa: B023
        print(f"{resource_id} {number}", flush=True)


asyncio.run(main(json.loads(sys.argv[1])))
