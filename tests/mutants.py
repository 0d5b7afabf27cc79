"""Planted defects that the suite must find, on demand: `make mutants`. A guard whose removal no test notices is no guard.

`python -m tests.mutants s3_sqlite` tries those of files whose path contains that.

Each mutant replaces a text in a file, runs the tests that should notice, and puts the file back.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
STORES = ["tests/stores/test_conformance.py"]
CRASH = ["tests/stores/test_crash.py"]
BOUNDED = ["tests/http/test_bounded_work.py"]
PATCHES = ["tests/http/test_json_patch.py"]
PAGES = ["tests/test_foreign_pages.py"]
HTTP = ["tests/http/test_routes.py"]
REQUEST_BODIES = ["tests/http/test_request_bodies.py"]
SEARCH = ["tests/http/test_search.py"]
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
RESCUE = ["tests/stores/test_s3_rescue.py"]
MQ = [f"tests/stores/test_mq_{part}.py" for part in ("cached_s3", "failures", "processes")]
NEIGHBOURS = ["tests/stores/test_neighbours.py"]
STOPPED = ["tests/stores/test_stopped_process.py"]
ACCESS = ["tests/http/test_access.py"]
LAMBDA = ["tests/test_lambda_runtime.py"]
DAMAGED = ["tests/stores/test_damaged.py"]
SECRETS = ["tests/test_secrets.py"]
LIMITS = ["tests/test_limits.py", "tests/http/test_limits.py"]
P = "app/autocrud/resource_manager/backends/s3_sqlite/"
M = "app/autocrud/resource_manager/"
H = "app/autocrud/http/"

MUTANTS = [
    ("expectations are not checked", M + "contract/store_errors.py", 'if expect == "any" or', "if True or", STORES),
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
        "negative decimals sort by length",
        "app/autocrud/values.py",
        'return f"0{text.translate(NINES)}:"',
        'return f"0{text.translate(NINES)}"',
        STORES,
    ),
    ("the same data appends", M + "engine/planning.py", "if digest == meta.data_hash:", "if False:", STORES),
    ("stable revisions are modified", M + "engine/planning.py", 'if meta.status != "draft":', "if False:", STORES),
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
        "nobody notes rows of another index",
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
    ("unknown fields are dropped", M + "model/codec.py", "if violations:", "if False:", REQUEST_BODIES),
    ("keys may stand twice", M + "model/codec.py", "if len(found) != len(pairs):", "if False:", REQUEST_BODIES),
    ("cursors of other lists are taken", H + "searching.py", "if raw[: len(scope)] != scope or", "if", SEARCH),
    (
        "weak ETags match",
        H + "conditions.py",
        "NO_STATE if weak else Version.of_opaque_tag(opaque) for",
        "Version.of_opaque_tag(opaque) for",
        HTTP,
    ),
    ("bodies have no limit", H + "messages.py", "if size > self._max_body:", "if False:", REQUEST_BODIES),
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
        "what changes nothing is not confirmed",
        M + "engine/writing.py",
        "await self._storage.confirm(unchanged)",
        "pass",
        MQ,
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
        M + "backends/sqlite/tables.py",
        "UPDATE done SET id = NULL, doc = NULL WHERE id = ?",
        "UPDATE done SET id = id WHERE id = ?",
        [*STORES, "tests/stores/test_purge.py"],
    ),
    (
        "keys are forgotten at once",
        M + "backends/sqlite/tables.py",
        "once.time - KEEP_KEYS_US",
        "once.time + KEEP_KEYS_US",
        STORES,
    ),
    (
        "other callers' keys count",
        M + "engine/caller.py",
        "{len(self.name)}:{self.name}{self.key.key}",
        "{self.key.key}",
        STORES,
    ),
    ("a key does for any request", M + "engine/writing.py", "if done.request != key.request or", "if", STORES),
    (
        "a key of no change is forgotten",
        M + "engine/writing.py",
        "if plan.writes or key is not None:",
        "if plan.writes:",
        STORES,
    ),
    (
        "a key is not in the log",
        P + "local_copy.py",
        "        if request.once is not None:\n",
        "        if False:\n",
        [*STORES, *S3],
    ),
    (
        "a key in the log is not replayed",
        P + "local_copy.py",
        'if op.kind == "once" and op.once is not None:',
        "if False:",
        [*STORES, *S3],
    ),
    (
        "reads are not bounded",
        M + "engine/reading.py",
        "if read_filter is not None and not",
        "if False and not",
        ACCESS,
    ),
    (
        "writes are not bounded by the read filter",
        M + "engine/planning.py",
        "if not await self._reader.matches(access_filter.read, state):",
        "if False:",
        ACCESS,
    ),
    (
        "writes are not bounded by what they replace",
        M + "engine/planning.py",
        "if not await self._reader.matches(allowed, state):\n                raise",
        "if False:\n                raise",
        ACCESS,
    ),
    (
        "writes are not bounded by what they leave",
        M + "engine/planning.py",
        "await self._check_left(allowed, state)",
        "pass",
        ACCESS,
    ),
    (
        "lists are not bounded",
        H + "collection.py",
        "search._replace(query=narrowed(search.query, request.caller))",
        "search",
        ACCESS,
    ),
    (
        "counts are not bounded",
        H + "collection.py",
        "narrowed(query.resolve(self._manager.codec.fields), request.caller)",
        "query",
        ACCESS,
    ),
    (
        "batches ask for nothing",
        H + "collection.py",
        "        await self._context.authorize(request, *dict.fromkeys(ACTIONS",
        "        (lambda *_: None)(request, *dict.fromkeys(ACTIONS",
        ACCESS,
    ),
    (
        "a PUT asks for nothing",
        H + "resource.py",
        '        await self._context.authorize(request, "create" if creates else "update")\n',
        "",
        ACCESS,
    ),
    ("nobody is asked who they are", H + "routes.py", "if self._policy.authenticate is not None:", "if False:", ACCESS),
    (
        "the guard lets in what begins like healthz",
        H + "guard.py",
        "route_path(scope) in self._open",
        "route_path(scope).startswith(self._open)",
        [*ACCESS, *LAMBDA],
    ),
    (
        "nonsense of a hook lets in",
        "app/autocrud/access.py",
        "if not isinstance(answer, bool | Filter):",
        "if False:",
        ACCESS,
    ),
    (
        "any token does",
        "app/authentication.py",
        'if scheme.lower() != "bearer" or not found:',
        'if scheme.lower() != "bearer":',
        LAMBDA,
    ),
    ("any issuer does", "app/authentication.py", 'if claims.get("iss") != self._auth.issuer or', "if", LAMBDA),
    ("memory is storage enough on Lambda", "app/aws_lambda.py", "if not manager.storage.remote]", "if False]", LAMBDA),
    ("answers have no limit", "app/aws_lambda.py", "return len(body) < LARGE or", "return True or", LAMBDA),
    (
        "work begins however little time is left",
        M + "runtime/threads.py",
        "            deadline.check(count)\n",
        "",
        ["tests/http/test_deadlines.py"],
    ),
    (
        "what is dense counts like plain text",
        M + "runtime/deadline.py",
        " + min(_parts(text), MOST_PARTS) for text",
        " for text",
        ["tests/http/test_deadlines.py"],
    ),
    (
        "a large answer is sent however late",
        H + "routes.py",
        "check_time(len(response.body) // STEP_BYTES)",
        "pass",
        ["tests/http/test_deadlines.py"],
    ),
    (
        "no answer in time",
        "app/aws_lambda.py",
        "asyncio.timeout(seconds)",
        "asyncio.timeout(None)",
        LAMBDA,
    ),
    (
        "paths are logged",
        "app/request_log.py",
        'return found if isinstance(found, str) else "none"',
        'return scope["path"]',
        LAMBDA,
    ),
    ("nobody looks for the txid", P + "committer.py", "if seq is not None:", "if False:", S3),
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
    (
        "history is read after the check alone",
        M + "engine/reading.py",
        "return read_filter is None or await",
        "return True or await",
        ACCESS,
    ),
    ("copies are not counted", H + "json_patch.py", "if self._left < 0:", "if False:", BOUNDED),
    (
        "what copies make in objects is not counted",
        H + "json_patch.py",
        "if self._containers_left < 0:",
        "if False:",
        BOUNDED,
    ),
    ("a long list is moved whole", H + "json_patch.py", "len(container) <= LONG", "True", BOUNDED),
    ("a patch shares its values", H + "json_patch.py", "return _decode(_encode(value))", "return value", PATCHES),
    ("true is one", H + "json_patch.py", "return found is expected", "return bool(found == expected)", PATCHES),
    (
        "a difference has no bound",
        H + "json_diff.py",
        "if len(self._operations) > MAX_OPERATIONS:",
        "if False:",
        BOUNDED,
    ),
    ("names may stand twice", M + "model/codec.py", "if strings(body) == strings(", "if True or (", BOUNDED),
    ("ETags have no end", H + "conditions.py", "if len(tags) == MAX_ETAGS:", "if False:", BOUNDED),
    ("depth is not looked at", M + "model/json_shape.py", "if depth > MAX_DEPTH", "if False", BOUNDED),
    (
        "what patches make has no bound",
        M + "engine/planning.py",
        "self._bytes_added > operation.max_bytes",
        "False",
        BOUNDED,
    ),
    (
        "large work is done at once",
        M + "runtime/threads.py",
        "return work() if size < HEAVY_BYTES else",
        "return work() if True else",
        BOUNDED,
    ),
    (
        "a foreign origin may write",
        "app/foreign_pages.py",
        "return len(origins) > 1 or not",
        "return False and not",
        PAGES,
    ),
    (
        "another host name is served",
        "app/foreign_pages.py",
        "if self._asks_host and host and",
        "if False and host and",
        PAGES,
    ),
    ("a site without an origin may write", "app/foreign_pages.py", 'in ("cross-site", "same-site")', "in ()", PAGES),
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
        '        outcome = await self._objects.put_if(self._replica.head_key, body, etag)\n        if isinstance(outcome, Stored):\n            self._unresolved_etag = ""\n            await',
        '        _answer(waiting, trial)\n        outcome = await self._objects.put_if(self._replica.head_key, body, etag)\n        if isinstance(outcome, Stored):\n            self._unresolved_etag = ""\n            await',
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
        "ours = UID.fullmatch(uid)",
        'ours = re.match(r"(0|[1-9][0-9]*)/", uid)',
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
    (
        "rescued changes are forgotten without a file",
        "app/s3_tools/s3_rescue.py",
        "if not (resume and _has_all(file, wanted)):",
        "if not resume:",
        RESCUE,
    ),
    (
        "a transaction without a log is forgotten",
        "app/s3_tools/s3_rescue.py",
        "copies += _keep_copy(one, file)",
        "pass",
        RESCUE,
    ),
    ("snapshots are taken as they come", P + "log_reader.py", "!= snapshot.sha256:", "== b'':", S3),
    ("no size is refused", M + "contract/limits.py", "return len(json) > 2 * MAX_ITEMS", "return False", LIMITS),
    (
        "lists of any length",
        M + "contract/limits.py",
        "if count > max(MAX_ITEMS, before.get(name, 0)):",
        "if False:",
        LIMITS,
    ),
    (
        "what is too large may grow",
        M + "contract/limits.py",
        "if size > max(SMALL, old_sizes.get(name, 0))",
        "if False",
        LIMITS,
    ),
    (
        "a longer list is no worse",
        M + "contract/limits.py",
        "max(MAX_ITEMS, before.get(name, 0))",
        "(MAX_ITEMS if name not in before else 10**9)",
        LIMITS,
    ),
    ("what is too large may not be changed", M + "contract/limits.py", "if not sizes:", "if False:", LIMITS),
    ("ids of any length", M + "contract/store_errors.py", "len(resource_id.encode())) > MAX_ID:", "0):", STORES),
    ("names that no store can hold", M + "engine/writing.py", "check_name(caller.name)", "pass", STORES),
    (
        "a value that was not there before is left out of the index",
        M + "model/codec.py",
        "if path.read_loosely(before) != value:",
        "if False:",
        STORES,
    ),
    (
        "a filter on data fails for what cannot be indexed",
        M + "engine/access_filter.py",
        "codec.index_stored(await json())",
        "codec.index(codec.decode(await json(), 'json'))",
        STORES,
    ),
    (
        "large entries travel in one transaction",
        M + "storage/reindexing.py",
        "if size >= CHUNK:",
        "if False:",
        STORES,
    ),
    (
        "bodies are not compared with their hash",
        M + "model/verification.py",
        "hashlib.sha256(body).hexdigest() == meta.data_hash",
        "True",
        DAMAGED,
    ),
    ("a body is compared once", M + "model/verification.py", "known[1] == body and known[0]", "known[0]", DAMAGED),
    (
        "a list does not compare what it has compared",
        M + "model/verification.py",
        "one is None or one[1] != body or one[2] != document",
        "one is None",
        DAMAGED,
    ),
    (
        "damaged bodies stay in caches",
        M + "resource_store/cached_s3.py",
        "await self.evict(uids)\n\n    async def evict_all",
        "pass\n\n    async def evict_all",
        DAMAGED,
    ),
    (
        "damaged resources are not remembered",
        M + "model/verification.py",
        "self._parts[resource_id, part] = None",
        "pass",
        DAMAGED,
    ),
    (
        "the index takes what was written over a body",
        M + "storage/reindexing.py",
        "and not is_sound(meta, body)",
        "and False",
        DAMAGED,
    ),
    ("a password may hold an @", "app/autocrud/secret.py", 'if "@" in credentials:', "if False:", SECRETS),
    ("a password may hold a slash", "app/autocrud/secret.py", "if at and (found", "if False and (found", SECRETS),
    ("a secret is shown", "app/autocrud/secret.py", "return self.shown", "return self.reveal()", SECRETS),
    (
        "the words of Redis are repeated",
        M + "backends/redis/client.py",
        'self._address.hide(str(error).partition(", with args beginning with")[0])',
        "str(error)",
        SECRETS,
    ),
]


def main() -> None:
    survived = 0
    wanted = sys.argv[1] if len(sys.argv) > 1 else ""
    for name, file, old, new, tests in MUTANTS:
        if wanted not in file:
            continue
        path = ROOT / file
        source = path.read_text()
        if old not in source:
            sys.exit(f"{name}: {old!r} is not in {file} any more; write the mutant anew")
        path.write_text(source.replace(old, new))
        try:
            run = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *tests]
            killed = subprocess.run(run, cwd=ROOT, capture_output=True, check=False).returncode != 0
        finally:
            path.write_text(source)
        survived += not killed
        print(f"{'killed  ' if killed else 'SURVIVED'} {name}", flush=True)
    sys.exit(1 if survived else 0)


if __name__ == "__main__":
    main()
