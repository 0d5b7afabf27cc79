"""Planted defects in what callers do with files; `mutants` runs them. `mutants_of_blobs` has those of the stores."""

from __future__ import annotations

MODEL = ["tests/unit/test_blob_references.py"]
ACCESS = ["tests/http/test_blob_access.py"]
COMMITS = ["tests/http/test_blob_commits.py"]
HTTP = [f"tests/http/test_blob{part}.py" for part in ("s", "_uploads", "_downloads")]
TRANSFERS = ["tests/http/test_transfers.py"]
DEADLINES = ["tests/unit/test_read_deadline.py"]
SERVED = ["tests/test_server_blobs.py"]
M = "app/autocrud/resource_manager/"
H = "app/autocrud/http/"
S = "app/server/"

FILE_MUTANTS = [
    ("a hash gives access", M + "engine/references.py", "if row.owner == owner:", "if True:", ACCESS),
    ("any use gives access", M + "engine/references.py", "if self._filter is None:", "if True:", ACCESS),
    ("creators read all", M + "engine/references.py", "if not self._reads:", "if False:", ACCESS),
    ("kept references change", M + "engine/references.py", "if row.key in named:", "if False:", COMMITS),
    (
        "any number of uses is looked up",
        M + "engine/references.py",
        "self._blobs.uses(key, MAX_USES)",
        "self._blobs.uses(key, 10**6)",
        ACCESS,
    ),
    ("sizes are those of the client", M + "model/codec.py", "set_sizes(model_data.data, sizes)", "exists", HTTP),
    ("records name no blobs", M + "engine/planning.py", "meta.revision, blobs)", "meta.revision)", HTTP),
    ("drafts keep the former blobs", M + "engine/planning.py", "            blobs=blobs,\n", "", HTTP),
    (
        "a lost row is final",
        M + "engine/writing.py",
        "                if last:\n",
        "                if True:\n",
        COMMITS,
    ),
    ("names are not checked", M + "model/blob_references.py", 'name_error(blob.name)), ("c', 'None), ("c', MODEL),
    ("marks of direction are accepted", M + "model/blob.py", '(_BIDI, "mark', '(_PATH, "mark', MODEL),
    ("announced hashes are ignored", M + "engine/blobs.py", "digest.hexdigest() != sha256", "False", HTTP),
    ("digests of bodies are ignored", H + "blobs.py", "if digest.hexdigest() != expected:", "if False:", HTTP),
    ("scripts are shown", H + "blobs.py", '"inline" if shown else "attachment"', '"inline"', HTTP),
    ("types of scripts are sent", H + "blobs.py", "if media in INLINE else OCTET_STREAM.encode()", "", HTTP),
    ("ranges are sent for other content", H + "blobs.py", 'request.header(b"if-range") in (None, tag)', "True", HTTP),
    ("any number of ranges", H + "ranges.py", "if len(listed) > MAX_RANGES:", "if False:", HTTP),
    (
        "ranges overlap",
        H + "ranges.py",
        "return ranges if len(joined) == len(ranges) else joined",
        "return ranges",
        HTTP,
    ),
    ("a cut boundary is content", H + "multipart.py", "len(self._delimiter) - 1  #", "0 + 1  #", HTTP),
    ("several files are accepted", H + "multipart.py", "if await body.next_part():", "if False:", HTTP),
    ("a body that is cut is stored", H + "messages.py", "and length != str(total)", "and False", HTTP),
    (
        "working transfers are replaced",
        H + "transfers.py",
        "self._transfers.waiting.pop(self, None)\n\n",
        "pass\n\n",
        TRANSFERS,
    ),
    (
        "replaced tasks stay cancelled",
        H + "transfers.py",
        "            self._task.uncancel()",
        "            pass",
        TRANSFERS,
    ),
    ("steady readers are cut off", S + "http_answers.py", "(read - self._read_at_first) / MIN_RATE", "0", DEADLINES),
    (
        "uploads count as bodies",
        S + "http_protocol.py",
        "self._body.streamed = True",
        "self._body.streamed = False",
        SERVED,
    ),
    (
        "downloads lock clients out",
        S + "http_protocol.py",
        "if not self.cycle.response_complete:  #",
        "if False:  #",
        SERVED,
    ),
    ("downloads go on without a client", H + "streaming.py", "if gone.done():", "if False:", SERVED),
]
