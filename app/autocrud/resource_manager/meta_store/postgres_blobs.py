"""The part of PostgresMetaStore that keeps rows of blobs. `backends.postgres.blob_schema` has the invariants."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from typing_extensions import override

from ...errors import CrudError
from ..backends.postgres.blob_schema import BlobSchema
from ..backends.postgres.pool import Connection
from ..backends.postgres.schema import FORMAT, QUOTA, STALE, UNKNOWN_FORMAT
from ..basic import BlobRow, ModelSpec, blob_epoch_of
from ..contract.blobs import BlobRows, BlobUsage, BlobUse
from ..contract.store_errors import over_quota, stale_upload, unknown_format
from .postgres_access import PostgresAccess, server_error


class PostgresBlobRows(PostgresAccess, BlobRows):
    """A MetaStore in PostgreSQL with rows of blobs. The tables for them exist from the first upload on."""

    @override
    def bind(self, spec: ModelSpec) -> None:
        super().bind(spec)
        self._blobs = BlobSchema(self._schema)
        self._has_blob_tables = self._blobs_ready = False  # once true, they stay true until `close`

    @override
    async def close(self) -> None:
        self._has_blob_tables = self._blobs_ready = False
        await super().close()

    @override
    async def blob_epoch(self) -> int:
        return int((await self._blob_state())[0])

    @override
    async def blob_usage(self) -> BlobUsage:
        _, blobs, size = await self._blob_state()
        return BlobUsage(int(blobs), int(size))

    async def _blob_state(self) -> tuple[Any, ...]:
        rows = await self._blob_rows("SELECT epoch, blobs, size::bigint FROM <blob-state>", ())
        return rows[0] if rows else (0, 0, 0)

    @override
    async def blobs(self, sha256s: Sequence[str]) -> list[BlobRow]:
        rows = await self._blob_rows(
            "SELECT key, size, owner FROM unnest(%s::text[]) s JOIN <blobs> ON key >= s || '/' AND key < s || '0'"
            " ORDER BY key",
            (sorted(set(sha256s)),),
        )
        return [BlobRow(key=key, size=size, owner=owner) for key, size, owner in rows]

    @override
    async def blob_uses(self, key: str, limit: int = 100) -> list[BlobUse]:
        rows = await self._blob_rows(
            "SELECT DISTINCT ON (id) id, revision FROM <blob-uses> WHERE key = %s ORDER BY id, revision DESC LIMIT %s",
            (key, limit),
        )
        return [BlobUse(*row) for row in rows]

    async def _blob_rows(self, statement: str, params: Sequence[Any]) -> list[tuple[Any, ...]]:
        """Return the rows of a statement that reads the tables for blobs, or none if these do not exist."""
        if not self._has_blob_tables:
            self._has_blob_tables = await self._do(self._blobs.has_tables)
        return await self._rows(statement, params) if self._has_blob_tables else []

    @override
    async def add_blob(self, row: BlobRow, *, quota: int | None = None) -> None:
        parameters = (row.key, blob_epoch_of(row.key), row.size, row.owner, quota)
        statement = "SELECT <add>(%s::uuid, %s::text, %s::bigint, %s::bigint, %s::text, %s::bigint)"
        try:
            await self._call_blobs(statement, *parameters, mark=True)
        except CrudError as error:
            cause = server_error(error)
            if cause is not None and cause.sqlstate == STALE:
                raise stale_upload(row.key) from None
            if cause is not None and cause.sqlstate == QUOTA:
                raise over_quota(row, int(cause.diag.message_detail or 0), quota or 0) from None
            raise

    @override
    async def remove_blobs(self, keys: Sequence[str]) -> list[str]:
        epochs = [blob_epoch_of(key) for key in keys]
        if not keys:
            return []
        rows = None
        # A removal whose reply was lost is repeated. It returns the same keys, because no commit can name them again.
        while rows is None:
            rows = await self._call_blobs(
                "SELECT <remove>(%s::uuid, %s::text[], %s::bigint[])", list(keys), epochs, mark=False
            )
        free = {free for (free,) in rows}
        return [key for key in dict.fromkeys(keys) if key in free]

    async def _call_blobs(self, statement: str, *parameters: Any, mark: bool) -> list[tuple[Any, ...]] | None:
        """Call a stored function for blobs, and make the tables and functions before if they are missing."""
        self._blobs_ready = self._blobs_ready or await self._do(self._blobs.ready)

        def making(connection: Connection) -> Any:
            return self._blobs.making(connection, mark=mark)

        try:
            rows = await self._call(
                self._blobs.filled(statement), *parameters, within=None if self._blobs_ready else making
            )
        except CrudError as error:
            cause = server_error(error)
            if cause is not None and cause.sqlstate == UNKNOWN_FORMAT:
                raise unknown_format(self._spec.name, int(cause.diag.message_detail or 0), FORMAT) from None
            raise
        self._has_blob_tables, self._blobs_ready = True, self._blobs_ready or mark
        return rows
