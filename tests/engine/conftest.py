"""Pulumi's CLI for the tests. Without it they do not run, and the suite's last lines say so."""

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
    """The newest CLI."""
    return _cli("newest")


@pytest.fixture(scope="session")
def oldest_cli() -> Path:
    """The oldest CLI that is supported."""
    return _cli("oldest")


@pytest.fixture
def engine(tmp_path, cli) -> Iterator[Engine]:
    with Engine(tmp_path, cli) as engine:
        yield engine
