"""A pin that is held while work goes on: by exports, which read bodies and blobs, and by imports, which write them."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from types import TracebackType
from typing import Self
from uuid import uuid4

from ...errors import CrudError, PinLost
from ..contract import snapshots
from ..contract.snapshots import Pinning
from ..contract.store_errors import pin_lost

log = logging.getLogger("crudstack.storage")

RETRIES = 6
"""How often a renewal that failed is tried again in RENEW_PIN_S."""


class HeldPin:
    """A pin, from the beginning of the context to its end. A task renews it, so the work need not.

    At the end, raises PinLost if the pin was dropped, because then the work may lack what the pin protected. If the
    work fails, its own error is raised.

    pinning  the MetaStore; None if it keeps no pins. Then there is nothing to renew
    """

    def __init__(self, pinning: Pinning | None) -> None:
        self._pinning, self._pin = pinning, uuid4().hex
        self._lost = False
        self._renewing: asyncio.Task[None] | None = None

    @property
    def name(self) -> str:
        """The name of the pin in the MetaStore."""
        return self._pin

    async def __aenter__(self) -> Self:
        if self._pinning is not None:
            try:
                await self._pinning.add_pin(self._pin)
            except asyncio.CancelledError:
                await self._remove_after_failure(self._pinning)  # it may have been added
                raise
            self._renewing = asyncio.create_task(self._renew_forever(self._pinning))
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._pinning is None or self._renewing is None:
            return
        self._renewing.cancel()
        await asyncio.wait([self._renewing])
        if error is None:
            self._lost = not await self._pinning.remove_pin(self._pin) or self._lost
            self.check()
            return
        await self._remove_after_failure(self._pinning)

    async def _remove_after_failure(self, pinning: Pinning) -> None:
        try:
            await pinning.remove_pin(self._pin)
        except CrudError as failed:
            log.warning("a pin stays until it is dropped, %g s after now: %s", snapshots.PIN_LIFE_S, failed)

    def check(self) -> None:
        """Raise PinLost if the pin is known to be dropped."""
        if self._lost:
            raise pin_lost()

    async def renew(self) -> None:
        """Renew the pin now. Raises PinLost if it was dropped."""
        self.check()
        if self._pinning is not None and not await self._pinning.renew_pin(self._pin):
            self._lost = True
            raise pin_lost()

    async def _renew_forever(self, pinning: Pinning) -> None:
        pause = snapshots.RENEW_PIN_S
        while not self._lost:
            await asyncio.sleep(pause)
            pause = snapshots.RENEW_PIN_S
            try:
                with contextlib.suppress(PinLost):
                    await self.renew()
            except CrudError as error:
                log.warning("a pin could not be renewed, it is tried again: %s", error)
                pause /= RETRIES
