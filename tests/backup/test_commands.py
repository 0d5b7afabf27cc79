"""The commands `crudstack export` and `crudstack snapshot`, as programs."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import pty
import re
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import pytest

from app import models
from app.autocrud import AutoCRUD
from app.autocrud.resource_manager.core import ResourceManager
from app.autocrud.resource_manager.engine.operations import Create
from app.autocrud.resource_manager.storage_factory import DiskStorageFactory
from tests.local_server import LocalServer, QuietHandler
from tests.services import BUCKET, S3Server

from .exports import read

PROGRAM = [sys.executable, "-c", "from app.cli import main; main()"]


class Refusing(QuietHandler):
    """An S3 server that knows no key."""

    def do_GET(self) -> None:
        body = b"<Error><Code>InvalidAccessKeyId</Code><Message>no such key</Message></Error>"
        self.send_response(403)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


def environment(data_dir: Path, storage: str = "disk", **more: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("CRUDSTACK_", "AWS_"))}
    return kept | {"CRUDSTACK_STORAGE": storage, "CRUDSTACK_DATA_DIR": str(data_dir)} | more


def run(given: Mapping[str, str], *arguments: object, code: int = 0, **options) -> subprocess.CompletedProcess:
    options = {"text": True} | options
    done = subprocess.run(
        [*PROGRAM, *map(str, arguments)], env=given, capture_output=True, check=False, timeout=60, **options
    )
    assert done.returncode == code, done.stderr
    return done


def disk(data_dir: Path) -> AutoCRUD:
    crud = AutoCRUD(storage_factory=DiskStorageFactory(data_dir))
    models.register(crud)
    return crud


async def filled(data_dir: Path, count: int = 3) -> None:
    crud = disk(data_dir)
    manager: ResourceManager[models.Article] = crud.resource_manager(models.Article)
    for start in range(0, count, 100):
        await manager.batch(
            [
                Create(models.Article("t", "x" * 500, f"author {number}"), f"a{number:06d}")
                for number in range(start, min(start + 100, count))
            ]
        )
    await crud.close()


@pytest.fixture
def data(tmp_path: Path) -> Path:
    asyncio.run(filled(tmp_path / "data"))
    return tmp_path / "data"


def test_an_export_tells_hash_and_models(data: Path, tmp_path: Path):
    path = tmp_path / "x.tar.gz"
    done = run(environment(data), "export", path)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    first, *others = done.stdout.splitlines()
    assert first.startswith(f"{path}: ")
    assert first.endswith(f"SHA-256 {digest}")
    assert others[0] == "article: 3 resources, 3 revisions, 0 files"
    assert done.stderr == ""  # no bar, because it is no terminal
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert list(read(path, "article").resources) == ["a000000", "a000001", "a000002"]
    assert [entry.name for entry in tmp_path.iterdir() if entry.name != "data"] == ["x.tar.gz"]


@pytest.mark.slow
def test_json_and_chosen_models(data: Path, tmp_path: Path):
    path = tmp_path / "x.tar.zst"
    done = run(environment(data), "export", path, "--model", "user", "--model", "article", "--json", "--per-resource")
    told = json.loads(done.stdout)
    assert (told["archive"], told["size"]) == (str(path), path.stat().st_size)
    assert told["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    assert [(model["name"], model["resources"], model["one_moment"]) for model in told["models"]] == [
        ("article", 3, False),
        ("user", 0, False),
    ]


@pytest.mark.slow
def test_stdout_gets_the_archive_and_stderr_the_report(data: Path, tmp_path: Path):
    done = run(environment(data), "export", "-", text=False)
    (tmp_path / "x.tar.gz").write_bytes(done.stdout)
    assert len(read(tmp_path / "x.tar.gz", "article").resources) == 3
    assert b"article: 3 resources" in done.stderr


@pytest.mark.slow
def test_an_existing_file_is_kept_without_force(data: Path, tmp_path: Path):
    path = tmp_path / "x.tar.gz"
    path.write_text("mine")
    done = run(environment(data), "export", path, code=2)
    assert done.stderr == f"crudstack: {path} exists: give another name, or --force to replace it\n"
    assert path.read_text() == "mine"
    run(environment(data), "export", path, "--force")
    assert len(read(path, "article").resources) == 3


@pytest.mark.slow
def test_wrong_arguments_exit_with_2_and_one_sentence(data: Path, tmp_path: Path):
    given = environment(data)
    for arguments, sentence in (
        ((), "parameter --archive requires an argument"),
        (("x.zip",), "expected a name that ends with .tar.gz or .tar.zst"),
        ((tmp_path / "x.tar.gz", "--model", "nope"), "there is no model 'nope'; there are article, airport, user"),
        ((tmp_path / "x.tar.gz", "--storage", "nope"), "--storage is 'nope'"),
        (("--nope",), "'--nope' is no option, and no name of an archive"),
        ((tmp_path / "x.tar.gz", "--nope"), "--nope"),
        (("s3://bucket",), "expected s3://bucket/key"),
        (("s3://key@bucket/x.tar.gz",), "the archive has an @"),
        ((tmp_path / "missing/x.tar.gz",), f"the archive cannot be written to {tmp_path}/missing: No such file"),
    ):
        done = run(given, "export", *arguments, code=2)
        assert sentence in done.stderr
        assert done.stderr.count("\n") == 1
        assert not done.stdout
    done = run(environment(tmp_path / "typo"), "export", tmp_path / "x.tar.gz", code=2)
    assert f"CRUDSTACK_DATA_DIR is '{tmp_path}/typo', and there is no such directory" in done.stderr
    assert not (tmp_path / "x.tar.gz").exists()
    assert not (tmp_path / "typo").exists()
    done = run(given, "export", "-", code=2, preexec_fn=lambda: os.close(1))
    assert done.stderr == "crudstack: stdout is closed: give the name of a file, or redirect stdout\n"
    done = run(environment(data, "memory"), "export", tmp_path / "x.tar.gz", code=2)
    assert "is in the memory of the running server: export it with `curl" in done.stderr


@pytest.mark.slow
def test_failures_exit_with_1_and_one_sentence(data: Path, tmp_path: Path):
    (data / "article/data/bodies.sqlite").write_bytes(b"no database" * 1000)
    done = run(environment(data), "export", tmp_path / "x.tar.gz", code=1)
    assert "crudstack: the database file is damaged; restore it from a copy" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "x.tar.gz").exists()


@pytest.mark.slow
def test_help_tells_the_exit_codes():
    done = run(environment(Path()), "export", "--help")
    assert "exit code is 0 if" in done.stdout
    assert "and 2 if an argument or a setting is wrong" in done.stdout
    assert "exit code is 0 if" in run(environment(Path()), "snapshot", "--help").stdout


@pytest.mark.slow
def test_a_terminal_shows_a_bar_and_refuses_an_archive(tmp_path: Path):
    asyncio.run(filled(tmp_path / "data", 2000))
    main, terminal = pty.openpty()
    process = subprocess.Popen(
        [*PROGRAM, "export", tmp_path / "x.tar.gz"],
        env=environment(tmp_path / "data", COLUMNS="100"),
        stdout=subprocess.PIPE,
        stderr=terminal,
        text=True,
    )
    out, _ = process.communicate(timeout=60)
    shown = os.read(main, 100_000).decode()
    assert process.returncode == 0
    assert "article: 2000 resources" in out
    assert re.search(r"article \[#+\.*\] [\d,]+ of 2,000", shown)
    assert shown.endswith("\r\x1b[K")
    done = subprocess.run(
        [*PROGRAM, "export", "-"],
        env=environment(tmp_path / "data"),
        stdout=terminal,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (
        2,
        "crudstack: stdout is a terminal: redirect it to a file, or give the name of a file\n",
    )
    os.close(main)
    os.close(terminal)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_an_export_that_is_stopped_leaves_nothing(tmp_path: Path, number: signal.Signals):
    asyncio.run(filled(tmp_path / "data", 20_000))
    (tmp_path / "out").mkdir()
    process = subprocess.Popen(
        [*PROGRAM, "export", tmp_path / "out/x.tar.gz"],
        env=environment(tmp_path / "data"),
        stderr=subprocess.PIPE,
        text=True,
    )
    wait_for(lambda: list((tmp_path / "out").iterdir()))
    process.send_signal(number)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130, said
    assert said == "crudstack: stopped\n"
    assert not list((tmp_path / "out").iterdir())
    assert not asyncio.run(has_pins(tmp_path / "data"))


async def has_pins(data_dir: Path) -> bool:
    crud = disk(data_dir)
    found = await crud.resource_manager(models.Article).storage.meta_store.has_pins()
    await crud.close()
    return found


def wait_for(condition) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


@pytest.mark.slow
def test_an_export_that_is_killed_leaves_no_half_archive_and_its_pin_lapses(tmp_path: Path, monkeypatch):
    asyncio.run(filled(tmp_path / "data", 20_000))
    (tmp_path / "out").mkdir()
    killed = 0
    for at in range(10):
        path = tmp_path / f"out/{at}.tar.gz"
        process = subprocess.Popen([*PROGRAM, "export", path], env=environment(tmp_path / "data"))
        wait_for(lambda: process.poll() is not None or list((tmp_path / "out").iterdir()))  # noqa: B023
        time.sleep(at * 0.07)
        process.kill()
        killed += process.wait() == -signal.SIGKILL
        if path.exists():  # W1: then it is complete
            assert len(read(path, "article").resources) == 20_000
        for left in (tmp_path / "out").iterdir():
            left.unlink()
    assert killed > 3
    run(environment(tmp_path / "data"), "export", tmp_path / "out/x.tar.gz")
    from app.autocrud.resource_manager.contract import snapshots

    monkeypatch.setattr(snapshots, "PIN_LIFE_S", 0.0)
    assert not asyncio.run(has_pins(tmp_path / "data"))


# S3


@pytest.fixture
def s3(ministack_s3: S3Server, tmp_path: Path) -> dict[str, str]:
    return environment(
        tmp_path / "data",
        CRUDSTACK_S3_ENDPOINT_URL=ministack_s3.url,
        AWS_ACCESS_KEY_ID=ministack_s3.access_key_id,
        AWS_SECRET_ACCESS_KEY=ministack_s3.secret_access_key,
    )


@pytest.mark.slow
@pytest.mark.usefixtures("data")
def test_an_export_to_s3(s3: dict[str, str], tmp_path: Path):
    url = f"s3://{BUCKET}/{tmp_path.name} exports/x.tar.gz"
    told = json.loads(run(s3, "export", url, "--json").stdout)
    done = run(s3, "export", url, code=2)
    assert "exists: give another name, or --force" in done.stderr
    again = json.loads(run(s3, "export", url, "--json", "--force").stdout)
    assert told["models"] == again["models"]


WRONG = {
    "bucket": ({"CRUDSTACK_BUCKET": "nosuchbucket"}, "there is no bucket 'nosuchbucket': create it, or correct "),
    "no keys": ({"AWS_ACCESS_KEY_ID": "", "AWS_SECRET_ACCESS_KEY": ""}, "no AWS credentials found: AWS_ACCESS_KEY_ID "),
}


@pytest.mark.slow
@pytest.mark.usefixtures("data")
@pytest.mark.parametrize(("wrong", "sentence"), WRONG.values(), ids=WRONG)
def test_a_bucket_or_keys_that_are_wrong_are_named(s3: dict[str, str], tmp_path: Path, postgres: str, wrong, sentence):
    """An empty model needs no request to S3. Its export tells it too, because an archive of nothing is no backup."""
    run(s3, "export", tmp_path / "good.tar.gz")
    given = {name: value for name, value in (s3 | {"AWS_EC2_METADATA_DISABLED": "true"} | wrong).items() if value}
    given |= {"HOME": str(tmp_path)}
    pg = {"CRUDSTACK_STORAGE": "postgres-s3", "CRUDSTACK_PG_DSN": postgres, "CRUDSTACK_PREFIX": tmp_path.name}
    told = []
    for models_in, more in (
        ("postgres", pg | {"CRUDSTACK_BUCKET": BUCKET}),
        ("s3", {"CRUDSTACK_STORAGE": "s3-sqlite"}),
    ):
        given_here = given | more | {name: value for name, value in wrong.items() if value}
        given_here.setdefault("CRUDSTACK_BUCKET", BUCKET)
        told.append(run(given_here, "export", tmp_path / f"{models_in}.tar.gz", code=2))
        told.append(run(given_here, "import", tmp_path / "good.tar.gz", code=2))
    url = f"s3://{wrong.get('CRUDSTACK_BUCKET', BUCKET)}/x.tar.gz"
    told += [run(given, "export", url, code=2), run(given, "import", url, code=2)]
    for done in told:
        assert done.stderr.startswith(f"crudstack: {sentence}")
        assert done.stderr.count("\n") == 1
    assert not list(tmp_path.glob("*s3.tar.gz"))


@pytest.mark.slow
def test_keys_that_the_server_refuses_and_a_server_that_does_not_answer_are_told(data: Path, tmp_path: Path):
    keys = dict.fromkeys(("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"), "key")
    given = environment(data, "s3-sqlite", CRUDSTACK_BUCKET=BUCKET, **keys)
    with LocalServer(Refusing) as server:
        more = {"CRUDSTACK_S3_ENDPOINT_URL": server.url}
        done = run(given | more, "export", tmp_path / "x.tar.gz", code=2)
    assert done.stderr.startswith(f"crudstack: the credentials for the bucket {BUCKET!r} are refused (GET ")
    assert "403 Forbidden, InvalidAccessKeyId: no such key): correct AWS_ACCESS_KEY_ID" in done.stderr
    done = run(given | {"CRUDSTACK_S3_ENDPOINT_URL": server.url}, "export", tmp_path / "x.tar.gz", code=1)
    assert "the object storage cannot be used right now (GET " in done.stderr
    assert done.stderr.count("\n") == 1


# Snapshots of the data directory


@pytest.mark.slow
def test_a_snapshot_of_the_data_directory(data: Path, tmp_path: Path):
    done = run(environment(data), "snapshot", tmp_path / "copy")
    assert "article: 3 resources, 0 files" in done.stdout.splitlines()
    crud = disk(tmp_path / "copy")
    assert asyncio.run(crud.resource_manager(models.Article).count()) == 3
    asyncio.run(crud.close())
    done = run(environment(data), "snapshot", tmp_path / "copy", code=2)
    assert done.stderr == f"crudstack: {tmp_path}/copy exists: expected the name of a new directory\n"
    (tmp_path / "link").symlink_to(data)
    for inside in (data / "in", data / "article/in", tmp_path / "link/in"):
        done = run(environment(data), "snapshot", inside, code=2)
        assert f"{inside} is inside of the data directory {data}: expected a directory outside of it" in done.stderr
        assert not inside.exists()
    told = json.loads(run(environment(data), "snapshot", tmp_path / "other", "--json").stdout)
    assert told == {
        "directory": str(tmp_path / "other"),
        "models": [{"name": "article", "resources": 3, "files": 0, "purged": [], "damaged": []}],
    }


@pytest.mark.slow
def test_a_snapshot_of_a_store_elsewhere_is_refused(data: Path, tmp_path: Path):
    given = environment(data, '{"meta": "postgres", "resource": "disk"}', CRUDSTACK_PG_DSN="postgresql://x@y/z")
    done = run(given, "snapshot", tmp_path / "copy", code=2)
    assert "with metadata in 'postgres' and bodies in 'disk'; expected the kinds disk and memory-disk" in done.stderr
    done = run({k: v for k, v in environment(data).items() if k != "CRUDSTACK_DATA_DIR"}, "snapshot", "x", code=2)
    assert "CRUDSTACK_DATA_DIR is not set" in done.stderr
