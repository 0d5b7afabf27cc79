"""The findings of a model in a SQLite database, one row in a table of its own; see reindexing."""

from __future__ import annotations

from typing import Any

import apsw
import msgspec

from ..records import Findings

TABLE = "CREATE TABLE IF NOT EXISTS findings (one INTEGER PRIMARY KEY CHECK (one = 1), doc TEXT NOT NULL)"


def read_findings(connection: apsw.Connection) -> Findings:
    """Return what was kept last; `Findings()` if nothing was."""
    if connection.execute("SELECT 1 FROM sqlite_schema WHERE name = 'findings'").get is None:
        return Findings()
    doc: Any = connection.execute("SELECT doc FROM findings").get
    return msgspec.json.decode(doc, type=Findings)


def keep_findings(connection: apsw.Connection, findings: Findings) -> None:
    """Keep these in place of those before; in a transaction."""
    connection.execute(TABLE)
    doc = msgspec.json.encode(findings).decode()
    connection.execute("INSERT OR REPLACE INTO findings VALUES (1, ?)", (doc,))
