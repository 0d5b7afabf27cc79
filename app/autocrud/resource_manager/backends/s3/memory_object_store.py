"""An object store in memory, for tests and simulations, with configurable faults and latency.

    store = MemoryObjectStore()
    store.fault = lambda call: LOST_ANSWER if call.op == "put_if" else None
    store.latency = lambda call: 0.020

    store.check_then_act = lambda: 0.003

Its operations are atomic. With `check_then_act`, a conditional PUT compares first, and writes so many seconds later.
This simulates a faulty server that loses acknowledged writes. Latency uses the clock of the event loop, so it costs no
real time on an event loop with virtual time. `requests` counts the requests by operation.

`use` sends a request by a presigned URL, as a client would. With `keeps_checksums = False`, the store does not check
or keep the checksums of uploads; with `checks_copies = False`, it ignores the condition of copies. There are servers
that do so.
"""

from __future__ import annotations

import asyncio
import hashlib
import threading
from base64 import b64encode
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar
from urllib.parse import urlencode

from typing_extensions import override

from ....errors import StoreUnavailable
from .object_store import (
    STREAM_CHUNK,
    UNCHANGED,
    Head,
    Listed,
    NotStored,
    Object,
    ObjectStore,
    Outcome,
    Signed,
    Stored,
    Unchanged,
    Unknown,
)

T = TypeVar("T")
Operation = Literal["get", "get_if", "put", "put_if", "list", "delete", "head", "copy"]
CHECKSUM = "x-amz-checksum-sha256"


class Call(NamedTuple):
    """A request to the store. `size` is that of its body, in bytes."""

    op: Operation
    key: str
    size: int = 0


class InjectedFault(NamedTuple):
    """A fault of one request.

    `answer` is the answer to the client: "unknown" (a time-out, 5xx, 403, ...) or "conflict" (409, 412). `applied` says
    whether the request takes effect all the same. `late` is the delay in seconds after which it takes effect.
    """

    answer: Literal["unknown", "conflict"] = "unknown"
    applied: bool = False
    late: float | None = None


class _Presigned(NamedTuple):
    """The request that a presigned URL allows. The names of the headers are in lower case."""

    method: str
    key: str
    until: datetime
    headers: Mapping[str, str]


class PresignedAnswer(NamedTuple):
    """The answer to a request by a presigned URL."""

    status: int
    body: bytes = b""


DROPPED = InjectedFault()
LOST_ANSWER = InjectedFault(applied=True)
FALSE_CONFLICT = InjectedFault("conflict")


class MemoryObjectStore(ObjectStore):
    """An object store in memory.

    Attributes:
        objects: The objects by key.
        requests: The number of requests by operation.
        bytes_put: The bytes of all bodies that were sent.
        fault: Returns the fault of a request, or None.
        latency: Returns the latency of a request in seconds.
        check_then_act: Returns the seconds between comparing and writing; None for an atomic store.
        keeps_checksums: Whether the store checks and keeps the checksum of an upload.
        checks_copies: Whether the store honours the condition of a copy.
        clock: Returns the time of the server.
        modified: The time of the last write by key.
        stream_chunk: The size in bytes of the chunks of a stream. Each one is a request.
    """

    def __init__(self) -> None:
        self.objects: dict[str, Object] = {}
        self.modified: dict[str, datetime] = {}
        self.clock: Callable[[], datetime] = lambda: datetime.now(UTC)
        self.stream_chunk = STREAM_CHUNK
        self.requests: Counter[str] = Counter()
        self.bytes_put = 0
        self.fault: Callable[[Call], InjectedFault | None] = lambda _: None
        self.latency: Callable[[Call], float] = lambda _: 0.0
        self.check_then_act: Callable[[], float] | None = None
        self.keeps_checksums, self.checks_copies = True, True
        self._checksums: dict[str, str] = {}
        self._presigned: dict[str, _Presigned] = {}
        self._lock = threading.Lock()
        self._late: set[asyncio.Task[None]] = set()

    async def _serve(self, call: Call, work: Callable[[InjectedFault | None], T]) -> T:
        """Run a request. Half of its latency passes before it takes effect, half after: the answer may be outdated."""
        self.requests[call.op] += 1
        self.bytes_put += call.size
        delay = self.latency(call)
        if delay:
            await asyncio.sleep(delay / 2)
        try:
            return work(self.fault(call))
        finally:
            if delay:
                await asyncio.sleep(delay / 2)

    @override
    async def get(self, key: str) -> Object | None:
        return await self._serve(Call("get", key), lambda fault: self._found(fault, key))

    @override
    async def get_range(self, key: str, start: int, end: int) -> bytes | None:
        found = await self.get(key)
        return None if found is None else found.body[start:end]

    @override
    async def get_if_changed(self, key: str, etag: str) -> Object | Unchanged | None:
        def work(fault: InjectedFault | None) -> Object | Unchanged | None:
            found = self._found(fault, key)
            return UNCHANGED if found is not None and found.etag == etag else found

        return await self._serve(Call("get_if", key), work)

    def _found(self, fault: InjectedFault | None, key: str) -> Object | None:
        if fault is not None:
            raise _down()
        return self.objects.get(key)

    @override
    async def put(self, key: str, body: bytes) -> None:
        def work(fault: InjectedFault | None) -> None:
            if fault is None or fault.applied:
                self._store(key, body)
            if fault is not None:
                raise _down()

        await self._serve(Call("put", key, len(body)), work)

    def _store(self, key: str, body: bytes, sha256: str | None = None) -> str:
        etag = f'"{hashlib.md5(body, usedforsecurity=False).hexdigest()}"'  # depends on the content only, as on S3
        self.objects[key] = Object(bytes(body), etag)
        self.modified[key] = self.clock()
        self._checksums.pop(key, None)
        if sha256 is not None and self.keeps_checksums:
            self._checksums[key] = sha256
        return etag

    def _head(self, key: str) -> Head | None:
        found = self.objects.get(key)
        if found is None:
            return None
        return Head(len(found.body), found.etag, self.modified.get(key, self.clock()), self._checksums.get(key))

    def _swap(self, key: str, body: bytes, etag: str | None) -> Outcome:
        with self._lock:
            found = self.objects.get(key)
            if (None if found is None else found.etag) != etag:
                return NotStored()
            return Stored(self._store(key, body))

    @override
    async def put_if(self, key: str, body: bytes, etag: str | None) -> Outcome:
        def work(fault: InjectedFault | None) -> Outcome:
            if fault is None:
                return self._swap(key, body, etag)
            if fault.late is not None:
                self._later(self._land(fault.late, key, body, etag))
            elif fault.applied:
                self._swap(key, body, etag)
            return NotStored() if fault.answer == "conflict" else Unknown("injected")

        if self.check_then_act is not None:
            return await self._put_late(Call("put_if", key, len(body)), body, etag, self.check_then_act())
        return await self._serve(Call("put_if", key, len(body)), work)

    async def _put_late(self, call: Call, body: bytes, etag: str | None, seconds: float) -> Outcome:
        def compare(fault: InjectedFault | None) -> Outcome | None:
            if fault is not None:
                return NotStored() if fault.answer == "conflict" else Unknown("injected")
            found = self.objects.get(call.key)
            return None if (None if found is None else found.etag) == etag else NotStored()

        refused = await self._serve(call, compare)
        if refused is not None:
            return refused
        await asyncio.sleep(seconds)
        return Stored(self._store(call.key, body))

    def _later(self, effect: Coroutine[Any, Any, None]) -> None:
        self._late.add(task := asyncio.create_task(effect))
        task.add_done_callback(self._late.discard)

    async def _land(self, seconds: float, key: str, body: bytes, etag: str | None) -> None:
        await asyncio.sleep(seconds)
        self._swap(key, body, etag)

    @override
    async def list(self, prefix: str, after: str = "") -> AsyncIterator[Listed]:
        def work(fault: InjectedFault | None) -> Sequence[Listed]:
            if fault is not None:
                raise _down()
            keys = sorted(key for key in self.objects if key.startswith(prefix) and key > after)
            heads = [(key, self._head(key)) for key in keys]
            return [Listed(key, head.size, head.modified) for key, head in heads if head is not None]

        for listed in await self._serve(Call("list", prefix), work):
            yield listed

    @override
    async def delete(self, keys: Sequence[str]) -> None:
        def work(fault: InjectedFault | None) -> None:
            if fault is None or fault.applied:
                for key in keys:
                    self.objects.pop(key, None)
            if fault is not None:
                raise _down()

        await self._serve(Call("delete", keys[0] if keys else ""), work)

    @override
    async def download(self, key: str, path: Path) -> bool:
        found = await self.get(key)
        if found is not None:
            await asyncio.to_thread(path.write_bytes, found.body)
        return found is not None

    @override
    async def stream(self, key: str, start: int = 0, end: int | None = None) -> AsyncGenerator[bytes, None] | None:
        found = await self.get(key)
        return None if found is None else self._chunks(key, found, start, len(found.body) if end is None else end)

    async def _chunks(self, key: str, found: Object, start: int, end: int) -> AsyncGenerator[bytes, None]:
        for at in range(start, min(end, len(found.body)), self.stream_chunk):
            # As on S3, where a stream that is continued needs the same object.
            if at > start and await self._serve(Call("get", key), lambda fault: self._found(fault, key)) != found:
                raise _down()
            yield found.body[at : min(at + self.stream_chunk, end)]

    @override
    async def upload(self, key: str, path: Path) -> None:
        await self.put(key, await asyncio.to_thread(path.read_bytes))

    @override
    async def head(self, key: str, *, checksum: bool = False) -> Head | None:
        def work(fault: InjectedFault | None) -> Head | None:
            if fault is not None:
                raise _down()
            found = self._head(key)
            return found if found is None or checksum else found._replace(sha256=None)

        return await self._serve(Call("head", key), work)

    @override
    async def copy(self, source: str, target: str, etag: str) -> bool:
        def work(fault: InjectedFault | None) -> bool:
            if fault is not None and fault.late is not None:
                self._later(self._copy_late(fault.late, source, target, etag))
            elif fault is None or fault.applied:
                copied = self._copy(source, target, etag)
            if fault is not None:
                raise _down()
            return copied

        return await self._serve(Call("copy", target), work)

    def _copy(self, source: str, target: str, etag: str) -> bool:
        found = self.objects.get(source)
        if found is None or (self.checks_copies and found.etag != etag):
            return False
        self._store(target, found.body, self._checksums.get(source))
        return True

    async def _copy_late(self, seconds: float, source: str, target: str, etag: str) -> None:
        await asyncio.sleep(seconds)
        self._copy(source, target, etag)

    @override
    async def verifies_checksums(self, key: str) -> bool:
        return self.keeps_checksums

    @override
    async def presign(self, key: str, method: Literal["GET", "PUT"], seconds: int, signed: Signed | None = None) -> str:
        number, signed = str(len(self._presigned)), signed or Signed()
        parameters = {**signed.query, "method": method, "expires": str(seconds), "number": number}
        url = f"memory:///{key}?{urlencode(parameters)}"
        headers = {name.lower(): value for name, value in signed.headers.items()}
        self._presigned[url] = _Presigned(method, key, self.clock() + timedelta(seconds=seconds), headers)
        return url

    async def use(self, method: str, url: str, body: bytes = b"", headers: Mapping[str, str] = {}) -> PresignedAnswer:
        """Send a request by a presigned URL. Raises StoreUnavailable if there is a fault: there is no answer."""
        signed, given = self._presigned.get(url), {name.lower(): value for name, value in headers.items()}
        given.setdefault("content-length", str(len(body)))
        if signed is None or signed.method != method or signed.until < self.clock():
            return PresignedAnswer(403)
        if any(given.get(name) != value for name, value in signed.headers.items()):
            return PresignedAnswer(403)
        if method == "GET":
            found = await self.get(signed.key)
            return PresignedAnswer(404) if found is None else PresignedAnswer(200, found.body)
        digest = hashlib.sha256(body)
        if self.keeps_checksums and CHECKSUM in given and given[CHECKSUM] != b64encode(digest.digest()).decode():
            return PresignedAnswer(400)

        def work(fault: InjectedFault | None) -> PresignedAnswer:
            if fault is None or fault.applied:
                self._store(signed.key, body, digest.hexdigest() if CHECKSUM in given else None)
            if fault is not None:
                raise _down()
            return PresignedAnswer(200)

        return await self._serve(Call("put", signed.key, len(body)), work)


def _down() -> StoreUnavailable:
    return StoreUnavailable("the object storage cannot be used right now; nothing was changed")
