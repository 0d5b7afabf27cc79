"""Planted defects in the stores, their backends and the storage; `mutants` runs them.

Each is a name, a file, a text in it, the text that replaces it, and the tests that must fail then.
"""

from __future__ import annotations

STORES = ["tests/stores/test_conformance.py"]
CRASH = ["tests/stores/test_crash.py"]
S3 = [
    "tests/stores/test_s3_sqlite.py",
    "tests/stores/test_s3_sqlite_copies.py",
    "tests/stores/test_s3_sqlite_stores.py",
    "tests/stores/test_s3_simulation.py",
]
FORK = [
    "tests/stores/test_s3_fork.py",
    "tests/stores/test_s3_fork_copies.py",
    "tests/stores/test_s3_fork_simulation.py",
]
NEIGHBOURS = ["tests/stores/test_neighbours.py"]
STOPPED = ["tests/stores/test_stopped_process.py"]
POSTGRES_BLOBS = ["tests/stores/test_postgres_blobs.py"]
POSTGRES_SNAPSHOTS = ["tests/stores/test_postgres_snapshots.py", "tests/stores/test_pins.py"]
REDIS_BLOBS = ["tests/stores/redis"]
OLDER = ["tests/stores/test_older_program.py"]
DAMAGED = [f"tests/stores/damaged/test_{part}.py" for part in ("resources", "stores")]
SECRETS = ["tests/test_secrets.py", "tests/test_secrets_of_programs.py"]
P = "app/autocrud/resource_manager/backends/s3_sqlite/"
M = "app/autocrud/resource_manager/"

STORE_MUTANTS = [
    (
        "a negated list search forgets null",
        M + "backends/sqlite/sql.py",
        'else f"CASE WHEN {column(name)} IS NULL THEN NULL ELSE {has} END"',
        "else has",
        STORES,
    ),
    (
        "contains ignores case",
        M + "backends/sqlite/sql.py",
        'return f"instr({column(name)}, ?) > 0"',
        "return f\"{column(name)} LIKE '%' || ? || '%'\"",
        STORES,
    ),
    ("a descending page loses null", M + "backends/query_sql.py", " OR {col} IS NULL)", ")", STORES),
    (
        "a cursor stops at null",
        M + "backends/sqlite/sql.py",
        'f"{column(name)} IS ?"',
        'f"{column(name)} = ?"',
        STORES,
    ),
    (
        "swept bodies may be committed",
        M + "backends/sqlite/tables.py",
        "< generation - 1:",
        "< generation - 100:",
        STORES,
    ),
    (
        "unique values are not unique",
        M + "backends/sqlite/tables.py",
        "raise taken(name, resource_id, *(str(row[0]) for row in others))",
        "pass",
        STORES,
    ),
    (
        "a rival of a reservation is let in",
        M + "storage/unique_values.py",
        "if any(taker != resource_id for taker in takers):",
        "if False:",
        STORES,
    ),
    (
        "a failed write of a group stays half done",
        M + "backends/sqlite/committer.py",
        "elif connection.total_changes() != before:",
        "elif False:",
        STORES,
    ),
    (
        "a write cannot be given up between its stages",
        M + "backends/sqlite/committer.py",
        "return self.claim() if number == len(self.stages) - 1 else bool(self.ticket)",
        "return self.claim()",
        STOPPED,
    ),
    (
        "what was given up is done",
        M + "backends/sqlite/committer.py",
        "return self.claim() if number",
        "return self.claim() or True if number",
        STOPPED,
    ),
    (
        "reads wait for the file lock",
        M + "backends/sqlite/database.py",
        "        if self._file_lock is None:\n            await self.open()\n        return",
        "        return",
        STOPPED,
    ),
    (
        "rows of another index are not noted",
        M + "backends/sqlite/tables.py",
        "SET spec = ?1, stale = 1",
        "SET spec = ?1, stale = 0",
        STORES,
    ),
    (
        "acknowledged before it is synced",
        M + "backends/sqlite/database.py",
        '"synchronous", "full"',
        '"synchronous", "normal"',
        CRASH,
    ),
    (
        "a key is not looked for in the commit",
        M + "backends/sqlite/tables.py",
        "if once is not None and (done := self",
        "if once is None and (done := self",
        STORES,
    ),
    (
        "a key is not remembered",
        M + "backends/sqlite/tables.py",
        "        if once is not None:\n            changed = [",
        "        if False:\n            changed = [",
        STORES,
    ),
    (
        "a field is unique before all rows are indexed by it",
        P + "local_copy.py",
        "if not force and self.tables.outdated(db, 1):",
        "if False:",
        STORES,
    ),
    (
        "a purge is not looked after",
        M + "meta_store/sqlite3.py",
        "SELECT 1 FROM purges LIMIT 1",
        "SELECT 1 WHERE 0",
        S3,
    ),
    (
        "what is purged is remembered",
        M + "backends/sqlite/results_table.py",
        "UPDATE done SET id = NULL, doc = NULL WHERE id = ?",
        "UPDATE done SET id = id WHERE id = ?",
        [*STORES, "tests/stores/test_purge.py"],
    ),
    (
        "keys are forgotten at once",
        M + "backends/sqlite/results_table.py",
        "once.time - KEEP_KEYS_US",
        "once.time + KEEP_KEYS_US",
        STORES,
    ),
    (
        "a key is not in the log",
        P + "write_requests.py",
        "    if request.once is not None:\n",
        "    if False:\n",
        [*STORES, *S3],
    ),
    (
        "a key in the log is not replayed",
        P + "local_copy.py",
        'if op.kind == "once" and op.once is not None:',
        "if False:",
        [*STORES, *S3],
    ),
    ("the txid is not looked for", P + "committer.py", "if seq is not None:", "if False:", S3),
    (
        "what landed late is refused because of itself",
        P + "committer.py",
        "copy.attempt(requests, in_doubt)",
        "copy.attempt(requests)",
        S3,
    ),
    (
        "only own bodies are renewed",
        M + "storage/simple_storage.py",
        "meta=replace(change.meta, uid=new.get(change.meta.uid, change.meta.uid)),",
        "meta=change.meta if body is None else replace(change.meta, uid=new.get(change.meta.uid, change.meta.uid)),",
        STORES,
    ),
    (
        "an old draft is stale",
        M + "backends/sqlite/tables.py",
        "        if kept is None:\n",
        "        if True:\n",
        STORES,
    ),
    ("a rejection is not confirmed", P + "committer.py", "if found is UNCHANGED:", "if True:", S3),
    (
        "a 304 counts while an own PUT may land",
        P + "committer.py",
        "if not accepted and self._unresolved_etag != etag:",
        "if not accepted:",
        S3,
    ),
    ("absence is conclusive at once", P + "committer.py", "elif not self._unresolved_etag:", "else:", S3),
    ("absence is conclusive for ever", P + "committer.py", ">= REMEMBERED_TXIDS:", ">= 10**9:", S3),
    (
        "an answer before the swap",
        P + "committer.py",
        (
            "        outcome = await self._objects.put_if(self._replica.head_key, body, etag)\n"
            "        if isinstance(outcome, Stored):\n"
            '            self._unresolved_etag = ""\n'
            "            await"
        ),
        (
            "        _answer(waiting, trial)\n"
            "        outcome = await self._objects.put_if(self._replica.head_key, body, etag)\n"
            "        if isinstance(outcome, Stored):\n"
            '            self._unresolved_etag = ""\n'
            "            await"
        ),
        S3,
    ),
    ("everything unknown is collected", P + "housekeeping.py", "version <= head.ver and ", "", S3),
    (
        "a result is installed though its announcement is gone",
        P + "housekeeping.py",
        "if not any(one.key == key for one in head.pend):",
        "if False:",
        S3,
    ),
    (
        "a check that is under way is shared",
        P + "coalesced_checks.py",
        "        self._running, self._next = self._next, None\n        await self._check()",
        "        await self._check()\n        self._running, self._next = self._next, None",
        S3,
    ),
    (
        "a missing HEAD is made again",
        P + "creation.py",
        "if await self._objects.get(self._head_key) is None:",
        "if False:",
        S3,
    ),
    ("an old HEAD is taken", P + "replica.py", "if head.ver < known.ver or head.seq < known.seq:", "if False:", S3),
    (
        "what is known is known at the answer",
        P + "replica.py",
        "        self._check_lineage(head, known)\n",
        "        self._check_lineage(head, max(known, self._newest_seen, key=lambda one: one.ver))\n",
        S3,
    ),
    ("another store is taken", P + "replica.py", "if known.store and known.store != head.store:", "if False:", S3),
    ("HEADs may be equal", P + "head.py", "nonce=os.urandom(8), **changes", 'nonce=b"", **changes', S3),
    ("unique only for this version", P + "local_copy.py", "for name in schema.unique:", "for name in ():", S3),
    (
        "the sweep takes what lies deeper",
        M + "resource_store/s3.py",
        "if UID.fullmatch(uid) is not None and",
        'if re.match(r"(0|[1-9][0-9]*)/", uid) is not None and',
        NEIGHBOURS,
    ),
    (
        "collection takes what lies deeper",
        P + "head.py",
        "match = _NAME.fullmatch(name)",
        'match = re.search(r"()([0-9]+)-", name)',
        NEIGHBOURS,
    ),
    ("another HEAD of a known version is taken", P + "fork_detector.py", "if False in answers or", "if", FORK),
    ("records are not compared", P + "fork_detector.py", "if not compared.decided:", "if False:", FORK),
    (
        "fewer records at a higher version are taken",
        P + "fork.py",
        "return head.ver > known.ver and",
        "return False and",
        FORK,
    ),
    (
        "the newest known record is not read again",
        P + "replica.py",
        "after = state.seq if compared.decided else",
        "after = state.seq if True else",
        FORK,
    ),
    ("a snapshot is not compared", P + "replica.py", "if contradicts(known, found):", "if False:", FORK),
    (
        "an own swap is forgotten until the copy has it",
        P + "replica.py",
        "        self._forks.heads.add(head, records[-1] if records else None)\n",
        "",
        FORK,
    ),
    (
        "a swap that is perhaps lost is acknowledged",
        P + "committer.py",
        "        except HistoryForked:\n            raise\n",
        "",
        FORK,
    ),
    (
        "a fork is forgotten at a restart",
        P + "current_copy.py",
        "                self._forks.raise_if_recorded()\n",
        "",
        FORK,
    ),
    ("HEAD names no versions before it", P + "head.py", "past=past, ", "", FORK),
    (
        "an old HEAD is taken if a swap is not in the copy",
        P + "replica.py",
        "if state.ver < known.ver:",
        "if False:",
        FORK,
    ),
    ("another ETag of equal bytes stays unknown", P + "replica.py", "state.etag != got.etag:", "False:", FORK),
    ("a copy that moved is advanced unseen", P + "local_copy.py", "if state != base:", "if False:", FORK),
    ("snapshots are taken as they come", P + "log_reader.py", "!= snapshot.sha256:", "== b'':", S3),
    (
        "large entries travel in one transaction",
        M + "storage/reindexing.py",
        "if size >= CHUNK:",
        "if False:",
        STORES,
    ),
    (
        "damaged bodies stay in caches",
        M + "resource_store/cached_s3.py",
        "await self.evict(uids)\n\n    async def evict_all",
        "pass\n\n    async def evict_all",
        DAMAGED,
    ),
    (
        "the index takes what was written over a body",
        M + "storage/reindexing.py",
        "and not is_sound(meta, body)",
        "and False",
        DAMAGED,
    ),
    (
        "the words of Redis are repeated",
        M + "backends/redis/client.py",
        'self._address.hide(str(error).partition(", with args beginning with")[0])',
        "str(error)",
        SECRETS,
    ),
    (
        "a removal in PostgreSQL looks for uses before it waits",
        M + "backends/postgres/blob_schema.py",
        "(SELECT key FROM <blobs> WHERE key = ANY (keys_) ORDER BY key FOR UPDATE) locked;",
        "(SELECT key FROM <blobs> WHERE key = ANY (keys_) ORDER BY key) locked;",
        POSTGRES_BLOBS,
    ),
    (
        "a removal in PostgreSQL locks rows in another order",
        M + "backends/postgres/blob_schema.py",
        "ORDER BY key FOR UPDATE",
        "ORDER BY key DESC FOR UPDATE",
        POSTGRES_BLOBS,
    ),
    (
        "a commit in PostgreSQL does not lock the rows that it names",
        M + "backends/postgres/schema.py",
        "ORDER BY key FOR KEY SHARE",
        "ORDER BY key",
        POSTGRES_BLOBS,
    ),
    (
        "uploads and removals in PostgreSQL do not take turns",
        M + "backends/postgres/blob_schema.py",
        "INTO state_ FROM <blob-state> FOR UPDATE;",
        "INTO state_ FROM <blob-state>;",
        POSTGRES_BLOBS,
    ),
    (
        "functions of older programs stay in PostgreSQL",
        M + "backends/postgres/blob_schema.py",
        "            await connection.execute(refusal.encode())",
        "            pass",
        OLDER,
    ),
    (
        "older programs start beside blobs in PostgreSQL",
        M + "backends/postgres/blob_schema.py",
        "array_append(array_remove(uniques, <marker>), <marker>)",
        "uniques",
        OLDER,
    ),
    (
        "a newer format in PostgreSQL is written to",
        M + "backends/postgres/schema.py",
        "IF format_ > <format> THEN",
        "IF FALSE THEN",
        POSTGRES_BLOBS,
    ),
    (
        "a purge in PostgreSQL leaves uses",
        M + "backends/postgres/schema.py",
        "DELETE FROM <blob-uses> WHERE id = c->>'id';",
        "PERFORM 1;",
        ["tests/stores/test_postgres.py"],
    ),
    (
        "a pin in PostgreSQL is gone while it is renewed",
        M + "meta_store/postgres_snapshots.py",
        'await self._changed(f"DELETE FROM <pins> WHERE {_LAPSED}", (snapshots.PIN_LIFE_S,))\n',
        'return bool(await self._rows(f"SELECT 1 FROM <pins> WHERE NOT {_LAPSED}", (snapshots.PIN_LIFE_S,)))\n',
        POSTGRES_SNAPSHOTS,
    ),
    (
        "a snapshot of PostgreSQL has the limits of other transactions",
        M + "backends/postgres/session.py",
        'f"SET LOCAL {name} = 0; "',
        "f\"SELECT '{name}'; \"",
        POSTGRES_SNAPSHOTS,
    ),
    (
        "a snapshot of PostgreSQL shows several moments",
        M + "backends/postgres/session.py",
        "set_isolation_level(IsolationLevel.REPEATABLE_READ)",
        "set_isolation_level(IsolationLevel.READ_COMMITTED)",
        POSTGRES_SNAPSHOTS,
    ),
    (
        "a key without a row is named in Redis",
        M + "backends/redis/scripts.py",
        "if not before[key] and not row_of(key) then return key end",
        "",
        REDIS_BLOBS,
    ),
    (
        "a used row is removed from Redis",
        M + "backends/redis/blob_scripts.py",
        "if redis.call('ZCARD', uses_of(key)) == 0 then",
        "if true then",
        REDIS_BLOBS,
    ),
    (
        "a purge in Redis leaves uses",
        M + "backends/redis/scripts.py",
        "      if number then unname(c, number) end\n",
        "",
        REDIS_BLOBS,
    ),
    (
        "a newer format in Redis is written to",
        M + "backends/redis/script_parts.py",
        "if format > KNOWN then return say('format', format) end",
        "",
        REDIS_BLOBS,
    ),
    (
        "older programs write beside blobs in Redis",
        M + "backends/redis/script_parts.py",
        "'format', 2, 'unique', unique)",
        "'format', 2)",
        OLDER,
    ),
    (
        "a large resource in Redis is read while it changes",
        M + "meta_store/redis_snapshots.py",
        "if (after.version, after.nonce) == (meta.version, meta.nonce):",
        "if True:",
        REDIS_BLOBS,
    ),
    (
        "rows of blobs in Redis are read when they are needed",
        M + "meta_store/redis_snapshots.py",
        "await self._spool.add_blob_rows([row_of(row) for row in rows])",
        "pass",
        REDIS_BLOBS,
    ),
]
