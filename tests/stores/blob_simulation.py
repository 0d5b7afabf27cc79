"""The world of `test_blob_simulation`: a bucket with virtual time, and processes that are killed, frozen and cut off.

Each request of a process to the bucket passes a gate, before and after it takes effect. There the process may be
killed: it never gets an answer, and sends nothing any more. Or it may be frozen: all its requests wait. A request may
also be lost before or after it takes effect, or take effect later, when its process may have ended.
"""

from __future__ import annotations

import asyncio
import contextvars
import datetime as dt
import random
import re
import time
from collections import Counter
from collections.abc import Callable
from typing import Any, TypeVar

import pytest

from app.autocrud.errors import StoreUnavailable
from app.autocrud.resource_manager.backends.s3.memory_object_store import (
    DROPPED,
    FALSE_CONFLICT,
    LOST_ANSWER,
    Call,
    InjectedFault,
    MemoryObjectStore,
)
from app.autocrud.resource_manager.backends.s3_sqlite import race_check
from app.autocrud.resource_manager.basic import BLOB_KEY
from app.autocrud.resource_manager.contract import snapshots
from app.autocrud.resource_manager.storage import direct_s3
from tests.virtual_time import VirtualTimeLoop

T = TypeVar("T")

START = dt.datetime(2026, 1, 1, tzinfo=dt.UTC)
PIN_S, KEEP_S, URL_S, STAGING_S = 10.0, 6.0, 15, 15
"""Seconds that a pin lives without a renewal, an unused upload is kept, a URL can be used, and a staging object lies
after that. They are short, so that a few minutes have everything."""
FREEZES = ((0.5, 4), (PIN_S, 2 * PIN_S), (3 * PIN_S, 5 * PIN_S))
LATE_S = 4.0
BODIES, BLOBS = "data/", "blobs/"
_BODY = re.compile(r"[0-9]+/[0-9a-f-]{36}")

slowness = contextvars.ContextVar("slowness", default=1.0)
"""How many times longer the requests of a task take."""


def now() -> dt.datetime:
    return START + dt.timedelta(seconds=asyncio.get_running_loop().time())


def set_times(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let all clocks show virtual time, and shorten the times of the product."""
    monkeypatch.setattr(snapshots, "PIN_LIFE_S", PIN_S)
    monkeypatch.setattr(snapshots, "RENEW_PIN_S", PIN_S / 10)
    monkeypatch.setattr(direct_s3, "URL_LIFE_S", URL_S)
    monkeypatch.setattr(direct_s3, "KEEP_STAGING_S", STAGING_S)
    real = time.monotonic

    def monotonic() -> float:
        loop = asyncio._get_running_loop()
        return loop.time() if isinstance(loop, VirtualTimeLoop) else real()

    monkeypatch.setattr(time, "monotonic", monotonic)


def _weight(call: Call) -> int:
    """Return how many times more likely a failure of a request is, because there are few such requests."""
    if call.op in ("delete", "copy") or BLOB_KEY.fullmatch(call.key.removeprefix(BLOBS)):
        return 12
    return 4 if call.key.startswith(BLOBS) else 1


class Bucket(MemoryObjectStore):
    """The bucket, which processes see as `ProcessBucket`.

    trouble    how many of the requests fail
    violence   how many requests are the last ones of their process, or freeze it
    requested  how often a process asked to store a key of content or of a body
    """

    def __init__(self, draw: random.Random) -> None:
        super().__init__()
        self.random = draw
        self.trouble = draw.choice([0.0, 0.01, 0.03, 0.06])
        self.violence = draw.choice([0.0, 0.0005, 0.0015])
        self.latency_s = latency_s = draw.choice([0.02, 0.1, 0.3])  # the longer requests take, the more of them overlap
        self.latency = lambda _: slowness.get() * draw.expovariate(1 / latency_s)
        self.clock = now
        self.requested: Counter[str] = Counter()
        self.ended = asyncio.Event()

    def calm(self) -> None:
        """End all failures."""
        self.trouble = self.violence = 0.0

    def faults(self, call: Call) -> InjectedFault | None:
        draw = self.random
        if draw.random() >= min(0.5, self.trouble * _weight(call)):
            return None
        if call.op in ("get", "get_if", "list", "head"):
            return DROPPED
        late = InjectedFault("unknown", late=draw.expovariate(1 / LATE_S))
        return draw.choice([DROPPED, LOST_ANSWER, late, FALSE_CONFLICT if call.op == "put_if" else DROPPED])

    def content(self) -> set[str]:
        """Return the keys of all blobs whose content is stored."""
        names = {key.removeprefix(BLOBS) for key in self.objects if key.startswith(BLOBS)}
        return {name for name in names if BLOB_KEY.fullmatch(name)}

    def staged(self) -> set[str]:
        """Return the objects of direct uploads."""
        return {key for key in self.objects if key.startswith(f"{BLOBS}uploads/")} - {f"{BLOBS}uploads/now"}

    def bodies(self) -> set[str]:
        """Return the uids of all stored bodies."""
        names = {key.removeprefix(BODIES) for key in self.objects if key.startswith(BODIES)}
        return {name for name in names if _BODY.fullmatch(name)}


class ProcessBucket(MemoryObjectStore):
    """The bucket as one process sees it."""

    def __init__(self, bucket: Bucket) -> None:
        super().__init__()
        self.bucket = bucket
        self.objects, self.modified, self.clock = bucket.objects, bucket.modified, bucket.clock
        self._checksums, self._presigned, self._late = bucket._checksums, bucket._presigned, bucket._late
        self.latency, self.fault = bucket.latency, bucket.faults
        race_check._passed.add(self)  # the check of a server takes hundreds of requests, and a lock of all processes
        self.killed, self.frozen_until = asyncio.Event(), 0.0

    async def _gate(self, call: Call) -> None:
        loop, bucket = asyncio.get_running_loop(), self.bucket
        if bucket.random.random() < bucket.violence * _weight(call):
            if bucket.random.random() < 0.4:
                self.killed.set()
            else:
                self.frozen_until = loop.time() + bucket.random.uniform(*bucket.random.choice(FREEZES))
        while not self.killed.is_set() and loop.time() < self.frozen_until:
            await asyncio.sleep(self.frozen_until - loop.time())
        if self.killed.is_set():
            await bucket.ended.wait()
            raise asyncio.CancelledError

    async def _serve(self, call: Call, work: Callable[[InjectedFault | None], T]) -> T:
        if call.op in ("put", "copy") and (
            BLOB_KEY.fullmatch(call.key.removeprefix(BLOBS)) or _BODY.fullmatch(call.key.removeprefix(BODIES))
        ):
            self.bucket.requested[call.key] += 1
        await self._gate(call)
        try:
            return await super()._serve(call, work)
        finally:
            await self._gate(call)

    async def put(self, key: str, body: bytes) -> None:
        await self._late_or(lambda: self._store(key, body), super().put(key, body))

    async def delete(self, keys: Any) -> None:
        def effect() -> None:
            for key in keys:
                self.objects.pop(key, None)

        await self._late_or(effect, super().delete(keys))

    async def _late_or(self, effect: Callable[[], object], request: Any) -> None:
        """Send a request. The faults of MemoryObjectStore cannot delay the effect of this one, so it is done here."""
        delays: list[float] = []

        def fault(call: Call) -> InjectedFault | None:
            found = self.bucket.faults(call)
            if found is not None and found.late is not None:
                delays.append(found.late)
            return found

        async def later() -> None:
            await asyncio.sleep(delays[0])
            effect()

        self.fault = fault
        try:
            await request
        except StoreUnavailable:
            if delays:
                self._later(later())
            raise
        finally:
            self.fault = self.bucket.faults
