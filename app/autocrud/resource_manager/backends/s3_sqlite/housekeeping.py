"""Snapshots, merges and collection: what keeps the log short and the bucket clean.

Any instance may do any of it, and be frozen or killed at any step: work that takes long is announced in HEAD's `pend` first, and its result is
swapped in only if the announcement is still there. What is not referred to any more is removed by name, never by age (I2).
"""

from __future__ import annotations

import asyncio
import datetime as dt
import logging
import math
from collections.abc import Callable, Sequence
from pathlib import Path

from .committer import S3Committer
from .head import (
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
from .local_copy import LEFTOVER_S, new_path
from .race_check import RACE_FOLDER
from .replica import Replica, sha256_of

log = logging.getLogger("crudstack.s3sqlite")

FANOUT = 8
"""Segments that are merged into one."""
LEAST_LOG = 1024 * 1024
"""Bytes of log below which no snapshot is made."""
ABANDONED = 8 * 1024 * 1024
"""Bytes that may be logged while something is being made; then it counts as abandoned."""


class Housekeeping:
    def __init__(self, replica: Replica, committer: S3Committer, *, snapshot_ratio: float, tail_bytes: int) -> None:
        self._replica, self._objects, self._committer = replica, replica.objects, committer
        self._ratio, self._tail_bytes = snapshot_ratio, tail_bytes

    def due(self, head: Head) -> bool:
        """Whether there is anything to merge or to take a snapshot of."""
        return self._snapshot_due(head) or self._mergeable(head) is not None

    async def step(self) -> bool:
        """Do the next thing that is due; False if there is none."""
        head = await self._replica.head()
        if self._snapshot_due(head):
            return await self.snapshot()
        run = self._mergeable(head)
        return run is not None and await self._merge(run)

    # Snapshots

    def _snapshot_due(self, head: Head) -> bool:
        size = 0 if head.snap is None else head.snap.size
        return head.log_size > max(LEAST_LOG, self._ratio * size) and not any(
            one.key.startswith(f"{self._replica.prefix}snap/") for one in self._live(head)
        )

    def _live(self, head: Head) -> list[Pending]:
        """What is being made and not abandoned."""
        size = 0 if head.snap is None else head.snap.size
        return [one for one in head.pend if head.logged - one.log_size <= max(self._ratio * size, ABANDONED)]

    async def snapshot(self, *, forget: bool = False) -> bool:
        """Upload the copy as the new snapshot; False if somebody else's came first. `forget`: nothing of the log stays, even where others
        would rather read it than the snapshot."""
        key = await self._announce(lambda head: snapshot_key(self._replica.prefix, head.ver + 1, head.seq))
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
                return None  # installed already, or abandoned meanwhile
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
        return await self._drop(key, replaced)

    # Merges

    def _mergeable(self, head: Head) -> tuple[Segment, ...] | None:
        """The first run of segments of about the same size that is long enough."""
        if any(one.key.startswith(f"{self._replica.prefix}seg/") for one in self._live(head)):
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
        key = await self._announce(lambda head: segment_key(self._replica.prefix, head.ver + 1, run[0].first))
        got = await asyncio.gather(*(self._objects.get(segment.key) for segment in run))
        if any(one is None for one in got):
            return await self._drop(key, set())  # somebody has merged them, or made a snapshot
        body = encode_segment([record for one in got if one is not None for record in decode_segment(one.body)])
        await self._objects.put(key, body)
        merged = Segment(key, run[0].first, run[-1].last, len(body))
        replaced: set[str] = set()

        def install(head: Head) -> Head | None:
            if not any(one.key == key for one in head.pend):
                return None
            pend = tuple(one for one in head.pend if one.key != key)
            at = next((at for at, segment in enumerate(head.segs) if segment == run[0]), None)
            if at is None or head.segs[at : at + len(run)] != tuple(run):
                return head.next(pend=pend)
            new = head.next(pend=pend, segs=(*head.segs[:at], merged, *head.segs[at + len(run) :]))
            replaced.clear()
            replaced.update(head.keys - new.keys)
            return new

        await self._committer.edit(install)
        return await self._drop(key, replaced)

    # Both

    async def _announce(self, name: Callable[[Head], str]) -> str:
        """Put a new key into `pend`, and clear it of what was abandoned."""
        drawn: list[str] = []

        def announce(head: Head) -> Head | None:
            if any(one.key in drawn for one in head.pend):
                return None
            drawn.append(name(head))
            return head.next(pend=(*self._live(head), Pending(drawn[-1], head.ver + 1, head.logged)))

        await self._committer.edit(announce)
        head = await self._replica.head()
        named = [one.key for one in head.pend if one.key in drawn]
        return named[0] if named else drawn[-1]

    async def _drop(self, key: str, replaced: set[str]) -> bool:
        """Take back the announcement if it is still there, and remove what HEAD no longer names. Whether `key` is in HEAD."""

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
        """Remove every segment and snapshot that no HEAD can refer to any more, and what killed races left; return how many there were."""
        await self._replica.check()
        head = await self._replica.head()
        garbage, prefix = [], self._replica.prefix
        for folder in ("seg/", "snap/"):
            async for listed in self._objects.list(prefix + folder):
                version = version_in(listed.key.removeprefix(prefix))
                if version is not None and version <= head.ver and listed.key not in head.keys:
                    garbage.append(listed.key)
        # A race lasts seconds. Objects of one that was killed are not waited for after a day.
        old = dt.datetime.now(dt.UTC) - dt.timedelta(seconds=LEFTOVER_S)
        raced = [listed async for listed in self._objects.list(f"{prefix}{RACE_FOLDER}")]
        garbage += [listed.key for listed in raced if listed.modified < old]
        for at in range(0, len(garbage), 1000):
            await self._objects.delete(garbage[at : at + 1000])
        return len(garbage)


def _remove(path: Path) -> None:
    path.unlink(missing_ok=True)
