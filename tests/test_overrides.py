"""A class that defines a method that would never be called is refused when it is bound."""

from __future__ import annotations

from typing import Any

import pytest

from app.autocrud.errors import ConfigError
from app.autocrud.resource_manager.backends.s3.memory_object_store import MemoryObjectStore
from app.autocrud.resource_manager.basic import IStorage, MetaStore, ModelSpec, ResourceStore
from app.autocrud.resource_manager.contract.overrides import (
    META_STORE_PROTOCOLS,
    RENAMED_OF_CACHE,
    RENAMED_OF_META_STORE,
    RENAMED_OF_RESOURCE_STORE,
    RENAMED_OF_STORAGE,
    RESOURCE_STORE_PROTOCOLS,
    members_of,
)
from app.autocrud.resource_manager.core import SimpleStorage
from app.autocrud.resource_manager.meta_store.fast_slow import FastSlowMetaStore
from app.autocrud.resource_manager.meta_store.postgres import PostgresMetaStore
from app.autocrud.resource_manager.meta_store.redis import RedisMetaStore
from app.autocrud.resource_manager.meta_store.simple import MemoryMetaStore
from app.autocrud.resource_manager.resource_store.cached_s3 import CachedS3ResourceStore
from app.autocrud.resource_manager.resource_store.simple import DiskResourceStore, MemoryResourceStore
from app.autocrud.resource_manager.storage_factory import IStorageFactory
from app.autocrud.testing.model import manage
from examples.custom_stores import BytesCache

SPEC = ModelSpec("item")


def overriding(base: type[Any], *names: str) -> type[Any]:
    """Return a class `Custom` that defines these names too."""
    return type("Custom", (base,), dict.fromkeys(names, lambda *_: None))


def bare(base: type[Any], *names: str) -> type[Any]:
    """Return the same, of a class that defines no other method than the abstract ones."""
    return overriding(base, *base.__abstractmethods__, *names)


def refusal(old: str, new: str) -> str:
    return f"^Custom defines `{old}`, which is called `{new}` now: rename it in Custom$"


@pytest.mark.parametrize(("old", "new"), RENAMED_OF_META_STORE.items())
@pytest.mark.parametrize("replaced", [False, True])
def test_a_meta_store_with_a_former_name_is_refused(old, new, replaced):
    bodies = MemoryResourceStore()
    if replaced:  # by the index beside the bodies
        bodies = CachedS3ResourceStore([], bucket="b", prefix="p/", object_store=MemoryObjectStore())
    storage = SimpleStorage(overriding(MemoryMetaStore, old)(), bodies)
    with pytest.raises(ConfigError, match=refusal(old, new)):
        storage.bind(SPEC)


@pytest.mark.parametrize(("old", "new"), RENAMED_OF_META_STORE.items())
@pytest.mark.parametrize("fast", [False, True])
def test_a_layer_of_a_fast_slow_store_with_a_former_name_is_refused(old, new, fast):
    fast_store = (overriding(RedisMetaStore, old) if fast else RedisMetaStore)("redis://127.0.0.1:1/0", prefix="p:")
    slow_store = (PostgresMetaStore if fast else overriding(PostgresMetaStore, old))("postgresql://127.0.0.1:1/db")
    store = FastSlowMetaStore(fast_store, slow_store)
    with pytest.raises(ConfigError, match=refusal(old, new)):
        store.bind(SPEC)


@pytest.mark.parametrize(("old", "new"), RENAMED_OF_RESOURCE_STORE.items())
def test_a_resource_store_with_a_former_name_is_refused(old, new):
    storage = SimpleStorage(MemoryMetaStore(), overriding(MemoryResourceStore, old)())
    with pytest.raises(ConfigError, match=refusal(old, new)):
        storage.bind(SPEC)


@pytest.mark.parametrize(("old", "new"), RENAMED_OF_STORAGE.items())
def test_a_storage_with_a_former_name_is_refused(old, new):
    class Factory(IStorageFactory):
        def build(self, model_name: str) -> IStorage:
            return overriding(SimpleStorage, old)(MemoryMetaStore(), MemoryResourceStore())

    with pytest.raises(ConfigError, match=refusal(old, new)):
        manage(Factory())


@pytest.mark.parametrize(("old", "new"), RENAMED_OF_CACHE.items())
def test_a_cache_with_a_former_name_is_refused(old, new):
    caches = [BytesCache(), overriding(BytesCache, old)()]
    bodies = CachedS3ResourceStore(caches, bucket="b", prefix="p/", object_store=MemoryObjectStore())
    with pytest.raises(ConfigError, match=refusal(old, new)):
        SimpleStorage(MemoryMetaStore(), bodies).bind(SPEC)


@pytest.mark.parametrize("protocol", [each for each in META_STORE_PROTOCOLS if len(members_of(each)) > 1])
def test_a_meta_store_with_a_part_of_a_protocol_is_refused(protocol):
    one, *others = members_of(protocol)
    storage = SimpleStorage(bare(MetaStore, one)(), MemoryResourceStore())
    with pytest.raises(ConfigError, match=f"^Custom defines only a part of {protocol.__name__}") as refused:
        storage.bind(SPEC)
    assert all(f"`{name}`" in str(refused.value) for name in others)


@pytest.mark.parametrize("protocol", [each for each in RESOURCE_STORE_PROTOCOLS if len(members_of(each)) > 1])
def test_a_resource_store_with_a_part_of_a_protocol_is_refused(protocol):
    one, *others = members_of(protocol)
    storage = SimpleStorage(MemoryMetaStore(), bare(ResourceStore, one)())
    with pytest.raises(ConfigError, match=f"^Custom defines only a part of {protocol.__name__}") as refused:
        storage.bind(SPEC)
    assert all(f"`{name}`" in str(refused.value) for name in others)


def test_stores_with_the_abstract_methods_alone_are_enough():
    storage = SimpleStorage(bare(MetaStore)(), bare(ResourceStore)())
    storage.bind(SPEC)
    assert not storage.may_be_stale


def test_records_need_a_meta_store_that_applies_them(tmp_path):
    meta_store = overriding(bare(MetaStore))()
    type(meta_store).authoritative = False
    storage = SimpleStorage(meta_store, DiskResourceStore(tmp_path))
    with pytest.raises(ConfigError, match="cannot apply the records of DiskResourceStore: define `apply_committed`"):
        storage.bind(SPEC)


@pytest.mark.parametrize(
    ("old", "new"), [("Once", "IdempotentCommit"), ("Done", "CommitResult"), ("DoneBefore", "AlreadyCommitted")]
)
def test_the_import_of_a_former_class_name_tells_the_new_name(old, new):
    with pytest.raises(ImportError, match=f"^`{old}` is called `{new}` now: rename it"):
        exec(f"from app.autocrud.resource_manager.basic import {old}")  # noqa: S102 - an import statement
    exec(f"from app.autocrud.resource_manager.basic import {new}")  # noqa: S102 - an import statement
