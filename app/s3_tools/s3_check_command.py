"""`crudstack s3-check`: run the checks of `s3_check`, and print the findings as sentences or as JSON."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from urllib.parse import urlsplit

import msgspec

from ..autocrud.errors import ConfigError
from ..autocrud.resource_manager.runtime.drivers import driver
from ..progress_line import ProgressLine
from ..settings import s3_endpoint
from ..wiring import checked_prefix, region_or_default
from .s3_check import Finding, Report, S3Check

FIT, UNFIT, INTERRUPTED = 0, 1, 130


def run(store: str, *, as_json: bool) -> int:
    """Check the store s3://bucket/prefix. Return FIT or UNFIT, or INTERRUPTED after Ctrl-C.

    Raises ConfigError if `store`, a setting or a key is missing or wrong.
    """
    bucket, prefix = parse_store(store)
    with driver("s3"):
        from ..autocrud.resource_manager.backends.s3.object_store import S3ObjectStore
    region = region_or_default(os.environ.get("CRUDSTACK_REGION"))
    objects = S3ObjectStore(bucket, s3_endpoint(), region_name=region)
    progress = ProgressLine()

    def say(finding: Finding) -> None:
        progress.clear()
        if not as_json:
            print(f"{finding.result:<10}  {finding.check}: {finding.sentence}", flush=True)

    try:
        with _quiet():
            report = asyncio.run(_cancelled_by_sigterm(S3Check(objects, bucket, prefix, region, say, progress)))
    except (KeyboardInterrupt, asyncio.CancelledError):
        progress.clear()
        print("stopped; the line `clean-up` above says whether all objects were deleted", file=sys.stderr)
        return INTERRUPTED
    finally:
        progress.clear()
    if as_json:
        print(msgspec.json.format(msgspec.json.encode(report)).decode())
    else:
        print(_verdict(report))
    return FIT if report.fit else UNFIT


def parse_store(store: str) -> tuple[str, str]:
    """Return the bucket and the prefix of s3://bucket/prefix. The prefix is empty or ends with a slash."""
    parts = urlsplit(store)
    if parts.scheme != "s3" or not parts.netloc or parts.query or parts.fragment or "@" in parts.netloc:
        found = "has an @" if "@" in store else f"is {store!r}"  # before an @ there may be a key
        raise ConfigError(f"the store {found}: expected s3://bucket or s3://bucket/prefix")
    return parts.netloc, checked_prefix(parts.path.removeprefix("/"))


async def _cancelled_by_sigterm(check: S3Check) -> Report:
    """Run a check. SIGTERM cancels it like Ctrl-C, so that it deletes its objects."""
    task = asyncio.current_task()
    if task is not None:
        with suppress(NotImplementedError, RuntimeError):  # not on this platform, or not in the main thread
            asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
    return await check.run()


@contextmanager
def _quiet() -> Iterator[None]:
    """Suppress the engine's log, because each failure becomes a sentence of a check."""
    engine, silent = logging.getLogger("crudstack"), logging.NullHandler()
    before, engine.propagate = engine.propagate, False
    engine.addHandler(silent)
    try:
        yield
    finally:
        engine.removeHandler(silent)
        engine.propagate = before


def _verdict(report: Report) -> str:
    failed = [finding.check for finding in report.findings if finding.result == "failed"]
    if failed:
        return f"{report.store} is not fit: {', '.join(failed)} failed"
    return f"{report.store} is fit"
