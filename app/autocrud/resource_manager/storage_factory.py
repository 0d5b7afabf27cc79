"""One factory for each kind of storage. Your own takes a dozen lines:

class MyStorageFactory(IStorageFactory):
    def build(self, model_name: str) -> IStorage:
        return SimpleStorage(MemoryMetaStore(), DiskResourceStore(rootdir=f"data/{model_name}"))
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path

from .basic import Encoding, IStorage
from .meta_store.simple import DiskMetaStore, MemoryMetaStore
from .resource_store.simple import DiskResourceStore, MemoryResourceStore
from .simple_storage import SimpleStorage


class IStorageFactory(ABC):
    """Makes the storage of each model."""

    @abstractmethod
    def build(self, model_name: str) -> IStorage:
        """The storage of the model with this name, kebab-case as in its URL. No I/O: that comes with the first use."""


class MemoryStorageFactory(IStorageFactory):
    """Everything in this process's memory: fast, and gone with the process."""

    def __init__(self, encoding: Encoding | None = None) -> None:
        self.encoding = encoding

    def build(self, model_name: str) -> IStorage:
        return SimpleStorage(MemoryMetaStore(self.encoding), MemoryResourceStore(self.encoding))


class DiskStorageFactory(IStorageFactory):
    """SQLite files below `{rootdir}/{model}/meta` and `/data`. Durable; several processes may share the directory."""

    def __init__(self, rootdir: str | Path) -> None:
        self.rootdir = Path(rootdir)

    def build(self, model_name: str) -> IStorage:
        root = self.rootdir / model_name
        return SimpleStorage(DiskMetaStore(root / "meta"), DiskResourceStore(root / "data"))


class MemoryDiskStorageFactory(IStorageFactory):
    """An index in memory over bodies and records on disk, rebuilt at start. Durable; one process owns the directory."""

    def __init__(self, data_dir: str | Path) -> None:
        self.data_dir = Path(data_dir)

    def build(self, model_name: str) -> IStorage:
        return SimpleStorage(MemoryMetaStore(), DiskResourceStore(self.data_dir / model_name))
