"""Pulumi's CLI for the tests. Without the CLI these tests do not run, and the suite's last lines report that."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.engine import install
from tests.engine.engine import Engine
from tests.not_run import not_run


def _cli(name: str) -> Path:
    found = install.find(name)
    if found is None:
        not_run(f"Pulumi's engine: there is no pulumi {install.pinned(name)} here, `make pulumi` gets it")
    return found


@pytest.fixture(scope="session")
def cli() -> Path:
    """Return the path of the newest CLI."""
    return _cli("newest")


@pytest.fixture(scope="session")
def oldest_cli() -> Path:
    """Return the path of the oldest supported CLI."""
    return _cli("oldest")


@pytest.fixture
def engine(tmp_path, cli) -> Iterator[Engine]:
    with Engine(tmp_path, cli) as engine:
        yield engine
