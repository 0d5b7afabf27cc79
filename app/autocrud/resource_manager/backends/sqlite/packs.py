"""The bodies in packs that records name, as a plain function of a connection: see `contract.packs`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import apsw

from ...contract.packs import StoredPack
from .tables import ResourceTables


def packs_with_orphans(
    tables: ResourceTables, connection: apsw.Connection, packs: Sequence[StoredPack]
) -> dict[str, list[str]]:
    """Return the packs that have more bodies than records name. Each one comes with the uids that records name."""
    found = {}
    statement = tables.indexed(connection, "SELECT uid FROM revisions WHERE uid > ? AND uid < ?")
    for pack in packs:
        rows = connection.execute(statement, (f"{pack.name}.", f"{pack.name}/")).fetchall()  # "/" follows "."
        if len(rows) < max(1, pack.bodies):  # without any, it was damaged
            found[pack.name] = [cast("str", uid) for (uid,) in rows]
    return found
