"""Writes an archive in constant memory. Compression and I/O run in a thread of the writer.

    async with ArchiveWriter("backup.tar.gz", created=utc_now()) as writer:
        await writer.begin_model("article", fields={"author": "str"}, unique=(), schema_version=1)
        await writer.add_resource(meta)
        await writer.add_revision(record, body)
        await writer.add_blobs(snapshot.blob_rows, snapshot.read_blob)
        await writer.end_model(one_moment=True)
        result = await writer.close()

- W1 *A file with the name of the archive is complete.* It is written under another name with the mode 0600, synced, and
  renamed. If the context ends without `close`, it is removed.
- W2 *A reader accepts what a writer has written.* The writer checks order, limits, hashes and references like a reader.
"""

from __future__ import annotations

import asyncio
import datetime as dt
import hashlib
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from typing import BinaryIO, NamedTuple, Self

from ..errors import DataTooLarge, MetadataTooLarge, StoreDamaged
from ..resource_manager.basic import BlobRow, ResourceMeta, RevisionInfo, StoredKey
from .archive_format import (
    BLOB_ROWS,
    FORMAT,
    FORMAT_ENTRY,
    MANIFEST_ENTRY,
    MAX_ABSENT,
    MAX_BLOB,
    MAX_BODY,
    MAX_LINE,
    MAX_MANIFEST,
    MAX_PART,
    MAX_PARTS,
    VERSION,
    BodySpan,
    FormatEntry,
    Manifest,
    ModelEntry,
    Part,
    blob_name,
    check_revision,
    encode,
    is_json,
)
from .archive_notes import ArchiveNotes
from .archive_output import ArchiveOutput, EntryDigest
from .compression import Compression, is_dense
from .errors import ArchiveTooLarge

SPAN_BYTES = 128
"""How many bytes the end of a line takes at most."""
SAMPLE = 64 * 1024
"""How many bytes of a blob show whether it can be made smaller."""


class ArchiveResult(NamedTuple):
    """A complete archive: the SHA-256 of its file, in hex, and its size in bytes."""

    sha256: str
    size: int


class ArchiveWriter:
    """Writes one archive. The models, resources, revisions and keys must come in their order: see archive_format.

    target       the path of the archive, whose name ends with .tar.gz or .tar.zst, or an open binary file
    compression  None: that of the name of the path, and gzip for a file
    created      when the export began
    program      name and version of the program, for the manifest
    replace      whether an existing file is replaced
    """

    def __init__(
        self,
        target: str | Path | BinaryIO,
        compression: Compression | None = None,
        *,
        created: dt.datetime,
        program: str = "crudstack",
        replace: bool = True,
    ) -> None:
        self._output = ArchiveOutput(target, compression, int(created.timestamp()), replace=replace)
        self._notes = ArchiveNotes()
        self._created, self._program = created, program
        self._models: list[ModelEntry] = []
        self._model: _Model | None = None
        self._parts = 0
        self._lines = _Buffer()
        self._bodies = _Buffer()

    async def __aenter__(self) -> Self:
        try:
            await self._output.open()
            entry = encode(FormatEntry(FORMAT, VERSION))
            await self._output.entry(FORMAT_ENTRY, [entry])
        except BaseException:  # cancelled, for example: `__aexit__` is not called
            await self.__aexit__()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        self._notes.close()
        await self._output.discard()

    # Models

    async def begin_model(
        self, name: str, *, fields: Mapping[str, str], unique: Sequence[str], schema_version: int
    ) -> None:
        """Begin a model. `fields` are the kinds of its indexed fields by name, for information."""
        assert self._model is None, "end_model comes first"
        self._model = _Model(name, dict(fields), tuple(unique), schema_version)
        await self._output.restart()

    async def add_resource(self, meta: ResourceMeta) -> None:
        """Add the metadata of a resource. Its revisions follow.

        Raises StoreDamaged if the resource before lacks its current revision, or if ids are not in ascending order.
        """
        model = self._current()
        model.check_complete()
        if model.meta is not None and meta.resource_id <= model.meta.resource_id:
            raise _damaged(
                meta.resource_id, f"resource {meta.resource_id!r} follows {model.meta.resource_id!r}: ids must ascend"
            )
        model.meta, model.previous, model.has_current = meta, 0, False
        model.resources += 1
        line = b'{"resource":' + encode(meta) + b"}\n"
        await self._make_room(len(line), 0)
        self._lines.add(line)

    async def add_revision(self, record: RevisionInfo, body: bytes | None) -> None:
        """Add a revision of the last resource. If the body is None, `end_model` must list the resource as absent.

        Raises StoreDamaged if the record or the body is not as it was stored, and DataTooLarge or MetadataTooLarge.
        """
        model = self._current()
        model.add(record, body)
        text, size = b'{"revision":' + encode(record), 0 if body is None else len(body)
        await self._make_room(len(text) + SPAN_BYTES, size)
        if body is None:
            line = text + b"}\n"
        else:
            line = text + b',"body":' + encode(BodySpan(self._bodies.size, size)) + b"}\n"
            self._bodies.add(body)
        self._lines.add(line)
        if record.blobs:
            await asyncio.to_thread(self._notes.note_references, model.name, record.resource_id, record.blobs)
        if size > MAX_PART:
            await self._flush_resources()

    async def _make_room(self, line: int, body: int) -> None:
        """Write the parts of resources, unless a line and a body of these sizes fit into them."""
        if line > MAX_LINE:
            raise MetadataTooLarge(
                f"the metadata of a revision take {line} bytes as JSON, expected at most {MAX_LINE}: it refers to too"
                " many blobs, or its id is too long"
            )
        if self._lines.size + line > MAX_PART or (self._bodies.size and self._bodies.size + body > MAX_PART):
            await self._flush_resources()

    async def _flush_resources(self) -> None:
        if self._lines.size:
            await self._part("resources", "ndjson", self._lines.take())
            await self._part("bodies", "bin", self._bodies.take())

    async def add_key(self, key: StoredKey) -> None:
        """Add an Idempotency-Key. All resources come before the first one. Keys must be in ascending order."""
        model = self._current()
        if not model.keys:
            await self._flush_resources()
            model.check_complete()
            await self._output.restart()
        assert key.key > model.last_key, "keys ascend"
        model.last_key, model.keys = key.key, model.keys + 1
        for operation, result in enumerate(key.results):
            line = encode(
                {
                    "key": key.key,
                    "request": key.request,
                    "time": key.time,
                    "operation": operation,
                    "operations": len(key.results),
                    "result": result,
                }
            )
            if self._lines.size + len(line) >= MAX_PART:
                await self._flush_keys()
            self._lines.add(line + b"\n")

    async def _flush_keys(self) -> None:
        if self._lines.size:
            await self._part("keys", "ndjson", self._lines.take())

    async def blob_keys(self) -> AsyncIterator[list[str]]:
        """Yield the keys of the blobs to which the revisions of the model refer, ascending, in pages."""
        after = ""
        while keys := await asyncio.to_thread(self._notes.referred_to, self._current().name, after, BLOB_ROWS):
            yield keys
            after = keys[-1]

    async def add_blobs(
        self,
        rows: Callable[[Sequence[str]], Awaitable[list[BlobRow]]],
        read: Callable[[str], AsyncIterator[bytes]],
    ) -> None:
        """Add all blobs to which the revisions of the model refer. Called once, after all revisions and keys.

        rows  returns the rows of some keys, in their order
        read  yields the content of a blob. If it raises StoreDamaged at once, the blob counts as missing: see
              `unresolved`
        """
        await self._flush_all()
        model, first = self._current(), True
        async for keys in self.blob_keys():
            found = await rows(keys)
            if first:
                await self._output.restart()
            first = False
            for row in found:
                if row.size > MAX_BLOB:
                    raise ArchiveTooLarge(f"the blob {row.key} has {row.size} bytes, expected at most {MAX_BLOB}")
            await self._part("blobs", "ndjson", [encode(row) + b"\n" for row in found])
            stored = [row for row in found if await self._blob(row, read(row.key))]
            await asyncio.to_thread(self._notes.note_blobs, model.name, stored)
            model.blobs += len(found)
            model.blob_bytes += sum(row.size for row in found)

    async def _blob(self, row: BlobRow, chunks: AsyncIterator[bytes]) -> bool:
        """Write the content of a blob. Return False if it is missing; then the entry is empty."""
        name = blob_name(self._current().name, row.key)
        try:
            first = await anext(chunks, b"")
        except StoreDamaged:
            await self._output.entry(name, [])
            return row.size == 0
        digest, size = hashlib.sha256(first), len(first)
        await self._output.begin(name, row.size, dense=is_dense(first[:SAMPLE]))
        await self._output.write(first)
        async for chunk in chunks:
            digest.update(chunk)
            size += len(chunk)
            await self._output.write(chunk)
        if size != row.size or digest.hexdigest() != row.sha256:
            raise StoreDamaged(f"the blob {row.key} is not what was stored; restore it from a backup")
        await self._output.end(row.size)
        return True

    async def unresolved(self) -> list[str]:
        """Return ids of resources that refer to blobs that were missing, after `add_blobs`."""
        return await asyncio.to_thread(self._notes.unresolved_ids, self._current().name)

    async def end_model(self, *, one_moment: bool, absent: Sequence[str] = ()) -> None:
        """End a model.

        one_moment  whether all resources are as at one moment
        absent      ids of resources that were purged while they were exported

        Raises StoreDamaged if a body or a blob is missing of a resource that is not absent.
        """
        await self._flush_all()
        model = self._current()
        if len(absent) > MAX_ABSENT:
            raise ArchiveTooLarge(f"{len(absent)} resources were purged meanwhile, expected at most {MAX_ABSENT}")
        if lacking := model.bodiless - set(absent):
            raise _damaged(min(lacking), f"the body of a revision of resource {min(lacking)!r} is missing")
        if unresolved := set(await self.unresolved()) - set(absent):
            raise _damaged(min(unresolved), f"a blob of resource {min(unresolved)!r} is missing")
        await self._output.wait()
        self._models.append(model.entry(one_moment, tuple(absent)))
        self._model = None

    async def _flush_all(self) -> None:
        model = self._current()
        model.check_complete()
        if model.keys:
            await self._flush_keys()
        else:
            await self._flush_resources()

    async def _part(self, kind: str, ending: str, pieces: Sequence[bytes]) -> None:
        model = self._current()
        number = model.numbers[kind] = model.numbers.get(kind, 0) + 1
        name = f"models/{model.name}/{kind}-{number:06d}.{ending}"
        model.parts.append(await self._output.entry(name, pieces))
        self._parts += 1
        if self._parts > MAX_PARTS:
            raise ArchiveTooLarge(f"the archive would have more than {MAX_PARTS} parts: export fewer models at once")

    def _current(self) -> _Model:
        assert self._model is not None, "begin_model comes first"
        return self._model

    async def close(self) -> ArchiveResult:
        """Write the manifest, and give the file its name. Return when the file is durable."""
        assert self._model is None, "end_model comes first"
        manifest = encode(
            Manifest(
                format=FORMAT,
                version=VERSION,
                program=self._program,
                created=self._created,
                models=tuple(self._models),
            )
        )
        if len(manifest) > MAX_MANIFEST:
            raise ArchiveTooLarge(
                f"the manifest would have {len(manifest)} bytes, expected at most {MAX_MANIFEST}: export fewer models"
            )
        await self._output.restart()
        await self._output.entry(MANIFEST_ENTRY, [manifest])
        return ArchiveResult(*await self._output.finish())


class _Buffer:
    """Pieces of a part that is not written yet."""

    def __init__(self) -> None:
        self.pieces: list[bytes] = []
        self.size = 0

    def add(self, piece: bytes) -> None:
        self.pieces.append(piece)
        self.size += len(piece)

    def take(self) -> list[bytes]:
        pieces, self.pieces, self.size = self.pieces, [], 0
        return pieces


class _Model:
    """The model that is being written."""

    def __init__(self, name: str, fields: dict[str, str], unique: tuple[str, ...], schema_version: int) -> None:
        self.name, self._fields, self._unique, self._schema_version = name, fields, unique, schema_version
        self.meta: ResourceMeta | None = None
        self.previous, self.has_current, self.last_key = 0, True, ""
        self.resources = self.revisions = self.keys = self.blobs = self.body_bytes = self.blob_bytes = 0
        self.bodiless: set[str] = set()
        self.numbers: dict[str, int] = {}
        self.parts: list[EntryDigest] = []

    def add(self, record: RevisionInfo, body: bytes | None) -> None:
        """Check a revision of the last resource, and count it."""
        assert self.meta is not None, "add_resource comes first"
        resource_id = self.meta.resource_id
        where = f"revision {record.revision} of resource {resource_id!r}"
        if wrong := check_revision(self.meta, record, self.previous):
            raise _damaged(resource_id, f"{where} is wrong: {wrong}")
        if body is None:
            self.bodiless.add(resource_id)
        else:
            if len(body) > MAX_BODY:
                raise DataTooLarge(f"the body of {where} has {len(body)} bytes, expected at most {MAX_BODY}")
            if is_json(record.encoding) and hashlib.sha256(body).hexdigest() != record.data_hash:
                raise _damaged(resource_id, f"the body of {where} is not what was stored")
            self.body_bytes += len(body)
        self.previous = record.revision
        self.has_current = self.has_current or record.revision == self.meta.revision
        self.revisions += 1

    def check_complete(self) -> None:
        """Raise StoreDamaged if the last resource lacks its current revision."""
        if self.meta is not None and not self.has_current:
            raise _damaged(
                self.meta.resource_id,
                f"resource {self.meta.resource_id!r} lacks its current revision, {self.meta.revision}",
            )

    def entry(self, one_moment: bool, absent: tuple[str, ...]) -> ModelEntry:
        """Return the entry of the manifest."""
        return ModelEntry(
            name=self.name,
            fields=self._fields,
            unique=self._unique,
            schema_version=self._schema_version,
            one_moment=one_moment,
            resources=self.resources,
            revisions=self.revisions,
            keys=self.keys,
            blobs=self.blobs,
            body_bytes=self.body_bytes,
            blob_bytes=self.blob_bytes,
            absent=absent,
            parts=tuple(Part(part.name, part.size, part.hash.hexdigest()) for part in self.parts),
        )


def _damaged(resource_id: str, detail: str) -> StoreDamaged:
    error = StoreDamaged(f"{detail}; restore it from a backup, or purge the resource")
    error.resource_id = resource_id
    return error
