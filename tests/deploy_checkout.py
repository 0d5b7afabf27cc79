"""A checkout with stand-ins for Pulumi and AWS, in which tests run `python -m infra.deploy`."""

from __future__ import annotations

import hashlib
import os
import pty
import re
import select
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from infra.artifact import ROOT
from tests.fake_pulumi import FakePulumi

PASSPHRASE, TOKEN = "a passphrase of the tests", "the-token"
OUTPUTS: dict[str, Any] = {
    "version": 1,
    "storage": "s3-sqlite",
    "storage_overrides": {},
    "stage": "dev",
    "bucket": "data-1",
    "region": "eu-central-1",
    "api_url": "https://x.example.com",
    "function_name": "crudstack-dev-api",
    "auth": {"mode": "token", "token_sha256": hashlib.sha256(TOKEN.encode()).hexdigest()},
}


class Checkout:
    """A directory with Pulumi.yaml, and the environment of a user who has done every step except `pulumi login`."""

    def __init__(self, directory: Path, endpoint: str) -> None:
        self.directory = directory / "clone"
        self.directory.mkdir()
        shutil.copy(ROOT / "Pulumi.yaml", self.directory)
        self.pulumi = FakePulumi(directory / "bin")
        self.pulumi.will_output(OUTPUTS)
        home = directory / "home"
        home.mkdir()
        self.environment = {
            "HOME": str(home),
            # Lambda's Python compiles the zip. These two variables let it be found as outside the tests.
            "PATH": os.pathsep.join([str(self.pulumi.directory), os.environ["PATH"]]),
            "PYENV_ROOT": os.environ.get("PYENV_ROOT") or str(Path.home() / ".pyenv"),
            "PYTHONPATH": str(ROOT),
            "PULUMI_CONFIG_PASSPHRASE": PASSPHRASE,
            "AWS_REGION": "eu-central-1",
            "AWS_ENDPOINT_URL": endpoint,
            "AWS_ACCESS_KEY_ID": "local",
            "AWS_SECRET_ACCESS_KEY": "local",
            "AWS_EC2_METADATA_DISABLED": "true",
        }

    def command(self, *arguments: str) -> list[str]:
        return [sys.executable, "-m", "infra.deploy", *(arguments or ("--stage", "dev"))]

    def run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run the command without a terminal."""
        return subprocess.run(
            self.command(*arguments),
            cwd=self.directory,
            env=self.environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
            timeout=120,
        )

    def refused(self, *arguments: str) -> str:
        """Run the command and return its last line. Fails unless it exits with 2 and shows no secret or traceback."""
        done = self.run(*(arguments or ("--stage", "dev", "--yes")))
        assert done.returncode == 2, done.stdout + done.stderr
        last = done.stderr.splitlines()[-1]
        assert last.startswith("deploy: ")
        assert "Traceback" not in done.stderr
        assert PASSPHRASE not in done.stdout + done.stderr
        assert TOKEN not in done.stdout + done.stderr
        return last.removeprefix("deploy: ")

    def typed(self, *arguments: str, answers: tuple[str, ...] = (), interrupt: bool = False) -> Typed:
        """Run the command on a terminal, and type an answer to each question."""
        main, side = pty.openpty()
        running = subprocess.Popen(
            self.command(*arguments),
            cwd=self.directory,
            env=self.environment,
            stdin=side,
            stdout=side,
            stderr=side,
            start_new_session=True,
        )
        os.close(side)
        shown, left = "", list(answers)
        end, interrupted = time.monotonic() + 120, 0.0
        try:
            while time.monotonic() < end:
                if not select.select([main], [], [], 0.1)[0]:
                    # Python may lose a signal between showing a question and reading the answer: send it again.
                    if interrupted and time.monotonic() > interrupted + 5:
                        os.killpg(running.pid, signal.SIGINT)
                        interrupted = time.monotonic()
                    continue
                try:
                    read = os.read(main, 4096)
                except OSError:  # on Linux, the other side was closed
                    break
                if not read:
                    break
                shown += read.decode()
                if re.search(r"(\] |eu-central-1: )$", shown):
                    if left:
                        os.write(main, f"{left.pop(0)}\n".encode())
                    elif interrupt:
                        os.killpg(running.pid, signal.SIGINT)
                        interrupted, interrupt = time.monotonic(), False
            return Typed(running.wait(10), shown.replace("\r\n", "\n"))
        finally:
            running.kill()
            running.wait()
            os.close(main)

    def stack_file(self, name: str = "dev") -> dict[str, Any]:
        content: dict[str, Any] = yaml.safe_load((self.directory / f"Pulumi.{name}.yaml").read_text())
        return content

    def write(self, name: str = "dev", **content: Any) -> None:
        (self.directory / f"Pulumi.{name}.yaml").write_text(yaml.safe_dump(content))

    def rename(self, name: str) -> None:
        """Give the project another name."""
        file = self.directory / "Pulumi.yaml"
        text = file.read_text()
        assert text.startswith("name: crudstack\n")
        file.write_text(text.replace("name: crudstack\n", f"name: {name}\n", 1))

    def changed(self) -> list[str]:
        """Return the commands that may have changed something on AWS."""
        return [command for command in self.pulumi.asked() if command.startswith(("up", "destroy", "refresh"))]


class Typed(NamedTuple):
    code: int
    shown: str
