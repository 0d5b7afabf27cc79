"""SQLite, for every store that keeps a SQLite database: in memory, on disk or as a local copy."""
