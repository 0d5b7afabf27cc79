"""Creates stores from settings. The same settings give the same stores everywhere.

A kind is a name for a pair: a MetaStore and a ResourceStore by name. This module turns settings into the arguments of
PairStorageFactory. `autocrud.resource_manager.storage.layout` defines where the stores keep their data.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Literal, TypeVar

from typing_extensions import override

from . import iam_auth
from .autocrud.errors import ConfigError
from .autocrud.resource_manager.backends.s3 import profile as s3_profile
from .autocrud.resource_manager.basic import IStorage
from .autocrud.resource_manager.storage.blobs import KEEP_UPLOADS_S
from .autocrud.resource_manager.storage.layout import FUNCTION_CACHE, beside_s3
from .autocrud.resource_manager.storage_factory import IStorageFactory, PairStorageFactory
from .autocrud.secret import Secret
from .settings import KINDS, PRESETS, RESOURCE_TRAITS, Pair, Settings, Storage

T = TypeVar("T")

RDS_CERTIFICATES = Path(__file__).with_name("rds-ca.pem")
"""AWS's bundle of CA certificates. Without this file, connections to RDS are encrypted, but RDS is not verified."""


class WiredStorageFactory(IStorageFactory):
    """The storage of the stack for every model, except models with an override."""

    def __init__(self, default: IStorageFactory, overrides: dict[str, IStorageFactory]) -> None:
        self.default, self.overrides = default, overrides

    @override
    def build(self, model_name: str) -> IStorage:
        return self.overrides.get(model_name, self.default).build(model_name)


def storage_factory(settings: Settings, *, idle_work: bool = True) -> WiredStorageFactory:
    """Return the storage factory of all models. Raises ConfigError, which names a missing or wrong setting.

    idle_work  whether background work may run between requests
    """
    outputs = settings.outputs

    def make(storage: Storage) -> PairStorageFactory:
        return _Maker(storage, settings, idle_work=idle_work).factory()

    return WiredStorageFactory(
        make(outputs.storage), {model: make(storage) for model, storage in outputs.storage_overrides.items()}
    )


def pairs(settings: Settings) -> list[Pair]:
    """Return the pairs that models are stored in."""
    outputs = settings.outputs
    return [pair_of(storage, settings) for storage in (outputs.storage, *outputs.storage_overrides.values())]


def region_of(settings: Settings) -> str:
    """Return the AWS region of the stack, else that of the environment or the profile in use, else us-east-1."""
    return region_or_default(settings.outputs.region)


def region_or_default(given: str | None) -> str:
    """Return the given region, else that of AWS_REGION, AWS_DEFAULT_REGION or the profile in use, else us-east-1."""
    return given or s3_profile.region() or "us-east-1"


def checked_prefix(prefix: str) -> str:
    """Return a prefix of keys, empty or with a slash at its end. Raises ConfigError if it is invalid."""
    if re.fullmatch(r"([A-Za-z0-9_-][A-Za-z0-9._-]*(/|$))*", prefix) is None:
        raise ConfigError(
            f"the prefix {'has an @' if '@' in prefix else f'is {prefix!r}'}: expected names of letters, digits, '.',"
            " '_' and '-' with '/' between them, like team/app"
        )
    return prefix and f"{prefix.rstrip('/')}/"


def needs_s3(settings: Settings) -> bool:
    """Return whether any model is stored on S3."""
    return any(pair.uses_s3 for pair in pairs(settings))


def pair_of(storage: Storage, settings: Settings) -> Pair:
    """Return the pair that a kind names. Raises ConfigError for a pair that would lose data."""
    if isinstance(storage, str):
        if storage == "redis-postgres" and settings.outputs.bucket is None:
            return Pair(meta="redis-postgres", resource="disk")
        return PRESETS[storage]
    if storage.resource == "memory" and storage.meta != "memory":
        raise ConfigError(
            f"storage {{meta: {storage.meta}, resource: memory}} is no pair that keeps what it lists; expected a"
            f" resource store that outlives the process, or one of {', '.join(KINDS)}"
        )
    return storage


class _Maker:
    """Turns settings into the arguments of a factory. `storage` is the user's choice."""

    def __init__(self, storage: Storage, settings: Settings, *, idle_work: bool) -> None:
        self._pair = pair_of(storage, settings)
        self._kind = storage if isinstance(storage, str) else f"{{meta: {storage.meta}, resource: {storage.resource}}}"
        self._settings, self._idle_work = settings, idle_work
        self._outputs, self._local = settings.outputs, settings.local

    def factory(self) -> PairStorageFactory:
        """Return the factory of the pair. Raises ConfigError if a setting that the pair needs is missing or wrong."""
        meta, resource = self._pair.meta, self._pair.resource
        on_disk = "disk" in (meta, resource)
        hours = self._local.keep_uploads_hours
        servers, on_s3 = self._pair.servers, self._pair.uses_s3
        pg_dsn, password = self._postgres() if "postgres" in servers else (None, None)
        redis_url, redis_password = self._redis() if "cache" in servers else (None, None)
        return PairStorageFactory(
            meta,
            resource,
            prefix=checked_prefix(self._outputs.prefix),
            data_dir=self._data_dir() if on_disk else None,
            bucket=self._bucket() if on_s3 else None,
            endpoint_url=self._local.s3_endpoint_url,
            region_name=self._region() if on_s3 else None,
            public_url=self._local.s3_public_url,
            local_dir=self._beside_s3("copies"),
            sync_interval=5.0 if self._idle_work else None,
            pg_dsn=pg_dsn,
            password=password,
            # A function serves one request at a time: one connection for it, and one for tasks that it leaves running.
            max_size=None if self._idle_work else 2,
            redis_url=redis_url,
            redis_password=redis_password,
            amqp_url=self._amqp_url() if "broker" in servers else None,
            cache_dir=self._cache_dir() if RESOURCE_TRAITS[resource].is_cached else None,
            keep_uploads_s=KEEP_UPLOADS_S if hours is None else hours * 3600.0,
            max_cache_bytes=None if self._local.cache_mb is None else self._local.cache_mb * 1024**2,
        )

    def _postgres(self) -> tuple[str | Secret, Callable[[], str] | None]:
        db = self._outputs.db
        if self._local.pg_dsn is None and db is not None:
            dsn = iam_auth.postgres_dsn(db, str(RDS_CERTIFICATES) if RDS_CERTIFICATES.exists() else None)
            return dsn, iam_auth.postgres_password(db, self._region())
        return self._given(self._local.pg_dsn, "CRUDSTACK_PG_DSN", "its metadata in that database"), None

    def _redis(self) -> tuple[str | Secret, Callable[[], str] | None]:
        cache = self._outputs.cache
        if self._local.redis_url is None and cache is not None:
            return iam_auth.redis_url(cache), iam_auth.redis_password(cache, self._region())
        return self._given(self._local.redis_url, "CRUDSTACK_REDIS_URL", "metadata in that server"), None

    def _amqp_url(self) -> Secret | Callable[[], str]:
        broker = self._outputs.broker
        if self._local.amqp_url is None and broker is not None:
            return iam_auth.amqp_url(broker, self._region())
        return self._given(self._local.amqp_url, "CRUDSTACK_AMQP_URL", "its caches in step through that broker")

    def _cache_dir(self) -> Path | None:
        """Return the directory of the cache on disk, or None for a cache in memory only."""
        root = self._beside_s3("cache")
        if root is None and not self._idle_work:  # each instance of a function has its own disk
            return Path(tempfile.gettempdir()) / FUNCTION_CACHE
        return root

    def _beside_s3(self, what: Literal["copies", "cache"]) -> Path | None:
        if self._local.data_dir is None:
            return None
        return beside_s3(self._data_dir(), what, self._local.s3_endpoint_url)

    def _data_dir(self) -> Path:
        # Resolved now, so that a later change of the working directory does not move the data.
        given = self._given(self._local.data_dir, "CRUDSTACK_DATA_DIR", "its data in that directory")
        return Path(given).expanduser().absolute()

    def _region(self) -> str:
        return region_of(self._settings)

    def _bucket(self) -> str:
        return self._given(self._outputs.bucket, "CRUDSTACK_BUCKET", "its data in that bucket")

    def _given(self, value: T | None, variable: str, keeps: str) -> T:
        if value is None:
            raise ConfigError(f"{variable} is not set: storage {self._kind!r} keeps {keeps}")
        return value
