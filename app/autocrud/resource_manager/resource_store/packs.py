"""Packs: objects on S3 that each hold many small bodies of an import.

    {prefix}packs/{pack}.pack     the bodies of one pack, one after the other; a pack is named like a body
    {pack}.{start}-{end}          the uid of the body that lies there, from `start` up to but not including `end`

A body of its own object costs a request at the import and at each export. The bodies of a pack share them.

- K1 *A body is at its place or removed.* A pack is written before any record names its bodies. After that, conditional
  PUTs replace bodies by zero bytes, and a DELETE removes an empty pack. No body in a pack begins with a zero byte, so a
  body that does was removed. Each conditional PUT has content that the pack never had, so one that arrives late fails.
  There is an exception: if the first PUT was repeated, the second copy may arrive late and bring everything back. K2
  handles this.
- K2 *The length of a pack tells how many bodies it has*, unless it was damaged. The bodies are padded to a multiple of
  PADDING bytes. One more byte follows for each body that is left. A sweep compares this number with the number of
  records that name the pack, and reads only packs with more bodies than records. So it finds bodies that a killed
  process did not remove, and bodies that a late first PUT brought back.
- K3 *Older programs refuse the store*, because at a purge they would remove nothing from a pack. So packs are made only
  if the MetaStore raises its format in the step that publishes them: see `PackReferences`.
"""

from __future__ import annotations

import asyncio
import random
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple
from weakref import WeakKeyDictionary, WeakValueDictionary

from typing_extensions import override

from ...errors import StoreUnavailable
from ..backends.s3.errors import RangesUnsupported
from ..backends.s3.object_store import ObjectStore, Stored
from ..contract.packs import StoredPack, UidAllotment

PACK_BYTES = 120 * 1024
"""The bodies of a pack have at most so many bytes. The whole pack is a small body for the clients of S3."""
BODY_BYTES = PACK_BYTES // 4
"""A larger body has an object of its own."""
PADDING = 1024
"""The bodies of a pack are padded to a multiple of so many bytes. A pack has fewer bodies than this (K2)."""
FOLDER, SUFFIX = "packs/", ".pack"
UID_PATTERN = r"(?:0|[1-9][0-9]*)/[0-9a-f]{8}-[0-9a-f]{4}-7[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}"
_UID = re.compile(rf"({UID_PATTERN})\.(0|[1-9][0-9]*)-([1-9][0-9]*)")
_NAME = re.compile(UID_PATTERN)
MAX_ATTEMPTS = 20
"""Largest number of attempts of one edit. An attempt fails if another process edits the pack meanwhile."""
PAUSE_S = 0.05
"""The pause before attempt n + 1 is random, at most this many seconds times min(n, 10)."""


class Place(NamedTuple):
    """The pack of a body, and its bytes there: from `start` up to but not including `end`."""

    pack: str
    start: int
    end: int


def place_of(uid: str) -> Place | None:
    """Return the place of a body in a pack; None if it has an object of its own."""
    if "." not in uid:
        return None
    found = _UID.fullmatch(uid)
    return None if found is None else Place(found[1], int(found[2]), int(found[3]))


def places_by_pack(uids: Iterable[str]) -> dict[str, list[Place]]:
    """Return the places of those of these bodies that are in packs, for each pack."""
    found: dict[str, list[Place]] = {}
    for uid in uids:
        if (place := place_of(uid)) is not None:
            found.setdefault(place.pack, []).append(place)
    return found


class PackAllotment(UidAllotment):
    """Gives small bodies places in packs, in the order in which it is asked."""

    def __init__(self, new_uid: Callable[[], str]) -> None:
        self._new_uid = new_uid
        self._pack, self._size, self._count = "", 0, 0

    @override
    def uid_for(self, body: bytes) -> str:
        size = len(body)
        if size > BODY_BYTES or body[:1] in (b"", b"\0"):  # a body that does not fit the model may begin so
            return self._new_uid()
        if not self._pack or self._size + size > PACK_BYTES or self._count == PADDING - 1:
            self._pack, self._size, self._count = self._new_uid(), 0, 0
        start, self._size, self._count = self._size, self._size + size, self._count + 1
        return f"{self._pack}.{start}-{self._size}"

    @override
    def end_batch(self) -> None:
        self._pack = ""


def content_of(bodies: Mapping[Place, bytes]) -> bytes:
    """Return the bytes of a new pack with these bodies, which lie one after the other."""
    content = bytearray()
    for place in sorted(bodies):
        if place.start != len(content) or place.end != place.start + len(bodies[place]):
            raise ValueError(f"{place} is not the place of a body that follows {len(content)} bytes")
        content += bodies[place]
    return bytes(content) + bytes(-len(content) % PADDING + len(bodies))


class _Removal:
    """One call of `Packs.remove`, which waits for its turn."""

    def __init__(self, places: Sequence[Place]) -> None:
        self.places = places
        self.error: StoreUnavailable | None = None  # of the edit that included it


class _Turns:
    """The calls of `Packs.remove` for one pack. One of them edits the pack for all that wait."""

    def __init__(self) -> None:
        self.lock = asyncio.Lock()
        self.waiting: list[_Removal] = []


class Packs:
    """The packs of one model in a bucket. All methods raise StoreUnavailable.

    prefix  begins their keys, and those of the bodies
    """

    def __init__(self, objects: ObjectStore, prefix: str) -> None:
        self._objects, self._folder = objects, prefix + FOLDER
        self._turns_of_loops: WeakKeyDictionary[asyncio.AbstractEventLoop, WeakValueDictionary[str, _Turns]] = (
            WeakKeyDictionary()
        )

    def _key(self, pack: str) -> str:
        return f"{self._folder}{pack}{SUFFIX}"

    async def put(self, pack: str, bodies: Mapping[Place, bytes]) -> None:
        """Store a new pack with all its bodies."""
        await self._objects.put(self._key(pack), content_of(bodies))

    async def put_and_try(self, pack: str, bodies: Mapping[Place, bytes]) -> bool:
        """Store a new pack. Return whether the server answers a GET of a range with that range.

        Raises StoreUnavailable if the pack is gone, because the pin of the import was dropped and a sweep removed it.
        """
        await self.put(pack, bodies)
        start, end = PADDING // 2, PADDING  # each pack has these bytes
        try:
            found = await self._objects.get_range(self._key(pack), start, end)
        except RangesUnsupported:
            return False
        if found is None and await self._objects.get(self._key(pack)) is None:
            raise StoreUnavailable(
                "a sweep removed bodies of this import, which was suspended for more than 10 minutes; start it again"
            )
        return found == content_of(bodies)[start:end]

    async def get(self, places: Sequence[Place]) -> list[bytes | None]:
        """Return bodies of one pack by one request; None for a body that was removed or is incomplete."""
        first, last = min(place.start for place in places), max(place.end for place in places)
        found = await self._objects.get_range(self._key(places[0].pack), first, last)
        if found is None:
            return [None] * len(places)
        bodies = [found[place.start - first : place.end - first] for place in places]
        return [
            None if body[:1] == b"\0" or len(body) < place.end - place.start else body
            for place, body in zip(places, bodies, strict=True)
        ]

    async def remove(self, places: Sequence[Place]) -> None:
        """Remove bodies of one pack. Calls that wait for the same pack share one edit."""
        pack, removal = places[0].pack, _Removal(places)
        of_loop = self._turns_of_loops.setdefault(asyncio.get_running_loop(), WeakValueDictionary())
        turns = of_loop.setdefault(pack, _Turns())
        turns.waiting.append(removal)
        try:
            async with turns.lock:
                if removal in turns.waiting:
                    await self._remove_waiting(pack, turns)
        finally:
            if removal in turns.waiting:  # this call was cancelled, or its edit raised another error
                turns.waiting.remove(removal)
        if removal.error is not None:
            raise removal.error

    async def _remove_waiting(self, pack: str, turns: _Turns) -> None:
        removals = list(turns.waiting)
        places = [place for removal in removals for place in removal.places]

        def without(content: bytearray, count: int) -> int:
            for place in places:
                body = bytes(content[place.start : place.end])
                count -= body[:1] not in (b"", b"\0")
                content[place.start : place.end] = bytes(len(body))
            return count

        try:
            await self._edit(pack, without)
        except StoreUnavailable as error:
            for removal in removals:
                removal.error = error
        turns.waiting = [removal for removal in turns.waiting if removal not in removals]

    async def retain(self, pack: str, places: Sequence[Place]) -> None:
        """Remove all other bodies of a pack."""
        if not places:
            await self._objects.delete([self._key(pack)])
            return

        def only(content: bytearray, _: int) -> int:
            kept = [(place, bytes(content[place.start : place.end])) for place in places]
            content[:] = bytes(len(content))
            for place, body in kept:
                content[place.start : place.start + len(body)] = body
            return sum(body[:1] not in (b"", b"\0") for _, body in kept)

        await self._edit(pack, only)

    async def _edit(self, pack: str, edit: Callable[[bytearray, int], int]) -> None:
        """Change the bodies of a pack, and delete it with its last one.

        A pack that was damaged, for example cut short, keeps its length and all bytes that are not to be removed.

        edit  changes the bodies in place, is given how many there are, and returns how many are left
        """
        key = self._key(pack)
        for attempt in range(MAX_ATTEMPTS):
            found = await self._objects.get(key)
            if found is None:
                return
            count = len(found.body) % PADDING
            damaged = any(found.body[len(found.body) - count :])
            content = bytearray(found.body if damaged else found.body[: len(found.body) - count])
            left = max(edit(content, count), 0)
            if not left and not any(content):
                # Without a condition, because no other process can add a body meanwhile (K1).
                await self._objects.delete([key])
                return
            edited = bytes(content) + bytes(0 if damaged else left)
            if edited == found.body:
                return
            if isinstance(await self._objects.put_if(key, edited, found.etag), Stored):
                return
            # Another process was faster, or the outcome is unknown: look again (K1).
            await asyncio.sleep(random.uniform(0, PAUSE_S * min(attempt + 1, 10)))
        raise StoreUnavailable(
            f"other processes edited a pack at the same time, or the outcome was unknown, {MAX_ATTEMPTS} times"
        )

    async def older_than(self, generation: int, after: str = "", limit: int = 1000) -> list[StoredPack]:
        """Return packs of generations below `generation`, ascending, that follow the pack `after`."""
        found: list[StoredPack] = []
        async for listed in self._objects.list(self._folder, self._key(after) if after else ""):
            pack = listed.key.removeprefix(self._folder).removesuffix(SUFFIX)
            if self._key(pack) == listed.key and _NAME.fullmatch(pack) and int(pack.partition("/")[0]) < generation:
                found.append(StoredPack(pack, listed.size % PADDING))
                if len(found) == limit:
                    break
        return found
