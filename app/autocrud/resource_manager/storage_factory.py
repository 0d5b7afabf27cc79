"""One factory for each kind of storage. Your own takes a dozen lines:

class MyStorageFactory(IStorageFactory):
    def build(self, model_name: str) -> IStorage:
        return SimpleStorage(MemoryMetaStore(), DiskResourceStore(rootdir=f"data/{model_name}"))
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ConfigError
from ..secret import Secret, hidden
from .basic import Encoding, IStorage, ResourceStore
from .meta_store.simple import DiskMetaStore, MemoryMetaStore
from .resource_store.simple import DiskResourceStore, MemoryResourceStore
from .runtime.drivers import driver
from .storage.simple_storage import SimpleStorage

if TYPE_CHECKING:
    from .backends.s3.object_store import ObjectStore
    from .meta_store.sqlite3 import Consistency


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


class S3StorageFactory(IStorageFactory):
    """S3 and nothing else: `{prefix}meta/{model}.sqlite/` is the index, `{prefix}data/{model}/` the bodies. Durable; any number of processes and
    machines may share the bucket.

    local_dir, consistency   as S3SqliteMetaStore takes them
    sync_interval            the same; None where nothing may run between requests
    object_store             instead of bucket and endpoint
    """

    def __init__(
        self,
        bucket: str,
        endpoint_url: str | Secret | None = None,
        access_key_id: str | None = None,
        secret_access_key: str | Secret | None = None,
        region_name: str | None = "us-east-1",
        *,
        prefix: str = "",
        local_dir: str | Path | None = None,
        consistency: Consistency = "strong",
        sync_interval: float | None = 5.0,
        object_store: ObjectStore | None = None,
    ) -> None:
        self.bucket, self.prefix, self.region_name = bucket, prefix, region_name
        self.endpoint_url = hidden(endpoint_url)
        self.access_key_id, self.secret_access_key = access_key_id, hidden(secret_access_key)
        self.local_dir, self.consistency, self.sync_interval = local_dir, consistency, sync_interval
        self.object_store = object_store

    def build(self, model_name: str) -> IStorage:
        from .backends.s3.object_store import s3
        from .meta_store.sqlite3 import S3SqliteMetaStore
        from .resource_store.s3 import S3ResourceStore

        objects = self.object_store or s3(
            self.bucket, self.endpoint_url, self.access_key_id, self.secret_access_key, self.region_name
        )
        meta_store = S3SqliteMetaStore(
            self.bucket,
            f"{self.prefix}meta/{model_name}.sqlite",
            self.endpoint_url,
            sync_interval=self.sync_interval,
            consistency=self.consistency,
            local_dir=self.local_dir,
            object_store=objects,
        )
        return SimpleStorage(
            meta_store, S3ResourceStore(self.bucket, f"{self.prefix}data/{model_name}/", object_store=objects)
        )


class PostgresS3StorageFactory(IStorageFactory):
    """Metadata and index in PostgreSQL, in tables that begin with `meta_{model}`; bodies on S3 below `{prefix}{model}/`. Durable; any number of
    processes and machines may share both.

    Without keys the ambient credentials of AWS are used; `password` makes passwords that expire.
    """

    def __init__(
        self,
        pg_dsn: str | Secret,
        s3_bucket: str,
        s3_endpoint: str | Secret | None = None,
        s3_access_key: str | None = None,
        s3_secret_key: str | Secret | None = None,
        *,
        region_name: str | None = "us-east-1",
        prefix: str = "",
        password: Callable[[], str] | None = None,
    ) -> None:
        self.pg_dsn, self.password = hidden(pg_dsn), password
        self.s3_bucket, self.region_name, self.prefix = s3_bucket, region_name, prefix
        self.s3_endpoint = hidden(s3_endpoint)
        self.s3_access_key, self.s3_secret_key = s3_access_key, hidden(s3_secret_key)

    def build(self, model_name: str) -> IStorage:
        with driver("postgres", "s3"):
            from .meta_store.postgres import PostgresMetaStore
            from .resource_store.s3 import S3ResourceStore
        meta_store = PostgresMetaStore(self.pg_dsn, table_name=f"meta_{model_name}", password=self.password)
        resource_store = S3ResourceStore(
            self.s3_bucket,
            f"{self.prefix}{model_name}/",
            self.s3_endpoint,
            self.s3_access_key,
            self.s3_secret_key,
            self.region_name,
        )
        return SimpleStorage(meta_store, resource_store)


class RedisPgStorageFactory(IStorageFactory):
    """Metadata and index in PostgreSQL, in tables that begin with `meta_{model}`, and before it a cache in Redis below `{prefix}{model}:`; bodies on
    disk below `{data_dir}/{model}`, or on S3 below `{prefix}{model}/`. Durable; any number of processes may share all of it, and with S3 machines.

    data_dir, s3_bucket   exactly one of them
    lease_s               how long a write waits where Redis cannot be asked
    Without keys the ambient credentials of AWS are used; `password` makes passwords for PostgreSQL that expire.
    """

    def __init__(
        self,
        redis_url: str | Secret,
        pg_dsn: str | Secret,
        data_dir: str | Path | None = None,
        *,
        s3_bucket: str | None = None,
        s3_endpoint: str | Secret | None = None,
        s3_access_key: str | None = None,
        s3_secret_key: str | Secret | None = None,
        region_name: str | None = "us-east-1",
        prefix: str = "",
        password: Callable[[], str] | None = None,
        lease_s: float = 2.0,
    ) -> None:
        if (data_dir is None) == (s3_bucket is None):
            raise ConfigError("bodies are kept in one place: expected either data_dir or s3_bucket")
        self.redis_url, self.pg_dsn, self.password, self.lease_s = hidden(redis_url), hidden(pg_dsn), password, lease_s
        self.data_dir = None if data_dir is None else Path(data_dir)
        self.s3_bucket, self.region_name, self.prefix = s3_bucket, region_name, prefix
        self.s3_endpoint = hidden(s3_endpoint)
        self.s3_access_key, self.s3_secret_key = s3_access_key, hidden(s3_secret_key)

    def build(self, model_name: str) -> IStorage:
        with driver("postgres", "redis"):
            from .meta_store.fast_slow import FastSlowMetaStore
            from .meta_store.postgres import PostgresMetaStore
            from .meta_store.redis import RedisMetaStore

            fast_store = RedisMetaStore(self.redis_url, prefix=f"{self.prefix}{model_name}:")
        slow_store = PostgresMetaStore(self.pg_dsn, table_name=f"meta_{model_name}", password=self.password)
        meta_store = FastSlowMetaStore(fast_store, slow_store, lease_s=self.lease_s)
        return SimpleStorage(meta_store, self._bodies(model_name))

    def _bodies(self, model_name: str) -> ResourceStore:
        if self.data_dir is not None:
            return DiskResourceStore(self.data_dir / model_name)
        from .resource_store.s3 import S3ResourceStore

        assert self.s3_bucket is not None
        return S3ResourceStore(
            self.s3_bucket,
            f"{self.prefix}{model_name}/",
            self.s3_endpoint,
            self.s3_access_key,
            self.s3_secret_key,
            self.region_name,
        )


class CachedS3StorageFactory(IStorageFactory):
    """A MemoryMetaStore over S3 behind two caches: bodies and index lie below `{prefix}{model}/`, copies of bodies in this process's memory and below
    `{cache_dir}/{model}`. Durable; any number of processes and machines may share the bucket, and see each other's writes within seconds.

    Without keys the ambient credentials of AWS are used.
    """

    def __init__(
        self,
        s3_bucket: str,
        s3_endpoint: str | Secret | None,
        cache_dir: str | Path,
        s3_access_key: str | None = None,
        s3_secret_key: str | Secret | None = None,
        *,
        region_name: str | None = "us-east-1",
        prefix: str = "",
    ) -> None:
        self.s3_bucket, self.region_name, self.prefix = s3_bucket, region_name, prefix
        self.s3_endpoint = hidden(s3_endpoint)
        self.s3_access_key, self.s3_secret_key = s3_access_key, hidden(s3_secret_key)
        self.cache_dir = Path(cache_dir)

    def build(self, model_name: str) -> IStorage:
        with driver("s3", "cache"):
            from .resource_store.cache import DiskCache, MemoryCache
            from .resource_store.cached_s3 import CachedS3ResourceStore

            caches = [MemoryCache(max_size=100), DiskCache(self.cache_dir / model_name)]
        resource_store = CachedS3ResourceStore(
            caches,
            bucket=self.s3_bucket,
            prefix=f"{self.prefix}{model_name}/",
            endpoint_url=self.s3_endpoint,
            access_key_id=self.s3_access_key,
            secret_access_key=self.s3_secret_key,
            region_name=self.region_name,
        )
        return SimpleStorage(MemoryMetaStore(), resource_store)


class MQCachedS3StorageFactory(IStorageFactory):
    """As CachedS3StorageFactory, and instances tell each other through RabbitMQ what they wrote and purged: a write is seen within a second.

    s3_config   arguments of S3ResourceStore; a `prefix` in it comes before that of each model
    amqp_url    amqp:// or amqps:// (TLS), with user and password
    """

    def __init__(
        self,
        s3_config: dict[str, Any],
        cache_dir: str | Path,
        amqp_url: str | Secret = "amqp://guest:guest@localhost:5672",
    ) -> None:
        self.s3_config, self.cache_dir, self.amqp_url = dict(s3_config), Path(cache_dir), hidden(amqp_url)
        for name in ("endpoint_url", "secret_access_key"):
            if name in self.s3_config:
                self.s3_config[name] = hidden(self.s3_config[name])

    def build(self, model_name: str) -> IStorage:
        with driver("s3", "cache", "amqp"):
            import aio_pika  # noqa: F401 - the store would, when it is made

            from .resource_store.cache import DiskCache, MemoryCache
            from .resource_store.mq_cached_s3 import MQCachedS3ResourceStore

            caches = [MemoryCache(max_size=100), DiskCache(self.cache_dir / model_name)]
        prefix = self.s3_config.get("prefix", "")
        resource_store = MQCachedS3ResourceStore(
            caches,
            self.amqp_url,
            f"autocrud_{model_name}_",
            ttl_draft=1800,
            ttl_stable=3600,
            **{**self.s3_config, "prefix": f"{prefix}{model_name}/"},
        )
        return SimpleStorage(MemoryMetaStore(), resource_store)
