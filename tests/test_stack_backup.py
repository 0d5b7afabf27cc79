"""Export and import of a stack through its function for backups: the handler and the bucket are real, Lambda is not."""

from __future__ import annotations

import io
import json
import time
from pathlib import Path
from typing import Any

import boto3
import pytest

from app import settings, stack_backup
from app.autocrud.backup.archive_reader import verify
from app.autocrud.errors import ConfigError
from app.backup_function import BackupFunction
from app.dev.local_s3 import make_bucket
from app.main import create_app
from app.models import Article


class Context:
    """The context of an invocation that may take `seconds`."""

    def __init__(self, seconds: float = 900) -> None:
        self._ends = time.monotonic() + seconds

    def get_remaining_time_in_millis(self) -> int:
        return int(1000 * (self._ends - time.monotonic()))


class Lambda:
    """Calls the handler, as Lambda does, in the thread of the caller."""

    def __init__(self, handler: BackupFunction) -> None:
        self._handler, self.events = handler, []

    def invoke(self, FunctionName: str, Payload: bytes) -> dict[str, Any]:  # noqa: N803 - as boto3 names them
        assert FunctionName == "backup"
        self.events.append(json.loads(Payload))
        answer = self._handler(json.loads(Payload), Context())
        return {"Payload": io.BytesIO(json.dumps(answer, default=str).encode())}


@pytest.fixture
def stack(ministack_s3, monkeypatch):
    """Return a function that makes a stack with its own prefix: its settings, and its Lambda."""
    for name, value in {
        "AWS_ACCESS_KEY_ID": ministack_s3.access_key_id,
        "AWS_SECRET_ACCESS_KEY": ministack_s3.secret_access_key,
        "AWS_ENDPOINT_URL": ministack_s3.url,
        "AWS_DEFAULT_REGION": "us-east-1",
    }.items():
        monkeypatch.setenv(name, value)
    make_bucket("stack-backup", ministack_s3.url, "us-east-1")
    client, functions = boto3.session.Session.client, []

    def made(prefix: str) -> tuple[settings.Settings, Lambda]:
        outputs = settings.StackOutputs(
            version=1,
            storage="s3-sqlite",
            bucket="stack-backup",
            prefix=prefix,
            region="us-east-1",
            backup_function_name="backup",
            auth=settings.NoAuth(),
        )
        given = settings.Settings(outputs, settings.LocalOverrides(s3_endpoint_url=ministack_s3.url))
        function = Lambda(BackupFunction(given))
        functions.append(function)
        monkeypatch.setattr(
            boto3.session.Session,
            "client",
            lambda self, name, **more: function if name == "lambda" else client(self, name, **more),
        )
        return given, function

    yield made
    for function in functions:
        function._handler._loop.run_until_complete(function._handler._crud.close())
        function._handler._loop.close()


def keys_of(prefix: str) -> list[str]:
    found = boto3.session.Session().client("s3").list_object_versions(Bucket="stack-backup", Prefix=prefix)
    return [one["Key"] for one in [*found.get("Versions", []), *found.get("DeleteMarkers", [])]]


async def test_a_stack_is_exported_and_imported_into_another(stack, tmp_path):
    given, function = stack("first")
    crud = create_app(given).state.crud
    created = await crud.resource_manager(Article).create(Article(title="Sun", content="It shines.", author="a"))
    await crud.close()
    path = Path(tmp_path, "all.tar.gz")
    result = await stack_backup.export_stack(given.outputs, path)
    exported = [event["model"] for event in function.events if event["crudstack"] == "export"]
    assert exported == list(crud.managers), "one call for each model"
    with verify(path, sha256=result.sha256) as archive:
        assert [model.name for model in archive.manifest.models] == list(crud.managers)
        assert archive.model("article").resources == 1
    assert keys_of("exports/") == []

    other, _ = stack("second")
    await stack_backup.import_stack(other.outputs, path)
    crud = create_app(other).state.crud
    found = await crud.resource_manager(Article).get(created.meta.resource_id)
    assert (found.data.title, found.meta.etag) == ("Sun", created.meta.etag)
    await crud.close()
    assert keys_of("exports/") == []


async def test_the_reason_of_a_refusal_is_told(stack, tmp_path):
    given, _ = stack("third")
    with pytest.raises(ConfigError, match="there is no model 'nothing'"):
        await stack_backup.export_stack(given.outputs, tmp_path / "x.tar.gz", models=["nothing"])
    path = tmp_path / "all.tar.gz"
    await stack_backup.export_stack(given.outputs, path, models=["article"])
    with pytest.raises(stack_backup.BackupFailed, match="was interrupted"):
        await stack_backup.import_stack(given.outputs, path, resume=True)
    assert keys_of("exports/") == []


def test_other_events_are_refused(stack):
    _, function = stack("fourth")
    for event in ({}, {"crudstack": "maintain"}, {"crudstack": "export"}, {"requestContext": {}}):
        with pytest.raises(ValueError):
            function._handler(event, Context())
