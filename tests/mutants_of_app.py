"""Planted defects in everything but the stores; `mutants` runs them.

Each is a name, a file, a text in it, the text that replaces it, and the tests that must fail then.
"""

from __future__ import annotations

STORES = ["tests/stores/test_conformance.py"]
BOUNDED = ["tests/http/test_bounded_work.py"]
PATCHES = ["tests/http/test_json_patch.py"]
PAGES = ["tests/test_foreign_pages.py"]
HTTP = ["tests/http/test_routes.py"]
REQUEST_BODIES = ["tests/http/test_request_bodies.py"]
SEARCH = ["tests/http/test_search.py"]
RESCUE = ["tests/stores/test_s3_rescue.py"]
MQ = [f"tests/stores/test_mq_{part}.py" for part in ("cached_s3", "failures", "processes")]
ACCESS = ["tests/http/test_access.py"]
LAMBDA = [f"tests/aws_lambda/test_{part}.py" for part in ("access", "interruptions", "requests")]
DAMAGED = [f"tests/stores/damaged/test_{part}.py" for part in ("resources", "stores")]
SECRETS = ["tests/test_secrets.py", "tests/test_secrets_of_programs.py"]
LIMITS = ["tests/test_limits.py", "tests/http/test_limits.py"]
M = "app/autocrud/resource_manager/"
H = "app/autocrud/http/"

APP_MUTANTS = [
    ("expectations are not checked", M + "contract/store_errors.py", "if as_expected:", "if True:", STORES),
    (
        "negative decimals sort by length",
        "app/autocrud/values.py",
        'return f"0{text.translate(NINES)}:"',
        'return f"0{text.translate(NINES)}"',
        STORES,
    ),
    ("the same data appends", M + "engine/planning.py", "if digest == meta.data_hash:", "if False:", STORES),
    ("stable revisions are modified", M + "engine/planning.py", 'if meta.status != "draft":', "if False:", STORES),
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
        "what changes nothing is not confirmed",
        M + "engine/writing.py",
        "await self._storage.confirm(unchanged)",
        "pass",
        MQ,
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
    ("no authentication", H + "routes.py", "if self._policy.authenticate is not None:", "if False:", ACCESS),
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
        "damaged resources are not remembered",
        M + "model/verification.py",
        "self._parts[resource_id, part] = None",
        "pass",
        DAMAGED,
    ),
    ("a password may hold an @", "app/autocrud/secret.py", 'if "@" in credentials:', "if False:", SECRETS),
    ("a password may hold a slash", "app/autocrud/secret.py", "if at and (found", "if False and (found", SECRETS),
    ("a secret is shown", "app/autocrud/secret.py", "return self.shown", "return self.reveal()", SECRETS),
]
