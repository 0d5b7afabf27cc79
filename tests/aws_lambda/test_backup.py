"""The function for backups in Lambda's runtime, with a real PostgreSQL and S3."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path

import pytest

from app.autocrud.resource_manager.backends.s3.object_store import s3
from app.autocrud.resource_manager.engine.operations import Create
from app.main import create_app
from app.models import Article
from app.settings import load
from tests.backup.exports import read
from tests.lambda_runtime import Instance
from tests.services import BUCKET

from .instances import settings

pytestmark = pytest.mark.slow


HERE = f"{sys.version_info.major}.{sys.version_info.minor}"
"""The driver of PostgreSQL is not in the zip of the tests. That of the tests is for this version."""


def drivers() -> Path:
    spec = importlib.util.find_spec("psycopg")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent.parent


def environment(ministack_s3, database: str, prefix: str, task) -> dict[str, str]:
    given = settings(ministack_s3, prefix, storage="postgres-s3", region="us-east-1")
    paths = [task.directory, task.client, drivers()]
    return given | {"CRUDSTACK_PG_DSN": database, "PYTHONPATH": os.pathsep.join(map(str, paths))}


@pytest.mark.parametrize("each_task", [HERE], indirect=True)
async def test_a_model_is_exported_and_imported(ministack_s3, database, tmp_path, each_task):
    source = environment(ministack_s3, database, f"{tmp_path.name}-1", each_task)
    target = environment(ministack_s3, database, f"{tmp_path.name}-2", each_task)
    objects = s3(BUCKET, ministack_s3.url, ministack_s3.access_key_id, ministack_s3.secret_access_key, "us-east-1")
    folder = f"_exports/{tmp_path.name}/"
    key, command = f"{folder}a.tar.gz", f"{folder}command"
    await objects.put(command, b"")

    keys = {name: value for name, value in source.items() if name.startswith("AWS_")}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in keys.items():
            patch.setenv(name, value)
        crud = create_app(load({**source, "CRUDSTACK_S3_ENDPOINT_URL": ministack_s3.url})).state.crud
        await crud.resource_manager(Article).batch(
            [Create(Article(f"t{number}", "x", "alice"), f"a{number}") for number in range(3)]
        )
        await crud.close()

    with Instance(each_task, source, tmp_path, handler="app.backup.handler") as instance:
        assert instance.invoke({"crudstack": "models"}, 60) == {"models": ["article", "airport", "user"]}
        asked = {"crudstack": "export", "model": "article", "key": key, "command": command}
        done = instance.invoke(asked, 60)
        assert (done["resources"], done["one_moment"], done["after"]) == (3, True, None)
        again = instance.invoke({**asked, "each_resource": True}, 60)
        assert (again["resources"], again["one_moment"], again["after"]) == (3, False, None)
        told = instance.invoke({**asked, "model": "nothing"}, 60)
        assert told["error"]["detail"] == "there is no model 'nothing'"
    assert await objects.download(key, tmp_path / "a.tar.gz")
    assert list(read(tmp_path / "a.tar.gz", "article").resources) == ["a0", "a1", "a2"]

    with Instance(each_task, target, tmp_path, handler="app.backup.handler") as instance:
        asked = {"crudstack": "import", "key": key, "sha256": again["sha256"]}
        checked = instance.invoke({**asked, "check": True}, 60)
        assert checked["models"]["article"]["created"] == 0
        done = instance.invoke(asked, 60)
        assert (done["models"]["article"]["created"], done["sha256"]) == (3, again["sha256"])
        refused = instance.invoke(asked, 60)
        assert refused["error"]["type"] == "import-conflict"
