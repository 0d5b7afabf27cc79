"""Applies the operations of a log to the tables of a replica."""

from __future__ import annotations

from collections.abc import Mapping

import apsw

from ...basic import Change, IndexEntry
from ..log_records import LoggedIndexEntry, LogOperation, revision_info_of
from . import blob_tables
from .tables import ResourceTables

Specs = Mapping[str, Mapping[str, str]]
"""The sets of indexed fields for which index entries were made: field kinds by name, by the id that entries contain."""


def replay(tables: ResourceTables, connection: apsw.Connection, op: LogOperation, specs: Specs) -> None:
    """Apply an operation on a resource or a blob. Marks an index entry as outdated if it lacks a bound field."""
    entry, complete = (None, True) if op.index is None else entry_of(tables, op.index, specs)
    if op.kind == "purge":
        tables.purge(connection, op.resource_id)
    elif op.kind == "index" and entry is not None:
        tables.put_index(connection, op.resource_id, entry)
    elif op.kind == "put" and op.meta is not None:
        change = Change(meta=op.meta, record=revision_info_of(op), index=entry, expect="any", drop=op.drop)
        tables.apply_committed(connection, [change])
    elif op.kind == "blob" and op.blob_row is not None:
        blob_tables.put(connection, op.blob_row)
    elif op.kind == "no-blob":
        blob_tables.delete(connection, op.resource_id)
    if not complete:
        tables.mark_outdated(connection, op.resource_id)


def entry_of(tables: ResourceTables, index: LoggedIndexEntry, specs: Specs) -> tuple[IndexEntry, bool]:
    """Return the index entry for the bound fields, and whether it covers all of them."""
    theirs, mine = specs.get(index.spec, {}), tables.kinds
    covered = {name for name, kind in mine.items() if theirs.get(name) == kind}
    keys = {name: key for name, key in index.keys.items() if name in covered}
    return IndexEntry(keys, index.missing, index.shown), len(covered) == len(mine)
