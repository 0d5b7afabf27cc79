"""Fixtures and helper functions that all parts of the suite use."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, ClassVar

import pytest

from ..resource_manager.basic import ResourceMeta, Version
from ..resource_manager.core import Caller, IdempotencyKey, ResourceManager
from ..resource_manager.model.resource import Resource
from ..resource_manager.storage_factory import IStorageFactory
from .model import Clock, Item, manage

ROUNDS = 25
"""How often a race is repeated."""


def keyed(key: str, name: str = "alice", request: str = "") -> Caller:
    """Return a caller with an Idempotency-Key."""
    return Caller(name, key=IdempotencyKey(key, request))


def version_of(meta: ResourceMeta) -> Version:
    """Return the version that a write expects if it builds on this metadata."""
    return Version(meta.version, meta.nonce)


def state_of(result: Resource[Any] | ResourceMeta | None) -> ResourceMeta:
    """Return the metadata of what a write or an operation of a batch returned."""
    assert result is not None
    return result.meta if isinstance(result, Resource) else result


def resource_of(result: Resource[Any] | ResourceMeta | None) -> Resource[Any]:
    """Return what an operation of a batch returned that has data."""
    assert isinstance(result, Resource)
    return result


class Conformance:
    """The fixtures of the suite. The method `make` of a subclass returns the factory under test."""

    durable: ClassVar[bool] = False
    """Whether acknowledged data survives the process."""
    shares: ClassVar[bool] = False
    """Whether two storages that `make` makes in one process see each other's data."""

    @abstractmethod
    def make(self, root: Path) -> IStorageFactory:
        """Return the factory under test. Two factories made for one root find the same data."""

    @pytest.fixture
    def root(self, tmp_path: Path) -> Path:
        """Return an empty directory."""
        return tmp_path

    @pytest.fixture
    def clock(self) -> Clock:
        """Return the clock of the manager, which the test may move."""
        return Clock()

    @pytest.fixture
    async def manager(self, root: Path, clock: Clock) -> AsyncIterator[ResourceManager[Item]]:
        """Give a manager of a storage under test, and close it afterwards."""
        manager = manage(self.make(root), clock=clock)
        yield manager
        await manager.close()

    def test_the_storage_declares_its_durability(self, root: Path) -> None:
        assert manage(self.make(root)).storage.durable is self.durable

    async def test_health(self, manager: ResourceManager[Item]) -> None:
        await manager.open()
        await manager.storage.health()
