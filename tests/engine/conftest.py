"""Pulumi's CLI for the tests. Without the CLI these tests do not run, and the suite's last lines report that."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from infra.config import StackConfig
from tests.engine import install
from tests.engine.copies import StackCopies
from tests.engine.engine import Engine, EngineStack
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


@pytest.fixture(scope="session")
def stack_copies(tmp_path_factory, cli) -> StackCopies:
    return StackCopies(tmp_path_factory.mktemp("created-stacks"), cli)


@pytest.fixture
def created(engine, stack_copies) -> Callable[[StackConfig], EngineStack]:
    """Return a function that returns a stack of the engine in which `up` has succeeded with a config."""
    return lambda config: stack_copies.copy(engine, config)
