"""Stores that keep their data in a directory of this machine. The size of its disk limits them."""

from __future__ import annotations

from abc import abstractmethod
from pathlib import Path
from typing import NamedTuple, Protocol, runtime_checkable


@runtime_checkable
class InDirectory(Protocol):
    """A ResourceStore or BlobStore with a directory of this machine."""

    @property
    @abstractmethod
    def local_directory(self) -> Path:
        """Return the directory. It may not exist yet."""


class Directories(NamedTuple):
    """The directories of the bodies and of the blobs of a model. None: they are kept elsewhere."""

    bodies: Path | None
    blobs: Path | None


@runtime_checkable
class DirectoryStorage(Protocol):
    """An IStorage that knows whether its stores have directories of this machine."""

    @property
    @abstractmethod
    def directories(self) -> Directories:
        """Return the directories of its stores."""


def directory_of(store: object) -> Path | None:
    """Return the directory of a store; None if it has none."""
    return store.local_directory if isinstance(store, InDirectory) else None
