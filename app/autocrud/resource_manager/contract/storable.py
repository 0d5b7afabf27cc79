"""The contract of stores that cannot hold all metadata that other stores hold.

Commits accept only ids and names that every store can hold: see `limits`. But earlier versions accepted longer ones,
and NUL in names, on the stores that can hold them. So stores have such metadata, and archives of them too. An import
accepts what its target can hold, and asks before it changes anything.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from ..basic import IndexEntry


@runtime_checkable
class MetadataLimits(Protocol):
    """A store, or a storage, that may be unable to hold metadata of other stores."""

    @abstractmethod
    def unstorable(self, resource_id: str, *, names: Sequence[str] = (), entry: IndexEntry | None = None) -> str:
        """Return why the store cannot hold some metadata: what was found and expected. Empty if it can hold them.

        names  the names of the callers in the metadata
        entry  the index entry of the resource; needed only if the id takes more than `limits.MAX_ID` bytes
        """
