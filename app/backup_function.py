"""The Lambda function that exports and imports the models of a stack whose servers are in a closed network.

No service may call it. `stack_backup` calls it with the permissions of the person who runs a command:

    {"crudstack": "models"}                                    returns {"models": [...]}
    {"crudstack": "export", "model": ..., "key": ...}          writes an archive of one model to the bucket
    {"crudstack": "import", "key": ..., "on_conflict": ...}    imports the archive at a key

Each model is exported by a call of its own, so each has the whole time of the function. An error that a person can
act on is returned as {"error": {"type": ..., "detail": ...}}.
"""

from __future__ import annotations

import asyncio
import time
from typing import Any, Literal

import msgspec
from msgspec import Struct

from .autocrud.errors import CrudError, NotEnoughTime
from .autocrud.resource_manager.runtime.temporary import ProcessDirectory
from .main import create_app
from .settings import Settings
from .wiring import region_of

MARGIN_S = 20.0
"""Seconds between the last moment for an answer and the end of the invocation."""
MEASURED_S = 30.0
"""Seconds after which the duration of an export is estimated."""


class Models(Struct, frozen=True, forbid_unknown_fields=True, tag_field="crudstack", tag="models"):
    """Asks for the names of the models."""


class Export(Struct, frozen=True, forbid_unknown_fields=True, tag_field="crudstack", tag="export", kw_only=True):
    """Asks for an archive of one model at a key of the bucket."""

    model: str
    key: str
    each_resource: bool = False


class Import(Struct, frozen=True, forbid_unknown_fields=True, tag_field="crudstack", tag="import", kw_only=True):
    """Asks for the import of the archive at a key of the bucket."""

    key: str
    models: list[str] | None = None
    on_conflict: Literal["fail", "skip", "replace"] = "fail"
    sha256: str | None = None
    resume: bool = False
    abort: bool = False


class BackupFunction:
    """The handler of the function."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._crud: Any = create_app(settings, idle_work=False).state.crud
        self._loop = asyncio.new_event_loop()

    def __call__(self, event: Any, context: Any) -> dict[str, Any]:
        """Do what the event asks for. Raises ValueError if it is no event of this function."""
        asked: Models | Export | Import = msgspec.convert(event, Models | Export | Import)
        seconds = context.get_remaining_time_in_millis() / 1e3 - MARGIN_S
        try:
            done: dict[str, Any] = self._loop.run_until_complete(self._answer(asked, seconds))
        except CrudError as error:
            return {"error": {"type": error.type, "detail": error.detail}}
        return done

    async def _answer(self, asked: Models | Export | Import, seconds: float) -> dict[str, Any]:
        if isinstance(asked, Models):
            return {"models": list(self._crud.managers)}
        try:
            async with asyncio.timeout(seconds):
                if isinstance(asked, Export):
                    return await self._export(asked, seconds)
                return await self._import(asked)
        except TimeoutError:
            raise NotEnoughTime(
                f"the function may not run longer than {seconds:.0f} s, and the work was not done by then; an import is"
                " continued by --resume"
            ) from None

    def _objects(self) -> Any:
        from .autocrud.resource_manager.backends.s3.object_store import s3

        outputs, local = self._settings.outputs, self._settings.local
        assert outputs.bucket is not None, "a stack has a bucket"
        return s3(outputs.bucket, local.s3_endpoint_url, region_name=region_of(self._settings))

    async def _export(self, asked: Export, seconds: float) -> dict[str, Any]:
        from .autocrud.backup.exporting import export_all

        began = time.monotonic()

        def progress(done: int, total: int | None, what: str) -> None:
            """Raise NotEnoughTime as soon as it is known that the time is too short."""
            passed = time.monotonic() - began
            if total and done and passed > MEASURED_S and passed * total / done > seconds:
                raise NotEnoughTime(
                    f"the export of {what} takes about {passed * total / done / 60:.0f} minutes, and the function may"
                    f" run for {seconds / 60:.0f}: export from a machine that reaches the database"
                )

        with ProcessDirectory() as directory:
            path = directory.path / "archive.tar.gz"
            result = await export_all(
                self._crud.managers, path, models=[asked.model], each_resource=asked.each_resource, progress=progress
            )
            await self._objects().upload(asked.key, path)
        return {"sha256": result.sha256, "size": result.size}

    async def _import(self, asked: Import) -> dict[str, Any]:
        from .autocrud.backup.importing import import_all
        from .autocrud.errors import InvalidData

        with ProcessDirectory() as directory:
            path = directory.path / "archive"
            if not await self._objects().download(asked.key, path):
                raise InvalidData(f"there is no archive at {asked.key!r} in the bucket of the stack: upload it again")
            result = await import_all(
                self._crud.managers,
                path,
                models=asked.models,
                on_conflict=asked.on_conflict,
                sha256=asked.sha256,
                resume=asked.resume,
                abort=asked.abort,
            )
        found: dict[str, Any] = msgspec.to_builtins(result._asdict())
        return found
