"""What goes wrong in SQLite, in the words of the engine."""

from __future__ import annotations

import logging

import apsw

from ...errors import CrudError, StoreDamaged, StoreUnavailable

log = logging.getLogger("crudstack.sqlite")


def translated(error: apsw.Error) -> CrudError:
    """A SQLite error in the words of the engine. The details, a path for one, go to the log and not to clients."""
    log.error("SQLite: %s: %s", type(error).__name__, error)
    if isinstance(error, apsw.CorruptError | apsw.NotADBError | apsw.FormatError):
        return StoreDamaged("the database file is damaged; restore it from a copy")
    if isinstance(error, apsw.FullError):
        return StoreUnavailable("the disk is full; nothing was changed")
    return StoreUnavailable("the database cannot be used right now; nothing was changed")
