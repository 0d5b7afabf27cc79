"""What a query means: SQL on SQLite and the evaluation of one resource agree with the reference in plain Python."""

from __future__ import annotations

from pathlib import Path

from app.autocrud.resource_manager.storage_factory import IStorageFactory, MemoryStorageFactory
from app.autocrud.testing.queries import QueryConformance


class TestMemory(QueryConformance):
    def make(self, root: Path) -> IStorageFactory:
        return MemoryStorageFactory()
