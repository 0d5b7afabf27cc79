"""One factory for each kind of storage, and one for any pair of stores. `storage.layout` says where they put data.

A factory of your own takes a few lines:

    class MyStorageFactory(IStorageFactory):
        def build(self, model_name: str) -> IStorage:
            bodies, files = DiskResourceStore(f"data/{model_name}"), DiskBlobStore(f"data/{model_name}/blobs")
            return SimpleStorage(MemoryMetaStore(), bodies, files)

Each factory of this module uses the same locations as the kind of storage of the same name (CRUDSTACK_STORAGE). So a
factory can open the stores of its kind, and the reverse. The `prefix` of a factory is used unchanged. The prefix in
CRUDSTACK_PREFIX gets a slash at its end if it has none. `keep_uploads_s` is the number of seconds for which an upload
is kept that no revision refers to. `public_url` is the address of the S3 server in presigned URLs, if clients do not
reach it by the one that this process uses.

If no access keys are given, the AWS credentials of the environment are used.
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
from .storage.blobs import KEEP_UPLOADS_S
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


class PairStorageFactory(StoresByName, IStorageFactory):
    """Any MetaStore with any ResourceStore, by name. The arguments are those of StoresByName.

    The files of a model are kept in the same place as its bodies.

    PairStorageFactory("postgres", "disk", pg_dsn="postgresql://user:password@host/database", data_dir="data")
    """

    @override
    def build(self, model_name: str) -> IStorage:
        return SimpleStorage(
            self.meta_store(model_name),
            self.resource_store(model_name),
            self.blob_store(model_name),
            before_open=self.check_of_former_layout(model_name),
            keep_uploads_s=self.keep_uploads_s,
        )


class MemoryStorageFactory(PairStorageFactory):
    """Keeps everything in the memory of this process. The data are lost when the process ends."""

    def __init__(self, encoding: Encoding | None = None, *, keep_uploads_s: float = KEEP_UPLOADS_S) -> None:
        super().__init__("memory", "memory", encoding=encoding, keep_uploads_s=keep_uploads_s)


class DiskStorageFactory(PairStorageFactory):
    """SQLite files below `{rootdir}/{model}/`. Durable. Several processes of one machine may share the directory."""

    def __init__(self, rootdir: str | Path, *, keep_uploads_s: float = KEEP_UPLOADS_S) -> None:
        super().__init__("disk", "disk", data_dir=rootdir, keep_uploads_s=keep_uploads_s)


class MemoryDiskStorageFactory(PairStorageFactory):
    """Bodies and records on disk, and an index in memory that is rebuilt from them at startup.

    Durable. Only one process at a time can use the directory.
    """

    def __init__(self, data_dir: str | Path, *, keep_uploads_s: float = KEEP_UPLOADS_S) -> None:
        super().__init__("memory", "disk", data_dir=data_dir, keep_uploads_s=keep_uploads_s)


class S3StorageFactory(PairStorageFactory):
    """The kind `s3-sqlite`: a SQLite index that is stored in the bucket, with the bodies beside it.

    Any number of processes and machines may share the bucket.

    prefix                  beginning of all keys
    local_dir, consistency  see S3SqliteMetaStore
    sync_interval           see S3SqliteMetaStore; None if no task may run between requests
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
        public_url: str | None = None,
        object_store: ObjectStore | None = None,
        keep_uploads_s: float = KEEP_UPLOADS_S,
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
            public_url=public_url,
            object_store=object_store,
            local_dir=local_dir,
            consistency=consistency,
            sync_interval=sync_interval,
            keep_uploads_s=keep_uploads_s,
        )


class PostgresS3StorageFactory(PairStorageFactory):
    """The kind `postgres-s3`: metadata and index in PostgreSQL, bodies on S3.

    Any number of processes and machines may share both.

    prefix         beginning of the keys of bodies, and a part of the names of tables
    password       function that returns the password for each new connection, if passwords expire
    max_size       largest number of connections of this process
    object_store   a client of the bucket, instead of endpoint, keys and region
    former_layout  "open": use the tables of earlier releases, `meta_{model}`, whose names lack the prefix
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
        public_url: str | None = None,
        object_store: ObjectStore | None = None,
        former_layout: WhenFormer = "refuse",
        keep_uploads_s: float = KEEP_UPLOADS_S,
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
            public_url=public_url,
            object_store=object_store,
            pg_dsn=pg_dsn,
            password=password,
            max_size=max_size,
            former_layout=former_layout,
            keep_uploads_s=keep_uploads_s,
        )


class RedisPgStorageFactory(PairStorageFactory):
    """The kind `redis-postgres`: PostgreSQL with a cache in Redis in front of it, and bodies on S3 or on disk.

    Any number of processes may share these stores. If bodies are on S3, several machines may share them too.

    data_dir, s3_bucket  the location of the bodies; give exactly one of these two
    prefix               beginning of the keys in Redis and of bodies on S3, and a part of the names of tables
    password             function that returns the password for each new connection to PostgreSQL, if passwords expire
    redis_password       function that returns the password for each new connection to Redis, if passwords expire
    max_size             largest number of connections of this process to PostgreSQL
    lease_s              longest time in seconds that a write waits if Redis does not answer
    object_store         a client of the bucket, instead of endpoint, keys and region
    former_layout        "open": use the tables of earlier releases, `meta_{model}`, whose names lack the prefix
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
        public_url: str | None = None,
        object_store: ObjectStore | None = None,
        former_layout: WhenFormer = "refuse",
        keep_uploads_s: float = KEEP_UPLOADS_S,
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
            public_url=public_url,
            object_store=object_store,
            pg_dsn=pg_dsn,
            password=password,
            max_size=max_size,
            redis_url=redis_url,
            redis_password=redis_password,
            lease_s=lease_s,
            former_layout=former_layout,
            keep_uploads_s=keep_uploads_s,
        )


class CachedS3StorageFactory(PairStorageFactory):
    """The kind `cached-s3`: `s3-sqlite` with caches of bodies in memory and on disk.

    Any number of processes and machines may share the bucket.

    cache_dir        directory of the cache on disk, which all models share; None: cache in memory only
    prefix           beginning of all keys
    max_cache_bytes  largest size of the cache on disk, in bytes; None: a quarter of its disk, but at most 1 GiB
    local_dir        directory of the local copies of the index, see S3SqliteMetaStore
    sync_interval    see S3SqliteMetaStore; None if no task may run between requests
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
        public_url: str | None = None,
        object_store: ObjectStore | None = None,
        former_layout: WhenFormer = "refuse",
        keep_uploads_s: float = KEEP_UPLOADS_S,
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
            public_url=public_url,
            object_store=object_store,
            local_dir=local_dir,
            sync_interval=sync_interval,
            cache_dir=cache_dir,
            max_cache_bytes=max_cache_bytes,
            former_layout=former_layout,
            keep_uploads_s=keep_uploads_s,
        )


class MQCachedS3StorageFactory(PairStorageFactory):
    """The kind `mq-cached-s3`: `cached-s3` whose instances announce their writes to each other through RabbitMQ.

    s3_config  arguments of S3ResourceStore, including `bucket`; `prefix` is the beginning of the keys of all models
    cache_dir  directory of the cache on disk, which all models share; None: cache in memory only
    amqp_url   amqp:// or amqps:// (TLS), with user and password, or a function that returns it for each connection
    max_cache_bytes, local_dir, sync_interval
               see CachedS3StorageFactory
    former_layout
               "open": the layout of earlier releases, as in CachedS3StorageFactory, and the exchange
               `autocrud_{model}_invalidations`
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
        keep_uploads_s: float = KEEP_UPLOADS_S,
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
            keep_uploads_s=keep_uploads_s,
        )


class FullStorageFactory(PairStorageFactory):
    """The kind `full`: PostgreSQL with a cache in Redis, bodies on S3 with caches, and RabbitMQ.

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
        keep_uploads_s: float = KEEP_UPLOADS_S,
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
            keep_uploads_s=keep_uploads_s,
        )


def _meta_over_caches(former_layout: WhenFormer) -> str:
    """Return the name of the MetaStore of the factories with caches.

    The name "memory" means an index beside the bodies: SimpleStorage replaces a MemoryMetaStore by it.
    """
    return "memory" if former_layout == "open" else "s3-sqlite"
