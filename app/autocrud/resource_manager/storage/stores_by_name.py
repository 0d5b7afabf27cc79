"""Construction of stores by name, at the locations that `layout` defines."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from ...errors import ConfigError
from ...secret import Secret, hidden
from ..basic import BlobStore, Encoding, MetaStore, ResourceStore
from ..blob_store.simple import DiskBlobStore, MemoryBlobStore
from ..meta_store.simple import DiskMetaStore, MemoryMetaStore
from ..resource_store.simple import DiskResourceStore, MemoryResourceStore
from ..runtime.disk_space import space
from ..runtime.drivers import driver
from .blobs import KEEP_UPLOADS_S
from .former_layout import Findable, WhenFormer, refuse_former
from .layout import (
    CACHE_NAME,
    CACHED_BODIES,
    MAX_CACHE_BYTES,
    FormerLayout,
    Layout,
    disk_blobs,
    disk_bodies,
    disk_metadata,
)

if TYPE_CHECKING:
    from ..backends.s3.object_store import ObjectStore
    from ..meta_store.postgres import PostgresMetaStore
    from ..meta_store.redis import RedisMetaStore
    from ..meta_store.sqlite3 import Consistency, S3SqliteMetaStore
    from ..resource_store.cache import Cache, DiskCache

T = TypeVar("T")

DIRECTORIES_BYTES = 4 * 4096
"""Bytes of the disk that the directories of the cache and its lock take, at most."""


class StoresByName:
    """Makes a MetaStore, a ResourceStore and a BlobStore for each model, at the locations that `layout` defines.

    meta             memory, disk, s3-sqlite, postgres, redis or redis-postgres
    resource         memory, disk, s3, cached-s3 or mq-cached-s3. Files are kept in memory, on disk or on S3 too
    prefix           beginning of all keys, and a part of all names on servers; usually ends with a slash
    data_dir         directory of stores on disk
    bucket, endpoint_url, access_key_id, secret_access_key, region_name
                     bucket and access of stores on S3
    public_url       address by which clients reach the S3 server, for presigned URLs; None: endpoint_url
    object_store     a client of the bucket, instead of endpoint, keys, region and public_url
    encoding         encoding of new bodies in memory and on S3
    local_dir, consistency, sync_interval
                     arguments of s3-sqlite, see S3SqliteMetaStore
    pg_dsn           address of PostgreSQL
    password         function that returns the password for each new connection to PostgreSQL, if passwords expire
    max_size         largest number of connections of this process to PostgreSQL; None: that of PostgresMetaStore
    redis_url        address of Redis
    redis_password   function that returns the password for each new connection to Redis, if passwords expire
    lease_s          with redis-postgres, the longest time in seconds that a write waits if Redis does not answer
    amqp_url         address of RabbitMQ, or a function that returns it for each connection
    cache_dir        directory of the cache on disk, which all models share; None: cached-s3 and mq-cached-s3 cache in
                     memory only
    max_cache_bytes  largest size of the cache on disk, in bytes; None: a quarter of its disk, but at most 1 GiB
    former_layout    what to do about a store that an earlier release wrote to another location: "refuse" to open,
                     "open" that store, or "ignore" it. "ignore" is safe only if no such store exists: see
                     `storage.former_layout`
    keep_uploads_s   seconds for which an upload is kept that no revision refers to

    The methods open no store and send no request. With `cache_dir`, `resource_store` uses the local disk: it reads its
    size, and removes the cache directories of earlier releases. The methods raise ConfigError if an argument or a
    package is missing that the store needs.
    """

    def __init__(
        self,
        meta: str,
        resource: str,
        *,
        prefix: str = "",
        data_dir: str | Path | None = None,
        bucket: str | None = None,
        endpoint_url: str | Secret | None = None,
        access_key_id: str | None = None,
        secret_access_key: str | Secret | None = None,
        region_name: str | None = None,
        public_url: str | None = None,
        object_store: ObjectStore | None = None,
        encoding: Encoding | None = None,
        local_dir: str | Path | None = None,
        consistency: Consistency = "strong",
        sync_interval: float | None = 5.0,
        pg_dsn: str | Secret | None = None,
        password: Callable[[], str] | None = None,
        max_size: int | None = None,
        redis_url: str | Secret | None = None,
        redis_password: Callable[[], str] | None = None,
        lease_s: float = 2.0,
        amqp_url: str | Secret | Callable[[], str] | None = None,
        cache_dir: str | Path | None = None,
        max_cache_bytes: int | None = None,
        former_layout: WhenFormer = "ignore",
        keep_uploads_s: float = KEEP_UPLOADS_S,
    ) -> None:
        self.meta, self.resource, self.prefix = meta, resource, prefix
        self.data_dir = None if data_dir is None else Path(data_dir)
        self.bucket, self.endpoint_url, self.region_name = bucket, hidden(endpoint_url), region_name
        self.access_key_id, self.secret_access_key = access_key_id, hidden(secret_access_key)
        self.public_url, self.object_store, self.encoding = public_url, object_store, encoding
        self.local_dir, self.consistency, self.sync_interval = local_dir, consistency, sync_interval
        self.pg_dsn, self.password, self.max_size = hidden(pg_dsn), password, max_size
        self.redis_url, self.redis_password, self.lease_s = hidden(redis_url), redis_password, lease_s
        self.amqp_url: Secret | Callable[[], str] | None = amqp_url if callable(amqp_url) else hidden(amqp_url)
        self.cache_dir = None if cache_dir is None else Path(cache_dir)
        self.max_cache_bytes = max_cache_bytes
        self.former_layout, self.keep_uploads_s = former_layout, keep_uploads_s
        self._layout = FormerLayout(prefix) if former_layout == "open" else Layout(prefix)
        self._disk_cache: DiskCache | None = None

    # MetaStores

    def meta_store(self, model: str) -> MetaStore:
        """Return the MetaStore of a model, not yet open."""
        match self.meta:
            case "memory":
                return MemoryMetaStore(self.encoding)
            case "disk":
                return DiskMetaStore(disk_metadata(self._given(self.data_dir, "data_dir"), model))
            case "s3-sqlite":
                return self._s3_sqlite(self._layout.index_key(model))
            case "postgres":
                return self._postgres(self._layout.table(model))
            case "redis":
                return self._redis(self._layout.redis_prefix(model))
            case "redis-postgres":
                fast = self._redis(self._layout.redis_prefix(model))
                slow = self._postgres(self._layout.table(model))
                from ..meta_store.fast_slow import FastSlowMetaStore

                return FastSlowMetaStore(fast, slow, lease_s=self.lease_s)
        raise ConfigError(f"meta is {self.meta!r}, expected the name of a MetaStore")

    def _s3_sqlite(self, key: str) -> S3SqliteMetaStore:
        with driver("s3"):
            from ..meta_store.sqlite3 import S3SqliteMetaStore
        return S3SqliteMetaStore(
            self._given(self.bucket, "bucket"),
            key,
            sync_interval=self.sync_interval,
            consistency=self.consistency,
            local_dir=self.local_dir,
            object_store=self._objects(),
        )

    def _postgres(self, table: str) -> PostgresMetaStore:
        with driver("postgres"):
            from ..backends.postgres.pool import MAX_SIZE
            from ..meta_store.postgres import PostgresMetaStore
        return PostgresMetaStore(
            self._given(self.pg_dsn, "pg_dsn"),
            table_name=table,
            password=self.password,
            max_size=self.max_size or MAX_SIZE,
        )

    def _redis(self, prefix: str) -> RedisMetaStore:
        with driver("redis"):
            from ..meta_store.redis import RedisMetaStore
        return RedisMetaStore(self._given(self.redis_url, "redis_url"), prefix, password=self.redis_password)

    # ResourceStores

    def resource_store(self, model: str) -> ResourceStore:
        """Return the ResourceStore of a model, not yet open."""
        match self.resource:
            case "memory":
                return MemoryResourceStore(self.encoding)
            case "disk":
                return DiskResourceStore(disk_bodies(self._given(self.data_dir, "data_dir"), model, self.meta))
            case "s3":
                return self._s3(self._layout.bodies(model, self.meta))
            case "cached-s3":
                return self._cached_s3(model)
            case "mq-cached-s3":
                return self._mq_cached_s3(model)
        raise ConfigError(f"resource is {self.resource!r}, expected the name of a ResourceStore")

    def _s3(self, prefix: str) -> ResourceStore:
        with driver("s3"):
            from ..resource_store.s3 import S3ResourceStore
        bucket = self._given(self.bucket, "bucket")
        return S3ResourceStore(bucket, prefix, encoding=self.encoding, object_store=self._objects())

    def _cached_s3(self, model: str) -> ResourceStore:
        with driver("s3"):
            from ..resource_store.cached_s3 import CachedS3ResourceStore
        return CachedS3ResourceStore(
            self._caches(model),
            bucket=self._given(self.bucket, "bucket"),
            prefix=self._layout.bodies(model, self.meta),
            encoding=self.encoding,
            object_store=self._objects(),
        )

    def _mq_cached_s3(self, model: str) -> ResourceStore:
        with driver("s3", "amqp"):
            import aio_pika  # noqa: F401 - the store imports it too late for `driver`

            from ..resource_store.mq_cached_s3 import MQCachedS3ResourceStore
        amqp_url = self.amqp_url
        if amqp_url is None:
            raise self._missing("amqp_url")
        return MQCachedS3ResourceStore(
            self._caches(model),
            amqp_url,
            self._layout.queue_prefix(model),
            bucket=self._given(self.bucket, "bucket"),
            prefix=self._layout.bodies(model, self.meta),
            encoding=self.encoding,
            object_store=self._objects(),
        )

    def _caches(self, model: str) -> list[Cache]:
        from ..resource_store.cache import DiskCache, MemoryCache
        from ..resource_store.cache_directory import remove_former_cache

        memory = MemoryCache(max_size=CACHED_BODIES)
        if self.cache_dir is None:
            return [memory]
        if self._disk_cache is None:
            # All models share one cache, so that the least recently used entry of all models is evicted first.
            self._disk_cache = DiskCache(self.cache_dir / CACHE_NAME, max_bytes=self._cache_bytes(self.cache_dir))
        if model != CACHE_NAME:
            remove_former_cache(self.cache_dir / model)  # earlier releases had a directory for each model
        return [memory, self._disk_cache]

    def _cache_bytes(self, root: Path) -> int:
        """Return the largest size of the cache's file, so that it fits into `max_cache_bytes` with its directories."""
        room = self.max_cache_bytes
        if room is None:
            room = min(space(root).total // 4, MAX_CACHE_BYTES)
        return max(1, room - DIRECTORIES_BYTES)

    # BlobStores

    def blob_store(self, model: str) -> BlobStore:
        """Return the BlobStore of a model, not yet open: in memory, on disk or on S3, as its bodies."""
        match self.resource:
            case "memory":
                return MemoryBlobStore()
            case "disk":
                return DiskBlobStore(disk_blobs(self._given(self.data_dir, "data_dir"), model))
            case "s3" | "cached-s3" | "mq-cached-s3":
                with driver("s3"):
                    from ..blob_store.s3 import S3BlobStore
                prefix = self._layout.blobs(model, self.meta)
                return S3BlobStore(self._given(self.bucket, "bucket"), prefix, object_store=self._objects())
        raise ConfigError(f"resource is {self.resource!r}, expected the name of a ResourceStore")

    # Stores of earlier releases

    def check_of_former_layout(self, model: str) -> Callable[[], Awaitable[None]] | None:
        """Return a check that raises ConfigError if a store in the former layout exists; None if none is needed."""
        if self.former_layout != "refuse":
            return None
        before, now = FormerLayout(self.prefix), self._layout
        present: Findable
        former: Findable
        if self.meta in ("postgres", "redis-postgres") and before.table(model) != now.table(model):
            names = f"the tables {before.table(model)}", f"the tables {now.table(model)}"
            present, former = self._postgres(now.table(model)), self._postgres(before.table(model))
            bodies = self.resource_store(model)
        elif self.meta == "s3-sqlite" and self.resource in ("cached-s3", "mq-cached-s3"):
            key = f"{before.bodies(model, self.meta)}index.sqlite"
            names = key, now.index_key(model)
            present, former = self._s3_sqlite(now.index_key(model)), self._s3_sqlite(key)
            bodies = self._s3(before.bodies(model, self.meta))
        else:
            return None
        factory = type(self).__name__

        async def check() -> None:
            await refuse_former(factory, model, present, former, bodies, names=names)

        return check

    # Arguments

    def _given(self, value: T | None, name: str) -> T:
        if value is None:
            raise self._missing(name)
        return value

    def _missing(self, name: str) -> ConfigError:
        return ConfigError(f"{name} is not given: a {self.meta} MetaStore with {self.resource} bodies needs it")

    def _objects(self) -> ObjectStore:
        from ..backends.s3.object_store import s3

        return self.object_store or s3(
            self._given(self.bucket, "bucket"),
            self.endpoint_url,
            self.access_key_id,
            self.secret_access_key,
            self.region_name,
            self.public_url,
        )
