"""Exports models into an archive, while programs read and write them.

- X1 *Each model is as at one moment*, or each of its resources, as the manifest says. A pin keeps what is needed.
- X2 *A body or a blob is missing from the archive only if its resource was purged.* Such a resource is listed as
  absent. If anything else is missing, the export fails, and no file has the name of the archive.
- X3 *Memory use is constant.* At most two pages of bodies are in memory, and pieces of one blob. A page ends once its
  bodies take more than PAGE_BYTES. Stores on S3 may read up to 64 more bodies or packs, because a size is known only
  after the read. Stores without snapshots of bodies may read READ_AT_ONCE more.
"""

from __future__ import annotations

import asyncio
import contextlib
import datetime as dt
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, TypeAlias, TypeVar

from ..errors import ConfigError, ResourceNotFound, RevisionNotFound, StoreDamaged, StoreUnavailable
from ..resource_manager.basic import READ_AT_ONCE, BlobRow, ResourceMeta, RevisionInfo
from ..resource_manager.contract.snapshots import PAGE_BYTES, StorageSnapshot
from ..resource_manager.core import ResourceManager
from ..resource_manager.storage.snapshots import open_any_snapshot
from .archive_writer import ArchiveWriter
from .compression import Compression

T = TypeVar("T")

Progress: TypeAlias = Callable[[int, int | None, str], None]
"""Called with the amount that is done, the total if it is known, and what is counted: `article`, or `article files`."""

PAGE_BODIES = 4 * READ_AT_ONCE
"""How many bodies are read at once, if they are small."""
FIRST_PAGE = 4
"""How many bodies are read first, before it is known how large they are."""
UNKNOWN_OWNER = "0" * 64

Item = tuple[ResourceMeta | RevisionInfo, bytes | None]


class ExportedModel(NamedTuple):
    """The part of an archive with one model.

    one_moment  whether all resources are as at the same moment
    resources   how many resources, absent ones included
    absent      ids of resources that were purged while they were exported
    """

    name: str
    one_moment: bool
    resources: int
    revisions: int
    blobs: int
    absent: tuple[str, ...]


class ExportResult(NamedTuple):
    """A complete archive: the SHA-256 of its file in hex, its size in bytes, and its models."""

    sha256: str
    size: int
    models: tuple[ExportedModel, ...]


async def export_all(
    managers: Mapping[str, ResourceManager[Any]],
    output: str | Path | BinaryIO,
    *,
    models: Collection[str] | None = None,
    each_resource: bool = False,
    progress: Progress | None = None,
    compression: Compression | None = None,
    replace: bool = True,
) -> ExportResult:
    """Export models, one after the other, into an archive. The file appears once the archive is complete.

    managers       the resource managers, by model name
    output         the path of the archive, whose name ends with .tar.gz or .tar.zst, or an open binary file
    models         names of the models; None: all
    each_resource  whether each resource may be as at some moment, so that no long transaction is needed
    progress       is told how far the export is
    compression    None: that of the name of the path, and gzip for a file
    replace        whether an existing file is replaced

    Raises ConfigError for an unknown model, and InvalidData if a file exists that is not to be replaced. Raises
    StoreDamaged if a body or blob is missing that was not purged, PinLost if the export was interrupted for too long,
    and StoreUnavailable.
    """
    chosen = chosen_models(managers, models)
    exported = []
    async with ArchiveWriter(output, compression, created=dt.datetime.now(dt.UTC), replace=replace) as writer:
        for name in chosen:
            export = _ModelExport(managers[name], writer, progress or _silent)
            exported.append(await export.run(each_resource=each_resource))
        result = await writer.close()
    return ExportResult(result.sha256, result.size, tuple(exported))


class ExportedPart(NamedTuple):
    """An archive with some resources of one model, and with everything that they need.

    after  the id of the last resource, if there are more resources; None if the part is the last one
    """

    sha256: str
    size: int
    model: ExportedModel
    after: str | None


async def export_part(
    manager: ResourceManager[Any],
    output: str | Path | BinaryIO,
    *,
    after: str = "",
    is_full: Callable[[int], bool],
    each_resource: bool = False,
    progress: Progress | None = None,
) -> ExportedPart:
    """Export the resources of a model whose ids follow `after` into an archive, until it is full.

    A model that is exported as at one moment is exported as a whole. The Idempotency-Keys are in the last part.

    is_full  called before each resource, with the bytes of the bodies and blobs so far, unless the model is exported as
             at one moment. A part has at least one resource, if there is any

    The other arguments and the errors are those of `export_all`.
    """
    async with ArchiveWriter(output, created=dt.datetime.now(dt.UTC)) as writer:
        export = _ModelExport(manager, writer, progress or _silent, after, is_full)
        exported = await export.run(each_resource=each_resource)
        result = await writer.close()
    return ExportedPart(result.sha256, result.size, exported, export.rest_after)


def chosen_models(managers: Mapping[str, ResourceManager[Any]], models: Collection[str] | None) -> list[str]:
    """Return the names of the models that are asked for, in the order of the managers. Raises ConfigError."""
    for name in models or ():
        if name not in managers:
            raise ConfigError(f"there is no model {name!r}; there are {', '.join(managers)}")
    return [name for name in managers if models is None or name in models]


def _silent(*_: object) -> None:
    return None


class _ModelExport:
    """The export of one model."""

    def __init__(
        self,
        manager: ResourceManager[Any],
        writer: ArchiveWriter,
        progress: Progress,
        after: str = "",
        is_full: Callable[[int], bool] | None = None,
    ) -> None:
        self._manager, self._storage, self._writer, self._progress = manager, manager.storage, writer, progress
        self._after, self._is_full = after, is_full
        self.rest_after: str | None = None
        """The id of the last resource, if the export ended before the others."""
        self._absent: dict[str, None] = {}
        self._revisions = 0
        self._page_size = FIRST_PAGE

    async def run(self, *, each_resource: bool) -> ExportedModel:
        """Write the model."""
        name, codec = self._manager.name, self._manager.codec
        await self._manager.open()
        await self._writer.begin_model(
            name,
            fields={field: kind.name for field, kind in codec.fields.items()},
            unique=codec.unique,
            schema_version=self._manager.schema_version,
        )
        async with open_any_snapshot(self._storage, each_resource=each_resource) as snapshot:
            resources = await self._write_resources(snapshot)
            if self.rest_after is None:
                async for key in snapshot.keys():
                    await self._writer.add_key(key)
            blobs = _Blobs(snapshot, lambda done, total: self._progress(done, total, f"{name} files"))
            async for keys in self._writer.blob_keys():
                await blobs.expect(keys)
            await self._writer.add_blobs(blobs.rows, blobs.read)
            await self._explain_missing_blobs(snapshot)
            one_moment = snapshot.one_moment
        # The pin lasted until here, so everything that the moment needs was still there when it was read (P2).
        absent = tuple(self._absent)
        await self._writer.end_model(one_moment=one_moment, absent=absent)
        return ExportedModel(name, one_moment, resources, self._revisions, blobs.count, absent)

    async def _write_resources(self, snapshot: StorageSnapshot) -> int:
        """Write the metadata, the records and the bodies. Return the number of resources."""
        total, done = await snapshot.count(), 0
        meta: ResourceMeta | None = None
        sizes = None if snapshot.one_moment or self._is_full is None else _Sizes(snapshot)
        async with contextlib.aclosing(_ahead(self._pages(snapshot))) as pages:
            async for page in pages:
                for item, body in page:
                    if isinstance(item, ResourceMeta):
                        full = sizes is not None and self._is_full is not None and self._is_full(sizes.total)
                        if full and meta is not None:
                            self.rest_after = meta.resource_id
                            return done
                        meta, done = item, done + 1
                        await self._writer.add_resource(item)
                        continue
                    assert meta is not None, "records follow the metadata of their resource"
                    if body is None:
                        await self._explain_missing_body(snapshot, meta, item)
                    await self._writer.add_revision(item, body)
                    self._revisions += 1
                    if sizes is not None:
                        await sizes.add(item, body)
                self._progress(done, max(total, done), self._manager.name)
        return done

    async def _pages(self, snapshot: StorageSnapshot) -> AsyncGenerator[list[Item]]:
        """Yield all metadata and records, these with their bodies."""
        items: list[ResourceMeta | RevisionInfo] = []
        uids: list[str] = []
        found = snapshot.items(self._after)
        try:
            async for item in found:
                items.append(item)
                if isinstance(item, RevisionInfo):
                    uids.append(item.uid)
                    while len(uids) >= self._page_size:
                        page, items, uids = await self._with_bodies(snapshot, items, uids)
                        yield page
            while items:
                page, items, uids = await self._with_bodies(snapshot, items, uids)
                yield page
        finally:
            if isinstance(found, AsyncGenerator):  # it may have a file open
                await found.aclose()

    async def _with_bodies(
        self, snapshot: StorageSnapshot, items: list[ResourceMeta | RevisionInfo], uids: list[str]
    ) -> tuple[list[Item], list[ResourceMeta | RevisionInfo], list[str]]:
        """Return the next page, and the items and uids that are left for later ones because their bodies are large."""
        found = await snapshot.bodies(uids[: self._page_size]) if uids else []
        largest = max((len(body) for body in found if body is not None), default=0)
        self._page_size = max(1, min(PAGE_BODIES, 2 * self._page_size, PAGE_BYTES // max(1, largest)))
        bodies = iter(found)
        page = [
            (item, next(bodies) if isinstance(item, RevisionInfo) else None)
            for item in (items if len(found) == len(uids) else _first(items, len(found)))
        ]
        return page, items[len(page) :], uids[len(found) :]

    # X2

    async def _explain_missing_body(self, snapshot: StorageSnapshot, meta: ResourceMeta, record: RevisionInfo) -> None:
        """List the resource as absent if it was purged. Otherwise raises the reason why the body is missing."""
        await snapshot.renew()  # if the pin was lost, that is the reason
        resource_id = meta.resource_id
        if await self._was_purged(meta):
            self._absent[resource_id] = None
            return
        where = f"the body of revision {record.revision} of {self._manager.name} {resource_id!r}"
        with contextlib.suppress(ResourceNotFound, RevisionNotFound):
            now = await self._storage.revision(resource_id, record.revision)
            if now.uid == record.uid:
                error = StoreDamaged(f"{where} is missing; restore it from a backup, or purge the resource")
                error.resource_id = resource_id
                raise error
        raise StoreUnavailable(
            f"{where} was removed while it was exported, by an older program or in a store that keeps no pins; export"
            " again when no revisions are removed"
        )

    async def _explain_missing_blobs(self, snapshot: StorageSnapshot) -> None:
        """List the resources as absent that refer to missing blobs and were purged. The writer refuses the others."""
        missing = set(await self._writer.unresolved()) - set(self._absent)
        if not missing:
            return
        await snapshot.renew()
        async for item in snapshot.items(self._after):
            if isinstance(item, ResourceMeta) and item.resource_id in missing and await self._was_purged(item):
                self._absent[item.resource_id] = None
                missing.discard(item.resource_id)
        if not snapshot.one_moment:  # a resource that was purged is not among the items any more
            for resource_id in missing:
                with contextlib.suppress(ResourceNotFound):
                    await self._storage.get(resource_id)
                    continue
                self._absent[resource_id] = None

    async def _was_purged(self, meta: ResourceMeta) -> bool:
        """Return whether the resource was purged since. Another one may have its id now."""
        if meta.resource_id in self._absent:
            return True
        await self._storage.catch_up()
        try:
            return (await self._storage.get(meta.resource_id)).created_time != meta.created_time
        except ResourceNotFound:
            return True


def _first(items: Sequence[ResourceMeta | RevisionInfo], records: int) -> Sequence[ResourceMeta | RevisionInfo]:
    """Return the first items, up to so many records."""
    at = [at for at, item in enumerate(items) if isinstance(item, RevisionInfo)][records - 1]
    return items[: at + 1]


class _Blobs:
    """The blobs of a snapshot. One whose row was removed meanwhile counts as missing."""

    def __init__(self, snapshot: StorageSnapshot, report: Callable[[int, int], None]) -> None:
        self._snapshot, self._report = snapshot, report
        self._rowless: set[str] = set()
        self._done = self._total = self.count = 0

    async def expect(self, keys: Sequence[str]) -> None:
        """Count the bytes of these blobs, which come later."""
        self._total += sum(row.size for row in await self._rows(keys))

    async def rows(self, keys: Sequence[str]) -> list[BlobRow]:
        """Return the rows of these keys, in their order."""
        self.count += len(keys)
        return await self._rows(keys)

    async def _rows(self, keys: Sequence[str]) -> list[BlobRow]:
        try:
            return await self._snapshot.blob_rows(keys)
        except StoreDamaged:
            return [await self._row(key) for key in keys]

    async def _row(self, key: str) -> BlobRow:
        try:
            (row,) = await self._snapshot.blob_rows([key])
        except StoreDamaged:
            self._rowless.add(key)
            return BlobRow(key=key, size=1, owner=UNKNOWN_OWNER)  # a size without content: it is missing
        return row

    async def read(self, key: str) -> AsyncIterator[bytes]:
        """Yield the content of a blob. Raises StoreDamaged at once if it is missing."""
        if key in self._rowless:
            raise StoreDamaged(f"the file {key} is missing")
        async for chunk in self._snapshot.read_blob(key):
            self._done += len(chunk)
            self._report(self._done, max(self._done, self._total))
            yield chunk


class _Sizes:
    """The bytes of the bodies and blobs of some resources. A blob that several resources have counts for each."""

    def __init__(self, snapshot: StorageSnapshot) -> None:
        self._snapshot = snapshot
        self._resource_id = ""
        self._counted: set[str] = set()
        self.total = 0

    async def add(self, record: RevisionInfo, body: bytes | None) -> None:
        """Add a revision."""
        self.total += len(body or b"")
        if self._resource_id != record.resource_id:
            self._resource_id = record.resource_id
            self._counted.clear()
        keys = [key for key in record.blobs if key not in self._counted]
        if keys:
            self._counted.update(keys)
            with contextlib.suppress(StoreDamaged):  # the export looks at missing blobs later
                self.total += sum(row.size for row in await self._snapshot.blob_rows(keys))


async def _ahead(pages: AsyncGenerator[T]) -> AsyncGenerator[T]:
    """Yield pages. While the caller uses one, the next one is read."""

    async def read() -> T | None:
        return await anext(pages, None)

    reading = asyncio.create_task(read())
    try:
        while (page := await reading) is not None:
            reading = asyncio.create_task(read())
            yield page
    finally:
        reading.cancel()
        await asyncio.gather(reading, return_exceptions=True)
        await pages.aclose()
