"""The interface to object storage: the operations that the engine needs, and nothing more.

    S3ObjectStore(bucket, ...)   S3, and every server that speaks its protocol
    MemoryObjectStore()          a store in memory for tests (memory_object_store)

Only a conditional PUT decides between concurrent writers, so its outcome has a type of its own: `Stored`, `NotStored`
or `Unknown`. It is never repeated, unless the answer says that it was refused before the condition was evaluated. All
other requests do no harm if they are repeated, and are repeated: see clients.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from typing_extensions import override

from ....secret import Secret, hidden, plain
from ...runtime.disk_space import full, is_full
from ...runtime.drivers import driver
from . import credentials as s3_credentials
from .clients import FILE, Attempts, Clients, RequestKind, content_of, kind_of
from .endpoint import server_name, trusted_certificates
from .errors import RANGE_NOT_SATISFIABLE, RangesUnsupported, describe, s3_answer, status_and_code, unavailable
from .objects import (
    CACHED,
    REQUESTS,
    UNCHANGED,
    Head,
    Listed,
    NotStored,
    Object,
    Outcome,
    Signed,
    Stored,
    Unchanged,
    Unknown,
    count,
)
from .obstore_exit import tracked, wait_at_exit
from .reception import Reception, no_bytes, pages
from .signed_requests import SignedRequests

if TYPE_CHECKING:
    from obstore.store import ClientConfig, RetryConfig, S3Credential, S3Store

T = TypeVar("T")

log = logging.getLogger("crudstack.s3")

CONCURRENT_GETS = 32
STREAM_CHUNK = 256 * 1024
"""Least size in bytes of the chunks of a stream."""
PART, PARTS_AT_ONCE = 8 * 1024 * 1024, 4
"""Size in bytes of the parts in which a large file is sent, and how many are in memory at the same time."""


class ObjectStore(ABC):
    """The operations on one bucket. Keys are relative to the bucket.

    All methods but `put_if` raise StoreUnavailable if the storage cannot be used.
    """

    @property
    def endpoint(self) -> str:
        """The name of the server. A store remembers which servers passed the race check by this name."""
        return f"{type(self).__module__}.{type(self).__qualname__}"

    @abstractmethod
    async def get(self, key: str) -> Object | None:
        """Return the object, or None if there is no such object."""

    async def read(self, key: str) -> bytes | None:
        """Return the content of an object, or None if there is no such object. Often cheaper than `get`."""
        found = await self.get(key)
        return None if found is None else found.body

    @abstractmethod
    async def get_if_changed(self, key: str, etag: str) -> Object | Unchanged | None:
        """Return the object, UNCHANGED if its ETag is still this one, or None if there is no such object."""

    @abstractmethod
    async def get_range(self, key: str, start: int, end: int) -> bytes | None:
        """Return the bytes from `start` up to but not including `end`, or None if there is no such object.

        If the object is shorter than `end`, the bytes up to its end are returned.
        """

    @abstractmethod
    async def put(self, key: str, body: bytes) -> None:
        """Write an object, and replace an existing one."""

    @abstractmethod
    async def put_if(self, key: str, body: bytes, etag: str | None) -> Outcome:
        """Replace the object if it has this ETag, or create it if `etag` is None and there is no such object.

        Sent once and never retried. Raises no error if the storage fails: then the outcome is Unknown.
        """

    @abstractmethod
    def list(self, prefix: str, after: str = "") -> AsyncIterator[Listed]:
        """Iterate over the objects whose keys start with `prefix` and sort after `after`, in ascending order."""

    @abstractmethod
    async def delete(self, keys: Sequence[str]) -> None:
        """Delete objects. Ignores keys without an object."""

    @abstractmethod
    async def download(self, key: str, path: Path) -> bool:
        """Stream an object to a file. Return False if there is no such object. Raises DiskFull."""

    @abstractmethod
    async def stream(self, key: str, start: int = 0, end: int | None = None) -> AsyncGenerator[bytes, None] | None:
        """Return the bytes from `start` up to but not including `end`, or None if there is no such object.

        If the object is shorter than `end`, the bytes up to its end are returned. `end` is larger than `start`. The
        chunks have about STREAM_CHUNK bytes. The iterator raises StoreUnavailable too, also if the object is replaced
        or deleted before the last byte was received.
        """

    @abstractmethod
    async def upload(self, key: str, path: Path) -> None:
        """Stream a file to an object. Takes constant memory."""

    @abstractmethod
    async def head(self, key: str, *, checksum: bool = False) -> Head | None:
        """Return the properties of an object, or None if there is no such object.

        With `checksum=True`, also asks for the SHA-256 that the server keeps if the upload named it.
        """

    @abstractmethod
    async def copy(self, source: str, target: str, etag: str) -> bool:
        """Copy an object of up to 5 GB to another key if it has this ETag, and replace an object there.

        Copies the content only, without content type and other metadata. Returns False if the object has another ETag,
        or if there is no such object. If it raises StoreUnavailable, the copy may still appear later.
        """

    @abstractmethod
    async def verifies_checksums(self, key: str) -> bool:
        """Return whether the server refuses an upload whose content has another SHA-256 than its signed header.

        Tries it once in the life of this store, with an object at this key. Amazon's servers are known to do so.
        """

    @abstractmethod
    async def presign(self, key: str, method: Literal["GET", "PUT"], seconds: int, signed: Signed | None = None) -> str:
        """Return a URL that allows one method on one object for so many seconds.

        `signed` are further parts of the request that the URL fixes. Raises ConfigError if there are any and botocore
        is not installed.
        """


class S3ObjectStore(ObjectStore):
    """One bucket, through obstore.

    Without keys, uses the credentials that obstore finds (environment, web identity, container, instance) or those of
    `credentials`, and renews them before they expire. With an endpoint, addresses are path-style, and plain HTTP is
    allowed if the endpoint says so. Clients of one bucket should share connections: see `s3`. URLs that are presigned
    with `signed` begin with `public_url`, if it is given: the address by which clients reach the server.
    """

    def __init__(
        self,
        bucket: str,
        endpoint_url: str | Secret | None = None,
        access_key_id: str | None = None,
        secret_access_key: str | Secret | None = None,
        region_name: str | None = None,
        session_token: str | None = None,
        public_url: str | None = None,
    ) -> None:
        with driver("s3"):
            import obstore
            from obstore import exceptions
            from obstore.store import MemoryStore, S3Store

        self._obstore, self._errors = obstore, exceptions
        self._endpoint = server_name(endpoint_url)
        self._missing = (FileNotFoundError, exceptions.NotFoundError)
        self._failed = (
            exceptions.BaseError,
            OSError,
        )  # obstore raises Python's own errors if one fits
        options: dict[str, Any] = {"virtual_hosted_style_request": False}
        if endpoint_url is not None:
            options["endpoint"] = plain(endpoint_url).rstrip("/")
        if region_name is not None:
            options["region"] = region_name
        provider: Callable[[], S3Credential] | None = None
        renew: Callable[[], None] | None = None
        if access_key_id is not None:
            # Given as a provider, because obstore would otherwise add the session token of the environment, which
            # belongs to other keys.
            provider = options["credential_provider"] = functools.partial(
                s3_credentials.given_keys, access_key_id, secret_access_key, session_token
            )
        elif (ambient := s3_credentials.provider()) is not None:
            provider = options["credential_provider"] = kept = s3_credentials.KeptCredentials(ambient)
            renew = kept.renew

        trusted = trusted_certificates()

        def client(client_options: ClientConfig, retry_config: RetryConfig) -> S3Store:
            http: ClientConfig = {"allow_http": True, "connect_timeout": "3s", **trusted, **client_options}
            return S3Store(bucket, client_options=http, retry_config=retry_config, **options)

        self._clients = Clients(client, renew)
        self._verifies: bool | None = None
        self._has_ranges = True
        self._signed = SignedRequests(bucket, lambda key: self.presign(key, "GET", 60), provider, renew, public_url)
        wait_at_exit(MemoryStore)  # a call of obstore, after which it drops what its threads gave up

    @property
    @override
    def endpoint(self) -> str:
        return self._endpoint

    @override
    async def get(self, key: str) -> Object | None:
        try:
            return await self._read(key, {})
        except self._failed as error:
            if isinstance(error, self._missing):
                return None
            raise unavailable("GET", key, error) from error

    @override
    async def get_if_changed(self, key: str, etag: str) -> Object | Unchanged | None:
        try:
            return await self._read(key, {"if_none_match": etag})
        except self._failed as error:
            if isinstance(error, self._errors.NotModifiedError):
                return UNCHANGED
            if isinstance(error, self._missing):
                return None
            raise unavailable("GET", key, error) from error

    async def _repeated(self, kind: RequestKind, request: Callable[[S3Store], Awaitable[T]]) -> T:
        """Send a request that may take effect twice. Repeats it on new connections if it gets no answer."""
        attempts = Attempts()
        while True:
            pools = self._clients.current()
            try:
                return await request(pools.client(kind, attempts.count))
            except self._failed as error:
                if isinstance(error, (self._errors.NotModifiedError, *self._missing)):  # these are answers
                    raise
                if not await self._clients.may_repeat(kind, pools, attempts, error):
                    raise

    async def _read(self, key: str, options: Any) -> Object:
        async def request(client: S3Store) -> Object:
            count("GET")
            result = await tracked(self._obstore.get_async(client, key, options=options))
            etag = result.meta["e_tag"]
            return Object(bytes(await tracked(result.bytes_async())), etag or "")

        return await self._repeated("small", request)

    @override
    async def read(self, key: str) -> bytes | None:
        # A GET of a range is one call of obstore, any other GET is two. Each costs about 130 us of CPU.
        try:
            return await (self.get_range(key, 0, 1 << 40) if self._has_ranges else super().read(key))
        except RangesUnsupported:
            self._has_ranges = False
            return await super().read(key)

    @override
    async def get_range(self, key: str, start: int, end: int) -> bytes | None:
        async def request(client: S3Store) -> bytes:
            count("GET")
            return bytes(await tracked(self._obstore.get_range_async(client, key, start=start, end=end)))

        try:
            return await self._repeated("small", request)
        except self._failed as error:
            if isinstance(error, self._missing):
                return None
            if s3_answer(error) == RANGE_NOT_SATISFIABLE:
                return b""
            raise unavailable("GET", key, error) from error

    @override
    async def put(self, key: str, body: bytes) -> None:
        await self._put(key, body, len(body))

    async def _put(self, key: str, body: bytes | Path, size: int) -> None:
        async def request(client: S3Store) -> None:
            count("PUT")
            await tracked(self._obstore.put_async(client, key, body, chunk_size=PART, max_concurrency=PARTS_AT_ONCE))

        try:
            await self._repeated(kind_of(size), request)
        except self._failed as error:
            raise unavailable("PUT", key, error) from error

    @override
    async def put_if(self, key: str, body: bytes, etag: str | None) -> Outcome:
        mode: Any = "create" if etag is None else {"e_tag": etag}
        errors = self._errors
        for again in (False, True):
            count("PUT")
            pools = self._clients.current()
            client = self._clients.swap_client(pools)
            try:
                result = await tracked(self._obstore.put_async(client, key, body, mode=mode, use_multipart=False))
            except (errors.AlreadyExistsError, errors.PreconditionError, *self._missing):
                self._clients.swap_answered()
                return NotStored()
            except Exception as error:  # no other error says that nothing was stored
                if not again and await self._clients.renewed(pools, error):
                    continue
                log.warning("PUT %s: %s", key, describe(error))
                self._clients.swap_failed(pools, error)
                return Unknown(status_and_code(error))
            self._clients.swap_answered()
            new = result["e_tag"]
            return Stored(new, result["version"]) if new else Unknown("the answer has no ETag")
        raise AssertionError("unreachable")

    @override
    async def list(self, prefix: str, after: str = "") -> AsyncIterator[Listed]:
        # obstore lists folders: the prefix up to its last slash. The rest of the prefix is compared here.
        folder = prefix.rpartition("/")[0]
        attempts = Attempts()
        while True:
            pools = self._clients.current()
            client = pools.client("small", attempts.count)
            try:
                async for page in pages(
                    self._obstore.list(client, folder or None, offset=after or None, chunk_size=1000)
                ):
                    count("LIST")
                    attempts = Attempts()
                    for meta in sorted(page, key=lambda meta: meta["path"]):
                        after = meta["path"]  # after a failure the listing continues after this key
                        if after.startswith(prefix):
                            yield Listed(after, meta["size"], meta["last_modified"])
                return
            except self._failed as error:
                if not await self._clients.may_repeat("small", pools, attempts, error):
                    raise unavailable("LIST", prefix, error) from error

    @override
    async def delete(self, keys: Sequence[str]) -> None:
        async def request(client: S3Store) -> None:
            count("DELETE")
            await tracked(self._obstore.delete_async(client, keys))

        try:
            await self._repeated("small", request)
        except self._missing:
            for key in keys if len(keys) > 1 else ():
                await self.delete([key])
        except self._failed as error:
            raise unavailable("DELETE", keys[0], error) from error

    @override
    async def download(self, key: str, path: Path) -> bool:
        reception = self._reception(key)
        try:
            with path.open("wb") as file:  # not in a thread: if the caller is cancelled, it would stay open
                await reception.begin()
                async for chunk in reception.chunks(8 * 1024 * 1024):
                    await asyncio.to_thread(file.write, chunk)
        except self._missing:
            return False
        except self._failed as error:
            if is_full(error, path.parent):
                raise full(error, path.parent, reception.size) from error
            raise unavailable("GET", key, error) from error
        return True

    @override
    async def stream(self, key: str, start: int = 0, end: int | None = None) -> AsyncGenerator[bytes, None] | None:
        reception = self._reception(key, start, end)
        try:
            await reception.begin()
        except self._failed as error:
            if isinstance(error, self._missing):
                return None
            if s3_answer(error) == RANGE_NOT_SATISFIABLE:
                return no_bytes()
            raise unavailable("GET", key, error) from error
        return self._received(key, reception)

    async def _received(self, key: str, reception: Reception) -> AsyncGenerator[bytes, None]:
        try:
            async with contextlib.aclosing(reception.chunks(STREAM_CHUNK)) as chunks:
                async for chunk in chunks:
                    yield bytes(chunk)
        except self._failed as error:
            raise unavailable("GET", key, error) from error

    def _reception(self, key: str, start: int = 0, end: int | None = None) -> Reception:
        async def get(client: S3Store, options: Any) -> Any:
            count("GET")
            return await tracked(self._obstore.get_async(client, key, options=options))

        return Reception(self._clients, get, self._failed, start, end)

    @override
    async def upload(self, key: str, path: Path) -> None:
        body = await asyncio.to_thread(content_of, path)
        await self._put(key, body, len(body) if isinstance(body, bytes) else FILE + 1)

    @override
    async def head(self, key: str, *, checksum: bool = False) -> Head | None:
        async def request(client: S3Store) -> Head:
            meta = await tracked(self._obstore.head_async(client, key))
            return Head(meta["size"], meta["e_tag"] or "", meta["last_modified"])

        count("HEAD")
        if checksum:
            return await self._signed.head(key)
        try:
            return await self._repeated("small", request)
        except self._failed as error:
            if isinstance(error, self._missing):
                return None
            raise unavailable("HEAD", key, error) from error

    @override
    async def copy(self, source: str, target: str, etag: str) -> bool:
        count("COPY")
        return await self._signed.copy(source, target, etag)

    @override
    async def verifies_checksums(self, key: str) -> bool:
        if self._endpoint == "aws":
            return True
        if self._verifies is None:
            self._verifies = await self._signed.verifies_checksums(key)
            await self.delete([key])
        return self._verifies

    @override
    async def presign(self, key: str, method: Literal["GET", "PUT"], seconds: int, signed: Signed | None = None) -> str:
        if signed is not None:
            return await self._signed.presign(key, method, seconds, signed)
        client = self._clients.current().client("small", 0)
        return await tracked(self._obstore.sign_async(client, method, key, timedelta(seconds=seconds)))


def s3(
    bucket: str,
    endpoint_url: str | Secret | None = None,
    access_key_id: str | None = None,
    secret_access_key: str | Secret | None = None,
    region_name: str | None = None,
    public_url: str | None = None,
) -> S3ObjectStore:
    """Return the client of a bucket. All stores of the process share it, and so its connections."""
    return _shared(bucket, hidden(endpoint_url), access_key_id, hidden(secret_access_key), region_name, public_url)


@functools.lru_cache(maxsize=64)
def _shared(
    bucket: str,
    endpoint_url: Secret | None,
    access_key_id: str | None,
    secret_access_key: Secret | None,
    region_name: str | None,
    public_url: str | None,
) -> S3ObjectStore:
    given = endpoint_url, access_key_id, secret_access_key, region_name
    return S3ObjectStore(bucket, *given, public_url=public_url)


__all__ = [
    "CACHED",
    "CONCURRENT_GETS",
    "REQUESTS",
    "STREAM_CHUNK",
    "UNCHANGED",
    "Head",
    "Listed",
    "NotStored",
    "Object",
    "ObjectStore",
    "Outcome",
    "S3ObjectStore",
    "Signed",
    "Stored",
    "Unchanged",
    "Unknown",
    "s3",
]
