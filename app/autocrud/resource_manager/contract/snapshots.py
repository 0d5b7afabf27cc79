"""The contract of exports: one moment of a store, and pins that keep what this moment needs.

- P1 *A pin keeps bodies and blobs.* Bodies and content of blobs are removed, other than by a purge, only if no pin
  existed at some moment after they were no longer named by any record. So: commit or look for references first, then
  ask `has_pins`, then remove. A pin is added before the moment that it protects is chosen. What stays because of a pin
  is removed by a later sweep.
- P2 *A lost pin is noticed.* A pin that was not renewed for PIN_LIFE_S is dropped, by the dates of the store. From then
  on, `renew_pin` and `remove_pin` return False, and the work that the pin protected fails.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import AsyncIterator, Sequence
from contextlib import AbstractAsyncContextManager
from typing import ClassVar, Protocol, runtime_checkable

from ..basic import BlobRow, ResourceMeta, RevisionInfo, StoredKey

PIN_LIFE_S = 600.0
"""Seconds after which a pin that was not renewed is dropped."""
RENEW_PIN_S = 60.0
"""Seconds between two renewals of a pin."""
PAGE_BYTES = 8 * 1024 * 1024
"""A snapshot reads no further bodies for a call once those that it has read take more bytes than this."""


@runtime_checkable
class Pinning(Protocol):
    """A MetaStore that keeps pins."""

    @abstractmethod
    async def add_pin(self, pin: str) -> None:
        """Add a pin, a random name in hex."""

    @abstractmethod
    async def renew_pin(self, pin: str) -> bool:
        """Renew a pin. Returns False if it was dropped."""

    @abstractmethod
    async def remove_pin(self, pin: str) -> bool:
        """Remove a pin. Returns False if it was dropped before."""

    @abstractmethod
    async def has_pins(self) -> bool:
        """Return whether there is a pin. Drops pins that are not renewed.

        Sees every pin that was added before the last commit of this process, or before its last lookup of references,
        because P1 asks in this order. A store on S3 needs no request for that.
        """


class MetaSnapshot(Protocol):
    """One moment of a MetaStore."""

    @property
    def one_moment(self) -> bool:
        """Return whether all resources are as at the same moment. If not, each one is as at some moment."""

    async def count(self) -> int:
        """Return how many resources there are, deleted ones too."""

    def items(self, after: str = "") -> AsyncIterator[ResourceMeta | RevisionInfo]:
        """Yield each resource whose id follows `after`, ascending: its metadata, then its records by ascending number.

        If the resources are not as at the same moment, those up to `after` take little time.
        """

    def keys(self) -> AsyncIterator[StoredKey]:
        """Yield the results that are kept for Idempotency-Keys, by ascending key."""

    async def blob_rows(self, keys: Sequence[str]) -> list[BlobRow]:
        """Return the rows of these keys, in their order. Raises StoreDamaged if one is missing."""


@runtime_checkable
class SnapshotReading(Protocol):
    """A MetaStore that can be read as at one moment while writes go on."""

    @abstractmethod
    def snapshot(self) -> AbstractAsyncContextManager[MetaSnapshot]:
        """Return the moment at which the context begins. Other readers and writers do not wait for it."""


@runtime_checkable
class BodySnapshots(Protocol):
    """A ResourceStore that can be read as at one moment. Used within the context of a MetaSnapshot."""

    shows_later_bodies: ClassVar[bool]
    """Whether a snapshot also returns bodies that are stored after it began."""

    @abstractmethod
    def snapshot(self) -> AbstractAsyncContextManager[BodySnapshot]:
        """Return the moment at which the context begins."""


class BodySnapshot(Protocol):
    """The bodies of one moment."""

    async def bodies(self, uids: Sequence[str]) -> list[bytes | None]:
        """Return the bodies of the first uids, in their order; None for each one that is missing.

        Returns at least one, and may stop once the bodies take more than PAGE_BYTES.
        """


class RecordSnapshot(MetaSnapshot, BodySnapshot, Protocol):
    """One moment of the records of a ResourceStore, with their bodies."""


@runtime_checkable
class RecordSnapshots(Protocol):
    """A ResourceStore whose records are the commit, and which can be read as at one moment while writes go on."""

    @abstractmethod
    def record_snapshot(self) -> AbstractAsyncContextManager[RecordSnapshot]:
        """Return the moment at which the context begins. Other readers and writers do not wait for it."""


class StorageSnapshot(Protocol):
    """One moment of a storage: metadata, bodies and blobs of one model."""

    one_moment: bool

    async def count(self) -> int:
        """Return how many resources there are, deleted ones too."""

    def items(self, after: str = "") -> AsyncIterator[ResourceMeta | RevisionInfo]:
        """Yield each resource whose id follows `after`, ascending: its metadata, then its records by ascending number.

        If the resources are not as at the same moment, those up to `after` take little time.
        """

    def keys(self) -> AsyncIterator[StoredKey]:
        """Yield the results that are kept for Idempotency-Keys, by ascending key."""

    async def bodies(self, uids: Sequence[str]) -> list[bytes | None]:
        """Return the bodies of the first uids, in their order; None for each one that is missing.

        Returns at least one, and may stop once the bodies take more than PAGE_BYTES.
        """

    async def blob_rows(self, keys: Sequence[str]) -> list[BlobRow]:
        """Return the rows of these keys, in their order. Raises StoreDamaged if one is missing."""

    def read_blob(self, key: str) -> AsyncIterator[bytes]:
        """Yield the content of a blob. Raises StoreDamaged if it is missing."""

    async def renew(self) -> None:
        """Renew the pin. Called every RENEW_PIN_S. Raises PinLost."""


@runtime_checkable
class SnapshotStorage(Protocol):
    """An IStorage that can be exported. Other storages are read with `scan`, `revisions` and `bodies`."""

    @abstractmethod
    def snapshot(self, *, each_resource: bool = False) -> AbstractAsyncContextManager[StorageSnapshot]:
        """Return the moment at which the context begins, and hold a pin until it ends.

        With `each_resource=True`, each resource is as at some moment, so that no long transaction is needed.
        """
