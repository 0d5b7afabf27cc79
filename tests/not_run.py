"""Tests that cannot run here, because a program that they need is not there, and how the reader is told.

`make test` uses what is there; its last lines name what did not run, and why. With TESTS_MUST_ALL_RUN=1, as .ci/run has
it, such a test fails instead.
"""

from __future__ import annotations

import os
from typing import NoReturn

import pytest

PREFIX = "NOT RUN: "


def not_run(reason: str) -> NoReturn:
    """End this test as one that did not run. `reason`: what needs which program, and the command that gets it."""
    if os.environ.get("TESTS_MUST_ALL_RUN"):
        pytest.fail(f"{PREFIX}{reason} (TESTS_MUST_ALL_RUN is set)")
    pytest.skip(f"{PREFIX}{reason}")


def summary(skipped: list[object]) -> list[str]:
    """Return a line for each reason why tests did not run, with their number, from pytest's reports of skipped tests."""
    counts: dict[str, int] = {}
    for report in skipped:
        reason = str(getattr(report, "longrepr", ("", 0, ""))[2]).removeprefix("Skipped: ")
        counts[reason] = counts.get(reason, 0) + 1
    return [f"{PREFIX}{count} tests of {reason.removeprefix(PREFIX)}" for reason, count in sorted(counts.items())]
