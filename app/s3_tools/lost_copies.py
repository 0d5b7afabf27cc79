"""Local copies of stores that are no longer in the bucket, and the command that removes them."""

from __future__ import annotations

import shlex
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ..autocrud.errors import CrudError, HeadLost
from ..autocrud.resource_manager.core import ResourceManager


async def lost_copies(managers: Iterable[ResourceManager[Any]]) -> list[Path]:
    """Open each model, and return the local copies of the models whose HEAD is missing or was replaced.

    All models are opened so that one error message names all copies. Other failures are ignored here; the next start
    reports them.
    """
    found = []
    for manager in managers:
        try:
            await manager.open()
        except HeadLost:
            copy = getattr(getattr(manager.storage, "meta_store", None), "kept_copy", None)
            if isinstance(copy, Path):
                found.append(copy)
        except CrudError:
            continue
    return found


def remedy(copies: list[Path]) -> str:
    """Return the end of an error message with the command that removes local copies, or "" if there are none."""
    if not copies:
        return ""
    command = shlex.join(["rm", "-r", *map(str, copies)])
    return f"; if the S3 server lost its data, or the data was removed on purpose, remove the local copies: {command}"
