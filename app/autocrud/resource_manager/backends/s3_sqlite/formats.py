"""The format in HEAD, by which older programs refuse a database whose data they would lose.

A plain database that `export` wrote has no HEAD. If it names bodies in packs, its table `copy` has another name, so
that older programs refuse it.
"""

from __future__ import annotations

import apsw

from ..sqlite import blob_tables
from .head import FORMAT, FORMAT_WITH_BLOBS, FORMAT_WITH_PACKS

_OTHER_NAME = "copy_with_packs"


def format_of(connection: apsw.Connection) -> int:
    """Return the lowest format that tells older programs what the database contains. Reads all records."""
    packed = connection.execute("SELECT EXISTS (SELECT 1 FROM revisions WHERE instr(uid, '.'))").get
    return FORMAT_WITH_PACKS if packed else format_without_packs(connection)


def format_without_packs(connection: apsw.Connection) -> int:
    """Return what `format_of` would, if no record named a body in a pack."""
    return FORMAT_WITH_BLOBS if blob_tables.is_marked(connection) else FORMAT


def rename_copy_table(connection: apsw.Connection) -> None:
    """Let older programs refuse an exported database, if it needs the format with packs."""
    if format_of(connection) == FORMAT_WITH_PACKS:
        connection.execute(f"ALTER TABLE copy RENAME TO {_OTHER_NAME}")


def restore_copy_table(connection: apsw.Connection) -> None:
    """Undo `rename_copy_table`."""
    if connection.table_exists("main", _OTHER_NAME):
        connection.execute(f"ALTER TABLE {_OTHER_NAME} RENAME TO copy")
