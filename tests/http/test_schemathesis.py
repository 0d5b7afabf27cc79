"""Schemathesis compares the API with its OpenAPI document, with over a hundred examples for each operation."""

from __future__ import annotations

import asyncio
import itertools
import os
import re

import pytest
import schemathesis
from schemathesis.config import SchemathesisConfig

from app.autocrud.errors import VersionConflict
from app.autocrud.http.options import ID_PATTERN, KEY_PATTERN
from app.autocrud.query import SET_OPS
from app.models import Article

from .albums import Album, sha256_of
from .everything import EXAMPLE, KNOWN, make

CONTENT = b"content"
EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "120"))
"""Examples for each operation. They are the same in each run, unless `make fuzz` sets the number."""
LISTS = tuple(f"[{op}]" for op in SET_OPS)

# What else than 2xx a request may be answered that its schema allows, and why no schema can say it.
CURSOR = "400: a cursor is opaque, only the server can make one"
TIMES = "400: the generator fills lists of times with strings that are none"
CONDITION = "400: a header holds any string, a condition only ETags"
STATE = "412: the ETag may be another one's"
MISSING = "404: nothing has this id or number"
GONE = "410: the resource may be deleted"
KIND = "409: a unique value, a stable revision or a patch that does not apply"
DATA = "422: rules of msgspec that JSON Schema lacks, times without zone in an index, patches that make invalid data"
BLOB = "404: the resource has no such file"
HASH = "412: the generator makes other ETags"
RANGE = "416: the range may lie outside of the file"
UPLOAD = "400: the generator makes headers and forms that are none, and a name in them may be none"
INTEGER = "422: to JSON Schema 1.0 is an integer, to msgspec it is not"
ARCHIVE = "422: made-up bytes are no archive"
MODE = "400: mode=modify takes no status"
EXPECTED = {
    "list": [CURSOR],
    "count": [TIMES],
    "create": [KIND, DATA],
    "batch": [MISSING, KIND, GONE, STATE, CONDITION, DATA],
    "get": [MISSING, GONE, CONDITION],
    "update": [MISSING, KIND, GONE, STATE, CONDITION, MODE, DATA],
    "patch": [MISSING, KIND, GONE, STATE, CONDITION, MODE, DATA],
    "delete": [MISSING, GONE, STATE, CONDITION],
    "get_data_of": [MISSING, GONE, CONDITION],
    "publish": [MISSING, GONE, STATE, CONDITION],
    "switch": [MISSING, GONE, STATE, CONDITION, INTEGER],
    "restore": [MISSING, STATE, CONDITION],
    "purge": [MISSING, STATE, CONDITION],
    "list_revisions_of": [MISSING, GONE, CURSOR],
    "get_revision_of": [MISSING, GONE],
    "diff": [MISSING, GONE],
    "upload_blob_of": [UPLOAD, DATA],
    "get_blob_of": [MISSING, GONE, BLOB, HASH, RANGE, CONDITION],
    "healthz": [],
    "readyz": [],
    "export": [],
    "import": [ARCHIVE, "413: it may have more bytes than max_bytes says"],
}
SERVICE = ("healthz", "readyz", "export", "import")

MODELS = ("every_type", "article", "album")
app, crud = make()
numbers = itertools.count()


def configuration() -> SchemathesisConfig:
    names = [f"{verb}_{model}" for verb in EXPECTED for model in MODELS] + list(SERVICE)
    operations = [
        {
            "include-operation-id": name,
            "checks": {
                "positive_data_acceptance": {
                    "expected-statuses": ["2xx", "304", *(reason[:3] for reason in EXPECTED[_verb(name)])]
                },
                # The other methods of /{model}/blobs are those of a resource with the id "blobs".
                "unsupported_method": {"enabled": _verb(name) != "upload_blob_of"},
                "allow_header_conformance": {"enabled": _verb(name) != "upload_blob_of"},
            },
        }
        for name in names
    ]
    return SchemathesisConfig.from_dict(
        {
            "generation": {"max-examples": EXAMPLES, "deterministic": "FUZZ_EXAMPLES" not in os.environ},
            "checks": {
                "negative_data_rejection": {"expected-statuses": ["400", "404", "405", "410", "412", "415", "422"]}
            },
            "operations": operations,
        }
    )


def _verb(name: str) -> str:
    return re.sub(f"_({'|'.join(MODELS)})$", "", name)


schemathesis.serializer.alias(
    ["application/gzip", "application/x-gzip", "application/zstd"], "application/octet-stream"
)
schema = schemathesis.openapi.from_asgi("/openapi.json", app, config=configuration())


@schema.hook
def map_path_parameters(context, path_parameters):  # noqa: ARG001 - the signature of a hook
    """Replace half of the ids and hashes by existing ones. Ids that no resource can have must be refused."""
    made_up = (path_parameters or {}).get("id")
    if isinstance(made_up, str) and len(made_up) % 2 and re.fullmatch(ID_PATTERN, made_up):
        path_parameters["id"] = KNOWN
        if re.fullmatch(r"[0-9a-f]{64}", str(path_parameters.get("sha256"))):
            path_parameters["sha256"] = sha256_of(CONTENT)
    return path_parameters


def _survives(query) -> bool:
    """Accept a value that was generated to be no list: a query string has no types, so it arrives as a list of one."""
    return all(isinstance(value, list) for name, value in (query or {}).items() if name.endswith(LISTS))


def _own_key(headers) -> None:
    """Give each request a key of its own: the document does not describe repeated keys."""
    key = (headers or {}).get("Idempotency-Key")
    if isinstance(key, str) and re.fullmatch(KEY_PATTERN, key):
        headers["Idempotency-Key"] = f"{key[:200]}-{next(numbers)}"


async def _ensure_known() -> None:
    """Make sure that a resource with two revisions exists, and that the current revision is a draft."""
    album = Album("title", cover=await crud.managers["album"].upload(CONTENT, content_type="image/png", name="x.png"))
    for model, data in (("every-type", EXAMPLE), ("article", Article("title", "content", "author")), ("album", album)):
        manager = crud.managers[model]
        try:
            await manager.create(data, resource_id=KNOWN)
        except VersionConflict:
            await manager.restore(KNOWN)


@schema.parametrize()
def test_the_api_matches_the_openapi_document(case):
    asyncio.run(_ensure_known())
    _own_key(case.headers)
    if _survives(case.query):
        case.call_and_validate()


def test_every_operation_is_covered():
    described = {operation["operationId"] for item in app.openapi()["paths"].values() for operation in item.values()}
    assert {_verb(name) for name in described} == set(EXPECTED)


@pytest.mark.parametrize("name", ["every-type", "article", "album"])
async def test_some_requests_reached_a_resource(name):
    assert (await crud.managers[name].get(KNOWN, include_deleted=True)).meta.version >= 1
