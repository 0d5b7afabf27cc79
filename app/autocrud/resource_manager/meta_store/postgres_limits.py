"""The part of PostgresMetaStore that tells which metadata of other stores PostgreSQL cannot hold."""

from __future__ import annotations

from collections.abc import Sequence

from typing_extensions import override

from ..backends.postgres.query import PREFIX
from ..basic import IndexEntry
from ..contract.limits import MAX_ID
from ..contract.storable import MetadataLimits

ENTRY_BYTES = 2600
"""Largest id and beginning of an indexed text together, in bytes: an entry of a B-tree has at most 2,704 bytes with its
headers. PostgreSQL may compress them and hold more, but this cannot be known before."""


class PostgresLimits(MetadataLimits):
    """A MetaStore in PostgreSQL. Its texts have no NUL, and its indexes limit the ids."""

    @override
    def unstorable(self, resource_id: str, *, names: Sequence[str] = (), entry: IndexEntry | None = None) -> str:
        if any("\0" in name for name in names):
            return "the name of its author holds NUL, expected a text that PostgreSQL can hold"
        if len(resource_id) <= MAX_ID // 4 or (size := len(resource_id.encode())) <= MAX_ID:
            return ""
        texts = [] if entry is None else [key[:PREFIX] for key in entry.keys.values() if isinstance(key, str)]
        most = ENTRY_BYTES - max((len(text.encode()) for text in texts), default=0)
        if size <= most:
            return ""
        beside = " beside its indexed texts" if texts else ""
        return f"its id takes {size} bytes in UTF-8, expected at most {most}, which PostgreSQL can hold{beside}"
