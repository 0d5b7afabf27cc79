"""Pins of a store on S3: HEAD names them, and an object for each one shows when it was renewed last.

    pin/{pin}    the marker of a pin; each renewal writes it again

- HEAD decides whether a pin exists, so every commit that was made before a pin was added comes before the pin, and P1
  needs no request: the HEAD that a commit made, or that a lookup of references saw, names the pins of that moment.
- A pin is dropped when its marker is PIN_LIFE_S older than a marker that was just written. Both dates are those of S3.
- A marker is written before HEAD names its pin. So a pin of HEAD without a marker is not renewed any more.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Awaitable, Callable
from uuid import uuid4

from ...contract import snapshots
from .committer import HeadEdit
from .head import PIN_FOLDER, Head
from .replica import Replica

log = logging.getLogger("crudstack.s3sqlite")

LOOKS_PER_LIFE = 10
"""While there are pins, `exist` looks so often in PIN_LIFE_S for those that are not renewed."""


class HeadPins:
    """The pins of one store.

    replica  the local copy of the store
    edit     swaps HEAD: `S3Committer.edit` of the running event loop
    """

    def __init__(self, replica: Replica, edit: Callable[[HeadEdit], Awaitable[Head | None]]) -> None:
        self._replica, self._edit = replica, edit
        self._looked_at = float("-inf")

    def _marker(self, pin: str) -> str:
        return f"{self._replica.prefix}{PIN_FOLDER}{pin}"

    async def add(self, pin: str) -> None:
        """Add a pin. Raises StoreUnavailable; then the pin may exist, and lapses."""
        await self._replica.open()
        await self._replica.objects.put(self._marker(pin), b"")
        await self._edit(lambda head: None if pin in head.pins else head.next(pins=(*head.pins, pin)))

    async def renew(self, pin: str) -> bool:
        """Renew a pin. Returns False if it was dropped."""
        if not await self._has(pin):
            return False
        await self._replica.objects.put(self._marker(pin), b"")
        return True

    async def remove(self, pin: str) -> bool:
        """Remove a pin. Returns False if it was dropped before.

        The pin was needed until now, and HEAD names it now, so a later failure does not matter.
        """
        if not await self._has(pin):
            return False
        await self._edit(lambda head: _without(head, {pin}))
        await self._replica.objects.delete([self._marker(pin)])
        return True

    async def exist(self) -> bool:
        """Return whether the HEAD that the last commit or lookup of this process saw, or a newer one, names a pin."""
        await self._replica.open()
        if self._replica.unapplied_version:
            await self._replica.coalesced_check()
        if not (await self._replica.head()).pins:
            return False
        if time.monotonic() - self._looked_at >= snapshots.PIN_LIFE_S / LOOKS_PER_LIFE:
            await self._drop_lapsed()
            self._looked_at = time.monotonic()
        return bool((await self._replica.head()).pins)

    async def _has(self, pin: str) -> bool:
        await self._replica.open()
        await self._drop_lapsed()
        return pin in (await self._replica.head()).pins

    async def _drop_lapsed(self) -> None:
        """Drop the pins that are not renewed, and delete markers that belong to no pin."""
        await self._replica.coalesced_check()
        head = await self._replica.head()  # before the listing, which then has the markers of all its pins
        fresh = uuid4().hex
        await self._replica.objects.put(self._marker(fresh), b"")
        folder = self._marker("")
        renewed = {
            listed.key.removeprefix(folder): listed.modified async for listed in self._replica.objects.list(folder)
        }
        now = renewed.pop(fresh, None)
        if now is None:
            return  # the listing is older than the marker, so it proves nothing
        old = {pin for pin, at in renewed.items() if (now - at).total_seconds() >= snapshots.PIN_LIFE_S}
        lapsed = {pin for pin in head.pins if pin in old or pin not in renewed}
        if lapsed:
            log.warning("%s: %d pins were not renewed and are dropped", self._replica.head_key, len(lapsed))
            head = await self._edit(lambda head: _without(head, lapsed)) or await self._replica.head()
        left = [self._marker(pin) for pin in old if pin not in head.pins]
        await self._replica.objects.delete([*left, self._marker(fresh)])


def _without(head: Head, pins: set[str]) -> Head | None:
    kept = tuple(pin for pin in head.pins if pin not in pins)
    return None if kept == head.pins else head.next(pins=kept)
