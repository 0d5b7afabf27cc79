"""Caches of bodies.

    MemoryCache(max_size=100)              in the memory of this process
    DiskCache(cache_dir="cache/article")   on a local disk, shared by processes

`Cache` is the contract of a custom cache. It stands in `body_cache`, the two caches in `memory_cache` and `disk_cache`.
"""

from __future__ import annotations

from .body_cache import Cache, Entry
from .disk_cache import DiskCache
from .memory_cache import MemoryCache

__all__ = ["Cache", "DiskCache", "Entry", "MemoryCache"]
