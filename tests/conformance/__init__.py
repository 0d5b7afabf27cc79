"""One suite for every storage, yours too:

    from tests.conformance import SharedConformance

    class TestMyStorage(SharedConformance):
        def make(self, root: Path) -> IStorageFactory:
            return MyStorageFactory(root)

`root` is a directory of the test's own; two factories made for one root must find the same data. Choose by what is promised:
StorageConformance (nothing survives the process), DurableConformance, OwnedConformance (durable, one process at a time) or
SharedConformance (durable, several processes at once). A Cache has a suite of its own:

    class TestMyCache(CacheConformance):
        def make(self, root: Path, clock: CacheClock) -> Cache:
            return MyCache(root, clock=clock)
"""

from .caches import CacheClock, CacheConformance
from .suite import DurableConformance, OwnedConformance, SharedConformance, StorageConformance

__all__ = [
    "CacheClock",
    "CacheConformance",
    "DurableConformance",
    "OwnedConformance",
    "SharedConformance",
    "StorageConformance",
]
