"""Verifies an archive as a whole, then reads it as often as needed.

    with verify(path) as archive:
        for model in archive.manifest.models:
            for item in archive.resources(model.name): ...

V1 *Nothing of an archive is used before all of it was verified*: names, order, sizes, hashes, counts, references,
   and that each body can be decoded.
V2 *Everything is verified again when it is read*, because the file may change. A part is compared with the manifest
before its items are returned.

All functions but `verify_in_thread` block; call them in a thread.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import stat
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO, NamedTuple, Protocol, Self

import msgspec

from ..errors import InvalidData
from ..resource_manager.basic import BlobRow, ResourceMeta, RevisionInfo, StoredKey
from ..resource_manager.runtime.disk_space import space
from ..resource_manager.runtime.threads import until_cancelled
from .archive_format import (
    FORMAT,
    FORMAT_ENTRY,
    MANIFEST_ENTRY,
    MAX_MANIFEST,
    MAX_PARTS,
    VERSION,
    FormatEntry,
    Manifest,
    ModelEntry,
    Part,
    blob_name,
    decode_json,
)
from .archive_notes import ArchiveNotes
from .bodies import check_body
from .compression import GZIP_HEADER, Compression, compression_of
from .entries import BlobItems, Entries, Item, KeyItems, Name, ResourceItems
from .errors import ArchiveTooLarge, BadArchive
from .plain_stream import READ, FileHash, PlainStream, Start
from .tar import Header

Progress = Callable[[int, int | None, str], None]
"""Called with what is done, the total if it is known, and a word for what is counted."""
_STAGES = {"resources": 0, "bodies": 0, "keys": 1, "blobs": 2, "blob": 2}
_manifest = msgspec.json.Decoder(Manifest).decode
_format = msgspec.json.Decoder(FormatEntry).decode


class Visitor(Protocol):
    """Sees the items of an archive while it is verified. They must not be used before the verification has ended."""

    def resource(self, model: str, meta: ResourceMeta) -> None:
        """See the metadata of a resource."""
        return None

    def revision(self, model: str, meta: ResourceMeta, record: RevisionInfo, body: bytes | None) -> None:
        """See a revision of this resource."""
        return None

    def key(self, model: str, key: StoredKey) -> None:
        """See the results of an Idempotency-Key."""
        return None

    def blobs(self, model: str, rows: Sequence[BlobRow]) -> None:
        """See the rows of some blobs that the archive has, by ascending key."""
        return None


class Section(NamedTuple):
    """The place of the first part of a kind: the start of its member, and its position among the plain bytes."""

    start: Start
    position: int


class _ModelCheck:
    """The entries of one model that were read so far."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.resources, self.keys, self.blobs = ResourceItems(), KeyItems(), BlobItems()
        self.parts: list[Part] = []
        self._stage, self._numbers = 0, dict.fromkeys(_STAGES, 0)

    def enter(self, name: Name, entry: str) -> None:
        """Check that an entry may come now."""
        stage = _STAGES[name.kind]
        if stage < self._stage:
            raise BadArchive(f"the entry {entry!r} comes too late: resources come first, then keys, then blobs")
        self._stage = stage
        self._numbers[name.kind] += 1
        if name.kind != "blob" and name.number != self._numbers[name.kind]:
            raise BadArchive(
                f"the part {entry!r} is not in order: expected number {self._numbers[name.kind]} of its kind"
            )

    def end(self) -> None:
        """Check that the model is complete."""
        self.resources.end()
        self.keys.end()

    @property
    def counts(self) -> dict[str, int]:
        """The counts that the manifest must have."""
        return {
            "resources": self.resources.resources,
            "revisions": self.resources.revisions,
            "keys": self.keys.keys,
            "blobs": self.blobs.blobs,
            "body_bytes": self.resources.body_bytes,
            "blob_bytes": self.blobs.blob_bytes,
        }


class _Verification:
    """One pass over an archive."""

    def __init__(self, stream: PlainStream, notes: ArchiveNotes, visitor: Visitor | None) -> None:
        self._entries, self._notes, self._visitor = Entries(stream), notes, visitor
        self._models: dict[str, _ModelCheck] = {}
        self._parts = 0
        self.sections: dict[str, Section] = {}

    def run(self) -> Manifest:
        """Read all entries, and return the manifest. Raises BadArchive or ArchiveTooLarge."""
        self._check_format()
        current: _ModelCheck | None = None
        while True:
            header = self._next()
            if header.name == MANIFEST_ENTRY:
                break
            name = Name(header.name)
            if current is None or name.model != current.name:
                if current is not None:
                    current.end()
                if name.model.lower() in (known.lower() for known in self._models):
                    raise BadArchive(f"the model {name.model!r} stands twice in the archive")
                current = self._models[name.model] = _ModelCheck(name.model)
            current.enter(name, header.name)
            self._entry(current, name, header)
        if current is not None:
            current.end()
        manifest = decode_json(self._entries.content(header, MAX_MANIFEST), _manifest, "the manifest")
        if self._entries.next() is not None:
            raise BadArchive("the archive holds entries after its manifest")
        self._check_manifest(manifest)
        return manifest

    def _next(self) -> Header:
        start, position = self._entries.stream.start(), self._entries.stream.position
        header = self._entries.next()
        if header is None:
            raise BadArchive("the archive is truncated: it has no manifest")
        if header.name.startswith("models/") and Name(header.name).number == 1:
            self.sections[header.name] = Section(start, position)
        return header

    def _check_format(self) -> None:
        header = self._entries.next()
        if header is None or header.name != FORMAT_ENTRY:
            raise BadArchive(
                f"the archive does not begin with {FORMAT_ENTRY}: expected an archive that `crudstack export` wrote, or"
                " its entries in the same order"
            )
        found = decode_json(self._entries.content(header, MAX_MANIFEST), _format, FORMAT_ENTRY)
        if found.format != FORMAT:
            raise BadArchive(f"the archive is a {found.format!r}, expected a {FORMAT!r}")
        if found.version != VERSION:
            advice = "use a newer program" if found.version > VERSION else "no program writes it, make another archive"
            raise BadArchive(f"the archive has format version {found.version}, this program knows {VERSION}: {advice}")

    def _entry(self, check: _ModelCheck, name: Name, header: Header) -> None:
        match name.kind:
            case "resources":
                self._resources(check, header)
            case "keys":
                content, part = self._entries.part(header)
                self._add(check, part)
                for key in check.keys.items(content, header.name):
                    self._notes.want_uids(check.name, [meta.uid for meta in key.results if meta is not None])
                    if self._visitor is not None:
                        self._visitor.key(check.name, key)
            case "blobs":
                self._blobs(check, header)
            case _:
                raise BadArchive(f"the entry {header.name!r} does not follow the part that describes it")

    def _add(self, check: _ModelCheck, part: Part) -> None:
        self._parts += 1
        if self._parts > MAX_PARTS:
            raise ArchiveTooLarge(f"the archive has more than {MAX_PARTS} parts")
        check.parts.append(part)

    def _resources(self, check: _ModelCheck, header: Header) -> None:
        content, part = self._entries.part(header)
        self._add(check, part)
        bodies_header = bodies_of(self._entries, header)
        check.enter(Name(bodies_header.name), bodies_header.name)
        bodies, part = self._entries.bodies(bodies_header)
        self._add(check, part)
        visitor = self._visitor
        for item in check.resources.items(content, header.name, bodies):
            if isinstance(item, ResourceMeta):
                if visitor is not None:
                    visitor.resource(check.name, item)
                continue
            record, body = item
            if body is not None:
                check_body(record, body)
            self._notes.note_references(check.name, record.resource_id, record.blobs)
            if visitor is not None and check.resources.meta is not None:
                visitor.revision(check.name, check.resources.meta, record, body)

    def _blobs(self, check: _ModelCheck, header: Header) -> None:
        content, part = self._entries.part(header)
        self._add(check, part)
        present: list[BlobRow] = []
        for line in check.blobs.rows(content, header.name):
            found = blob_header(line.row, self._entries, check.name)
            if found is not None:
                for _ in blob_chunks(line.row, found, self._entries):
                    pass
                present.append(line.row)
        self._notes.note_blobs(check.name, present)
        if self._visitor is not None:
            self._visitor.blobs(check.name, present)

    def _check_manifest(self, manifest: Manifest) -> None:
        names = [model.name for model in manifest.models]
        if len({name.lower() for name in names}) != len(names):
            raise BadArchive("the manifest lists a model twice")
        with_entries = [name for name in names if name in self._models]
        if with_entries != list(self._models):
            raise BadArchive("the manifest lists other models than the archive holds, or in another order")
        for model in manifest.models:
            found = self._models.get(model.name) or _ModelCheck(model.name)
            for name, count in found.counts.items():
                if getattr(model, name) != count:
                    raise BadArchive(
                        f"the manifest says {getattr(model, name)} {name} for model {model.name!r}, but the archive"
                        f" holds {count}"
                    )
            if list(model.parts) != found.parts:
                raise BadArchive(f"the manifest describes other parts of model {model.name!r} than the archive holds")
            self._check_references(model, found)

    def _check_references(self, model: ModelEntry, found: _ModelCheck) -> None:
        absent = set(model.absent)
        if lacking := found.resources.bodiless - absent:
            raise BadArchive(f"resource {min(lacking)!r} of model {model.name!r} lacks a body")
        if (unresolved := self._notes.unresolved(model.name, absent)) is not None:
            key, resource_id = unresolved
            raise BadArchive(
                f"resource {resource_id!r} of model {model.name!r} refers to the blob {key!r}, which the archive lacks"
            )


def bodies_of(entries: Entries, header: Header) -> Header:
    """Return the header of the part of bodies that must follow a part of resources. Raises BadArchive if none does."""
    expected = header.name.replace("/resources-", "/bodies-").removesuffix(".ndjson") + ".bin"
    found = entries.next()
    if found is None or found.name != expected:
        raise BadArchive(f"the part {header.name!r} is not followed by {expected!r}")
    return found


def blob_header(row: BlobRow, entries: Entries, model: str) -> Header | None:
    """Return the header of the blob of a row, which must come next; None if the blob was missing at the export.

    Raises BadArchive if it is another one. An empty entry stands for a blob that was missing.
    """
    header = entries.next()
    if header is None or header.name != blob_name(model, row.key):
        raise BadArchive(f"the blob {row.key!r} does not follow the part that describes it")
    if header.size not in (row.size, 0):
        raise BadArchive(f"the blob {row.key!r} has {header.size} bytes, but its row says {row.size}")
    return header if header.size == row.size else None


def blob_chunks(row: BlobRow, header: Header, entries: Entries) -> Iterator[bytes]:
    """Yield the content of a blob. Raises BadArchive at its end if it has another SHA-256 than its key says."""
    digest = hashlib.sha256()
    for chunk in entries.chunks(header):
        digest.update(chunk)
        yield chunk
    if digest.hexdigest() != row.sha256:
        raise BadArchive(f"the blob {row.key!r} has another SHA-256 than its key says")


class VerifiedArchive:
    """An archive that was verified. Close it, or use it as a context manager.

    manifest  the models of the archive
    sha256    of the file, in hex
    size      of the file, in bytes
    notes     a temporary database of facts about the archive: see ArchiveNotes
    """

    def __init__(
        self,
        file: BinaryIO,
        manifest: Manifest,
        sha256: str,
        max_bytes: int,
        notes: ArchiveNotes,
        sections: dict[str, Section],
    ) -> None:
        self.manifest, self.sha256, self.notes = manifest, sha256, notes
        self.size = os.fstat(file.fileno()).st_size
        self._file, self._max_bytes, self._sections = file, max_bytes, sections

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file, and remove the notes."""
        self._file.close()
        self.notes.close()

    @property
    def compression(self) -> Compression:
        """How the archive is compressed."""
        return compression_of(os.pread(self._file.fileno(), GZIP_HEADER, 0))

    def model(self, name: str) -> ModelEntry:
        """Return the entry of a model in the manifest. Raises KeyError if it has none."""
        return next(model for model in self.manifest.models if model.name == name)

    def resources(self, name: str) -> Iterator[Item]:
        """Yield each resource by ascending id: its metadata, then its records by ascending number, with bodies.

        Absent resources are left out, so no body is None.
        """
        model, items = self.model(name), ResourceItems()
        absent = set(model.absent)
        parts = [part for part in model.parts if Name(part.name).kind in ("resources", "bodies")]
        skipped = False
        if not parts:
            return
        entries = self._at(parts[0].name)
        for lines, bodies in zip(parts[::2], parts[1::2], strict=True):
            content = _read_part(entries, lines)
            for item in items.items(content, lines.name, _read_part(entries, bodies)):
                if isinstance(item, ResourceMeta):
                    skipped = item.resource_id in absent
                if not skipped:
                    yield item
        items.end()

    def keys(self, name: str) -> Iterator[StoredKey]:
        """Yield the results that a model keeps for Idempotency-Keys, by ascending key."""
        model, items = self.model(name), KeyItems()
        parts = [part for part in model.parts if Name(part.name).kind == "keys"]
        if not parts:
            return
        entries = self._at(parts[0].name)
        for part in parts:
            yield from items.items(_read_part(entries, part), part.name)
        items.end()

    def blobs(self, name: str) -> Iterator[tuple[BlobRow, Iterator[bytes]]]:
        """Yield each blob by ascending key, with its content. Read the content before the next blob, or not at all."""
        model, items = self.model(name), BlobItems()
        parts = [part for part in model.parts if Name(part.name).kind == "blobs"]
        if not parts:
            return
        entries = self._at(parts[0].name)
        for part in parts:
            for line in items.rows(_read_part(entries, part), part.name):
                if (header := blob_header(line.row, entries, name)) is not None:
                    chunks = blob_chunks(line.row, header, entries)
                    yield line.row, chunks
                    for _ in chunks:
                        pass

    def _at(self, entry: str) -> Entries:
        """Return the entries from the first part of a kind on."""
        section = self._sections[entry]
        stream = PlainStream(self._file.fileno(), self._max_bytes, section.start.offset)
        stream.skip(section.position - section.start.position)
        return Entries(stream)


def _read_part(entries: Entries, part: Part) -> bytes:
    header = entries.next()
    if header is None or header.name != part.name or header.size != part.size:
        raise _changed()
    content, found = entries.part(header, part.size)
    if found != part:
        raise _changed()
    return content


def _changed() -> BadArchive:
    return BadArchive("the archive was changed while it was read")


def verify(
    path: str | Path,
    *,
    max_bytes: int | None = None,
    sha256: str | None = None,
    notes: ArchiveNotes | None = None,
    visitor: Visitor | None = None,
    progress: Progress | None = None,
) -> VerifiedArchive:
    """Verify an archive as a whole, and return it. Blocks.

    Args:
        path: A regular file.
        max_bytes: How many bytes the archive may have when it is decompressed; None: the free space of the disk for
            temporary files.
        sha256: The SHA-256 that the file must have, in hex; None: any.
        notes: Where facts are noted, to be closed with the archive; None: a new temporary file.
        visitor: Sees the items.
        progress: Called with the bytes of the file that were verified.

    Raises BadArchive, ArchiveTooLarge, InvalidData if the file cannot be opened, and ConfigError if a package is
    missing.
    """
    notes = notes or ArchiveNotes()
    with contextlib.ExitStack() as undo:
        undo.callback(notes.close)
        file = _opened(Path(path))
        undo.callback(file.close)
        size = os.fstat(file.fileno()).st_size
        if sha256 is not None:
            check_sha256(file.fileno(), sha256)
        limit = space(Path(tempfile.gettempdir())).free if max_bytes is None else max_bytes
        digest = FileHash(lambda done: None if progress is None else progress(done, size, "verify"))
        stream = PlainStream(file.fileno(), limit, read=digest)
        verification = _Verification(stream, notes, visitor)
        manifest = verification.run()
        undo.pop_all()
    return VerifiedArchive(file, manifest, digest.hexdigest(), limit, notes, verification.sections)


async def verify_in_thread(
    path: str | Path,
    *,
    max_bytes: int | None = None,
    sha256: str | None = None,
    notes: ArchiveNotes | None = None,
    visitor: Visitor | None = None,
    progress: Progress | None = None,
) -> VerifiedArchive:
    """Verify an archive in a thread, as `verify` does.

    If the caller is cancelled, the thread stops within a few reads of the file, and this function waits for it.
    """

    def work(check: Callable[[], None]) -> VerifiedArchive:
        def report(done: int, total: int | None, what: str) -> None:
            check()
            if progress is not None:
                progress(done, total, what)

        return verify(path, max_bytes=max_bytes, sha256=sha256, notes=notes, visitor=visitor, progress=report)

    return await until_cancelled(work)


def check_sha256(handle: int, expected: str) -> None:
    """Raise BadArchive unless an open file has this SHA-256, in hex."""
    digest, offset = hashlib.sha256(), 0
    while raw := os.pread(handle, READ, offset):
        digest.update(raw)
        offset += len(raw)
    if digest.hexdigest() != expected.strip().lower():
        raise BadArchive(f"the archive has the SHA-256 {digest.hexdigest()}, expected {expected}: it is another one")


def _opened(path: Path) -> BinaryIO:
    try:
        file = path.open("rb")
    except OSError as error:
        raise InvalidData(f"the archive cannot be opened: {error.strerror}") from None
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise InvalidData("the archive is no regular file")
    return file
