"""Snapshots, merges of segments, and garbage collection: they keep the log short and remove unused objects.

Any instance may do each of these, and may be frozen or killed at any step. So long work is first announced in `pend` of
HEAD, and its result is swapped in only if the announcement is still there. Unused objects are found by the version in
their names and never by their age (I2).
"""

from __future__ import annotations

import asyncio
import datetime as dt
import logging
import math
from collections.abc import Callable, Sequence
from pathlib import Path

from .committer import S3Committer
from .copy_files import LEFTOVER_S, new_path, sha256_of
from .head import (
    PIN_FOLDER,
    Head,
    Pending,
    Segment,
    Snapshot,
    decode_segment,
    encode_segment,
    segment_key,
    snapshot_key,
    version_in,
)
from .race_check import RACE_FOLDER
from .replica import Replica

log = logging.getLogger("crudstack.s3sqlite")

FANOUT = 8
"""The number of segments that are merged into one."""
LEAST_LOG = 1024 * 1024
"""A log with fewer bytes needs no snapshot."""
ABANDONED = 8 * 1024 * 1024
"""If more bytes than these are logged after an announcement, its work counts as abandoned."""


class Housekeeping:
    """Housekeeping of one store, from one event loop.

    Args:
        replica: The local copy of the store.
        committer: Swaps HEAD.
        snapshot_ratio: A snapshot is due when the log is larger than the last snapshot times this.
        tail_bytes: The size of the smallest tier of segments, in bytes.
    """

    def __init__(self, replica: Replica, committer: S3Committer, *, snapshot_ratio: float, tail_bytes: int) -> None:
        self._replica, self._objects, self._committer = replica, replica.objects, committer
        self._ratio, self._tail_bytes = snapshot_ratio, tail_bytes

    def due(self, head: Head) -> bool:
        """Return whether a snapshot or a merge is due."""
        return self._snapshot_due(head) or self._mergeable(head) is not None

    async def step(self) -> bool:
        """Make the next snapshot or merge that is due. Return False if none is due, or if another instance made it."""
        head = await self._replica.head()
        if self._snapshot_due(head):
            return await self.snapshot()
        run = self._mergeable(head)
        return run is not None and await self._merge(run)

    # Snapshots

    def _snapshot_due(self, head: Head) -> bool:
        size = 0 if head.snap is None else head.snap.size
        return head.log_size > max(LEAST_LOG, self._ratio * size) and not any(
            one.key.startswith(f"{self._replica.prefix}snap/") for one in self._live_announcements(head)
        )

    def _live_announcements(self, head: Head) -> list[Pending]:
        """Return the announcements of work that is not abandoned."""
        size = 0 if head.snap is None else head.snap.size
        return [one for one in head.pend if head.logged - one.log_size <= max(self._ratio * size, ABANDONED)]

    async def snapshot(self, *, forget: bool = False) -> bool:
        """Upload the local copy as the new snapshot. Return False if a newer snapshot was installed first.

        With `forget`, no record that the snapshot covers stays in the log. Other copies must then read the snapshot,
        even if reading the log would be cheaper.
        """
        key = await self.announce(lambda head: snapshot_key(self._replica.prefix, head.ver + 1, head.seq))
        path = new_path(self._replica.directory)
        replaced: set[str] = set()
        try:
            seq = await self._replica.blocking(lambda copy: copy.copy_to(path))
            snapshot = Snapshot(key, seq, path.stat().st_size, await asyncio.to_thread(sha256_of, path))
            await self._objects.upload(key, path)
        finally:
            await asyncio.to_thread(_remove, path)

        def install(head: Head) -> Head | None:
            if not any(one.key == key for one in head.pend):
                return None  # the snapshot is installed already, or counts as abandoned
            pend = tuple(one for one in head.pend if one.key != key)
            if head.snap is not None and head.snap.seq > seq:
                return head.next(pend=pend)
            segs = tuple(segment for segment in head.segs if segment.last > seq)
            tail = tuple(record for record in head.tail if record.seq > seq) if forget and not segs else head.tail
            new = head.next(pend=pend, snap=snapshot, segs=segs, tail=tail)
            replaced.clear()
            replaced.update(head.keys - new.keys)
            return new

        await self._committer.edit(install)
        return await self.finish(key, replaced)

    # Merges

    def _mergeable(self, head: Head) -> tuple[Segment, ...] | None:
        """Return the first FANOUT neighbouring segments of about the same size; None if there are none."""
        if any(one.key.startswith(f"{self._replica.prefix}seg/") for one in self._live_announcements(head)):
            return None
        run: list[Segment] = []
        for segment in head.segs:
            if run and self._tier(segment) != self._tier(run[-1]):
                run = []
            run.append(segment)
            if len(run) == FANOUT:
                return tuple(run)
        return None

    def _tier(self, segment: Segment) -> int:
        return max(0, round(math.log(max(segment.size, 1) / self._tail_bytes, FANOUT)))

    async def _merge(self, run: Sequence[Segment]) -> bool:
        key = await self.announce(lambda head: segment_key(self._replica.prefix, head.ver + 1, run[0].first))
        got = await asyncio.gather(*(self._objects.get(segment.key) for segment in run))
        if any(one is None for one in got):
            return await self.finish(key, set())  # another instance merged them, or made a snapshot
        body = encode_segment([record for one in got if one is not None for record in decode_segment(one.body)])
        await self._objects.put(key, body)
        merged = Segment(key, run[0].first, run[-1].last, len(body))
        replaced: set[str] = set()

        def install(head: Head) -> Head | None:
            if not any(one.key == key for one in head.pend):
                return None
            pend = tuple(one for one in head.pend if one.key != key)
            start = next((index for index, segment in enumerate(head.segs) if segment == run[0]), None)
            if start is None or head.segs[start : start + len(run)] != tuple(run):
                return head.next(pend=pend)
            new = head.next(pend=pend, segs=(*head.segs[:start], merged, *head.segs[start + len(run) :]))
            replaced.clear()
            replaced.update(head.keys - new.keys)
            return new

        await self._committer.edit(install)
        return await self.finish(key, replaced)

    # Announcements

    async def announce(self, new_key: Callable[[Head], str]) -> str:
        """Announce a new key in `pend`, and remove abandoned announcements. Return the key."""
        drawn: list[str] = []

        def announce(head: Head) -> Head | None:
            if any(one.key in drawn for one in head.pend):
                return None
            drawn.append(new_key(head))
            return head.next(pend=(*self._live_announcements(head), Pending(drawn[-1], head.ver + 1, head.logged)))

        await self._committer.edit(announce)
        head = await self._replica.head()
        named = [one.key for one in head.pend if one.key in drawn]
        return named[0] if named else drawn[-1]

    async def finish(self, key: str, replaced: set[str]) -> bool:
        """Withdraw the announcement if it is still there, and delete objects that HEAD no longer refers to.

        Return whether HEAD refers to `key`.
        """

        def withdraw(head: Head) -> Head | None:
            pend = tuple(one for one in head.pend if one.key != key)
            return None if len(pend) == len(head.pend) else head.next(pend=pend)

        await self._committer.edit(withdraw)
        head = await self._replica.head()
        gone = sorted(({key} | replaced) - head.keys)
        if gone:
            await self._objects.delete(gone)
        return key in head.keys

    async def collect(self) -> int:
        """Delete the segments and snapshots that no HEAD can ever refer to, and leftovers of killed work.

        Return how many objects were deleted.
        """
        await self._replica.check()
        head = await self._replica.head()
        garbage, prefix = [], self._replica.prefix
        for folder in ("seg/", "snap/"):
            async for listed in self._objects.list(prefix + folder):
                version = version_in(listed.key.removeprefix(prefix))
                if version is not None and version <= head.ver and listed.key not in head.keys:
                    garbage.append(listed.key)
        # A race check takes seconds, so objects that are older than a day belong to a process that was killed.
        old = dt.datetime.now(dt.UTC) - dt.timedelta(seconds=LEFTOVER_S)
        raced = [listed async for listed in self._objects.list(f"{prefix}{RACE_FOLDER}")]
        garbage += [listed.key for listed in raced if listed.modified < old]
        markers = [listed async for listed in self._objects.list(f"{prefix}{PIN_FOLDER}") if listed.modified < old]
        garbage += [one.key for one in markers if one.key.removeprefix(f"{prefix}{PIN_FOLDER}") not in head.pins]
        for start in range(0, len(garbage), 1000):
            await self._objects.delete(garbage[start : start + 1000])
        return len(garbage)


def _remove(path: Path) -> None:
    path.unlink(missing_ok=True)
