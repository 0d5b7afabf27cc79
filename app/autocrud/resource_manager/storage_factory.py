"""One factory for each kind of storage, and one for any pair of stores. Where they put data is in `storage.layout`.

Your own factory takes a dozen lines:

    class MyStorageFactory(IStorageFactory):
        def build(self, model_name: str) -> IStorage:
            return SimpleStorage(MemoryMetaStore(), DiskResourceStore(rootdir=f"data/{model_name}"))

Each factory of this module puts data where the kind of the same name does (`CRUDSTACK_STORAGE`), so a kind and its
factory open each other's stores. `prefix` of a factory is taken as it is; CRUDSTACK_PREFIX gets a slash at its end.

If access keys are not given, the ambient credentials of AWS are used.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from typing_extensions import override

from ..errors import ConfigError
from ..secret import Secret
from .basic import Encoding, IStorage
from .meta_store.simple import MemoryMetaStore
from .resource_store.simple import MemoryResourceStore
from .storage.former_layout import WhenFormer
from .storage.simple_storage import SimpleStorage
from .storage.stores_by_name import StoresByName

if TYPE_CHECKING:
    from .backends.s3.object_store import ObjectStore
    from .meta_store.sqlite3 import Consistency


class IStorageFactory(ABC):
    """Makes the storage of each model."""

    @abstractmethod
    def build(self, model_name: str) -> IStorage:
        """Return the storage of a model. Does no I/O; the first use does.

        model_name  in kebab-case, as in the URL of the model
        """


class MemoryStorageFactory(IStorageFactory):
    """Everything in this process's memory: fast, and gone with the process."""

    def __init__(self, encoding: Encoding | None = None) -> None:
        self.encoding = encoding

    @override
    def build(self, model_name: str) -> IStorage:
        return SimpleStorage(MemoryMetaStore(self.encoding), MemoryResourceStore(self.encoding))


class PairStorageFactory(StoresByName, IStorageFactory):
    """Any MetaStore with any ResourceStore, by name. The arguments are those of StoresByName.

    PairStorageFactory("postgres", "disk", pg_dsn="postgresql://user:password@host/database", data_dir="data")
    """

    @override
    def build(self, model_name: str) -> IStorage:
        stores = self.meta_store(model_name), self.resource_store(model_name)
        return SimpleStorage(*stores, before_open=self.check_of_former_layout(model_name))


class DiskStorageFactory(PairStorageFactory):
    """SQLite files below `{rootdir}/{model}/`. Durable. Several processes of one machine may share the directory."""

    def __init__(self, rootdir: str | Path) -> None:
        super().__init__("disk", "disk", data_dir=rootdir)


class MemoryDiskStorageFactory(PairStorageFactory):
    """An index in memory over bodies and records on disk, rebuilt at start. Durable. One process owns the directory."""

    def __init__(self, data_dir: str | Path) -> None:
        super().__init__("memory", "disk", data_dir=data_dir)


class S3StorageFactory(PairStorageFactory):
    """The kind `s3-sqlite`: a SQLite index whose durable home is the bucket, bodies beside it.

    Any number of processes and machines may share the bucket.

    prefix                  begins all keys
    local_dir, consistency  see S3SqliteMetaStore
    sync_interval           the same; None if nothing may run between requests
    object_store            a client of the bucket, instead of endpoint, keys and region
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
        super().__init__(
            "s3-sqlite",
            "s3",
            prefix=prefix,
            bucket=bucket,
            endpoint_url=endpoint_url,
            access_key_id=access_key_id,
            secret_access_key=secret_access_key,
            region_name=region_name,
            object_store=object_store,
            local_dir=local_dir,
            consistency=consistency,
            sync_interval=sync_interval,
        )


class PostgresS3StorageFactory(PairStorageFactory):
    """The kind `postgres-s3`: metadata and index in PostgreSQL, bodies on S3.

    Any number of processes and machines may share both.

    prefix         begins the keys of bodies, and is part of the names of tables
    password       makes the password of each new connection, if passwords expire
    max_size       connections of this process at most
    object_store   a client of the bucket, instead of endpoint, keys and region
    former_layout  "open": tables `meta_{model}` whatever the prefix, as earlier releases named them
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
        max_size: int | None = None,
        object_store: ObjectStore | None = None,
        former_layout: WhenFormer = "refuse",
    ) -> None:
        super().__init__(
            "postgres",
            "s3",
            prefix=prefix,
            bucket=s3_bucket,
            endpoint_url=s3_endpoint,
            access_key_id=s3_access_key,
            secret_access_key=s3_secret_key,
            region_name=region_name,
            object_store=object_store,
            pg_dsn=pg_dsn,
            password=password,
            max_size=max_size,
            former_layout=former_layout,
        )


class RedisPgStorageFactory(PairStorageFactory):
    """The kind `redis-postgres`: PostgreSQL, a cache in Redis before it, bodies on S3 or on disk.

    Any number of processes may share all of it, and machines too if bodies are on S3.

    data_dir, s3_bucket  exactly one of them
    prefix               begins the keys in Redis and of bodies on S3, and is part of the names of tables
    password             makes the password of each new connection to PostgreSQL, if passwords expire
    redis_password       the same for Redis
    max_size             connections of this process to PostgreSQL at most
    lease_s              how many seconds a write waits at most if Redis does not answer
    object_store         a client of the bucket, instead of endpoint, keys and region
    former_layout        "open": tables `meta_{model}` whatever the prefix, as earlier releases named them
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
        redis_password: Callable[[], str] | None = None,
        max_size: int | None = None,
        lease_s: float = 2.0,
        object_store: ObjectStore | None = None,
        former_layout: WhenFormer = "refuse",
    ) -> None:
        if (data_dir is None) == (s3_bucket is None):
            raise ConfigError("bodies are kept in one place: expected either data_dir or s3_bucket")
        super().__init__(
            "redis-postgres",
            "s3" if data_dir is None else "disk",
            prefix=prefix,
            data_dir=data_dir,
            bucket=s3_bucket,
            endpoint_url=s3_endpoint,
            access_key_id=s3_access_key,
            secret_access_key=s3_secret_key,
            region_name=region_name,
            object_store=object_store,
            pg_dsn=pg_dsn,
            password=password,
            max_size=max_size,
            redis_url=redis_url,
            redis_password=redis_password,
            lease_s=lease_s,
            former_layout=former_layout,
        )


class CachedS3StorageFactory(PairStorageFactory):
    """The kind `cached-s3`: `s3-sqlite` with caches of bodies in memory and on disk.

    Any number of processes and machines may share the bucket. The seed's example of the same name keeps its index
    beside the bodies instead. `former_layout="open"` does that too.

    cache_dir        of the cache on disk, one for all models; None: cache in memory only
    prefix           begins all keys
    max_cache_bytes  that the cache on disk takes at most; None: a quarter of its disk, and 1 GiB at most
    local_dir        of the local copies of the index, see S3SqliteMetaStore
    sync_interval    the same; None if nothing may run between requests
    object_store     a client of the bucket, instead of endpoint, keys and region
    former_layout    "open": bodies below `{prefix}{model}/` and the index beside them, as in earlier releases
    """

    def __init__(
        self,
        s3_bucket: str,
        s3_endpoint: str | Secret | None,
        cache_dir: str | Path | None,
        s3_access_key: str | None = None,
        s3_secret_key: str | Secret | None = None,
        *,
        region_name: str | None = "us-east-1",
        prefix: str = "",
        max_cache_bytes: int | None = None,
        local_dir: str | Path | None = None,
        sync_interval: float | None = 5.0,
        object_store: ObjectStore | None = None,
        former_layout: WhenFormer = "refuse",
    ) -> None:
        super().__init__(
            _meta_over_caches(former_layout),
            "cached-s3",
            prefix=prefix,
            bucket=s3_bucket,
            endpoint_url=s3_endpoint,
            access_key_id=s3_access_key,
            secret_access_key=s3_secret_key,
            region_name=region_name,
            object_store=object_store,
            local_dir=local_dir,
            sync_interval=sync_interval,
            cache_dir=cache_dir,
            max_cache_bytes=max_cache_bytes,
            former_layout=former_layout,
        )


class MQCachedS3StorageFactory(PairStorageFactory):
    """The kind `mq-cached-s3`: `cached-s3` with instances that tell each other their writes through RabbitMQ.

    The seed's example of the same name keeps its index beside the bodies, and names its exchange
    `autocrud_{model}_invalidations`. `former_layout="open"` does that too.

    s3_config  arguments of S3ResourceStore, `bucket` and `prefix` among them; `prefix` begins the keys of all models
    cache_dir  of the cache on disk, one for all models; None: cache in memory only
    amqp_url   amqp:// or amqps:// (TLS), with user and password, or a function that makes it for each connection
    max_cache_bytes, local_dir, sync_interval, former_layout
               see CachedS3StorageFactory
    """

    def __init__(
        self,
        s3_config: dict[str, Any],
        cache_dir: str | Path | None,
        amqp_url: str | Secret | Callable[[], str] = "amqp://guest:guest@localhost:5672",
        *,
        max_cache_bytes: int | None = None,
        local_dir: str | Path | None = None,
        sync_interval: float | None = 5.0,
        former_layout: WhenFormer = "refuse",
    ) -> None:
        super().__init__(
            _meta_over_caches(former_layout),
            "mq-cached-s3",
            **s3_config,
            local_dir=local_dir,
            sync_interval=sync_interval,
            amqp_url=amqp_url,
            cache_dir=cache_dir,
            max_cache_bytes=max_cache_bytes,
            former_layout=former_layout,
        )


class FullStorageFactory(PairStorageFactory):
    """The kind `full`: PostgreSQL with a cache in Redis before it, bodies on S3 behind caches, and RabbitMQ.

    The arguments are those of RedisPgStorageFactory and MQCachedS3StorageFactory.
    """

    def __init__(
        self,
        redis_url: str | Secret,
        pg_dsn: str | Secret,
        s3_config: dict[str, Any],
        cache_dir: str | Path | None,
        amqp_url: str | Secret | Callable[[], str] = "amqp://guest:guest@localhost:5672",
        *,
        password: Callable[[], str] | None = None,
        redis_password: Callable[[], str] | None = None,
        max_size: int | None = None,
        lease_s: float = 2.0,
        max_cache_bytes: int | None = None,
    ) -> None:
        super().__init__(
            "redis-postgres",
            "mq-cached-s3",
            **s3_config,
            pg_dsn=pg_dsn,
            password=password,
            max_size=max_size,
            redis_url=redis_url,
            redis_password=redis_password,
            lease_s=lease_s,
            amqp_url=amqp_url,
            cache_dir=cache_dir,
            max_cache_bytes=max_cache_bytes,
        )


def _meta_over_caches(former_layout: WhenFormer) -> str:
    """Return the name of the MetaStore of the cached factories. Above memory, the index lies beside the bodies."""
    return "memory" if former_layout == "open" else "s3-sqlite"
