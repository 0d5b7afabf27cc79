"""What of a model's resources is there for a caller.

- B1 *What may not be read is not there*: a read and a write of it answer what they answer for an id that nobody has.
- B2 *A write is allowed by the state that it replaces, and by the one that it leaves.* Both are looked at while the write is planned, and
  the commit holds only for exactly the planned state; so no rival's write in between lets anything through.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from typing import Any, NamedTuple

from ...access import Action
from ...query import META_FIELDS, Filter, truth, uses_data_fields
from ..basic import ResourceMeta
from ..model.codec import Codec


class AccessFilter(NamedTuple):
    """Resolved filters, None for everything. An action that `change` does not name is forbidden."""

    read: Filter | None
    change: Mapping[Action, Filter | None]


async def holds(
    where: Filter | None, meta: ResourceMeta, json: Callable[[], Awaitable[bytes]], codec: Codec[Any]
) -> bool:
    """Whether a filter finds a resource in this state. Its data is asked for only where the filter is about it."""
    if where is None:
        return True
    keys: dict[str, Any] = {f"meta.{name}": kind.key(getattr(meta, name)) for name, kind in META_FIELDS.items()}
    missing: tuple[str, ...] = ()
    if uses_data_fields(where):
        entry = codec.index_stored(await json())
        keys |= entry.keys
        missing = entry.missing
    return truth(where, keys, missing) is True
