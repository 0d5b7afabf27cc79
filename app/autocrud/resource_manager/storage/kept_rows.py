"""The rows of the blobs that an export names, kept in a temporary file until they are asked for.

A commit may replace or drop a record after it was read. Then a sweep removes the rows of its blobs, although the pin
keeps the content. So the rows are read together with the records that name them.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence

from ...errors import StoreDamaged
from ..backends.sqlite.spool import Spool
from ..basic import BlobRow, RevisionInfo
from ..contract.blobs import BlobRows

AT_ONCE = 500
"""How many keys are looked up at a time."""


class KeptRows:
    """Rows of blobs. Memory does not depend on their number."""

    def __init__(self, rows: BlobRows) -> None:
        self._rows, self._spool = rows, Spool()

    async def keep(self, records: Iterable[RevisionInfo]) -> None:
        """Keep the rows of the blobs that these records name. A row that is missing is not kept."""
        keys = (key for record in records for key in record.blobs)
        while some := list(dict.fromkeys(itertools.islice(keys, AT_ONCE))):
            known = await self._spool.blob_rows(some)
            await self._spool.add_blob_rows(await self._stored([key for key in some if key not in known]))

    async def get(self, keys: Sequence[str]) -> list[BlobRow]:
        """Return the rows of these keys, in their order. Raises StoreDamaged if one is missing."""
        found = await self._spool.blob_rows(keys)
        found |= {row.key: row for row in await self._stored([key for key in keys if key not in found])}
        if missing := [key for key in keys if key not in found]:
            raise StoreDamaged(f"the file {missing[0]} is missing, although a revision names it")
        return [found[key] for key in keys]

    async def _stored(self, keys: Sequence[str]) -> list[BlobRow]:
        wanted = set(keys)
        rows = await self._rows.blobs([key.partition("/")[0] for key in keys]) if keys else []
        return [row for row in rows if row.key in wanted]

    async def close(self) -> None:
        """Remove the file."""
        await self._spool.close()
