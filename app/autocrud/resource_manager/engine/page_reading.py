"""Lists with their bodies, of which no more is held than a page of an answer may need."""

from __future__ import annotations

from msgspec.structs import replace

from ...query import Query
from ..basic import Hit, IStorage, Page
from ..runtime.deadline import STEP_BYTES, check_time


async def read_page(storage: IStorage, query: Query) -> tuple[Page[Hit], list[bytes]]:
    """Return what a resolved query finds, and the bodies. The page ends early where bodies are large; its cursor says where.

    Raises NotEnoughTime if the bodies might not be compared with their hashes in time.
    """
    page, bodies = await storage.search_with_bodies(query)
    while len(bodies) < len(page.items):  # again, for the cursor after the last one that was read
        query = replace(query, limit=len(bodies))
        page, bodies = await storage.search_with_bodies(query)
    check_time(sum(map(len, bodies)) // STEP_BYTES)  # they are compared with their hashes, and put together
    return page, bodies
