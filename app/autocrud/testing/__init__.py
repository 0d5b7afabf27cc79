"""The conformance suite: tests of everything that a storage or a cache promises, to run on your own.

    from ..testing import SharedConformance

    class TestMyStorage(SharedConformance):
        def make(self, root: Path) -> IStorageFactory:
            return MyStorageFactory(root)

Choose the class by what the storage promises:

StorageConformance   nothing survives the process
DurableConformance   data survives the process
OwnedConformance     durable; one process at a time uses the storage
SharedConformance    durable; several processes use the storage at once

`root` is a directory of the test's own; two factories made for one root must find the same data. A Cache has a suite
of its own:

    class TestMyCache(CacheConformance):
        def make(self, root: Path, clock: CacheClock) -> Cache:
            return MyCache(root, clock=clock)

A BlobStore has one too:

    class TestMyBlobStore(BlobStoreConformance):
        def make(self, root: Path) -> BlobStore:
            return MyBlobStore(root)

Needs the extra `testing`, and `asyncio_mode = "auto"` in the configuration of pytest. The modules:

base                                            fixtures
revisions, queries, batches, idempotency, races, hostile, sweeping, snapshots, limits
                                                what every storage promises
blobs, blob_machine, shared_blobs               what a storage with rows of blobs promises
blob_contents, files                            what a storage with rows and content of blobs promises
loading                                         what a storage promises into which a whole model can be loaded
reindexing, new_fields                          what durable storages promise
suite, shared                                   the classes above
caches                                          what a cache promises
blob_stores                                     what a BlobStore promises
model, strategies, reference                    the model of the tests, data for it, and the meaning of queries
"""

from pathlib import Path

import pytest

pytest.register_assert_rewrite(*(f"{__name__}.{module.stem}" for module in Path(__file__).parent.glob("[!_]*.py")))

from .blob_stores import BlobStoreConformance  # noqa: E402 - asserts are rewritten in modules imported from here on
from .caches import CacheClock, CacheConformance  # noqa: E402
from .shared import SharedConformance  # noqa: E402
from .suite import DurableConformance, OwnedConformance, StorageConformance  # noqa: E402

__all__ = [
    "BlobStoreConformance",
    "CacheClock",
    "CacheConformance",
    "DurableConformance",
    "OwnedConformance",
    "SharedConformance",
    "StorageConformance",
]
