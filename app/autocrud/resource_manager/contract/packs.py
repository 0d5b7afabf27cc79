"""The contract of packs: bodies of an import that a ResourceStore stores together."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, Protocol, runtime_checkable

from typing_extensions import override


class StoredPack(NamedTuple):
    """A pack, and how many bodies it has that were not removed."""

    name: str
    bodies: int


class UidAllotment(Protocol):
    """Gives new bodies their uids."""

    @abstractmethod
    def uid_for(self, body: bytes) -> str:
        """Return the uid of a new body."""

    @abstractmethod
    def end_batch(self) -> None:
        """End a batch. All its bodies are then stored by one call of `put_many`."""


class SingleUids(UidAllotment):
    """Gives each body a uid of its own, outside of packs."""

    def __init__(self, new_uid: Callable[[], str]) -> None:
        self._new_uid = new_uid

    @override
    def uid_for(self, body: bytes) -> str:
        return self._new_uid()

    @override
    def end_batch(self) -> None:
        """Do nothing: the bodies of a batch have nothing in common."""


@runtime_checkable
class BodyPacking(Protocol):
    """A ResourceStore that can store the bodies of an import in packs. A uid of such a body is `{pack}.{place}`."""

    @abstractmethod
    def uid_allotment(self, new_uid: Callable[[], str]) -> UidAllotment:
        """Return an object that gives uids to the bodies of one import.

        `new_uid` returns a new uid. The name of a pack is one too.
        """

    @abstractmethod
    async def packs_older_than(self, generation: int, after: str = "", limit: int = 1000) -> list[StoredPack]:
        """Return up to `limit` packs of generations below `generation`, ascending, that follow the pack `after`."""

    @abstractmethod
    async def retain_in_pack(self, pack: str, uids: Sequence[str]) -> None:
        """Remove all other bodies of a pack."""


@runtime_checkable
class PackReferences(Protocol):
    """A MetaStore whose records may name bodies in packs, after `load` has published such records.

    Older programs would remove nothing from a pack at a purge. So the step that publishes these records also raises the
    format of the store, and older programs refuse it.
    """

    @abstractmethod
    async def packs_with_orphans(self, packs: Sequence[StoredPack]) -> Mapping[str, Sequence[str]]:
        """Return the packs that have more bodies than records name. Each one comes with the uids that records name.

        A pack without bodies that no record names is one of them too.
        """
