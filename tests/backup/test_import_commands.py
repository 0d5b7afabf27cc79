"""The command `crudstack import`, as a program."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import subprocess
from pathlib import Path

import httpx
import pytest
from msgspec import Struct

from app import models
from app.autocrud import AutoCRUD
from app.autocrud.resource_manager.storage_factory import DiskStorageFactory
from tests.services import BUCKET, S3Server

from .test_commands import PROGRAM, disk, environment, filled, run

pytestmark = pytest.mark.slow


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    asyncio.run(filled(tmp_path / "data"))
    run(environment(tmp_path / "data"), "export", tmp_path / "x.tar.gz")
    return tmp_path / "x.tar.gz"


async def ids(data_dir: Path) -> list[str]:
    crud = disk(data_dir)
    found = [meta.resource_id async for meta in crud.resource_manager(models.Article).storage.scan()]
    await crud.close()
    return found


def test_an_archive_is_imported_and_told(archive: Path, tmp_path: Path):
    given = environment(tmp_path / "other")
    digest = hashlib.sha256(archive.read_bytes()).hexdigest()
    done = run(given, "import", archive, "--sha256", digest)
    assert f"SHA-256 {digest}" in done.stdout
    assert "article: 3 created" in done.stdout.splitlines()
    assert done.stderr == ""
    assert asyncio.run(ids(tmp_path / "other")) == ["a000000", "a000001", "a000002"]
    done = run(given, "import", archive, code=1)
    assert done.stderr.startswith("crudstack: ")
    assert done.stderr.count("\n") == 1
    told = json.loads(run(given, "import", archive, "--on-conflict", "replace", "--json", "--model", "article").stdout)
    assert told["sha256"] == digest
    assert told["models"]["article"]["replaced"] == 3
    assert list(told["models"]) == ["article"]


def test_the_exit_code_tells_that_resources_were_left_out(tmp_path: Path):
    async def store(data_dir: Path, resource_id: str) -> None:
        crud = disk(data_dir)
        user = models.User("alice", "alice@example.org")
        await crud.resource_manager(models.User).create(user, resource_id=resource_id)
        await crud.close()

    asyncio.run(store(tmp_path / "data", "a"))
    asyncio.run(store(tmp_path / "other", "b"))
    run(environment(tmp_path / "data"), "export", tmp_path / "x.tar.gz")
    given = environment(tmp_path / "other")
    for on_conflict, more in (("skip", ()), ("replace", ()), ("skip", ("--json",))):
        done = run(given, "import", tmp_path / "x.tar.gz", "--on-conflict", on_conflict, *more, code=1)
        assert done.stderr == (
            "crudstack: resources of 'user' were left out, because other resources have their unique values:"
            " 1 for the value of email\n"
        )
        if more:
            assert json.loads(done.stdout)["models"]["user"]["unique_conflicts"] == {"email": 1}
        else:
            assert "user: 1 left out for the value of email" in done.stdout.splitlines()
        done = run(given, "import", tmp_path / "x.tar.gz", "--on-conflict", on_conflict, "--check", code=1)
        assert done.stderr == (
            "crudstack: resources of 'user' would be left out, because other resources have their unique values:"
            " 1 for the value of email\n"
        )
        assert "user: 1 resources, 1 revisions, 1 left out for the value of email" in done.stdout.splitlines()
    run(environment(tmp_path / "data"), "import", tmp_path / "x.tar.gz", "--on-conflict", "skip")


class Old(Struct):
    """Articles of an earlier program."""

    title: str


def test_bodies_that_do_not_fit_are_told_before_anything_is_changed(tmp_path: Path):
    async def old() -> None:
        crud = AutoCRUD(storage_factory=DiskStorageFactory(tmp_path / "data"))
        crud.add_model(Old, name="article")
        await crud.resource_manager(Old).create(Old("t"), resource_id="a1")
        await crud.close()

    asyncio.run(old())
    asyncio.run(filled(tmp_path / "data"))
    path = tmp_path / "x.tar.gz"
    run(environment(tmp_path / "data"), "export", path, "--model", "article")
    said = "1 of 4 bodies of 'article' does not fit today's model, and is kept as it is\n"
    given = environment(tmp_path / "other")
    done = run(given, "import", path, "--check")
    assert (done.stderr, done.stdout.splitlines()[1:]) == (said, ["article: 4 resources, 4 revisions"])
    assert asyncio.run(ids(tmp_path / "other")) == []
    done = run(given, "import", path)
    assert done.stderr == said
    assert "article: 4 created, 1 bodies that do not fit the model" in done.stdout.splitlines()
    done = run(given, "import", path, "--check", code=1)
    assert "4 resources of the archive have ids that the model has already" in done.stderr


def test_stdin(archive: Path, tmp_path: Path):
    with archive.open("rb") as file:
        done = subprocess.run(
            [*PROGRAM, "import", "-"],
            env=environment(tmp_path / "other"),
            stdin=file,
            capture_output=True,
            text=True,
            check=False,
        )
    assert done.returncode == 0, done.stderr
    assert "article: 3 created" in done.stdout


def test_a_pipe(archive: Path, tmp_path: Path):
    """Such as `crudstack import <(ssh host cat backup.tar.gz)`."""
    os.mkfifo(tmp_path / "pipe")
    with subprocess.Popen(["cp", archive, tmp_path / "pipe"]) as writer:
        assert "article: 3 created" in run(environment(tmp_path / "other"), "import", tmp_path / "pipe").stdout
        assert writer.wait(60) == 0


def test_refusals_exit_with_1_or_2_and_one_sentence(archive: Path, tmp_path: Path):
    given = environment(tmp_path / "other")
    cut = tmp_path / "cut.tar.gz"
    cut.write_bytes(archive.read_bytes()[:-20])
    no_archive = tmp_path / "none.tar.gz"
    no_archive.write_text("no archive")
    for code, arguments in (
        (1, (archive, "--sha256", "0" * 64)),
        (1, (archive, "--max-bytes", "100")),
        (1, (cut,)),
        (1, (no_archive,)),
        (1, (archive, "--resume")),
        (1, (archive, "--abort")),
        (2, (archive, "--model", "nope")),
        (2, (archive, "--resume", "--abort")),
        (2, (archive, "--resume", "--check")),
        (2, (archive, "--on-conflict", "nope")),
        (2, (archive, "--max-bytes", "0")),
        (2, (tmp_path / "missing.tar.gz",)),
        (2, (tmp_path,)),
    ):
        done = run(given, "import", *arguments, code=code)
        assert done.stderr.startswith("crudstack: "), done.stderr
        assert done.stderr.count("\n") == 1, done.stderr
    assert asyncio.run(ids(tmp_path / "other")) == []
    done = run(given, "import", "-", code=2, preexec_fn=lambda: os.close(0))
    assert done.stderr == "crudstack: stdin is closed: give the name of a file, or redirect stdin\n"
    done = run(environment(tmp_path, "memory"), "import", archive, code=2)
    assert "is in the memory of the running server" in done.stderr


def test_an_archive_on_s3(ministack_s3: S3Server, tmp_path: Path):
    asyncio.run(filled(tmp_path / "data"))
    s3 = {
        "CRUDSTACK_S3_ENDPOINT_URL": ministack_s3.url,
        "AWS_ACCESS_KEY_ID": ministack_s3.access_key_id,
        "AWS_SECRET_ACCESS_KEY": ministack_s3.secret_access_key,
    }
    url = f"s3://{BUCKET}/{tmp_path.name}/x.tar.gz"
    told = json.loads(run(environment(tmp_path / "data", **s3), "export", url, "--json").stdout)
    done = run(environment(tmp_path / "other", **s3), "import", url, "--sha256", told["sha256"])
    assert "article: 3 created" in done.stdout
    done = run(environment(tmp_path / "other", **s3), "import", f"{url}.missing", code=2)
    assert "there is no object s3://" in done.stderr


@pytest.mark.parametrize("runs", [False, True], ids=["no server", "server"])
def test_metadata_in_redis_are_exported_and_imported_by_the_commands(serve, valkey: str, tmp_path: Path, runs: bool):
    """Redis is not called durable, but every process can read it."""
    kind = '{"meta": "redis", "resource": "disk"}'

    def given(name: str) -> dict[str, str]:
        more = {"CRUDSTACK_REDIS_URL": valkey, "CRUDSTACK_PREFIX": f"{tmp_path.name}-{runs}-{name}-"}
        return environment(tmp_path / name, kind, **more)

    (tmp_path / "a").mkdir()
    server = serve(kind, tmp_path / "a", environment=given("a"))
    article = {"title": "Sun", "content": "", "author": "a"}
    httpx.put(f"{server.url}/article/a", json=article, headers={"if-none-match": "*"}).raise_for_status()
    if runs:
        answer = httpx.get(f"{server.url}/export")
        assert (answer.status_code, answer.json()["type"]) == (409, "urn:crudstack:stored-elsewhere")
    else:
        server.stop()
    done = run(given("a"), "export", tmp_path / "x.tar.gz")
    assert "article: 1 resources, 1 revisions, 0 files; each resource as at some moment" in done.stdout
    assert "article: 1 created" in run(given("b"), "import", tmp_path / "x.tar.gz").stdout
    done = run(given("a"), "import", tmp_path / "x.tar.gz", "--on-conflict", "replace")
    assert "article: 1 replaced" in done.stdout
    if runs:
        assert httpx.get(f"{server.url}/article/a").json()["meta"]["version"] == 2


def test_the_s3_server_of_make_run_is_used_whether_it_runs_or_not(serve, tmp_path: Path):
    given = environment(tmp_path / "data", "s3-sqlite", CRUDSTACK_BUCKET=BUCKET)
    server = serve("s3-sqlite", tmp_path / "data", "--local-s3", "--make-bucket")
    article = {"title": "Sun", "content": "", "author": "a"}
    httpx.put(f"{server.url}/article/a", json=article, headers={"if-none-match": "*"}).raise_for_status()
    done = run(given, "export", tmp_path / "x.tar.gz", "--local-s3", "--model", "article")
    assert "article: 1 resources, 1 revisions, 0 files" in done.stdout
    server.stop()
    done = run(given, "import", tmp_path / "x.tar.gz", "--local-s3", "--on-conflict", "replace")
    assert "article: 1 replaced" in done.stdout
    done = run(given | {"CRUDSTACK_DATA_DIR": ""}, "export", tmp_path / "y.tar.gz", "--local-s3", code=2)
    assert done.stderr == "crudstack: CRUDSTACK_DATA_DIR is not set: --local-s3 keeps its data in that directory\n"
