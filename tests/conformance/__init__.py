"""The conformance suite is in `app.autocrud.testing`; this package re-exports it under its former name."""

from app.autocrud.testing import (
    BlobStoreConformance,
    CacheClock,
    CacheConformance,
    DurableConformance,
    OwnedConformance,
    SharedConformance,
    StorageConformance,
)

__all__ = [
    "BlobStoreConformance",
    "CacheClock",
    "CacheConformance",
    "DurableConformance",
    "OwnedConformance",
    "SharedConformance",
    "StorageConformance",
]
