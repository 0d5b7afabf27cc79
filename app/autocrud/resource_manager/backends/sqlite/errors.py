"""Translates errors of SQLite into errors of the engine."""

from __future__ import annotations

import logging
from pathlib import Path

import apsw

from ....errors import CrudError, StoreDamaged, StoreUnavailable
from ...runtime.disk_space import full, is_full

log = logging.getLogger("crudstack.sqlite")


def translated(error: apsw.Error, directory: Path | None = None) -> CrudError:
    """Return the error of the engine for a SQLite error. Details such as a path go to the log, not to clients.

    directory  the directory of the database, to find out how full its disk is
    """
    if directory is not None and is_full(error, directory):
        return full(error, directory)
    log.error("SQLite: %s: %s", type(error).__name__, error)
    if isinstance(error, apsw.CorruptError | apsw.NotADBError | apsw.FormatError):
        return StoreDamaged("the database file is damaged; restore it from a copy")
    if isinstance(error, apsw.FullError):
        return StoreUnavailable("the disk is full; nothing was changed")
    return StoreUnavailable("the database cannot be used right now; nothing was changed")
