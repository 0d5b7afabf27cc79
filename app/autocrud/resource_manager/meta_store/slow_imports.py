"""The part of FastSlowMetaStore for imports: the journal is in the slow store, which also limits the metadata."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence

from typing_extensions import override

from ..basic import IndexEntry
from ..contract.import_journal import ImportKeeping
from ..contract.storable import MetadataLimits


class SlowImports(ImportKeeping, MetadataLimits):
    """The entries of a journal in the slow store, and its limits."""

    @property
    @abstractmethod
    def _import_keeping(self) -> ImportKeeping:
        """Return the slow store."""

    @override
    async def import_entry(self, name: str) -> bytes | None:
        return await self._import_keeping.import_entry(name)

    @override
    async def put_import_entry(self, name: str, value: bytes, *, replaces: bytes | None) -> bool:
        return await self._import_keeping.put_import_entry(name, value, replaces=replaces)

    @override
    async def import_entries(self, prefix: str, after: str, limit: int) -> list[str]:
        return await self._import_keeping.import_entries(prefix, after, limit)

    @override
    async def remove_import_entries(self, names: Sequence[str]) -> None:
        await self._import_keeping.remove_import_entries(names)

    @override
    def unstorable(self, resource_id: str, *, names: Sequence[str] = (), entry: IndexEntry | None = None) -> str:
        slow = self._import_keeping
        return slow.unstorable(resource_id, names=names, entry=entry) if isinstance(slow, MetadataLimits) else ""
