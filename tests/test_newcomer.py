"""A new user's path to AWS: each shell line of README and docs/deploy.md, in a new shell, up to a served request.

Lines that install programs are compared as text. Here, `pulumi` is tests/fake_pulumi.py. tests/engine/test_newcomer.py
takes the same path with the real CLI.
"""

from __future__ import annotations

import hashlib
import json
import os
import pty
import re
import select
import shutil
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import boto3
import pytest

from infra import artifact
from infra.artifact import ROOT
from tests.engine.checkout import copy_project
from tests.fake_pulumi import FakePulumi

TOKEN = "the token of the tests"  # noqa: S105
INSTALLS = ["curl -fsSL https://get.pulumi.com | sh", "make setup-infra"]
"""Lines that download programs."""
REGION = "eu-central-1"
README, DEPLOY = "README.md", "docs/deploy.md"
PATHS = {
    "README": [(README, "Deploy")],
    "deploy.md": [(DEPLOY, "Before you start"), (DEPLOY, "Deploy step by step")],
    "make deploy": [(DEPLOY, "Before you start"), (DEPLOY, "Deploy with one command")],
    "both": [(DEPLOY, "Before you start"), (DEPLOY, "Deploy step by step"), (DEPLOY, "Deploy with one command")],
}
"""The sections that a user reads and pastes, by page and heading."""


def lines_of(path: str) -> list[str]:
    """Return the lines of all shell blocks of a path, in their order."""
    lines: list[str] = []
    for page, heading in PATHS[path]:
        section = (ROOT / page).read_text().split(f"\n## {heading}\n")[1].split("\n## ")[0]
        for block in re.findall(r"```sh\n(.*?)```", section, re.DOTALL):
            lines += block.splitlines()
    return lines


class Shell:
    """A new bash on its own terminal. Its environment is `environment` only."""

    def __init__(self, directory: Path, environment: dict[str, str]) -> None:
        self._terminal, side = pty.openpty()
        settings = termios.tcgetattr(side)
        settings[3] &= ~termios.ECHO
        termios.tcsetattr(side, termios.TCSANOW, settings)
        command = ["bash", "--noprofile", "--norc", "--noediting", "-i"]
        self._process = subprocess.Popen(
            command,
            cwd=directory,
            env={**environment, "PS1": "", "PS2": "", "TERM": "dumb"},
            stdin=side,
            stdout=side,
            stderr=side,
            start_new_session=True,
        )
        os.close(side)

    def type(self, line: str, *, limit_s: float = 240) -> str:
        """Run a line, answer questions with yes, and return its output. Raises AssertionError if it fails."""
        # The end is marked in the same line, because a second line could be read as the answer to a question.
        os.write(self._terminal, f"{line}; printf '\\n=== %s ===\\n' $?\n".encode())
        shown, end = "", time.monotonic() + limit_s
        while not (marked := re.search(r"(.*)\n=== (\d+) ===\n", shown, re.DOTALL)):
            assert time.monotonic() < end, f"{line} does not end:\n{shown}"
            if select.select([self._terminal], [], [], 0.1)[0]:
                shown += os.read(self._terminal, 4096).decode().replace("\r", "")
                if re.search(r"\[[yY]/[nN]\] $", shown):
                    os.write(self._terminal, b"y\n")
                    shown += "\n"
        assert marked[2] == "0", f"{line} ended with {marked[2]}:\n{shown}"
        return marked[1].strip()

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        os.close(self._terminal)


class Clone:
    """The machine of a new user after `git clone`, `aws configure` and the lines that install programs."""

    def __init__(self, directory: Path, programs: Path, aws: str, *, copy: Path | None = None) -> None:
        self.directory = copy or directory / "clone"
        if copy is None:
            copy_project(self.directory)
        self._fill_venv()
        home = directory / "home"
        (home / ".aws").mkdir(parents=True)
        (home / ".aws/config").write_text(f"[default]\nregion = {REGION}\n")
        (home / ".aws/credentials").write_text("[default]\naws_access_key_id = a\naws_secret_access_key = b\n")
        # Lambda's Python is found as outside this test.
        python = artifact.interpreter(artifact.LAMBDA.python).parent
        self.environment = {
            "HOME": str(home),
            "PATH": os.pathsep.join([str(programs), "/usr/local/bin", "/usr/bin", "/bin", str(python)]),
            "LANG": "C.UTF-8",
            # This answers yes, as the user would.
            "PULUMI_SKIP_CONFIRMATIONS": "true",
            "PULUMI_SKIP_UPDATE_CHECK": "true",
            # This is the stand-in for AWS.
            "AWS_ENDPOINT_URL": aws,
            "AWS_EC2_METADATA_DISABLED": "true",
        }

    def _fill_venv(self) -> None:
        """Write the files of `make setup-infra`, as scripts that run the tests' own interpreter on this clone."""
        venv = self.directory / ".venv"
        if venv.is_symlink():
            venv.unlink()
        (venv / "bin").mkdir(parents=True)
        run = f'#!/bin/sh\nPYTHONPATH="{self.directory}" exec "{sys.executable}"'
        scripts = {"python": f'{run} "$@"\n', "crudstack": f"{run} -c 'from app.cli import main; main()' \"$@\"\n"}
        for name, text in scripts.items():
            (venv / "bin" / name).write_text(text)
            (venv / "bin" / name).chmod(0o755)
        for stamp in (".venv", ".local", ".infra"):  # in the order in which make compares them
            (venv / stamp).write_text(f"{venv.resolve()}\n")


def walk(clone: Clone, path: str, after: Callable[[str], None] = lambda _line: None) -> str:
    """Paste the lines of a path into a new shell, and return the output of the last one.

    after    is called with each line after it has run
    """
    with shell(clone) as typed:
        shown = ""
        for line in lines_of(path):
            if line not in INSTALLS:
                shown = typed.type(line)
                after(line)
        if line.startswith("make deploy"):  # it prints the line to continue with
            shown = typed.type(shown.splitlines()[-1])
    return shown


@contextmanager
def shell(clone: Clone) -> Iterator[Shell]:
    typed = Shell(clone.directory, clone.environment)
    try:
        yield typed
    finally:
        typed.close()


def keep_token(aws: str, bucket: str, token: str) -> None:
    """Put the stack's API token into Secrets Manager."""
    client = boto3.client(
        "secretsmanager",
        endpoint_url=aws,
        region_name=REGION,
        aws_access_key_id="a",
        aws_secret_access_key="b",  # noqa: S106
    )
    client.create_secret(Name=f"{bucket}/api-token", SecretString=token)


def assert_served(path: str, shown: str) -> None:
    """Check that the last line printed the answer that the page shows."""
    if path in ("README", "deploy.md"):
        expected = '{"items":[],"next_cursor":null}'
        assert f"prints `{expected}`" in (ROOT / DEPLOY).read_text()
        assert shown == expected
    else:
        assert json.loads(shown)["status"] == "ready"


@pytest.fixture
def outputs(tmp_path, serve, ministack_s3) -> dict[str, Any]:
    """Return the outputs of a stack whose API is a server on this machine, with its token in Secrets Manager."""
    auth = {"mode": "token", "token_sha256": hashlib.sha256(TOKEN.encode()).hexdigest()}
    server = serve("memory", tmp_path / "data", environment={"CRUDSTACK_AUTH": json.dumps(auth)})
    bucket = f"data-{tmp_path.name}".replace("_", "-").lower()
    keep_token(ministack_s3.url, bucket, TOKEN)
    return {
        "version": 1,
        "storage": "s3-sqlite",
        "storage_overrides": {},
        "stage": "dev",
        "bucket": bucket,
        "region": REGION,
        "api_url": server.url,
        "function_name": "crudstack-dev-api",
        "auth": auth,
    }


@pytest.mark.parametrize("path", PATHS)
def test_the_lines_of_the_docs_end_with_a_served_request(path, tmp_path, outputs, ministack_s3, monkeypatch):
    # The environment of the shell that runs the tests is not used.
    for name in ("PULUMI_CONFIG_PASSPHRASE", "PULUMI_BACKEND_URL", "PULUMI_ACCESS_TOKEN", "PULUMI_HOME"):
        monkeypatch.setenv(name, "the developer's")
    for name in ("AWS_PROFILE", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"):
        monkeypatch.setenv(name, "the developer's")
    pulumi = FakePulumi(tmp_path / "programs")
    pulumi.will_output(outputs)
    clone = Clone(tmp_path, pulumi.directory, ministack_s3.url)
    assert_served(path, walk(clone, path))
    assert pulumi.state["selected"] == "dev"
    for environment in pulumi.environments():
        assert "the developer's" not in environment.values()
        found = {name for name in environment if name.startswith(("AWS_", "PULUMI_"))}
        assert found == {name for name in clone.environment if name.startswith(("AWS_", "PULUMI_"))} | (
            {"PULUMI_CONFIG_PASSPHRASE"} & found
        )


@pytest.mark.parametrize("path", PATHS)
def test_programs_are_installed_by_the_commands_of_their_own_docs(path):
    lines = lines_of(path)
    assert lines[:2] == [INSTALLS[0], 'export PATH="$HOME/.pulumi/bin:$PATH"']
    assert ("make setup-infra" in lines) == (path != "make deploy")
    page = (ROOT / DEPLOY).read_text()
    assert "`brew install pulumi/tap/pulumi`" in page
    assert "`winget install pulumi`" in page


def test_a_path_without_its_passphrase_fails(tmp_path, outputs, ministack_s3, monkeypatch):
    """This shows that the tests above can fail."""
    missing = [line for line in lines_of("README") if not line.startswith("export PULUMI_CONFIG_PASSPHRASE")]
    monkeypatch.setattr(sys.modules[__name__], "lines_of", lambda _path: missing)
    pulumi = FakePulumi(tmp_path / "programs")
    pulumi.will_output(outputs)
    with pytest.raises(AssertionError, match=r"stack init dev ended with 1:\n.*passphrase must be set"):
        walk(Clone(tmp_path, pulumi.directory, ministack_s3.url), "README")


def test_files_that_the_docs_create_are_not_tracked():
    """The commands of the docs leave no change in git, and the examples exist."""
    files = ["Pulumi.dev.yaml", "Pulumi.prod.yaml", "Pulumi.pr-7.yaml", ".venv/x", "dist/lambda.zip", ".local/x"]
    git = shutil.which("git")
    assert git is not None
    command = [git, "check-ignore", "--no-index", *files, "Pulumi.yaml", "Pulumi.dev.yaml.example"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.stdout.split() == files
    examples = subprocess.run([git, "ls-files", "Pulumi*"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert examples.split() == ["Pulumi.dev.yaml.example", "Pulumi.prod.yaml.example", "Pulumi.yaml"]


# Without `make setup-infra`


def test_pulumi_installs_the_requirements_if_there_is_no_venv():
    """Pulumi installs requirements.txt of the directory in `main`. It lists only the packages of `make setup-infra`."""
    project = (ROOT / "Pulumi.yaml").read_text()
    assert "\nmain: infra/\n" in project
    named = re.findall(r"^-r (.*)$", (ROOT / "infra/requirements.txt").read_text(), re.MULTILINE)
    assert [(ROOT / "infra" / name).resolve() for name in named] == [
        ROOT / f"requirements/{name}.txt" for name in ("uv", "local", "infra")
    ]
