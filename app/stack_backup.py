"""Export and import of a stack whose servers are in a closed network, through its function for backups.

Archives pass through the bucket of the stack, at `_exports/{id}/`. All their versions are deleted as soon as they are
not needed, also if a step fails. `old_exports` removes those that a killed command leaves.
"""

from __future__ import annotations

import asyncio
import datetime as dt
import logging
import secrets
from collections.abc import AsyncIterator, Callable, Collection, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, BinaryIO

import msgspec

from .autocrud.backup.archive_reader import VerifiedArchive, verify_in_thread
from .autocrud.backup.archive_writer import ArchiveWriter
from .autocrud.backup.compression import Compression
from .autocrud.backup.exporting import ExportedModel, ExportResult, Progress
from .autocrud.backup.importing import ImportResult, ModelImport, ModelSurvey, Surveyed
from .autocrud.backup.joining import join_parts
from .autocrud.backup.sources import Source, readable_twice
from .autocrud.errors import ConfigError, CrudError, InvalidData, NotEnoughTime, StoreUnavailable
from .autocrud.resource_manager.runtime.drivers import driver
from .autocrud.resource_manager.runtime.temporary import ProcessDirectory
from .autocrud.resource_manager.runtime.threads import in_daemon_thread
from .settings import EXPORTS, Settings

log = logging.getLogger("crudstack.backup")

CALL_S = 930
"""Seconds to wait for an answer of the function, which may run for 900."""
ANY_SIZE = 2**62
"""The function need not check the size of an archive, because the command has verified it."""


class BackupFailed(CrudError):
    """The function of the stack could not export or import."""

    type, title, status = "backup-failed", "The stack could not do this", 503


class OutOfTime(NotEnoughTime):
    """The time of the function ended. `states` tell how far an import got, by model."""

    def __init__(self, detail: str, states: Mapping[str, Any]) -> None:
        super().__init__(detail)
        self.states = states


def needs_function(settings: Settings) -> bool:
    """Return whether only the function of the stack reaches its servers: their addresses are not set here."""
    local = settings.local
    return settings.outputs.backup_function_name is not None and not (local.pg_dsn or local.redis_url or local.amqp_url)


class _Stack:
    """The function and the bucket of a stack, with the ambient credentials of AWS."""

    def __init__(self, settings: Settings) -> None:
        with driver("local"):
            import boto3
            from botocore.config import Config

        outputs = settings.outputs
        if outputs.backup_function_name is None or outputs.bucket is None:
            raise ConfigError("this stack has no function for backups: run `pulumi up`, or export without it")
        session = boto3.session.Session(region_name=outputs.region)
        patient = Config(read_timeout=CALL_S, retries={"max_attempts": 0}, tcp_keepalive=True)
        self._lambda = session.client("lambda", config=patient)
        self._s3 = session.client("s3", endpoint_url=settings.local.s3_endpoint_url)
        self._function, self._bucket = outputs.backup_function_name, outputs.bucket

    async def call(self, **event: Any) -> dict[str, Any]:
        """Call the function, and return its answer.

        Raises OutOfTime, BackupFailed with the reason of the function, and StoreUnavailable if it cannot be called.
        """
        from botocore.exceptions import BotoCoreError, ClientError

        def invoke() -> Any:
            answer = self._lambda.invoke(FunctionName=self._function, Payload=msgspec.json.encode(event))
            return answer, msgspec.json.decode(answer["Payload"].read())

        try:
            answer, told = await in_daemon_thread(invoke)
        except (BotoCoreError, ClientError) as error:
            raise StoreUnavailable(f"the function {self._function} cannot be called: {error}") from None
        if "FunctionError" in answer:
            raise BackupFailed(f"{self._function}: {told.get('errorMessage', 'it gave no reason')}")
        if failed := told.get("error"):
            if failed["type"] == NotEnoughTime.type:
                raise OutOfTime(failed["detail"], failed.get("states", {}))
            if failed["type"] == InvalidData.type:
                raise InvalidData(failed["detail"])
            raise BackupFailed(failed["detail"])
        found: dict[str, Any] = told
        return found

    async def upload(self, path: Path, key: str, size: int, progress: Progress) -> None:
        """Upload a file to the bucket."""
        done = 0

        def report(sent: int) -> None:
            nonlocal done
            done += sent
            progress(done, size, "upload")

        await self._transfer(lambda: self._s3.upload_file(str(path), self._bucket, key, Callback=report))

    async def download(self, key: str, path: Path, size: int, progress: Progress) -> None:
        """Download an object of the bucket."""
        done = 0

        def report(received: int) -> None:
            nonlocal done
            done += received
            progress(done, size, "download")

        await self._transfer(lambda: self._s3.download_file(self._bucket, key, str(path), Callback=report))

    async def _transfer(self, work: Callable[[], None]) -> None:
        from boto3.exceptions import Boto3Error
        from botocore.exceptions import BotoCoreError, ClientError

        try:
            await asyncio.to_thread(work)
        except (Boto3Error, BotoCoreError, ClientError) as error:
            raise StoreUnavailable(f"the bucket {self._bucket} of the stack cannot be used: {error}") from None

    @asynccontextmanager
    async def folder(self) -> AsyncIterator[str]:
        """Give the beginning of new keys. At the end of the context, all versions of the objects there are deleted.

        The object at `command` tells the function that this program still waits.
        """
        prefix = f"{EXPORTS}{secrets.token_hex(8)}/"
        try:
            await self._transfer(lambda: self._s3.put_object(Bucket=self._bucket, Key=f"{prefix}command", Body=b""))
            yield prefix
        finally:
            await asyncio.shield(self._clean(prefix))

    async def _clean(self, prefix: str) -> None:
        try:
            await self.delete(prefix)
        except StoreUnavailable as error:
            log.warning("the archive in the bucket could not be deleted, it is removed later: %s", error)

    async def delete(self, prefix: str) -> None:
        """Delete all versions of the objects whose keys begin with `prefix`."""

        def delete() -> None:
            pages = self._s3.get_paginator("list_object_versions").paginate(Bucket=self._bucket, Prefix=prefix)
            for page in pages:
                for version in [*page.get("Versions", []), *page.get("DeleteMarkers", [])]:
                    self._s3.delete_object(Bucket=self._bucket, Key=version["Key"], VersionId=version["VersionId"])

        await self._transfer(delete)


def _silent(*_: object) -> None:
    return None


async def export_stack(
    settings: Settings,
    output: str | Path | BinaryIO,
    *,
    models: Collection[str] | None = None,
    each_resource: bool = False,
    progress: Progress | None = None,
    compression: Compression | None = None,
    replace: bool = True,
) -> ExportResult:
    """Export models of a stack into an archive. Each model is exported by calls of the function of its own.

    The arguments are those of `export_all`. Raises ConfigError for an unknown model, OutOfTime, BackupFailed and
    StoreUnavailable.
    """
    stack, report = _Stack(settings), progress or _silent
    known: list[str] = (await stack.call(crudstack="models"))["models"]
    if unknown := set(models or ()) - set(known):
        raise ConfigError(f"there is no model {min(unknown)!r}; there are {', '.join(known)}")
    chosen = [name for name in known if models is None or name in models]
    exported = []
    writer = ArchiveWriter(output, compression, created=dt.datetime.now(dt.UTC), replace=replace)
    async with writer, stack.folder() as folder:
        for number, name in enumerate(chosen):
            report(number, len(chosen), f"models, now {name}")
            exported.append(await _export_model(stack, folder, name, writer, report, each_resource=each_resource))
        result = await writer.close()
    return ExportResult(result.sha256, result.size, tuple(exported))


async def _export_model(
    stack: _Stack, folder: str, name: str, writer: ArchiveWriter, report: Progress, *, each_resource: bool
) -> ExportedModel:
    """Write a model to an archive, from one or several calls of the function."""
    with ProcessDirectory() as directory:
        parts: list[tuple[Path, str]] = []
        after: str | None = ""
        resources = 0
        while after is not None:
            key, path = f"{folder}{name}-{len(parts)}.tar.gz", directory.path / f"{len(parts)}.tar.gz"
            done = await stack.call(
                crudstack="export",
                model=name,
                key=key,
                command=f"{folder}command",
                each_resource=each_resource,
                after=after,
            )
            await stack.download(key, path, done["size"], report)
            await stack.delete(key)
            parts.append((path, done["sha256"]))
            after, resources = done["after"], resources + done["resources"]
            report(resources, None, name)
        return await join_parts(name, parts, writer)


async def import_stack(
    settings: Settings,
    source: Source,
    *,
    models: Collection[str] | None = None,
    on_conflict: str = "fail",
    sha256: str | None = None,
    max_bytes: int | None = None,
    resume: bool = False,
    abort: bool = False,
    check: bool = False,
    surveyed: Surveyed | None = None,
    progress: Progress | None = None,
) -> ImportResult:
    """Upload an archive, and import it into the models of a stack.

    The arguments are those of `import_all`, but `surveyed` is not called if an import is resumed. Raises BadArchive
    before anything is uploaded, BackupFailed if the function refuses the archive, OutOfTime if the last call got no
    further than the one before, and StoreUnavailable.
    """
    if sum((resume, abort, check)) > 1:
        raise InvalidData("an import is resumed, aborted or checked: give one of these options")
    stack, report = _Stack(settings), progress or _silent
    async with readable_twice(source, max_bytes) as path:
        archive = await verify_in_thread(path, sha256=sha256, max_bytes=max_bytes, progress=progress)
        with archive:
            if archive.compression is Compression.zstd:
                raise InvalidData(
                    "the function of the stack reads archives that are compressed by gzip only: convert this one by"
                    " `zstd -dc ARCHIVE | gzip -n > backup.tar.gz`"
                )
            async with stack.folder() as folder:
                key = f"{folder}archive"
                await stack.upload(path, key, archive.size, report)
                asked: dict[str, Any] = {
                    "crudstack": "import",
                    "key": key,
                    "models": None if models is None else list(models),
                    "on_conflict": on_conflict,
                    "sha256": archive.sha256,
                    "max_bytes": ANY_SIZE,
                }
                if not resume and not abort:
                    result = await stack.call(**asked, check=True)
                    _tell_survey(result, archive, surveyed)
                    if check:
                        return _result_of(result)
                return _result_of(await _import(stack, asked, resume=resume, abort=abort))


def _result_of(told: Mapping[str, Any]) -> ImportResult:
    return ImportResult(told["sha256"], told["size"], msgspec.convert(told["models"], dict[str, ModelImport]))


def _tell_survey(result: dict[str, Any], archive: VerifiedArchive, surveyed: Surveyed | None) -> None:
    """Tell what a check found, before anything is changed."""
    if surveyed is not None:
        found = {}
        for name, one in result["models"].items():
            model = archive.model(name)
            found[name] = ModelSurvey(model.resources, model.revisions, one["not_fitting"], one["unique_conflicts"])
        surveyed(found)


async def _import(stack: _Stack, asked: Mapping[str, Any], *, resume: bool, abort: bool) -> dict[str, Any]:
    """Import by as many calls of the function as are needed, as long as each one gets further."""
    states: Mapping[str, Any] = {}
    while True:
        try:
            return await stack.call(**asked, resume=resume, abort=abort)
        except OutOfTime as error:
            if abort or not error.states or error.states == states:
                raise
            states, resume = error.states, True
