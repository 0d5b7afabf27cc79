"""The contract of imports into models that have data: a journal in the store.

- J1 *The journal is written first.* Before a commit replaces resources, the journal keeps their metadata and records.
  Before it creates resources, the journal names them. So after a crash at any moment, the journal names all that the
  import may have changed. The states of the resources show what it did change: see `backup.import_states`.
- J2 *The journal keeps bodies and blobs.* While a model has a journal, nothing is removed but by a purge, as if there
  was a pin (P1). So an import that is taken back finds the bodies and blobs of what it has replaced.
- J3 *A purge removes what the journal keeps of a resource*, before the purge is acknowledged, and the
  bodies too.
- J4 *One import at a time.* The state of an import is stored only if there is none, in one atomic step.
"""

from __future__ import annotations

import hashlib
from abc import abstractmethod
from collections.abc import AsyncIterator, Sequence
from contextlib import AbstractAsyncContextManager
from typing import Literal, Protocol, runtime_checkable
from uuid import uuid4

import msgspec
from msgspec import Struct

from ..basic import Change, ResourceMeta, RevisionInfo
from .blobs import Upload

OnConflict = Literal["fail", "skip", "replace"]
"""What an import does with a resource whose id the model has already."""

STATE = "state"
_CREATED = "created/"
_REPLACED = "replaced/"
PAGE = 1000


@runtime_checkable
class ImportKeeping(Protocol):
    """A MetaStore, or a ResourceStore whose records are the commit, that keeps the entries of a journal.

    A purge removes the entries whose names begin with `entries_of(resource_id)`, in the same commit or before it.
    """

    @abstractmethod
    async def import_entry(self, name: str) -> bytes | None:
        """Return an entry, or None. Sees every acknowledged entry."""

    @abstractmethod
    async def put_import_entry(self, name: str, value: bytes, *, replaces: bytes | None) -> bool:
        """Store an entry if the present one equals `replaces`; None: if there is none. Returns False if it differs.

        Only for the entry STATE the comparison and the change must be one atomic step. Other names are used once.
        """

    @abstractmethod
    async def import_entries(self, prefix: str, after: str, limit: int) -> list[str]:
        """Return up to `limit` names of entries that begin with `prefix` and follow `after`, ascending."""

    @abstractmethod
    async def remove_import_entries(self, names: Sequence[str]) -> None:
        """Remove entries. A name without an entry is no error."""


async def forget_purged(store: ImportKeeping, changes: Sequence[Change]) -> None:
    """Remove what a journal keeps of the resources that these changes purge. Called before the commit (J3).

    If the purge is refused, the resource was changed since the import, so the import would not take it back.
    """
    purged = [change.meta.resource_id for change in changes if change.purge]
    if purged and await store.import_entry(STATE) is not None:
        for resource_id in purged:
            while names := await store.import_entries(entries_of(resource_id), "", PAGE):
                await store.remove_import_entries(names)


def entries_of(resource_id: str) -> str:
    """Return how the names of the entries begin that keep what an import has replaced of a resource."""
    return f"{_REPLACED}{hashlib.sha256(resource_id.encode()).hexdigest()}/"


class ImportState(Struct, frozen=True, kw_only=True):
    """The state of an import into one model.

    id           a random name of the import, 32 hex digits
    sha256       the SHA-256 of the archive, in hex
    on_conflict  what it does with resources that exist
    empty        whether the model had no resources when the import began
    after        all resources up to this id are imported; empty at first
    finished     whether this model is imported, so that only other models are left
    """

    id: str
    sha256: str
    on_conflict: OnConflict
    empty: bool
    after: str = ""
    finished: bool = False


class ReplacedPart(Struct, frozen=True, kw_only=True):
    """A part of what an import has replaced: the metadata of a resource, and some of its records.

    number  of the part, from 0; large resources have several
    """

    meta: ResourceMeta
    number: int
    records: tuple[RevisionInfo, ...]


_encode = msgspec.msgpack.Encoder().encode
_state = msgspec.msgpack.Decoder(ImportState).decode
_part = msgspec.msgpack.Decoder(ReplacedPart).decode


class ImportJournal:
    """The journal of a model, in the entries of a store."""

    def __init__(self, store: ImportKeeping) -> None:
        self._store = store

    async def state(self) -> ImportState | None:
        """Return the state of the import that is not finished, or None."""
        found = await self._store.import_entry(STATE)
        return None if found is None else _state(found)

    async def begin(self, state: ImportState) -> ImportState | None:
        """Store a state unless there is one (J4), and return the one that is stored.

        Returns None if another import was ended at this moment, and this one was not begun.
        """
        if await self._store.put_import_entry(STATE, _encode(state), replaces=None):
            return state
        return await self.state()

    async def note(self, before: ImportState, state: ImportState) -> bool:
        """Replace the state. Returns False if it is another one now."""
        return await self._store.put_import_entry(STATE, _encode(state), replaces=_encode(before))

    async def keep_created(self, digests: bytes) -> None:
        """Add to the list of resources that the import creates. The digests are opaque."""
        await self._store.put_import_entry(f"{_CREATED}{uuid4().hex}", digests, replaces=None)

    async def created(self) -> AsyncIterator[bytes]:
        """Yield all that `keep_created` has added, in any order."""
        async for name in self._names(_CREATED):
            if (digests := await self._store.import_entry(name)) is not None:
                yield digests

    async def keep_replaced(self, parts: Sequence[ReplacedPart]) -> None:
        """Keep what the import is about to replace. What is kept of the same resource from before stays (J1)."""
        for part in parts:
            name = f"{entries_of(part.meta.resource_id)}{part.number:09d}"
            await self._store.put_import_entry(name, _encode(part), replaces=None)

    async def replaced(self, resource_id: str) -> list[ReplacedPart]:
        """Return what is kept of a resource, by ascending number; empty if nothing is."""
        names = [name async for name in self._names(entries_of(resource_id))]
        found = [await self._store.import_entry(name) for name in names]
        return [_part(one) for one in found if one is not None]

    async def kept_records(self, resource_id: str) -> list[RevisionInfo]:
        """Return the records that the journal keeps of a resource, whose bodies and blobs stay."""
        if await self.state() is None:
            return []
        return [record for part in await self.replaced(resource_id) for record in part.records]

    async def end(self, import_id: str) -> None:
        """Remove the journal of this import. Does nothing if it is not there.

        The state is removed last, so that an interrupted end can be repeated.
        """
        state = await self.state()
        if state is None or state.id != import_id:
            return
        while names := await self._store.import_entries("", "", PAGE):
            rest = [name for name in names if name != STATE]
            await self._store.remove_import_entries(rest or names)

    async def _names(self, prefix: str) -> AsyncIterator[str]:
        after = ""
        while names := await self._store.import_entries(prefix, after, PAGE):
            for name in names:
                yield name
            after = names[-1]


@runtime_checkable
class ImportStorage(Protocol):
    """An IStorage that is prepared for imports. Other storages are filled by commits, without a pin and a journal."""

    @property
    @abstractmethod
    def import_journal(self) -> ImportJournal | None:
        """Return the journal, or None if the store that decides about commits keeps none."""

    @abstractmethod
    def pinned(self) -> AbstractAsyncContextManager[str | None]:
        """Hold a pin until the context ends, and give its name; None if the store keeps no pins.

        Raises PinLost at the end if the pin was dropped.
        """

    @abstractmethod
    async def put_bodies(self, bodies: Sequence[tuple[RevisionInfo, bytes]]) -> None:
        """Store bodies that no record names yet."""

    @abstractmethod
    async def discard_bodies(self, uids: Sequence[str]) -> None:
        """Remove bodies that `put_bodies` has stored, and that no record will ever name."""


@runtime_checkable
class BlobRestoring(Protocol):
    """Blobs of a model that can be uploaded for another owner: an ability of `Blobs`."""

    @abstractmethod
    def restore(self, owner: str, *, max_size: int, row: bool = True) -> AbstractAsyncContextManager[Upload]:
        """Return an upload whose row has this owner, the SHA-256 of the name of a caller.

        With `row=False`, only the content is stored. The caller adds the row.
        """

    @abstractmethod
    async def discard(self, keys: Sequence[str]) -> None:
        """Remove content that was stored with `row=False`, and whose row will never be added."""
