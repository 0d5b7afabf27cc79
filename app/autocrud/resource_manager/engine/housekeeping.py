"""Housekeeping of one model: removes expired revisions, the remnants of purged resources, and what the stores leave."""

from __future__ import annotations

import contextlib
import datetime as dt
import logging
import time
from collections.abc import Awaitable, Callable, Sequence

from ...errors import OutcomeUnknown, ResourceNotFound, StoreUnavailable
from ..basic import IStorage
from .operations import Expire, Operation, Retention

log = logging.getLogger("crudstack.manager")


class Housekeeping:
    """Maintains the storage of one model.

    name       name of the model, for the log
    retention  rule that says which superseded revisions are removed; None: all are kept
    clock      returns the present time
    write      commits operations on behalf of a caller
    """

    def __init__(
        self,
        name: str,
        storage: IStorage,
        *,
        retention: Retention | None,
        clock: Callable[[], dt.datetime],
        write: Callable[[Sequence[Operation], str], Awaitable[object]],
    ) -> None:
        self._name, self._storage, self._retention = name, storage, retention
        self._clock, self._write = clock, write
        self._expire_after = ""
        self._remnants_left = False

    async def purge_remnants(self) -> dt.datetime:
        """Remove the remnants of purged resources, and return the time by which the last one will be gone.

        The purge itself is committed already. Raises OutcomeUnknown if the store cannot remove the remnants now.
        """
        try:
            return await self._storage.purge_remnants(self._clock())
        except StoreUnavailable as error:
            self._remnants_left = True
            log.warning("%s: traces of what was purged stay until the next housekeeping: %s", self._name, error)
            raise OutcomeUnknown(
                "it is purged, but its last traces could not be erased yet; housekeeping tries again"
            ) from error

    async def run(self, budget_s: float) -> None:
        """Remove expired revisions, orphaned bodies and remnants, for about `budget_s` seconds."""
        deadline = time.monotonic() + budget_s
        if self._remnants_left:
            await self._storage.purge_remnants(self._clock())
            self._remnants_left = False
        if self._retention is not None and self._retention.days is not None:
            await self._expire(deadline)
        await self._storage.maintain(max(0.0, deadline - time.monotonic()))

    async def _expire(self, deadline: float) -> None:
        async for meta in self._storage.scan():
            if meta.resource_id <= self._expire_after or meta.total_revision_count == 1:
                continue
            if time.monotonic() > deadline:
                return
            with contextlib.suppress(ResourceNotFound):  # it was purged since the scan
                await self._write([Expire(resource_id=meta.resource_id)], "retention")
            self._expire_after = meta.resource_id
        self._expire_after = ""
