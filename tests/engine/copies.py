"""Copies of created stacks, because most tests begin with the same few stacks.

    stack = StackCopies(directory, cli).copy(engine, StackConfig())

Each stack is created once in a process, by the CLI and the program, below a directory of its own. A copy has the state,
the settings and the AWS account of that stack, in the directory of its engine, and shares only the zip, which no test
of copies changes.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import msgspec

from infra.config import StackConfig
from tests.engine.engine import Engine, EngineStack

NAME = "test"
PARTS = ("account", "state", f"work-{NAME}")


class StackCopies:
    def __init__(self, directory: Path, cli: Path) -> None:
        self._directory, self._cli = directory, cli
        self._created: dict[bytes, Path] = {}

    def copy(self, engine: Engine, config: StackConfig) -> EngineStack:
        """Return a stack in which `up` has succeeded with this config. The engine must have no stack of this name."""
        key = msgspec.json.encode(config)
        if key not in self._created:
            self._created[key] = self._create(self._directory / str(len(self._created)), config)
        origin = self._created[key]
        for part in PARTS:
            shutil.copytree(origin / part, engine.directory / part, dirs_exist_ok=True)
        engine.zip = origin / engine.zip.name  # the state names its path
        return engine.stack(NAME, config)

    def _create(self, directory: Path, config: StackConfig) -> Path:
        with Engine(directory, self._cli) as engine:
            done = engine.stack(NAME, config).up()
            assert (done.error, done.diagnostics) == ("", [])
        return directory
