"""Examples of custom stores, one for each layer. They pass the tests of the built-in stores. See docs/custom-stores.md.

    FilesStorageFactory("data")    an IStorageFactory: a FileMetaStore and a FileResourceStore for each model

    dicts.py    DictMetaStore: the shortest possible atomic commit
    files.py    FileMetaStore: the same in a file, durable and shared by processes
                FileResourceStore: one file for each body
    caches.py   BytesCache: bounded by bytes, in memory

They scan all resources where a database has an index, and copy the state where it has a log. They are fast enough for
some thousands of resources.
"""

from __future__ import annotations

from pathlib import Path

from app.autocrud.resource_manager.basic import IStorage
from app.autocrud.resource_manager.core import SimpleStorage
from app.autocrud.resource_manager.storage_factory import IStorageFactory

from .caches import BytesCache
from .dicts import DictMetaStore
from .files import FileMetaStore, FileResourceStore

__all__ = ["BytesCache", "DictMetaStore", "FileMetaStore", "FileResourceStore", "FilesStorageFactory"]


class FilesStorageFactory(IStorageFactory):
    """Files below `{root}/{model}/`. Durable; several processes may share the directory."""

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root)

    def build(self, model_name: str) -> IStorage:
        root = self.root / model_name
        return SimpleStorage(FileMetaStore(root / "meta"), FileResourceStore(root / "data"))
