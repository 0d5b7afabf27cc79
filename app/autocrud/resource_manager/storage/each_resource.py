"""Each resource of a storage as at some moment, for stores that cannot be read as at one moment.

A resource is read, and then its metadata again. If a commit came between, it is read again. So its metadata, its
records, the rows of its blobs and, without a pin, its bodies belong together.
"""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import AbstractAsyncContextManager
from typing import IO, Self

import msgspec
from typing_extensions import override

from ...errors import ResourceNotFound, StoreDamaged, WriteContention
from ...query import Query
from ..basic import READ_AT_ONCE, BlobRow, IStorage, ResourceMeta, RevisionInfo, StoredKey
from ..contract.snapshots import BodySnapshot, MetaSnapshot
from .kept_rows import KeptRows

MAX_ATTEMPTS = 100
"""How often a resource is read that changes each time."""
RECORDS_PAGE = 500
RECORDS_IN_MEMORY = 2000
KEPT_BYTES = 8 * 1024 * 1024
"""Bodies of so many bytes are kept between `items` and `bodies`, if no pin keeps them in the store."""

_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(RevisionInfo).decode


class EachResource(MetaSnapshot, BodySnapshot):
    """The resources of a storage, each one as at some moment.

    storage    used through `IStorage` alone
    stored     the bodies of the storage
    blob_rows  keeps the rows of blobs; None if the store has none
    keys_of    opens a moment of the store, of which the keys of requests are read; None: there are none
    pinned     whether a pin keeps bodies; if not, the bodies of small resources are read with their records
    """

    def __init__(
        self,
        storage: IStorage,
        stored: BodySnapshot,
        blob_rows: KeptRows | None,
        keys_of: Callable[[], AbstractAsyncContextManager[MetaSnapshot]] | None,
        *,
        pinned: bool,
    ) -> None:
        self._storage, self._stored, self._blob_rows, self._pinned = storage, stored, blob_rows, pinned
        self._keys_of = keys_of
        self._kept: dict[str, bytes] = {}
        self._kept_bytes = 0

    @property
    @override
    def one_moment(self) -> bool:
        return False

    @override
    async def count(self) -> int:
        return await self._storage.count(Query(include_deleted=True).resolve({}))

    @override
    async def items(self, after: str = "") -> AsyncIterator[ResourceMeta | RevisionInfo]:
        async for meta in self._storage.scan():
            if meta.resource_id <= after:
                continue
            with _Records() as records:
                current = await self._read(meta, records)
                if current is not None:
                    yield current
                    for record in records:
                        yield record

    async def _read(self, meta: ResourceMeta, records: _Records) -> ResourceMeta | None:
        """Read a resource and its records. Return its metadata, or None if it was purged since the scan."""
        try:
            for _ in range(MAX_ATTEMPTS):
                records.clear()
                async for record in self._records(meta):
                    records.add(record)
                if self._blob_rows is not None:
                    await self._blob_rows.keep(records)
                bodies = {} if self._pinned else await self._bodies_of(records)
                now = await self._storage.get(meta.resource_id)
                if (now.version, now.nonce) == (meta.version, meta.nonce):
                    self._kept |= bodies
                    self._kept_bytes += sum(map(len, bodies.values()))
                    return meta
                meta = now
        except ResourceNotFound:
            return None
        raise WriteContention(
            f"resource {meta.resource_id!r} changed each time when it was read; try again when it is written to less"
        )

    async def _records(self, meta: ResourceMeta) -> AsyncIterator[RevisionInfo]:
        for start in range(1, meta.total_revision_count + 1, RECORDS_PAGE):
            page = await self._storage.revisions(meta.resource_id, start + RECORDS_PAGE, RECORDS_PAGE)
            for record in reversed(page.items):
                if start <= record.revision <= meta.total_revision_count:
                    yield record

    async def _bodies_of(self, records: _Records) -> dict[str, bytes]:
        if records.count > READ_AT_ONCE or self._kept_bytes > KEPT_BYTES:
            return {}
        uids = [record.uid for record in records]
        try:
            return dict(zip(uids, await self._storage.bodies(uids), strict=True))
        except StoreDamaged:
            return {}  # perhaps of a commit since; otherwise `bodies` finds out which one is missing

    @override
    async def bodies(self, uids: Sequence[str]) -> list[bytes | None]:
        """Return bodies: those that `items` has read, the others from the store. Stops where the store stops."""
        missing = [uid for uid in uids if uid not in self._kept]
        found = dict(zip(missing, await self._stored.bodies(missing), strict=False)) if missing else {}
        first = list(itertools.takewhile(lambda uid: uid in self._kept or uid in found, uids))
        bodies = [self._kept[uid] if uid in self._kept else found[uid] for uid in first]
        for uid in first:
            self._kept_bytes -= len(self._kept.pop(uid, b""))
        return bodies

    @override
    async def keys(self) -> AsyncIterator[StoredKey]:
        """Yield the results that are kept for Idempotency-Keys, as at a later moment than the resources."""
        if self._keys_of is not None:
            async with self._keys_of() as moment:
                async for key in moment.keys():
                    yield key

    @override
    async def blob_rows(self, keys: Sequence[str]) -> list[BlobRow]:
        if self._blob_rows is not None:
            return await self._blob_rows.get(keys)
        if keys:
            raise StoreDamaged(f"the file {keys[0]} is missing, although a revision names it")
        return []


class _Records:
    """Records of one resource, in memory or, if they are many, in a file without a name."""

    def __init__(self) -> None:
        self.count = 0
        self._few: list[RevisionInfo] = []
        self._file: IO[bytes] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.clear()

    def clear(self) -> None:
        """Remove all records."""
        self.count = 0
        self._few.clear()
        if self._file is not None:
            self._file.close()
            self._file = None

    def add(self, record: RevisionInfo) -> None:
        """Append a record."""
        self.count += 1
        self._few.append(record)
        if len(self._few) > RECORDS_IN_MEMORY:
            if self._file is None:
                self._file = tempfile.TemporaryFile()  # noqa: SIM115 - `clear` closes it
            for one in self._few:
                document = _encode(one)
                self._file.write(len(document).to_bytes(4) + document)
            self._few.clear()

    def __iter__(self) -> Iterator[RevisionInfo]:
        if self._file is not None:
            self._file.seek(0)
            while size := self._file.read(4):
                yield _decode(self._file.read(int.from_bytes(size)))
        yield from self._few
