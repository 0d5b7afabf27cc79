"""Pins in a SQLite database: rows of a table that the first pin makes. `contract.snapshots` explains pins.

The times are those of SQLite, in seconds since 1970. A pin is only dropped by removing its row, so a jump of the clock
may end a pin early, and then its holder notices (P2). It never lets two programs disagree about a pin.
"""

from __future__ import annotations

import apsw

from ...contract import snapshots

TABLE = "CREATE TABLE IF NOT EXISTS pins (id TEXT PRIMARY KEY, time REAL NOT NULL) WITHOUT ROWID"
_LAPSED = "abs(unixepoch('subsec') - time) >= ?"  # a time far in the future is of a clock that was put back


def add_pin(connection: apsw.Connection, pin: str) -> None:
    """Add a pin. The caller is in a transaction."""
    connection.execute(TABLE)
    connection.execute("INSERT OR REPLACE INTO pins VALUES (?, unixepoch('subsec'))", (pin,))


def renew_pin(connection: apsw.Connection, pin: str) -> bool:
    """Set the time of a pin to now. Returns False if it was dropped. The caller is in a transaction."""
    drop_lapsed(connection)
    if not _has_table(connection):
        return False
    connection.execute("UPDATE pins SET time = unixepoch('subsec') WHERE id = ?", (pin,))
    return connection.changes() > 0


def remove_pin(connection: apsw.Connection, pin: str) -> bool:
    """Remove a pin. Returns False if it was dropped before. The caller is in a transaction."""
    drop_lapsed(connection)
    if not _has_table(connection):
        return False
    connection.execute("DELETE FROM pins WHERE id = ?", (pin,))
    return connection.changes() > 0


def drop_lapsed(connection: apsw.Connection) -> None:
    """Drop the pins that were not renewed in time. The caller is in a transaction."""
    if _has_table(connection):
        connection.execute(f"DELETE FROM pins WHERE {_LAPSED}", (snapshots.PIN_LIFE_S,))


def remove_all_pins(connection: apsw.Connection) -> None:
    """Remove all pins, because they protect another copy of the database. The caller is in a transaction."""
    if _has_table(connection):
        connection.execute("DELETE FROM pins")


def count_pins(connection: apsw.Connection) -> tuple[int, int]:
    """Return how many pins there are, and how many of them were not renewed in time."""
    if not _has_table(connection):
        return 0, 0
    pins, lapsed = connection.execute(
        f"SELECT count(*), coalesce(sum({_LAPSED}), 0) FROM pins", (snapshots.PIN_LIFE_S,)
    ).get
    return int(pins), int(lapsed)


def has_pin(connection: apsw.Connection, pin: str) -> bool:
    """Return whether a pin was not dropped. A pin that lapsed keeps what it protects until it is dropped."""
    return _has_table(connection) and bool(connection.execute("SELECT 1 FROM pins WHERE id = ?", (pin,)).get)


def _has_table(connection: apsw.Connection) -> bool:
    return connection.execute("SELECT 1 FROM sqlite_schema WHERE name = 'pins'").get is not None
