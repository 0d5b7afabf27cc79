"""From settings to storage factories: the same settings make the same stores everywhere."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from .autocrud.errors import ConfigError
from .autocrud.resource_manager.basic import IStorage
from .autocrud.resource_manager.storage_factory import (
    DiskStorageFactory,
    IStorageFactory,
    MemoryDiskStorageFactory,
    MemoryStorageFactory,
    PostgresS3StorageFactory,
    S3StorageFactory,
)
from .settings import KINDS, Kind, Settings, Storage

PAIRS: dict[tuple[str, str], Kind] = {
    ("memory", "memory"): "memory",
    ("disk", "disk"): "disk",
    ("memory", "disk"): "memory-disk",
    ("s3-sqlite", "s3"): "s3-sqlite",
    ("postgres", "s3"): "postgres-s3",
}


class WiredStorageFactory(IStorageFactory):
    """The stack's kind for every model, but for those with a kind of their own."""

    def __init__(self, default: IStorageFactory, overrides: dict[str, IStorageFactory]) -> None:
        self.default, self.overrides = default, overrides

    def build(self, model_name: str) -> IStorage:
        return self.overrides.get(model_name, self.default).build(model_name)


def storage_factory(settings: Settings, *, idle_work: bool = True) -> WiredStorageFactory:
    """ConfigError names a setting that is missing. `idle_work`: whether anything may run between requests."""
    outputs = settings.outputs
    overrides = {model: _factory(storage, settings, idle_work) for model, storage in outputs.storage_overrides.items()}
    return WiredStorageFactory(_factory(outputs.storage, settings, idle_work), overrides)


def _factory(storage: Storage, settings: Settings, idle_work: bool) -> IStorageFactory:
    kind = kind_of(storage)
    if kind == "memory":
        return MemoryStorageFactory()
    if kind == "s3-sqlite":
        return _s3(settings, idle_work)
    if kind == "postgres-s3":
        return _postgres(settings)
    if settings.local.data_dir is None:
        raise ConfigError(f"CRUDSTACK_DATA_DIR is not set: storage {kind!r} keeps its data in that directory")
    # Resolved now, so that a later change of the working directory does not move the data.
    root = Path(settings.local.data_dir).expanduser().absolute()
    return DiskStorageFactory(root) if kind == "disk" else MemoryDiskStorageFactory(root)


def _s3(settings: Settings, idle_work: bool) -> S3StorageFactory:
    local, bucket = settings.local, _bucket(settings, "s3-sqlite")
    copies = None
    if local.data_dir is not None:
        where = hashlib.sha256(f"{local.s3_endpoint_url}".encode()).hexdigest()[:8]
        copies = Path(local.data_dir).expanduser().absolute() / "copies" / where
    return S3StorageFactory(
        bucket,
        local.s3_endpoint_url,
        region_name=_region(settings),
        prefix=_prefix(settings),
        local_dir=copies,
        sync_interval=5.0 if idle_work else None,
    )


def _postgres(settings: Settings) -> PostgresS3StorageFactory:
    dsn = settings.local.pg_dsn
    if dsn is None:
        raise ConfigError("CRUDSTACK_PG_DSN is not set: storage 'postgres-s3' keeps its metadata in that database")
    return PostgresS3StorageFactory(
        dsn,
        _bucket(settings, "postgres-s3"),
        settings.local.s3_endpoint_url,
        region_name=_region(settings),
        prefix=_prefix(settings),
    )


def _bucket(settings: Settings, kind: Kind) -> str:
    if settings.outputs.bucket is None:
        raise ConfigError(f"CRUDSTACK_BUCKET is not set: storage {kind!r} keeps its data in that bucket")
    return settings.outputs.bucket


def _prefix(settings: Settings) -> str:
    prefix = settings.outputs.prefix
    return prefix and f"{prefix.rstrip('/')}/"


def _region(settings: Settings) -> str:
    given = settings.outputs.region or os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
    return given or "us-east-1"


def needs_s3(settings: Settings) -> bool:
    """Whether any model is stored on S3."""
    outputs = settings.outputs
    kinds = set(map(kind_of, (outputs.storage, *outputs.storage_overrides.values())))
    return not kinds.isdisjoint(("s3-sqlite", "postgres-s3"))


def kind_of(storage: Storage) -> Kind:
    """The kind that a pair is; ConfigError for pairs that would lose data."""
    if isinstance(storage, str):
        return storage
    kind = PAIRS.get((storage.meta, storage.resource))
    if kind is None:
        raise ConfigError(
            f"storage {{meta: {storage.meta}, resource: {storage.resource}}} is no pair that keeps what it lists;"
            f" expected one of {', '.join(KINDS)}"
        )
    return kind
