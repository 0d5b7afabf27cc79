"""The statements that create the tables and indexes of `tables`."""

META_COLUMNS = (
    "id",
    "version",
    "nonce",
    "revision",
    "total_revision_count",
    "schema_version",
    "status",
    "is_deleted",
    "created_time",
    "updated_time",
    "created_by",
    "updated_by",
    "uid",
    "encoding",
    "doc",
)
TABLES = """
CREATE TABLE IF NOT EXISTS resources (
  rid INTEGER PRIMARY KEY, id TEXT NOT NULL UNIQUE, version INTEGER NOT NULL, nonce TEXT NOT NULL,
  revision INTEGER NOT NULL, total_revision_count INTEGER NOT NULL, schema_version INTEGER NOT NULL,
  status TEXT NOT NULL, is_deleted INTEGER NOT NULL, created_time INTEGER NOT NULL, updated_time INTEGER NOT NULL,
  created_by TEXT NOT NULL, updated_by TEXT NOT NULL, uid TEXT NOT NULL, encoding TEXT NOT NULL, doc BLOB NOT NULL,
  shown BLOB, missing TEXT, spec INTEGER);
CREATE TABLE IF NOT EXISTS list_values (field TEXT, value, rid INTEGER, PRIMARY KEY (field, value, rid)) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS list_values_by_rid ON list_values (rid);
CREATE TABLE IF NOT EXISTS revisions (
  rid INTEGER, revision INTEGER, uid TEXT NOT NULL, doc BLOB NOT NULL, PRIMARY KEY (rid, revision)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS done (
  key TEXT, operation INTEGER, request TEXT NOT NULL, time INTEGER NOT NULL, id TEXT, doc BLOB,
  PRIMARY KEY (key, operation)) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS done_by_time ON done (time);
CREATE INDEX IF NOT EXISTS done_by_id ON done (id) WHERE id IS NOT NULL;
CREATE TABLE IF NOT EXISTS specs (id INTEGER PRIMARY KEY, fields TEXT NOT NULL UNIQUE);
CREATE TABLE IF NOT EXISTS uniques (field TEXT PRIMARY KEY) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS state (
  one INTEGER PRIMARY KEY CHECK (one = 1), format INTEGER, generation INTEGER, live INTEGER, spec INTEGER,
  stale INTEGER);
INSERT OR IGNORE INTO state VALUES (1, 1, 0, 0, 0, 0);
CREATE TRIGGER IF NOT EXISTS live_insert AFTER INSERT ON resources WHEN NOT NEW.is_deleted
  BEGIN UPDATE state SET live = live + 1; END;
CREATE TRIGGER IF NOT EXISTS live_delete AFTER DELETE ON resources WHEN NOT OLD.is_deleted
  BEGIN UPDATE state SET live = live - 1; END;
CREATE TRIGGER IF NOT EXISTS live_update AFTER UPDATE OF is_deleted ON resources WHEN OLD.is_deleted <> NEW.is_deleted
  BEGIN UPDATE state SET live = live + OLD.is_deleted - NEW.is_deleted; END;
"""
INDEXES = {
    "created_time": "CREATE INDEX IF NOT EXISTS by_created ON resources (is_deleted, created_time, id)",
    "updated_time": "CREATE INDEX IF NOT EXISTS by_updated ON resources (is_deleted, updated_time, id)",
    "uid = ?": "CREATE INDEX IF NOT EXISTS by_uid ON revisions (uid)",
    "uid > ?": "CREATE INDEX IF NOT EXISTS by_uid ON revisions (uid)",
}
"""The statement that makes each index, by a text that occurs in every statement that the index serves."""

FORMAT = 1
FORMAT_WITH_BLOBS = 2
"""The format from the commit of the first row of a blob on."""
