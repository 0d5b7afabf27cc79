"""From settings to stores: the same settings make the same stores everywhere.

A kind is a name for a pair, and a pair is a MetaStore and a ResourceStore by name. Where data lies depends on the pair
alone:

    disk         {data_dir}/{model}/meta/ and /data/; bodies below another MetaStore in {data_dir}/{model}/
    s3           {prefix}meta/{model}.sqlite/ and {prefix}data/{model}/; bodies below another MetaStore in {prefix}{model}/
    postgres     tables that begin with meta_{prefix}{model}
    redis        keys that begin with {prefix}{model}:
    cached, mq   as s3; copies in {data_dir}/cache/, messages through the exchange {prefix}{model}_invalidations
"""

from __future__ import annotations

import hashlib
import re
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from . import iam_auth as sign_in
from .autocrud.errors import ConfigError
from .autocrud.resource_manager.backends.s3 import profile as s3_profile
from .autocrud.resource_manager.basic import IStorage, MetaStore, ResourceStore
from .autocrud.resource_manager.core import SimpleStorage
from .autocrud.resource_manager.meta_store.simple import DiskMetaStore, MemoryMetaStore
from .autocrud.resource_manager.resource_store.simple import DiskResourceStore, MemoryResourceStore
from .autocrud.resource_manager.runtime.disk_space import space
from .autocrud.resource_manager.runtime.drivers import driver
from .autocrud.resource_manager.storage_factory import IStorageFactory
from .autocrud.secret import Secret
from .settings import KINDS, PRESETS, Pair, Settings, Storage

if TYPE_CHECKING:
    from .autocrud.resource_manager.backends.s3.object_store import ObjectStore
    from .autocrud.resource_manager.meta_store.postgres import PostgresMetaStore
    from .autocrud.resource_manager.meta_store.redis import RedisMetaStore
    from .autocrud.resource_manager.resource_store.cache import Cache

T = TypeVar("T")

RDS_CERTIFICATES = Path(__file__).with_name("rds-ca.pem")
"""What RDS is verified with, if somebody has put AWS's bundle there."""
CACHED_BODIES = 1000
MOST_CACHED = 1024**3
"""Bytes that the cache on disk of all models takes at most, if nothing else is said."""
CACHE_NAME = "all-models"


class WiredStorageFactory(IStorageFactory):
    """The stack's storage for every model, but for those with one of their own."""

    def __init__(self, default: IStorageFactory, overrides: dict[str, IStorageFactory]) -> None:
        self.default, self.overrides = default, overrides

    def build(self, model_name: str) -> IStorage:
        return self.overrides.get(model_name, self.default).build(model_name)


class PairStorageFactory(IStorageFactory):
    """A MetaStore and a ResourceStore for each model."""

    def __init__(self, meta: Callable[[str], MetaStore], resource: Callable[[str], ResourceStore]) -> None:
        self._meta, self._resource = meta, resource

    def build(self, model_name: str) -> IStorage:
        return SimpleStorage(self._meta(model_name), self._resource(model_name))


def storage_factory(settings: Settings, *, idle_work: bool = True) -> WiredStorageFactory:
    """ConfigError names a setting that is missing. `idle_work`: whether anything may run between requests."""
    outputs = settings.outputs

    def make(storage: Storage) -> PairStorageFactory:
        return _Maker(storage, settings, idle_work=idle_work).factory()

    return WiredStorageFactory(
        make(outputs.storage), {model: make(storage) for model, storage in outputs.storage_overrides.items()}
    )


def pairs(settings: Settings) -> list[Pair]:
    """The pairs that any model is stored in."""
    outputs = settings.outputs
    return [pair_of(storage, settings) for storage in (outputs.storage, *outputs.storage_overrides.values())]


def region_of(settings: Settings) -> str:
    """Return the AWS region: of the stack, else of AWS_REGION, AWS_DEFAULT_REGION or the profile in use, else us-east-1."""
    return region_or_default(settings.outputs.region)


def region_or_default(given: str | None) -> str:
    """Return a region that was given, else that of AWS_REGION, AWS_DEFAULT_REGION or the profile in use, else us-east-1."""
    return given or s3_profile.region() or "us-east-1"


def checked_prefix(prefix: str) -> str:
    """Return a prefix of keys, empty or with a slash at its end. Raises ConfigError if a key cannot begin with it."""
    if re.fullmatch(r"([A-Za-z0-9_-][A-Za-z0-9._-]*(/|$))*", prefix) is None:
        raise ConfigError(
            f"the prefix {'has an @' if '@' in prefix else f'is {prefix!r}'}: expected names of letters, digits, '.', '_' and '-' with '/' between them,"
            " like team/app"
        )
    return prefix and f"{prefix.rstrip('/')}/"


def needs_s3(settings: Settings) -> bool:
    """Whether any model is stored on S3."""
    return any(pair.meta == "s3-sqlite" or pair.resource.endswith("s3") for pair in pairs(settings))


def pair_of(storage: Storage, settings: Settings) -> Pair:
    """The pair that a kind is; ConfigError for one that would lose data."""
    if isinstance(storage, str):
        if storage == "redis-postgres" and settings.outputs.bucket is None:
            return Pair(meta="redis-postgres", resource="disk")
        return PRESETS[storage]
    if storage.resource == "memory" and storage.meta != "memory":
        raise ConfigError(
            f"storage {{meta: {storage.meta}, resource: memory}} is no pair that keeps what it lists; expected a resource store that"
            f" outlives the process, or one of {', '.join(KINDS)}"
        )
    return storage


class _Maker:
    """Makes the stores of one pair. `kind`: what the person called it."""

    def __init__(self, storage: Storage, settings: Settings, *, idle_work: bool) -> None:
        self.pair = pair_of(storage, settings)
        self.kind = (
            storage if isinstance(storage, str) else f"{{meta: {self.pair.meta}, resource: {self.pair.resource}}}"
        )
        self._settings = settings
        self.outputs, self.local, self.idle_work = settings.outputs, settings.local, idle_work
        self.prefix = checked_prefix(self.outputs.prefix)

    def factory(self) -> PairStorageFactory:
        return PairStorageFactory(self._meta(), self._resource())

    # MetaStores

    def _meta(self) -> Callable[[str], MetaStore]:
        match self.pair.meta:
            case "memory":
                return lambda _: MemoryMetaStore()
            case "disk":
                root = self._data_dir()
                return lambda model: DiskMetaStore(root / model / "meta")
            case "s3-sqlite":
                return self._s3_sqlite()
            case "postgres":
                return self._postgres()
            case "redis":
                return self._redis()
            case "redis-postgres":
                from .autocrud.resource_manager.meta_store.fast_slow import FastSlowMetaStore

                fast, slow = self._redis(), self._postgres()
                return lambda model: FastSlowMetaStore(fast(model), slow(model))

    def _s3_sqlite(self) -> Callable[[str], MetaStore]:
        with driver("s3"):
            from .autocrud.resource_manager.meta_store.sqlite3 import S3SqliteMetaStore
        bucket, objects, copies = self._bucket(), self._objects(), self._beside_s3("copies")
        return lambda model: S3SqliteMetaStore(
            bucket,
            f"{self.prefix}meta/{model}.sqlite",
            sync_interval=5.0 if self.idle_work else None,
            local_dir=copies,
            object_store=objects,
        )

    def _postgres(self) -> Callable[[str], PostgresMetaStore]:
        with driver("postgres"):
            from .autocrud.resource_manager.backends.postgres.pool import MAX_SIZE
            from .autocrud.resource_manager.meta_store.postgres import PostgresMetaStore
        dsn: str | Secret
        password, db = None, self.outputs.db
        if self.local.pg_dsn is None and db is not None:
            dsn = sign_in.postgres_dsn(db, str(RDS_CERTIFICATES) if RDS_CERTIFICATES.exists() else None)
            password = sign_in.postgres_password(db, self._region())
        else:
            dsn = self._given(self.local.pg_dsn, "CRUDSTACK_PG_DSN", "its metadata in that database")
        # A function serves one request at a time: a connection for it, and one for what it leaves running.
        size = MAX_SIZE if self.idle_work else 2
        return lambda model: PostgresMetaStore(
            dsn, table_name=f"meta_{self.prefix}{model}", password=password, max_size=size
        )

    def _redis(self) -> Callable[[str], RedisMetaStore]:
        with driver("redis"):
            from .autocrud.resource_manager.meta_store.redis import RedisMetaStore
        url: str | Secret
        password, cache = None, self.outputs.cache
        if self.local.redis_url is None and cache is not None:
            url, password = sign_in.redis_url(cache), sign_in.redis_password(cache, self._region())
        else:
            url = self._given(self.local.redis_url, "CRUDSTACK_REDIS_URL", "metadata in that server")
        return lambda model: RedisMetaStore(url, f"{self.prefix}{model}:", password=password)

    # ResourceStores

    def _resource(self) -> Callable[[str], ResourceStore]:
        match self.pair.resource:
            case "memory":
                return lambda _: MemoryResourceStore()
            case "disk":
                root, below = self._data_dir(), "data" if self.pair.meta == "disk" else ""
                return lambda model: DiskResourceStore(root / model / below)
            case "s3":
                return self._s3()
            case "cached-s3":
                return self._cached_s3()
            case "mq-cached-s3":
                return self._mq_cached_s3()

    def _bodies(self) -> str:
        """What the prefixes of bodies begin with. Of two deployments whose prefixes differ none may get another's: each would take all of the
        other's bodies for orphans."""
        if self.pair.meta == "s3-sqlite":
            return f"{self.prefix}data/"
        if f"/{self.prefix}".endswith("/data/"):
            raise ConfigError(
                f"the prefix is {self.outputs.prefix!r}: bodies of {self.kind!r} would lie where those of 's3-sqlite' do whose prefix ends before"
                " 'data', and each would remove the other's: expected another name than data at its end"
            )
        return self.prefix

    def _s3(self) -> Callable[[str], ResourceStore]:
        with driver("s3"):
            from .autocrud.resource_manager.resource_store.s3 import S3ResourceStore
        bucket, objects, bodies = self._bucket(), self._objects(), self._bodies()
        return lambda model: S3ResourceStore(bucket, f"{bodies}{model}/", object_store=objects)

    def _cached_s3(self) -> Callable[[str], ResourceStore]:
        with driver("s3", "cache"):
            from .autocrud.resource_manager.resource_store.cached_s3 import CachedS3ResourceStore
        bucket, objects, bodies, caches = self._bucket(), self._objects(), self._bodies(), self._caches()
        return lambda model: CachedS3ResourceStore(
            caches(model), bucket=bucket, prefix=f"{bodies}{model}/", object_store=objects
        )

    def _mq_cached_s3(self) -> Callable[[str], ResourceStore]:
        with driver("s3", "cache", "amqp"):
            import aio_pika  # noqa: F401 - the store would, when it is made

            from .autocrud.resource_manager.resource_store.mq_cached_s3 import MQCachedS3ResourceStore
        bucket, objects, bodies, caches = self._bucket(), self._objects(), self._bodies(), self._caches()
        url: Secret | Callable[[], str]
        if self.local.amqp_url is None and self.outputs.broker is not None:
            url = sign_in.amqp_url(self.outputs.broker, self._region())
        else:
            url = self._given(self.local.amqp_url, "CRUDSTACK_AMQP_URL", "its caches in step through that broker")
        return lambda model: MQCachedS3ResourceStore(
            caches(model),
            url,
            f"{self.prefix}{model}_",
            bucket=bucket,
            prefix=f"{bodies}{model}/",
            object_store=objects,
        )

    def _caches(self) -> Callable[[str], list[Cache]]:
        from .autocrud.resource_manager.resource_store.cache import DiskCache, MemoryCache

        root = self._beside_s3("cache")
        if root is None and not self.idle_work:  # a function has a disk of its own, which lives as long as it does
            root = Path(tempfile.gettempdir()) / "crudstack-cache"
        if root is None:
            return lambda _: [MemoryCache(max_size=CACHED_BODIES)]
        # One for all models, so that they have one bound and the least recently used entry of them all goes first.
        disk = DiskCache(root / CACHE_NAME, max_bytes=self._cache_bytes(root))

        def made(model: str) -> list[Cache]:
            former = root / model  # of earlier releases, which had one for each model
            if model != CACHE_NAME and (former / "lock").exists():
                shutil.rmtree(former, ignore_errors=True)
            return [MemoryCache(max_size=CACHED_BODIES), disk]

        return made

    def _cache_bytes(self, root: Path) -> int:
        """Return what the cache on disk may count, so that it takes no more room than it was given, or than a quarter of the disk.

        A value in a file is counted with its bytes, from 32 KB. On disk it takes up to three blocks of 4 KB more: the
        last one of the file, and two directories.
        """
        given = self.local.cache_mb
        room = given * 1024**2 if given is not None else min(space(root).total // 4, MOST_CACHED)
        return room * 32 // (32 + 3 * 4)

    # Settings

    def _given(self, value: T | None, variable: str, keeps: str) -> T:
        if value is None:
            raise ConfigError(f"{variable} is not set: storage {self.kind!r} keeps {keeps}")
        return value

    def _data_dir(self) -> Path:
        # Resolved now, so that a later change of the working directory does not move the data.
        given = self._given(self.local.data_dir, "CRUDSTACK_DATA_DIR", "its data in that directory")
        return Path(given).expanduser().absolute()

    def _beside_s3(self, name: str) -> Path | None:
        """A directory for what can be made again from this bucket."""
        if self.local.data_dir is None:
            return None
        where = hashlib.sha256(f"{self.local.s3_endpoint_url}".encode()).hexdigest()[:8]
        return self._data_dir() / name / where

    def _bucket(self) -> str:
        return self._given(self.outputs.bucket, "CRUDSTACK_BUCKET", "its data in that bucket")

    def _objects(self) -> ObjectStore:
        from .autocrud.resource_manager.backends.s3.object_store import s3

        return s3(self._bucket(), self.local.s3_endpoint_url, region_name=self._region())

    def _region(self) -> str:
        return region_of(self._settings)
