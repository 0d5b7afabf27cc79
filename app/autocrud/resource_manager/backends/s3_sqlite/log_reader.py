"""Read log records and snapshots that a HEAD refers to."""

from __future__ import annotations

import asyncio
from pathlib import Path

from ....errors import StoreDamaged
from ..s3.object_store import ObjectStore
from .copy_files import sha256_of
from .head import Head, LogRecord, Snapshot, decode_segment


class ObjectMissing(Exception):
    """An object that a HEAD refers to is missing: either that HEAD is outdated, or the store is damaged."""


class LogReader:
    """Reads the objects of one store. `head_key` is named in error messages."""

    def __init__(self, objects: ObjectStore, head_key: str) -> None:
        self._objects, self._head_key = objects, head_key

    async def records_after(self, head: Head, seq: int) -> list[LogRecord] | None:
        """Return the records from `seq + 1` up to HEAD; None if the snapshot must be read.

        The snapshot must be read if the log begins later, or if the segments are larger than the snapshot. Raises
        ObjectMissing if a segment is missing, and StoreDamaged if HEAD has no records and no snapshot to continue with.
        """
        first_in_tail = head.tail[0].seq if head.tail else head.seq + 1
        if seq + 1 >= first_in_tail:
            return list(head.tail)
        segments = [segment for segment in head.segs if segment.last > seq]
        snapshot_helps = head.snap is not None and head.snap.seq > seq
        if not segments or segments[0].first > seq + 1:
            if snapshot_helps:
                return None
            raise StoreDamaged(f"{self._head_key} lacks the records after {seq}")
        if head.snap is not None and snapshot_helps and sum(segment.size for segment in segments) > head.snap.size:
            return None
        got = await asyncio.gather(*(self._objects.get(segment.key) for segment in segments))
        records: list[LogRecord] = []
        for segment, found in zip(segments, got, strict=True):
            if found is None:
                raise ObjectMissing(segment.key)
            records += decode_segment(found.body)
        return [*records, *head.tail]

    async def download_snapshot(self, snapshot: Snapshot, path: Path) -> None:
        """Download a snapshot to a file. Raises ObjectMissing, or StoreDamaged if its SHA-256 is wrong."""
        if not await self._objects.download(snapshot.key, path):
            raise ObjectMissing(snapshot.key)
        if await asyncio.get_running_loop().run_in_executor(None, sha256_of, path) != snapshot.sha256:
            raise StoreDamaged(f"{snapshot.key} is not what was uploaded")
