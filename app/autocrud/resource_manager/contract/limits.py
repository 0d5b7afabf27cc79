"""Limits for the stored data of one resource, the same for all stores. They are checked when a write is planned.

Stores check no sizes. Every store can hold more than these limits allow, because larger resources exist: earlier
programs wrote them, and a field may be declared indexed after its values were stored.

- L1 *A write that exceeds a limit is refused*, unless L2 applies.
- L2 *A resource that is already too large can still be changed.* A list with more than MAX_ITEMS items may be replaced
  by a list that does not have more items. If the indexed fields take more than MAX_INDEXED bytes, the value of each
  field may be replaced by one that does not take more bytes, or takes at most SMALL bytes. So repeated writes add at
  most SMALL bytes for each field.
- L3 *Nothing else is refused for its size*: no read, delete, restore, publish, switch or purge, and no new index entry
  of stored data.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from ...errors import MetadataTooLarge, Violation
from ..basic import IndexEntry

MAX_ID = 1024
"""Largest id of a new resource, in bytes of UTF-8. An index entry of PostgreSQL has at most 2.7 KB. The id must fit
into it beside the beginning of an indexed text."""
MAX_NAME = 1024
"""Largest name of a caller, in bytes of UTF-8. It is stored as created_by and updated_by."""
MAX_INDEXED = 128 * 1024
"""Largest total size of the indexed fields of a resource, in bytes of JSON in UTF-8 (`IndexEntry.shown`)."""
MAX_ITEMS = 10_000
"""Largest number of items in an indexed list."""
SMALL = 1024
"""Bytes of JSON that an indexed field may always take, in a resource that already exceeds MAX_INDEXED."""
MAX_FIELDS = 500
"""Largest number of indexed fields of a model. SQLite allows 2,000 columns in a table. PostgreSQL failed with 1,000
indexes on a table."""
MAX_SCHEMA_VERSION = 2**63 - 1
MAX_VERSION = 10**18 - 1
"""Largest version of a resource: ETags have up to 18 digits. Only an archive that another program wrote has it."""

_MISSING: Any = object()


def next_version(version: int) -> int:
    """Return the version that follows. MAX_VERSION stays, and the nonce alone tells the states apart."""
    return min(version + 1, MAX_VERSION)


def may_exceed(json: bytes) -> bool:
    """Return False if data of this JSON is within the limits, at the cost of one comparison.

    An item of a list takes at least two bytes of JSON, so data of 2 * MAX_ITEMS bytes has no list with more than
    MAX_ITEMS items. Such data is also smaller than MAX_INDEXED, and so are its indexed fields.
    """
    return len(json) > 2 * MAX_ITEMS


def check_items(resource_id: str, items: Mapping[str, int], before: Mapping[str, int]) -> None:
    """Raise MetadataTooLarge if a list breaks L1. Call this before keys are made, which is expensive for long lists.

    items   number of items of each indexed list
    before  number of items of each indexed list in the state that is replaced (L2)
    """
    for name, count in items.items():
        if count > max(MAX_ITEMS, before.get(name, 0)):
            found = f"has {count} items, expected at most {MAX_ITEMS}"
            raise MetadataTooLarge(
                f"the indexed list {name!r} of resource {resource_id!r} {found}: store fewer items, or do not index it",
                (Violation(_pointer(name), found),),
            )


def check_index(resource_id: str, entry: IndexEntry, before: IndexEntry | None) -> None:
    """Raise MetadataTooLarge if the size of the entry breaks L1. `before`: the entry of the replaced state (L2)."""
    if len(entry.shown) <= MAX_INDEXED:
        return
    sizes = _sizes(entry)
    if before is not None and len(before.shown) > MAX_INDEXED:
        old_sizes = _sizes(before)
        sizes = {name: size for name, size in sizes.items() if size > max(SMALL, old_sizes.get(name, 0))}
        if not sizes:
            return
    name = max(sizes, key=lambda name: sizes[name])
    found = f"takes {sizes[name]} of the {MAX_INDEXED} bytes that all indexed fields may take together, as JSON"
    raise MetadataTooLarge(
        f"the indexed fields of resource {resource_id!r} take {len(entry.shown)} bytes as JSON, expected at most"
        f" {MAX_INDEXED}: shorten {name!r}, which takes {sizes[name]}, or do not index it",
        (Violation(_pointer(name), found),),
    )


def _sizes(entry: IndexEntry) -> dict[str, int]:
    """Return how many bytes of JSON each indexed field takes; a missing one takes none."""
    tree = msgspec.json.decode(entry.shown)
    values = {name: _value(tree, name) for name in entry.keys}
    return {name: 0 if value is _MISSING else len(msgspec.json.encode(value)) for name, value in values.items()}


def _value(tree: Any, name: str) -> Any:
    for part in name.split("."):
        if not isinstance(tree, dict) or part not in tree:
            return _MISSING
        tree = tree[part]
    return tree


def _pointer(name: str) -> str:
    return "/" + "/".join(part.replace("~", "~0").replace("/", "~1") for part in name.split("."))
