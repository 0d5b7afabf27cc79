"""Checks of the options of an import, before anything is read or changed."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from ..errors import InvalidData
from ..resource_manager.core import ResourceManager
from .archive_reader import VerifiedArchive
from .blob_import import blobs_of
from .option_names import option_names

Managers = Mapping[str, ResourceManager[Any]]


def check_options(
    managers: Managers, models: Collection[str] | None, on_conflict: str, *, resume: bool, abort: bool, check: bool
) -> None:
    """Raise InvalidData if the options of an import contradict each other, or name an unknown model."""
    if on_conflict not in ("fail", "skip", "replace"):
        raise InvalidData(f"on_conflict is {on_conflict!r}, expected fail, skip or replace")
    if resume and abort:
        raise InvalidData("an import is either resumed or aborted, not both")
    if check and (resume or abort):
        raise InvalidData("a check changes nothing, so nothing is resumed or aborted: give one of these options")
    for name in models or ():
        if name not in managers:
            raise InvalidData(f"there is no model {name!r}; there are {', '.join(managers)}")


def names_of(archive: VerifiedArchive, managers: Managers, models: Collection[str] | None) -> list[str]:
    """Return the names of the models to import, in the order of the archive."""
    found = [model.name for model in archive.manifest.models]
    for name in models or ():
        if name not in found:
            raise InvalidData(f"the archive has no model {name!r}; it has {', '.join(found) or 'none'}")
    names = [name for name in found if models is None or name in models]
    for name in names:
        if name not in managers:
            raise InvalidData(
                f"the archive has the model {name!r}, which this program does not have: add it, or name the models to"
                f" import ({option_names().model})"
            )
        if archive.model(name).blobs:
            blobs_of(managers[name].storage, name)
    return names
