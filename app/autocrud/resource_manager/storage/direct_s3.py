"""Direct transfers of blobs on S3. The contract is `contract.direct`.

    {prefix}uploads/{id}       the staging object, which the client writes
    {prefix}uploads/{id}.json  the marker: what was announced, and by whom. Its date is that of the upload
    {prefix}uploads/now        an object whose date is the present time of S3

The rows of an upload, those of its reservation and of its blob, have a uid that begins with its id.

- T1: A server that verifies checksums stores only content that has the announced hash, because the checksum is a signed
  header. The ETag of that content is the condition of the copy. If the server keeps no checksum or does not verify it
  (`verifies_checksums` tries), the copy is read back and hashed. The copy is what becomes the blob, and no URL allows
  to write it, so it does not matter what happens to the staging object meanwhile.
- T2: Each copy has a new key. So a copy that arrives late, or that a concurrent completion makes, replaces nothing.
- T4: The marker is written before the reservation, and removed after it. So each reservation has a date. A reservation
  whose marker is missing, because its commit arrived late, gets a new one.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import hashlib
import importlib.util
import re
import secrets
from base64 import b64encode

import msgspec
from msgspec import Struct
from typing_extensions import override

from ...errors import (
    BlobQuotaExceeded,
    DigestMismatch,
    OutcomeUnknown,
    StaleGeneration,
    StoreUnavailable,
    TooManyUploads,
    UploadIncomplete,
    UploadNotFound,
    WriteContention,
)
from ..backends.s3.object_store import Listed, ObjectStore, S3ObjectStore, Signed
from ..basic import BlobRow, BlobStore, owner_of
from ..blob_store.s3 import S3BlobStore
from ..contract.blobs import BlobRows
from ..contract.direct import (
    KEEP_STAGING_S,
    MAX_OPEN,
    RESERVED,
    URL_LIFE_S,
    Announced,
    CompletedUpload,
    DirectTransfer,
    PresignedDownload,
    PresignedUpload,
)

ATTEMPTS = 5
"""How often a completion is tried if the staging object is replaced meanwhile, or if a sweep raises the epoch."""
DELETED_AT_ONCE = 1000
_ID = re.compile(r"[0-9a-f]{20}")
_STAGED = re.compile(r"([0-9a-f]{20})(\.json)?")


class _Marker(Struct, frozen=True, kw_only=True):
    """The content of a marker: what was announced, and the `owner_of` the caller."""

    announced: Announced
    owner: str


def direct_transfer(blob_store: BlobStore | None, rows: object) -> DirectTransfer | None:
    """Return the direct transfers of a bound storage, or None if they are not possible.

    They need blobs on S3, rows of blobs, and botocore for the signatures.
    """
    if not isinstance(blob_store, S3BlobStore) or not isinstance(rows, BlobRows):
        return None
    if isinstance(blob_store.object_store, S3ObjectStore) and importlib.util.find_spec("botocore") is None:
        return None
    return S3DirectTransfer(blob_store, rows)


class S3DirectTransfer(DirectTransfer):
    """The direct transfers of one model.

    blob_store  the blobs; bound to the model
    rows        the rows of these blobs
    """

    def __init__(self, blob_store: S3BlobStore, rows: BlobRows) -> None:
        self._store, self._rows = blob_store, rows

    @property
    def _objects(self) -> ObjectStore:
        return self._store.object_store

    def _staging(self, name: str) -> str:
        return f"{self._store.prefix}uploads/{name}"

    def _marker_key(self, upload: str) -> str:
        return self._staging(f"{upload}.json")

    @override
    async def begin(self, caller: str, announced: Announced, *, quota: int | None = None) -> PresignedUpload:
        owner = owner_of(caller)
        is_open = sum(row.owner == owner for row in await self._rows.blobs([RESERVED]))
        if is_open >= MAX_OPEN:
            raise TooManyUploads(
                f"you have {is_open} uploads that are not complete, expected at most {MAX_OPEN}: complete them, or wait"
                f" until they expire, at most {(URL_LIFE_S + KEEP_STAGING_S) // 3600} hours after they began"
            )
        upload = secrets.token_hex(10)
        marker = msgspec.json.encode(_Marker(announced=announced, owner=owner))
        await self._objects.put(self._marker_key(upload), marker)
        try:
            await self._reserve(upload, announced.size, owner, quota)
        except BlobQuotaExceeded:
            with contextlib.suppress(StoreUnavailable):
                await self._objects.delete([self._marker_key(upload)])
            raise
        checksum = b64encode(bytes.fromhex(announced.sha256)).decode()
        headers = {"x-amz-checksum-sha256": checksum}
        signed = Signed(headers={"content-length": str(announced.size), **headers})
        expires = dt.datetime.now(dt.UTC) + dt.timedelta(seconds=URL_LIFE_S)
        url = await self._objects.presign(self._staging(upload), "PUT", URL_LIFE_S, signed)
        return PresignedUpload(upload, url, headers, expires)

    async def _reserve(self, upload: str, size: int, owner: str, quota: int | None) -> None:
        """Commit the row that takes the quota of an upload (T3)."""
        for _ in range(ATTEMPTS):
            key = f"{RESERVED}/{_uid(await self._rows.blob_epoch(), upload)}"
            try:
                await self._rows.add_blob(BlobRow(key=key, size=size, owner=owner), quota=quota)
                return
            except StaleGeneration:
                continue
        raise _contention()

    @override
    async def complete(self, upload: str, caller: str) -> CompletedUpload:
        marker = await self._marker(upload, caller)
        for _ in range(ATTEMPTS):
            reserved = await self._row(RESERVED, upload)
            row = await self._row(marker.announced.sha256, upload)
            if row is None and reserved is None:  # it has expired, between the two requests
                raise _not_found(upload)
            if row is None:
                row = await self._make_blob(upload, marker)
            if row is None:
                continue
            if reserved is not None:
                with contextlib.suppress(StoreUnavailable, OutcomeUnknown):  # `expire` removes it otherwise
                    await self._rows.remove_blobs([reserved.key])
            return CompletedUpload(marker.announced, row)
        raise _contention()

    @override
    async def completed(self, upload: str, caller: str) -> CompletedUpload | None:
        marker = await self._marker(upload, caller)
        row = await self._row(marker.announced.sha256, upload)
        return None if row is None else CompletedUpload(marker.announced, row)

    async def _marker(self, upload: str, caller: str) -> _Marker:
        """Return the marker of an upload of this caller. Raises UploadNotFound."""
        found = None
        if _ID.fullmatch(upload):
            found = await self._objects.get(self._marker_key(upload))
        if found is None or not found.body:
            raise _not_found(upload)
        marker = msgspec.json.decode(found.body, type=_Marker)
        if marker.owner != owner_of(caller):
            raise _not_found(upload)
        return marker

    async def _row(self, sha256: str, upload: str) -> BlobRow | None:
        """Return the row of an upload at a hash, if there is one."""
        return next((row for row in await self._rows.blobs([sha256]) if _upload_of(row.key) == upload), None)

    async def _make_blob(self, upload: str, marker: _Marker) -> BlobRow | None:
        """Copy the staging object to a new key, and commit the row. Return None if this must be tried again.

        Raises UploadIncomplete and DigestMismatch.
        """
        announced, objects = marker.announced, self._objects
        verified = await objects.verifies_checksums(self._staging("probe"))
        found = await objects.head(self._staging(upload), checksum=True)
        if found is None:
            raise UploadIncomplete("nothing was uploaded yet: send the content to the URL first, then complete it")
        if found.size != announced.size or found.sha256 not in (None, announced.sha256):
            raise _mismatch(announced, found.size)
        key = f"{announced.sha256}/{_uid(await self._rows.blob_epoch(), upload)}"
        target = f"{self._store.prefix}{key}"
        if not await objects.copy(self._staging(upload), target, found.etag):
            return None
        if not (verified and found.sha256) and await self._hash(key) != (announced.size, announced.sha256):
            await self._store.delete([key])
            raise _mismatch(announced, found.size)
        row = BlobRow(key=key, size=announced.size, owner=marker.owner)
        try:
            await self._rows.add_blob(row)
        except StaleGeneration:
            await self._store.delete([key])
            return None
        return row

    async def _hash(self, key: str) -> tuple[int, str]:
        """Return the size and the SHA-256 of a blob, which is read for it."""
        digest, size = hashlib.sha256(), 0
        async for chunk in self._store.read(key):
            digest.update(chunk)
            size += len(chunk)
        return size, digest.hexdigest()

    @override
    async def download(self, key: str, *, content_type: str, disposition: str) -> PresignedDownload:
        query = {"response-content-type": content_type, "response-content-disposition": disposition}
        expires = dt.datetime.now(dt.UTC) + dt.timedelta(seconds=URL_LIFE_S)
        url = await self._objects.presign(f"{self._store.prefix}{key}", "GET", URL_LIFE_S, Signed(query=query))
        return PresignedDownload(url, expires)

    @override
    async def expire(self) -> None:
        reserved = {_upload_of(row.key): row.key for row in await self._rows.blobs([RESERVED])}
        dated: dict[str, Listed] = {}
        present: list[tuple[str, str]] = []
        async for listed in self._objects.list(self._staging("")):
            if found := _STAGED.fullmatch(listed.key.removeprefix(self._staging(""))):
                present.append((found[1], listed.key))
                dated[found[1]] = listed  # a staging object sorts before its marker, which decides
        for upload in reserved.keys() - {upload for upload, listed in dated.items() if _is_marker(listed.key)}:
            await self._objects.put(self._marker_key(upload), b"")
            dated.pop(upload, None)
        if not dated:
            return
        oldest = await self._now() - dt.timedelta(seconds=URL_LIFE_S + KEEP_STAGING_S)
        ended = {upload for upload, listed in dated.items() if listed.modified <= oldest}
        if rows := [reserved[upload] for upload in sorted(ended) if upload in reserved]:
            await self._rows.remove_blobs(rows)
        keys = [key for upload, key in present if upload in ended]
        for start in range(0, len(keys), DELETED_AT_ONCE):
            await self._objects.delete(keys[start : start + DELETED_AT_ONCE])

    async def _now(self) -> dt.datetime:
        """Return the present time of S3: the date of an object that is written now."""
        await self._objects.put(self._staging("now"), b"")
        found = await self._objects.head(self._staging("now"))
        if found is None:
            raise StoreUnavailable("an object that was just written is missing; nothing was changed")
        return found.modified


def _is_marker(key: str) -> bool:
    return key.endswith(".json")


def _uid(epoch: int, upload: str) -> str:
    """Return a new uid for a row of an upload."""
    return f"{epoch}-{upload}{secrets.token_hex(6)}"


def _upload_of(key: str) -> str:
    """Return the id of the upload that a row belongs to, if it is one of a direct upload."""
    return key.rpartition("-")[2][:20]


def _not_found(upload: str) -> UploadNotFound:
    return UploadNotFound(f"there is no upload {upload[:40]!r} of yours, or it has expired: begin a new one")


def _mismatch(announced: Announced, size: int) -> DigestMismatch:
    return DigestMismatch(
        f"expected {announced.size} bytes with the SHA-256 {announced.sha256}, found {size} bytes of other content;"
        " send the right content to the same URL, or begin a new upload"
    )


def _contention() -> WriteContention:
    return WriteContention("the upload was replaced again and again while it was completed; complete it again")
