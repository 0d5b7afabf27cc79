"""The resources of an archive as changes for a store: in pieces of bounded size, with new uids and keys of blobs.

- Q1 *The first piece of a resource has its current revision.* A commit of the piece stores the body that the metadata
  name, and the index entry. So each piece may be a commit of its own.
- Q2 *All pieces of a resource have the same metadata.* So the later ones only add records.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from typing import NamedTuple, TypeVar

from msgspec.structs import replace

from ..errors import StoreDamaged
from ..resource_manager.basic import Change, IndexEntry, ResourceMeta, RevisionInfo, Version, Write
from .archive_reader import VerifiedArchive
from .survey import LARGE_BYTES, LARGE_REVISIONS, Index

T = TypeVar("T")

BATCH = 200
"""How many resources a batch has at most."""
BATCH_BYTES = 4 * 1024 * 1024
"""A batch takes no more resources once its bodies have this many bytes."""


class Piece(NamedTuple):
    """Some revisions of a resource, as they are in the archive.

    entry  the index entry of the current revision, in the first piece; None in later ones
    large  whether the resource may have several pieces
    """

    meta: ResourceMeta
    revisions: list[tuple[RevisionInfo, bytes]]
    entry: IndexEntry | None
    large: bool

    @property
    def size(self) -> int:
        """Bytes of the bodies."""
        return sum(len(body) for _, body in self.revisions)


class _Resource:
    """The resource that is being read."""

    def __init__(self, meta: ResourceMeta, current: tuple[RevisionInfo, bytes] | None, index: Index) -> None:
        self.meta, self._current, self._index = meta, current, index
        self._revisions = [] if current is None else [current]
        self._size, self._first = 0, True

    def add(self, record: RevisionInfo, body: bytes) -> None:
        """Add a revision. The current revision of a large resource was the first one."""
        if self._current is None or record.revision != self.meta.revision:
            self._revisions.append((record, body))
            self._size += len(body)

    @property
    def is_full(self) -> bool:
        """Return whether a piece is to be taken now."""
        return self._current is not None and (len(self._revisions) >= LARGE_REVISIONS or self._size >= LARGE_BYTES)

    def piece(self) -> Iterator[Piece]:
        """Yield the revisions since the last piece, if there are any."""
        if self._revisions:
            entry = None
            if self._first:
                record, body = next(one for one in self._revisions if one[0].revision == self.meta.revision)
                entry = self._index.entry(body, record.encoding)
            yield Piece(self.meta, self._revisions, entry, large=self._current is not None)
            self._revisions, self._size, self._first = [], 0, False


def pieces_of(
    archive: VerifiedArchive, model: str, index: Index, after: str = "", *, left_out: bool = False
) -> Iterator[Piece]:
    """Yield the resources of a model whose ids follow `after`, in pieces. Blocks.

    left_out  whether to yield only those that are left out for now
    """
    notes = archive.notes
    resource: _Resource | None = None
    for item in archive.resources(model):
        if isinstance(item, ResourceMeta):
            if resource is not None:
                yield from resource.piece()
            resource = None
            resource_id = item.resource_id
            wanted = notes.is_left_out(model, resource_id) if left_out else not notes.is_excluded(model, resource_id)
            if resource_id > after and wanted:
                resource = _Resource(item, notes.current(model, resource_id), index)
        elif resource is not None and item[1] is not None:
            resource.add(item[0], item[1])
            if resource.is_full:
                yield from resource.piece()
    if resource is not None:
        yield from resource.piece()


def batches_of(pieces: Iterator[Piece]) -> Iterator[list[Piece]]:
    """Yield the pieces in batches. A resource has at most one piece in a batch. Blocks."""
    batch: list[Piece] = []
    size = 0
    for piece in pieces:
        if batch and (
            batch[-1].meta.resource_id == piece.meta.resource_id or len(batch) == BATCH or size >= BATCH_BYTES
        ):
            yield batch
            batch, size = [], 0
        batch.append(piece)
        size += piece.size
    if batch:
        yield batch


async def prefetched(items: Iterator[T]) -> AsyncGenerator[T, None]:
    """Yield items of a blocking iterator. The next one is made in a thread while the caller uses one.

    Close it, because the thread uses the archive until then. If the caller is cancelled, waits for the thread too.
    """

    def take() -> T | None:
        return next(items, None)

    coming = asyncio.ensure_future(asyncio.to_thread(take))
    try:
        while (item := await asyncio.shield(coming)) is not None:
            coming = asyncio.ensure_future(asyncio.to_thread(take))
            yield item
    finally:
        await asyncio.wait([coming])
        if not coming.cancelled():
            coming.exception()  # the error of an unused item is not logged


class Rewriting:
    """Gives bodies new uids, and blobs the keys that they have in the store of a model.

    new_uid   returns the uid for a new body; its argument is the body
    new_blob  returns the key of a blob in the store, by its key in the records; None if it is not stored. May block
    """

    def __init__(self, new_uid: Callable[[bytes], str], new_blob: Callable[[str], str | None]) -> None:
        self._new_uid, self._new_blob = new_uid, new_blob
        self._large: ResourceMeta | None = None  # the metadata of the last resource, as they were written

    def writes(self, piece: Piece, meta: ResourceMeta, expect: Version | None, drop: Sequence[str] = ()) -> list[Write]:
        """Return the writes of a piece.

        meta    the metadata that the resource gets; its uid is replaced
        expect  the version that the resource has; None if the first piece creates it
        drop    the uids of the bodies of the resource that the first piece replaces
        """
        records = [self._record(record, body) for record, body in piece.revisions]
        if piece.entry is not None:
            current = next(record for record in records if record.revision == meta.revision)
            meta = replace(meta, uid=current.uid)
        elif self._large is None or self._large.resource_id != meta.resource_id:
            raise StoreDamaged(f"the first revisions of resource {meta.resource_id!r} were not imported")
        else:
            meta = self._large
        self._large = meta
        after = Version(meta.version, meta.nonce)
        writes: list[Write] = []
        for record, (_, body) in zip(records, piece.revisions, strict=True):
            first = not writes and piece.entry is not None
            change = Change(
                meta=meta,
                record=record,
                index=piece.entry if first else None,
                expect=after if not first else "absent" if expect is None else expect,
                drop=tuple(drop) if first else (),
            )
            writes.append(Write(change, body))
        return writes

    def continue_with(self, piece: Piece, meta: ResourceMeta) -> list[Write]:
        """Return the writes that add the revisions of a first piece to a resource that was imported in part.

        meta  its metadata in the store. The current revision is stored, and stays as it is
        """
        self._large = meta
        rest = [one for one in piece.revisions if one[0].revision != meta.revision]
        return self.writes(piece._replace(revisions=rest, entry=None), meta, None)

    def written(self, meta: ResourceMeta) -> None:
        """Take the metadata of the last resource as the storage has written them."""
        self._large = meta

    def _record(self, record: RevisionInfo, body: bytes) -> RevisionInfo:
        if not record.blobs:
            return replace(record, uid=self._new_uid(body))
        blobs = [self._new_blob(key) for key in record.blobs]
        if None in blobs:
            raise StoreDamaged(f"a file of resource {record.resource_id!r} is missing")
        return replace(record, uid=self._new_uid(body), blobs=tuple(sorted(key for key in blobs if key is not None)))


def new_uids(piece: Piece, writes: Sequence[Write]) -> list[tuple[str, str]]:
    """Return the uids of the bodies of a piece, as they were and as they are written."""
    new = {write.change.record.revision: write.change.record.uid for write in writes if write.change.record}
    return [(record.uid, new[record.revision]) for record, _ in piece.revisions if record.revision in new]
