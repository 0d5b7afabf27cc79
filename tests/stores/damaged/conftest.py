"""Fixtures for the tests of damaged data."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest

from app.autocrud.resource_manager.backends.s3.memory_object_store import MemoryObjectStore
from tests.stores.damaged.helpers import KINDS, Place, of_caches, of_postgres, of_redis


@pytest.fixture
def place(request, tmp_path) -> Place:
    kind = KINDS.get(request.node.callspec.params["kind"])
    wants = request.getfixturevalue
    postgres = wants("postgres") if kind is None or kind.factory in (of_postgres, of_caches) else ""
    valkey = wants("valkey") if kind is not None and kind.factory is of_redis else ""
    return Place(tmp_path, tmp_path.name, MemoryObjectStore(), postgres, valkey)


@pytest.fixture(autouse=True)
def quiet(caplog) -> Iterator[None]:
    """Assert that no log record has a traceback, because damaged data is not a defect of the program."""
    caplog.set_level(logging.DEBUG, "crudstack")
    yield
    assert not [record for record in caplog.records if record.exc_info]
