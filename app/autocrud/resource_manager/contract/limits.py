"""How large the stored data of one resource may become: the same on every store, and checked when a write is planned.

Stores check no sizes. Every store can hold more than these limits allow, because larger resources exist: earlier
programs wrote them, and a field may be declared indexed after its values were stored.

- L1 *A write makes nothing too large.* A write that would leave more than a limit allows is refused, unless L2 applies.
- L2 *A resource that is already too large can still be changed.* A list with more than MAX_ITEMS items may be replaced
  by one that is no longer. If the indexed fields take more than MAX_INDEXED, each of them may be replaced by one that
  is no longer, or takes at most SMALL. So repeated writes make it grow by at most SMALL for each field.
- L3 *Nothing else is refused for its size*: no read, delete, restore, publish, switch or purge, and no new index entry
  of stored data.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from ...errors import MetadataTooLarge, Violation
from ..records import IndexEntry

MAX_ID = 1024
"""Bytes in UTF-8 of the id of a new resource. A B-tree entry of PostgreSQL has at most 2.7 KB, a text in it 1 KB."""
MAX_NAME = 1024
"""Bytes in UTF-8 of the name of a caller, which is stored as created_by and updated_by."""
MAX_INDEXED = 128 * 1024
"""Bytes of all indexed fields of a resource together, as JSON in UTF-8 (`IndexEntry.shown`)."""
MAX_ITEMS = 10_000
"""Items of an indexed list."""
SMALL = 1024
"""Bytes of JSON that an indexed field may always take, in a resource that already exceeds MAX_INDEXED."""
MAX_FIELDS = 500
"""Indexed fields of a model. SQLite has 2,000 columns in a table. PostgreSQL failed with 1,000 indexes on a table."""
MAX_SCHEMA_VERSION = 2**63 - 1

_MISSING: Any = object()


def may_exceed(json: bytes) -> bool:
    """Return False if data of this JSON is within the limits, at the cost of one comparison.

    An item of a list takes at least two bytes of JSON, so a list with more than MAX_ITEMS items takes more than twice
    as many bytes. The indexed fields take no more than all of the data.
    """
    return len(json) > 2 * MAX_ITEMS


def check_items(resource_id: str, items: Mapping[str, int], before: Mapping[str, int]) -> None:
    """Raise MetadataTooLarge if a list breaks L1, before a key is made of each of its items.

    items   how many items each indexed list has
    before  the same of the state that is replaced (L2)
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
