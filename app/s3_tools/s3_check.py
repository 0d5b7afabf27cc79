"""Check whether an S3 store is suitable for this program, before data is stored there: `crudstack s3-check`.

    findings = await S3Check(objects, "my-bucket", "team/", "eu-central-1", print).run()

The keys of all objects that a check writes begin with `{prefix}s3-check/{id}/`; each run has its own id. Invariant:
each PUT records its key, and runs to completion even if the check is cancelled. `_delete` waits for the PUTs in
progress and then deletes each recorded key, so no answered PUT takes effect after its key was deleted.
"""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import os
import time
from collections.abc import Awaitable, Callable
from typing import Literal
from urllib.parse import SplitResult, urlsplit
from uuid import uuid4

from msgspec import Struct

from ..autocrud.errors import ConditionalWritesUnsupported, StoreUnavailable
from ..autocrud.resource_manager.backends.s3.object_store import (
    UNCHANGED,
    NotStored,
    Object,
    Outcome,
    S3ObjectStore,
    Stored,
    Unknown,
)
from ..autocrud.resource_manager.backends.s3_sqlite.race_check import race_conditional_writes
from ..autocrud.resource_manager.runtime.temporary import ProcessDirectory
from ..settings import is_loopback
from .direct_checks import THROUGH_THE_SERVER, check_direct_transfers
from .s3_requests import (
    RecordedObjects,
    Timings,
    answer_to,
    ask,
    clock_skew_s,
    failed_check,
    reason_of,
)

SAMPLES, SAMPLING_S = 100, 10.0
"""Number of measurements of each request, and their maximal duration in seconds."""
LISTINGS, LISTING_S = 5, 30.0
"""Number of objects whose appearance in a listing is measured, and the seconds to wait for each."""
DELETIONS = 20
"""Number of attempts to delete objects that a listing still contains."""
LARGE = 6 * 1024 * 1024
"""Bytes of an object that is uploaded in parts: obstore divides files of more than 5 MiB."""
HEAD_BYTES, BODY_BYTES = 16 * 1024, 2 * 1024
MAX_WRITES_PER_SWAP = 500
"""`max_batch` of S3SqliteMetaStore."""
SKEW_NOTED_S = 60.0
ASSUMPTION = (
    "one process writes to the model, each group of waiting writes takes one swap of HEAD, and nothing else loads the"
    " store"
)

Result = Literal["ok", "note", "failed", "not tested"]


class Finding(Struct, frozen=True):
    """The result of one check. A `note` is information: a store with notes is fit."""

    check: str
    result: Result
    sentence: str


class Rates(Struct, frozen=True):
    """The rate of writes to one model that follows from the measured requests."""

    swaps_per_second: float
    writes_per_second_of_one_client: float
    max_writes_per_swap: int
    assumption: str


class Report(Struct):
    """The results of all checks. `fit` is false if a check failed."""

    store: str
    region: str
    fit: bool = False
    findings: list[Finding] = []
    requests: list[Timings] = []
    writes: Rates | None = None


class _Stop(Exception):
    """Ends the run, because no further check is possible."""


class S3Check:
    """One run of all checks. Calls `say` with each finding, and `progress` with a text about the current step."""

    def __init__(
        self,
        objects: S3ObjectStore,
        bucket: str,
        prefix: str,
        region: str,
        say: Callable[[Finding], None],
        progress: Callable[[str], None] = lambda _: None,
    ) -> None:
        self._objects = RecordedObjects(objects)
        self._folder = f"{prefix}s3-check/{uuid4().hex}/"
        self._where, self._bucket, self._prefix = f"s3://{bucket}/{self._folder}", bucket, prefix
        self._say, self._progress = say, progress
        self._lists = True
        self.report = Report(f"s3://{bucket}/{prefix}", region)

    async def run(self) -> Report:
        """Run all checks, and delete what they wrote, also if they fail or are cancelled."""
        try:
            try:
                await self._check_all()
            finally:
                self._progress("deleting what was written")
                await self._delete()
        except _Stop:
            pass
        self.report.fit = not any(finding.result == "failed" for finding in self.report.findings)
        return self.report

    def _found(self, check: str, result: Result, sentence: str) -> None:
        finding = Finding(check, result, sentence)
        self.report.findings.append(finding)
        self._say(finding)

    def _judge(self, check: str, problems: list[str], good: str) -> None:
        if problems:
            self._found(check, "failed", "; ".join(problems))
        else:
            self._found(check, "ok", good)

    def _key(self, name: str) -> str:
        return f"{self._folder}{name}"

    async def _check_all(self) -> None:
        self._progress("asking for a list")
        await self._check_server()
        url = urlsplit(await self._objects.presign(self._key("object"), "GET", 300))
        self._check_tls(url)
        writes = await self._check_permissions()
        await self._check_clock(url, writes=writes)
        steps = (
            ("conditions", self._check_conditions),
            ("race", self._check_race),
            ("large objects", self._check_large),
            ("ranges", self._check_ranges),
            ("direct transfers", self._check_direct),
            ("listing", self._check_listing),
            ("requests", self._measure),
        )
        for check, step in steps:
            if not writes:
                self._found(check, "not tested", "the permissions above are needed first")
                continue
            self._progress(f"testing {check}")
            try:
                await step()
            except StoreUnavailable as error:
                self._found(check, "failed", f"a request failed: {reason_of(error)}")

    # Connection, keys, region, bucket

    async def _check_server(self) -> None:
        """List the folder of this run, which is empty. Raises _Stop if the server cannot be used at all."""
        try:
            async for _ in self._objects.list(self._folder):
                self._found("server", "failed", "a listing of a new prefix contains an object")
                raise _Stop
        except StoreUnavailable as error:
            why, found = reason_of(error), answer_to(error)
            check = failed_check(found, why)
            if check is None:
                self._lists = False  # _check_permissions reports it
                return
            hint = {
                "bucket": "; create the bucket, or correct its name",
                "clock": "; set the clock of this machine",
                "server": "; is this the address of an S3 server?" if found is not None or "invalid" in why else "",
            }.get(check, "")
            self._found(check, "failed", f"{why}{hint}")
            raise _Stop from None

    def _check_tls(self, url: SplitResult) -> None:
        server = f"{url.scheme}://{url.netloc}"
        if url.scheme == "https":
            self._found("TLS", "ok", f"{server} has a certificate that this program trusts")
        elif is_loopback(url.hostname or ""):
            self._found("TLS", "ok", f"{server} is on this machine and needs no TLS")
        else:
            self._found("TLS", "note", f"{server} has no TLS: others on the network can read and change the data")
        self._found("keys", "ok", "the server accepts the keys")
        self._found("region", "ok", f"the server accepts the region {self.report.region}")

    async def _check_permissions(self) -> bool:
        """Try each of the four permissions. Return whether the keys have all of them."""
        key = self._key("object")
        unlisted = await self._try(self._list())
        written = await self._try(self._objects.put(key, uuid4().bytes))
        read = await self._try(self._get_missing("missing") if written is not None else self._get_back(key))
        if read is None and unlisted is None:
            unlisted = await self._try(self._get_missing("missing"))
        deleted = await self._try(self._objects.delete([key]))
        if (written, read, deleted) == (None, None, None):
            deleted = await self._try(self._get_missing("object"))
        arn = f"arn:aws:s3:::{self._bucket}"
        below = f"{arn}/{self._prefix}*"
        for permission, problem, on in (
            ("s3:PutObject", written, below),
            ("s3:GetObject", read, below),
            ("s3:DeleteObject", deleted, below),
            ("s3:ListBucket", unlisted, arn),
        ):
            if problem is None:
                self._found(permission, "ok", "the keys have this permission")
            else:
                self._found(permission, "failed", f"{problem}; allow {permission} on {on}")
        return (written, read, deleted, unlisted) == (None, None, None, None)

    async def _get_missing(self, name: str) -> None:
        """Raise StoreUnavailable unless a GET finds no object. Without s3:ListBucket, S3 answers it with 403."""
        if await self._objects.get(self._key(name)) is not None:
            raise StoreUnavailable("a GET returned an object that was deleted, or never written")

    async def _get_back(self, key: str) -> None:
        body = uuid4().bytes
        await self._objects.put(key, body)
        found = await self._objects.get(key)
        if found is None or found.body != body or not found.etag:
            raise StoreUnavailable("a GET right after a PUT did not return what was written, with an ETag")

    async def _list(self) -> None:
        async for _ in self._objects.list(self._folder):
            pass

    async def _try(self, request: Awaitable[object]) -> str | None:
        """Return the reason why a request failed, or None if it succeeded."""
        try:
            await request
        except StoreUnavailable as error:
            return reason_of(error)
        return None

    async def _check_clock(self, url: SplitResult, *, writes: bool) -> None:
        """Compare the clocks by the Date of a response. An unsigned request also shows if keys are required."""
        if writes:
            await self._try(self._objects.put(self._key("object"), b"x"))
        answer = await ask("GET", url._replace(query="").geturl())
        if isinstance(answer, str):
            self._found("clock", "not tested", f"an unsigned request got no answer: {answer}")
            return
        if answer.status == 200:
            self._found(
                "access", "note", "the server answers requests without keys: every client that reaches it can read"
            )
        skew = clock_skew_s(answer)
        if skew is None:
            self._found("clock", "note", "the answers of the server have no Date")
            return
        if abs(skew) > SKEW_NOTED_S:
            side = "ahead of" if skew > 0 else "behind"
            self._found(
                "clock",
                "note",
                f"the server's clock is {abs(skew):.0f} s {side} this machine's; set the clock: S3 refuses requests"
                " that are 15 minutes off",
            )
        else:
            self._found("clock", "ok", f"the server's clock differs from this machine's by {abs(skew):.0f} s at least")

    # Conditions

    async def _check_conditions(self) -> None:
        objects, key = self._objects, self._key("conditions")
        problems: list[str] = []

        def expect(what: str, outcome: Outcome, expected: type[Stored | NotStored]) -> Outcome:
            if isinstance(outcome, Unknown):
                problems.append(f"{what} was not answered clearly ({outcome.reason})")
            elif not isinstance(outcome, expected):
                problems.append(f"{what} {'was refused' if expected is Stored else 'overwrote the object'}")
            return outcome

        created = expect("If-None-Match: * on a key without object", await objects.put_if(key, b"1", None), Stored)
        expect("If-None-Match: * on a key with an object", await objects.put_if(key, b"2", None), NotStored)
        if isinstance(created, Stored):
            if await objects.get_if_changed(key, created.etag) is not UNCHANGED:
                problems.append("a GET with If-None-Match and the present ETag was not answered 304")
            swapped = expect("If-Match with the present ETag", await objects.put_if(key, b"3", created.etag), Stored)
            expect("If-Match with an old ETag", await objects.put_if(key, b"4", created.etag), NotStored)
            found = await objects.get_if_changed(key, created.etag)
            body = found.body if isinstance(found, Object) else None
            if body is None or (isinstance(swapped, Stored) and body != b"3"):
                problems.append("a GET with If-None-Match and an old ETag did not return the object")
            if isinstance(swapped, Stored) and swapped.version not in (None, "null"):
                self._found(
                    "versions",
                    "note",
                    "the bucket keeps versions: those of the objects that this check deletes stay until lifecycle rules"
                    " remove them",
                )
        missing = await objects.put_if(self._key("none"), b"5", '"00000000000000000000000000000000"')
        expect("If-Match on a key without object", missing, NotStored)
        self._judge("conditions", problems, "If-Match and If-None-Match are honoured one at a time")

    async def _check_race(self) -> None:
        try:
            await race_conditional_writes(self._objects, self._folder)
        except ConditionalWritesUnsupported as error:
            self._found("race", "failed", error.detail)
        except StoreUnavailable as error:
            self._found("race", "failed", error.detail)
        else:
            self._found("race", "ok", "of concurrent writers with the same condition exactly one succeeded, each time")

    # Other requests

    async def _check_large(self) -> None:
        key, content = self._key("large"), os.urandom(LARGE)
        with ProcessDirectory() as directory:
            path, back = directory.path / "file", directory.path / "back"
            await asyncio.to_thread(path.write_bytes, content)
            await self._objects.upload(key, path)
            there = await self._objects.download(key, back)
            same = there and await asyncio.to_thread(lambda: _digest(back.read_bytes()) == _digest(content))
        self._judge(
            "large objects",
            [] if same else ["an object that was uploaded in parts did not come back as it was"],
            f"an object of {LARGE // 1024 // 1024} MiB was uploaded in parts and came back as it was",
        )

    async def _check_direct(self) -> None:
        """Test direct transfers. Without them files are sent through the server, so a failure is only a note."""
        try:
            await check_direct_transfers(self._objects, self._key("direct"), self._found)
        except StoreUnavailable as error:
            self._found("presigned URLs", "note", f"a request failed ({reason_of(error)}): {THROUGH_THE_SERVER}")

    async def _check_ranges(self) -> None:
        """Test reads of a range. Reads of bodies and interrupted downloads need them."""
        key, body = self._key("range"), uuid4().hex.encode()
        await self._objects.put(key, body)
        try:
            part = await self._objects.get_range(key, 8, 16)
        except StoreUnavailable as error:
            problem = reason_of(error)
        else:
            problem = "" if part == body[8:16] else "the answer has other bytes"
        self._judge(
            "ranges",
            [f"a GET of a range failed ({problem}), so bodies could not be read"] if problem else [],
            "a GET of a range returned that range",
        )

    async def _check_listing(self) -> None:
        oldest = 0.0
        for number in range(LISTINGS):
            key = self._key(f"listed/{number}")
            for present in (True, False):
                if present:
                    await self._objects.put(key, b"x")
                else:
                    await self._objects.delete([key])
                began = time.monotonic()
                while True:
                    listed = [one.key async for one in self._objects.list(self._key("listed/"))]
                    asked = time.monotonic() - began
                    if (key in listed) is present:
                        break
                    oldest = max(oldest, asked)
                    if asked > LISTING_S:
                        change = "written" if present else "deleted"
                        self._found(
                            "listing", "failed", f"an object was {change}, and no listing of {LISTING_S:g} s showed it"
                        )
                        return
                    await asyncio.sleep(0.1)
        if oldest:
            self._found("listing", "note", f"a listing was up to {oldest:.1f} s old; objects are then removed later")
        else:
            self._found("listing", "ok", "a listing showed each object that was written or deleted before it, at once")

    # Measuring

    async def _measure(self) -> None:
        objects, key = self._objects, self._key("HEAD")
        timings: dict[str, Timings] = {}
        written, deleted = itertools.count(), itertools.count()
        stale = 0

        async def sample(request: str, work: Callable[[], Awaitable[object]]) -> None:
            took: list[float] = []
            until = time.monotonic() + SAMPLING_S
            while len(took) < SAMPLES and (time.monotonic() < until or not took):
                self._progress(f"measuring {request}, {len(took)} of {SAMPLES}")
                began = time.perf_counter()
                await work()
                took.append(time.perf_counter() - began)
            timings[request] = Timings.of(request, took)
            self.report.requests.append(timings[request])
            self._found("latency", "ok", timings[request].sentence())

        head = await objects.put_if(key, os.urandom(HEAD_BYTES), None)
        body = os.urandom(BODY_BYTES)

        async def swap() -> None:
            nonlocal head
            if not isinstance(head, Stored):
                raise StoreUnavailable("a conditional PUT without a rival did not succeed")
            head = await objects.put_if(key, os.urandom(HEAD_BYTES), head.etag)

        async def unchanged() -> None:
            nonlocal stale
            if isinstance(head, Stored):
                stale += await objects.get_if_changed(key, head.etag) is not UNCHANGED

        await sample("PUT of HEAD with If-Match", swap)
        await sample("GET of HEAD with If-None-Match", unchanged)
        await sample("PUT of a body", lambda: objects.put(self._key(f"bodies/{next(written)}"), body))
        await sample("GET of a body", lambda: objects.get(self._key("bodies/0")))
        await sample("LIST", self._list)
        await sample("DELETE", lambda: objects.delete([self._key(f"bodies/{next(deleted)}")]))
        asked = timings["GET of HEAD with If-None-Match"].count
        self._judge(
            "reads",
            [f"{stale} of {asked} conditional GETs did not see the newest PUT"] if stale else [],
            "conditional GETs saw the newest PUT",
        )
        swap_ms, put_ms = timings["PUT of HEAD with If-Match"].p50_ms, timings["PUT of a body"].p50_ms
        rates = Rates(1000 / swap_ms, 1000 / (swap_ms + put_ms), MAX_WRITES_PER_SWAP, ASSUMPTION)
        self.report.writes = rates
        self._found(
            "writes",
            "ok",
            f"a model swaps HEAD about {rates.swaps_per_second:.0f} times a second, with up to {MAX_WRITES_PER_SWAP}"
            f" waiting writes each; one client that waits for each answer makes about"
            f" {rates.writes_per_second_of_one_client:.0f} writes a second, if {ASSUMPTION}",
        )

    # Deleting

    async def _delete(self) -> None:
        """Delete every object of this run by its recorded key, and verify with a listing that none is left."""
        await self._objects.finish()
        keys = sorted(self._objects.written)
        if not keys:
            return
        problem, left = await self._try(self._objects.delete(keys)), []
        for _ in range(DELETIONS if problem is None and self._lists else 0):
            try:
                left = [one.key async for one in self._objects.list(self._folder)]
            except StoreUnavailable:
                break
            if not left:
                break
            await asyncio.sleep(0.2)  # the listing may be outdated, or the server slow; deleting again is harmless
            problem = await self._try(self._objects.delete(left))
        if problem is not None or left:
            why = f": {problem}" if problem is not None else ""
            self._found("clean-up", "failed", f"objects stay below {self._where}{why}; remove them")
        elif self._objects.unanswered:
            self._found(
                "clean-up",
                "note",
                f"every object was deleted, but {self._objects.unanswered} PUTs had no answer and may still take effect"
                f" below {self._where}",
            )
        else:
            self._found("clean-up", "ok", f"every object that was written below {self._where} was deleted")


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
