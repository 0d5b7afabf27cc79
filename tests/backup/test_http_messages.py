"""Messages of imports name the options of the caller, and show data of the archive as they are."""

from __future__ import annotations

import io

import pytest

from app.autocrud.backup.errors import ImportConflict
from app.autocrud.backup.importing import import_all

from .exports import Account
from .test_http import application, filled

ID = "a --resume: --on-conflict b"
"""An id that looks like a message with options."""


async def test_a_message_over_http_names_parameters_and_leaves_ids_as_they_are():
    crud, client = application()
    await crud.resource_manager(Account).create(Account(1), resource_id=ID)
    archive = (await client.get("/export")).content
    answer = await client.post("/import", content=archive)
    assert answer.json()["detail"] == (
        f"1 resources of the archive have ids that the model has already, among them {ID!r}: import with"
        " on_conflict=skip or replace"
    )
    with pytest.raises(ImportConflict) as caught:
        await import_all(crud.managers, io.BytesIO(archive))
    assert caught.value.detail == f"{caught.value.cause}: import with --on-conflict skip or replace"
    assert ID in caught.value.cause
    await client.aclose()


async def test_limits_and_models_are_named_as_parameters():
    crud, client = application()
    await filled(crud)
    archive = (await client.get("/export")).content
    answer = await client.post("/import?max_bytes=100", content=archive)
    assert answer.status_code == 413
    assert "--" not in answer.json()["detail"]
    answer = await client.post("/import?max_bytes=2000", content=archive)
    assert answer.json()["detail"].endswith("if it is yours, raise the limit (max_bytes=)")
    await client.aclose()
