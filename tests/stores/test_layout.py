"""A kind of the settings and the factory of the same name make the same stores in the same places."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from app import wiring
from app.autocrud.errors import ConfigError
from app.autocrud.resource_manager.basic import ModelSpec
from app.autocrud.resource_manager.blob_store.simple import MemoryBlobStore
from app.autocrud.resource_manager.storage.layout import (
    FormerLayout,
    Layout,
    beside_s3,
    disk_blobs,
    disk_bodies,
    disk_metadata,
)
from app.autocrud.resource_manager.storage_factory import (
    CachedS3StorageFactory,
    DiskStorageFactory,
    FullStorageFactory,
    IStorageFactory,
    MemoryDiskStorageFactory,
    MemoryStorageFactory,
    MQCachedS3StorageFactory,
    PairStorageFactory,
    PostgresS3StorageFactory,
    RedisPgStorageFactory,
    S3StorageFactory,
)
from app.autocrud.secret import Secret
from app.settings import KINDS, META_TRAITS, RESOURCE_TRAITS, load

ENDPOINT, REGION, PREFIX = "http://127.0.0.1:9000", "eu-central-1", "team/app/"
PUBLIC = "https://files.example.org"
PG, REDIS, AMQP = "postgresql://u:secret@h/d", "redis://:secret@h/0", "amqp://u:secret@h"
S3 = {"s3_bucket": "b", "s3_endpoint": ENDPOINT, "region_name": REGION, "prefix": PREFIX, "public_url": PUBLIC}
S3_CONFIG = {"bucket": "b", "endpoint_url": ENDPOINT, "region_name": REGION, "prefix": PREFIX, "public_url": PUBLIC}


def settings_of(kind: str, data_dir: Path, **more: str) -> dict[str, str]:
    return {
        "CRUDSTACK_STORAGE": kind,
        "CRUDSTACK_DATA_DIR": str(data_dir),
        "CRUDSTACK_CACHE_MB": "64",
        "CRUDSTACK_KEEP_UPLOADS_HOURS": "48",
        "CRUDSTACK_BUCKET": "b",
        "CRUDSTACK_PREFIX": "team/app",
        "CRUDSTACK_REGION": REGION,
        "CRUDSTACK_S3_ENDPOINT_URL": ENDPOINT,
        "CRUDSTACK_S3_PUBLIC_URL": PUBLIC,
        "CRUDSTACK_PG_DSN": PG,
        "CRUDSTACK_REDIS_URL": REDIS,
        "CRUDSTACK_AMQP_URL": AMQP,
        **more,
    }


def factory_of(kind: str, data_dir: Path, *, idle_work: bool) -> IStorageFactory:
    """Return the factory of a kind with the arguments that say the same as `settings_of`."""
    local_dir, cache_dir = beside_s3(data_dir, "copies", ENDPOINT), beside_s3(data_dir, "cache", ENDPOINT)
    copies: dict[str, Any] = {"local_dir": local_dir, "sync_interval": 5.0 if idle_work else None}
    pool: dict[str, Any] = {} if idle_work else {"max_size": 2}
    cache: dict[str, Any] = {"cache_dir": cache_dir, "max_cache_bytes": 64 * 1024**2}
    keep: dict[str, Any] = {"keep_uploads_s": 48 * 3600.0}
    match kind:
        case "memory":
            return MemoryStorageFactory(**keep)
        case "disk":
            return DiskStorageFactory(data_dir, **keep)
        case "memory-disk":
            return MemoryDiskStorageFactory(data_dir, **keep)
        case "s3-sqlite":
            return S3StorageFactory(**S3_CONFIG, **copies, **keep)
        case "postgres-s3":
            return PostgresS3StorageFactory(PG, **S3, **pool, **keep)
        case "redis-postgres":
            return RedisPgStorageFactory(REDIS, PG, **S3, **pool, **keep)
        case "redis-postgres on disk":
            return RedisPgStorageFactory(REDIS, PG, data_dir, prefix=PREFIX, **pool, **keep)
        case "cached-s3":
            return CachedS3StorageFactory(**S3, **copies, **cache, **keep)
        case "mq-cached-s3":
            return MQCachedS3StorageFactory(S3_CONFIG, amqp_url=AMQP, **copies, **cache, **keep)
        case "full":
            return FullStorageFactory(REDIS, PG, S3_CONFIG, amqp_url=AMQP, **pool, **cache, **keep)
    raise AssertionError(f"no factory has the name of the kind {kind}")


def described(value: Any, seen: Mapping[int, int] = {}) -> Any:
    """Return all that an object of the app holds, as builtin types that can be compared.

    Objects of other packages and functions are compared by their types.
    """
    if isinstance(value, float) and value > 1e9:
        return "a moment"
    if value is None or isinstance(value, bool | int | float | str | bytes):
        return value
    if isinstance(value, Path):
        return f"path {value}"
    if isinstance(value, Secret):
        return "secret", hash(value)
    if id(value) in seen:
        return "seen", seen[id(value)]
    seen = {**seen, id(value): len(seen)}
    if isinstance(value, Mapping):
        return {str(key): described(one, seen) for key, one in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [described(one, seen) for one in value]
    name = f"{type(value).__module__}.{type(value).__qualname__}"
    if not name.startswith("app."):
        return name
    names = [*getattr(value, "__dict__", {}), *getattr(type(value), "__slots__", ())]
    return name, {one: described(getattr(value, one), seen) for one in names if hasattr(value, one)}


CHECK = "_before_open"
"""The check for stores in the former layout. Only factories do it, because kinds never used that layout."""


@pytest.mark.parametrize("idle_work", [True, False])
@pytest.mark.parametrize("kind", [*KINDS, "redis-postgres on disk"])
def test_kind_and_factory_make_the_same_stores(tmp_path, kind, idle_work):
    environment = settings_of(kind.partition(" ")[0], tmp_path)
    if kind == "redis-postgres on disk":
        del environment["CRUDSTACK_BUCKET"]
    of_kind = wiring.storage_factory(load(environment), idle_work=idle_work).build("blog-post")
    of_factory = factory_of(kind, tmp_path, idle_work=idle_work).build("blog-post")
    assert getattr(of_kind, CHECK) is None
    name, found = described(of_factory)
    (same_name, expected) = described(of_kind)
    del found[CHECK], expected[CHECK]
    assert (name, found) == (same_name, expected)


def test_the_comparison_sees_each_argument(tmp_path):
    """Otherwise the test above might compare nothing."""
    given: dict[str, Any] = {
        "prefix": "p/",
        "bucket": "b",
        "pg_dsn": PG,
        "redis_url": REDIS,
        "amqp_url": AMQP,
        "cache_dir": tmp_path,
        "max_cache_bytes": 10**6,
    }
    others: dict[str, Any] = {
        "prefix": "q/",
        "bucket": "c",
        "pg_dsn": "postgresql://u:secret@h2/d",
        "redis_url": "redis://h2",
        "amqp_url": "amqp://h2",
        "cache_dir": tmp_path / "other",
        "max_cache_bytes": 10**7,
        "max_size": 3,
        "lease_s": 3.0,
        "region_name": "us-west-2",
        "endpoint_url": "http://127.0.0.1:9001",
        "keep_uploads_s": 1.0,
    }
    as_given = described(PairStorageFactory("redis-postgres", "mq-cached-s3", **given).build("m"))
    for name, other in others.items():
        changed = PairStorageFactory("redis-postgres", "mq-cached-s3", **(given | {name: other})).build("m")
        assert described(changed) != as_given, name
    s3_sqlite = {"bucket": "b", "local_dir": tmp_path, "sync_interval": 5.0, "consistency": "strong"}
    as_given = described(PairStorageFactory("s3-sqlite", "s3", **s3_sqlite).build("m"))
    for name, other in {"local_dir": tmp_path / "x", "sync_interval": None, "consistency": "local"}.items():
        changed = PairStorageFactory("s3-sqlite", "s3", **(s3_sqlite | {name: other})).build("m")
        assert described(changed) != as_given, name


def test_places():
    """Deployed stacks have their data in these places."""
    layout = Layout("team/")
    assert layout.table("blog-post") == "meta_team/blog-post"
    assert layout.redis_prefix("blog-post") == "team/blog-post:"
    assert layout.index_key("blog-post") == "team/meta/blog-post.sqlite"
    assert layout.bodies("blog-post", "s3-sqlite") == "team/data/blog-post/"
    for meta in ("memory", "disk", "postgres", "redis", "redis-postgres"):
        assert layout.bodies("blog-post", meta) == "team/blog-post/"
        assert layout.blobs("blog-post", meta) == "team/blog-post/blobs/"
    assert layout.blobs("blog-post", "s3-sqlite") == "team/data/blog-post/blobs/"
    assert layout.queue_prefix("blog-post") == "team/blog-post_"
    root = Path("/data")
    assert disk_metadata(root, "m") == Path("/data/m/meta")
    assert disk_bodies(root, "m", "disk") == Path("/data/m/data")
    assert disk_bodies(root, "m", "memory") == disk_bodies(root, "m", "postgres") == Path("/data/m")
    assert disk_blobs(root, "m") == Path("/data/m/blobs")
    assert beside_s3(root, "copies", None) == Path("/data/copies/dc937b59")
    assert beside_s3(root, "cache", "http://127.0.0.1:9000") == Path("/data/cache/67d8ea34")


def test_former_places():
    """Factories of earlier releases wrote here."""
    former = FormerLayout("team/data/")
    assert former.table("m") == "meta_m"
    assert former.bodies("m", "postgres") == former.bodies("m", "s3-sqlite") == "team/data/m/"
    assert former.queue_prefix("m") == "autocrud_m_"


@pytest.mark.parametrize("idle_work", [True, False])
@pytest.mark.parametrize("kind", [*KINDS, "redis-postgres on disk"])
def test_blobs_of_each_kind_lie_beside_its_bodies(tmp_path, kind, idle_work):
    storage = factory_of(kind, tmp_path, idle_work=idle_work).build("blog-post")
    storage.bind(ModelSpec("blog-post"))
    if kind == "memory":
        assert type(storage.blob_store) is MemoryBlobStore
    elif "disk" in kind:
        assert storage.blob_store.rootdir == tmp_path / "blog-post" / "blobs"
    else:
        assert storage.blob_store.prefix == f"{storage.resource_store._prefix}blobs/"
        assert storage.blob_store.prefix.startswith(PREFIX)
        assert storage.blob_store.object_store is storage.resource_store._objects
    places = storage.location_keys
    assert len(set(places)) == len(places)


@pytest.mark.parametrize("meta", sorted(META_TRAITS))
@pytest.mark.parametrize("resource", sorted(RESOURCE_TRAITS))
def test_each_pair_has_a_blob_store(tmp_path, meta, resource):
    given = {"bucket": "b", "pg_dsn": PG, "redis_url": REDIS, "amqp_url": AMQP, "data_dir": tmp_path}
    storage = PairStorageFactory(meta, resource, **given).build("m")
    storage.bind(ModelSpec("m"))
    assert storage.blob_store.durable is (resource != "memory")
    assert storage.blob_store.remote is ("s3" in resource)


def test_blobs_of_the_former_layout_lie_beside_its_bodies():
    factory = CachedS3StorageFactory(**S3, cache_dir=None, former_layout="open")
    storage = factory.build("m")
    assert storage.blob_store.prefix == f"{storage.resource_store._prefix}blobs/" == "team/app/m/blobs/"


@pytest.mark.parametrize("missing", ["bucket", "pg_dsn", "redis_url", "amqp_url"])
def test_a_missing_argument_is_named(missing):
    given = {"bucket": "b", "pg_dsn": PG, "redis_url": REDIS, "amqp_url": AMQP}
    del given[missing]
    with pytest.raises(
        ConfigError, match=f"{missing} is not given: a redis-postgres MetaStore with mq-cached-s3 bodies"
    ):
        PairStorageFactory("redis-postgres", "mq-cached-s3", **given).build("m")


@pytest.mark.parametrize(("meta", "resource"), [("tape", "s3"), ("memory", "tape")])
def test_an_unknown_name_is_refused(meta, resource):
    with pytest.raises(ConfigError, match="is 'tape', expected the name of a"):
        PairStorageFactory(meta, resource, bucket="b").build("m")
