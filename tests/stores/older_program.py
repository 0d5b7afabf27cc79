"""Start a program of an earlier commit as a process, which uses a store beside the program under test."""

from __future__ import annotations

import contextlib
import io
import json
import os
import subprocess
import sys
import tarfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tests.not_run import not_run

ROOT = Path(__file__).parents[2]
WORKER = Path(__file__).with_name("older_program_worker.py")
BEFORE_BLOBS = "9daec23"
"""The last commit without blobs."""
BEFORE_PACKS = "57ba9ac"
"""The last commit without packs."""


def sources(commit: str, directory: Path) -> Path:
    """Write the `app` of a commit below a directory, and return the directory."""
    command = ["git", "archive", commit, "app"]
    archive = subprocess.run(command, cwd=ROOT, capture_output=True, check=False)
    if archive.returncode:
        not_run(f"older programs: this checkout has no commit {commit}; run `git fetch --unshallow`")
    with tarfile.open(fileobj=io.BytesIO(archive.stdout)) as files:
        files.extractall(directory, filter="data")
    return directory


class Refused(Exception):
    """The older program answered with an error: its class and its text."""


class OlderProgram:
    """A running program of an earlier commit."""

    def __init__(self, source: Path, kind: str, *arguments: Any, **named: Any) -> None:
        environment = {**os.environ, "PYTHONPATH": str(source)}
        # -P: the directory of the script has a folder `redis`, which is not the driver
        command = [sys.executable, "-P", str(WORKER), json.dumps([kind, arguments, named])]
        self._process = subprocess.Popen(
            command, cwd=source, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def __call__(self, command: str, *arguments: Any) -> Any:
        """Run a command, and return its result. Raises Refused if the program answers with an error."""
        self._process.stdin.write(json.dumps([command, *arguments]) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        assert line, f"the older program ended with {self._process.wait(30)}"
        answer: Mapping[str, Any] = json.loads(line)
        if "error" in answer:
            raise Refused(f"{answer['error']}: {answer['detail']}")
        return answer["ok"]

    def stop(self) -> None:
        """End the program, and wait until it has ended."""
        self._process.stdin.close()
        try:
            self._process.wait(30)
        finally:
            self._process.kill()
            self._process.wait()
            self._process.stdout.close()


@contextlib.contextmanager
def older_program(source: Path, kind: str, *arguments: Any, **named: Any) -> Iterator[OlderProgram]:
    """Start a program, and stop it at the end."""
    program = OlderProgram(source, kind, *arguments, **named)
    try:
        yield program
    finally:
        program.stop()
