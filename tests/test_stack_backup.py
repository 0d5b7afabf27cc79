"""Export and import of a stack through its function for backups: the handler and the bucket are real, Lambda is not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from app import stack_backup
from app.autocrud.backup.archive_reader import verify
from app.autocrud.errors import ConfigError, InvalidData
from app.main import create_app
from app.models import Article
from tests.stack_double import Context, Stacks


@pytest.fixture
def stacks(ministack_s3, monkeypatch):
    made = Stacks(ministack_s3, monkeypatch)
    yield made
    made.close()


async def test_a_stack_is_exported_and_imported_into_another(stacks, tmp_path):
    given, function = stacks.make("first")
    crud = create_app(given).state.crud
    created = await crud.resource_manager(Article).create(Article(title="Sun", content="It shines.", author="a"))
    await crud.close()
    path = Path(tmp_path, "all.tar.gz")
    result = await stack_backup.export_stack(given, path)
    exported = [event["model"] for event in function.events if event["crudstack"] == "export"]
    assert exported == list(crud.managers), "one call for each model"
    with verify(path, sha256=result.sha256) as archive:
        assert [model.name for model in archive.manifest.models] == list(crud.managers)
        assert archive.model("article").resources == 1
    assert [(model.name, model.resources) for model in result.models if model.resources] == [("article", 1)]
    assert stacks.keys() == []

    other, _ = stacks.make("second")
    imported = await stack_backup.import_stack(other, path)
    assert (imported.sha256, imported.models["article"].created) == (result.sha256, 1)
    crud = create_app(other).state.crud
    found = await crud.resource_manager(Article).get(created.meta.resource_id)
    assert (found.data.title, found.meta.etag) == ("Sun", created.meta.etag)
    await crud.close()
    assert stacks.keys() == []


async def test_the_reason_of_a_refusal_is_told(stacks, tmp_path):
    given, _ = stacks.make("third")
    with pytest.raises(ConfigError, match="there is no model 'nothing'"):
        await stack_backup.export_stack(given, tmp_path / "x.tar.gz", models=["nothing"])
    path = tmp_path / "all.tar.gz"
    await stack_backup.export_stack(given, path, models=["article"])
    with pytest.raises(stack_backup.BackupFailed, match="there is no unfinished import"):
        await stack_backup.import_stack(given, path, resume=True)
    with pytest.raises(InvalidData, match="there is no model 'nothing'"):
        await stack_backup.import_stack(given, path, models=["nothing"])
    assert stacks.keys() == []


def test_nothing_is_uploaded_for_a_command_that_has_ended(stacks):
    _, function = stacks.make("fifth")
    event = {"crudstack": "export", "model": "article", "key": "_exports/x/a.tar.gz", "command": "_exports/x/command"}
    assert b"the command that asked for this export has ended" in function.call(event)
    assert stacks.keys("_exports/x/") == []


def test_an_import_that_has_not_begun_cannot_be_continued(stacks):
    _, function = stacks.make("seventh")
    function.seconds = 0.0
    error = json.loads(function.call({"crudstack": "import", "key": "_exports/x/archive"}))["error"]
    assert (error["type"], error["states"]) == ("not-enough-time", {})
    assert error["detail"].endswith(" may run: import from a machine that reaches the database")


def test_other_events_are_refused(stacks):
    _, function = stacks.make("fourth")
    for event in ({}, {"crudstack": "maintain"}, {"crudstack": "export"}, {"requestContext": {}}):
        with pytest.raises(ValueError):
            function.handler(event, Context())
