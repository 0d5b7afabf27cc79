"""`crudstack export` and `import` with `--stack`, as programs: pulumi and Lambda are stand-ins, the rest is real."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import pty
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from app.autocrud.resource_manager.engine.operations import Create
from app.autocrud.secret import Secret
from app.main import create_app
from app.models import Article
from tests.stack_double import Lambda, LambdaServer, Stacks
from tests.test_stack_commands import PULUMI

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent
PROGRAM = [sys.executable, "-c", "from app.cli import main; main()"]


class User:
    """A user of a stack: a directory with the stand-in for pulumi, and an environment."""

    def __init__(self, directory: Path, environment: dict[str, str]) -> None:
        self.directory = directory
        program = directory / "pulumi"
        program.write_text(PULUMI.format(python=sys.executable))
        program.chmod(0o755)
        (directory / "Pulumi.yaml").write_text("name: crudstack\n")
        self.environment = {"PATH": str(directory), "TMPDIR": str(directory), "PYTHONPATH": str(ROOT), **environment}

    def run(self, *arguments: object, code: int = 0, **more: Any) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            [*PROGRAM, *map(str, arguments), "--stack", "dev"],
            cwd=self.directory,
            env=self.environment,
            capture_output="stderr" not in more,
            text=True,
            check=False,
            timeout=60,
            **more,
        )
        assert done.returncode == code, (done.stdout, done.stderr)
        return done


@pytest.fixture
def stacks(ministack_s3, monkeypatch):
    made = Stacks(ministack_s3, monkeypatch)
    yield made
    made.close()


@pytest.fixture
def function(stacks, database) -> Lambda:
    """Return the function of a stack with three articles in PostgreSQL."""
    _, function = stacks.make("commands", "postgres-s3", pg_dsn=Secret(database))

    async def fill() -> None:
        crud = create_app(function.settings).state.crud
        await crud.resource_manager(Article).batch(
            [Create(Article(f"t{number}", "x", "alice"), f"a{number}") for number in range(3)]
        )
        await crud.close()

    asyncio.run(fill())
    return function


@pytest.fixture
def user(stacks, function, tmp_path):
    made = User(tmp_path, stacks.environment)
    with LambdaServer(function) as server:
        made.environment["AWS_ENDPOINT_URL_LAMBDA"] = server.url
        (tmp_path / "outputs.json").write_text(json.dumps(stacks.outputs("commands", "postgres-s3")))
        yield made


def test_a_stack_is_exported_and_imported(user, function, stacks):
    path = user.directory / "x.tar.gz"
    done = user.run("export", path)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    first, *models = done.stdout.splitlines()
    assert (first, done.stderr) == (f"{path}: 0.0 MB, SHA-256 {digest}", "")
    assert models[0] == "article: 3 resources, 3 revisions, 0 files"
    assert path.stat().st_mode & 0o777 == 0o600
    assert "exists: give another name" in user.run("export", path, code=2).stderr

    checked = user.run("import", path, "--on-conflict", "skip", "--check")
    assert "article: 3 resources, 3 revisions" in checked.stdout.splitlines()
    refused = user.run("import", path, "--model", "article", code=1)
    assert refused.stderr.startswith("crudstack: 3 resources of the archive have ids that the model has already")
    assert refused.stderr.count("\n") == 1
    told = json.loads(user.run("import", path, "--on-conflict", "replace", "--sha256", digest, "--json").stdout)
    assert (told["sha256"], told["models"]["article"]["replaced"]) == (digest, 3)
    assert {event["crudstack"] for event in function.events} == {"models", "export", "import"}
    assert stacks.keys() == []


def test_the_archive_goes_to_stdout_and_comes_from_stdin(user):
    told = json.loads(user.run("export", "x.tar.zst", "--per-resource", "--model", "article", "--json").stdout)
    assert [(model["name"], model["resources"], model["one_moment"]) for model in told["models"]] == [
        ("article", 3, False)
    ]
    refused = user.run("import", "x.tar.zst", code=2)
    assert "convert this one by `zstd -dc ARCHIVE | gzip -n > backup.tar.gz`" in refused.stderr
    with (user.directory / "y.tar.gz").open("wb") as file:
        user.run("export", "-", stdout=file, stderr=subprocess.PIPE)
    with (user.directory / "y.tar.gz").open("rb") as file:
        done = user.run("import", "-", "--on-conflict", "skip", stdin=file)
    assert "article: 3 skipped" in done.stdout.splitlines()


def test_refusals_are_one_sentence(user, function, stacks):
    done = user.run("export", "x.tar.gz", "--model", "nothing", code=2)
    assert done.stderr == "crudstack: there is no model 'nothing'; there are article, airport, user\n"
    function.seconds = 0.0
    done = user.run("export", "x.tar.gz", code=1)
    assert done.stderr.startswith(
        "crudstack: the export of 'article' takes longer than the 0 seconds that the function"
    )
    assert done.stderr.endswith("use --per-resource, or export from a machine that reaches the database\n")
    (user.directory / "damaged.tar.gz").write_bytes(b"x" * 100)
    done = user.run("import", "damaged.tar.gz", code=1)
    assert done.stderr.count("\n") == 1
    (user.directory / "outputs.json").write_text(json.dumps(stacks.outputs("elsewhere", "postgres-s3")))
    done = user.run("export", "x.tar.gz", code=1)
    assert done.stderr.startswith("crudstack: the function backup-elsewhere cannot be called: ")
    assert done.stderr.count("\n") == 1
    assert [entry.name for entry in user.directory.iterdir() if "x.tar" in entry.name] == []
    assert stacks.keys() == []


def test_a_bar_shows_the_progress_on_a_terminal(user):
    terminal, stderr = pty.openpty()
    try:
        user.run("export", "x.tar.gz", stdout=subprocess.PIPE, stderr=stderr)
        os.close(stderr)
        said = os.read(terminal, 100_000).decode()
    finally:
        os.close(terminal)
    assert "models, now airport [######..............] 1 of 3" in said
    assert "article: 3" in said


def test_ctrl_c_ends_the_command_at_once_and_leaves_nothing(user, function, stacks):
    """The function goes on. It then finds that the command has ended, and uploads nothing."""
    call, waiting, released, answers = function.call, threading.Event(), threading.Event(), []

    def late(event: dict[str, Any]) -> bytes:
        if event["crudstack"] == "export":
            waiting.set()
            released.wait(60)
        answers.append(call(event))
        return answers[-1]

    function.call = late
    running = subprocess.Popen(
        [*PROGRAM, "export", "x.tar.gz", "--stack", "dev"],
        cwd=user.directory,
        env=user.environment,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert waiting.wait(60)
        assert len(stacks.keys()) == 1, "the object that tells the function that the command waits"
        running.send_signal(signal.SIGINT)
        _, said = running.communicate(timeout=60)
    finally:
        released.set()
        running.kill()
        running.wait()
    assert (running.returncode, said) == (130, "crudstack: stopped\n")
    assert [entry.name for entry in user.directory.iterdir() if "x.tar" in entry.name] == []
    while len(answers) < 2:
        time.sleep(0.01)
    assert b"the command that asked for this export has ended" in answers[1]
    assert stacks.keys() == []
