"""The contract of direct transfers: a client uploads to the object storage, and downloads from it, by presigned URLs.

- T1 *A blob is what was announced.* The content becomes a blob only if its size and its SHA-256 are those that the
  upload announced.
- T2 *A URL that is used again changes nothing.* It writes a staging object, which is never that of a blob. The content
  is copied to a key that only the server writes.
- T3 *The quota holds.* An upload reserves its size in a commit before its URL is given out. The reservation is a row of
  a blob at the hash RESERVED, so it takes part of the quota, and each store that keeps rows keeps reservations. No
  content has this hash, and `Blobs.rows` never returns such rows, so no record can name one.
- T4 *What is not completed is removed.* KEEP_STAGING_S after its URL ended, the reservation of an upload is removed,
  and then its staging object, completed or not. A staging object that appears later is removed when it is as old. The
  dates are those of the object storage.
"""

from __future__ import annotations

import datetime as dt
from abc import abstractmethod
from collections.abc import Iterable
from typing import NamedTuple, Protocol, runtime_checkable

from msgspec import Struct

from ..basic import BlobRow

RESERVED = "0" * 64
"""The hash of the rows that reserve quota for uploads. No known content has it."""
URL_LIFE_S = 3600
"""Seconds for which a presigned URL is valid. A transfer that began in time may take longer."""
KEEP_STAGING_S = 3600
"""Seconds for which a staging object is kept after its URL ended."""
MAX_OPEN = 100
"""Largest number of uploads that one caller may have begun and not completed."""


class Announced(Struct, frozen=True, kw_only=True):
    """An upload as its client announced it.

    size          of the content, in bytes
    sha256        of the content, in hex
    content_type  of the reference
    name          the name of the file, of the reference
    """

    size: int
    sha256: str
    content_type: str
    name: str


class PresignedUpload(NamedTuple):
    """An upload that a client may send with PUT.

    id       names the upload when it is completed
    headers  headers that the request must have, besides Content-Length
    expires  the time at which the URL ends
    """

    id: str
    url: str
    headers: dict[str, str]
    expires: dt.datetime


class PresignedDownload(NamedTuple):
    """A URL by which a client may download a blob until it expires."""

    url: str
    expires: dt.datetime


class CompletedUpload(NamedTuple):
    """An upload that became a blob."""

    announced: Announced
    row: BlobRow


class DirectTransfer(Protocol):
    """Uploads and downloads of one model that go to the object storage, and not through this process."""

    @abstractmethod
    async def begin(self, caller: str, announced: Announced, *, quota: int | None = None) -> PresignedUpload:
        """Reserve quota for an upload, and return the URL to send it to.

        Raises BlobQuotaExceeded, TooManyUploads, OutcomeUnknown, StoreUnavailable.
        """

    @abstractmethod
    async def complete(self, upload: str, caller: str) -> CompletedUpload:
        """Make the content that was sent a blob, with its row. Takes as long as a copy within the storage.

        May be repeated, also at the same time, and then returns the same reference. Raises UploadNotFound if the caller
        has no such upload, UploadIncomplete if nothing was sent, and DigestMismatch if other content was sent.
        """

    @abstractmethod
    async def completed(self, upload: str, caller: str) -> CompletedUpload | None:
        """Return an upload if it was completed, and None if not. Raises UploadNotFound if the caller has no such."""

    @abstractmethod
    async def download(self, key: str, *, content_type: str, disposition: str) -> PresignedDownload:
        """Return a URL by which a blob can be downloaded.

        content_type  the value of Content-Type in the answer
        disposition   the value of Content-Disposition in the answer
        """

    @abstractmethod
    async def expire(self) -> None:
        """Remove staging objects and reservations of uploads that ended (T4)."""


@runtime_checkable
class DirectStorage(Protocol):
    """An IStorage whose blobs may be transferred directly."""

    @property
    @abstractmethod
    def direct(self) -> DirectTransfer | None:
        """Return the direct transfers of the model; None if its blobs are not on S3, or if botocore is missing."""


def without_reservations(rows: Iterable[BlobRow]) -> list[BlobRow]:
    """Return the rows that are those of blobs (T3)."""
    return [row for row in rows if row.sha256 != RESERVED]
