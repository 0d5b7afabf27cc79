"""Long-lived processes, one for each peer with its loaded data, that are asked for each row in turn.

`scripts.asking` is the other side.
"""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any, NamedTuple, Self

from .load import on_first_core
from .peers import ROOT
from .report import Cell, Table


class Worker:
    """A process on the first core, which waits until it is asked."""

    def __init__(self, command: Sequence[str], environment: Mapping[str, str]) -> None:
        self._command = command
        given = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("CRUDSTACK_", "AWS_")) and name != "PYTHONDONTWRITEBYTECODE"
        }
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115 - closed at the exit
        self._process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=given | environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            preexec_fn=on_first_core,  # noqa: PLW1509
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._log.close()

    def ready(self) -> None:
        """Wait until it has loaded its data."""
        self._answer()

    def ask(self, row: str, seconds: float) -> dict[str, dict[str, Any]]:
        """By peer, what it measured."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"row": row, "seconds": seconds}) + "\n")
        self._process.stdin.flush()
        answer: dict[str, dict[str, Any]] = self._answer()
        return answer

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self._process.wait()
            self._log.seek(0)
            raise RuntimeError(f"{' '.join(self._command)} failed: {self._log.read()[-3000:]}")
        return json.loads(line)


class Figures(NamedTuple):
    """Microseconds of wall time, of CPU time of the client, and of time in the server if known, by row and peer."""

    wall: dict[str, dict[str, Cell]]
    cpu: dict[str, dict[str, Cell]]
    server: dict[str, dict[str, Cell]]
    calls: dict[tuple[str, str], int]

    @classmethod
    def none(cls) -> Figures:
        return cls({}, {}, {}, {})

    def add(self, row: str, peer: str, sample: Mapping[str, Any], *, expected: Any) -> None:
        """`expected`: what the check must have found; otherwise the row has failed."""
        failed = int(sample["answer"] != expected)
        for table, name in ((self.wall, "wall"), (self.cpu, "cpu"), (self.server, "server")):
            if name in sample:
                cell = table.setdefault(row, {}).setdefault(peer, Cell([], []))
                cell.cpu.append(sample[name])
                table[row][peer] = cell._replace(failed=cell.failed + failed)
        self.calls[row, peer] = self.calls.get((row, peer), 0) + sample["calls"]

    def with_calls(self, table: Table) -> Table:
        """The same cells, under names that say how many calls were made."""
        return {
            row: {f"{peer}, {self.calls[row, peer]:,} calls": cell for peer, cell in cells.items()}
            for row, cells in table.items()
        }
