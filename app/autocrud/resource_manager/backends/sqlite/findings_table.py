"""The findings of a model in a SQLite database: one row in a table of its own. `storage.reindexing` writes them."""

from __future__ import annotations

from typing import Any

import apsw
import msgspec

from ....errors import StoreDamaged
from ...basic import Findings

TABLE = "CREATE TABLE IF NOT EXISTS findings (one INTEGER PRIMARY KEY CHECK (one = 1), doc TEXT NOT NULL)"


def read_findings(connection: apsw.Connection) -> Findings:
    """Return the findings that were kept last, or `Findings()` if there are none.

    Raises StoreDamaged if they cannot be decoded.
    """
    if connection.execute("SELECT 1 FROM sqlite_schema WHERE name = 'findings'").get is None:
        return Findings()
    doc: Any = connection.execute("SELECT doc FROM findings").get
    if doc is None:
        return Findings()
    try:
        return msgspec.json.decode(doc, type=Findings)
    except (msgspec.MsgspecError, UnicodeDecodeError, TypeError):
        raise StoreDamaged(
            "what re-indexing found cannot be read from the table `findings`; restore the database from a copy, or"
            " remove the row: what is damaged is found again"
        ) from None


def keep_findings(connection: apsw.Connection, findings: Findings) -> None:
    """Replace the findings. The caller is in a transaction."""
    connection.execute(TABLE)
    doc = msgspec.json.encode(findings).decode()
    connection.execute("INSERT OR REPLACE INTO findings VALUES (1, ?)", (doc,))
