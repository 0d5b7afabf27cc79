"""Export and import of a stack whose servers are in a closed network, through its function for backups.

Archives pass through the bucket of the stack, at `exports/{id}/`. All their versions are deleted afterwards, also if a
step fails; a rule of the bucket removes after a day what an interrupted command leaves.
"""

from __future__ import annotations

import asyncio
import datetime as dt
import secrets
from collections.abc import AsyncIterator, Callable, Collection, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, BinaryIO

import msgspec

from .autocrud.backup.archive_reader import VerifiedArchive, verify
from .autocrud.backup.archive_writer import ArchiveResult, ArchiveWriter
from .autocrud.backup.compression import Compression
from .autocrud.errors import ConfigError, CrudError, StoreUnavailable
from .autocrud.resource_manager.basic import BlobRow, ResourceMeta
from .autocrud.resource_manager.runtime.temporary import ProcessDirectory
from .settings import StackOutputs

Progress = Callable[[int, int | None, str], None]
CALL_S = 930
"""Seconds to wait for an answer of the function, which may run for 900."""


class BackupFailed(CrudError):
    """The function of the stack could not export or import."""

    type, title, status = "backup-failed", "The stack could not do this", 503


class _Stack:
    """The function and the bucket of a stack, with the ambient credentials of AWS."""

    def __init__(self, outputs: StackOutputs) -> None:
        import boto3
        from botocore.config import Config

        if outputs.backup_function_name is None or outputs.bucket is None:
            raise ConfigError("this stack has no function for backups: run `pulumi up`, or export without it")
        session = boto3.session.Session(region_name=outputs.region)
        patient = Config(read_timeout=CALL_S, retries={"max_attempts": 0}, tcp_keepalive=True)
        self._lambda, self._s3 = session.client("lambda", config=patient), session.client("s3")
        self._function, self._bucket = outputs.backup_function_name, outputs.bucket

    async def call(self, **event: Any) -> dict[str, Any]:
        """Call the function, and return its answer. Raises BackupFailed with its reason."""
        from botocore.exceptions import BotoCoreError, ClientError

        payload = msgspec.json.encode(event)
        try:
            answer = await asyncio.to_thread(self._lambda.invoke, FunctionName=self._function, Payload=payload)
            told: Any = msgspec.json.decode(await asyncio.to_thread(answer["Payload"].read))
        except (BotoCoreError, ClientError) as error:
            raise StoreUnavailable(f"the function {self._function} cannot be called: {error}") from None
        if "FunctionError" in answer:
            raise BackupFailed(f"{self._function}: {told.get('errorMessage', 'it gave no reason')}")
        if "error" in told:
            raise BackupFailed(told["error"]["detail"])
        found: dict[str, Any] = told
        return found

    async def upload(self, path: Path, key: str) -> None:
        await asyncio.to_thread(self._s3.upload_file, str(path), self._bucket, key)

    async def download(self, key: str, path: Path) -> None:
        await asyncio.to_thread(self._s3.download_file, self._bucket, key, str(path))

    @asynccontextmanager
    async def folder(self) -> AsyncIterator[str]:
        """Return the beginning of new keys. At the end, all versions of the objects there are deleted."""
        prefix = f"exports/{secrets.token_hex(8)}/"
        try:
            yield prefix
        finally:
            await asyncio.shield(asyncio.to_thread(self._delete, prefix))

    def _delete(self, prefix: str) -> None:
        pages = self._s3.get_paginator("list_object_versions").paginate(Bucket=self._bucket, Prefix=prefix)
        for page in pages:
            for version in [*page.get("Versions", []), *page.get("DeleteMarkers", [])]:
                self._s3.delete_object(Bucket=self._bucket, Key=version["Key"], VersionId=version["VersionId"])


async def export_stack(
    outputs: StackOutputs,
    output: str | Path | BinaryIO,
    *,
    models: Collection[str] | None = None,
    each_resource: bool = False,
    compression: Compression | None = None,
    progress: Progress | None = None,
) -> ArchiveResult:
    """Export models of a stack into an archive. Each model is exported by one call of the function.

    The arguments are those of `export_all`. Raises ConfigError for an unknown model, BackupFailed, StoreUnavailable.
    """
    stack = _Stack(outputs)
    known: list[str] = (await stack.call(crudstack="models"))["models"]
    if unknown := set(models or ()) - set(known):
        raise ConfigError(f"there is no model {min(unknown)!r}; there are {', '.join(known)}")
    chosen = [name for name in known if models is None or name in models]
    with ProcessDirectory() as directory:
        paths = []
        async with stack.folder() as prefix:
            for number, name in enumerate(chosen):
                if progress is not None:
                    progress(number, len(chosen), "models")
                key, path = f"{prefix}{name}.tar.gz", directory.path / f"{name}.tar.gz"
                done = await stack.call(crudstack="export", model=name, key=key, each_resource=each_resource)
                await stack.download(key, path)
                paths.append((path, done["sha256"]))
        async with ArchiveWriter(output, compression, created=dt.datetime.now(dt.UTC)) as writer:
            for path, sha256 in paths:
                with await asyncio.to_thread(verify, path, sha256=sha256) as archive:
                    await _append(archive, writer)
            return await writer.close()


async def _append(archive: VerifiedArchive, writer: ArchiveWriter) -> None:
    """Write the models of an archive to another one."""
    for model in archive.manifest.models:
        await writer.begin_model(
            model.name, fields=model.fields, unique=model.unique, schema_version=model.schema_version
        )
        for item in archive.resources(model.name):
            if isinstance(item, ResourceMeta):
                await writer.add_resource(item)
            else:
                await writer.add_revision(*item)
        for key in archive.keys(model.name):
            await writer.add_key(key)
        known = {row.key: row for row, _ in archive.blobs(model.name)}
        blobs = archive.blobs(model.name)

        async def rows(keys: Sequence[str], known: dict[str, BlobRow] = known) -> list[BlobRow]:
            return [known[key] for key in keys]

        async def read(key: str, blobs: Any = blobs) -> AsyncIterator[bytes]:
            """Yield the content of a blob. The writer asks for blobs by ascending key, as the reader has them."""
            for row, chunks in blobs:
                if row.key == key:
                    for chunk in chunks:
                        yield chunk
                    return

        await writer.add_blobs(rows, read)
        await writer.end_model(one_moment=model.one_moment, absent=model.absent)


async def import_stack(
    outputs: StackOutputs,
    source: str | Path,
    *,
    models: Collection[str] | None = None,
    on_conflict: str = "fail",
    sha256: str | None = None,
    resume: bool = False,
    abort: bool = False,
) -> dict[str, Any]:
    """Upload an archive, and import it into the models of a stack. Return the fields of an ImportResult.

    The arguments are those of `import_all`. Raises BadArchive before anything is uploaded, BackupFailed if the function
    refuses the archive or has no time left, and StoreUnavailable.
    """
    stack = _Stack(outputs)
    with await asyncio.to_thread(verify, source, sha256=sha256) as archive:
        digest = archive.sha256
    async with stack.folder() as prefix:
        key = f"{prefix}{Path(source).name}"
        await stack.upload(Path(source), key)
        chosen = None if models is None else list(models)
        return await stack.call(
            crudstack="import",
            key=key,
            models=chosen,
            on_conflict=on_conflict,
            sha256=digest,
            resume=resume,
            abort=abort,
        )
