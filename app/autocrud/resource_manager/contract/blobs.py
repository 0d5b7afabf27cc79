"""The contract of blobs: the rows of a MetaStore, and the blobs of one model as the engine sees them.

A BlobStore keeps the content, a MetaStore keeps a row for each upload. The record of a revision names the keys of the
blobs that its data refers to.

docs/design/blobs.md explains the protocol.

- F1 *A record never names a blob that is not stored.* The content is stored before its row is committed. A commit
  checks that each key in a new record has a row (else BlobGone), in the same step that commits. A row is removed only
  in a commit that checks that no record names its key. The content is removed only after its row.
- F2 *A row is never committed for content that a sweep may have removed.* A key begins with the epoch of its upload.
  A sweep that removes content without a row first raises the epoch of the MetaStore above that of the key, in the same
  commit that looks for rows. A row of an earlier epoch is refused (StaleGeneration); then the content is stored again
  under a new key. No clock decides.
- F3 *No key is used twice.* So an object that is deleted late, or that a late request stores, is never that of a row.
  The row of a key is not added twice either. If the outcome of `add_blob` is unknown and the row is not found, the
  content is stored again under another key.
- F4 *Content without a row is found.* A crash leaves it. The sweep lists all content that is older than the time that
  uploads are kept for, and removes what no record names.
- F5 *An older program cannot drop references.* The first row of a blob marks the store (`BLOBS_MARKER`, and the format
  of S3-SQLite), in the same commit. Programs that do not know blobs refuse to write such a store.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import AsyncIterator, Sequence
from contextlib import AbstractAsyncContextManager
from typing import NamedTuple, Protocol, runtime_checkable

from ..basic import BlobRow

BLOBS_MARKER = "files (store format 2)"
"""A name that stands among the unique fields of a store with blobs.

Programs that do not know blobs refuse to write to a store that has a unique field which they do not index, at each
commit. Their error shows this name.
"""


class BlobUsage(NamedTuple):
    """How many blobs a model has, and how many bytes they take together."""

    blobs: int
    size: int


class BlobUse(NamedTuple):
    """A revision whose record names a blob."""

    resource_id: str
    revision: int


@runtime_checkable
class BlobRows(Protocol):
    """A MetaStore that keeps rows of blobs.

    Its `commit` raises BlobGone if a record that it stores names a key without a row, unless the record that it
    replaces names this key too. It counts the keys of the records that it stores and removes as uses.
    """

    @abstractmethod
    async def blob_epoch(self) -> int:
        """Return the epoch with which the uids of new uploads begin; 0 at first."""

    @abstractmethod
    async def add_blob(self, row: BlobRow, *, quota: int | None = None) -> None:
        """Store the row of an upload whose content is stored. Does nothing if the row exists.

        Raises StaleGeneration if the epoch of the key is below that of the store (F2), else BlobQuotaExceeded if
        the blobs would take more than `quota` bytes together. The first row marks the store (F5). Raises OutcomeUnknown
        if the store does not know whether it committed. Then the caller must not repeat the call: the row may have been
        removed meanwhile, together with the content, and a repeated call would store it again (F1).
        """

    @abstractmethod
    async def blobs(self, sha256s: Sequence[str]) -> list[BlobRow]:
        """Return the rows of all blobs with one of these hashes, by ascending key."""

    @abstractmethod
    async def blob_uses(self, key: str, limit: int = 100) -> list[BlobUse]:
        """Return the newest revision that names a blob of each of up to `limit` resources, by ascending id."""

    @abstractmethod
    async def blob_usage(self) -> BlobUsage:
        """Return how many blobs have a row, and their size together."""

    @abstractmethod
    async def remove_blobs(self, keys: Sequence[str]) -> list[str]:
        """Remove the rows of those keys that no record names, and return these keys, also those without a row.

        Returns each key once, in the order of `keys`. The same commit raises the epoch above those of all returned
        keys that had no row (F2). So the content of the returned keys may be removed.
        """


class Upload(Protocol):
    """An upload to one model while it is received."""

    size: int
    """The number of bytes that were written so far."""

    async def write(self, chunk: bytes) -> None:
        """Append bytes. Raises BlobTooLarge, or StoreUnavailable."""

    async def finish(self) -> BlobRow:
        """Store the content and its row, and return the row.

        Raises BlobQuotaExceeded or StoreUnavailable; then nothing was stored. Raises OutcomeUnknown if the row may have
        been stored.
        """


class Blobs(Protocol):
    """The blobs of one model, as the engine sees them."""

    def receive(self, caller: str, *, max_size: int, quota: int | None = None) -> AbstractAsyncContextManager[Upload]:
        """Return the upload of a caller. At the end of the context, what was not finished is discarded.

        max_size  largest size of the blob, in bytes
        quota     largest size of all blobs of the model together, in bytes; None: no limit
        """

    async def rows(self, sha256s: Sequence[str]) -> list[BlobRow]:
        """Return the rows of all blobs with one of these hashes, by ascending key."""

    async def uses(self, key: str, limit: int = 100) -> list[BlobUse]:
        """Return up to `limit` revisions whose records name a blob, one for each resource."""

    def read(self, key: str, start: int = 0, end: int | None = None) -> AsyncIterator[bytes]:
        """Yield the bytes from `start` up to but not including `end`. Raises StoreDamaged if the blob is missing."""

    async def release(self, keys: Sequence[str]) -> None:
        """Remove those blobs that no record names, at once. Used after a purge; a sweep removes what this leaves."""


@runtime_checkable
class BlobStorage(Protocol):
    """An IStorage that may have blobs. A model with a Blob field is refused if it has none."""

    @property
    @abstractmethod
    def blobs(self) -> Blobs | None:
        """Return the blobs of the model; None if no BlobStore was given, or if the MetaStore keeps no rows of them."""
