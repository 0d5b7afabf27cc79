"""Removal of bodies that no record names. A crash or a failed commit leaves such bodies.

- M2 *A body that was swept cannot be committed.* A uid starts with the generation under which the body was put. A
  sweep first advances the generation to g. Then it removes bodies older than g - 1 that no record names. The MetaStore
  refuses to commit these uids in the same step that commits, and the body is put again under a new uid. No clock
  decides.
- M4 *A body that an import loads is not swept.* An import holds a pin from before it stores bodies until records name
  them, so the generation does not matter to it (L3). If the sweep finds no pin, each import that stored a listed body
  has ended. So a look for references after that sees its records.
- P1 (see `contract.snapshots`) *A pin keeps bodies.* If the sweep finds no pin, a pin that is added later protects a
  later moment, which does not need a body that no record named before.

Because of M4 and P1, the sweep removes a body only if no record named it at two looks, one before and one after it
found that there is no pin.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import partial

from uuid_utils import uuid7

from ..basic import MetaStore, ResourceStore
from ..contract.packs import BodyPacking, PackReferences, StoredPack
from ..contract.protocols import BodySweeping, MetaSweeping
from ..contract.snapshots import Pinning
from ..runtime.limited import limited

SWEEP_PAGE = 1000
"""How many bodies are looked up and removed at a time."""
PACKS_AT_ONCE = 100
"""How many packs are looked up at a time. Their records may name a thousand bodies each."""
EDITS_AT_ONCE = 8
"""How many packs are cleared at the same time."""


class Sweep:
    """The sweep of one model. Each call continues where the last one stopped.

    Does nothing if a store lacks the ability (MetaSweeping, BodySweeping).
    """

    def __init__(self, meta_store: MetaStore, resource_store: ResourceStore, pins: Pinning | None = None) -> None:
        self._references = meta_store if isinstance(meta_store, MetaSweeping) else None
        self._bodies = resource_store if isinstance(resource_store, BodySweeping) else None
        self._pins = pins
        self._resource_store = resource_store
        self._generation = 0
        self._after = ""  # the last uid that this sweep looked at; empty between two sweeps
        self._packs: _PackSweep | None = None
        if isinstance(meta_store, PackReferences) and isinstance(resource_store, BodyPacking):
            self._packs = _PackSweep(meta_store, resource_store, pins)

    def new_uid(self) -> str:
        """Return the uid of a new body, with the generation that this process last read."""
        return f"{self._generation}/{uuid7()}"

    async def load_generation(self) -> None:
        """Read the generation of the MetaStore, which the uids of new bodies get from now on."""
        if self._references is not None:
            self._generation = await self._references.generation()

    async def run(self, deadline: float) -> None:
        """Sweep until the deadline, in seconds of `time.monotonic`.

        If bodies are left, the next call continues with them. Otherwise it starts a new sweep.
        """
        if not self._after and self._references is not None:
            self._generation = await self._references.advance_generation()
        while time.monotonic() < deadline:
            self._after = await self._remove_page(self._generation - 1, self._after)
            if not self._after:
                break
        if not self._after and self._packs is not None:
            await self._packs.run(self._generation - 1, deadline)

    async def run_alone(self) -> None:
        """Remove all bodies that no record names. Only safe if no other process or task writes to the store."""
        after = await self._remove_page(1, "")
        while after:
            after = await self._remove_page(1, after)

    async def _remove_page(self, generation: int, after: str) -> str:
        """Remove the orphans among the next bodies before a generation. Return the last uid, or "" at the end.

        If a pin keeps them, ends the sweep, so that the next one begins with them.
        """
        if self._references is None or self._bodies is None:
            return ""
        uids = await self._bodies.older_than(generation, after, SWEEP_PAGE)
        if not uids:
            return ""
        orphans = await self._references.unreferenced(uids)
        if orphans:
            if self._pins is not None and await self._pins.has_pins():
                return ""
            if orphans := await self._references.unreferenced(orphans):  # at the second look
                await self._resource_store.delete(orphans)
        return uids[-1]


class _PackSweep:
    """The sweep of packs, which follows that of the other bodies. Each call continues where the last one stopped."""

    def __init__(self, references: PackReferences, bodies: BodyPacking, pins: Pinning | None) -> None:
        self._references, self._bodies, self._pins = references, bodies, pins
        self._after = ""  # the last pack that this sweep looked at; empty between two sweeps

    async def run(self, generation: int, deadline: float) -> None:
        """Remove the orphans in packs before a generation, until the deadline."""
        while time.monotonic() < deadline:
            packs = await self._bodies.packs_older_than(generation, self._after, SWEEP_PAGE)
            for start in range(0, len(packs), PACKS_AT_ONCE):
                some = packs[start : start + PACKS_AT_ONCE]
                if time.monotonic() >= deadline or not await self._clear(some):
                    return
                self._after = some[-1].name
            if len(packs) < SWEEP_PAGE:
                self._after = ""
                return

    async def _clear(self, packs: Sequence[StoredPack]) -> bool:
        """Remove the orphans in these packs. Return False if a pin keeps them."""
        before = await self._references.packs_with_orphans(packs)
        if before:
            if self._pins is not None and await self._pins.has_pins():
                return False
            after = await self._references.packs_with_orphans([pack for pack in packs if pack.name in before])
            named = {name: sorted({*before[name], *uids}) for name, uids in after.items()}  # at either look
            await limited(
                EDITS_AT_ONCE, (partial(self._bodies.retain_in_pack, name, uids) for name, uids in named.items())
            )
        return True
