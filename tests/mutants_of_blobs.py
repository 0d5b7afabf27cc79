"""Planted defects in the rows of blobs; `mutants` runs them.

Each is a name, a file, a text in it, the text that replaces it, and the tests that must fail then.
"""

from __future__ import annotations

from .mutants_of_stores import M, P

ROWS = ["tests/stores/test_conformance.py", "-k", "Memory and not WithS3 or TestDisk"]
S3_ROWS = ["tests/stores/test_s3_blobs.py", "tests/stores/test_s3_blob_simulation.py"]
SIMULATION = ["tests/stores/test_blob_simulation.py"]
LOADS = ["tests/stores/redis/test_loading.py"]
OLDER = ["tests/stores/test_older_program.py"]
T = M + "backends/sqlite/blob_tables.py"

BLOB_MUTANTS = [
    ("a blob in use is removed", T, "if not _has_use(connection, key)]", "]", ROWS),
    ("a record names any blob", M + "backends/sqlite/tables.py", "and change.record.blobs:", "and False:", ROWS),
    ("swept content gets a row", T, "if upload_epoch < epoch(connection):", "if False:", ROWS),
    ("the epoch is that of the swept key", T, "blob_epoch_of(key) + 1 for", "blob_epoch_of(key) for", ROWS),
    ("the epoch goes back", T, "if raised > epoch(connection):", "if raised:", ROWS),
    ("the quota is that of each blob", T, "usage(connection).size) + row.size > quota", "row.size) > quota", ROWS),
    ("the usage forgets removed blobs", T, "size = size - OLD.size", "size = size", ROWS),
    (
        "a revision keeps the uses of its former data",
        T,
        '", resource)\n    for key in',
        ' AND 0", resource)\n    for key in',
        ROWS,
    ),
    ("retention leaves uses", T, "AND revision IN (SELECT", "AND 0 AND revision IN (SELECT", ROWS),
    ("a purge leaves uses", T, 'WHERE id = ?", (resource_id,)', 'WHERE 0 AND id = ?", (resource_id,)', ROWS),
    ("another hash is found", T, "key > ? AND key < ?", "key > ? AND key > ?", ROWS),
    (
        "each revision is a use",
        T,
        "max(revision) FROM blob_uses WHERE key = ? GROUP BY id",
        "revision FROM blob_uses WHERE key = ?",
        ROWS,
    ),
    ("the marker is a unique field", M + "backends/sqlite/tables.py", " - {BLOBS_MARKER}\n", "\n", ROWS),
    ("running programs see no marker", T, "(BLOBS_MARKER,)", '("text",)', OLDER),
    (
        "the first row does not raise the format",
        T,
        '"UPDATE state SET format = ?"',
        '"UPDATE state SET format = 1 OR ?"',
        OLDER,
    ),
    (
        "HEAD does not tell about blobs",
        P + "local_copy.py",
        "max(head.fmt, format_without",
        "min(head.fmt, format_without",
        S3_ROWS,
    ),
    (
        "HEAD forgets the epoch",
        P + "local_copy.py",
        "            if head.blob_epoch:",
        "            if False:",
        S3_ROWS,
    ),
    (
        "the epoch alone is not committed",
        P + "write_requests.py",
        "removed or blob_tables.epoch(connection) > epoch",
        "removed",
        S3_ROWS,
    ),
    ("removed rows stay in copies", M + "backends/sqlite/replay.py", 'op.kind == "no-blob"', "False", S3_ROWS),
    (
        "new rows are not in copies",
        M + "backends/sqlite/replay.py",
        "blob_tables.put(connection, op.blob_row)",
        "pass",
        S3_ROWS,
    ),
    ("an imported database begins at epoch 0", P + "creation.py", "blob_epoch=epoch)", "blob_epoch=0)", S3_ROWS),
    ("an imported database is not marked", P + "creation.py", "fmt=format_of(connection)", "fmt=1", S3_ROWS),
    (
        "the log forgets keys of records",
        M + "backends/log_records.py",
        "for name in expected if",
        'for name in expected if name != "blobs" and',
        S3_ROWS,
    ),
    (
        "a sweep removes content while there is a pin",
        M + "storage/blobs.py",
        "return self._pinning is not None and await self._pinning.has_pins()",
        "return False",
        SIMULATION,
    ),
    (
        "a sweep removes bodies while there is a pin",
        M + "storage/sweeping.py",
        "if self._pins is not None and await self._pins.has_pins():",
        "if False:",
        ["tests/backup/test_importing_packs.py"],
    ),
    (
        "edits remove bodies while there is a pin",
        M + "storage/dropped_bodies.py",
        "            if await self._are_pinned():\n                self._keep",
        "            if False:\n                self._keep",
        SIMULATION,
    ),
    (
        "a sweep removes content before its row",
        M + "storage/blobs.py",
        "        removable = await self._rows.remove_blobs(keys)\n        if removable:\n            if await self",
        (
            "        await self._store.delete([key for key in keys if not await self._rows.blob_uses(key)])\n"
            "        removable = await self._rows.remove_blobs(keys)\n        if removable:\n            if await self"
        ),
        SIMULATION,
    ),
    (
        "uploads of equal content have one key",
        M + "storage/blobs.py",
        'key = await self._writer.store(f"{epoch}-{uuid7().hex}")\n            row',
        'key = await self._writer.store(f"{epoch}-{0:032x}")\n            row',
        SIMULATION,
    ),
    (
        "a purge releases nothing",
        M + "storage/simple_storage.py",
        "await self._blobs.release_purged(released)",
        "pass",
        SIMULATION,
    ),
    (
        "uploads are swept at once",
        M + "blob_store/s3.py",
        "if listed.modified <= stored_by:",
        "if True:",
        SIMULATION,
    ),
    (
        "Redis loads into a model with data",
        M + "backends/redis/load_scripts.py",
        "local found = held()\nif found then return say('full', found) end",
        "",
        ["tests/stores/redis/test_redis.py", "-k", "TestRedis and (that_has_data or a_load_races or of_two_loads)"],
    ),
    (
        "Redis publishes half a load",
        M + "backends/redis/load_scripts.py",
        "if counts[i] ~= num()",
        "if not num()",
        LOADS,
    ),
    ("replicas miss a load", M + "backends/redis/load_scripts.py", "seq = seq + 2", "seq = seq + 1", LOADS),
    ("loads expire", M + "backends/redis/load_scripts.py", "redis.call('PERSIST', move[1])", "", LOADS),
]
