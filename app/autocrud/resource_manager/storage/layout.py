"""The locations of the data of all stores. The kinds in the settings and the factories both use this module.

    disk MetaStore      {data_dir}/{model}/meta/
    disk bodies         {data_dir}/{model}/data/ below a disk MetaStore, else {data_dir}/{model}/
    s3-sqlite           {prefix}meta/{model}.sqlite/
    bodies on S3        {prefix}data/{model}/ below s3-sqlite, else {prefix}{model}/
    index beside them   {prefix}{model}/index.sqlite/, below a MemoryMetaStore
    blobs               as the bodies: in memory, in {data_dir}/{model}/blobs/, or below that of bodies on S3 in blobs/
    postgres            tables whose names begin with meta_{prefix}{model}
    redis               keys that begin with {prefix}{model}:
    rabbitmq            the exchange {prefix}{model}_invalidations
    caches of bodies    CACHED_BODIES entries in memory for each model, and {cache_dir}/all-models/ for all models
    beside S3           {data_dir}/copies/{endpoint}/ and {data_dir}/cache/{endpoint}/, named by a hash of the endpoint

Existing stores have their data at these locations. If a location is changed here, their data is no longer found.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Literal

from typing_extensions import override

from ...errors import ConfigError

CACHED_BODIES = 1000
"""Largest number of bodies in the cache in memory of one model."""
MAX_CACHE_BYTES = 1024**3
"""Largest size in bytes of the cache on disk, which all models share, if no other limit is given."""
CACHE_NAME = "all-models"
"""Name of the directory of the cache on disk, below the directory of caches."""
FUNCTION_CACHE = "crudstack-cache"
"""Name of the directory of caches of an AWS Lambda function, below the directory of temporary files."""


class Layout:
    """The names of one deployment. Deployments with different prefixes share servers and buckets.

    prefix  beginning of all keys and a part of all names, used unchanged; usually ends with a slash
    """

    def __init__(self, prefix: str = "") -> None:
        self.prefix = prefix

    def table(self, model: str) -> str:
        """Return the name that the tables of a model in PostgreSQL begin with."""
        return f"meta_{self.prefix}{model}"

    def redis_prefix(self, model: str) -> str:
        """Return the beginning of all keys of a model in Redis."""
        return f"{self.prefix}{model}:"

    def index_key(self, model: str) -> str:
        """Return the key of the index of `s3-sqlite`."""
        return f"{self.prefix}meta/{model}.sqlite"

    def bodies(self, model: str, meta: str) -> str:
        """Return the beginning of the keys of bodies on S3. `meta`: the name of the MetaStore above them.

        Raises ConfigError if another deployment may have bodies there. Each deployment would remove the bodies of the
        other as orphans.
        """
        if meta == "s3-sqlite":
            return f"{self.prefix}data/{model}/"
        if f"/{self.prefix}".endswith("/data/"):
            raise ConfigError(
                f"the prefix is {self.prefix!r}: bodies would lie where those of 's3-sqlite' do whose prefix ends"
                " before 'data', and each would remove the other's: expected another name than data at its end"
            )
        return f"{self.prefix}{model}/"

    def blobs(self, model: str, meta: str) -> str:
        """Return the beginning of the keys of blobs on S3. `meta`: the name of the MetaStore above them."""
        return f"{self.bodies(model, meta)}blobs/"

    def queue_prefix(self, model: str) -> str:
        """Return the beginning of the names of a model's exchange and queues in RabbitMQ."""
        return f"{self.prefix}{model}_"


class FormerLayout(Layout):
    """The names that factories used before they shared one layout with the kinds. See `former_layout`."""

    @override
    def table(self, model: str) -> str:
        return f"meta_{model}"

    @override
    def bodies(self, model: str, meta: str) -> str:
        return f"{self.prefix}{model}/"

    @override
    def queue_prefix(self, model: str) -> str:
        return f"autocrud_{model}_"


def disk_metadata(data_dir: Path, model: str) -> Path:
    """Return the directory of a model's metadata and index."""
    return data_dir / model / "meta"


def disk_bodies(data_dir: Path, model: str, meta: str) -> Path:
    """Return the directory of a model's bodies. `meta`: the name of the MetaStore above them."""
    return data_dir / model / "data" if meta == "disk" else data_dir / model


def disk_blobs(data_dir: Path, model: str) -> Path:
    """Return the directory of a model's blobs."""
    return data_dir / model / "blobs"


def beside_s3(data_dir: Path, what: Literal["copies", "cache"], endpoint_url: str | None) -> Path:
    """Return the directory of local copies or caches of one S3 endpoint. They can be made again from the bucket."""
    return data_dir / what / hashlib.sha256(f"{endpoint_url}".encode()).hexdigest()[:8]
