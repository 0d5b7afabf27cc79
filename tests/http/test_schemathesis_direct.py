"""Schemathesis compares the routes of files on S3 with the OpenAPI document of a model on S3."""

from __future__ import annotations

import asyncio
import contextlib
import re
from typing import Any

import schemathesis
from fastapi import FastAPI
from schemathesis.config import SchemathesisConfig

from app.autocrud import AutoCRUD
from app.autocrud.access import ANONYMOUS
from app.autocrud.errors import VersionConflict
from app.autocrud.http.direct_blobs import direct_of
from app.autocrud.http.options import ID_PATTERN
from app.autocrud.resource_manager.backends.s3.memory_object_store import MemoryObjectStore
from app.autocrud.resource_manager.contract.direct import Announced
from app.autocrud.resource_manager.storage_factory import S3StorageFactory

from . import albums
from .everything import KNOWN

CONTENT = b"content"
SHA256 = albums.sha256_of(CONTENT)
# What else than 2xx a request may be answered that its schema allows, and why no schema can say it.
EXPECTED = {
    "get_blob_of_album": ["303", "400", "404", "410", "412", "416"],  # made-up ids, hashes, conditions and ranges
    "begin_upload_of_album": ["413", "422", "429"],  # larger than any file, names with a path, a hundred uploads
    "get_upload_of_album": ["404"],
    "complete_upload_of_album": ["404", "409"],  # nothing was sent
}

objects = MemoryObjectStore()
crud = AutoCRUD(storage_factory=S3StorageFactory("bucket", object_store=objects, sync_interval=None))
albums.register(crud)
app = FastAPI()
crud.apply(app)


def configuration() -> SchemathesisConfig:
    operations = [
        {
            "include-operation-id": name,
            "checks": {"positive_data_acceptance": {"expected-statuses": ["2xx", "304", *statuses]}},
        }
        for name, statuses in EXPECTED.items()
    ]
    return SchemathesisConfig.from_dict(
        {
            "generation": {"max-examples": 40, "deterministic": True},
            "checks": {
                "negative_data_rejection": {"expected-statuses": ["400", "404", "405", "410", "412", "415", "422"]}
            },
            "operations": operations,
        }
    )


def document() -> dict[str, Any]:
    """Return the OpenAPI document with these operations only."""
    described = app.openapi()
    paths = {
        path: kept
        for path, item in described["paths"].items()
        if (kept := {verb: one for verb, one in item.items() if one["operationId"] in EXPECTED})
    }
    return described | {"paths": paths}


schema = schemathesis.openapi.from_dict(document(), config=configuration())
schema.app = app


async def _known_upload() -> str:
    """Return the id of an upload whose content was sent. Also makes sure that a resource with a file exists."""
    manager = crud.resource_manager(albums.Album)
    album = albums.Album("title", cover=await manager.upload(CONTENT, content_type="image/png", name="x.png"))
    with contextlib.suppress(VersionConflict):
        await manager.create(album, resource_id=KNOWN)
    direct = await direct_of(manager)
    assert direct is not None
    announced = Announced(size=len(CONTENT), sha256=SHA256, content_type="image/png", name="x.png")
    upload = await direct.begin(ANONYMOUS.name, announced)
    assert (await objects.use("PUT", upload.url, CONTENT, upload.headers)).status == 200
    return upload.id


known_upload = asyncio.run(_known_upload())


@schema.hook
def map_path_parameters(context, path_parameters):  # noqa: ARG001 - the signature of a hook
    """Replace most ids and hashes by existing ones. Those that the document does not allow must be refused."""
    for name, pattern, known in (
        ("id", ID_PATTERN, KNOWN),
        ("sha256", "[0-9a-f]{64}", SHA256),
        ("upload_id", "[0-9a-f]{20}", known_upload),
    ):
        made_up = (path_parameters or {}).get(name)
        if isinstance(made_up, str) and re.fullmatch(pattern, made_up) and not made_up.endswith("0"):
            path_parameters[name] = known
    return path_parameters


@schema.parametrize()
def test_the_routes_match_the_openapi_document(case):
    case.call_and_validate()
