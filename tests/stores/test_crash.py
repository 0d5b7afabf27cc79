"""Kill a process with SIGKILL, or lose the power, at each step of a write to disk.

Afterwards the store has the old or the new content, and all acknowledged writes.
"""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

MODES = ["kill", "half", "power"]


def run(kind: str, mode: str, start: str, directory, stride: int) -> dict:
    first = 1 + MODES.index(mode)  # so that each mode dies at other steps
    command = [sys.executable, "-m", "tests.stores.crash_worker", kind, mode, start, str(directory)]
    command += [str(first), str(stride)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    outcome = json.loads(done.stdout)
    assert outcome["failures"] == [], done.stderr[-3000:]
    return outcome


@pytest.mark.parametrize("kind", ["disk", "memory-disk"])
@pytest.mark.parametrize("mode", MODES)
def test_dying_at_each_step_of_the_writes(kind, mode, tmp_path):
    assert run(kind, mode, "opened", tmp_path, 5 if kind == "disk" else 3)["steps"] > 100


@pytest.mark.parametrize("kind", ["disk", "memory-disk"])
def test_dying_while_the_store_is_created(kind, tmp_path):
    assert run(kind, "kill", "new", tmp_path, 8)["steps"] > 60
