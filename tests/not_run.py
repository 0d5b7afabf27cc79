"""Tests that cannot run because a program is missing, and the report of them.

`make test` uses the programs that it finds. Its last lines name the tests that did not run, and why. With
TESTS_MUST_ALL_RUN=1, which .ci/run sets, such a test fails instead.
"""

from __future__ import annotations

import os
from typing import NoReturn

import pytest

PREFIX = "NOT RUN: "


def not_run(reason: str) -> NoReturn:
    """End this test as one that did not run. `reason` names the program, its user, and the command that installs it."""
    if os.environ.get("TESTS_MUST_ALL_RUN"):
        pytest.fail(f"{PREFIX}{reason} (TESTS_MUST_ALL_RUN is set)")
    pytest.skip(f"{PREFIX}{reason}")


def summary(skipped: list[object]) -> list[str]:
    """Return a line for each reason why tests did not run, with their number, from pytest's reports of skips."""
    counts: dict[str, int] = {}
    for report in skipped:
        reason = str(getattr(report, "longrepr", ("", 0, ""))[2]).removeprefix("Skipped: ")
        counts[reason] = counts.get(reason, 0) + 1
    return [f"{PREFIX}{count} tests of {reason.removeprefix(PREFIX)}" for reason, count in sorted(counts.items())]
