"""From settings to storage factories: the same settings make the same stores everywhere."""

from __future__ import annotations

from pathlib import Path

from .autocrud.errors import ConfigError
from .autocrud.resource_manager.basic import IStorage
from .autocrud.resource_manager.storage_factory import (
    DiskStorageFactory,
    IStorageFactory,
    MemoryDiskStorageFactory,
    MemoryStorageFactory,
)
from .settings import KINDS, Kind, Settings, Storage

PAIRS: dict[tuple[str, str], Kind] = {
    ("memory", "memory"): "memory",
    ("disk", "disk"): "disk",
    ("memory", "disk"): "memory-disk",
}


class WiredStorageFactory(IStorageFactory):
    """The stack's kind for every model, but for those with a kind of their own."""

    def __init__(self, default: IStorageFactory, overrides: dict[str, IStorageFactory]) -> None:
        self.default, self.overrides = default, overrides

    def build(self, model_name: str) -> IStorage:
        return self.overrides.get(model_name, self.default).build(model_name)


def storage_factory(settings: Settings) -> WiredStorageFactory:
    """ConfigError names a setting that is missing."""
    outputs = settings.outputs
    overrides = {model: _factory(storage, settings) for model, storage in outputs.storage_overrides.items()}
    return WiredStorageFactory(_factory(outputs.storage, settings), overrides)


def _factory(storage: Storage, settings: Settings) -> IStorageFactory:
    kind = kind_of(storage)
    if kind == "memory":
        return MemoryStorageFactory()
    if settings.local.data_dir is None:
        raise ConfigError(f"CRUDSTACK_DATA_DIR is not set: storage {kind!r} keeps its data in that directory")
    # Resolved now, so that a later change of the working directory does not move the data.
    root = Path(settings.local.data_dir).expanduser().absolute()
    return DiskStorageFactory(root) if kind == "disk" else MemoryDiskStorageFactory(root)


def kind_of(storage: Storage) -> Kind:
    """The kind that a pair is; ConfigError for pairs that would lose data."""
    if isinstance(storage, str):
        return storage
    kind = PAIRS.get((storage.meta, storage.resource))
    if kind is None:
        raise ConfigError(
            f"storage {{meta: {storage.meta}, resource: {storage.resource}}} would lose bodies that it lists;"
            f" expected one of {', '.join(KINDS)}"
        )
    return kind
