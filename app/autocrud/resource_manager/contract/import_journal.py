"""The contract of imports into models that have data: a journal in the store.

- J1 *The journal is written first.* Before a commit replaces resources, the journal keeps their metadata and records.
  Before it creates resources, the journal names them. So after a crash at any moment, the journal names all that the
  import may have changed. The states of the resources show what it did change: see `backup.import_states`.
- J2 *The journal keeps bodies and blobs.* While a model has a journal, nothing is removed but by a purge, as if there
  was a pin (P1). So an import that is taken back finds the bodies and blobs of what it has replaced.
- J3 *A purge removes what the journal keeps of a resource*, before the purge is acknowledged, and the
  bodies too.
- J4 *One import at a time.* The state of an import is stored only if there is none, in one atomic step.
- J5 *One attempt owns the import.* Each attempt (the first one, a resume, an abort) has a random name in the state, and
  takes the import over by a compare-and-swap of the state. Any change of the state fails for all other attempts. An
  attempt may be taken over at any moment, since no time tells whether its process was killed. Then its writes have no
  effect:
  - While it fills an empty model in one step, the state names its pin. The new owner drops this pin before it looks at
    the model, so that the earlier attempt cannot publish (L3).
  - A batch is committed only if the attempt was the owner after it had journalled the batch. It looks again after the
    commit. If an abort took over in between, the attempt itself takes back what the batch has written: it has kept what
    it replaced, and a pin. Only if it is killed between the two looks, a batch may stay.
- J6 *An entry belongs to one import*, whose id is in its name. An attempt that was taken over may write entries after
  the import was ended, which mean nothing to a later import, and which the next one removes when it begins. Entries of
  earlier versions of this program have no id in their names. They belong to the import that such a version began.
- J7 *The end is decided before the entries are removed.* The state says first that the import is complete, or taken
  back. Then it cannot be aborted, or resumed, but only be ended. The state is removed last, by a compare-and-swap.
- J8 *An aborted import stays known.* The entry `aborted/ID` is never removed. From it, an attempt that looks late (J5)
  can tell an abort from a resume that has ended the import.
"""

from __future__ import annotations

import hashlib
from abc import abstractmethod
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from contextlib import AbstractAsyncContextManager
from typing import Literal, Protocol, runtime_checkable
from uuid import uuid4

import msgspec
from msgspec import Struct

from ..basic import Change, ResourceMeta, RevisionInfo
from .blobs import Upload
from .packs import UidAllotment

OnConflict = Literal["fail", "skip", "replace"]
"""What an import does with a resource whose id the model has already."""

STATE = "state"
_CREATED = "created/"
_REPLACED = "replaced/"
_ABORTED = "aborted/"
_ENDED = b""
"""The value of the entry STATE after an import: an entry can be replaced conditionally, but not removed."""
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

        Only for the entry STATE the comparison and the change must be one atomic step. Its value is empty after an
        import; a store may return None instead. Other names are used once.
        """

    @abstractmethod
    async def import_entries(self, prefix: str, after: str, limit: int) -> list[str]:
        """Return up to `limit` names of entries that begin with `prefix` and follow `after`, ascending."""

    @abstractmethod
    async def remove_import_entries(self, names: Sequence[str]) -> None:
        """Remove entries. A name without an entry is no error."""


async def is_importing(store: ImportKeeping) -> bool:
    """Return whether an import is not finished."""
    return bool(await store.import_entry(STATE))


async def forget_purged(store: ImportKeeping, changes: Sequence[Change]) -> None:
    """Remove what a journal keeps of the resources that these changes purge. Called before the commit (J3).

    If the purge is refused, the resource was changed since the import, so the import would not take it back.
    """
    purged = [change.meta.resource_id for change in changes if change.purge]
    if purged and await is_importing(store):
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
    attempt      a random name of the attempt that owns the import (J5); empty if an earlier version of this program
                 began it
    pin          the pin under which that attempt, or an earlier one, fills the empty model in one step
    named        whether the names of its entries have its id; False if an earlier version began it (J6)
    aborting     whether it is being taken back. It cannot be resumed any more
    ending       whether it is complete or, if `aborting`, taken back, so that only the journal is left (J7)
    """

    id: str
    sha256: str
    on_conflict: OnConflict
    empty: bool
    after: str = ""
    finished: bool = False
    attempt: str = ""
    pin: str = ""
    named: bool = False
    aborting: bool = False
    ending: bool = False


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
        return _state(found) if found else None

    async def begin(self, state: ImportState) -> ImportState | None:
        """Store a state unless there is one (J4), and return the one that is stored.

        Removes what attempts of earlier imports have left (J6). Returns None if another import was ended at this
        moment, and this one was not begun.
        """
        found = await self._store.import_entry(STATE)
        if found or not await self._store.put_import_entry(STATE, _encode(state), replaces=found):
            return await self.state()
        await self._remove(lambda name: not _is_of(name, state))
        return state

    async def note(self, before: ImportState, state: ImportState) -> bool:
        """Replace the state. Returns False if it is another one now (J5)."""
        found = await self._store.import_entry(STATE)
        present = _state(found) if found else None
        if present == state:  # the reply to an earlier attempt was lost
            return True
        return present == before and await self._store.put_import_entry(STATE, _encode(state), replaces=found)

    async def keep_created(self, state: ImportState, digests: bytes) -> None:
        """Add to the list of resources that the import creates. The digests are opaque."""
        await self._store.put_import_entry(f"{_CREATED}{state.id}/{uuid4().hex}", digests, replaces=None)

    async def created(self, state: ImportState) -> AsyncIterator[bytes]:
        """Yield all that `keep_created` has added for this import, in any order."""
        async for names in self._pages(_CREATED):
            for name in names:
                if _is_of(name, state) and (digests := await self._store.import_entry(name)) is not None:
                    yield digests

    async def keep_replaced(self, state: ImportState, parts: Sequence[ReplacedPart]) -> None:
        """Keep what the import is about to replace (J1)."""
        for part in parts:
            kept = f"{entries_of(part.meta.resource_id)}{state.id}/{part.meta.version:020d}/"
            await self._store.put_import_entry(f"{kept}{part.number:09d}", _encode(part), replaces=None)

    async def replaced(self, state: ImportState, resource_id: str) -> list[ReplacedPart]:
        """Return what this import has replaced of a resource, by ascending number; empty if it has replaced nothing.

        If the resource was changed between two attempts to replace it, returns the later state.
        """
        names = [name async for page in self._pages(entries_of(resource_id)) for name in page if _is_of(name, state)]
        names = [name for name in names if _import_of(name)] or names
        last = names[-1].rpartition("/")[0] if names else ""
        return await self._parts(name for name in names if name.rpartition("/")[0] == last)

    async def kept_records(self, resource_id: str) -> list[RevisionInfo]:
        """Return all records that the journal keeps of a resource, whose bodies and blobs stay."""
        if await self.state() is None:
            return []
        names = [name async for page in self._pages(entries_of(resource_id)) for name in page]
        return [record for part in await self._parts(names) for record in part.records]

    async def mark_aborted(self, import_id: str) -> None:
        """Note that an import was aborted. Called before anything is taken back (J8)."""
        await self._store.put_import_entry(f"{_ABORTED}{import_id}", b"1", replaces=None)

    async def was_aborted(self, import_id: str) -> bool:
        """Return whether an import was aborted."""
        return await self._store.import_entry(f"{_ABORTED}{import_id}") is not None

    async def end(self, state: ImportState) -> None:
        """Remove the journal of an import whose state, as it is stored, is `ending`. An interrupted end is repeated.

        If another attempt has taken over, which can only end the import too, the state is left to it.
        """
        assert state.ending, "it is decided first (J7)"
        await self._remove(lambda name: _is_of(name, state))
        found = await self._store.import_entry(STATE)
        if found and _state(found) == state:
            await self._store.put_import_entry(STATE, _ENDED, replaces=found)

    async def _parts(self, names: Iterable[str]) -> list[ReplacedPart]:
        found = [await self._store.import_entry(name) for name in names]
        return [_part(one) for one in found if one is not None]

    async def _remove(self, chosen: Callable[[str], bool]) -> None:
        for prefix in (_CREATED, _REPLACED):
            async for names in self._pages(prefix):
                if removed := [name for name in names if chosen(name)]:
                    await self._store.remove_import_entries(removed)

    async def _pages(self, prefix: str) -> AsyncIterator[list[str]]:
        after = ""
        while names := await self._store.import_entries(prefix, after, PAGE):
            yield names
            after = names[-1]


def _import_of(name: str) -> str:
    """Return the id of the import in the name of an entry; empty if an earlier version of this program wrote it."""
    parts = name.split("/")
    position = {_CREATED[:-1]: (1, 3), _REPLACED[:-1]: (2, 5)}.get(parts[0])
    return parts[position[0]] if position is not None and len(parts) == position[1] else ""


def _is_of(name: str, state: ImportState) -> bool:
    """Return whether an entry belongs to an import (J6)."""
    found = _import_of(name)
    return found == state.id if found or state.named else True


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
    async def drop_pin(self, pin: str) -> None:
        """Drop a pin that another attempt holds, or has held. Its work then fails with PinLost."""

    @abstractmethod
    def allotment(self) -> UidAllotment:
        """Return an object that gives uids to the bodies of a model that is loaded in one step."""

    @abstractmethod
    async def put_bodies(self, bodies: Sequence[tuple[RevisionInfo, bytes]]) -> None:
        """Store bodies that no record names yet. If `allotment` gave the uids, one call has all bodies of a batch."""

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
