"""The place of an archive that a command names: a file, an object on S3, or stdin and stdout."""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import BinaryIO, TextIO
from urllib.parse import unquote, urlsplit

from .autocrud.errors import ConfigError
from .autocrud.resource_manager.backends.s3.object_store import ObjectStore
from .autocrud.resource_manager.runtime.drivers import driver
from .autocrud.resource_manager.runtime.temporary import ProcessDirectory
from .settings import Settings

STDIO = "-"


class ArchivePlace:
    """The place of an archive.

    Raises ConfigError if the text names none.

    text  a path, s3://bucket/key, or - for stdin and stdout
    """

    def __init__(self, text: str) -> None:
        self.text = text
        self.is_stdio = text == STDIO
        self._bucket = self._key = ""
        if text.startswith("-") and not self.is_stdio:
            raise ConfigError(f"{text[:60]!r} is no option, and no name of an archive: expected ./{text[:60]}")
        if text.startswith("s3:"):
            parts = urlsplit(text)
            self._bucket, self._key = parts.netloc, unquote(parts.path.removeprefix("/"))
            if not self._bucket or not self._key or parts.query or parts.fragment or "@" in parts.netloc:
                found = "has an @" if "@" in text else f"is {text!r}"  # before an @ there may be a key
                raise ConfigError(f"the archive {found}: expected s3://bucket/key")

    @property
    def name(self) -> str:
        """Return the last part of the path or key."""
        return self._key.rpartition("/")[2] if self._bucket else Path(self.text).name

    def check_stdout(self) -> None:
        """Raise ConfigError if the archive would be written to a terminal, or to a stdout that is closed."""
        if self.is_stdio and _binary(sys.stdout, "stdout").isatty():
            raise ConfigError("stdout is a terminal: redirect it to a file, or give the name of a file")

    @contextlib.asynccontextmanager
    async def writing(self, settings: Settings, *, force: bool) -> AsyncIterator[Path | BinaryIO]:
        """Give the path or file to write the archive to. At the end of the context, it is at its place.

        Raises ConfigError if something is there already, unless `force` is given.
        """
        if self.is_stdio:
            yield _binary(sys.stdout, "stdout")
        elif not self._bucket:
            self._refuse_existing(await asyncio.to_thread(os.path.lexists, self.text), force=force)
            yield Path(self.text)
        else:
            objects = await self._objects(settings)
            self._refuse_existing(await self._exists(objects), force=force)
            with ProcessDirectory() as directory:
                path = directory.path / self.name
                yield path
                self._refuse_existing(await self._exists(objects), force=force)
                await objects.upload(self._key, path)

    @contextlib.asynccontextmanager
    async def reading(self, settings: Settings) -> AsyncIterator[Path | BinaryIO]:
        """Give the path or file to read the archive from. Raises ConfigError if there is none."""
        if self.is_stdio:
            yield _binary(sys.stdin, "stdin")
        elif not self._bucket:
            path = Path(self.text)
            if not await asyncio.to_thread(lambda: path.is_file() or path.is_fifo()):
                raise ConfigError(f"{self.text} is no file: expected an archive that `crudstack export` wrote")
            yield path
        else:
            with ProcessDirectory() as directory:
                path = directory.path / "archive"
                if not await (await self._objects(settings)).download(self._key, path):
                    raise ConfigError(f"there is no object {self.text}")
                yield path

    def _refuse_existing(self, exists: bool, *, force: bool) -> None:
        if exists and not force:
            raise ConfigError(f"{self.text} exists: give another name, or --force to replace it")

    async def _exists(self, objects: ObjectStore) -> bool:
        return await objects.head(self._key) is not None

    async def _objects(self, settings: Settings) -> ObjectStore:
        """Return the client of the bucket. Raises ConfigError if there is no such bucket, or no access to it."""
        with driver("s3"):
            from .bucket_check import bucket_client, check_bucket
        objects = bucket_client(self._bucket, settings)
        await check_bucket(objects, self._bucket, "create it, or correct the address of the archive")
        return objects


def _binary(stream: TextIO | None, name: str) -> BinaryIO:
    """Return the file below stdin or stdout. Raises ConfigError if a shell closed it, with `<&-` or `>&-`."""
    if stream is None:
        raise ConfigError(f"{name} is closed: give the name of a file, or redirect {name}")
    return stream.buffer
