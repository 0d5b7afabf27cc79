"""The part of PostgresMetaStore that loads whole models."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, nullcontext
from uuid import uuid4

from typing_extensions import override

from ...errors import CrudError, StoreUnavailable
from ..backends.postgres.loading import PostgresLoader
from ..backends.postgres.pool import Connection, is_lost, translating
from ..contract.loading import BulkLoading, Loader, LoaderAround
from ..contract.store_errors import model_not_empty
from .postgres_access import server_error
from .postgres_blobs import PostgresBlobRows


class PostgresLoading(PostgresBlobRows, BulkLoading):
    """A MetaStore in PostgreSQL into which a whole model can be loaded."""

    @override
    @asynccontextmanager
    async def load(self, pin: str, *, size: int = 0) -> AsyncIterator[Loader]:
        spec_id = await self._opened()
        if await self._rows("SELECT 1 FROM <main> LIMIT 1"):
            raise model_not_empty("resources")
        if await self._rows("SELECT 1 FROM <done> LIMIT 1"):
            raise model_not_empty("results of Idempotency-Keys")
        if await self._blob_rows("SELECT 1 FROM <blobs> LIMIT 1", ()):
            raise model_not_empty("files")
        async with self._pool().own_connection() as connection:
            await connection.begin_load()
            loader = PostgresLoader(
                connection,
                self._spec,
                self._schema,
                self._blobs,
                self._encode,
                spec_id,
                pin,
                lambda: self._commit_load(connection),
            )
            await loader.begin()
            yield LoaderAround(loader, nullcontext)

    async def _commit_load(self, connection: Connection) -> None:
        """Commit. If the reply is lost, find out whether it committed (P4)."""
        number = uuid4()
        await connection.execute(self._filled("INSERT INTO <recent> (call) VALUES (%s)"), (number,))
        try:
            with translating():
                await connection.execute("COMMIT")
        except CrudError as error:
            cause = server_error(error)
            if cause is None or not is_lost(cause):
                raise
            if not await self._happened(number):
                raise StoreUnavailable("the connection was lost; nothing was loaded, try again") from error
        self._has_blob_tables = self._blobs_ready = False  # they are looked for again
