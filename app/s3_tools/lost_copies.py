"""The local copies that remember a store which is not in the bucket any more, and the command that removes them."""

from __future__ import annotations

import shlex
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ..autocrud.errors import CrudError, HeadLost
from ..autocrud.resource_manager.core import ResourceManager


async def lost_copies(managers: Iterable[ResourceManager[Any]]) -> list[Path]:
    """Open each model. Return the directories of the local copies of those whose HEAD is missing or was replaced.

    One copy after the other would be named otherwise, each by a start of its own. Failures of another kind are left to
    the next start.
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
    """Return the end of a sentence that says what to do about local copies; nothing if there are none."""
    if not copies:
        return ""
    command = shlex.join(["rm", "-r", *map(str, copies)])
    return (
        "; if the S3 server lost its data, or they were removed on purpose, remove the local copies, which remember them:"
        f" {command}"
    )
