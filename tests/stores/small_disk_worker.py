"""A process that writes to S3 with its copies and caches on a small disk. Run by test_full_disk, which kills it.

It first checks what the processes before it were told, then goes on. Each line says what was acknowledged.
"""

from __future__ import annotations

import asyncio
import json
import sys

from msgspec import Struct

from app import wiring
from app.autocrud import AutoCRUD
from app.settings import load


class Note(Struct):
    text: str


async def main(expected: dict[str, str]) -> None:
    crud = AutoCRUD(storage_factory=wiring.storage_factory(load(), idle_work=False))
    manager = crud.add_model(Note, indexed_fields=["text"])
    for resource_id, least in expected.items():
        found = (await manager.get(resource_id)).data.text
        assert int(found.split("-", 1)[0]) >= int(least), f"{resource_id} is {found[:20]}, {least} was acknowledged"
    print("checked", flush=True)
    number = max([0, *map(int, expected.values())])
    while True:
        number += 1
        resource_id = f"note{number % 8}"
        note = Note(f"{number}-" + "x" * 100_000)
        if resource_id in expected or number > 8:
            await manager.update(resource_id, note)
        else:
            await manager.create(note, resource_id=resource_id)
        print(f"{resource_id} {number}", flush=True)


asyncio.run(main(json.loads(sys.argv[1])))
