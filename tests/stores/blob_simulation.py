"""The world of `test_blob_simulation` and `test_pack_simulation`: processes on one bucket, in virtual time.

They are killed, frozen and cut off.

Each request of a process to the bucket passes a gate, before and after it takes effect. There the process may be
killed: it never gets an answer, and sends nothing any more. Or it may be frozen: all its requests wait. A request may
also be lost before or after it takes effect, or take effect later, when its process may have ended.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import datetime as dt
import random
import re
import time
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

import pytest
from typing_extensions import override

from app.autocrud.errors import OutcomeUnknown, StoreUnavailable, WriteContention
from app.autocrud.resource_manager.backends.s3.memory_object_store import (
    DROPPED,
    FALSE_CONFLICT,
    LOST_ANSWER,
    Call,
    InjectedFault,
    MemoryObjectStore,
)
from app.autocrud.resource_manager.backends.s3.object_store import Outcome, Stored
from app.autocrud.resource_manager.backends.s3_sqlite import race_check
from app.autocrud.resource_manager.basic import BLOB_KEY
from app.autocrud.resource_manager.contract import snapshots
from app.autocrud.resource_manager.core import ResourceManager
from app.autocrud.resource_manager.resource_store.packs import FOLDER, PADDING, SUFFIX, place_of, places_by_pack
from app.autocrud.resource_manager.storage import direct_s3
from tests.virtual_time import VirtualTimeLoop

T = TypeVar("T")

START = dt.datetime(2026, 1, 1, tzinfo=dt.UTC)
PIN_S, KEEP_S, URL_S, STAGING_S = 10.0, 6.0, 15, 15
"""Seconds that a pin lives without a renewal, an unused upload is kept, a URL can be used, and a staging object lies
after that. They are short, so that a few minutes have everything."""
FREEZES = ((0.5, 4), (PIN_S, 2 * PIN_S), (3 * PIN_S, 5 * PIN_S))
LATE_S = 4.0
REPEATED, REPEATED_AFTER_S = 0.05, 15.0
"""How many PUTs take effect twice, and after how many seconds the second time."""
BODIES, BLOBS = "data/", "blobs/"
PACKS = BODIES + FOLDER
PROCESSES = 3
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
    return 4 if call.key.startswith((BLOBS, PACKS)) else 1


class Bucket(MemoryObjectStore):
    """The bucket, which processes see as `ProcessBucket`.

    trouble    how many of the requests fail
    violence   how many requests are the last ones of their process, or freeze it
    requested  how often a process asked to store a key of content, of a body or of a pack
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

    def has_body(self, uid: str) -> bool:
        """Return whether a byte of a body is stored."""
        place = place_of(uid)
        if place is None:
            return f"{BODIES}{uid}" in self.objects
        found = self.objects.get(f"{PACKS}{place.pack}{SUFFIX}")
        return found is not None and any(found.body[place.start : place.end])

    def check_bodies(self, uids: set[str]) -> None:
        """Check that exactly these bodies are stored, and nothing else in packs."""
        places = places_by_pack(uids)
        assert self.bodies() == {uid for uid in uids if place_of(uid) is None}, "a body is lost, or is an orphan"
        found = {key: stored.body for key, stored in self.objects.items() if key.startswith(PACKS)}
        assert found.keys() == {f"{PACKS}{pack}{SUFFIX}" for pack in places}, "a pack is lost, or is an orphan"
        for pack, of_pack in places.items():
            rest = bytearray(found[f"{PACKS}{pack}{SUFFIX}"])
            assert len(rest) % PADDING == len(of_pack), "the length of a pack does not tell how many bodies it has"
            for place in of_pack:
                assert rest[place.start], "a body is lost"
                rest[place.start : place.end] = bytes(place.end - place.start)
            assert not any(rest), "a pack has an orphan"


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
            BLOB_KEY.fullmatch(call.key.removeprefix(BLOBS))
            or _BODY.fullmatch(call.key.removeprefix(BODIES))
            or call.key.startswith(PACKS)
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


class RepeatingBucket(ProcessBucket):
    """The bucket as one process sees it. A PUT of a body or a pack may take effect twice."""

    @override
    async def put(self, key: str, body: bytes) -> None:
        await super().put(key, body)
        if self._is_repeated(key):
            self._later(self._again(key, body))

    async def _again(self, key: str, body: bytes) -> None:
        await asyncio.sleep(self._delay())
        self._store(key, body)

    @override
    async def put_if(self, key: str, body: bytes, etag: str | None) -> Outcome:
        outcome = await super().put_if(key, body, etag)
        if isinstance(outcome, Stored) and self._is_repeated(key):
            self._later(self._land(self._delay(), key, body, etag))
        return outcome

    def _is_repeated(self, key: str) -> bool:
        return key.startswith(BODIES) and self.bucket.trouble > 0 and self.bucket.random.random() < REPEATED

    def _delay(self) -> float:
        return self.bucket.random.expovariate(1 / REPEATED_AFTER_S)


class Processes(ABC):
    """Processes on one bucket. In each of PROCESSES slots, one process follows the other."""

    sweep_pause_s = 0.5, 5.0

    def __init__(self, seed: int, duration_s: float, life_s: float) -> None:
        self.random = random.Random(seed)
        self.bucket = Bucket(self.random)
        self.is_calm = self.bucket.trouble == 0 and self.bucket.violence == 0
        self.duration_s, self.life_s = duration_s, life_s
        self.done: Counter[str] = Counter()
        self.number = 0

    @abstractmethod
    def work(self, objects: ProcessBucket, number: int) -> list[Coroutine[Any, Any, None]]:
        """Return the tasks of a new process in a slot, which run for ever."""

    @abstractmethod
    async def check(self) -> None:
        """Check the end of the history."""

    def process_bucket(self) -> ProcessBucket:
        """Return the bucket as a new process sees it."""
        return ProcessBucket(self.bucket)

    async def history(self) -> Counter[str]:
        """Run all processes, check the end, and return how often each step was done."""
        try:
            await asyncio.gather(*(self.process(number) for number in range(PROCESSES)))
            await self.check()
        finally:
            self.bucket.ended.set()
        return self.done

    async def process(self, number: int) -> None:
        """Run one process after the other, until the end of the simulation. The next one uses the same resources."""
        loop = asyncio.get_running_loop()
        while (left := self.duration_s - loop.time()) > 0:
            objects = self.process_bucket()
            tasks = [asyncio.create_task(one) for one in self.work(objects, number)]
            killed = asyncio.create_task(objects.killed.wait())
            life = min(left, self.random.uniform(0.3, 1.5) * self.life_s)
            await asyncio.wait([*tasks, killed], timeout=life, return_when=asyncio.FIRST_COMPLETED)
            killed.cancel()
            if not objects.killed.is_set() and self.random.random() < 0.5:
                for task in tasks:
                    task.cancel()
                await asyncio.wait(tasks, timeout=PIN_S)
            objects.killed.set()
            for task in tasks:
                if task.done() and not task.cancelled():
                    task.result()
            await asyncio.sleep(self.random.uniform(0, PIN_S))

    def set_latency(self, seconds: float) -> None:
        """Set how long the requests of this task take."""
        slowness.set(seconds / self.bucket.latency_s)

    async def sweeper(self, manager: ResourceManager[Any]) -> None:
        """Sweep again and again."""
        while True:
            await asyncio.sleep(self.random.uniform(*self.sweep_pause_s))
            with contextlib.suppress(StoreUnavailable, OutcomeUnknown, WriteContention):
                await manager.maintain(10)
                self.done["sweep"] += 1
