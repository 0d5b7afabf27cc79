"""The requests of `s3_check`: signed ones of the engine's client, with a record of every key, and unsigned ones."""

from __future__ import annotations

import asyncio
import os
import ssl
import time
import urllib.error
import urllib.request
from collections.abc import AsyncGenerator, AsyncIterator, Coroutine, Mapping, Sequence
from datetime import datetime
from email.utils import parsedate_to_datetime
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, NamedTuple, Self, TypeVar

from msgspec import Struct
from typing_extensions import override

from ..autocrud.errors import StoreUnavailable
from ..autocrud.resource_manager.backends.s3.errors import describe, s3_answer
from ..autocrud.resource_manager.backends.s3.object_store import (
    Head,
    Listed,
    Object,
    ObjectStore,
    Outcome,
    S3ObjectStore,
    Signed,
    Stored,
    Unchanged,
    Unknown,
)
from ..autocrud.resource_manager.runtime.threads import shielded

T = TypeVar("T")

ANSWER_TIMEOUT_S = 20.0
WRONG_KEYS = (
    "AuthFailure",
    "ExpiredToken",
    "InvalidAccessKeyId",
    "InvalidClientTokenId",
    "InvalidToken",
    "SignatureDoesNotMatch",
    "TokenRefreshRequired",
)
WRONG_REGION = ("AuthorizationHeaderMalformed", "IllegalLocationConstraintException", "PermanentRedirect")
"""Codes in error responses of S3."""


class RecordedObjects(ObjectStore):
    """An object store that records each key that may have an object.

    PUTs run to completion even if the caller is cancelled.
    """

    def __init__(self, objects: S3ObjectStore) -> None:
        self._objects = objects
        self._under_way: set[asyncio.Task[Any]] = set()
        self.written: set[str] = set()
        """Keys under which an object was stored or may have been stored."""
        self.unanswered = 0
        """Number of PUTs without a response, which may take effect later."""

    @property
    @override
    def endpoint(self) -> str:
        return self._objects.endpoint

    async def finish(self) -> None:
        """Wait until no PUT is in progress. The time limits of the client end each of them."""
        while self._under_way:
            await asyncio.wait(self._under_way)

    async def _to_the_end(self, request: Coroutine[Any, Any, T]) -> T:
        task = asyncio.get_running_loop().create_task(request)
        self._under_way.add(task)
        task.add_done_callback(self._under_way.discard)
        return await shielded(task)

    @override
    async def put(self, key: str, body: bytes) -> None:
        await self._to_the_end(self._noted(key, self._objects.put(key, body)))

    @override
    async def upload(self, key: str, path: Path) -> None:
        await self._to_the_end(self._noted(key, self._objects.upload(key, path)))

    async def _noted(self, key: str, request: Coroutine[Any, Any, None]) -> None:
        try:
            await request
        except StoreUnavailable as error:
            answer = answer_to(error)
            if answer is None:
                self.unanswered += 1
            if answer is None or answer[0] >= 500:
                self.written.add(key)
            raise
        self.written.add(key)

    @override
    async def put_if(self, key: str, body: bytes, etag: str | None) -> Outcome:
        return await self._to_the_end(self._noted_if(key, body, etag))

    async def _noted_if(self, key: str, body: bytes, etag: str | None) -> Outcome:
        outcome = await self._objects.put_if(key, body, etag)
        if isinstance(outcome, Unknown):
            status = outcome.reason[:3]
            if not status.isdigit():
                self.unanswered += 1
            if not status.isdigit() or status >= "500":
                self.written.add(key)
        elif isinstance(outcome, Stored):
            self.written.add(key)
        return outcome

    async def use_presigned(
        self, method: Literal["GET", "PUT"], url: str, key: str, body: bytes, headers: Mapping[str, str] = {}
    ) -> Answer | str:
        """Send a body by a presigned URL for `key`. Return the response, or the reason why there was none."""
        self.written.add(key)
        return await self._to_the_end(ask(method, url, body, headers))

    @override
    async def get(self, key: str) -> Object | None:
        return await self._objects.get(key)

    @override
    async def get_range(self, key: str, start: int, end: int) -> bytes | None:
        return await self._objects.get_range(key, start, end)

    @override
    async def get_if_changed(self, key: str, etag: str) -> Object | Unchanged | None:
        return await self._objects.get_if_changed(key, etag)

    @override
    async def list(self, prefix: str, after: str = "") -> AsyncIterator[Listed]:
        async for listed in self._objects.list(prefix, after):
            yield listed

    @override
    async def delete(self, keys: Sequence[str]) -> None:
        await self._objects.delete(keys)

    @override
    async def download(self, key: str, path: Path) -> bool:
        return await self._objects.download(key, path)

    @override
    async def stream(self, key: str, start: int = 0, end: int | None = None) -> AsyncGenerator[bytes, None] | None:
        return await self._objects.stream(key, start, end)

    @override
    async def head(self, key: str, *, checksum: bool = False) -> Head | None:
        return await self._objects.head(key, checksum=checksum)

    @override
    async def copy(self, source: str, target: str, etag: str) -> bool:
        self.written.add(target)
        return await self._to_the_end(self._objects.copy(source, target, etag))

    @override
    async def verifies_checksums(self, key: str) -> bool:
        return await self._to_the_end(self._objects.verifies_checksums(key))

    @override
    async def presign(self, key: str, method: Literal["GET", "PUT"], seconds: int, signed: Signed | None = None) -> str:
        return await self._objects.presign(key, method, seconds, signed)


class Answer(NamedTuple):
    """The response to an unsigned request, with the local times before and after it (seconds since 1970)."""

    status: int
    body: bytes
    date: str | None
    sent: float
    received: float
    headers: Mapping[str, str] = MappingProxyType({})
    """With names in lower case."""


async def ask(method: str, url: str, body: bytes | None = None, headers: Mapping[str, str] = {}) -> Answer | str:
    """Send an unsigned request. Return the response, or the reason why there was none."""
    return await asyncio.to_thread(_ask, method, url, body, headers)


def _ask(method: str, url: str, body: bytes | None, headers: Mapping[str, str]) -> Answer | str:
    request = urllib.request.Request(url, data=body, headers=dict(headers), method=method)
    sent = time.time()
    try:
        with urllib.request.urlopen(request, timeout=ANSWER_TIMEOUT_S, context=_trusting()) as response:
            return _answer(response.status, response, sent)
    except urllib.error.HTTPError as error:
        with error:
            return _answer(error.code, error, sent)
    except urllib.error.URLError as error:  # without the URL, which may contain a signature
        return str(error.reason)
    except (OSError, ValueError) as error:
        return type(error).__name__


def _answer(status: int, response: Any, sent: float) -> Answer:
    headers = {name.lower(): value for name, value in response.headers.items()}
    return Answer(status, response.read(), headers.get("date"), sent, time.time(), headers)


def _trusting() -> ssl.SSLContext:
    context = ssl.create_default_context()
    if bundle := os.environ.get("AWS_CA_BUNDLE"):
        context.load_verify_locations(bundle)
    return context


def clock_skew_s(answer: Answer) -> float | None:
    """Return the least possible difference of the clocks in seconds, or None if the response has no Date.

    The difference is positive if the server's clock is ahead.
    """
    try:
        told: datetime = parsedate_to_datetime(answer.date or "")
    except ValueError:
        return None
    low, high = answer.sent - told.timestamp() - 1, answer.received - told.timestamp()
    return 0.0 if low <= 0 <= high else -low if low > 0 else -high


class Timings(Struct, frozen=True):
    """The duration of one kind of request."""

    request: str
    count: int
    p50_ms: float
    p99_ms: float

    @classmethod
    def of(cls, request: str, took_s: Sequence[float]) -> Self:
        """Return the percentiles by nearest rank of at least one duration in seconds."""
        ordered = sorted(took_s)

        def rank(percent: int) -> float:
            return round(1000 * ordered[max(0, -(-len(ordered) * percent // 100) - 1)], 2)

        return cls(request, len(ordered), rank(50), rank(99))

    def sentence(self) -> str:
        """Return the percentiles as a sentence."""
        return f"{self.request} takes {self.p50_ms:g} ms (p50) and {self.p99_ms:g} ms (p99) of {self.count}"


def failed_check(found: tuple[int, str] | None, reason: str) -> str | None:
    """Return the name of the check to which a failed LIST belongs, or None if only a permission may be missing."""
    if found is None:
        if "set AWS_REGION" in reason:  # a redirect without a target
            return "region"
        return "TLS" if reason.partition(": ")[2].startswith("TLS: ") else "server"
    status, code = found
    if code in WRONG_KEYS:
        return "keys"
    if code in WRONG_REGION or status in (301, 307):
        return "region"
    if code in ("RequestTimeTooSkewed", "RequestExpired"):
        return "clock"
    if code == "NoSuchBucket":
        return "bucket"
    return None if status == 403 and code else "server"


def reason_of(error: StoreUnavailable) -> str:
    """Return the server's error, or the reason why there was no response, in one line."""
    return error.detail if error.__cause__ is None else describe(error.__cause__)


def answer_to(error: StoreUnavailable) -> tuple[int, str] | None:
    """Return status and code of the response that caused an error, or None if there was no response."""
    return None if error.__cause__ is None else s3_answer(error.__cause__)
