"""Uploads of blobs, and reads of the blobs that resources refer to."""

from __future__ import annotations

import hashlib
from collections.abc import AsyncIterable, AsyncIterator
from typing import Any, Generic, NamedTuple, TypeVar

from msgspec.structs import replace

from ...errors import (
    BlobNotFound,
    ConfigError,
    DigestMismatch,
    InvalidData,
    RevisionNotFound,
    StoreDamaged,
    Violation,
)
from ...query import Filter
from ..basic import BlobRow, Encoding, IStorage, RevisionInfo
from ..contract.blobs import Blobs, BlobStorage
from ..contract.store_errors import check_name
from ..model.blob import Blob, is_sha256, name_error, safe_name, safe_type, type_error
from ..model.codec import Codec
from ..model.resource import Resource
from ..model.verification import UNDECODABLE
from ..runtime.threads import heavy
from .reading import ReadExecutor
from .writing import MAX_ATTEMPTS, contention

T = TypeVar("T")

MAX_BLOB = 5 * 1024**3
"""Default of the largest size of a blob, in bytes. S3 accepts as much in one request."""
SLICE = 256 * 1024
"""Bytes of content in memory that are stored in one step."""


class BlobLimits(NamedTuple):
    """The limits of the blobs of a model.

    max_size  largest size of one blob, in bytes
    quota     largest size of all blobs of the model together, in bytes; None: no limit
    """

    max_size: int = MAX_BLOB
    quota: int | None = None


class StoredBlob:
    """A blob that a revision of a resource refers to.

    blob  the first reference to it in the data. Its size is that of the stored content, and its name and its type are
          safe to send, whatever the data has: an import stores data as it is in the archive
    key   the key of the content in the store
    """

    __slots__ = ("_blobs", "blob", "key")

    def __init__(self, blobs: Blobs, blob: Blob, key: str) -> None:
        self._blobs, self.blob, self.key = blobs, blob, key

    def read(self, start: int = 0, end: int | None = None) -> AsyncIterator[bytes]:
        """Yield the bytes from `start` up to but not including `end`; None: up to the end of the content.

        Raises StoreDamaged if the content is missing, for example because the resource was purged meanwhile.
        """
        return self._blobs.read(self.key, start, end)


class BlobExecutor(Generic[T]):
    """Receives the blobs of one model, and finds those of its resources."""

    def __init__(
        self, blobs: Blobs, storage: IStorage, codec: Codec[T], reads: ReadExecutor[T], limits: BlobLimits
    ) -> None:
        self._blobs, self._storage, self._codec, self._reads = blobs, storage, codec, reads
        self._limits = limits

    async def upload(
        self, content: bytes | AsyncIterable[bytes], *, name: str, content_type: str, sha256: str | None, caller: str
    ) -> Blob:
        """Store content, and return the reference to it. Nothing is stored if this raises.

        Raises InvalidData, DigestMismatch, BlobTooLarge, BlobQuotaExceeded, StoreUnavailable, and what `content`
        raises.
        """
        check_name(caller)
        check_reference(name, content_type, sha256)
        digest = None if sha256 is None else hashlib.sha256()
        limits = self._limits
        async with self._blobs.receive(caller, max_size=limits.max_size, quota=limits.quota) as upload:
            async for chunk in _sliced(content) if isinstance(content, bytes) else content:
                await upload.write(chunk)
                if digest is not None:
                    digest.update(chunk)
            if digest is not None and digest.hexdigest() != sha256:
                raise DigestMismatch(
                    f"expected content with the SHA-256 {sha256}, got {upload.size} bytes with {digest.hexdigest()};"
                    " nothing was stored, send it again"
                )
            row = await upload.finish()
        return Blob(sha256=row.sha256, size=row.size, content_type=content_type, name=name)

    async def find(
        self, resource_id: str, sha256: str, *, revision: int | None, include_deleted: bool, read_filter: Filter | None
    ) -> StoredBlob:
        """Return the blob of a resource with this hash.

        Raises BlobNotFound if the revision does not refer to such a blob, StoreDamaged if its row is missing, and the
        errors of `ReadExecutor.get`.
        """
        missing = False
        for _ in range(MAX_ATTEMPTS):
            resource = await self._reads.get(
                resource_id, revision=revision, include_deleted=include_deleted, read_filter=read_filter
            )
            record = await self._record_of(resource)
            if record is not None:
                key = next((key for key in record.blobs if key.startswith(f"{sha256}/")), None)
                if key is None or not is_sha256(sha256):
                    raise BlobNotFound(f"resource {resource_id!r} refers to no file with the SHA-256 {sha256[:80]!r}")
                row = next((row for row in await self._blobs.rows([sha256]) if row.key == key), None)
                if row is not None:
                    return StoredBlob(self._blobs, await self._reference(resource.json, row), key)
                missing = True  # F1: the record that names it was removed meanwhile, unless the store is damaged
        if missing:
            raise StoreDamaged(
                f"the file {sha256} of resource {resource_id!r} is not among the files of the store; restore it from a"
                " backup, or write the resource again without it"
            )
        raise contention()

    async def _record_of(self, resource: Resource[T]) -> RevisionInfo | None:
        """Return the record of the revision whose data was read, or None if a write has replaced it since."""
        if resource.info is not None:
            return resource.info
        meta = resource.meta
        try:
            record = await self._storage.revision(meta.resource_id, meta.revision)
        except RevisionNotFound:
            return None
        return record if record.uid == meta.uid else None

    async def _reference(self, json: bytes, row: BlobRow) -> Blob:
        """Return the first reference to a blob in data, with the size of its row, and a safe name and type.

        If the model no longer has the field of the reference, returns one without a name and a type.
        """
        sha256, codec = row.sha256, self._codec

        def find() -> Blob | None:
            try:
                data = codec.decode(json, Encoding.json)
            except UNDECODABLE:
                return None
            return next((found.blob for found in codec.references(data) if found.blob.sha256 == sha256), None)

        found = await heavy(len(json), find, json)
        if found is None:
            return Blob(sha256=sha256, size=row.size)
        return replace(found, size=row.size, content_type=safe_type(found.content_type), name=safe_name(found.name))


def blobs_of(name: str, codec: Codec[Any], storage: IStorage) -> Blobs | None:
    """Return the blobs of a model, or None if its data cannot refer to blobs.

    Raises ConfigError if the data can refer to blobs, and the storage has none.
    """
    if not codec.has_blobs:
        return None
    blobs = storage.blobs if isinstance(storage, BlobStorage) else None
    if blobs is None:
        raise ConfigError(
            f"the model {name!r} has a field of type Blob, but {type(storage).__name__} has no blobs: pass a"
            " blob_store, as in SimpleStorage(meta_store, resource_store, blob_store)"
        )
    return blobs


def check_reference(name: str, content_type: str, sha256: str | None = None) -> None:
    """Raise InvalidData if an upload cannot have this name, this content type or this announced SHA-256."""
    violations = [
        Violation(f"/{field}", error)
        for field, error in (("name", name_error(name)), ("content_type", type_error(content_type)))
        if error is not None
    ]
    if sha256 is not None and not is_sha256(sha256):
        violations.append(Violation("/sha256", f"expected 64 lower-case hex digits, got {sha256[:80]!r}"))
    if violations:
        raise InvalidData(f"the file cannot be stored: {violations[0].detail}", tuple(violations))


async def _sliced(content: bytes) -> AsyncIterator[bytes]:
    for start in range(0, len(content), SLICE):
        yield content[start : start + SLICE]
