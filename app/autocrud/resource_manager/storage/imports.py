"""The part of SimpleStorage for imports: a pin, bodies before their commit, and the journal.

The journal is in the store that decides about commits: the MetaStore, or the ResourceStore whose records are the
commit (M3). J2 *The journal keeps bodies and blobs*: every removal of bodies and blobs asks JournalledPins.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

from typing_extensions import override

from ...errors import CrudError
from ..basic import IndexEntry, MetaStore, ResourceStore, RevisionInfo, Write
from ..contract.import_journal import ImportJournal, ImportKeeping, ImportStorage, is_importing
from ..contract.packs import BodyPacking, PackReferences, SingleUids, UidAllotment
from ..contract.protocols import RecordKeeping
from ..contract.snapshots import Pinning
from ..contract.storable import MetadataLimits
from .held_pin import HeldPin
from .sweeping import Sweep

log = logging.getLogger("crudstack.storage")


class JournalledPins(Pinning):
    """The pins of a MetaStore. While there is the journal of an import, it counts as a pin.

    pinning  None if the MetaStore keeps no pins
    keeping  None if no store keeps a journal
    """

    def __init__(self, pinning: Pinning | None, keeping: ImportKeeping | None) -> None:
        self._pinning, self._keeping = pinning, keeping

    @override
    async def add_pin(self, pin: str) -> None:
        if self._pinning is not None:
            await self._pinning.add_pin(pin)

    @override
    async def renew_pin(self, pin: str) -> bool:
        return self._pinning is None or await self._pinning.renew_pin(pin)

    @override
    async def remove_pin(self, pin: str) -> bool:
        return self._pinning is None or await self._pinning.remove_pin(pin)

    @override
    async def has_pins(self) -> bool:
        if self._pinning is not None and await self._pinning.has_pins():
            return True
        return self._keeping is not None and await is_importing(self._keeping)


class StorageImports(ImportStorage, MetadataLimits):
    """The methods of a storage for imports. SimpleStorage sets the attributes."""

    meta_store: MetaStore
    resource_store: ResourceStore
    _records: RecordKeeping | None
    _sweep: Sweep
    _logged_import = ""

    def _compose_imports(self) -> None:
        decides = self.meta_store if self._records is None else self.resource_store
        keeping = decides if isinstance(decides, ImportKeeping) else None
        pinning = self.meta_store if isinstance(self.meta_store, Pinning) else None
        self._journal = None if keeping is None else ImportJournal(keeping)
        self._pins = JournalledPins(pinning, keeping)
        self._pinning = pinning

    @property
    @override
    def import_journal(self) -> ImportJournal | None:
        return self._journal

    @override
    @asynccontextmanager
    async def pinned(self) -> AsyncIterator[str | None]:
        async with HeldPin(self._pinning) as pin:
            yield None if self._pinning is None else pin.name

    @override
    async def drop_pin(self, pin: str) -> None:
        if self._pinning is not None:
            await self._pinning.remove_pin(pin)

    @override
    def allotment(self) -> UidAllotment:
        if isinstance(self.resource_store, BodyPacking) and isinstance(self.meta_store, PackReferences):
            return self.resource_store.uid_allotment(self._sweep.new_uid)
        return SingleUids(self._sweep.new_uid)

    @override
    async def put_bodies(self, bodies: Sequence[tuple[RevisionInfo, bytes]]) -> None:
        await self.resource_store.put_many(bodies)

    @override
    async def discard_bodies(self, uids: Sequence[str]) -> None:
        await self.resource_store.delete(uids)

    @override
    def unstorable(self, resource_id: str, *, names: Sequence[str] = (), entry: IndexEntry | None = None) -> str:
        if isinstance(self.meta_store, MetadataLimits):
            return self.meta_store.unstorable(resource_id, names=names, entry=entry)
        return ""

    async def _kept_of_purged(self, writes: Sequence[Write]) -> list[RevisionInfo]:
        """Return the records that the journal keeps of the resources that these writes purge (J3)."""
        if self._journal is None:
            return []
        purged = [change.meta.resource_id for change, _ in writes if change.purge]
        return [record for resource_id in purged for record in await self._journal.kept_records(resource_id)]

    async def _unfinished_import(self, model: str) -> list[str]:
        """Return a sentence about an import that is not finished, which also keeps everything (J2). Logs it once.

        It may be running: its process may be another one, and no time tells whether that was killed.
        """
        try:
            state = None if self._journal is None else await self._journal.state()
        except CrudError:  # the health check reports it
            return []
        if state is None:
            return []
        how = "to take it back" if state.aborting else "to resume it or to take it back"
        sentence = (
            "an import is not finished: until it is, data that are not needed any more are kept; if it does not run any"
            f" more, import the archive with the SHA-256 {state.sha256} again, {how}"
        )
        if state.id != self._logged_import:
            self._logged_import = state.id
            log.warning("%s: %s", model, sentence)
        return [sentence]
