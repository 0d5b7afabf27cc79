"""Joins archives of parts of one model, as `exporting.export_part` writes them, in constant memory."""

from __future__ import annotations

import asyncio
import heapq
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TypeVar

from typing_extensions import override

from ..errors import StoreDamaged
from ..resource_manager.basic import BlobRow, ResourceMeta, StoredKey
from .archive_notes import ArchiveNotes
from .archive_reader import VerifiedArchive, Visitor, verify_in_thread
from .archive_writer import ArchiveWriter
from .entries import Item
from .exporting import ExportedModel

T = TypeVar("T")

ANY_SIZE = 2**62
"""The parts come from this program, so their size is not checked."""
PAGE_ITEMS, PAGE_BYTES = 500, 4 * 1024 * 1024
"""A thread reads so many items, or so many bytes of bodies, before they are written."""


class _Rows(Visitor):
    def __init__(self, notes: ArchiveNotes) -> None:
        self._notes = notes

    @override
    def blobs(self, model: str, rows: Sequence[BlobRow]) -> None:
        self._notes.keep_rows(model, rows)


async def join_parts(name: str, parts: Sequence[tuple[Path, str]], writer: ArchiveWriter) -> ExportedModel:
    """Write a model to an archive, whose parts are in archives with these paths and SHA-256, and return what it has.

    The ids of each part follow those of the part before. A blob that several parts have is written once. Raises
    BadArchive if a part is damaged, and what the writer raises.
    """
    with ExitStack() as opened:
        notes = ArchiveNotes()
        opened.callback(notes.close)
        archives = []
        for path, sha256 in parts:
            archive = await verify_in_thread(path, sha256=sha256, max_bytes=ANY_SIZE, visitor=_Rows(notes))
            archives.append(opened.enter_context(archive))
        return await _Join(name, archives, notes, writer).run()


class _Join:
    def __init__(
        self, name: str, archives: Sequence[VerifiedArchive], notes: ArchiveNotes, writer: ArchiveWriter
    ) -> None:
        self._name, self._archives, self._notes, self._writer = name, archives, notes, writer
        self._blobs = heapq.merge(*(archive.blobs(name) for archive in archives), key=lambda blob: blob[0].key)
        self._resources = self._revisions = self._blob_count = 0

    async def run(self) -> ExportedModel:
        """Write the model."""
        models = [archive.model(self._name) for archive in self._archives]
        first, writer = models[0], self._writer
        await writer.begin_model(
            self._name, fields=first.fields, unique=first.unique, schema_version=first.schema_version
        )
        for archive in self._archives:
            async for item in _read(archive.resources(self._name)):
                await self._add(item)
        for archive in self._archives:
            async for key in _read(archive.keys(self._name)):
                assert isinstance(key, StoredKey), "the archive has nothing else there"
                await writer.add_key(key)
        await writer.add_blobs(self._rows, self._content)
        one_moment = len(models) == 1 and first.one_moment
        absent = tuple(dict.fromkeys(resource_id for model in models for resource_id in model.absent))
        await writer.end_model(one_moment=one_moment, absent=absent)
        resources = self._resources + len(absent)
        return ExportedModel(self._name, one_moment, resources, self._revisions, self._blob_count, absent)

    async def _add(self, item: Item) -> None:
        if isinstance(item, ResourceMeta):
            self._resources += 1
            await self._writer.add_resource(item)
        else:
            self._revisions += 1
            await self._writer.add_revision(*item)

    async def _rows(self, keys: Sequence[str]) -> list[BlobRow]:
        self._blob_count += len(keys)
        return await asyncio.to_thread(lambda: [self._notes.row(self._name, key) for key in keys])

    async def _content(self, key: str) -> AsyncIterator[bytes]:
        """Yield the content of a blob. The writer asks for blobs by ascending key, as the parts have them."""
        chunks = await asyncio.to_thread(self._chunks, key)
        while (chunk := await asyncio.to_thread(next, chunks, None)) is not None:
            yield chunk

    def _chunks(self, key: str) -> Iterator[bytes]:
        for row, chunks in self._blobs:
            if row.key == key:
                return chunks
        raise StoreDamaged(f"the file {key} is missing")


async def _read(items: Iterator[T]) -> AsyncIterator[T]:
    """Yield items that a thread reads, in pages."""

    def page() -> list[T]:
        found, size = [], 0
        for item in items:
            found.append(item)
            size += len(item[1] or b"") if isinstance(item, tuple) else 0
            if len(found) >= PAGE_ITEMS or size >= PAGE_BYTES:
                break
        return found

    while found := await asyncio.to_thread(page):
        for item in found:
            yield item
