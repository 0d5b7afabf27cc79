"""A process that imports an archive, resumes or aborts the import, for tests that kill it.

python -m tests.backup.import_worker KIND PLACE_AS_JSON ARCHIVE begin|resume|abort

Prints "ready" before it begins, and "done" at the end.
"""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path
from typing import Any

from app.autocrud.backup import pieces
from app.autocrud.backup.errors import NoSuchImport
from app.autocrud.backup.importing import import_all

from .imports import Place, program


def place_of(text: str) -> Place:
    """Return the location that `text_of` describes."""
    found: dict[str, Any] = json.loads(text)
    place = Place(Path(found["directory"]), found["postgres"], found["redis_url"], found["s3"])
    place.name = found["name"]
    return place


def text_of(place: Place) -> str:
    """Describe a location whose bucket is on a server."""
    return json.dumps(
        {
            "directory": str(place.directory),
            "postgres": place.postgres,
            "redis_url": place.redis_url,
            "s3": place.s3,
            "name": place.name,
        }
    )


async def main(kind: str, place: str, archive: str, work: str) -> None:
    pieces.BATCH = 7
    crud = program(kind, place_of(place))
    await crud.open()
    print("ready", flush=True)
    try:
        if work == "begin":
            await import_all(crud.managers, archive, on_conflict="replace")
        else:
            await import_all(crud.managers, archive, resume=work == "resume", abort=work == "abort")
    except NoSuchImport:
        print("nothing", flush=True)
    await crud.close()
    print("done", flush=True)


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
