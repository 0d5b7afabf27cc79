"""The format that HEAD must have for a database, so that no program uses it that would lose data."""

from __future__ import annotations

import apsw

from ..sqlite import blob_tables
from .head import FORMAT, FORMAT_WITH_BLOBS, FORMAT_WITH_PACKS


def format_of(connection: apsw.Connection) -> int:
    """Return the lowest format that tells older programs what the database contains. Reads all records."""
    packed = connection.execute("SELECT EXISTS (SELECT 1 FROM revisions WHERE instr(uid, '.'))").get
    return FORMAT_WITH_PACKS if packed else format_without_packs(connection)


def format_without_packs(connection: apsw.Connection) -> int:
    """Return what `format_of` would, if no record named a body in a pack."""
    return FORMAT_WITH_BLOBS if blob_tables.is_marked(connection) else FORMAT
