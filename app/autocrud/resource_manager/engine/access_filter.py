"""The filters that say which resources of a model a caller may read and change (row-level access control).

- B1 *A resource that the caller may not read does not exist for the caller.* A read or write of it has the same result
  as one of an id that no resource has. There are two exceptions: its id and its unique values stay taken, so a write
  that needs them fails.
- B2 *A write must be allowed both in the state that it replaces and in the state that it leaves.* Planning checks both,
  and the commit succeeds only if the stored state is still the one that was checked. So a concurrent write cannot get
  around the check.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from typing import Any, NamedTuple

from ...access import Action
from ...query import META_FIELDS, Filter, truth, uses_data_fields
from ..basic import ResourceMeta
from ..model.codec import Codec


class AccessFilter(NamedTuple):
    """The resources that a caller may read and change.

    read    the resolved filter of the resources that the caller may read; None: all of them
    change  for each allowed action, the resolved filter of the resources that it may be applied to; None: all of them.
            An action that is not in it is forbidden. Its entry for "read" decides which blobs of other resources the
            data of a write may refer to; without this entry, none.
    """

    read: Filter | None
    change: Mapping[Action, Filter | None]


async def matches(
    where: Filter | None, meta: ResourceMeta, json: Callable[[], Awaitable[bytes]], codec: Codec[Any]
) -> bool:
    """Return whether a resolved filter finds a resource in this state. The filter None finds every resource.

    `json` reads the data of the resource. It is called only if the filter names a field of the data.
    """
    if where is None:
        return True
    keys: dict[str, Any] = {f"meta.{name}": kind.key(getattr(meta, name)) for name, kind in META_FIELDS.items()}
    missing: tuple[str, ...] = ()
    if uses_data_fields(where):
        entry = codec.index_stored(await json())
        keys |= entry.keys
        missing = entry.missing
    return truth(where, keys, missing) is True
