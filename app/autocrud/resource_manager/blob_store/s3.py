"""Blobs on S3, one object each."""

from __future__ import annotations

import contextlib
import datetime as dt
import secrets
import threading
from collections.abc import AsyncIterator, Hashable, Sequence
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import ClassVar

from typing_extensions import override

from ...errors import StoreUnavailable
from ...secret import Secret
from ..backends.s3.object_store import ObjectStore, s3
from ..basic import BLOB_KEY, BlobStore, BlobWriter, ModelSpec
from ..runtime.temporary import ProcessDirectory
from .keys import missing, too_short
from .spool import Spool, spooled

MAX_CHUNK = 1024 * 1024
"""Largest chunk of a read, in bytes."""
MARKER = "now"
"""Name of the object whose date is the present time of S3. It sorts after all keys of blobs."""
AFTER_ALL_KEYS = "g"
"""Sorts after all keys of blobs, which begin with hex digits, and before MARKER."""


class S3BlobStore(BlobStore):
    """Blobs at the keys `{prefix}{key}` of a bucket.

    bucket                            the name of the bucket
    prefix                            begins the keys, one for each model; `{model}/blobs/` if it is empty
    endpoint_url, region_name         of the S3 server
    access_key_id, secret_access_key  the ambient credentials are used without them
    object_store                      replaces the bucket and all arguments about the server

    An upload is spooled to a temporary file and then sent. Large files are sent in parts.

    *Other data may lie below the prefix*, also bodies and other blobs. A blob of this store is a key that is exactly
    the prefix and a BLOB_KEY. It has one slash, and in front of that exactly 64 digits. So it is never a blob of a
    store with another prefix. A body has a slash behind its number, so it is never a blob either.
    """

    durable: ClassVar[bool] = True
    remote: ClassVar[bool] = True

    def __init__(
        self,
        bucket: str,
        prefix: str = "",
        endpoint_url: str | Secret | None = None,
        access_key_id: str | None = None,
        secret_access_key: str | Secret | None = None,
        region_name: str | None = None,
        *,
        object_store: ObjectStore | None = None,
    ) -> None:
        self._given, self._prefix = prefix, prefix
        self._objects = object_store or s3(bucket, endpoint_url, access_key_id, secret_access_key, region_name)
        self._files = _TemporaryFiles()

    @override
    def bind(self, spec: ModelSpec) -> None:
        self._prefix = self._given or f"{spec.name}/blobs/"

    @property
    @override
    def location_key(self) -> Hashable:
        return "blobs on s3", self._objects, self._prefix

    @property
    def object_store(self) -> ObjectStore:
        """Return the client of the bucket."""
        return self._objects

    @property
    def prefix(self) -> str:
        """Return the beginning of the keys of all blobs."""
        return self._prefix

    @override
    def receive(self) -> AbstractAsyncContextManager[BlobWriter]:
        return spooled(self._files.new, self._send)

    async def _send(self, spool: Spool, key: str) -> None:
        content = spool.content
        if content is not None:
            await self._objects.put(self._prefix + key, content)
        else:
            await self._objects.upload(self._prefix + key, await spool.flush())

    @override
    async def read(self, key: str, start: int = 0, end: int | None = None) -> AsyncIterator[bytes]:
        is_empty = end is not None and end <= start
        stream = None
        if BLOB_KEY.fullmatch(key) is not None:
            stream = await self._objects.stream(self._prefix + key, start, start + 1 if is_empty else end)
        if stream is None:
            raise missing(key)
        async with contextlib.aclosing(stream):
            if is_empty:
                return
            async for chunk in stream:
                start += len(chunk)
                for at in range(0, len(chunk), MAX_CHUNK):
                    yield chunk[at : at + MAX_CHUNK]
        if end is not None and start < end:
            raise too_short(key, start, end)

    @override
    async def delete(self, keys: Sequence[str]) -> None:
        ours = [self._prefix + key for key in keys if BLOB_KEY.fullmatch(key)]
        if ours:
            await self._objects.delete(ours)

    @override
    async def older_than(self, seconds: float, after: str = "", limit: int = 1000) -> list[str]:
        found: list[str] = []
        stored_by: dt.datetime | None = None
        async for listed in self._objects.list(self._prefix, self._prefix + after if after else ""):
            key = listed.key.removeprefix(self._prefix)
            if key > AFTER_ALL_KEYS:
                break
            if BLOB_KEY.fullmatch(key) is None:
                continue
            if stored_by is None:
                stored_by = await self._now() - dt.timedelta(seconds=seconds)
            if listed.modified <= stored_by:
                found.append(key)
                if len(found) == limit:
                    break
        return found

    async def _now(self) -> dt.datetime:
        """Return the present time of S3: the date of an object that is written now."""
        await self._objects.put(self._prefix + MARKER, b"")
        # `after` skips the blobs, because a folder is listed from its first object on.
        async for listed in self._objects.list(self._prefix + MARKER, self._prefix + AFTER_ALL_KEYS):
            if listed.key == self._prefix + MARKER:
                return listed.modified
        raise StoreUnavailable("the object storage does not list an object that was just written; try again")

    @override
    async def health(self) -> None:
        # The listing is empty, but it fails without the permission to list.
        async for _ in self._objects.list(self._prefix, self._prefix + "~"):
            break

    @override
    async def close(self) -> None:
        self._files = _TemporaryFiles()  # the directory of the former ones is removed once the last upload has ended


class _TemporaryFiles:
    """New files in a temporary directory, which is removed once no upload refers to this object any more."""

    def __init__(self) -> None:
        self._mutex = threading.Lock()
        self._directory: ProcessDirectory | None = None

    def new(self) -> Path:
        """Return the path of a new file. Blocks."""
        with self._mutex:
            if self._directory is None:
                self._directory = ProcessDirectory()
            return self._directory.path / secrets.token_hex(16)
