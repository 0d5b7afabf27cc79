"""The comparison of an import with the free space of the directories of the models, before anything is changed."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path

from ..resource_manager.basic import IStorage
from ..resource_manager.contract.directories import DirectoryStorage
from ..resource_manager.runtime.disk_space import MB, device, space
from .errors import ArchiveTooLarge
from .option_names import option_names
from .survey import Survey

log = logging.getLogger("crudstack.import")


class _DiskDemand:
    """The need of an import on one disk.

    size       in bytes
    models     the names of the models that need these bytes
    directory  a directory on this disk, for the log
    """

    def __init__(self, directory: Path) -> None:
        self.directory, self.size = directory, 0
        self.models: dict[str, None] = {}


def check_space(storages: Mapping[str, IStorage], survey: Survey) -> None:
    """Raise ArchiveTooLarge if the bodies and blobs of an archive do not fit on the disks of the data directories.

    storages  of the models that are imported as a whole, by name

    Stores that keep their data elsewhere are ignored. Metadata and the index need some space too, so an import
    that passes may still find a full disk. Blocks.
    """
    disks: dict[int, _DiskDemand] = {}
    for name, storage in storages.items():
        if not isinstance(storage, DirectoryStorage):
            continue
        bodies, blobs = storage.directories
        for directory, size in ((bodies, survey.body_bytes[name]), (blobs, survey.blob_bytes[name])):
            if directory is not None and size:
                one = disks.setdefault(device(directory), _DiskDemand(directory))
                one.size += size
                one.models[name] = None
    for one in disks.values():
        free = space(one.directory).free
        if one.size > free:
            log.error("%s: the import needs %.1f MB, and %.1f MB are free", one.directory, one.size / MB, free / MB)
            raise ArchiveTooLarge(
                f"the archive needs at least {one.size / MB:,.1f} MB on the disk with the data directory of"
                f" {', '.join(map(repr, one.models))}, and {free / MB:,.1f} MB are free there: make room on this disk,"
                f" use a data directory on a larger one, or import fewer models ({option_names().model}); nothing was"
                " changed, and the log names the directory"
            )
