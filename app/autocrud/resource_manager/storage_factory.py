"""One factory for each kind of storage. Your own takes a dozen lines:

class MyStorageFactory(IStorageFactory):
    def build(self, model_name: str) -> IStorage:
        return SimpleStorage(MemoryMetaStore(), DiskResourceStore(rootdir=f"data/{model_name}"))
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import ConfigError
from .basic import Encoding, IStorage
from .meta_store.simple import DiskMetaStore, MemoryMetaStore
from .resource_store.simple import DiskResourceStore, MemoryResourceStore
from .simple_storage import SimpleStorage

if TYPE_CHECKING:
    from .meta_store.sqlite3 import Consistency
    from .object_store import ObjectStore


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
        endpoint_url: str | None = None,
        access_key_id: str | None = None,
        secret_access_key: str | None = None,
        region_name: str | None = "us-east-1",
        *,
        prefix: str = "",
        local_dir: str | Path | None = None,
        consistency: Consistency = "strong",
        sync_interval: float | None = 5.0,
        object_store: ObjectStore | None = None,
    ) -> None:
        self.bucket, self.prefix, self.endpoint_url, self.region_name = bucket, prefix, endpoint_url, region_name
        self.access_key_id, self.secret_access_key = access_key_id, secret_access_key
        self.local_dir, self.consistency, self.sync_interval = local_dir, consistency, sync_interval
        self.object_store = object_store

    def build(self, model_name: str) -> IStorage:
        from .meta_store.sqlite3 import S3SqliteMetaStore
        from .object_store import s3
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
        pg_dsn: str,
        s3_bucket: str,
        s3_endpoint: str | None = None,
        s3_access_key: str | None = None,
        s3_secret_key: str | None = None,
        *,
        region_name: str | None = "us-east-1",
        prefix: str = "",
        password: Callable[[], str] | None = None,
    ) -> None:
        self.pg_dsn, self.password = pg_dsn, password
        self.s3_bucket, self.s3_endpoint, self.region_name, self.prefix = s3_bucket, s3_endpoint, region_name, prefix
        self.s3_access_key, self.s3_secret_key = s3_access_key, s3_secret_key

    def build(self, model_name: str) -> IStorage:
        from .resource_store.s3 import S3ResourceStore

        try:
            from .meta_store.postgres import PostgresMetaStore
        except ImportError as error:
            raise ConfigError(f"PostgreSQL needs the package {error.name}: install crudstack[postgres]") from None
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
