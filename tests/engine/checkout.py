"""A copy of the project in which the real CLI runs, as after `git clone` and `make setup-infra`."""

from __future__ import annotations

import contextlib
import functools
import os
import shutil
import signal
import subprocess
from pathlib import Path

from infra import artifact
from infra.artifact import ROOT
from infra.config import StackConfig
from infra.stack import package
from tests.engine.account import Account
from tests.engine.engine import LIMIT_S, install_plugin, isolated
from tests.engine.provider import Faults


class Checkout:
    """The project's files with the environment of `isolated`, the tests' provider and the tests' language host.

    account, faults    see tests/engine/account.py and provider.py; the engine runs the provider as a process
    storage            the kind of storage whose drivers the zip needs
    """

    def __init__(self, directory: Path, cli: Path, *, storage: str = "s3-sqlite") -> None:
        self.directory, self.path = directory, directory / "crudstack"
        copy_project(self.path)
        (self.path / ".venv").symlink_to(ROOT / ".venv")
        (self.path / ".local").mkdir()
        # The zip is built here, with the settings of the package registry. The copy has it, and the cache of wheels.
        built = _zip(storage)
        (self.path / "dist").mkdir()
        shutil.copy2(built, self.path / "dist")
        (self.path / ".local/artifacts").symlink_to(ROOT / ".local/artifacts")
        self.environment = isolated(directory, cli)
        programs = directory / "programs"
        programs.mkdir()
        host = programs / "pulumi-language-python"
        host.write_text(
            f'#!/bin/sh\nPYTHONPATH="{ROOT}" exec "{ROOT}/.venv/bin/python" -m tests.engine.language_host "$@"\n'
        )
        host.chmod(0o755)
        (programs / "pulumi").symlink_to(cli)
        # The zip is compiled by Lambda's Python, which may be one that pyenv or uv keeps in the user's home.
        compiler = artifact.interpreter(artifact.LAMBDA.python).parent
        self.environment["PATH"] = os.pathsep.join([str(programs), self.environment["PATH"], str(compiler)])
        install_plugin(directory)
        self.account, self.faults = Account(directory / "account"), Faults(directory / "account")

    def start(self, command: str, **environment: str) -> subprocess.Popen[str]:
        """Start a shell command in a new session."""
        return subprocess.Popen(
            ["bash", "-c", command],
            cwd=self.path,
            env={**self.environment, **environment},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def run(self, command: str, *, code: int = 0, **environment: str) -> str:
        """Run a shell command, and return its stdout and stderr. Raises AssertionError for another exit code."""
        running = self.start(command, **environment)
        try:
            said, _ = running.communicate(timeout=LIMIT_S)
        finally:
            end_group(running)
        assert running.returncode == code, f"{command} ended with {running.returncode}:\n{said}"
        return said

    def mend_state(self) -> None:
        """Delete the empty files that a killed CLI may leave beside its state, as docs/deploy.md says.

        Pulumi writes `STACK.json` in one step, and `STACK.json.attrs` after it in two; an empty one is
        `failed to load checkpoint: EOF`.
        """
        for attributes in (self.directory / "state").rglob("*.attrs"):
            if attributes.stat().st_size == 0:
                attributes.unlink()


@functools.cache
def _zip(storage: str) -> Path:
    return package(StackConfig(storage=storage)).path


def copy_project(target: Path) -> None:
    """Copy the files of the working tree that git tracks, without tests/."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).is_file() and not name.startswith("tests/"):
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, target / name)


def end_group(running: subprocess.Popen[str]) -> None:
    """Kill all processes of a command. The plugins of a killed CLI continue to run, in other process groups."""
    for pid in session(running.pid):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    running.wait()


def session(leader: int) -> dict[int, str]:
    """Return the processes of a session with their command lines."""
    found = {}
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            command = process.joinpath("cmdline").read_bytes().replace(b"\0", b" ").decode()
            if os.getsid(int(process.name)) == leader:
                found[int(process.name)] = command
    return found
