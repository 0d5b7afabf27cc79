"""Refusal of stores that define a method which would never be called.

A store is checked when it is bound. It is refused if its class still has the former name of a renamed method or
attribute, or only some of the methods of a protocol in `protocols`.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

from ...errors import ConfigError
from ..basic import BlobStore, IStorage, MetaStore, ResourceStore
from .blobs import BlobRows
from .import_journal import ImportKeeping
from .loading import BulkLoading
from .packs import BodyPacking, PackReferences
from .protocols import (
    BodySweeping,
    FindingsKeeping,
    Freshness,
    IndexKeeping,
    IndexMigration,
    MetaSweeping,
    RecordKeeping,
    RecordReplay,
)
from .snapshots import BodySnapshots, Pinning, RecordSnapshots, SnapshotReading
from .storable import MetadataLimits

_STORE = {"place": "location_key", "impairments": "degradations", "erase": "purge_remnants"}
RENAMED_OF_META_STORE = _STORE | {
    "peeks": "may_be_stale",
    "indexed": "activate_unique_fields",
    "give_up": "deactivate_unique_field",
    "follow": "apply_committed",
    "holder": "owner_of",
}
RENAMED_OF_RESOURCE_STORE = _STORE | {"own": "lock_exclusively"}
RENAMED_OF_STORAGE = {
    "places": "location_keys",
    "impairments": "degradations",
    "erase": "purge_remnants",
    "peeks": "may_be_stale",
}
RENAMED_OF_CACHE = {"erase": "purge_remnants"}

META_STORE_PROTOCOLS = (
    *(Freshness, IndexMigration, FindingsKeeping, MetaSweeping, RecordReplay),
    *(BlobRows, Pinning, SnapshotReading, ImportKeeping, BulkLoading, MetadataLimits, PackReferences),
)
RESOURCE_STORE_PROTOCOLS = (
    *(BodySweeping, BodyPacking, RecordKeeping, IndexKeeping),
    *(BlobRows, BodySnapshots, RecordSnapshots),
)

_SHARED_NAMES = {"done", "snapshot"}
"""A ResourceStore may define these for its own purpose, so they do not show that it implements the protocol."""


def check_meta_store(store: MetaStore) -> None:
    """Raise ConfigError if the store defines a method that would never be called."""
    _check(store, RENAMED_OF_META_STORE, META_STORE_PROTOCOLS)


def check_resource_store(store: ResourceStore) -> None:
    """Raise ConfigError if the store defines a method that would never be called."""
    _check(store, RENAMED_OF_RESOURCE_STORE, RESOURCE_STORE_PROTOCOLS)


def check_blob_store(store: BlobStore) -> None:
    """Raise ConfigError if the store defines a method that would never be called."""
    _check(store, _STORE, ())


def check_storage(storage: IStorage) -> None:
    """Raise ConfigError if the storage defines a method that would never be called."""
    _check(storage, RENAMED_OF_STORAGE, ())


def check_cache(cache: object) -> None:
    """Raise ConfigError if the cache defines a method that would never be called."""
    _check(cache, RENAMED_OF_CACHE, ())


def _check(store: object, renamed: Mapping[str, str], protocols: Sequence[type[Any]]) -> None:
    cls = type(store)
    for old, new in renamed.items():
        if hasattr(cls, old):
            raise ConfigError(
                f"{cls.__name__} defines `{old}`, which is called `{new}` now: rename it in {cls.__name__}"
            )
    for protocol in protocols:
        names = members_of(protocol)
        missing = [name for name in names if not hasattr(cls, name)]
        if missing and set(names) - set(missing) - _SHARED_NAMES:
            raise ConfigError(
                f"{cls.__name__} defines only a part of {protocol.__name__}, which is used as a whole:"
                f" define {', '.join(f'`{name}`' for name in missing)} too"
            )


def members_of(protocol: type[Any]) -> list[str]:
    """Return the names of the attributes and methods that a protocol defines."""
    methods = [name for name, value in vars(protocol).items() if inspect.isfunction(value) and not name.startswith("_")]
    return [*protocol.__annotations__, *methods]
