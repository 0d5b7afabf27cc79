"""The Lambda function that exports and imports the models of a stack whose servers are in a closed network.

No service may call it. `stack_backup` calls it with the permissions of the person who runs a command:

    {"crudstack": "models"}                                    returns {"models": [...]}
    {"crudstack": "export", "model": ..., "key": ...}          writes an archive of one model to the bucket
    {"crudstack": "import", "key": ..., "on_conflict": ...}    imports the archive at a key

`Export` and `Import` have all fields of these events.

Each model is exported by a call of its own, so each has the whole time of the function. If its resources need not be as
at one moment, a call ends in time and returns {"after": ID}, and the next call continues there. An error that a person
can act on is returned as {"error": {"type": ..., "detail": ...}}. If the time of an import is over, the error has the
states of its journals, so that the caller knows whether the import got further.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable
from pathlib import Path
from typing import Any, Literal, TypeVar

import msgspec
from msgspec import Struct

from .autocrud.errors import ConfigError, CrudError, InvalidData, NotEnoughTime
from .autocrud.resource_manager.runtime.temporary import ProcessDirectory
from .main import create_app
from .settings import Settings
from .wiring import region_of

T = TypeVar("T")

MARGIN_S = 20.0
"""Seconds between the last moment for an answer and the end of the invocation."""
MEASURED_S = 30.0
"""Seconds after which the duration of an export is estimated, or a tenth of the time if it is short."""
RESOURCES_SHARE = 0.4
"""Part of the time after which an export takes no more resources, because their files and the upload follow."""
PART_BYTES_S = 4_000_000
"""Bytes of bodies and files that an export takes for each second it has: 3.5 GB, which fit on the disk of the function.
They are read, compressed and uploaded several times as fast."""


class Models(Struct, frozen=True, forbid_unknown_fields=True, tag_field="crudstack", tag="models"):
    """Asks for the names of the models."""


class Export(Struct, frozen=True, forbid_unknown_fields=True, tag_field="crudstack", tag="export", kw_only=True):
    """Asks for an archive of the resources of a model that follow `after`, at a key of the bucket.

    command  the key of an object that exists as long as the command waits for the archive
    """

    model: str
    key: str
    command: str
    each_resource: bool = False
    after: str = ""


class Import(Struct, frozen=True, forbid_unknown_fields=True, tag_field="crudstack", tag="import", kw_only=True):
    """Asks for the import of the archive at a key of the bucket."""

    key: str
    models: list[str] | None = None
    on_conflict: Literal["fail", "skip", "replace"] = "fail"
    sha256: str | None = None
    max_bytes: int | None = None
    check: bool = False
    resume: bool = False
    abort: bool = False


class _Clock:
    """The time of one call. Called with the progress of the work.

    seconds  how long the work may take
    """

    def __init__(self, seconds: float) -> None:
        self.seconds, self.began = seconds, time.monotonic()
        self._what, self._what_began = "", self.began
        self._estimate: float | None = None

    def __call__(self, done: int, total: int | None, what: str) -> None:
        """Note the progress."""
        now = time.monotonic()
        if what != self._what:
            self._what, self._what_began, self._estimate = what, now, None
        if total and done:
            self._estimate = self._what_began - self.began + (now - self._what_began) * total / done

    async def limited(self, work: Awaitable[T]) -> T | None:
        """Return the result of the work, or None if the time ended."""
        try:
            async with asyncio.timeout(self.seconds) as limit:
                return await work
        except TimeoutError:
            if not limit.expired():
                raise
        return None

    @property
    def passed(self) -> float:
        """Seconds since the call began."""
        return time.monotonic() - self.began

    @property
    def is_known_to_be_short(self) -> bool:
        """Return whether the work was measured for long enough to know that it will not be done in time."""
        measured = self.passed > min(MEASURED_S, self.seconds / 10)
        return measured and self._estimate is not None and self._estimate > self.seconds

    def error(self, work: str, advice: str) -> NotEnoughTime:
        """Return the error with the estimate."""
        if self._estimate is None or self._estimate <= self.seconds:
            takes = f"longer than the {_duration(self.seconds)} that the function may run"
        else:
            takes = f"about {_duration(self._estimate)}, and the function may run for {_duration(self.seconds)}"
        return NotEnoughTime(f"{work} takes {takes}: {advice}")


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} seconds" if seconds < 120 else f"{seconds / 60:,.0f} minutes"


class BackupFunction:
    """The handler of the function."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._crud: Any = create_app(settings, idle_work=False).state.crud
        self._loop = asyncio.new_event_loop()

    def __call__(self, event: Any, context: Any) -> dict[str, Any]:
        """Do what the event asks for. Raises ValueError if it is no event of this function."""
        asked: Models | Export | Import = msgspec.convert(event, Models | Export | Import)
        clock = _Clock(max(0.0, context.get_remaining_time_in_millis() / 1e3 - MARGIN_S))
        try:
            done: dict[str, Any] = self._loop.run_until_complete(self._answer(asked, clock))
        except CrudError as error:
            return {"error": {"type": error.type, "detail": error.detail}}
        return done

    async def close(self) -> None:
        """Close the stores."""
        await self._crud.close()

    async def _answer(self, asked: Models | Export | Import, clock: _Clock) -> dict[str, Any]:
        match asked:
            case Models():
                return {"models": list(self._crud.managers)}
            case Export():
                return await self._export(asked, clock)
            case Import():
                return await self._import(asked, clock)

    def _objects(self) -> Any:
        from .autocrud.resource_manager.backends.s3.object_store import s3

        outputs, local = self._settings.outputs, self._settings.local
        assert outputs.bucket is not None, "a stack has a bucket"
        return s3(outputs.bucket, local.s3_endpoint_url, region_name=region_of(self._settings))

    async def _export(self, asked: Export, clock: _Clock) -> dict[str, Any]:
        from .autocrud.backup.exporting import ExportedPart, export_part

        manager = self._crud.managers.get(asked.model)
        if manager is None:
            raise ConfigError(f"there is no model {asked.model!r}")
        advice = "export from a machine that reaches the database"
        if not asked.each_resource:
            advice = f"use --per-resource, or {advice}"
        is_cut = asked.each_resource

        def is_full(size: int) -> bool:
            nonlocal is_cut
            is_cut = True
            return clock.passed > clock.seconds * RESOURCES_SHARE or size > clock.seconds * PART_BYTES_S

        def progress(done: int, total: int | None, what: str) -> None:
            clock(done, total, what)
            if clock.is_known_to_be_short and not is_cut:
                raise clock.error(f"the export of {asked.model!r}", advice)

        async def work() -> ExportedPart:
            with ProcessDirectory() as directory:
                path = directory.path / "archive.tar.gz"
                part = await export_part(
                    manager,
                    path,
                    after=asked.after,
                    is_full=is_full,
                    each_resource=asked.each_resource,
                    progress=progress,
                )
                await self._upload(asked, path)
                return part

        part = await clock.limited(work())
        if part is None:
            raise clock.error(f"the export of {asked.model!r}", advice)
        return {**part.model._asdict(), "sha256": part.sha256, "size": part.size, "after": part.after}

    async def _upload(self, asked: Export, path: Path) -> None:
        """Upload an archive, unless the command has ended, which would not delete it."""
        objects = self._objects()
        if await objects.head(asked.command) is None:
            raise InvalidData("the command that asked for this export has ended")
        await objects.upload(asked.key, path)

    async def _import(self, asked: Import, clock: _Clock) -> dict[str, Any]:
        from .autocrud.backup.importing import ImportResult, import_all

        async def work() -> ImportResult:
            with ProcessDirectory() as directory:
                path = directory.path / "archive"
                if not await self._objects().download(asked.key, path):
                    raise InvalidData(f"there is no archive at {asked.key!r} in the bucket: upload it again")
                return await import_all(
                    self._crud.managers,
                    path,
                    models=asked.models,
                    on_conflict=asked.on_conflict,
                    sha256=asked.sha256,
                    max_bytes=asked.max_bytes,
                    resume=asked.resume,
                    abort=asked.abort,
                    check=asked.check,
                    progress=clock,
                )

        result = await clock.limited(work())
        if result is None:
            states = {} if asked.check else await self._states(asked)
            advice = "import from a machine that reaches the database"
            if states:
                advice = f"continue by {'--abort' if asked.abort else '--resume'}, or {advice}"
            error = clock.error("the import", advice)
            return {"error": {"type": error.type, "detail": error.detail, "states": states}}
        found: dict[str, Any] = msgspec.to_builtins(result._asdict())
        return found

    async def _states(self, asked: Import) -> dict[str, Any]:
        """Return how far the import of this archive got, by model."""
        found = {}
        for name, manager in self._crud.managers.items():
            journal = getattr(manager.storage, "import_journal", None)
            state = None if journal is None else await journal.state()
            if state is not None and asked.sha256 in (None, state.sha256):
                found[name] = [state.finished, state.after]
        return found
