"""Removal of bodies whose records a commit has removed.

P1 (see `contract.snapshots`) *A pin keeps bodies.* The pins are asked for after the commit. A pin that is added later
protects a later moment, at which no record names these bodies.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

from ...errors import CrudError
from ..basic import ResourceStore, Write
from ..contract.protocols import BodySweeping
from ..contract.snapshots import Pinning

log = logging.getLogger("crudstack.storage")

MAX_KEPT = 100_000
"""Largest number of bodies that are remembered because a pin keeps them, if a sweep removes the others."""


class DroppedBodies:
    """Removes bodies that no record names any more.

    Raises nothing. If a removal fails, it is logged, and the sweep removes these bodies later. Bodies that a pin keeps
    are remembered and removed by `remove_kept`, because some stores have no sweep, or sweep only when they are opened.

    pinning  the MetaStore, if it keeps pins
    """

    def __init__(self, resource_store: ResourceStore, pinning: Pinning | None) -> None:
        self._resource_store, self._pinning = resource_store, pinning
        self._most = MAX_KEPT if isinstance(resource_store, BodySweeping) else None
        self._kept: dict[str, None] = {}

    async def remove_of(self, writes: Sequence[Write]) -> None:
        """Remove the bodies whose records these writes have removed.

        A pin does not keep those of resources that are purged.
        """
        purged = {change.meta.resource_id for change, _ in writes if change.purge}
        dropped = [(change.meta.resource_id, uid) for change, _ in writes for uid in change.drop]
        await self.remove([uid for resource_id, uid in dropped if resource_id in purged])
        if others := [uid for resource_id, uid in dropped if resource_id not in purged]:
            if await self._are_pinned():
                self._keep(others)
            else:
                await self.remove(others)

    async def remove(self, uids: Sequence[str]) -> None:
        """Remove bodies that no moment which a pin protects needs."""
        if uids:
            try:
                await self._resource_store.delete(uids)
            except CrudError as error:
                log.warning("%d bodies stay until the next sweep: %s", len(uids), error)

    async def remove_kept(self) -> None:
        """Remove the bodies that pins have kept, unless there still is a pin."""
        if self._kept and not await self._are_pinned():
            uids, self._kept = list(self._kept), {}
            await self.remove(uids)

    async def _are_pinned(self) -> bool:
        try:
            return self._pinning is not None and await self._pinning.has_pins()
        except CrudError as error:
            log.warning("bodies stay, because pins cannot be looked for: %s", error)
            return True

    def _keep(self, uids: Sequence[str]) -> None:
        self._kept.update(dict.fromkeys(uids if self._most is None else uids[: self._most - len(self._kept)]))
